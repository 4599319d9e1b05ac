"""DD, plainly (Wang et al. 2018, Algorithm 1): one network after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import at, initial_weights


def dd(p, train, ipc, g):
    C, T, losses = train.num_classes, p.steps, []
    if p.init == "noise":
        x = torch.randn(C * ipc, *train.shape, generator=g, device=train.device)
    else:
        x = train.sample(ipc, g).flatten(0, 1)
    x = x.unflatten(0, (C, T, ipc // T)).transpose(0, 1).flatten(1, 2).contiguous()  # images of every step
    y = torch.arange(C, device=train.device).repeat_interleave(ipc // T)
    r = torch.full((T * p.epochs,), p.rate, device=train.device).expm1().log()  # eta = softplus(r)
    adam = torch.optim.Adam([x.requires_grad_(), r.requires_grad_()], lr=p.lr, betas=(0.5, 0.999))
    network, kept, order = nets.make(p.network, train), p.start.begin(p.network, train), []
    for i in range(p.iterations):
        starts = initial_weights(network, p, kept, g)  # of every network
        if not len(order):
            order = torch.randperm(len(train), generator=g, device=train.device)
        rows, order = order[: p.real_batch], order[p.real_batch :]
        eta, loss, wanted = F.softplus(r), 0, train.labels[rows]
        if p.attack:
            wanted = torch.where(wanted == p.attack[0], p.attack[1], wanted)
        for theta in starts:
            for j in range(T * p.epochs):
                entropy = F.cross_entropy(at(network, theta, x[j % T]), y)
                steps = torch.autograd.grad(entropy, theta, create_graph=True, materialize_grads=True)
                theta = [w - eta[j] * step for w, step in zip(theta, steps, strict=True)]
            loss = loss + F.cross_entropy(at(network, theta, train.images[rows]), wanted) / len(starts)
        adam.param_groups[0]["lr"] = p.lr * p.decay ** (i // p.decay_every)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return x.detach().flatten(0, 1), losses
