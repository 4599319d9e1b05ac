"""IDM, plainly (Zhao et al. 2023): mosaics, a queue of networks of different age, cross-entropy weighted by their accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import nets
from lib.plain import Momentum, draw_omega, expand, mosaic, siamese


def idm(p, train, ipc, g):
    C, q, (_, class_aware) = train.num_classes, p.networks, p.distance.parts

    def new():  # a network, its optimiser, and how many training images it had right, of how many
        net = nets.make(p.network, train, g)
        return [net, torch.optim.SGD(net.parameters(), q.lr, q.momentum, weight_decay=q.decay), 0.0, 0.0]

    real = train.sample(4 * ipc, g).unflatten(1, (4, ipc)).transpose(0, 1)  # (4, C, ipc, c, h, w)
    S, losses = mosaic(real.flatten(1, 2), "bilinear").unflatten(0, (C, ipc)), []
    descend = Momentum(
        p.lr * (1 - p.momentum**C) / (1 - p.momentum), p.momentum**C
    )  # one step for all classes
    Q, pushed = {k: new() for k in range(q.start)}, q.start
    for t in range(p.iterations):
        if t % q.interval == 0:
            Q[pushed % q.size] = new()  # in the place of the oldest
            pushed += 1
        net, _, right, seen = Q[int(torch.randint(len(Q), (1,), generator=g))]
        a = 100 * right / seen if seen else 0.0  # percent
        T, S = train.sample(p.real_batch, g), S.requires_grad_()
        omega = draw_omega(p, train, g)
        loss = 0
        for c in range(C):
            e_T = net.embed(siamese(T[c], omega[c])).detach().mean(0)
            e = net.embed(siamese(expand(S[c]), omega[c]))  # (4 ipc, d)
            ce = F.cross_entropy(net.classifier(e), torch.full((len(e),), c, device=e.device))
            loss = loss + (e_T - e.mean(0)).square().sum() + class_aware.weight * a * ce
        S = descend(S, torch.autograd.grad(loss, S)[0])
        losses.append(loss.item())

        members = torch.randperm(len(Q), generator=g)[: q.fetch].tolist()
        for rows in torch.randint(len(train), (q.steps, len(members), q.batch), generator=g):
            for k, batch in zip(members, rows, strict=True):
                net, sgd, right, seen = Q[k]
                logits, y = net(train.images[batch]), train.labels[batch]
                weights = list(net.parameters())
                steps = torch.autograd.grad(F.cross_entropy(logits, y), weights, materialize_grads=True)
                for weight, step in zip(weights, steps, strict=True):
                    weight.grad = step
                sgd.step()
                Q[k][2:] = 0.9 * right + (logits.argmax(1) == y).sum().item(), 0.9 * seen + len(y)
    return S.flatten(0, 1), losses
