"""KIP with the kernel of ConvNet3, plainly (Nguyen, Novak, Xiao & Lee 2021): all pairs of pixels of all pairs of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def conv_kip(p, train, ipc, g):
    C = train.num_classes
    X_s = train.sample(ipc, g).flatten(0, 1).double().requires_grad_()  # random real images, (m, c, h, w)
    y_s = (torch.eye(C).double().repeat_interleave(ipc, 0) - 1 / C).requires_grad_()  # centred one-hot
    adam, losses = torch.optim.Adam([X_s, y_s] if p.learn_labels else [X_s], lr=p.lr), []
    for _ in range(p.iterations):
        rows = train.indices(p.target_batch // C, g).flatten()
        X_t, y_t = train.images[rows].double(), F.one_hot(train.labels[rows], C) - 1 / C
        K_ss = convnet_ntk(X_s, X_s, p.sigma_w, p.sigma_b)
        K_ts = convnet_ntk(X_t, X_s, p.sigma_w, p.sigma_b)
        ridge = p.ridge * K_ss.trace() / len(X_s) * torch.eye(len(X_s)).to(K_ss)
        y_hat = K_ts @ torch.linalg.solve(K_ss + ridge, y_s)
        loss = (y_hat - y_t).square().mean() / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return (X_s.detach().float(), y_s.detach().float()), losses


def convnet_ntk(x, z, sigma_w=2**0.5, sigma_b=0.1):
    """Theta of 3 x (convolution, ReLU, pooling) + flatten + Dense between images, from K[p, p'] for every pair of pixels."""
    i, j = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(z))).to(x.device).T
    K, q, r = (torch.einsum("nchw,ncuv->nhwuv", a, b) / a.shape[1] for a, b in ((x[i], z[j]), (x, x), (z, z)))
    theta = torch.zeros_like(K)
    for _ in range(3):
        K, q, r = (sigma_w**2 * patches(v) + sigma_b**2 for v in (K, q, r))
        theta = sigma_w**2 * patches(theta) + K
        K, active = relu(K, diagonal(q)[i], diagonal(r)[j])
        q, r = relu(q, diagonal(q), diagonal(q))[0], relu(r, diagonal(r), diagonal(r))[0]
        K, q, r, theta = (pooled(v) for v in (K, q, r, theta * active))
    K, theta = (diagonal(v).mean((1, 2)) for v in (K, theta))
    return (sigma_w**2 * (theta + K) + sigma_b**2).view(len(x), len(z))


def patches(K):
    """Mean over the nine offsets of K[p + offset, p' + offset], 0 outside the images."""
    h, wide = K.shape[1], F.pad(K, (1, 1) * 4)
    return sum(wide[:, a : a + h, b : b + h, a : a + h, b : b + h] for a in range(3) for b in range(3)) / 9


def diagonal(K):
    """K[p, p], (n, h, w)."""
    return K.flatten(3).flatten(1, 2).diagonal(dim1=1, dim2=2).view(K.shape[:3])


def pooled(K):
    """Mean over 2x2 windows of both images."""
    for axis in (1, 2, 3, 4):
        K = K.unflatten(axis, (-1, 2)).mean(axis + 1)
    return K


def relu(K, q, r):
    """Covariance of rectified normal variables of covariance K, variances q and r, and the probability that both are positive."""
    size = (q[:, :, :, None, None] * r[:, None, None]).sqrt()
    square = size.square() - K.square()  # a pixel and itself: no gradient through the angle
    sine = torch.where(square > 1e-14 * size.square(), square, 0.0).sqrt()
    active = (torch.pi - torch.atan2(sine, K)) / (2 * torch.pi)
    return sine / (2 * torch.pi) + active * K, active
