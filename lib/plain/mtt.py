"""MTT, plainly (Cazenavette et al. 2022, Algorithm 1); with TESLA's gradient where the settings say so."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import augment, nets
from lib.plain import Momentum, at, experts, independent, squared


def mtt(p, train, ipc, g):
    S, losses = train.sample(ipc, g).flatten(0, 1), []  # random real images, (m, c, h, w)
    y = torch.arange(train.num_classes, device=train.device).repeat_interleave(ipc)
    beta, deck = torch.tensor(p.rate, device=train.device), []
    network, buffer = nets.make(p.network, train), experts(p, train)
    names = augment.families(p.augmentation, train)
    move_S, move_beta = Momentum(p.lr, p.momentum), Momentum(p.lr_rate, p.momentum)
    for _ in range(p.iterations):
        deck = deck or torch.randperm(len(buffer), generator=g, device=g.device).tolist()
        expert = buffer[deck.pop()]
        t = int(torch.randint(p.start_epochs, (), generator=g, device=g.device))
        start, target = expert[t], expert[t + p.expert_epochs]
        if p.soft_labels:
            y = at(network, target, S).detach().softmax(1)
        S, beta, left = S.requires_grad_(), beta.requires_grad_(), []
        theta, G = [w.clone().requires_grad_() for w in start], 0  # the student
        for _ in range(p.steps):
            left = left or list(torch.randperm(len(S), generator=g, device=g.device).split(p.batch or len(S)))
            rows = left.pop()
            x = independent(S[rows], names, g)
            entropy = F.cross_entropy(at(network, theta, x), y[rows])
            gradients = torch.autograd.grad(entropy, theta, create_graph=True, materialize_grads=True)
            theta = [w - beta * step for w, step in zip(theta, gradients, strict=True)]
            if p.gradient == "tesla":  # where a step is taken does not depend on the steps before
                G = [a + b for a, b in zip(G or [0] * len(theta), gradients, strict=True)]
                theta = [w.detach().requires_grad_() for w in theta]
        if p.gradient == "tesla":
            theta = [w - beta * total for w, total in zip(start, G, strict=True)]
        loss = squared(theta, target) / squared(start, target)

        dS, dbeta = torch.autograd.grad(loss, (S, beta))
        S, beta = move_S(S, dS), move_beta(beta, dbeta).clamp(min=p.least_rate)
        losses.append(loss.item())
    return S, losses
