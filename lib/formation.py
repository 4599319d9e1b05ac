"""Parameterisations of S by a formation function: what one stored image is trained on as.

A formation maps m stored codes ``(m, c, h, w)`` to k m training images of that shape, *formation-major*: all images formed the
first way, then all images formed the second way, ... It is a frozen dataclass of plain values (they are saved with a set) with

    name            under which a saved set finds it again (``DECODERS``)
    multiplicity    k
    __call__        codes ``(m, c, h, w)`` -> images ``(k m, c, h, w)``
    labels          labels ``(m, ...)`` -> those of the images, ``(k m, ...)``
    check           refuses images of a shape ``(c, h, w)`` that it cannot form, in one line
    pack            k real images per code, ``(k, m, c, h, w)`` -> codes ``(m, c, h, w)`` to start from
    on              the same formation for codes in the normalised space of a data set's transform
    extra_bytes     storage of numbers that are learned with the codes

Every method that learns pixels takes one: ``DM(formation=Mosaic(2))``. Methods call ``on`` themselves: a formation as it is
constructed acts on pixels in [0, 1], where papers define theirs; it matters where colours are mixed or made up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data.whitening import Standardise, Transform
from lib.errors import CompanionError, unknown
from lib.partition import Mosaic, check_factor


@dataclass(frozen=True)
class Pixels:
    """The plainest parameterisation: what is stored is what is trained on."""

    name: str = "pixels"
    multiplicity: ClassVar[int] = 1
    extra_bytes: ClassVar[int] = 0

    def __call__(self, codes: Tensor) -> Tensor:
        return codes

    def on(self, transform: Transform) -> Pixels:
        return self

    def labels(self, labels: Tensor) -> Tensor:
        """Labels of the decoded images."""
        return labels

    def check(self, shape: tuple[int, int, int]) -> None:
        """Every shape will do."""

    def pack(self, images: Tensor) -> Tensor:
        """``(1, m, c, h, w) -> (m, c, h, w)``."""
        return images[0]


KINDS = ("single", "multi")


@dataclass(frozen=True)
class MultiFormation:
    r"""IDC's multi-formation (arXiv 2205.14959): every stored image is trained on as its f x f tiles, each enlarged bilinearly.

    Formation $fi+j$ is the tile in row i and column j. As IDM's ``Mosaic``, but rows first; and a side that f does not divide
    may be padded at its end.
    """

    factor: int = 2
    kind: str = "single"  # "multi": at every factor from 1 to f, one after the other
    pad: bool = False  # fill up a side that the factor does not divide
    colour: tuple[float, ...] = (0.5,)  # of the padding; one number for all channels or one for each
    shifts: tuple[int, ...] = ()  # DCEP: formation j takes channel c from tile (j + shifts[c]) mod f^2
    name: str = "multi-formation"

    def __post_init__(self):
        _as_tuples(self, "colour", "shifts")
        if self.kind not in KINDS:
            raise unknown("kind of multi-formation", self.kind, KINDS)

    @property
    def factors(self) -> range:
        return range(1 if self.kind == "multi" else self.factor, self.factor + 1)

    @property
    def multiplicity(self) -> int:
        return sum(factor**2 for factor in self.factors)

    extra_bytes: ClassVar[int] = 0

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
    greedily as many as possible at the largest factor, then at the next one, and the rest as they are."""
    parts = []
    for f in range(factor, 1, -1):
        n = max(0, min(count, (most - count) // (f * f - 1)))
        parts.append((f, n))
        count, most = count - n, most - n * f * f
    return [(f, n) for f, n in [*parts, (1, count)] if n]


Maps = tuple[tuple[tuple[float, ...], ...], ...]
LUMINANCE = (0.299, 0.587, 0.114)
_COLOUR = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# every plane as a grey image, then the colour image
PLANES = (*(tuple(row for _ in range(3)) for row in _COLOUR), _COLOUR)
# the image, its channels moved on by one and by two, and the mean of the channels
CYCLES = (*(tuple(_COLOUR[(k + s) % 3] for k in range(3)) for s in range(3)), ((1 / 3,) * 3,) * 3)


@dataclass(frozen=True)
class ChannelMix:
    r"""Every stored image as k images whose channels are mixtures of its own, $y_j = A_j x$ at every pixel x in [0, 1]^3."""

    maps: Maps = PLANES  # A, (k, 3, 3)
    learned: bool = False  # the maps count as stored
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of the normalised space in which codes and images live
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    name: str = "channel-mix"

    def __post_init__(self):
        _as_tuples(self, "maps", "mean", "std")

    @property
    def multiplicity(self) -> int:
        return len(self.maps)

    @property
    def extra_bytes(self) -> int:
        return 4 * 9 * len(self.maps) * self.learned

    def __call__(self, codes: Tensor, maps: Tensor | None = None) -> Tensor:
        """The images, by other maps (k, 3, 3) if given; these may carry gradients."""
        maps = codes.new_tensor(self.maps) if maps is None else maps
        mean, std = codes.new_tensor(self.mean), codes.new_tensor(self.std)
        gain = maps * std / std[:, None]
        offset = (maps @ mean - mean) / std  # (k, 3)
        formed = torch.einsum("koi,mihw->kmohw", gain, codes) + offset[:, None, :, None, None]
        return formed.flatten(0, 1)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.repeat(self.multiplicity, *[1] * (labels.dim() - 1))

    def on(self, transform: Transform) -> ChannelMix:
        mean, std = colours(transform, self.name)
        return replace(self, mean=mean, std=std)

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 3:
            raise CompanionError(
                f"formation {self.name!r} mixes 3 colour channels, these images have {shape[0]}: "
                "allowed is MultiFormation, for any number of channels"
            )

    def pack(self, images: Tensor) -> Tensor:
        """Three images per code: channel c is the luminance of the c-th."""
        mean, std, weights = (images.new_tensor(x) for x in (self.mean, self.std, LUMINANCE))
        three = images[[c % len(images) for c in range(3)]]  # (3, m, 3, h, w)
        grey = torch.einsum("kmchw,c->mkhw", three, weights * std) + (weights * mean).sum()
        return (grey - mean[:, None, None]) / std[:, None, None]


def colours(transform: Transform, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels, for a formation that needs to know the colours of [0, 1].

    Raises:
        CompanionError: for whitened data, whose pixels are no colours.
    """
    if not isinstance(transform, Standardise):
        raise CompanionError(
            f"formation {name!r} needs the colours of pixels, the data is {transform.kind!r}: allowed is 'standardise'"
        )
    return tuple(transform.mean.tolist()), tuple(transform.std.tolist())


def _as_tuples(formation, *names: str) -> None:
    """Fields that come out of a file as lists, as the tuples they were."""

    def plain(value):
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    for name in names:
        object.__setattr__(formation, name, plain(getattr(formation, name)))


# name in a saved file -> class; its fields are saved beside the name
DECODERS = {
    "pixels": Pixels,
    "mosaic": Mosaic,
    "multi-formation": MultiFormation,
    "channel-mix": ChannelMix,
}


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
