r"""LCMat - Loss-Curvature Matching. Shin, Bae, Shin, Joo & Moon, AISTATS 2023, arXiv 2303.04449.

A small set S should have the loss of T in a ball around the network, not only at it. With $\Delta=L_T-L_S$,

$$\tfrac1\rho\Big(\max_{\lVert\epsilon\rVert\le\rho}|\Delta(\theta+\epsilon)|-|\Delta(\theta)|\Big)\ \le\
\lVert\nabla L_T-\nabla L_S\rVert_2+\tfrac\rho2\lVert H_T-H_S\rVert_{op}+O(\rho^2):$$

a gradient gap and a curvature gap. **LCMat-S** selects real images by facility location on the pair cost
$D_{ij}=\lVert g_i-g_j\rVert_2+\varepsilon\sum_{k\in\mathcal K}|\lambda_{ik}-\lambda_{jk}|$ of last-layer gradients g and the K
coordinates of the Hessian diagonals $\lambda$ that vary most over the class. **LCMat-C** condenses: DSA's matching loss plus
$\tfrac\rho2\,\mathcal C(T_c,S_c)$, a curvature gap of the last layer.

Paper and code: the official code has LCMat-S alone. It differentiates the mean loss of batches, so the short last batch weighs
more, takes the similarity $10-D$ and leaves batch norm in training mode; ``variant="official"`` does the first two,
``"paper"`` works per sample in eval mode with $\max D+10^{-3}-D$. **LCMat-C is a reconstruction** from the abstract and the
bound: its code was never published, and the forms of $\mathcal C$, the values of rho and their place in DSA's loop are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lib.match.curvature import CurvatureGap
from lib.match.gradient import Gap, RowCosine
from lib.methods import dc, dsa
from lib.methods.selection import RESNET, SMALL_PROXIES, ProxySelection
from lib.recipes import Recipes, published, small
from lib.select.pair_cost import curvature_coordinates, pair_cost
from lib.select.proxy import Proxy, Trained
from lib.select.rules import Choice
from lib.select.similarity import flipped
from lib.select.submodular import FacilityLocation, cluster_sizes
from lib.system.errors import CompanionError


@dataclass(frozen=True)
class LCMatS(ProxySelection):
    r"""Hyper-parameters of the official CIFAR-10 script (5 images per class; CIFAR-100 alike). The other fields are ProxySelection's.

    Attributes:
        eps: weight of the curvature, in the place of $\rho/2$, 0 or more; 0 is CRAIG without its weights.
        coordinates: K, of C (1 + d), 1 or more.
        weighted: True is ours: weights as CRAIG has them, the images nearest to each pick.
    """

    eps: float = 0.01
    coordinates: int = 100
    weighted: bool = False

    VARIANTS: ClassVar = ("paper", "official")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps >= 0 or self.coordinates < 1:
            raise CompanionError(
                f"eps {self.eps!r} and {self.coordinates!r} coordinates: eps must be at least 0, coordinates at least 1"
            )

    def pick(self, seen: list[Trained], rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        last = self.gradients(seen[0], rows)
        cost = pair_cost(last, self.eps, curvature_coordinates(last, self.coordinates))
        similarity = flipped(cost, 10.0 if self.variant == "official" else None)
        order = self.greedily(FacilityLocation(similarity), budget, generator)
        return order, cluster_sizes(similarity, order) if self.weighted else None


@dataclass(frozen=True)
class LCMatC(dsa.DSA):
    """DSA with a curvature term (our reconstruction); at radius 0 it *is* DSA. With one image per class the default form, the
    variance of gradients, is constant: take ``CurvatureGap(rho, "diag")``.

    Attributes:
        distance: DC's and a curvature; the other fields are DSA's.
    """

    distance: Gap = RowCosine() + CurvatureGap()


LCMAT_S = Recipes(
    *(small(names, LCMatS(proxy=proxy)) for names, proxy in SMALL_PROXIES.items()),
    published("cifar10 cifar100", 5, LCMatS(proxy=RESNET), "deepcore", "the published scripts"),
    published(
        "cifar10 cifar100",
        5,
        LCMatS(proxy=Proxy(epochs=40, batch=256), eps=0.05),
        "deepcore",
        "the defaults of the code, which its scripts override",
        variant="defaults",
    ),
)


def _lcmat_c(method: dsa.DSA, rho: float = 0.1, kind: str = "gradvar", **changes) -> LCMatC:
    return LCMatC(**vars(method) | {"distance": RowCosine() + CurvatureGap(rho, kind)} | changes)


# rho is ours, chosen on digits in the small rows. One image per class has no gradient variance: the diagonal form.
_OURS = "DSA's settings, rho and the form of the curvature ours: a reconstruction"
LCMAT_C = Recipes(
    small("digits", _lcmat_c(dsa.RECIPES.named("digits").method, 1.0, "diag", outer=40)),
    small("fashion14", _lcmat_c(dsa.RECIPES.named("fashion14").method, 1.0, "diag")),
    *(
        small(data, _lcmat_c(dsa.RECIPES.named(data, 10).method, 1.0, "diag"), ipc=10, source=dc.FEWER)
        for data in ("digits", "fashion14")
    ),
    small("photos16 photos32", _lcmat_c(dsa.RECIPES.named("photos16").method, 1.0, "diag")),
    published("cifar10 cifar100", 1, _lcmat_c(dsa.DSA(), kind="diag"), "dsa", _OURS),
    published("cifar10 cifar100", (10, 50), _lcmat_c(dsa.DSA()), "dsa", _OURS),
)
