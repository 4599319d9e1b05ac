"""HaBa, plainly (Liu et al. 2022), driven by MTT."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import augment, nets
from lib.plain import at, descent, experts, first_hallucinators, independent, squared, supcon


def haba(p, train, ipc, g):
    z, losses, m = train.sample(ipc, g).flatten(0, 1), [], p.hallucinators  # bases: random real images
    q = p.objective
    y = torch.arange(train.num_classes, device=train.device).repeat_interleave(ipc)
    beta, numbers = torch.tensor(q.rate, device=train.device), first_hallucinators(p, train, g)
    E, network, buffer, deck = (
        nets.make(p.extractor, train, g),
        nets.make(p.network, train),
        experts(q, train, p.network),
        [],
    )
    names, eta_E, mu = augment.families(p.augmentation, train), p.lr_extractor, p.momentum
    sgd = descent([z], p.lr, mu, numbers, p.lr_hallucinators, mu, [beta], q.lr_rate, q.momentum_rate)
    opponent = descent(list(E.parameters()), eta_E, p.momentum_extractor)

    def H(k, z):
        W, b, sigma, mu, V, d = (w[k] for w in numbers)
        return F.conv_transpose2d(sigma * F.conv2d(z, W, b) + mu, V, d)

    def two_views():  # of the same bases, as the extractor sees them
        rows = torch.randperm(len(z), generator=g).split(p.batch or len(z))[-1]
        pair = torch.randperm(m, generator=g)[:2]
        e = E.embed(independent(torch.cat([H(k, z[rows]) for k in pair]), names, g))
        return e, F.cosine_similarity(*e.chunk(2)).mean(), y[rows]

    for _ in range(p.iterations):
        deck = deck or torch.randperm(len(buffer), generator=g).tolist()
        expert, t, left = buffer[deck.pop()], int(torch.randint(q.start_epochs, (), generator=g)), []
        start, target = expert[t], expert[t + q.expert_epochs]
        theta = [w.clone().requires_grad_() for w in start]
        for _ in range(q.steps):  # each sees the bases through one hallucinator
            left = left or list(torch.randperm(len(z), generator=g).split(p.batch or len(z)))
            rows, k = left.pop(), int(torch.randint(m, (), generator=g)) if m > 1 else 0
            entropy = F.cross_entropy(at(network, theta, independent(H(k, z[rows]), names, g)), y[rows])
            steps = torch.autograd.grad(entropy, theta, create_graph=True, materialize_grads=True)
            theta = [w - beta * step for w, step in zip(theta, steps, strict=True)]
        loss = squared(theta, target) / squared(start, target)
        losses.append(loss.item())
        # the renderings of a base shall differ
        sgd(loss + (p.club * (1 + two_views()[1]) / 2 if p.adversary else 0))
        beta.data.clamp_(min=q.least_rate)
        if p.adversary:  # the extractor shall see them as one, and tell classes apart
            e, cosine, labels = two_views()
            entropy = F.cross_entropy(E.classifier(e), labels.repeat(2))
            contrast = supcon(*e.chunk(2), labels, p.temperature)
            opponent(p.cls * entropy + p.lik * (1 - cosine) / 2 + p.con * contrast)
    return z.detach(), losses
