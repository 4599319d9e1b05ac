r"""DDM - Decomposed Distribution Matching in Dataset Condensation. Malakshan et al., WACV 2025, arXiv 2412.04748.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c\ \underbrace{\lVert\bar\psi^T_c-\bar\psi^S_c\rVert_2^2
 + \beta\,\mathcal L_{ICD,c}}_{content}\ +\ \underbrace{\tfrac1L\sum_l\big(\lambda\alpha\, d^{MM}_{l,c}
 + \lambda\,\lVert\bar G^T_{l,c}-\bar G^S_{l,c}\rVert_F^2\big)}_{style}$$

DM's distance of class means $\bar\psi$ (content), and the channel statistics of every block's map F (style): spatial mean and
deviation of the mean map ($d^{MM}$), and the mean Gram matrix $\frac{1}{Khw}FF^\top$. The diversity term is minus the
divergence of every synthetic embedding from the mean of its k nearest neighbours of the same class, as softmaxes.

Paper and code: the weights $\alpha, \beta, \lambda$ of the full method are not published, its scripts have one term each. They
tap the norm's output, which the next module, a ReLU in place, overwrites: the map is that after the ReLU. Their accumulator of
the style distances gives the classes other weights than 1/L (``legacy``). The diversity term is unbounded below; the authors'
later code (``variant="released"``) matches the spread along the principal axes of the real class instead, takes the moments of
every image relative to the real ones, and may match the spread of these over images.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.formation import by_class
from lib.match import features, style
from lib.methods.dm import DM, State
from lib.nets.convnet import TAPS, ConvNet
from lib.system.errors import CompanionError, choose

VARIANTS = ("paper", "released")


@dataclass(frozen=True)
class DDM(DM):
    """Hyper-parameters beyond DM's. A term of weight 0 is left out; with all four 0 this is DM."""

    moments: float = 1e4  # lambda * alpha; published script: 1e4 ("released": 180)
    gram: float = 1e4  # lambda; published script: 1e4
    diversity: float = 10.0  # beta; published script: 10 ("released": 30)
    spread: float = 0.0  # of the style's spread over images, "released" only; optional there
    k: int | None = None  # nearest neighbours; default a fifth of the images per class; published script: 2
    tap: str = "act"  # conv | norm | act | pool of every block; "released": conv
    variant: str = "paper"
    legacy: bool = False  # the published accumulator's weights of the classes

    def __post_init__(self):
        choose("variant of DDM", self.variant, dict.fromkeys(VARIANTS))
        choose("tap", self.tap, dict.fromkeys(TAPS))
        for name in ("moments", "gram", "diversity", "spread"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise CompanionError(f"{name} {getattr(self, name)} of DDM is not allowed: at least 0")
        if self.spread and self.variant == "paper":
            raise CompanionError(
                f"spread {self.spread} is a term of variant 'released': allowed in 'paper' is 0"
            )

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        state = super().begin(train, ipc, generator)
        if self.uses_maps and not isinstance(state.network, ConvNet):
            raise CompanionError(
                f"network {self.network!r} has no maps to tap: allowed with style terms is convnet-..."
            )
        if ipc == 1 and (self.diversity or self.spread):
            warnings.warn("one image per class has no diversity: DDM leaves that term out", stacklevel=2)
        elif self.diversity and self.k is not None and not 1 <= self.k < ipc:
            raise CompanionError(
                f"k = {self.k} nearest neighbours with {ipc} images per class: allowed 1 to {ipc - 1}"
            )
        return state

    @property
    def uses_maps(self) -> bool:
        """Whether the maps are looked at."""
        return bool(self.moments or self.gram or self.spread)

    def observe(self, network: torch.nn.Module, images: Tensor) -> list[Tensor]:
        """The embeddings ``(C, n, d)``, then of every block, where they have a weight, the mean Gram ``(C, 1, K, K)``, and the
        mean map ``(C, 1, K, h, w)`` ("released": the moments of every image, ``(C, n, 2, K)``)."""
        if not self.uses_maps:
            return super().observe(network, images)
        maps, embedding = network.look(images.flatten(0, 1), self.tap)
        grams, moments = [], []
        with torch.autocast(images.device.type, enabled=False):  # statistics in float32
            for one in maps:
                one = by_class(one.to(torch.promote_types(one.dtype, torch.float32)), len(images))
                if self.gram:
                    grams.append(style.mean_gram(one).unsqueeze(1))
                if self.variant == "released" and (self.moments or self.spread):
                    moments.append(style.image_moments(one))
                elif self.moments:
                    moments.append(one.mean(1, keepdim=True))
        return [by_class(embedding, len(images)), *grams, *moments]

    def terms(self, state: State, real: list[Tensor], syn: list[Tensor]) -> dict[str, Tensor]:
        """Weighted: ``mean`` (as in DM), ``gram``, ``moments``, ``spread``, ``diversity``."""
        found = super().terms(state, real[:1], syn[:1])
        blocks = list(zip(real[1:], syn[1:], strict=True))
        grams, moments = (
            (blocks[: state.network.depth], blocks[state.network.depth :]) if self.gram else ([], blocks)
        )

        if self.gram:
            distances = [features.class_mean(r.flatten(2), s.flatten(2)) for r, s in grams]
            found["gram"] = self.gram * self.over_layers(distances)
        if self.moments:
            distance = style.image_moment_distance if self.variant == "released" else style.moment_distance
            found["moments"] = self.moments * self.over_layers([distance(r, s) for r, s in moments])
        if self.spread and state.ipc > 1:
            spreads = [style.style_spread_distance(r, s) for r, s in moments]
            found["spread"] = self.spread * self.over_layers(spreads)
        if self.diversity and state.ipc > 1:
            found["diversity"] = self.diversity * self.diversity_of(real[0], syn[0])
        return found

    def over_layers(self, distances: list[Tensor]) -> Tensor:
        """The mean of the layers' distances ``(C,)``, or what the published accumulator makes of them."""
        weights = style.accumulation_weights(len(distances[0]), len(distances), self.legacy)
        return weights.to(distances[0]) * sum(distances)

    def diversity_of(self, real: Tensor, syn: Tensor) -> Tensor:
        if self.variant == "released":
            return style.principal_spread_distance(real, syn)
        return style.neighbour_diversity(syn, self.k)


# Weights of the small settings: powers of ten at which the terms are of the size of DM's.
_SMALL = DDM(iterations=200, real_batch=64, network="convnet-d2-w32", augmentation="none",
             moments=1e2, gram=1e3, diversity=1.0)  # fmt: skip
_PHOTOS = replace(
    _SMALL, iterations=100, real_batch=32, network="convnet-d3-w32", augmentation="data", moments=1e3
)
_CIFAR = DDM(gram=0.0, legacy=True)
_RELEASED = DDM(moments=180.0, gram=1e4, diversity=0.0, tap="conv", variant="released")
# The published scripts have one style term each; accuracies with both come from the authors' later code ("released").
PRESETS = {
    "digits": _SMALL,
    "photos16": _PHOTOS,
    "photos32": _PHOTOS,
    "paper": _CIFAR,
    "paper-moments": replace(_CIFAR, diversity=0.0),
    "paper-gram": replace(_CIFAR, gram=1e4, moments=0.0, diversity=0.0),
    "paper-diversity": replace(_CIFAR, moments=0.0, k=2),
    "paper-released": _RELEASED,
    "paper-released-diversity": replace(_RELEASED, diversity=30.0),
    "paper-released-cifar100": replace(_RELEASED, iterations=10_000),
    "paper-released-tinyimagenet": replace(_RELEASED, iterations=3000, network="convnet-d4-w128"),
}
