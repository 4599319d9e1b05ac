"""Minimax diffusion, plainly (Gu et al. 2024), on a chain without learned variance."""

from __future__ import annotations

import copy

import torch

from lib.nets.generators.prior import the_prior
from lib.plain import ancestral, cosines


def minimax(p, train, ipc, g):
    eps, losses, K, T = the_prior(p.prior, train), [], train.num_classes, p.prior.times
    seed = int(torch.randint(2**62, (), generator=g))
    theta, mean = copy.deepcopy(eps).requires_grad_(True), copy.deepcopy(eps)
    adam = torch.optim.AdamW(theta.parameters(), lr=p.lr, weight_decay=0)
    abar = (1 - torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)).cumprod(0)
    mu, std = (a[:, None, None] for a in (train.transform.mean, train.transform.std))
    M, D = ([[] for _ in range(K)] for _ in range(2))  # memories of real images and of predictions
    left = []
    for _ in range(p.iterations):
        left = left or [
            rows for rows in torch.randperm(len(train), generator=g).split(p.batch) if len(rows) == p.batch
        ]
        rows = left.pop()
        x, c = 2 * (train.images[rows] * std + mu) - 1, train.labels[rows]
        t = torch.randint(T, c.shape, generator=g)
        noise = torch.randn(x.shape, generator=g)
        y = c.masked_fill(torch.rand(c.shape, generator=g) < p.drop, K)
        a, b = (v.float()[t][:, None, None, None] for v in (abar.sqrt(), (1 - abar).sqrt()))
        e = theta(a * x + b * noise, t, y)
        z_hat, loss = (a * x + b * (noise - e)) / a, ((noise - e) ** 2).mean()
        present = c.unique().tolist()
        for k in present:
            if M[k]:
                loss = loss + p.weight_real / len(present) * (1 - cosines(z_hat[c == k], M[k]).min())
                loss = loss + p.weight_own / len(present) * cosines(z_hat[c == k], D[k]).max()
        for k in present:
            M[k] = (M[k] + list(x[c == k].flatten(1)))[-p.memory :]
            D[k] = (D[k] + list(z_hat[c == k].detach().flatten(1)))[-p.memory :]
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
        for m, w in zip(mean.parameters(), theta.parameters(), strict=True):
            m.data = p.average * m + (1 - p.average) * w.data
    g, y = torch.Generator().manual_seed(seed), torch.arange(K).repeat_interleave(ipc)
    z = ancestral(mean, y, K, train.shape, abar, p.sampling_steps, p.guidance, g)
    return ((z.clamp(-1, 1) + 1) / 2 - mu) / std, losses
