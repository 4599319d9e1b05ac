r"""Views of images: crop, mirror image, shift, CutMix and MixUp, drawn first as numbers and applied afterwards.

A random resized crop is linear in the pixels and separable, so a view is a pair of matrices: $y = A\,x\,B^\top$ with the
bilinear weights of the crop in A and B, columns of B reversed for a mirror image. Shapes do not depend on what was drawn, the
gradient is a product of the same matrices (the same bits in every run on a GPU too), and the values are those of cropping and
resizing with ``align_corners=False``, as torchvision does.

Numbers are drawn on the CPU by :func:`keyed` generators: whoever knows the key draws the same view again, in any process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.system.cache import digest
from lib.system.errors import CompanionError, unknown

RATIO = (3 / 4, 4 / 3)  # of width to height, torchvision's default
TRIES = 10  # as torchvision: then the whole image
MIXES = ("cutmix", "mixup", "none")


def keyed(*key: object) -> torch.Generator:
    """A CPU generator that is a function of its key (plain values) alone."""
    return torch.Generator().manual_seed(int(digest(*key)[:15], 16))


# -- random resized crops --------------------------------------------------------------------------------------------------


def crop_boxes(lowest: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop in square images: (top, left, height, width) in pixels, ``(n, 4)`` int64.

    Args:
        lowest: smallest share of the area per box, ``(n,)``, in (0, 1].
    """
    return Crops.draw(lowest, generator).boxes(torch.full((len(lowest), 2), side))


@dataclass(frozen=True)
class Crops:
    """The numbers of n random resized crops, drawn before the sizes of their images are known, and who is mirrored.

    Attributes:
        lowest: smallest share of the area, ``(n,)``; u: of ten tries area and ratio, ``(n, 10, 2)``, place: of the corner,
            ``(n, 2)``, all uniform on [0, 1]; flips: ``(n,)`` bool, or None.
    """

    lowest: Tensor
    u: Tensor
    place: Tensor
    flips: Tensor | None = None

    @classmethod
    def draw(cls, lowest: Tensor, generator: torch.Generator, flip: bool = False) -> Crops:
        n = len(lowest)
        u = torch.rand(n, TRIES, 2, generator=generator, dtype=torch.float64)
        place = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        return cls(lowest, u, place, torch.rand(n, generator=generator) < 0.5 if flip else None)

    def __getitem__(self, rows: slice) -> Crops:
        flips = None if self.flips is None else self.flips[rows]
        return Crops(self.lowest[rows], self.u[rows], self.place[rows], flips)

    def boxes(self, sizes: Tensor) -> Tensor:
        """(top, left, height, width) in images of these (height, width), ``(n, 2)`` -> ``(n, 4)`` int64.

        The share of the area is uniform on [lowest, 1] and the logarithm of the ratio on that of :data:`RATIO`; of ten draws the
        first that fits the image is taken, and if none does the largest centred box with a ratio within these bounds.
        """
        low, sizes = self.lowest.double().unsqueeze(1), sizes.double()
        area = sizes.prod(1, keepdim=True) * (low + (1 - low) * self.u[..., 0])
        ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * self.u[..., 1])
        sides = torch.stack(
            [(area / ratio).sqrt(), (area * ratio).sqrt()], 2
        ).round()  # (n, tries, 2) height, width
        fits = ((sides >= 1) & (sides <= sizes[:, None])).all(2)
        tried = sides[torch.arange(len(sides)), fits.int().argmax(1)]
        height, width = sizes.unbind(1)
        largest = torch.stack(
            [height.minimum((width / RATIO[0]).round()), width.minimum((height * RATIO[1]).round())], 1
        )
        found = fits.any(1)[:, None]
        box = torch.where(found, tried, largest)
        corner = (self.place * (sizes - box + 1)).floor().minimum(sizes - box)
        return torch.cat([torch.where(found, corner, ((sizes - box) / 2).floor()), box], 1).long()

    def box(self, i: int, height: int, width: int) -> list[int]:
        """That of image i."""
        return self[i : i + 1].boxes(torch.tensor([[height, width]]))[0].tolist()


def crop_matrices(
    boxes: Tensor, flips: Tensor, side: int, shifts: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The matrices of crops resized to ``side``, then mirrored, then rolled: rows and columns, ``(n, side, side)`` each.

    Args:
        boxes: ``(n, 4)`` as :func:`crop_boxes`; flips: ``(n,)`` bool; shifts: ``(n, 2)`` pixels down and right, or None.
            All on the device of the result; nothing is read back from it.
    """
    if shifts is None:
        shifts = torch.zeros_like(boxes[:, :2])
    line = torch.arange(side, device=boxes.device)
    down, right = ((line - shifts[:, axis, None]) % side for axis in (0, 1))  # (n, side)
    right = torch.where(flips[:, None], side - 1 - right, right)
    rows = _interpolation(down, boxes[:, 0], boxes[:, 2], side)
    columns = _interpolation(right, boxes[:, 1], boxes[:, 3], side)
    return rows.to(dtype), columns.to(dtype)


def _interpolation(output: Tensor, start: Tensor, length: Tensor, side: int) -> Tensor:
    """Bilinear weights ``(n, side, side)`` by which the output positions ``(n, side)`` read start to start + length."""
    position = ((output.double() + 0.5) * length[:, None] / side - 0.5).clamp(min=0)
    left = position.floor()
    share = position - left
    right = (left + 1).minimum(length[:, None] - 1.0)
    line = torch.arange(side, device=output.device)
    at = start[:, None, None] - line  # minus the input position
    return ((left.long()[..., None] + at) == 0) * (1 - share)[..., None] + (
        (right.long()[..., None] + at) == 0
    ) * share[..., None]


def resample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    r"""$A_i\,x_i\,B_i^\top$ for ``(n, c, h, w)`` images and ``(n or 1, side, side)`` matrices."""
    return rows.unsqueeze(1) @ (x @ columns.transpose(1, 2).unsqueeze(1))


# -- CutMix and MixUp ------------------------------------------------------------------------------------------------------


def cutmix_box(share: float, centre: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    r"""CutMix's box (arXiv 1905.04899) in pixels, (x1, y1, x2, y2) with x on dimension 2 and y on dimension 3.

    Half-sides $\lfloor\lfloor H\sqrt{1-\lambda}\rfloor/2\rfloor$, clipped to the image.

    Args:
        share: $\lambda$ in [0, 1], of the pixels that stay, but for the clipping.
    """
    cut = math.sqrt(1.0 - share)
    half = [int(side * cut) // 2 for side in size]
    low = [min(max(c - h, 0), side) for c, h, side in zip(centre, half, size, strict=True)]
    high = [min(max(c + h, 0), side) for c, h, side in zip(centre, half, size, strict=True)]
    return low[0], low[1], high[0], high[1]


def paste(x: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """``x[:, :, x1:x2, y1:y2]`` replaced by that of ``x[partner]`` (a copy); an empty box changes nothing."""
    x1, y1, x2, y2 = box
    mixed = x.clone()
    mixed[:, :, x1:x2, y1:y2] = x[partner, :, x1:x2, y1:y2]
    return mixed


def blend(x: Tensor, partner: Tensor, share: float) -> Tensor:
    r"""MixUp: $\lambda x+(1-\lambda)x_\pi$."""
    return share * x + (1 - share) * x[partner]


def beta(alpha: float, generator: torch.Generator) -> float:
    r"""One draw of $\mathrm{Beta}(\alpha,\alpha)$ from an explicit generator, as a ratio of gamma variables."""
    if not alpha > 0:
        raise CompanionError(f"mix_alpha {alpha!r} is not allowed: it must be positive")
    if alpha == 1:
        return torch.rand((), generator=generator, dtype=torch.float64).item()
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator)
    return (gammas[0] / gammas.sum()).item()


def check_mix(name: str) -> str:
    """``name`` if it is one of :data:`MIXES`, else the one-line error."""
    if name not in MIXES:
        raise unknown("mix", name, MIXES)
    return name
