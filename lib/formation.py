"""Parameterisations of S by a formation function: what one stored image is trained on as.

A formation maps m stored codes ``(m, c, h, w)`` to k m training images of that shape, *formation-major*: all images formed the
first way, then all images formed the second way, ... It is a frozen dataclass of plain values (they are saved with a set) with

    name            under which a saved set finds it again (``DECODERS``)
    multiplicity    k
    __call__        codes ``(m, c, h, w)`` -> images ``(k m, c, h, w)``
    labels          labels ``(m, ...)`` -> those of the images, ``(k m, ...)``
    check           refuses images of a shape ``(c, h, w)`` that it cannot form, in one line
    pack            k real images per code, ``(k, m, c, h, w)`` -> codes ``(m, c, h, w)`` to start from

Every method that learns pixels takes one: ``DM(formation=Mosaic(2))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lib.errors import CompanionError
from lib.partition import Mosaic


@dataclass(frozen=True)
class Pixels:
    """The plainest parameterisation: what is stored is what is trained on."""

    name: str = "pixels"
    multiplicity: ClassVar[int] = 1

    def __call__(self, codes: Tensor) -> Tensor:
        return codes

    def labels(self, labels: Tensor) -> Tensor:
        """Labels of the decoded images."""
        return labels

    def check(self, shape: tuple[int, int, int]) -> None:
        """Every shape will do."""

    def pack(self, images: Tensor) -> Tensor:
        """``(1, m, c, h, w) -> (m, c, h, w)``."""
        return images[0]


# name in a saved file -> class; its fields are saved beside the name
DECODERS = {"pixels": Pixels, "mosaic": Mosaic}


def mosaic_or(factor: int, formation):
    """The formation of a method with a ``factor`` of its own: mosaics from factor 2 on, else ``formation``.

    Raises:
        CompanionError: if both ask for something.
    """
    if factor == 1:
        return formation
    if formation != Pixels():
        raise CompanionError(
            f"factor {factor} and formation {formation.name!r} both say what is stored: allowed is one, the other 1 or 'pixels'"
        )
    return Mosaic(factor)


def decode_by_class(formation, stored: Tensor) -> Tensor:
    """The images of every class in one call, ``(C, m, c, h, w) -> (C, k m, c, h, w)``, formation-major within a class."""
    if formation.multiplicity == 1:
        return stored
    classes, count = stored.shape[:2]
    formed = formation(stored.flatten(0, 1)).unflatten(0, (-1, classes, count))  # (k, C, m, c, h, w)
    return formed.transpose(0, 1).flatten(1, 2)
