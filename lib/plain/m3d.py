"""M3D, plainly (Zhang et al. 2024, Algorithm 1): mosaics, several updates per network, a kernel that sees all moments."""

from __future__ import annotations

import torch

from lib import nets
from lib.plain import Momentum, draw_omega, expand, mosaic, siamese


def m3d(p, train, ipc, g):
    C, beta = train.num_classes, p.momentum
    real = train.sample(4 * ipc, g).unflatten(1, (4, ipc)).transpose(0, 1)  # (4, C, ipc, c, h, w)
    S = mosaic(real.flatten(1, 2), "nearest").unflatten(0, (C, ipc))
    S, losses = train.transform.inverse(S), []  # pixels in [0, 1]
    # one step of all classes that stands for the published optimiser step after every class
    descend = Momentum(p.lr * (1 - beta**C) / (1 - beta), beta**C)
    for t in range(p.iterations):
        S = S.clamp(0, 1).requires_grad_()
        if t % p.networks.every == 0:
            psi = nets.make(p.network, train, g).embed
        T = train.sample(p.real_batch, g)
        omega = draw_omega(p, train, g)
        loss = 0
        for c in range(C):
            X = psi(siamese(expand(train.transform.forward(S[c])), omega[c]))  # (m, d)
            Y = psi(siamese(T[c], omega[c])).detach()  # (n, d)
            Z, m = torch.cat([X, Y]), len(X)
            D = (Z[:, None] - Z).square().sum(-1)
            b = D.detach().sum() / (len(Z) ** 2 - len(Z))
            K = sum(torch.exp(-D / (2.0**l * b)) for l in range(-2, 3))
            loss = loss + K[m:, m:].mean() - 2 * K[:m, m:].mean() + K[:m, :m].mean()
        (gradient,) = torch.autograd.grad(loss, S)
        S = descend(S, gradient)
        losses.append(loss.item())
    return train.transform.forward(S.clamp(0, 1)).flatten(0, 1), losses
