"""IDC, plainly (Kim et al. 2022, Algorithm 1), with factor 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum, draw_omega, learn, siamese


def idc(p, train, ipc, g):
    def f(x):  # multi-formation: the four tiles of every image, each enlarged
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        tiles = [x[..., i : i + h, j : j + w] for i in (0, h) for j in (0, w)]
        return torch.cat([F.interpolate(tile, scale_factor=2, mode="bilinear") for tile in tiles])

    def gradient(x, c, graph=False):  # of the loss of class c with respect to the convolutions
        convs = [weight for weight in theta.parameters() if weight.dim() == 4]
        loss = F.cross_entropy(theta(x), torch.full((len(x),), c, device=x.device))
        return torch.autograd.grad(loss, convs, create_graph=graph)

    C, to_network, losses = train.num_classes, train.transform.forward, []
    tiles = train.sample(4 * ipc, g)[..., ::2, ::2].unflatten(1, (2, 2, ipc))  # a real image in every tile
    S = torch.cat([torch.cat([tiles[:, i, j] for j in (0, 1)], -1) for i in (0, 1)], -2)
    S = train.transform.inverse(S.flatten(0, 1)).unflatten(0, (C, ipc))  # pixels in [0, 1]
    descend = Momentum(p.lr * ipc / 10 * (train.size / p.base_side) ** 2, p.momentum)
    nets.make(p.network, train, g)  # the fast version draws one before the first
    for _ in range(p.outer):
        theta, S = nets.make(p.network, train, g), S.clamp(0, 1)
        rates = {"momentum": p.momentum_network, "weight_decay": p.decay_network}
        learner = torch.optim.SGD(theta.parameters(), p.lr_network, **rates)
        for t in range(p.inner):
            T, omega, loss = train.sample(p.real_batch, g), draw_omega(p, train, g), 0
            S.requires_grad_()
            for c in range(C):
                g_T = gradient(siamese(T[c], omega[c]), c)
                g_S = gradient(siamese(to_network(f(S[c])), omega[c]), c, graph=True)
                loss = loss + sum((a - b).square().sum() for a, b in zip(g_S, g_T, strict=True))
            (step,) = torch.autograd.grad(loss, S)
            for c in range(C):  # the code steps all images after every class, most by momentum alone
                S = descend(S, step if c == 0 else 0 * step)
            losses.append(loss.item())
            if t < p.inner - 1:  # the network learns from real images
                R = torch.randperm(len(train), generator=g, device=train.device)[: p.n_data]
                learn(theta, learner, train.images[R], train.labels[R], p, train, g)
    return to_network(S.clamp(0, 1).flatten(0, 1)), losses
