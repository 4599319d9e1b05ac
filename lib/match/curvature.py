r"""Curvature matching at the last layer: how far the loss curvatures of S and T are apart, class by class.

For $z=Wh+b$, $p=\mathrm{softmax}(z)$, $e=p-y$ and $\tilde h=[1;h]$ a sample's gradient is $e\,\tilde h^\top$ and its Hessian
$(\mathrm{diag}(p)-pp^\top)\otimes\tilde h\tilde h^\top$. Everything carries a leading class axis; of a class's n samples only
:class:`Outputs` are kept, and all gaps are differentiable in those of S with first derivatives of the network alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match.gradient import OutputGap, embed
from lib.nets.ensemble import Ensemble
from lib.system.errors import CompanionError, unknown, whole


@dataclass(frozen=True)
class Outputs:
    r"""What the last layer saw and said, class by class.

    Args:
        inputs: $\tilde h$, ``(C, n, 1 + d)``.
        logits: ``(C, n, K)``; labels: ``(C,)``, the class of all samples of a row.
    """

    inputs: Tensor
    logits: Tensor
    labels: Tensor

    @cached_property
    def p(self) -> Tensor:
        return self.logits.softmax(2)

    @cached_property
    def errors(self) -> Tensor:
        return self.p - F.one_hot(self.labels, self.logits.shape[2])[:, None]

    def mean(self, left: Tensor, right: Tensor) -> Tensor:
        r"""$\frac1n\sum_i a_ib_i^\top$, ``(C, K, 1 + d)``."""
        return left.transpose(1, 2) @ right / left.shape[1]

    def gradient_variance(self) -> Tensor:
        """Population variance of every gradient coordinate over the samples, ``(C, K, 1 + d)``: two products of matrices."""
        return (
            self.mean(self.errors.square(), self.inputs.square())
            - self.mean(self.errors, self.inputs).square()
        )

    def diagonal_hessian(self) -> Tensor:
        r"""Mean of $q\otimes\tilde h^{\odot2}$, $q=p\odot(1-p)$: the exact diagonal, ``(C, K, 1 + d)``."""
        return self.mean(self.p * (1 - self.p), self.inputs.square())

    def hessian_product(self, v: Tensor) -> Tensor:
        r"""Hv for one v ``(C, K, 1 + d)`` per class: the mean of $(p\odot u-p\,p^\top u)\,\tilde h^\top$ with $u=V\tilde h$."""
        u = self.inputs @ v.transpose(1, 2)
        return self.mean(self.p * u - self.p * (self.p * u).sum(2, keepdim=True), self.inputs)

    def curvature_along(self, v: Tensor) -> Tensor:
        r"""$v^\top Hv$, ``(C,)``: the mean over samples of the variance of $u$ under p."""
        u = self.inputs @ v.transpose(1, 2)
        return ((self.p * u.square()).sum(2) - (self.p * u).sum(2).square()).mean(1)


def gradient_variance(real: Outputs, syn: Outputs) -> Tensor:
    r"""$\lVert\mathrm{Var}_T(g)-\mathrm{Var}_S(g)\rVert_2$, ``(C,)``. A single synthetic sample has variance 0: no gradient."""
    return (real.gradient_variance() - syn.gradient_variance()).flatten(1).norm(dim=1)


def diagonal(real: Outputs, syn: Outputs) -> Tensor:
    r"""$\lVert\bar\lambda_T-\bar\lambda_S\rVert_1$ of the diagonal Hessians, ``(C,)``."""
    return (real.diagonal_hessian() - syn.diagonal_hessian()).abs().flatten(1).sum(1)


def top_eigenvalue(real: Outputs, syn: Outputs, start: Tensor, steps: int = 10) -> Tensor:
    r"""$|v^\top H_Tv-v^\top H_Sv|$, ``(C,)``, at the unit v that ``steps`` power iterations on $H_T-H_S$ give; v is constant."""
    fixed, v = Outputs(syn.inputs.detach(), syn.logits.detach(), syn.labels), _unit(start)
    for _ in range(steps):
        v = _unit(real.hessian_product(v) - fixed.hessian_product(v))
    return (real.curvature_along(v) - syn.curvature_along(v)).abs()


def _unit(v: Tensor) -> Tensor:
    return F.normalize(v.flatten(1), dim=1).view_as(v)


def outputs(networks: Ensemble, images: Tensor) -> Outputs:
    """What the last layer of one network sees and says of ``(C, n, c, h, w)`` images, class c in row c."""
    weight, bias = (networks.parameters[f"classifier.{kind}"][0].detach() for kind in ("weight", "bias"))
    h = embed(networks, images)
    labels = torch.arange(len(images), device=images.device)
    return Outputs(F.pad(h, (1, 0), value=1.0), F.linear(h, weight, bias), labels)


KINDS = ("gradvar", "diag", "eig")


@dataclass(frozen=True)
class CurvatureGap(OutputGap):
    r"""$\tfrac\rho2\,\mathcal C(T_c,S_c)$ of the last layer: LCMat-C's term beside a distance of gradients.

    Attributes:
        rho: radius of the ball, at least 0; kind: the form of $\mathcal C$: ``gradvar``, which is constant for one image per
            class, ``diag`` or ``eig``; power_steps: of eig, power iterations from a random start.
    """

    rho: float = 0.1
    kind: str = "gradvar"
    power_steps: int = 10

    name: ClassVar[str] = "curvature"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("curvature", self.kind, KINDS)
        if not self.rho >= 0:
            raise CompanionError(f"rho {self.rho!r} is not allowed: a radius is at least 0")
        whole(self, power_steps=1)

    def see(self, networks: Ensemble, images: Tensor) -> Outputs:
        return outputs(networks, images)

    def between(self, real: Outputs, syn: Outputs, generator: torch.Generator | None = None) -> Tensor:
        return self.rho / 2 * self.curvature(real, syn, generator)

    def curvature(self, real: Outputs, syn: Outputs, generator: torch.Generator | None = None) -> Tensor:
        r"""$\mathcal C(T_c,S_c)$, ``(C,)``."""
        if self.kind == "gradvar":
            return gradient_variance(real, syn)
        if self.kind == "diag":
            return diagonal(real, syn)
        shape = (len(syn.labels), syn.logits.shape[2], syn.inputs.shape[2])
        start = torch.randn(shape, generator=generator, device=syn.inputs.device).to(syn.inputs)
        return top_eigenvalue(real, syn, start, self.power_steps)
