"""DCC, plainly (Lee et al. 2022, Algorithm 1): one gradient of all classes together, after a warm-up class by class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum, batches


def dcc(p, train, ipc, g):
    def D(A, B):  # DC's distance
        rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(A, B, strict=True) if a.dim() > 1]
        return sum((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum() for a, b in rows)

    def gradient(x, labels, graph=False):  # of the loss of images of any classes
        loss = F.cross_entropy(theta(x), labels)
        return torch.autograd.grad(loss, list(theta.parameters()), create_graph=graph, materialize_grads=True)

    C, (T, epochs), losses = train.num_classes, p.loops(ipc), []
    S, classes = train.sample(ipc, g), torch.arange(train.num_classes, device=train.device)
    y, y_T = classes.repeat_interleave(ipc), classes[:, None].expand(C, p.real_batch)
    descend = Momentum(p.lr, p.momentum)
    nets.make(p.network, train, g)  # the fast version draws one before the first
    for k in range(p.outer):
        theta = nets.make(p.network, train, g)
        for t in range(T):
            real = train.sample(p.real_batch, g)  # (C, B, c, h, w)
            S.requires_grad_()
            g_T = [gradient(real[c], y_T[c]) for c in range(C)]
            if k >= p.warm_outer or t >= p.warm_inner:  # contrastive: what all classes share cancels
                mean_T = [torch.stack(each).mean(0) for each in zip(*g_T, strict=True)]
                loss = D(gradient(S.flatten(0, 1), y, graph=True), mean_T)
            else:  # DC's loss
                loss = sum(D(gradient(S[c], y_T[c, :1].expand(ipc), graph=True), g_T[c]) for c in range(C))
            S = descend(S, torch.autograd.grad(loss, S)[0])
            losses.append(loss.item())
            if t < T - 1:  # train the network on S
                x = S.flatten(0, 1)
                for rows, _, _ in batches(len(x), p.network_batch, epochs, g):
                    steps, weights = gradient(x[rows], y[rows]), list(theta.parameters())
                    with torch.no_grad():
                        for weight, step in zip(weights, steps, strict=True):
                            weight -= p.lr_network * step
    return S.flatten(0, 1), losses
