"""DSA, plainly (Zhao & Bilen 2021, Algorithm 1): DC with one transform for the real and the synthetic images of a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import augment, nets
from lib.plain import Momentum, batches, draw_omega, siamese


def dsa(p, train, ipc, g):
    def D(A, B):  # DC's distance
        rows = [(a.flatten(1), b.flatten(1)) for a, b in zip(A, B, strict=True) if a.dim() > 1]
        return sum((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum() for a, b in rows)

    def gradient(x, c, graph=False):  # of the loss of images of class c
        loss = F.cross_entropy(theta(x), torch.full((len(x),), c, device=x.device))
        return torch.autograd.grad(loss, list(theta.parameters()), create_graph=graph, materialize_grads=True)

    C, (T, epochs), losses = train.num_classes, p.loops(ipc), []
    S = train.sample(ipc, g)  # random real images, (C, ipc, c, h, w)
    y = torch.arange(C, device=train.device).repeat_interleave(ipc)
    descend, names = Momentum(p.lr, p.momentum), augment.families(p.augmentation, train)
    nets.make(p.network, train, g)  # the fast version draws one before the first
    for _ in range(p.outer):
        theta = nets.make(p.network, train, g)
        for t in range(T):
            real, omega, loss = train.sample(p.real_batch, g), draw_omega(p, train, g), 0
            S.requires_grad_()
            for c in range(C):  # the same omega on both sides
                g_S = gradient(siamese(S[c], omega[c]), c, graph=True)
                g_T = gradient(siamese(real[c], omega[c]), c)
                loss = loss + D(g_S, g_T)
            S = descend(S, torch.autograd.grad(loss, S)[0])
            losses.append(loss.item())
            if t < T - 1:  # train the network on S, every image with a transform of its own
                x = S.flatten(0, 1)
                for rows, A, _ in batches(len(x), p.network_batch, epochs, g, names, p.mode):
                    entropy, weights = F.cross_entropy(theta(A(x[rows])), y[rows]), list(theta.parameters())
                    steps = torch.autograd.grad(entropy, weights, materialize_grads=True)
                    with torch.no_grad():
                        for weight, step in zip(weights, steps, strict=True):
                            weight -= p.lr_network * step
    return S.flatten(0, 1), losses
