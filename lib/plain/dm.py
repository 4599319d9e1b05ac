"""DM, plainly (Zhao & Bilen 2023, Algorithm 1)."""

from __future__ import annotations

import torch

from lib import nets
from lib.plain import Momentum, draw_omega, siamese


def dm(p, train, ipc, g):
    S, losses = train.sample(ipc, g), []  # random real images, (C, ipc, c, h, w)
    descend = Momentum(p.lr, p.momentum)
    for _ in range(p.iterations):
        psi = nets.make(p.network, train, g).embed  # a new random network, never trained
        T = train.sample(p.real_batch, g)  # (C, n, c, h, w)
        omega = draw_omega(p, train, g)
        S.requires_grad_()
        loss = 0
        for c in range(train.num_classes):
            e_T = psi(siamese(T[c], omega[c])).detach().mean(0)
            e_S = psi(siamese(S[c], omega[c])).mean(0)
            loss = loss + (e_T - e_S).square().sum()
        (gradient,) = torch.autograd.grad(loss, S)
        S = descend(S, gradient)
        losses.append(loss.item())
    return S.flatten(0, 1), losses
