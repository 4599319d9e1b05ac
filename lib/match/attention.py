r"""Spatial attention matching (DataDAM, arXiv 2310.00093): where the network responds, not how strongly.

Feature maps are ``(C, n, K, h, w)`` for the real and ``(C, m, K, h, w)`` for the synthetic images, one entry per layer; losses
are ``(C,)``, one per class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.match.distance import At, Distance, Look, check_weight
from lib.system.errors import CompanionError, choose
from lib.system.tensors import guard

POOLED_ROWS = 128  # images whose channels are pooled at once


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


@dataclass(frozen=True)
class Attention(Distance):
    r"""DataDAM's $w\sum_{l<L}\lVert\frac1n\sum_i\hat a_l(x_{c,i})-\frac1m\sum_j\hat a_l(s_{c,j})\rVert_2^2$ at every ReLU but
    the last; terms ``attention1``, ``attention2``, ...

    The weight 100 is the released code's; it is absent in the paper, where it would be in the learning rate. Paper and code differ
    in p: the paper's table says 4, the released script 1.

    Attributes:
        weight: w, 0 or more; p: exponent of a map, above 0.
        layers: ReLUs that are matched, from 1; None: all but the last.
        pooling: over channels, "sum" or "max"; normalisation: of every image's map, "l2", "l1", "frobenius" or "none"; distance: of the
            class means, "mse", "mae" or "angle".
    """

    weight: float = 100.0
    p: float = 4.0
    layers: tuple[int, ...] | None = None
    pooling: str = "sum"
    normalisation: str = "l2"
    distance: str = "mse"

    def __post_init__(self):
        choose("attention pooling", self.pooling, POOLINGS)
        choose("attention normalisation", self.normalisation, NORMALISATIONS)
        choose("attention distance", self.distance, DISTANCES)
        if not self.p > 0:
            raise CompanionError(f"attention exponent p = {self.p} is not allowed: it must be positive")
        check_weight(self)

    @property
    def taps(self) -> tuple[str, ...]:
        return ("act",)

    def check(self, network: nn.Module, ipc: int) -> None:
        super().check(network, ipc)
        self.matched(network.depth)

    def matched(self, depth: int) -> tuple[int, ...]:
        """The ReLUs that are matched, from 1."""
        layers = tuple(range(1, depth)) if self.layers is None else self.layers
        if not layers or not set(layers) <= set(range(1, depth + 1)):
            raise CompanionError(
                f"attention layers {layers} at depth {depth}: allowed are some of 1 to {depth}"
            )
        return layers

    def observe(self, look: Look) -> dict[str, Tensor]:
        """Of every matched layer the mean attention map, ``(C, 1, h w)``: no channels."""
        maps, found = look.maps("act"), {}
        for layer in self.matched(len(maps)):
            flat = maps[layer - 1].flatten(0, 1)
            each = [  # in parts: a power of the maps of a whole batch is as large as they are
                attention_map(part, self.p, self.pooling, self.normalisation)
                for part in flat.split(POOLED_ROWS)
            ]
            found[str(layer)] = torch.cat(each).unflatten(0, maps[layer - 1].shape[:2]).mean(1, keepdim=True)
        return found

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        return {
            f"attention{layer}": self.weight * mean_distance(real[layer], syn[layer], self.distance)
            for layer in real
        }


guard(globals())
