"""DC, plainly (Zhao, Mopuri & Bilen 2021, Algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum, batches


def dc(p, train, ipc, g):
    def D(A, B):  # one minus cosine, summed over rows (output channels) and layers; vectors do not count
        rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(A, B, strict=True) if a.dim() > 1]
        return sum((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum() for a, b in rows)

    def gradient(x, c, graph=False):  # of the loss of images of class c
        loss = F.cross_entropy(theta(x), torch.full((len(x),), c, device=x.device))
        return torch.autograd.grad(loss, list(theta.parameters()), create_graph=graph, materialize_grads=True)

    C, (T, epochs), losses = train.num_classes, p.loops(ipc), []
    S = torch.randn(C, ipc, *train.shape, generator=g, device=train.device)  # noise
    y = torch.arange(C, device=train.device).repeat_interleave(ipc)
    descend = Momentum(p.lr, p.momentum)
    nets.make(p.network, train, g)  # the fast version draws one before the first
    for _ in range(p.outer):
        theta = nets.make(p.network, train, g)
        for t in range(T):
            real, loss = train.sample(p.real_batch, g), 0  # (C, B, c, h, w)
            S.requires_grad_()
            for c in range(C):
                loss = loss + D(gradient(S[c], c, graph=True), gradient(real[c], c))
            S = descend(S, torch.autograd.grad(loss, S)[0])
            losses.append(loss.item())
            if t < T - 1:  # train the network on S
                x = S.flatten(0, 1)
                for rows, _, _ in batches(len(x), p.network_batch, epochs, g):
                    entropy, weights = F.cross_entropy(theta(x[rows]), y[rows]), list(theta.parameters())
                    steps = torch.autograd.grad(entropy, weights, materialize_grads=True)
                    with torch.no_grad():
                        for weight, step in zip(weights, steps, strict=True):
                            weight -= p.lr_network * step
    return S.flatten(0, 1), losses
