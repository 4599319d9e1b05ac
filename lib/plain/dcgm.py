"""DCGM, plainly (our reconstruction of Zhang et al. 2023)."""

from __future__ import annotations

import copy
from itertools import permutations

import torch
import torch.nn.functional as F

from lib import nets
from lib.nets.generators import the_prior
from lib.plain import critic_loss, draw_omega, siamese


def dcgm(p, train, ipc, g):
    def cosine(a, b, margin):
        return ((a * b).sum() / (a.norm() * b.norm()) - margin).clamp(min=0)

    trained, C, losses = the_prior(p.prior, train), train.num_classes, []
    y = torch.arange(C, device=train.device).repeat_interleave(ipc)
    e = trained.draw(y, g)
    if p.start == "encoder":
        e = trained.encoder(2 * train.transform.inverse(train.sample(ipc, g).flatten(0, 1)) - 1, y)[0]
    G = copy.deepcopy(trained).requires_grad_(True)  # a copy to be learned
    weights = [w for name, w in G.named_parameters() if name.split(".")[0] not in G.aside]
    learned = [e.requires_grad_(), *(weights if p.learn_generator else [])]
    groups = [{"params": learned[:1], "lr": p.lr}, {"params": learned[1:], "lr": p.lr_generator}]
    adam = torch.optim.Adam(groups)
    D, step_D = (G.critic, G.optimisers(p.lr_generator)[1]) if p.gan else (None, None)
    for t in range(p.iterations):
        psi = nets.make(p.network, train, g).embed  # a new random network, never trained
        T, omega = train.sample(p.real_batch, g), draw_omega(p, train, g)
        S = train.transform.forward((G(e, y) + 1) / 2).unflatten(0, (C, ipc))
        f = [psi(siamese(S[c], omega[c])) for c in range(C)]
        r = [psi(siamese(T[c], omega[c])).detach() for c in range(C)]
        mu = torch.cat(r).mean(0) if p.centred else 0.0
        loss = sum((f[c].mean(0) - r[c].mean(0)).square().sum() for c in range(C))
        for c in range(C):
            for i, j in permutations(range(ipc), 2):
                R_intra = cosine(f[c][i] - mu, f[c][j] - mu, p.margin_intra)
                loss = loss + p.intra * R_intra / (C * ipc * (ipc - 1))
        for c, k in permutations(range(C), 2):
            R_inter = cosine(f[c].mean(0) - mu, f[k].mean(0) - mu, p.margin_inter)
            loss = loss + p.inter * R_inter / (C * (C - 1))
        if p.gan:  # images of new noise shall look real to the critic
            rows = torch.randint(len(train), (p.prior.batch,), generator=g)
            x, c = 2 * train.transform.inverse(train.images[rows]) - 1, train.labels[rows]
            source, classes = D(G(trained.draw(c, g), c))
            loss = loss + p.gan * (F.cross_entropy(classes, c) - source.mean())
        for tensor, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            tensor.grad = gradient
        adam.step()
        if p.gan:
            c_ = torch.randint(C, c.shape, generator=g)
            x_ = G(trained.draw(c_, g), c_).detach()
            D.zero_grad()
            critic_loss(D, x, c, x_, c_, p.prior, t % p.prior.penalty_every == 0, g).backward()
            step_D.step()
        losses.append(loss.item())
    return torch.cat([e.detach().flatten(1), y[:, None].float()], 1), losses
