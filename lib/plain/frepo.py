"""FRePo, plainly (Zhou, Nezhadarya & Ba 2022): one network of the pool at every step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lib.nets.widening import FeatureNet
from lib.plain import Lamb


def frepo(p, train, ipc, g):
    C, X = train.num_classes, train.sample(ipc, g).flatten(0, 1)  # random real images, (m, c, h, w)
    y = ((torch.eye(C).repeat_interleave(ipc, 0) - 1 / C) / (C / 10) ** 0.5).to(X)
    pool = [FeatureNet(train, p.width, p.depth, p.norm).to(X) for _ in range(p.networks)]
    for network in pool:
        network.reset(g)
    adam = [torch.optim.Adam(network.parameters(), lr=p.lr_network) for network in pool]
    ages, n, losses = [i * (p.online_updates // p.networks) for i in range(p.networks)], 0, []
    step_X, step_y = Lamb(), Lamb()
    for t in range(p.iterations):
        f = pool[n].eval().embed  # all but the last layer, held fixed
        rows = torch.randperm(len(train), generator=g, device=X.device)[: p.real_batch]
        X, y = X.requires_grad_(), y.requires_grad_()
        X_2, y_2 = (torch.cat([X, X.flip(3)]), torch.cat([y, y])) if p.flip else (X, y)
        phi_t, phi_s = f(train.images[rows]).detach().double(), f(X_2).double()
        K_ss = phi_s @ phi_s.T
        ridge = p.ridge * K_ss.trace() / len(K_ss) * torch.eye(len(K_ss)).to(K_ss)
        y_hat = phi_t @ phi_s.T @ torch.linalg.solve(K_ss + ridge, y_2.double())
        first, second = y.topk(2).values.T  # a label's largest entries should be 1/C apart
        loss = (y_hat - F.one_hot(train.labels[rows], C) + 1 / C).square().sum(1).mean() / 2
        loss = loss - (first - second).clamp(max=1 / C).mean()

        dX, dy = torch.autograd.grad(loss, (X, y))
        eta = p.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / p.iterations)))
        X, y = step_X(X, dX, eta), step_y(y, dy, eta) if p.learn_labels else y.detach()
        if ages[n] > p.online_updates:  # old: draw it anew
            pool[n].reset(g)
            adam[n], ages[n] = torch.optim.Adam(pool[n].parameters(), lr=p.lr_network), 0
        else:  # one training step on the set as it is now
            error = (pool[n].train()(X) - y).square().sum(1).mean() / 2
            adam[n].zero_grad()
            error.backward()
            adam[n].step()
            ages[n] += 1
        n = int(torch.randint(p.networks, (), generator=g, device=X.device))
        losses.append(loss.item())
    return (X, y), losses
