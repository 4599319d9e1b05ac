"""KIP with the kernel of a fully-connected network, plainly (Nguyen, Chen & Lee 2021, Algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kip(p, train, ipc, g):
    C = train.num_classes
    X_s = train.sample(ipc, g).flatten(0, 1).double().requires_grad_()  # random real images, (m, c, h, w)
    y_s = (torch.eye(C).double().repeat_interleave(ipc, 0) - 1 / C).requires_grad_()  # centred one-hot
    adam, losses = torch.optim.Adam([X_s, y_s] if p.learn_labels else [X_s], lr=p.lr), []
    for _ in range(p.iterations):
        rows = train.indices(p.target_batch // C, g).flatten()  # as many of every class
        X_t, y_t = train.images[rows].double(), F.one_hot(train.labels[rows], C) - 1 / C
        K_ss = ntk(X_s, X_s, p.depth, p.sigma_w, p.sigma_b)
        K_ts = ntk(X_t, X_s, p.depth, p.sigma_w, p.sigma_b)
        ridge = p.ridge * K_ss.trace() / len(X_s) * torch.eye(len(X_s)).to(K_ss)
        y_hat = K_ts @ torch.linalg.solve(K_ss + ridge, y_s)
        loss = (y_hat - y_t).square().mean() / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return (X_s.detach().float(), y_s.detach().float()), losses


def ntk(x, z, depth, sigma_w, sigma_b):
    """Theta of depth x (Dense, ReLU) + Dense between the rows of x and z: K the covariance of the layer, q and r the variances."""
    x, z = x.flatten(1), z.flatten(1)
    K, q, r = x @ z.T / x.shape[1], x.square().mean(1)[:, None], z.square().mean(1)[None]
    K, q, r = (sigma_w**2 * v + sigma_b**2 for v in (K, q, r))
    theta = K
    for _ in range(depth):
        size = (q * r).sqrt()
        cosine = K / size
        same = 1 - cosine.square() <= 1e-14  # an image and itself: no gradient through the angle
        angle = torch.where(same, cosine.detach().round(), cosine).arccos()
        active = (torch.pi - angle) / (2 * torch.pi)  # probability that both units are on
        K = sigma_w**2 * size * (angle.sin() / (2 * torch.pi) + active * angle.cos()) + sigma_b**2
        q, r = (sigma_w**2 * v / 2 + sigma_b**2 for v in (q, r))
        theta = sigma_w**2 * theta * active + K
    return theta
