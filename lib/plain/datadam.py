"""DataDAM, plainly (Sajedi, Khaki et al. 2023): where the network responds, at every ReLU but the last, beside DM's distance."""

from __future__ import annotations

import torch

from lib import nets
from lib.plain import Momentum, draw_omega, siamese


def datadam(p, train, ipc, g):
    mmd, sam = p.distance.parts  # with the weights 100 lambda and 100
    S, losses = train.sample(ipc, g), []
    descend = Momentum(p.lr, p.momentum)

    def attention(F):  # (n, K, h, w) -> the mean of the images' attention maps, (h w)
        a = F.abs().pow(sam.p).sum(1).flatten(1)
        return (a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)).mean(0)

    for _ in range(p.iterations):
        net = nets.make(p.network, train, g)  # a new random network, never trained
        T = train.sample(p.real_batch, g)
        omega = draw_omega(p, train, g)
        S.requires_grad_()
        loss = 0
        for c in range(train.num_classes):
            with torch.no_grad():
                F_T, psi_T = net.look(siamese(T[c], omega[c]), "act")
            F_S, psi_S = net.look(siamese(S[c], omega[c]), "act")
            for l in range(len(F_S) - 1):
                loss = loss + sam.weight * (attention(F_T[l]) - attention(F_S[l])).square().sum()
            loss = loss + mmd.weight * (psi_T.mean(0) - psi_S.mean(0)).square().sum()
        (gradient,) = torch.autograd.grad(loss, S)
        S = descend(S, gradient)
        losses.append(loss.item())
    return S.flatten(0, 1), losses
