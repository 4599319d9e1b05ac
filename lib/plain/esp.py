"""ESP, plainly: our reconstruction of Ma et al. 2023."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import augment, nets
from lib.plain import at, experts, independent, parts


def esp(p, train, ipc, g):
    S, losses = train.sample(ipc, g).flatten(0, 1).requires_grad_(), []  # random real images
    y = torch.arange(train.num_classes, device=train.device).repeat_interleave(ipc)
    adam = torch.optim.Adam([S], lr=p.lr)
    network, names = nets.make(p.network, train), augment.families(p.augmentation, train)
    buffer = [
        torch.stack([torch.cat([w.flatten() for w in theta]) for theta in way]) for way in experts(p, train)
    ]

    def loss(theta, x, labels):
        return F.cross_entropy(at(network, parts(network, theta), x), labels)

    for i in range(p.iterations):
        if i % p.reset == 0:  # an expert, and the span of its next epochs
            k, t = (
                int(torch.randint(n, (), generator=g, device=g.device)) for n in (len(buffer), p.start_epochs)
            )
            way = buffer[k][t : t + p.window + 1]
            U, s, _ = torch.linalg.svd((way[1:] - way[0]).T.double(), full_matrices=False)
            U = U[:, s**2 > p.cut * s[0] ** 2].float()
            theta = way[0].clone()
        x_S = independent(S, names, g)
        rows = torch.randint(len(train), (p.real_batch,), generator=g, device=g.device)
        x_T = independent(train.images[rows], names, g)

        theta = theta.requires_grad_()  # the student takes a step and is projected
        (g_S,) = torch.autograd.grad(loss(theta, x_S, y), theta, create_graph=True)
        step = (theta - p.eta * g_S - way[0]).detach()
        theta = (way[0] + U @ (U.T @ step)).requires_grad_()
        L_T = loss(theta, x_T, train.labels[rows])  # the images move so that the real loss there falls
        (g_T,) = torch.autograd.grad(L_T, theta)
        S.grad = torch.autograd.grad(-p.eta * (g_S @ (U @ (U.T @ g_T))), S)[0]
        adam.step()
        theta = theta.detach()
        losses.append(L_T.item())
    return S.detach(), losses
