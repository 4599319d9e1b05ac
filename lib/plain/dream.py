"""DREAM, plainly (Liu et al. 2023): IDC whose real images are those nearest to the centres of k-means."""

from __future__ import annotations

import torch

from lib import nets
from lib.plain import Momentum, draw_omega, gradient, learn, siamese, tiled, tiles
from lib.select.sampler import OWN_STREAM


def dream(p, train, ipc, g):
    @torch.no_grad()
    def R(n):  # of every class the images nearest to the n centres of its embeddings in this network
        chosen = []
        for c, start in enumerate(train.indices(n, own)):
            x, mu = train.of_class(c), theta.embed(train.images[start])
            h = theta.embed(x)
            for _ in range(p.sampler.iterations):  # Lloyd's algorithm
                cluster = torch.cdist(h, mu).argmin(1)
                mu = torch.stack([h[cluster == j].mean(0) for j in range(n)])
            chosen.append(x[torch.cdist(mu, h).argmin(1)])
        return torch.stack(chosen)  # (C, n, c, h, w)

    C, to_network, losses = train.num_classes, train.transform.forward, []
    own = torch.Generator().manual_seed(g.initial_seed() ^ OWN_STREAM)  # random numbers of the clustering
    train.indices(4 * ipc, g)  # a random start would have drawn these
    theta = nets.make(p.network, train, g)
    S = tiled(R(4 * ipc), ipc)  # a representative in every tile
    S = train.transform.inverse(S.flatten(0, 1)).unflatten(0, (C, ipc))  # pixels in [0, 1]
    descend = Momentum(p.lr * ipc / 10 * (train.size / p.base_side) ** 2, p.momentum)
    for _ in range(p.outer):
        theta, S = nets.make(p.network, train, g), S.clamp(0, 1)
        rates = {"momentum": p.momentum_network, "weight_decay": p.decay_network}
        learner = torch.optim.SGD(theta.parameters(), p.lr_network, **rates)
        convs = [weight for weight in theta.parameters() if weight.dim() == 4]
        for t in range(p.inner):
            train.indices(p.real_batch, g)  # a random batch would have drawn these
            if t % p.sampler.every == 0:
                T = R(p.real_batch)
            omega, loss = draw_omega(p, train, g), 0
            S.requires_grad_()
            for c in range(C):
                g_T = gradient(theta, convs, siamese(T[c], omega[c]), c)
                g_S = gradient(theta, convs, siamese(to_network(tiles(S[c])), omega[c]), c, graph=True)
                loss = loss + sum((a - b).square().sum() for a, b in zip(g_S, g_T, strict=True))
            (step,) = torch.autograd.grad(loss, S)
            for c in range(C):  # the code steps all images after every class, most by momentum alone
                S = descend(S, step if c == 0 else 0 * step)
            losses.append(loss.item())
            if t < p.inner - 1:  # the network learns from random real images
                rows = torch.randperm(len(train), generator=g, device=train.device)[: p.n_data]
                learn(theta, learner, train.images[rows], train.labels[rows], p, train, g)
    return to_network(S.clamp(0, 1).flatten(0, 1)), losses
