r"""DDM - Decomposed Distribution Matching in Dataset Condensation. Malakshan et al., WACV 2025, arXiv 2412.04748.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c\ \underbrace{\lVert\bar\psi^T_c-\bar\psi^S_c\rVert_2^2
 + \beta\,\mathcal L_{ICD,c}}_{content}\ +\ \underbrace{\tfrac1L\sum_l\big(\lambda\alpha\, d^{MM}_{l,c}
 + \lambda\,\lVert\bar G^T_{l,c}-\bar G^S_{l,c}\rVert_F^2\big)}_{style}$$

DM (``lib.methods.dm``) with more distances: the channel statistics of every block's map F (style): spatial mean and deviation of the
mean map ($d^{MM}$), and the mean Gram matrix $\frac{1}{Khw}FF^\top$; and a diversity term, minus the divergence of every synthetic
embedding from the mean of its k nearest neighbours of the same class, as softmaxes (``lib.match.style``).

Paper and code: the weights $\alpha, \beta, \lambda$ of the full method are not published, its scripts have one term each; the full
method here takes the weights of the single scripts together. They tap the norm's output, which the next module, a ReLU in place,
overwrites: the map is that after the ReLU. Their accumulator of the style distances gives the classes other weights than 1/L
(``legacy``). The diversity term is unbounded below; the authors' later code (variant ``released``) matches the spread along the
principal axes of the real class instead, takes the moments of every image relative to the real ones, and may match the spread of
these over images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lib.match.distance import Distance
from lib.match.features import ClassMean
from lib.match.style import Diversity, Gram, Moments
from lib.methods.dm import DM
from lib.recipes import Recipes, published, small


@dataclass(frozen=True)
class DDM(DM):
    """The full method, with the weights of the published single-term scripts. The fields are DM's.

    Attributes:
        distance: the class mean and three terms of ``lib.match.style``.
    """

    distance: Distance = ClassMean() + Gram(1e4, legacy=True) + Moments(1e4, legacy=True) + Diversity(10.0)


# Weights of the small settings: powers of ten at which the terms are of the size of DM's.
_SMALL = DDM(iterations=200, real_batch=64, network="convnet-d2-w32", augmentation="none",
             distance=ClassMean() + Gram(1e3) + Moments(1e2) + Diversity(1.0))  # fmt: skip
_PHOTOS = replace(
    _SMALL, iterations=100, real_batch=32, network="convnet-d3-w32", augmentation="data",
    distance=ClassMean() + Gram(1e3) + Moments(1e3) + Diversity(1.0),
)  # fmt: skip
_FULL = DDM()
_RELEASED = DDM(distance=ClassMean() + Gram(1e4, tap="conv") + Moments(180.0, tap="conv", per_image=True))
_DIVERSE = replace(_RELEASED, distance=_RELEASED.distance + Diversity(30.0, principal=True))
_SCRIPT = "published script of this term"
_LATER = "the authors' later code"


def _term(term: Distance) -> DDM:
    return DDM(distance=ClassMean() + term)


RECIPES = Recipes(
    small("digits", replace(_SMALL, lr=10.0)),
    small("fashion14", replace(_SMALL, iterations=80, lr=3.0, real_batch=32, network="convnet-d3-w32")),
    small("photos16 photos32", _PHOTOS),
    published("cifar10 cifar100", (1, 10, 50), _FULL, "ddm", "Table 1; weights of the single scripts"),
    published("tinyimagenet", (1, 10, 50), replace(_FULL, network="convnet-d4-w128"), "ddm",
              "Table 1; weights of the single scripts"),
    published("cifar10", 10, _term(Moments(1e4, legacy=True)), "ddm", _SCRIPT, variant="moments"),
    published("cifar10", 10, _term(Gram(1e4, legacy=True)), "ddm", _SCRIPT, variant="gram"),
    published("cifar10", 10, _term(Diversity(10.0, k=2)), "ddm", _SCRIPT, variant="diversity"),
    published("cifar10", (1, 10, 50), _RELEASED, "ddm", _LATER, variant="released"),
    published("cifar10", (10, 50), _DIVERSE, "ddm", _LATER, variant="released-diversity"),
    published("cifar100", (1, 10, 50), replace(_RELEASED, iterations=10_000), "ddm", _LATER, variant="released"),
    published("tinyimagenet", (1, 10, 50), replace(_RELEASED, iterations=3000, network="convnet-d4-w128"), "ddm", _LATER,
              variant="released"),
)  # fmt: skip
