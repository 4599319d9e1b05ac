r"""Differentiable siamese augmentation (DSA, Zhao & Bilen 2021, arXiv 2102.08259): $\mathcal A_\omega$.

The random numbers $\omega$ are drawn first (:func:`draw`) and applied afterwards (:func:`apply`), so that *siamese* means nothing
more than passing the same draw to the real and to the synthetic batch, and a test can pin every parameter. All operations act
in the normalised pixel space on ``(n, c, h, w)`` with one parameter per row, and are differentiable in the pixels; the parameter
laws are those of square images.

Differs from the published code: that code re-seeds the global generator from the clock at every call, so that two classes
handled in the same millisecond share $\omega$ and no run can be repeated; here the generator is explicit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.system.errors import unknown
from lib.system.tensors import guard

# The published strengths (brightness 1, saturation 2 and contrast 0.5 are in the operations themselves).
CROP, CUTOUT, SCALE, ROTATE_DEGREES = 0.125, 0.5, 1.2, 15.0

# -- the operations, one parameter per row ------------------------------------------------------------------------------


def brightness(x: Tensor, u: Tensor) -> Tensor:
    r"""$x + (u - \tfrac12)$, ``u`` in [0, 1)."""
    return x + (u - 0.5)[:, None, None, None]


def saturation(x: Tensor, u: Tensor) -> Tensor:
    r"""$(x - \bar x_{ch})\,2u + \bar x_{ch}$ with the mean over channels of every pixel; the identity for one channel."""
    mean = x.mean(1, keepdim=True)
    return (x - mean) * (2.0 * u)[:, None, None, None] + mean


def contrast(x: Tensor, u: Tensor) -> Tensor:
    r"""$(x - \bar x)(u + \tfrac12) + \bar x$ with the mean of every image."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u + 0.5)[:, None, None, None] + mean


def color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, saturation, contrast in this order; ``u`` is ``(n, 3)``."""
    return contrast(saturation(brightness(x, u[:, 0]), u[:, 1]), u[:, 2])


def crop(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Integer shift, $y[r, q] = x[r + t_r, q + t_c]$, zero outside."""
    h, w = x.shape[2:]
    row = torch.arange(h, device=x.device) + rows[:, None].long()  # (n, h)
    col = torch.arange(w, device=x.device) + cols[:, None].long()  # (n, w)
    inside = ((row >= 0) & (row < h))[:, :, None] & ((col >= 0) & (col < w))[:, None, :]
    index = row.clamp(0, h - 1)[:, :, None] * w + col.clamp(0, w - 1)[:, None, :]  # (n, h, w)
    y = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    return y * inside[:, None]


def cutout(x: Tensor, row_center: Tensor, col_center: Tensor, size: int) -> Tensor:
    """Zero a box of ``size`` pixels; a box that hangs over the border still zeroes the border row or column, as published."""
    rows, cols = (
        _box(center, size, side) for center, side in ((row_center, x.shape[2]), (col_center, x.shape[3]))
    )
    return x * ~(rows[:, None, :, None] & cols[:, None, None, :])


def _box(center: Tensor, size: int, side: int) -> Tensor:
    low = center.long()[:, None] - size // 2
    line = torch.arange(side, device=center.device)
    return (line >= low.clamp(0, side - 1)) & (line <= (low + (size - 1)).clamp(0, side - 1))  # (n, side)


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirror the width axis where ``u < 0.5``."""
    return torch.where((u < 0.5)[:, None, None, None], x.flip(3), x)


def scale(x: Tensor, sx: Tensor, sy: Tensor) -> Tensor:
    """Affine resampling by ``diag(sx, sy)``: a factor above 1 shrinks the content."""
    zero = torch.zeros_like(sx)
    return _warp(x, sx, zero, zero, sy)


def rotate(x: Tensor, radians: Tensor) -> Tensor:
    """Rotation of the sampling grid by the given angles."""
    c, s = radians.cos(), radians.sin()
    return _warp(x, c, -s, s, c)


def _warp(x: Tensor, *matrix: Tensor) -> Tensor:
    """Sample at the pixel positions times a 2x2 matrix per image, given by its four entries, ``(n,)`` each.

    The same as ``F.affine_grid`` without its products of thin matrices: a third of the time, and full precision on a GPU.
    """
    rows, cols = (
        (torch.arange(side, device=x.device, dtype=x.dtype) * 2 + 1) / side - 1 for side in x.shape[2:]
    )
    theta = torch.stack(matrix, 1).to(x.dtype).view(-1, 2, 2, 1, 1)
    grid = theta[:, :, 0] * cols + theta[:, :, 1] * rows[:, None]  # (n, 2, h, w)
    return F.grid_sample(
        x, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )


# -- parameter laws: uniform numbers (n, 3) to the operations above -----------------------------------------------------


def _random_crop(x: Tensor, u: Tensor) -> Tensor:
    reach = _pixels(x, CROP)
    return crop(x, *(_uniform_int(u[:, :2], 2 * reach + 1) - reach).unbind(1))


def _random_cutout(x: Tensor, u: Tensor) -> Tensor:
    size = _pixels(x, CUTOUT)
    return cutout(x, *_uniform_int(u[:, :2], x.shape[2] + 1 - size % 2).unbind(1), size)


def _random_scale(x: Tensor, u: Tensor) -> Tensor:
    factor = 1 / SCALE + u * (SCALE - 1 / SCALE)
    return scale(x, factor[:, 0], factor[:, 1])


def _pixels(x: Tensor, share: float) -> int:
    return int(x.shape[2] * share + 0.5)


def _uniform_int(u: Tensor, n: int) -> Tensor:
    return (u * n).long().clamp_(max=n - 1)  # float32 u close to 1 may round up to n


FAMILIES = {
    "color": color,
    "crop": _random_crop,
    "cutout": _random_cutout,
    "flip": lambda x, u: flip(x, u[:, 0]),
    "scale": _random_scale,
    "rotate": lambda x, u: rotate(x, (2 * u[:, 0] - 1) * math.radians(ROTATE_DEGREES)),
}


WORTH_A_CALL = 2**16  # values of one family below which an operation costs more than moving the rows together


# -- drawing and applying -----------------------------------------------------------------------------------------------

MODES = ("single", "multiple", "idc")
_ALWAYS = ("flip", "color", "cutout")  # of mode idc


@dataclass(frozen=True)
class Draw:
    """The random numbers of one augmentation, for n rows.

    Attributes:
        names: the families of the strategy.
        choice: ``(n,)`` which family is applied, an index into :func:`alternatives`; None in mode ``multiple``.
        u: ``(n, F, 3)`` uniform numbers in [0, 1); F is 1 in mode ``single``, else one triple per family.
        mode: ``single``: one family (DSA's default); ``multiple``: all in the listed order; ``idc``: flip and color always,
            then one of crop, scale and rotate, then cutout, each if listed (IDC, arXiv 2205.14959).
    """

    names: tuple[str, ...]
    choice: Tensor | None
    u: Tensor
    mode: str = "single"

    def repeat(self, times: int) -> Draw:
        """Every row ``times`` times in a row: one draw for all the images of a class (siamese)."""
        choice = None if self.choice is None else self.choice.repeat_interleave(times)
        return replace(self, choice=choice, u=self.u.repeat_interleave(times, 0))


def strategy(text: str) -> tuple[str, ...]:
    """``"color_crop_flip"`` -> names; ``"none"`` and ``""`` -> no augmentation.

    Raises:
        CompanionError: an unknown family.
    """
    names = tuple(name for name in text.split("_") if name) if text != "none" else ()
    for name in names:
        if name not in FAMILIES:
            raise unknown("augmentation", name, [*FAMILIES, "none"])
    return names


def alternatives(names: tuple[str, ...], mode: str) -> tuple[str, ...]:
    """The families of which one is drawn."""
    if mode not in MODES:
        raise unknown("augmentation mode", mode, MODES)
    if mode == "multiple":
        return ()
    return names if mode == "single" else tuple(name for name in names if name not in _ALWAYS)


def draw(
    names: tuple[str, ...], groups: int, generator: torch.Generator, rows: int = 1, mode: str = "single"
) -> Draw:
    r"""Draw $\omega$ for ``groups`` batches: one family per batch, and parameters for each of its ``rows`` images.

    Siamese augmentation draws one row per class (``rows=1``) and repeats it; training draws ``rows`` = batch size.
    The result has ``groups * rows`` rows, group-major.
    """
    device, options, choice = generator.device, alternatives(names, mode), None
    if options:
        choice = torch.randint(len(options), (groups,), generator=generator, device=device).repeat_interleave(
            rows
        )
    shape = (groups * rows, 1 if mode == "single" else len(names), 3)
    return Draw(names, choice, torch.rand(shape, generator=generator, device=device), mode)


def apply(x: Tensor, omega: Draw) -> Tensor:
    r"""$\mathcal A_\omega(x)$ for ``x`` of ``(n, c, h, w)``, row i with row i of the draw."""
    u, options = omega.u.to(x.dtype), alternatives(omega.names, omega.mode)
    if omega.mode == "single":
        return _one_of(options, x, omega.choice, u[:, 0]) if options else x
    slot = {name: u[:, i] for i, name in enumerate(omega.names)}
    if omega.mode == "multiple":
        for name in omega.names:
            x = FAMILIES[name](x, slot[name])
        return x
    for name in ("flip", "color"):
        x = FAMILIES[name](x, slot[name]) if name in slot else x
    if options:
        x = _one_of(options, x, omega.choice, slot[options[0]])
    return FAMILIES["cutout"](x, slot["cutout"]) if "cutout" in slot else x


def _one_of(names: tuple[str, ...], x: Tensor, choice: Tensor, u: Tensor) -> Tensor:
    return (_dense if x.is_cuda else _by_family)(names, x, choice, u)


def _dense(names: tuple[str, ...], x: Tensor, choice: Tensor, u: Tensor) -> Tensor:
    """Every family on every row, then pick: more arithmetic, but the choices need not reach the host."""
    y = x
    for i, name in enumerate(names):
        y = torch.where((choice == i)[:, None, None, None], FAMILIES[name](x, u), y)
    return y


def _by_family(names: tuple[str, ...], x: Tensor, choice: Tensor, u: Tensor) -> Tensor:
    """Run by run of neighbouring rows with the same family; many short runs are first brought together by family."""
    families, sizes = (run.tolist() for run in torch.unique_consecutive(choice, return_counts=True))
    if len(families) > len(names) and x.numel() < len(families) * WORTH_A_CALL:
        order = torch.argsort(choice, stable=True)
        y = _by_family(names, x.index_select(0, order), choice[order], u.index_select(0, order))
        return y.index_select(0, torch.argsort(order))
    parts = [
        FAMILIES[names[family]](rows, numbers)
        for family, rows, numbers in zip(families, x.split(sizes), u.split(sizes), strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def cutmix(x: Tensor, partner: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    r"""CutMix (arXiv 1905.04899) for K batches: paste a box of a partner image.

    With $\lambda = u_0 \sim \mathrm{Beta}(1,1)$ the box has relative side $\sqrt{1-\lambda}$, a uniform centre $(u_1, u_2)$, and
    is clipped to the image.

    Args:
        x: ``(K, n, c, h, w)``; partner: ``(K, n)`` positions in the batch; u: ``(K, 3)``.
    Returns:
        the mixed images, and the share r of every batch that kept its own pixels, ``(K,)``; the loss is
        $r\,\ell(y) + (1-r)\,\ell(y_{partner})$.
    """
    sides = x.shape[-2:]
    half = [((1 - u[:, 0]).sqrt() * side).floor() // 2 for side in sides]  # (K,)
    masks = []
    for axis, side in enumerate(sides):
        center = (u[:, 1 + axis] * side).floor()
        line = torch.arange(side, device=x.device)
        masks.append(
            (line >= (center - half[axis])[:, None]) & (line < (center + half[axis])[:, None])
        )  # (K, side)
    box = masks[0][:, :, None] & masks[1][:, None, :]  # (K, h, w)
    rows = torch.arange(len(x), device=x.device)[:, None]
    mixed = torch.where(box[:, None, None], x[rows, partner], x)
    return mixed, 1 - box.to(x.dtype).mean((1, 2))


def families(augmentation: str, train) -> tuple[str, ...]:
    """The augmentation families of a strategy; ``data`` stands for the one that suits the data set (no flips for digits)."""
    return strategy(train.augmentation if augmentation == "data" else augmentation)


def augment_by_class(images: Tensor, omega: Draw) -> Tensor:
    r"""$\mathcal A_{\omega_c}$ on ``(C, n, c, h, w)``, one row of ``omega`` per class, shared by all its images (siamese)."""
    return apply(images.flatten(0, 1), omega.repeat(images.shape[1])).view(images.shape)


def siamese(
    real: Tensor, syn: Tensor, names: tuple[str, ...], generator: torch.Generator, mode: str = "single"
) -> tuple[Tensor, Tensor]:
    r"""$\mathcal A_\omega$ of ``(C, n, c, h, w)`` images with one new $\omega$ per class, shared by its real and synthetic ones."""
    if not names:
        return real, syn
    omega = draw(names, len(real), generator, mode=mode)
    return augment_by_class(real, omega), augment_by_class(syn, omega)


def augmented(images: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """One family for all images, with parameters of their own."""
    return apply(images, draw(names, 1, generator, rows=len(images))) if names else images


guard(globals())
