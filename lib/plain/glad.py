"""GLaD, plainly (Cazenavette et al. 2023): DM's loss, pulled back to W+ or to latents."""

from __future__ import annotations

import torch

from lib import nets
from lib.nets.generators import the_prior
from lib.plain import Momentum, draw_omega, siamese


def glad(p, train, ipc, g):
    dm, G, C, losses = p.objective, the_prior(p.prior, train), train.num_classes, []
    y = torch.arange(C, device=train.device).repeat_interleave(ipc)
    Z = G.draw(y, g)
    if p.space == "w":
        Z = G.mapping(Z, y).detach()  # (C * ipc, L, d): a style for every layer
    torch.randn(
        C * ipc, *train.shape, generator=g
    )  # the fast version's DM starts from noise that nobody sees
    descend = Momentum(p.lr, p.momentum)
    for _ in range(p.iterations):
        psi = nets.make(dm.network, train, g).embed  # a new random network, never trained
        T, omega = train.sample(dm.real_batch, g), draw_omega(dm, train, g)
        Z.requires_grad_()
        image = G.from_f(G.start(Z, y), Z, y, 0) if p.space == "w" else G(Z, y)
        S = train.transform.forward((image + 1) / 2).unflatten(0, (C, ipc))
        loss = 0
        for c in range(C):
            e_T = psi(siamese(T[c], omega[c])).detach().mean(0)
            e_S = psi(siamese(S[c], omega[c])).mean(0)
            loss = loss + (e_T - e_S).square().sum()
        (gradient,) = torch.autograd.grad(loss, Z)
        Z = descend(Z, gradient)
        losses.append(loss.item())
    return torch.cat([Z.flatten(1), y[:, None].float()], 1), losses
