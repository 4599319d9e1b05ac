"""The straightforward way for the relatives of DM: class after class, image after image where the published programs do so.

Every distance takes what the network shows of the real and of the synthetic images of *one* class, as :func:`look` gives it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference import Augment, ConvNet

Look = tuple[list[Tensor], Tensor]  # outputs of every ReLU (n, K, h, w), and the embedding (n, d)


def look(network: ConvNet, x: Tensor) -> Look:
    maps = []
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            maps.append(x)
    return maps, x.flatten(1)


def step(
    network: ConvNet,
    pixels: Tensor,
    optimiser,
    classes: int,
    real: Callable[[int], Tensor],
    augment: Augment,
    distance: Callable[[Look, Look], Tensor],
    together: Callable[[list[Look], list[Look]], Tensor] | None = None,
) -> Tensor:
    """One update of ``pixels`` (class-major): a distance per class, and one of all classes ``together`` where there is one."""
    network.train()
    for parameter in network.parameters():
        parameter.requires_grad = False
    loss, targets, seen = torch.zeros((), device=pixels.device), [], []
    for c in range(classes):
        with torch.no_grad():
            targets.append(look(network, augment(c, real(c))))
        seen.append(look(network, augment(c, pixels.view(classes, -1, *pixels.shape[1:])[c])))
        loss = loss + distance(targets[-1], seen[-1])
        if together is None:
            targets.clear()
    if together is not None:
        loss = loss + together(targets, seen)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()


def gap(real: Tensor, syn: Tensor) -> Tensor:
    return ((real.mean(0) - syn.mean(0)) ** 2).sum()


def gaussian_mmd(real: Look, syn: Look) -> Tensor:
    """M3D: five Gaussian kernels around the mean squared distance of the union."""
    m, both = len(syn[1]), torch.cat([syn[1], real[1]])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    width = squares.detach().sum() / (len(both) ** 2 - len(both))
    kernel = sum(torch.exp(-squares / (width * 2.0**j)) for j in range(-2, 3))
    return kernel[:m, :m].mean() - 2 * kernel[:m, m:].mean() + kernel[m:, m:].mean()


def exact_w2(real: Look, syn: Look) -> Tensor:
    """Squared Wasserstein distance by the exact plan, which is a constant of the gradient."""
    import ot

    cost = torch.cdist(real[1], syn[1]) ** 2
    plan = ot.emd([], [], cost.detach().double().cpu().numpy())
    return (torch.as_tensor(plan).to(cost) * cost).sum()


def attention(p: int, balance: float, scale: float) -> Callable[[Look, Look], Tensor]:
    """DataDAM: attention maps of all but the last ReLU, and the embeddings' means."""

    def pooled(maps: Tensor) -> Tensor:
        return F.normalize(maps.abs().pow(p).sum(1).flatten(1), dim=1)

    def distance(real: Look, syn: Look) -> Tensor:
        matched = sum(gap(pooled(r), pooled(s)) for r, s in zip(real[0][:-1], syn[0][:-1], strict=True))
        return scale * (matched + balance * gap(real[1], syn[1]))

    return distance


def gram(weight: float) -> Callable[[Look, Look], Tensor]:
    """DDM: the mean of the images' Gram matrices at every ReLU, and the embeddings' means."""

    def mean_gram(maps: Tensor) -> Tensor:
        flat = maps.flatten(2)
        return (torch.bmm(flat, flat.transpose(1, 2)) / (flat.shape[1] * flat.shape[2])).mean(0)

    def distance(real: Look, syn: Look) -> Tensor:
        layers = [((mean_gram(r) - mean_gram(s)) ** 2).sum() for r, s in zip(real[0], syn[0], strict=True)]
        return gap(real[1], syn[1]) + weight * sum(layers) / len(layers)

    return distance


def moments(weight: float) -> Callable[[Look, Look], Tensor]:
    """DDM: spatial mean and deviation of the mean map at every ReLU, and the embeddings' means."""

    def pair(maps: Tensor) -> tuple[Tensor, Tensor]:
        flat = maps.mean(0).flatten(1)
        return flat.mean(1), (flat.var(1) + 1e-5).sqrt()

    def distance(real: Look, syn: Look) -> Tensor:
        layers = []
        for r, s in zip(real[0], syn[0], strict=True):
            (m, v), (n, w) = pair(r), pair(s)
            layers.append(0.5 * (((m - n) ** 2).mean() + ((v - w) ** 2).mean()))
        return gap(real[1], syn[1]) + weight * sum(layers) / len(layers)

    return distance


def layers(weights: tuple[float, ...]) -> Callable[[Look, Look], Tensor]:
    """CAFE: class means at every ReLU and, with the last weight plus one, of the embedding."""

    def distance(real: Look, syn: Look) -> Tensor:
        aligned = [w * gap(r, s) for w, r, s in zip(weights, real[0], syn[0], strict=False)]
        return sum(aligned) + (weights[-1] + 1) * gap(real[1], syn[1])

    return distance


def discrimination(beta: float) -> Callable[[list[Look], list[Look]], Tensor]:
    """CAFE: the synthetic class means as a classifier of the real embeddings, summed over the images."""

    def together(real: list[Look], syn: list[Look]) -> Tensor:
        centres = torch.stack([embedding.mean(0) for _, embedding in syn])
        logits = torch.cat([embedding @ centres.T for _, embedding in real])
        labels = torch.arange(len(real), device=logits.device).repeat_interleave(len(real[0][1]))
        return beta * F.cross_entropy(logits, labels, reduction="sum")

    return together


def queue_training(
    networks: list[ConvNet], batches: Callable[[int, int], tuple[Tensor, Tensor]], steps: int
) -> None:
    """IDM: some networks of the queue trained for some steps each, one after the other."""
    for k, network in enumerate(networks):
        network.train().requires_grad_(True)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for t in range(steps):
            x, y = batches(k, t)
            optimiser.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimiser.step()
