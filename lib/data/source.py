"""What a reader of some file format hands over, and the common way from there to a :class:`Data`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.data.imageset import NATURAL, Data, ImageSet
from lib.data.whitening import WHITENINGS, Standardise


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before preprocessing.

    ``train`` and ``test`` are pairs of images (N, c, h, w), uint8 or float32 in [0, 1], and labels (N,) int64.
    ``transform`` is the normalisation that papers use for this data; None = mean and std of the training images.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    transform: Standardise | None = None
    augmentation: str = NATURAL
    first_padding: int = 1


def channel_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> Standardise:
    """A fixed normalisation."""
    return Standardise(torch.tensor(mean), torch.tensor(std))


def to_unit(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 as float32 in [0, 1]; float images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def prepare(source: Source, device: torch.device, size: int | None, whiten: str | None) -> Data:
    """Move to the device, resize (antialiased bilinear), then normalise or whiten with training statistics."""

    def pixels(images: Tensor) -> Tensor:
        x = to_unit(images.to(device))
        if size is None or size == x.shape[-1]:
            return x
        return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True).clamp_(0, 1)

    train, test = pixels(source.train[0]), pixels(source.test[0])
    if whiten is not None:
        transform = WHITENINGS[whiten].fit(train)
    elif source.transform is not None:
        transform = source.transform.to(device)
    else:
        transform = Standardise.fit(train)
    shared = dict(
        classes=source.classes,
        transform=transform,
        augmentation=source.augmentation,
        # 28 px become 32, 14 become 16; another size does not need that
        first_padding=source.first_padding if train.shape[-1] == source.train[0].shape[-1] else 1,
    )
    return Data(
        ImageSet(source.name, transform.forward(train), source.train[1].to(device), **shared),
        ImageSet(source.name, transform.forward(test), source.test[1].to(device), **shared),
    )
