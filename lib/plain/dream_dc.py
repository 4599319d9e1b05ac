"""DREAM on DC, plainly (Liu et al. 2023): DC whose real images are those nearest to the centres of k-means."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum, batches, gradient, row_cosine
from lib.select.sampler import OWN_STREAM


def dream_dc(p, train, ipc, g):
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

    C, (T, epochs), losses = train.num_classes, p.loops(ipc), []
    own = torch.Generator().manual_seed(g.initial_seed() ^ OWN_STREAM)  # random numbers of the clustering
    train.indices(ipc, g)  # a random start would have drawn these
    theta = nets.make(p.network, train, g)
    S, y = R(ipc), torch.arange(C, device=train.device).repeat_interleave(ipc)
    descend = Momentum(p.lr, p.momentum)
    for _ in range(p.outer):
        theta = nets.make(p.network, train, g)
        weights = list(theta.parameters())
        for t in range(T):
            train.indices(p.real_batch, g)  # a random batch would have drawn these
            if t % p.sampler.every == 0:
                real = R(p.real_batch)
            S, loss = S.requires_grad_(), 0
            for c in range(C):
                g_S = gradient(theta, weights, S[c], c, graph=True)
                loss = loss + row_cosine(g_S, gradient(theta, weights, real[c], c))
            S = descend(S, torch.autograd.grad(loss, S)[0])
            losses.append(loss.item())
            if t < T - 1:  # train the network on S
                x = S.flatten(0, 1)
                for rows, _, _ in batches(len(x), p.network_batch, epochs, g):
                    entropy = F.cross_entropy(theta(x[rows]), y[rows])
                    steps = torch.autograd.grad(entropy, weights, materialize_grads=True)
                    with torch.no_grad():
                        for weight, step in zip(weights, steps, strict=True):
                            weight -= p.lr_network * step
    return S.flatten(0, 1), losses
