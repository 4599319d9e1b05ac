"""Parameterisations of S by a formation function: what one stored image is trained on as.

A formation maps m stored codes ``(m, c, h, w)`` to k m training images of that shape, *formation-major*: all images formed the
first way, then all images formed the second way, ... It is a frozen dataclass of plain values and tensors (they are saved with a set) with

    name            under which a saved set finds it again (``DECODERS``)
    multiplicity    k
    __call__        codes ``(m, c, h, w)`` -> images ``(k m, c, h, w)``
    labels          labels ``(m, ...)`` -> those of the images, ``(k m, ...)``
    check           refuses images of a shape ``(c, h, w)`` that it cannot form, in one line
    pack            k real images per code, ``(k, m, c, h, w)`` -> codes ``(m, c, h, w)`` to start from
    on              the same formation for codes in the normalised space of a data set's transform
    learned         whether it has numbers that are learned with the codes; extra_bytes: their storage

Every method that learns pixels takes one: ``DM(formation=Mosaic(2))``. Methods call ``on`` themselves: a formation as it is
constructed acts on pixels in [0, 1], where papers define theirs; it matters where colours are mixed or made up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.data.imageset import draw
from lib.formation.channels import CYCLES, PLANES, ChannelMix
from lib.formation.generated import Generated
from lib.formation.hallucinators import Hallucinators
from lib.formation.mosaic import Mosaic
from lib.formation.pixels import Pixels
from lib.formation.tiles import MultiFormation, bounded

__all__ = [
    "CYCLES",
    "DECODERS",
    "PLANES",
    "ChannelMix",
    "Generated",
    "Hallucinators",
    "Mosaic",
    "MultiFormation",
    "Pixels",
    "at_most",
    "bounded",
    "by_class",
    "decode_by_class",
]

# name in a saved file -> class; its fields are saved beside the name, those that are tensors as tensors of the file
DECODERS = {
    "pixels": Pixels,
    "mosaic": Mosaic,
    "multi-formation": MultiFormation,
    "channel-mix": ChannelMix,
    "hallucinators": Hallucinators,
    "generated": Generated,
}


def decode_by_class(formation, stored: Tensor, *learned: Tensor) -> Tensor:
    """The images of every class in one call, ``(C, m, c, h, w) -> (C, k m, c, h, w)``, formation-major within a class.

    Args:
        learned: numbers of the formation that are being learned, in the place of its own.
    """
    if isinstance(formation, Pixels):
        return stored
    classes, count = stored.shape[:2]
    formed = formation(stored.flatten(0, 1), *learned)
    return formed.unflatten(0, (-1, classes, count)).transpose(0, 1).flatten(1, 2)


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
