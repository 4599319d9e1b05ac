"""DiM, plainly (Wang et al. 2023): GAN training goes on, and generated images learn the logits of real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lib import augment, nets
from lib.nets.generators.prior import the_prior
from lib.plain import critic_loss


def dim(p, train, ipc, g):
    G, losses, K = the_prior(p.prior, train).requires_grad_(True).train(), [], train.num_classes
    D, (step_G, step_D) = G.critic, G.optimisers(p.lr)
    mean, std = (a[:, None, None] for a in (train.transform.mean, train.transform.std))
    names, left, labels = augment.families(p.augmentation, train), [], torch.arange(K).repeat_interleave(ipc)
    weak, z_S = (
        tuple(name for name in names if name != "cutout"),
        torch.randn(K * ipc, p.prior.noise, generator=g),
    )
    for t in range(p.iterations):
        begins = not left
        left = left or [
            rows for rows in torch.randperm(len(train), generator=g).split(p.batch) if len(rows) == p.batch
        ]
        if begins if p.renew_every is None else t % p.renew_every == 0:  # another network with new weights
            phi = nets.make(p.pool[int(torch.randint(len(p.pool), (), generator=g))], train)
            sgd = torch.optim.SGD(nets.initialise(phi, g).parameters(), 0.01, 0.9, weight_decay=5e-4)
        rows = left.pop()
        x, y = train.images[rows], train.labels[rows]
        fake = G(torch.randn(len(y), p.prior.noise, generator=g), y)
        source, classes = D(fake)
        loss_G = F.cross_entropy(classes, y) - source.mean()

        for some in torch.randint(len(train), (p.network_steps, p.batch), generator=g):
            a = train.images[some]
            a = augment.apply(a, augment.draw(weak, 1, g, p.batch, mode="idc")) if weak else a
            sgd.zero_grad()
            F.cross_entropy(phi(a), train.labels[some]).backward()
            sgd.step()
        pair = torch.cat([x, ((fake + 1) / 2 - mean) / std])
        pair = augment.apply(pair, augment.draw(names, 1, g, mode="idc").repeat(len(pair))) if names else pair
        real, made = (F.log_softmax(phi(half), 1) for half in pair.chunk(2))
        loss = loss_G + p.weight * ((real.detach() - made) ** 2).mean()
        losses.append(loss.item())
        step_G.zero_grad()
        loss.backward()
        step_G.step()

        y_ = torch.randint(K, y.shape, generator=g)  # the critic's step
        x, x_ = 2 * (x * std + mean) - 1, G(torch.randn(len(y), p.prior.noise, generator=g), y_).detach()
        step_D.zero_grad()
        critic_loss(D, x, y, x_, y_, p.prior, t % p.prior.penalty_every == 0, g).backward()
        step_D.step()
    return torch.cat([z_S, labels[:, None]], 1), losses
