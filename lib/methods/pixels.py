"""What methods that learn pixels share: where S starts, and how it is handed back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lib import augment, partition
from lib.errors import unknown
from lib.synset import SyntheticSet, class_major

INITIAL = ("real", "noise")


def initial_pixels(train, ipc: int, init: str, generator: torch.Generator) -> Tensor:
    """``(C * ipc, c, h, w)``, class-major: random real images of each class without replacement, or standard normal noise."""
    if init == "real":
        return train.sample(ipc, generator).flatten(0, 1)
    if init == "noise":
        shape = (train.num_classes * ipc, *train.shape)
        return torch.randn(shape, generator=generator, device=train.device)
    raise unknown("init", init, INITIAL)


def real_mosaics(train, ipc: int, factor: int, generator: torch.Generator, mode: str = "bilinear") -> Tensor:
    """``(C * ipc, c, h, w)``, class-major: every cell a random real image of the class, reduced to its size.

    The ``factor**2 * ipc`` images of a class differ where it has so many, else those of the same cell do. With factor 1 these are
    random real images.
    """
    partition.check_factor(factor, *train.shape[1:])
    cells, classes = factor**2, train.num_classes
    if factor == 1:
        return initial_pixels(train, ipc, "real", generator)
    if cells * ipc <= train.smallest_class:
        images = train.sample(cells * ipc, generator).unflatten(1, (cells, ipc)).transpose(0, 1)
    else:
        images = torch.stack([train.sample(ipc, generator) for _ in range(cells)])
    return partition.mosaics(images.reshape(cells, classes * ipc, *train.shape), mode)


def pixel_set(pixels: Tensor, train, ipc: int, factor: int = 1) -> SyntheticSet:
    """The synthetic set of class-major pixels, or mosaics, with hard labels (a copy)."""
    labels = class_major(train.num_classes, ipc, pixels.device)
    synset = SyntheticSet(pixels.detach().clone(), labels, train.classes, train.transform)
    return synset if factor == 1 else replace(synset, decoder=partition.Mosaic(factor))


def sequential_rates(lr: float, momentum: float, classes: int) -> tuple[float, float]:
    r"""Learning rate and momentum of a joint step that stands for one optimiser step per class in turn.

    Some published codes step the optimiser of *all* images after every class: between two gradients of a class its images
    move C times by their momentum. With $\beta' = \beta^C$ and $\eta' = \eta(1-\beta^C)/(1-\beta)$ one step for all classes
    takes every class to where it is when its own gradient is due next.
    """
    return lr * (1 - momentum**classes) / (1 - momentum), momentum**classes


def families(augmentation: str, train) -> tuple[str, ...]:
    """The augmentation families of a strategy; ``data`` stands for the one that suits the data set (no flips for digits)."""
    return augment.strategy(train.augmentation if augmentation == "data" else augmentation)


def by_class(pixels: Tensor, classes: int) -> Tensor:
    """``(C * m, ...) -> (C, m, ...)``."""
    return pixels.unflatten(0, (classes, -1))


def augment_by_class(images: Tensor, omega: augment.Draw) -> Tensor:
    r"""$\mathcal A_{\omega_c}$ on ``(C, n, c, h, w)``, one row of ``omega`` per class, shared by all its images (siamese)."""
    return augment.apply(images.flatten(0, 1), omega.repeat(images.shape[1])).view(images.shape)
