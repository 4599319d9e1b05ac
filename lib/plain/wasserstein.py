"""WassersteinDM, plainly: DM with the squared Wasserstein distance of the embeddings of a class."""

from __future__ import annotations

import ot
import torch

from lib import nets
from lib.plain import Momentum, draw_omega, siamese


def wasserstein(p, train, ipc, g):
    S, losses = train.sample(ipc, g), []
    descend = Momentum(p.lr, p.momentum)
    for _ in range(p.iterations):
        psi = nets.make(p.network, train, g).embed
        T = train.sample(p.real_batch, g)
        omega = draw_omega(p, train, g)
        S.requires_grad_()
        loss = 0
        for c in range(train.num_classes):
            e_T = psi(siamese(T[c], omega[c])).detach()  # (n, d)
            e_S = psi(siamese(S[c], omega[c]))  # (m, d)
            M = (e_T[:, None] - e_S).square().sum(-1)  # (n, m)
            gamma = ot.emd(
                [], [], M.detach().double().cpu().numpy()
            )  # the best plan, a constant of the gradient
            loss = loss + (torch.as_tensor(gamma).to(M) * M).sum()  # W_2^2
        (gradient,) = torch.autograd.grad(loss, S)
        S = descend(S, gradient)
        losses.append(loss.item())
    return S.flatten(0, 1), losses
