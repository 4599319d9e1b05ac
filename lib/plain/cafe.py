"""CAFE, plainly (Wang, Zhao et al. 2022): one loop that moves the images, one that trains the network, both ended by accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum


def cafe(p, train, ipc, g):
    C, (_, layers, discrimination) = train.num_classes, p.distance.parts
    labels = torch.arange(C, device=train.device)

    def accuracy(net):  # on fresh real images
        x = train.sample(p.query, g).flatten(0, 1)
        return (net(x).argmax(1) == labels.repeat_interleave(p.query)).double().mean().item()

    def spread(trace):  # nan, which no bound contains, until the window is full
        last = trace[-p.window :]
        return max(last) - min(last) if len(last) == p.window else float("nan")

    S = torch.randn(C, ipc, *train.shape, generator=g, device=train.device)
    descend, losses = Momentum(p.lr, p.momentum), []
    for k in range(p.iterations):
        descend.eta = p.lr * 0.5 ** sum(k >= part * p.iterations for part in (0.6, 0.8, 0.9))
        net, outer, updates = nets.make(p.network, train, g), [], []
        while True:
            T, S, loss = train.sample(p.real_batch, g), S.requires_grad_(), 0
            e_T, e_S = [], []
            for c in range(C):
                (f_T, e), (f_S, e_c) = net.look(T[c], "act"), net.look(S[c], "act")
                e_T.append(e.detach())
                e_S.append(e_c.mean(0))
                for w, a, b in zip(layers.at_depth(net.depth), [*f_T, e], [*f_S, e_c], strict=True):
                    loss = loss + w * (a.detach().mean(0) - b.mean(0)).square().sum()
                loss = loss + (e.detach().mean(0) - e_c.mean(0)).square().sum()
            o = torch.cat(e_T) @ torch.stack(e_S).T  # the class means of S as a classifier
            y = labels.repeat_interleave(p.real_batch)
            loss = loss + discrimination.weight * F.cross_entropy(o, y, reduction="sum")
            S = descend(S, torch.autograd.grad(loss, S)[0])
            updates.append(loss.item())
            outer.append(accuracy(net))
            if spread(outer) < p.saturated or len(outer) == p.max_outer:
                break
            inner = []
            while len(inner) < p.max_inner and not spread(inner) > p.moved:  # epochs: S is one batch
                ce = F.cross_entropy(net(S.flatten(0, 1)), labels.repeat_interleave(ipc))
                weights = list(net.parameters())
                steps = torch.autograd.grad(ce, weights, materialize_grads=True)
                with torch.no_grad():
                    for weight, step in zip(weights, steps, strict=True):
                        weight -= p.lr_network * step
                inner.append(accuracy(net))
        losses.append(sum(updates) / len(updates))
    return S.flatten(0, 1), losses
