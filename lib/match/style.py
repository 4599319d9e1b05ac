r"""Style and diversity (Decomposed Distribution Matching, arXiv 2412.04748): channel statistics of the feature maps.

Feature maps are ``(C, n, K, h, w)`` for the real and ``(C, m, K, h, w)`` for the synthetic images of C classes, embeddings
``(C, m, d)``; distances are ``(C,)``, one per class.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.match.distance import At, Distance, Look, check_weight
from lib.match.features import class_mean
from lib.nets.convnet import TAPS
from lib.system.errors import CompanionError, choose
from lib.system.tensors import guard

EPS = 1e-5  # below the root of every standard deviation, as published


def mean_gram(maps: Tensor) -> Tensor:
    r"""$\frac1n\sum_i\frac{1}{Khw}F_iF_i^\top$, ``(C, n, K, h, w) -> (C, K, K)``, by one product and no matrix per image."""
    flat = maps.transpose(1, 2).flatten(2)  # (C, K, n h w)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def gram_distance(real: Tensor, syn: Tensor) -> Tensor:
    r"""Correlation matching $\lVert\bar G^T_c-\bar G^S_c\rVert_F^2$ of one layer, ``(C,)``."""
    return (mean_gram(real) - mean_gram(syn)).square().sum((-2, -1))


def moments(maps: Tensor, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    r"""Spatial mean and $\sqrt{\mathrm{var}+10^{-5}}$ of each channel, ``(..., K, h, w) -> (..., K)`` twice."""
    variance = maps.var((-2, -1), correction=int(unbiased))
    return maps.mean((-2, -1)), (variance + EPS).sqrt()


def moment_distance(real: Tensor, syn: Tensor) -> Tensor:
    r"""Moments matching $\frac12[\overline{(\mu^S-\mu^T)^2}+\overline{(\sigma^S-\sigma^T)^2}]$ of one layer, ``(C,)``.

    The published form: the maps are averaged over the images *first*; a mean over channels.
    """
    pair = (torch.stack(moments(maps.mean(1)), -2) for maps in (real, syn))
    return _pair_distance(*pair, relative=False)


def image_moments(maps: Tensor) -> Tensor:
    """:func:`moments` of every image (biased variance), ``(C, n, K, h, w) -> (C, n, 2, K)``; the authors' later form."""
    return torch.stack(moments(maps, unbiased=False), -2)


def image_moment_distance(real: Tensor, syn: Tensor, relative: bool = True) -> Tensor:
    r"""Moments of every image, then averaged over images, ``(C,)``; maps or their :func:`image_moments`.

    Args:
        relative: divide each term by the mean square of its real target (plus $10^{-8}$).
    """
    return _pair_distance(*(_image_moments(v).mean(1) for v in (real, syn)), relative)


def style_spread_distance(real: Tensor, syn: Tensor, relative: bool = True) -> Tensor:
    r"""As :func:`image_moment_distance` for the *spread over images* $\sqrt{\mathrm{var}_i+10^{-5}}$ of both moments, ``(C,)``.

    Raises:
        CompanionError: with fewer than two images per class in either set.
    """
    if min(real.shape[1], syn.shape[1]) < 2:
        raise CompanionError("the spread of 1 image per class does not exist: allowed are 2 or more")
    return _pair_distance(*((_image_moments(v).var(1) + EPS).sqrt() for v in (real, syn)), relative)


def _image_moments(maps_or_moments: Tensor) -> Tensor:
    return maps_or_moments if maps_or_moments.dim() == 4 else image_moments(maps_or_moments)


def _pair_distance(real: Tensor, syn: Tensor, relative: bool) -> Tensor:
    """``(C, 2, K)`` both -> ``(C,)``: means over the channels and over the two moments."""
    gap = (syn - real).square().mean(-1)
    return (gap / (real.square().mean(-1) + 1e-8) if relative else gap).mean(-1)


def accumulation_weights(classes: int, layers: int, legacy: bool = False) -> Tensor:
    r"""Weight of each class's summed layer distances, ``(C,)`` float64: 1/L, or what the published accumulator amounts to.

    The published scripts keep one variable for all classes, $s\leftarrow(s+\sum_l d_{c,l})/L$, and add it after every class:
    class j (from 1) ends up with $\sum_{c\ge j}L^{-(c-j+1)}$.
    """
    if not legacy:
        return torch.full((classes,), 1 / layers, dtype=torch.float64)
    powers = float(layers) ** -torch.arange(1, classes + 1, dtype=torch.float64)
    return powers.cumsum(0).flip(0)


def default_neighbours(ipc: int) -> int:
    """k of the diversity term: a fifth of the images per class, at least 1 and at most ipc - 1 (0 for one image)."""
    return min(max(1, round(0.2 * ipc)), ipc - 1)


def neighbour_diversity(syn: Tensor, k: int | None = None) -> Tensor:
    r"""$-\sum_i\mathrm{KL}(\mathrm{softmax}(e_i)\,\|\,\mathrm{softmax}(\frac1k\sum_{j\in NN_k(i)}e_j))$, ``(C,)``, <= 0.

    Embeddings are ``(C, m, d)``. Equations 8 and 9: minimising it pushes every image away from its k nearest neighbours of the
    same class (by L2 distance; who they are carries no gradient, their mean does). Unbounded below. For one image per class
    it is 0.

    Raises:
        CompanionError: if k is not between 1 and m - 1.
    """
    m = syn.shape[1]
    if m == 1:
        return syn.sum((1, 2)) * 0
    k = default_neighbours(m) if k is None else k
    if not 1 <= k < m:
        raise CompanionError(f"k = {k} nearest neighbours with {m} images per class: allowed 1 to {m - 1}")
    with torch.no_grad():
        far = torch.cdist(syn, syn, compute_mode="donot_use_mm_for_euclid_dist")
        far.diagonal(dim1=1, dim2=2).fill_(float("inf"))
        nearest = far.topk(k, largest=False).indices  # (C, m, k)
    classes = torch.arange(len(syn), device=syn.device)[:, None, None]
    own, others = syn.log_softmax(-1), syn[classes, nearest].mean(2).log_softmax(-1)
    return -(own.exp() * (own - others)).sum((1, 2))


def principal_spread_distance(real: Tensor, syn: Tensor, rank: int | None = None) -> Tensor:
    r"""$\overline{(\sigma^S_k-\sigma^T_k)^2}/(\overline{(\sigma^T_k)^2}+10^{-8})$ on the first principal axes of T, ``(C,)``.

    The authors' bounded diversity term: the standard deviations (unbiased) of the embeddings projected on the first ``rank`` axes
    of the real class; 0 when the spreads match. Axes by an exact SVD. For one image per class it is 0.

    Args:
        rank: number of axes; default: min(m - 1, 16).
    """
    if syn.shape[1] == 1:
        return syn.sum((1, 2)) * 0
    rank = min(syn.shape[1] - 1, 16) if rank is None else rank
    most = min(real.shape[1] - 1, real.shape[2])
    if not 1 <= rank <= most:
        raise CompanionError(f"rank {rank} of the principal axes: allowed 1 to {most}")
    with torch.no_grad():
        centred = real - real.mean(1, keepdim=True)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:, :rank].transpose(1, 2)  # (C, d, rank)
        target = (real @ axes).std(1)
    gap = (syn @ axes).std(1) - target
    return gap.square().mean(-1) / (target.square().mean(-1) + 1e-8)


# -- as distances -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OfMaps(Distance):
    """A distance of a statistic of every block's map, averaged over the blocks."""

    weight: float = 1e4
    tap: str = "act"
    legacy: bool = False

    def __post_init__(self):
        choose("tap", self.tap, dict.fromkeys(TAPS))
        check_weight(self)

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

    @abstractmethod
    def statistic(self, maps: Tensor) -> Tensor:
        """Of ``(C, n, K, h, w)`` maps, ``(C, n or 1, ...)``."""

    def observe(self, look: Look) -> dict[str, Tensor]:
        maps = look.maps(self.tap)
        with torch.autocast(maps[0].device.type, enabled=False):  # statistics in float32
            wide = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in maps)
            return {str(i): self.statistic(one) for i, one in enumerate(wide)}

    def over_layers(self, distances: list[Tensor]) -> Tensor:
        """The weighted mean of the layers' distances ``(C,)``, or what the published accumulator makes of them."""
        weights = accumulation_weights(len(distances[0]), len(distances), self.legacy)
        return self.weight * (weights.to(distances[0]) * sum(distances))


@dataclass(frozen=True)
class Gram(_OfMaps):
    r"""DDM's correlation matching, $\lambda\frac1L\sum_l\lVert\bar G^T_{l,c}-\bar G^S_{l,c}\rVert_F^2$; term ``gram``.

    Attributes:
        weight: $\lambda$, 0 or more; tap: "conv", "norm", "act" or "pool" of every block.
        legacy: the published accumulator's weights of the classes (:func:`accumulation_weights`).
    """

    def statistic(self, maps: Tensor) -> Tensor:
        return mean_gram(maps).unsqueeze(1)  # (C, 1, K, K)

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        found = [class_mean(real[i].flatten(2), syn[i].flatten(2)) for i in real]
        return {"gram": self.over_layers(found)}


@dataclass(frozen=True)
class Moments(_OfMaps):
    r"""DDM's moments matching, $\lambda\alpha\frac1L\sum_l d^{MM}_{l,c}$ on the mean map; term ``moments``.

    Attributes:
        per_image: the authors' later form, moments of every image relative to the real ones; published with weight 180 at "conv".
        weight: $\lambda\alpha$, 0 or more; tap, legacy: as those of ``Gram``.
    """

    per_image: bool = False

    def statistic(self, maps: Tensor) -> Tensor:
        return image_moments(maps) if self.per_image else maps.mean(1, keepdim=True)

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        distance = image_moment_distance if self.per_image else moment_distance
        return {"moments": self.over_layers([distance(real[i], syn[i]) for i in real])}


@dataclass(frozen=True)
class StyleSpread(_OfMaps):
    """The spread over images of every image's moments (the authors' later code); term ``spread``, none at one image per class.

    Attributes:
        weight: 0 or more; tap, legacy: as those of ``Gram``.
    """

    def check(self, network: nn.Module, ipc: int) -> None:
        super().check(network, ipc)
        _warn_of_one(self, ipc)

    def statistic(self, maps: Tensor) -> Tensor:
        return image_moments(maps)

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        if syn["0"].shape[1] == 1:
            return {}
        return {"spread": self.over_layers([style_spread_distance(real[i], syn[i]) for i in real])}


@dataclass(frozen=True)
class Diversity(Distance):
    r"""DDM's $\beta\,\mathcal L_{ICD,c}$: minus the divergence of every synthetic embedding from the mean of its k nearest
    neighbours of the same class; term ``diversity``, none at one image per class. Unbounded below.

    Attributes:
        weight: $\beta$, 0 or more; k: neighbours, below the IPC; None: a fifth of the images per class (published script: 2).
        principal: the authors' later, bounded form, the spread along the principal axes of the real class.
    """

    weight: float = 10.0
    k: int | None = None
    principal: bool = False

    def __post_init__(self):
        check_weight(self)

    def check(self, network: nn.Module, ipc: int) -> None:
        _warn_of_one(self, ipc)
        if ipc > 1 and self.k is not None and not 1 <= self.k < ipc:
            raise CompanionError(
                f"k = {self.k} nearest neighbours with {ipc} images per class: allowed 1 to {ipc - 1}"
            )

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        if syn["embedding"].shape[1] == 1:
            return {}
        if self.principal:
            value = principal_spread_distance(real["embedding"], syn["embedding"])
        else:
            value = neighbour_diversity(syn["embedding"], self.k)
        return {"diversity": self.weight * value}


def _warn_of_one(distance, ipc: int) -> None:
    if ipc == 1:
        warnings.warn(
            f"one image per class has no diversity: {type(distance).__name__} is left out", stacklevel=2
        )


guard(globals())
