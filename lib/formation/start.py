"""Where the stored images of a method start, and how they are handed back."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.synset import SyntheticSet, class_major
from lib.system.errors import unknown

INITIAL = ("real", "noise")
SPACES = ("normalised", "unit")  # in which stored pixels live: that of the data, or [0, 1]


def initial_pixels(train, ipc: int, init: str, generator: torch.Generator) -> Tensor:
    """``(C * ipc, c, h, w)``, class-major: random real images of each class without replacement, or standard normal noise."""
    if init == "real":
        return train.sample(ipc, generator).flatten(0, 1)
    if init == "noise":
        shape = (train.num_classes * ipc, *train.shape)
        return torch.randn(shape, generator=generator, device=train.device)
    raise unknown("init", init, INITIAL)


def initial_codes(
    formation, train, ipc: int, init: str, generator: torch.Generator, space: str = "normalised"
) -> Tensor:
    """``(C * ipc, c, h, w)``, class-major, in that space: where the stored images of a formation (``lib.formation``) start.

    ``init="mix"`` packs real images, each different, into every code;
    otherwise see :func:`initial_pixels`.
    """
    formation.check(train.shape)
    formation = formation.on(train.transform)
    if init == "mix":
        codes = formation.pack(several_real(train, ipc, formation.multiplicity, generator))
    elif init in INITIAL:
        codes = initial_pixels(train, ipc, init, generator)
    else:
        raise unknown("init", init, [*INITIAL, "mix"])
    return to_space(codes, train, space)


def to_space(normalised: Tensor, train, space: str) -> Tensor:
    """How normalised images are stored."""
    return train.transform.inverse(normalised) if space == "unit" else normalised


def from_space(stored: Tensor, train, space: str) -> Tensor:
    """Stored images in the space of the data."""
    return train.transform.forward(stored) if space == "unit" else stored


@torch.no_grad()
def clamp_to_space(stored: Tensor, space: str) -> None:
    """Put values that left [0, 1] back, in place; the space of the data has no bounds."""
    if space == "unit":
        stored.clamp_(0, 1)


def several_real(train, ipc: int, times: int, generator: torch.Generator) -> Tensor:
    """Random real images ``(times, C * ipc, c, h, w)``, class-major.

    The ``times * ipc`` images of a class differ where it has so many, else those of the same row do.
    """
    if times * ipc <= train.smallest_class:
        images = train.sample(times * ipc, generator).unflatten(1, (times, ipc)).transpose(0, 1)
    else:
        images = torch.stack([train.sample(ipc, generator) for _ in range(times)])
    return images.flatten(1, 2)


def pixel_set(pixels: Tensor, train, ipc: int, formation=None, space: str = "normalised") -> SyntheticSet:
    """The synthetic set of class-major codes of a formation (default: plain pixels), with hard labels (a copy)."""
    codes = pixels.detach().clone()
    clamp_to_space(codes, space)
    labels = class_major(train.num_classes, ipc, pixels.device)
    decoder = {} if formation is None else {"decoder": formation.on(train.transform)}
    return SyntheticSet(from_space(codes, train, space), labels, train.classes, train.transform, **decoder)
