"""WMDD, plainly (Liu et al. 2025): barycenters of features, and BatchNorm statistics class by class. The squeezed network comes from
``lib.recover.teacher``; the relabelling is ``lib.evaluate.relabel``."""

from __future__ import annotations

import math

import ot
import torch
import torch.nn.functional as F

from lib.augment import views
from lib.plain import draw_views, pixel_range, see, view
from lib.recover.teacher import the_teacher


def wmdd(p, train, ipc, g):
    C, seed, teacher = train.num_classes, g.initial_seed(), the_teacher(p.teacher, train)
    low, high = pixel_range(train)
    B, real = [], []  # per class the features to be reached, and the statistics of every layer
    for c in range(C):
        parts = [see(teacher, x) for x in train.of_class(c).split(p.stat_batch)]
        B.append(barycenter(torch.cat([f for _, f, _ in parts]), ipc, views.keyed("barycenter", seed, c)))
        n = [len(f) / len(train.of_class(c)) for _, f, _ in parts]
        stats = [[torch.stack(statistics(a_l)) for a_l in a] for a, _, _ in parts]
        real.append([sum(w * s[l] for w, s in zip(n, stats, strict=True)) for l in range(len(stats[0]))])

    S, size = torch.zeros(C, ipc, *train.shape).to(train.images), min(p.block_images // ipc, C)
    losses = [0.0] * p.iterations
    for k, block in enumerate(torch.arange(C).split(size)):  # as many classes as make block_images images
        own = views.keyed("recover", seed, k)
        x = torch.randn(size * ipc, *train.shape, generator=own).to(S).requires_grad_()  # noise
        A, y = draw_views(p, train.size, own), block.repeat_interleave(ipc).to(x.device)
        adam = torch.optim.Adam([x], betas=p.betas, eps=1e-8)
        for t in range(p.iterations):
            a, f, logits = see(teacher, view(x, A[t]))  # what enters the BatchNorm layers, features, logits
            bn = 0
            for l, a_l in enumerate(a):
                for c, a_c in zip(block, a_l.chunk(size), strict=True):
                    mu, sigma2 = statistics(a_c)
                    bn = bn + ((mu - real[c][l][0]).norm() + (sigma2 - real[c][l][1]).norm()) / size
            feature = (f - torch.cat([B[c] for c in block])).norm()
            loss = p.ce_weight * F.cross_entropy(logits, y) + p.feature_weight * feature + p.bn_weight * bn
            (x.grad,) = torch.autograd.grad(loss, x)
            adam.param_groups[0]["lr"] = p.lr / 2 * (1 + math.cos(math.pi * t / p.iterations))
            adam.step()
            with torch.no_grad():
                x.copy_(x.clamp(low, high))  # what pixels in [0, 1] become
            losses[t] += loss.item() * size / C
        S[block] = x.detach().unflatten(0, (size, ipc))
    return S.flatten(0, 1), losses


def barycenter(F, m, g):
    """m atoms of equal weight for the features (n, d): an exact plan from atoms to features, then the mean of what each received."""
    n, B = len(F), F[torch.randperm(len(F), generator=g)[:m].to(F.device)].double()
    for _ in range(100):
        plan = ot.emd(torch.full((m,), 1 / m).to(B), torch.full((n,), 1 / n).to(B), ot.dist(B, F.double()))
        new = m * plan @ F.double()
        still, B = (new - B).square().sum() <= 1e-7, new
        if still:
            break
    return B.to(F)


def statistics(a):
    """Mean and biased variance of every channel over images and pixels."""
    return a.mean((0, 2, 3)), a.var((0, 2, 3), correction=0)
