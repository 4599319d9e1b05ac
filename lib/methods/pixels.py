"""What methods that learn pixels share: where S starts, and how it is handed back."""

from __future__ import annotations

import torch
from torch import Tensor

from lib import augment
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


def pixel_set(pixels: Tensor, train, ipc: int) -> SyntheticSet:
    """The synthetic set of class-major pixels with hard labels (a copy)."""
    labels = class_major(train.num_classes, ipc, pixels.device)
    return SyntheticSet(pixels.detach().clone(), labels, train.classes, train.transform)


def families(augmentation: str, train) -> tuple[str, ...]:
    """The augmentation families of a strategy; ``data`` stands for the one that suits the data set (no flips for digits)."""
    return augment.strategy(train.augmentation if augmentation == "data" else augmentation)


def by_class(pixels: Tensor, classes: int) -> Tensor:
    """``(C * m, ...) -> (C, m, ...)``."""
    return pixels.unflatten(0, (classes, -1))


def augment_by_class(images: Tensor, omega: augment.Draw) -> Tensor:
    r"""$\mathcal A_{\omega_c}$ on ``(C, n, c, h, w)``, one row of ``omega`` per class, shared by all its images (siamese)."""
    return augment.apply(images.flatten(0, 1), omega.repeat(images.shape[1])).view(images.shape)
