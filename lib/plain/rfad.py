"""RFAD, plainly (Loo, Hasani, Amini & Rus 2022): one random network after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib.plain import AdaBelief


def rfad(p, train, ipc, g):
    C, X_0 = train.num_classes, train.sample(ipc, g).flatten(0, 1)  # random real images, (m, c, h, w)
    mask = (
        torch.rand(X_0.shape, generator=g, device=X_0.device) < p.corruption
    )  # values that stay as they are
    X, y = X_0.clone(), (torch.eye(C).repeat_interleave(ipc, 0) - 1 / C).to(X_0)
    T, k = torch.eye(X_0[0].numel()).to(X_0), torch.zeros(()).to(X_0).double()
    rates = (p.lr, p.lr if p.learn_labels else 0.0, p.lr_transform, p.lr_scale)
    descend, losses = [AdaBelief(rate) for rate in rates], []
    for _ in range(p.iterations):
        layers = []  # N new networks
        for c in [train.channels] + [p.width] * (p.depth - 1):
            W = (2 / (9 * c)) ** 0.5 * torch.randn(p.networks, p.width, c, 3, 3, generator=g, device=X.device)
            layers.append((W, 0.1 * torch.randn(p.networks, p.width, generator=g, device=X.device)))
        draws = [torch.randperm(len(train), generator=g, device=X.device) for _ in range(p.batches)]
        rows = torch.cat([order[: p.real_batch] for order in draws])

        for tensor in (X, y, T, k):
            tensor.requires_grad_()
        moved = torch.where(mask, X_0, (X.flatten(1) @ T).view(X.shape))
        phi_s, phi_t = features(moved, layers), features(train.images[rows], layers).detach()
        K_ss, K_ts = 2 * phi_s @ phi_s.T + 0.01, 2 * phi_t @ phi_s.T + 0.01
        ridge = p.ridge * K_ss.trace() / len(X) * torch.eye(len(X)).to(X)
        y_hat = K_ts.double() @ torch.linalg.solve((K_ss + ridge).double(), y.double())
        if p.loss == "platt":
            loss = F.cross_entropy(k.exp() * y_hat, train.labels[rows])
        else:
            loss = (y_hat - F.one_hot(train.labels[rows], C) + 1 / C).square().mean() / 2
        gradients = torch.autograd.grad(loss, (X, y, T, k), materialize_grads=True)
        X, y, T, k = (step(x, dx) for step, x, dx in zip(descend, (X, y, T, k), gradients, strict=True))
        losses.append(loss.item())
    return (torch.where(mask, X_0, (X.flatten(1) @ T).view(X.shape)), y), losses


def features(x, layers):
    """Convolution, ReLU, average pooling; flattened, side by side, divided by the root of their number."""
    parts = []
    for n in range(len(layers[0][0])):
        h = x
        for W, b in layers:
            h = F.avg_pool2d(F.relu(F.conv2d(h, W[n], b[n], padding=1)), 2)
        parts.append(h.flatten(1))
    phi = torch.cat(parts, 1)
    return phi / phi.shape[1] ** 0.5
