"""What methods that learn pixels share: where S starts, and how it is handed back."""

from __future__ import annotations

import torch
from torch import Tensor

from lib import augment
from lib.data.imageset import draw
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


def initial_codes(formation, train, ipc: int, init: str, generator: torch.Generator, **packing) -> Tensor:
    """``(C * ipc, c, h, w)``, class-major: where the stored images of a formation (``lib.formation``) start.

    ``init="mix"`` packs real images, each different, into every code (``packing``: options of the formation's ``pack``);
    otherwise see :func:`initial_pixels`.
    """
    formation.check(train.shape)
    formation = formation.on(train.transform)
    if init == "mix":
        return formation.pack(several_real(train, ipc, formation.multiplicity, generator), **packing)
    if init not in INITIAL:
        raise unknown("init", init, [*INITIAL, "mix"])
    return initial_pixels(train, ipc, init, generator)


def several_real(train, ipc: int, times: int, generator: torch.Generator) -> Tensor:
    """Random real images ``(times, C * ipc, c, h, w)``, class-major.

    The ``times * ipc`` images of a class differ where it has so many, else those of the same row do.
    """
    if times * ipc <= train.smallest_class:
        images = train.sample(times * ipc, generator).unflatten(1, (times, ipc)).transpose(0, 1)
    else:
        images = torch.stack([train.sample(ipc, generator) for _ in range(times)])
    return images.flatten(1, 2)


def pixel_set(pixels: Tensor, train, ipc: int, formation=None) -> SyntheticSet:
    """The synthetic set of class-major codes of a formation (default: plain pixels), with hard labels (a copy)."""
    labels = class_major(train.num_classes, ipc, pixels.device)
    decoder = {} if formation is None else {"decoder": formation.on(train.transform)}
    return SyntheticSet(pixels.detach().clone(), labels, train.classes, train.transform, **decoder)


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


def at_most(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """``(C, n, ...)``, a random ``most`` of every class where there are more."""
    classes, count = images.shape[:2]
    if count <= most:
        return images
    rows = draw(torch.arange(count, device=images.device).expand(classes, -1), most, generator)
    return images[torch.arange(classes, device=rows.device)[:, None], rows]


def augment_by_class(images: Tensor, omega: augment.Draw) -> Tensor:
    r"""$\mathcal A_{\omega_c}$ on ``(C, n, c, h, w)``, one row of ``omega`` per class, shared by all its images (siamese)."""
    return augment.apply(images.flatten(0, 1), omega.repeat(images.shape[1])).view(images.shape)
