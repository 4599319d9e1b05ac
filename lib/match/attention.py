r"""Spatial attention matching (DataDAM, arXiv 2310.00093): where the network responds, not how strongly.

Feature maps are ``(C, n, K, h, w)`` for the real and ``(C, m, K, h, w)`` for the synthetic images, one entry per layer; losses
are ``(C,)``, one per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match.features import class_mean
from lib.system.errors import CompanionError, choose


@dataclass(frozen=True)
class Variant:
    """What the published versions disagree about."""

    p: int  # exponent of the channel pooling
    norm: str  # normalisation of the embedding networks, as in a network's name


# The hyperparameter table of the paper, and the constants of the released script.
VARIANTS = {"paper": Variant(4, "instance"), "code": Variant(1, "batch")}
POOLINGS = {"sum": lambda powers: powers.sum(-3), "max": lambda powers: powers.amax(-3)}
# "frobenius" as released: it divides by the squared norm, so a map of half the size counts double.
NORMALISATIONS = {
    "l2": lambda maps: F.normalize(maps, dim=-1, eps=1e-12),
    "l1": lambda maps: F.normalize(maps, p=1, dim=-1, eps=1e-12),
    "frobenius": lambda maps: maps / maps.square().sum(-1, keepdim=True).clamp(min=1e-12),
    "none": lambda maps: maps,
}


def _angle(real: Tensor, syn: Tensor) -> Tensor:
    """In radians; finite, with a finite gradient, where an arc cosine is not: at equal and at opposite vectors."""
    real, syn = F.normalize(real, dim=-1), F.normalize(syn, dim=-1)
    return 2 * torch.atan2((real - syn).norm(dim=-1), (real + syn).norm(dim=-1))


DISTANCES = {
    "mse": lambda real, syn: (real - syn).square().sum(-1),
    "mae": lambda real, syn: (real - syn).abs().sum(-1),
    "angle": _angle,
}


def attention_map(maps: Tensor, p: float, pooling: str = "sum", normalisation: str = "l2") -> Tensor:
    r"""$\hat a = a/\lVert a\rVert_2$ with $a_{hw} = \sum_k |F_{k,hw}|^p$, ``(..., K, h, w) -> (..., h w)``, >= 0 (equation 1).

    Half-precision maps are pooled in float32: a fourth power overflows float16.

    Args:
        pooling, normalisation: names of :data:`POOLINGS` (``max`` over the channels in place of the sum) and of
            :data:`NORMALISATIONS`, the alternatives in the released code.
    """
    if not p > 0:
        raise CompanionError(f"attention exponent p = {p} is not allowed: it must be positive")
    pool = choose("attention pooling", pooling, POOLINGS)
    normalise = choose("attention normalisation", normalisation, NORMALISATIONS)
    if maps.dtype in (torch.float16, torch.bfloat16):
        maps = maps.float()
    if p == 1:
        powers = maps.abs()
    elif p in (2, 4):
        powers = maps.square() if p == 2 else maps.square().square()
    else:
        powers = maps.abs().pow(p)
    return normalise(pool(powers).flatten(-2))


def mean_distance(real: Tensor, syn: Tensor, distance: str = "mse") -> Tensor:
    """Distance of the classes' mean attention maps, ``(C, n, h w)`` and ``(C, m, h w)`` -> ``(C,)``.

    Every image's map is normalised, then averaged. ``mse`` is a sum over the positions, as released, and so is ``mae``.
    """
    return choose("attention distance", distance, DISTANCES)(real.mean(1), syn.mean(1))


def attention_distance(real: Tensor, syn: Tensor, p: float) -> Tensor:
    r"""$\lVert\frac1n\sum_i\hat a(x_{c,i})-\frac1m\sum_j\hat a(s_{c,j})\rVert_2^2$ of one layer, ``(C,)``."""
    return mean_distance(attention_map(real, p), attention_map(syn, p))


def datadam(
    real: Sequence[Tensor],
    syn: Sequence[Tensor],
    real_embedding: Tensor,
    syn_embedding: Tensor,
    p: float,
    task_balance: float = 0.01,
    scale: float = 100.0,
) -> Tensor:
    r"""$100\,(\mathcal L_{SAM,c} + \lambda\,\mathcal L_{MMD,c})$, ``(C,)``.

    Args:
        real, syn: ReLU outputs of every layer *but the last*.
        real_embedding, syn_embedding: ``(C, n, d)`` and ``(C, m, d)``, flattened output of the convolutional body.
        p: exponent, see :data:`VARIANTS`.
        task_balance: $\lambda$, 0.01 (images up to 64 pixels) or 0.02.
        scale: the factor 100 of the released code, absent in the paper; it acts like a step size.
    """
    attention = sum(attention_distance(r, s, p) for r, s in zip(real, syn, strict=True))
    return scale * (attention + task_balance * class_mean(real_embedding, syn_embedding))
