"""DCEP, plainly: a reconstruction, IDC with a formation of channels (Zhou et al. 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum, draw_omega, learn, siamese


def dcep(p, train, ipc, g):
    def f(x):  # three grey images, one of every channel, and the colour image
        return torch.cat([x[:, k : k + 1].expand_as(x) for k in range(3)] + [x])

    def gradient(x, c, graph=False):  # of the loss of class c with respect to the convolutions
        convs = [weight for weight in theta.parameters() if weight.dim() == 4]
        loss = F.cross_entropy(theta(x), torch.full((len(x),), c, device=x.device))
        return torch.autograd.grad(loss, convs, create_graph=graph)

    C, to_network, losses = train.num_classes, train.transform.forward, []
    real = train.transform.inverse(train.sample(4 * ipc, g).flatten(0, 1))  # pixels in [0, 1]
    grey = (real * real.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)  # luminance
    S = grey.unflatten(0, (C, 4, ipc))[:, :3].transpose(1, 2)  # another real image in every channel
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
