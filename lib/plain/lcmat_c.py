"""LCMat-C, plainly: a reconstruction, DSA with a curvature gap of the last layer (Shin et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import augment, nets
from lib.plain import Momentum, batches, draw_omega, gradient, row_cosine, siamese


def lcmat_c(p, train, ipc, g):
    def variance(x, c):  # of the gradients of the last layer over the images of a class
        h = theta.embed(x)
        e = theta.classifier(h).softmax(1) - F.one_hot(torch.tensor(c, device=x.device), train.num_classes)
        each = e[:, :, None] * F.pad(h, (1, 0), value=1.0)[:, None, :]  # bias and weight, (n, C, 1 + d)
        return each.var(0, correction=0)

    C, (T, epochs), losses = train.num_classes, p.loops(ipc), []
    rho = p.distance.parts[1].rho
    S, y = train.sample(ipc, g), torch.arange(C, device=train.device).repeat_interleave(ipc)
    descend, names = Momentum(p.lr, p.momentum), augment.families(p.augmentation, train)
    nets.make(p.network, train, g)  # the fast version draws one before the first
    for _ in range(p.outer):
        theta = nets.make(p.network, train, g)
        weights = list(theta.parameters())
        for t in range(T):
            real, omega, loss = train.sample(p.real_batch, g), draw_omega(p, train, g), 0
            S.requires_grad_()
            for c in range(C):
                A_S, A_T = siamese(S[c], omega[c]), siamese(real[c], omega[c])
                d = row_cosine(gradient(theta, weights, A_S, c, graph=True), gradient(theta, weights, A_T, c))
                loss = loss + d + rho / 2 * (variance(A_T, c).detach() - variance(A_S, c)).norm()
            S = descend(S, torch.autograd.grad(loss, S)[0])
            losses.append(loss.item())
            if t < T - 1:  # train the network on S, every image with a transform of its own
                x = S.flatten(0, 1)
                for rows, A, _ in batches(len(x), p.network_batch, epochs, g, names, p.mode):
                    entropy = F.cross_entropy(theta(A(x[rows])), y[rows])
                    steps = torch.autograd.grad(entropy, weights, materialize_grads=True)
                    with torch.no_grad():
                        for weight, step in zip(weights, steps, strict=True):
                            weight -= p.lr_network * step
    return S.flatten(0, 1), losses
