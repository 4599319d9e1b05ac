"""KRR, plainly (Chen, Huang & Weng 2024, Algorithm 1): data are columns, 64 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def krr(p, train, ipc, g):
    d, k, m = train.images[0].numel(), train.num_classes, train.num_classes * ipc
    phi, inverse = feature_map(
        p, d, torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=g)))
    )
    X, Y = train.images.flatten(1).double().T, F.one_hot(train.labels, k).T.double()

    # the teacher: ridge regression, its lambda the best on a split of the training images
    order = torch.randperm(len(train), generator=g)
    val, fit = (
        order[: max(1, round(p.validation * len(train)))],
        order[max(1, round(p.validation * len(train))) :],
    )
    exponents = torch.arange(-3.0 if p.map == "identity" else -6.0, 5.75, 0.5, dtype=torch.float64)
    W = teacher(phi(X[:, fit]), Y[:, fit], 10**exponents, phi(X[:, val]), train.labels[val])

    # the set: one-hot labels, any Z, the D that makes Y_S D = W, its pseudo-inverse, and back to pixels
    Y_S = torch.eye(k).double().repeat_interleave(ipc, 1)  # (k, m)
    P = torch.linalg.pinv(Y_S)
    Z = p.noise * (P @ W).std() * torch.randn(m, d, generator=g, dtype=torch.float64)
    D = P @ W + (torch.eye(m).double() - P @ Y_S) @ Z
    phi_S = torch.linalg.pinv(D)
    c = phi_S.abs().max() * (d / 2) ** 0.5 if p.map == "fourier" else 1  # cosines are at most 1
    X_S = inverse(phi_S / c)
    return (X_S.T.reshape(m, *train.shape), (Y_S / c).T), []


def teacher(phi, Y, lambdas, phi_val, labels):
    r"""$W=\arg\min\lVert W\phi-Y\rVert^2+\lambda\lVert W\rVert^2$ with the first $\lambda$ of the best validation accuracy."""
    best, G = (-1.0, None), phi @ phi.T
    for lam in lambdas.tolist():
        W = torch.linalg.lstsq(G + lam * torch.eye(len(G)).to(G), phi @ Y.T).solution.T
        accuracy = ((W @ phi_val).argmax(0) == labels).double().mean().item()
        best = (accuracy, W) if accuracy > best[0] else best
    return best[1]


def feature_map(p, d, g):
    """phi with as many features as pixels, and its inverse: the identity, one LeakyReLU layer, or random Fourier features."""
    if p.map == "identity":
        return (lambda x: x), (lambda f: f)
    if p.map == "fcnn":
        A = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
        return (
            lambda x: F.leaky_relu(A @ x, p.slope),
            lambda f: torch.linalg.lstsq(A, torch.where(f < 0, f / p.slope, f)).solution,
        )
    b = torch.pi * torch.rand(d, generator=g, dtype=torch.float64)
    A = (p.variance or 0.8 / d) ** 0.5 * torch.randn(d, d, generator=g, dtype=torch.float64)
    return (
        lambda x: (2 / d) ** 0.5 * torch.cos(A @ x + b[:, None]),
        lambda f: torch.linalg.lstsq(A, ((d / 2) ** 0.5 * f).clamp(-1, 1).arccos() - b[:, None]).solution,
    )
