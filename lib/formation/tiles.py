"""IDC's multi-formation (arXiv 2205.14959): the tiles of a stored image, each enlarged to a training image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data.whitening import Transform
from lib.formation.colours import as_tuples, colours
from lib.formation.mosaic import check_factor
from lib.system.errors import CompanionError, unknown
from lib.system.tensors import guard

KINDS = ("single", "multi")


@dataclass(frozen=True)
class MultiFormation:
    r"""IDC's multi-formation (arXiv 2205.14959): every stored image is trained on as its f x f tiles, each enlarged bilinearly.

    Formation $fi+j$ is the tile in row i and column j. As IDM's ``Mosaic``, but rows first; and a side that f does not divide
    may be padded at its end.

    Attributes:
        factor: f, at most the side; kind: "single"; "multi": at every factor from 1 to f, one after the other.
        pad: fill up a side that the factor does not divide; colour: of the padding, one number for all channels or one for each.
        shifts: DCEP: formation j takes channel c from tile (j + shifts[c]) mod f^2; name: as stored sets have it.
    """

    factor: int = 2
    kind: str = "single"
    pad: bool = False
    colour: tuple[float, ...] = (0.5,)
    shifts: tuple[int, ...] = ()
    name: str = "multi-formation"

    def __post_init__(self):
        as_tuples(self, "colour", "shifts")
        if self.kind not in KINDS:
            raise unknown("kind of multi-formation", self.kind, KINDS)

    @property
    def factors(self) -> range:
        return range(1 if self.kind == "multi" else self.factor, self.factor + 1)

    @property
    def multiplicity(self) -> int:
        return sum(factor**2 for factor in self.factors)

    extra_bytes: ClassVar[int] = 0
    learned: ClassVar[bool] = False

    def __call__(self, codes: Tensor) -> Tensor:
        return torch.cat([enlarged_tiles(codes, f, self.colour, self.shifts) for f in self.factors])

    def labels(self, labels: Tensor) -> Tensor:
        return labels.repeat(self.multiplicity, *[1] * (labels.dim() - 1))

    def on(self, transform: Transform) -> MultiFormation:
        if not self.pad:
            return self
        mean, std = colours(transform, self.name)
        return replace(self, colour=tuple((0.5 - m) / s for m, s in zip(mean, std, strict=True)))

    def check(self, shape: tuple[int, int, int]) -> None:
        if self.shifts and shape[0] > len(self.shifts):
            raise CompanionError(
                f"{len(self.shifts)} shifts of tiles for {shape[0]} channels: one per channel is needed"
            )
        for factor in self.factors:
            if not self.pad:
                check_factor(factor, *shape[1:])
            elif not 1 <= factor <= min(shape[1:]):
                raise CompanionError(
                    f"factor {factor} for {shape[1]}x{shape[2]} images: allowed 1 to {min(shape[1:])}"
                )

    def pack(self, images: Tensor) -> Tensor:
        """IDC's initialisation "mix": a whole image, every so many-th pixel of it, in each tile (of the largest factor)."""
        return tiled(images[-(self.factor**2) :])


def enlarged_tiles(
    codes: Tensor, factor: int, colour: tuple[float, ...] = (0.5,), shifts: tuple[int, ...] = ()
) -> Tensor:
    """``(m, c, h, w) -> (f^2 m, c, h, w)``: the tiles row by row, all images' first tiles first, each enlarged to h x w.

    A side that the factor does not divide is first filled up at its end with ``colour``.
    """
    if factor == 1:
        return codes
    height, width = codes.shape[-2:]
    padding = (0, -width % factor, 0, -height % factor)
    if any(padding):
        outside = F.pad(torch.zeros_like(codes[:1]), padding, value=1.0)
        codes = F.pad(codes, padding) + outside * codes.new_tensor(colour)[:, None, None]
    tiles = codes.unflatten(-2, (factor, -1)).unflatten(-1, (factor, -1))  # (m, c, f, h', f, w')
    tiles = tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)  # (f^2, m, c, h', w')
    if any(shifts[: tiles.shape[2]]):
        moved = [tiles[:, :, c].roll(-shift, 0) for c, shift in enumerate(shifts[: tiles.shape[2]])]
        tiles = torch.stack(moved, 2)
    return F.interpolate(tiles.flatten(0, 1), size=(height, width), mode="bilinear", align_corners=False)


def tiled(images: Tensor) -> Tensor:
    """``(f^2, m, c, h, w) -> (m, c, h, w)``: every image reduced to a tile, nearest pixel, rows of tiles first.

    Where f leaves a remainder r of the side, the first r rows or columns of tiles are a pixel larger.
    """
    factor, (height, width) = round(len(images) ** 0.5), images.shape[-2:]
    rows, columns = ([(side + i) // factor for i in reversed(range(factor))] for side in (height, width))
    lines = [
        torch.cat([F.interpolate(images[factor * i + j], size=(h, w)) for j, w in enumerate(columns)], -1)
        for i, h in enumerate(rows)
    ]
    return torch.cat(lines, -2)


def bounded(factor: int, count: int, most: int) -> list[tuple[int, int]]:
    """IDC's "bound": ``(factor, images)`` for ``count`` stored images so that at most ``most`` images come out of them,
    greedily at the largest factor, then at the next one, and the rest as they are.

    As in the official code an image counts f^2 of what is left after every other one has got its one, although it has got
    its own one too: a few more would fit.
    """
    parts = []
    for f in range(factor, 1, -1):
        n = max(0, min(count, (most - count) // f**2))
        parts.append((f, n))
        count, most = count - n, most - n * f * f
    return [(f, n) for f, n in [*parts, (1, count)] if n]


guard(globals())
