"""DDM, plainly (Malakshan et al. 2025): DM's distance, the diversity of a class, and the style of every block's map."""

from __future__ import annotations

import torch

from lib import nets
from lib.plain import Momentum, draw_omega, siamese


def ddm(p, train, ipc, g):
    _, gram, moments, diversity = p.distance.parts  # with their weights

    def G(F):  # (n, K, h, w) -> mean Gram matrix (K, K)
        F = F.flatten(2)
        return sum(f @ f.T for f in F) / len(F) / F[0].numel()

    def mu_sigma(F):  # of the mean map, (2, K)
        F = F.mean(0).flatten(1)
        return torch.stack([F.mean(1), (F.var(1) + 1e-5).sqrt()])

    def icd(e):  # (m, d): minus the divergence of every image from the mean of its k nearest neighbours
        k = diversity.k or min(max(1, round(0.2 * len(e))), len(e) - 1)
        D = (e[:, None] - e).detach().square().sum(-1).fill_diagonal_(float("inf"))
        log_p, log_q = (z.log_softmax(-1) for z in (e, e[D.topk(k, largest=False).indices].mean(1)))
        return -(log_p.exp() * (log_p - log_q)).sum()

    S, losses = train.sample(ipc, g), []
    descend = Momentum(p.lr, p.momentum)
    for _ in range(p.iterations):
        net = nets.make(p.network, train, g)
        T = train.sample(p.real_batch, g)
        omega = draw_omega(p, train, g)
        S.requires_grad_()
        loss = 0
        for c in range(train.num_classes):
            with torch.no_grad():
                F_T, e_T = net.look(siamese(T[c], omega[c]), "act")
            F_S, e_S = net.look(siamese(S[c], omega[c]), "act")
            loss = loss + (e_T.mean(0) - e_S.mean(0)).square().sum()
            if ipc > 1:
                loss = loss + diversity.weight * icd(e_S)
            for a, b in zip(F_T, F_S, strict=True):
                loss = loss + gram.weight / len(F_S) * (G(a) - G(b)).square().sum()
                loss = loss + moments.weight / len(F_S) * (mu_sigma(a) - mu_sigma(b)).square().mean()
        (gradient,) = torch.autograd.grad(loss, S)
        S = descend(S, gradient)
        losses.append(loss.item())
    return S.flatten(0, 1), losses
