"""SRe2L's recovery, plainly (Yin, Xing & Shen 2023): one image of every class after the other. The squeezed network comes from
``lib.recover.teacher``; the relabelling is ``lib.evaluate.relabel``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.augment import views
from lib.plain import draw_views, pixel_range, see, view
from lib.recover.teacher import the_teacher


def sre2l(p, train, ipc, g):
    C, teacher = train.num_classes, the_teacher(p.teacher, train)  # trained on all real images, frozen
    norms = [layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    rho = [p.first_multiplier] + [1.0] * (len(norms) - 1)
    low, high = pixel_range(train)
    S, losses = torch.zeros(C, ipc, *train.shape).to(train.images), [0.0] * p.iterations
    for j in range(ipc):
        own = views.keyed("recover", g.initial_seed(), j)
        x = torch.randn(C, *train.shape, generator=own).to(S).requires_grad_()  # noise
        A = draw_views(p, train.size, own)
        adam = torch.optim.Adam([x], betas=p.betas, eps=1e-8)
        for t in range(p.iterations):
            a, _, logits = see(teacher, view(x, A[t]))  # what enters the BatchNorm layers, and the logits
            bn = 0
            for l, layer in enumerate(norms):
                mu, sigma2 = a[l].mean((0, 2, 3)), a[l].var((0, 2, 3), correction=0)
                bn = bn + rho[l] * ((mu - layer.running_mean).norm() + (sigma2 - layer.running_var).norm())
            loss = p.ce_weight * F.cross_entropy(logits, torch.arange(C, device=x.device)) + p.bn_weight * bn
            (x.grad,) = torch.autograd.grad(loss, x)
            adam.param_groups[0]["lr"] = p.lr / 2 * (1 + math.cos(math.pi * t / p.iterations))
            adam.step()
            with torch.no_grad():
                x.copy_(x.clamp(low, high))  # what pixels in [0, 1] become
            losses[t] += loss.item() / ipc
        S[:, j] = x.detach()
    return S.flatten(0, 1), losses
