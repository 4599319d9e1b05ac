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
import torch.nn.functional as F
from torch import Tensor

from lib.match import curvature
from lib.methods import dsa
from lib.methods.coreset import SMALL_PROXIES, Choice, ProxySelection
from lib.nets.ensemble import Ensemble
from lib.select.pair_cost import curvature_coordinates, pair_cost
from lib.select.proxy import Proxy, Trained
from lib.select.similarity import flipped
from lib.select.submodular import FacilityLocation, cluster_sizes
from lib.system.errors import CompanionError, choose


@dataclass(frozen=True)
class LCMatS(ProxySelection):
    """Hyper-parameters of the official CIFAR-10 script (5 images per class; CIFAR-100 alike)."""

    eps: float = 0.01  # weight of the curvature, in the place of rho / 2; 0 is CRAIG without its weights
    coordinates: int = 100  # K, of C (1 + d)
    weighted: bool = (
        False  # True is ours: weights as CRAIG has them, the number of images nearest to each pick
    )

    VARIANTS: ClassVar = ("paper", "official")

    def pick(self, proxies: list[Trained], rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        if not self.eps >= 0 or self.coordinates < 1:
            raise CompanionError(
                f"eps {self.eps!r} and {self.coordinates!r} coordinates: eps must be at least 0, coordinates at least 1"
            )
        last = self.gradients(proxies[0], rows)
        cost = pair_cost(last, self.eps, curvature_coordinates(last, self.coordinates))
        similarity = flipped(cost, 10.0 if self.variant == "official" else None)
        order = self.greedily(FacilityLocation(similarity), budget, generator)
        return order, cluster_sizes(similarity, order) if self.weighted else None


CURVATURES = {
    "gradvar": curvature.gradient_variance,
    "diag": curvature.diagonal,
    "eig": curvature.top_eigenvalue,
}


@dataclass(frozen=True)
class LCMatC(dsa.DSA):
    """DSA with a curvature term (our reconstruction); with ``rho = 0`` it *is* DSA."""

    rho: float = 0.1  # radius of the ball; values are ours
    curvature: str = "gradvar"  # "diag" or "eig"; with one image per class gradvar has no gradient
    power_steps: int = 10  # of "eig"

    def begin(self, train, ipc: int, generator: torch.Generator) -> dsa.dc.State:
        choose("curvature", self.curvature, CURVATURES)
        if not self.rho >= 0:
            raise CompanionError(f"rho {self.rho!r} is not allowed: a radius is at least 0")
        return super().begin(train, ipc, generator)

    def gap(
        self, networks: Ensemble, real: Tensor, syn: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$\ell_c=d(\nabla L_{T_c},\nabla L_{S_c})+\tfrac\rho2\,\mathcal C(T_c,S_c)$ and its gradient."""
        losses, gradient = super().gap(networks, real, syn, generator)
        if self.rho == 0:
            return losses, gradient
        pixels = syn.detach().requires_grad_()
        with torch.no_grad():
            target = outputs(networks, real)
        extra = self.rho / 2 * self.curvature_gap(target, outputs(networks, pixels), generator)
        return losses + extra.detach(), gradient + torch.autograd.grad(extra.sum(), pixels)[0]

    def curvature_gap(
        self, real: curvature.Outputs, syn: curvature.Outputs, generator: torch.Generator
    ) -> Tensor:
        r"""$\mathcal C(T_c,S_c)$, ``(C,)``."""
        if self.curvature != "eig":
            return CURVATURES[self.curvature](real, syn)
        shape = (len(syn.labels), syn.logits.shape[2], syn.inputs.shape[2])
        start = torch.randn(shape, generator=generator, device=generator.device).to(syn.inputs)
        return curvature.top_eigenvalue(real, syn, start, self.power_steps)


def outputs(networks: Ensemble, images: Tensor) -> curvature.Outputs:
    """What the last layer of one network sees and says of ``(C, n, c, h, w)`` images, class c in row c."""
    weight, bias = (networks.parameters[f"classifier.{kind}"][0].detach() for kind in ("weight", "bias"))
    h = networks.detached().embed(images.flatten(0, 1).unsqueeze(0))[0].unflatten(0, images.shape[:2])
    labels = torch.arange(len(images), device=images.device)
    return curvature.Outputs(F.pad(h, (1, 0), value=1.0), F.linear(h, weight, bias), labels)


LCMAT_S = {name: LCMatS(proxy=proxy) for name, proxy in SMALL_PROXIES.items()} | {
    "paper": LCMatS(),
    "paper-resnet18": LCMatS(proxy=Proxy(network="resnet18-batch")),  # the published network
    "paper-defaults": LCMatS(
        proxy=Proxy(epochs=40, batch=256), eps=0.05
    ),  # the code's, which its scripts override
}
# rho is ours. One image per class has no gradient variance: the diagonal form, with a weight that makes both terms alike.
_RHO = {
    "digits": {"curvature": "diag", "rho": 10.0, "outer": 40},
    "photos16": {"curvature": "diag", "rho": 1.0},
    "photos32": {"curvature": "diag", "rho": 1.0},
}
LCMAT_C = {name: LCMatC(**vars(preset) | _RHO.get(name, {})) for name, preset in dsa.PRESETS.items()}
