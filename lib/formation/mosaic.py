"""Partition and expansion: each stored image is a mosaic of f x f cells, each cell is enlarged to a whole training image.

Pure functions on ``(..., m, c, h, w)``; with factor f, m stored images become f^2 m images. The order of the cells is IDM's
(arXiv 2307.09742): down the first column, then down the next; all first cells come before all second cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data.whitening import Transform
from lib.system.errors import CompanionError
from lib.system.tensors import guard


def cells(images: Tensor, factor: int = 2) -> Tensor:
    """``(m, c, h, w) -> (f^2, m, c, h/f, w/f)``.

    Raises:
        CompanionError: if the factor does not divide both sides.
    """
    check_factor(factor, *images.shape[-2:])
    rows = images.unflatten(-2, (factor, -1)).unflatten(-1, (factor, -1))  # (m, c, f, h/f, f, w/f)
    return rows.permute(4, 2, 0, 1, 3, 5).flatten(0, 1)


def check_factor(factor: int, height: int, width: int) -> None:
    """Refuse a factor that does not divide both sides, in one line that lists those that do."""
    if factor < 1 or height % factor or width % factor:
        common = [f for f in range(1, min(height, width) + 1) if height % f == 0 and width % f == 0]
        allowed = ", ".join(map(str, common))
        raise CompanionError(f"partition factor {factor} for {height}x{width} images: allowed {allowed}")


def expand(images: Tensor, factor: int = 2) -> Tensor:
    """Every cell enlarged bilinearly to the full size, ``(m, c, h, w) -> (f^2 m, c, h, w)``, cell by cell."""
    parts = cells(images, factor).flatten(0, 1)
    return F.interpolate(parts, size=images.shape[-2:], mode="bilinear", align_corners=False)


def expand_labels(labels: Tensor, factor: int = 2) -> Tensor:
    """Labels of :func:`expand`'s images, ``(m, ...) -> (f^2 m, ...)``."""
    return labels.repeat(factor**2, *[1] * (labels.dim() - 1))


def compose(parts: Tensor) -> Tensor:
    """The inverse of :func:`cells`: ``(f^2, m, c, h, w) -> (m, c, f h, f w)``."""
    factor = round(len(parts) ** 0.5)
    if factor**2 != len(parts):
        raise CompanionError(f"{len(parts)} cells make no square mosaic: allowed are 1, 4, 9, ...")
    grid = parts.unflatten(0, (factor, factor))  # (columns, rows, m, c, h, w)
    return grid.permute(2, 3, 1, 4, 0, 5).flatten(4, 5).flatten(2, 3)


def shrink(images: Tensor, factor: int = 2, mode: str = "bilinear") -> Tensor:
    """Whole images reduced to a cell, ``(n, c, h, w) -> (n, c, h/f, w/f)``: bilinear (for f = 2 the 2x2 average) or nearest."""
    size = [side // factor for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode=mode, align_corners=False if mode == "bilinear" else None)


def mosaics(images: Tensor, mode: str = "bilinear") -> Tensor:
    """``(f^2, m, c, h, w)`` whole images -> ``(m, c, h, w)``: each one shrunk into its cell."""
    factor = round(len(images) ** 0.5)
    return compose(torch.stack([shrink(part, factor, mode) for part in images]))


@dataclass(frozen=True)
class Mosaic:
    """A formation (see ``lib.formation``): every stored image is trained on as the f^2 cells of its mosaic, each enlarged.

    Attributes:
        factor: f, a divisor of both sides; packing: how real images are reduced to cells at the start, "bilinear", or "nearest" as M3D.
        name: as stored sets have it.
    """

    factor: int = 2
    packing: str = "bilinear"
    name: str = "mosaic"
    extra_bytes: ClassVar[int] = 0
    learned: ClassVar[bool] = False

    @property
    def multiplicity(self) -> int:
        return self.factor**2

    def __call__(self, codes: Tensor) -> Tensor:
        return expand(codes, self.factor)

    def labels(self, labels: Tensor) -> Tensor:
        return expand_labels(labels, self.factor)

    def on(self, transform: Transform) -> Mosaic:
        return self

    def check(self, shape: tuple[int, int, int]) -> None:
        check_factor(self.factor, *shape[1:])

    def pack(self, images: Tensor) -> Tensor:
        return mosaics(images, self.packing)


guard(globals())
