r"""Gradient matching: per-class parameter gradients of S and T, and the distance between them (DC, arXiv 2006.05929, eq. 9-10).

$$\sum_c D\big(\nabla_\theta \ell(\mathcal S_c;\theta),\ \nabla_\theta \ell(\mathcal T_c;\theta)\big),
\qquad
D(A,B)=\sum_{\text{layers}}\sum_{\text{rows } r}
\Big(1-\frac{\langle A_r,B_r\rangle}{\lVert A_r\rVert\,\lVert B_r\rVert+10^{-6}}\Big).$$

D is a value: :class:`RowCosine` above, :class:`SquaredError` and :class:`Cosine` (the paper's ablations), :class:`LayerSum` (IDC).
Each is a :class:`Gap`, which gives the losses of all classes and their gradient with respect to the synthetic images. Gaps add up,
``RowCosine() + CurvatureGap(1.0)``: losses and gradients are added, and the history shows every term. Others stand beside their
mathematics, in ``contrastive`` and ``curvature``.

Parameter gradients carry a leading class axis: they are lists of ``(C, *parameter shape)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.match.features import class_mean
from lib.nets.ensemble import Ensemble, apply
from lib.system.errors import CompanionError, choose

EPS = 1e-6  # of the published code, added to the product of the norms
# on a CPU, classes share one call while the input-size maps of one class stay below this
GROUPED_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Gap(ABC):
    """The base of all: how far S is from T at one network, class by class."""

    name: ClassVar[str] = "gradients"  # of its term in the history

    @property
    def names(self) -> tuple[str, ...]:
        """The terms of :meth:`match`."""
        return (self.name,)

    @abstractmethod
    def match(
        self,
        networks: Ensemble,
        real: Tensor,
        syn: Tensor,
        generator: torch.Generator | None = None,
        mixed: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of every class and the gradient of their sum with respect to the synthetic images.

        Args:
            networks: one network, as it is to be used (in eval mode where its statistics are to rest).
            real: ``(C, B, c, h, w)``; syn: ``(C, M, c, h, w)``, class c in row c (augmented already where the method augments).
            generator: for gaps that draw random numbers.
            mixed: compute what is only a target in bfloat16.
        Returns:
            term -> ``(C,)``, without graph, and the gradient, shaped as ``syn``.
        """

    def __add__(self, other: Gap) -> Total:
        return Total((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class Total(Gap):
    """A sum of gaps.

    Attributes:
        parts: the gaps.
    """

    parts: tuple[Gap, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.names))

    def match(
        self,
        networks: Ensemble,
        real: Tensor,
        syn: Tensor,
        generator: torch.Generator | None = None,
        mixed: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        terms: dict[str, Tensor] = {}
        total = torch.zeros_like(syn)
        for part in self.parts:
            found, gradient = part.match(networks, real, syn, generator, mixed)
            terms |= {name: terms[name] + value if name in terms else value for name, value in found.items()}
            total = total + gradient
        return terms, total


def _parts(gap: Gap) -> tuple[Gap, ...]:
    return gap.parts if isinstance(gap, Total) else (gap,)


# -- between the gradients of every class ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientGap(Gap):
    """The base of distances between the parameter gradients of every class."""

    @abstractmethod
    def between(self, syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
        """The distance of two lists of gradients, ``(C,)``."""

    def match(
        self,
        networks: Ensemble,
        real: Tensor,
        syn: Tensor,
        generator: torch.Generator | None = None,
        mixed: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        template, tensors = networks.template, networks.parameters | networks.buffers
        labels = torch.arange(len(real), device=real.device)
        pixels = syn.detach().requires_grad_()
        size = _classes_per_call(template, real)
        losses, gradients = [], []
        for part in range(0, len(real), size):
            of = slice(part, part + size)
            with torch.autocast(real.device.type, torch.bfloat16, enabled=mixed):
                target = class_gradients(template, tensors, real[of], labels[of])
            current = class_gradients(template, tensors, pixels[of], labels[of], create_graph=True)
            loss = self.between(current, target)
            gradients.append(torch.autograd.grad(loss.sum(), pixels)[0][of])
            losses.append(loss.detach())
        return {self.name: torch.cat(losses)}, torch.cat(gradients)


@dataclass(frozen=True)
class RowCosine(GradientGap):
    """DC's distance: one minus cosine, summed over rows (output channels) and layers.

    Vectors (biases, affine norm weights) are dropped. A row that is zero on either side costs exactly 1.
    """

    def between(self, syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
        total = syn[0].new_zeros(len(syn[0]))
        for a, b in zip(syn, real, strict=True):
            if a.dim() > 2:
                a, b = (x.flatten(2) if x.dim() > 3 else x for x in (a, b))  # (C, rows, entries)
                cosine = (a * b).sum(-1) / (
                    torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1) + EPS
                )
                total = total + (1 - cosine).sum(-1)
        return total


@dataclass(frozen=True)
class SquaredError(GradientGap):
    """DC's ablation "mse": squared norm of the difference of all parameters as one vector."""

    def between(self, syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
        return (_vector(syn) - _vector(real)).square().sum(-1)


@dataclass(frozen=True)
class Cosine(GradientGap):
    """DC's ablation "cos": one minus the cosine of all parameters as one vector."""

    def between(self, syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
        a, b = _vector(syn), _vector(real)
        return 1 - (a * b).sum(-1) / (
            torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1) + EPS
        )


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


@dataclass(frozen=True)
class LayerSum(GradientGap):
    """IDC's distances (arXiv 2205.14959): plain sums over the parameters that count, not divided by their number.

    Attributes:
        metric: of :data:`METRICS`, between rows (output channels; every entry of a vector is a row of its own).
        parts: ``conv``: convolution weights alone (the published choice); ``weights``: all but vectors; ``all``.
    Raises:
        CompanionError: the network has no such parameter, as an MLP has no convolution.
    """

    metric: str = "mse"
    parts: str = "conv"

    def __post_init__(self):
        choose("metric of gradients", self.metric, METRICS)
        choose("parts of a gradient", self.parts, LOWEST)

    def between(self, syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
        counted = [pair for pair in zip(syn, real, strict=True) if pair[0].dim() > LOWEST[self.parts]]
        if not counted:
            raise CompanionError(
                f"LayerSum(parts={self.parts!r}) compares convolutions, and this network has none: "
                "allowed parts are 'weights' and 'all'"
            )
        total = syn[0].new_zeros(len(syn[0]))
        for pair in counted:
            rows = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2) for x in pair)  # (C, rows, entries)
            total = total + METRICS[self.metric](*rows)
        return total


LOWEST = {"conv": 4, "weights": 2, "all": 1}  # dimensions, that of the classes included, are more than this
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda a, b: (a - b).square().sum((1, 2)),
    "l1": lambda a, b: (a - b).abs().sum((1, 2)),
    "l1_mean": lambda a, b: (a - b).abs().mean(2).sum(1),
    "cos": lambda a, b: RowCosine().between([a], [b]),
}


# -- between what the network shows of the images ---------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputGap(Gap):
    """The base of distances between what the network shows of S and of T: no second derivatives, a target without graph."""

    @abstractmethod
    def see(self, networks: Ensemble, images: Tensor) -> Any:
        """What is compared of images ``(C, n, c, h, w)``."""

    @abstractmethod
    def between(self, real: Any, syn: Any, generator: torch.Generator | None = None) -> Tensor:
        """The weighted distance of two such sights, ``(C,)``."""

    def match(
        self,
        networks: Ensemble,
        real: Tensor,
        syn: Tensor,
        generator: torch.Generator | None = None,
        mixed: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        pixels = syn.detach().requires_grad_()
        with torch.no_grad():
            target = self.see(networks, real)
        losses = self.between(target, self.see(networks, pixels), generator)
        return {self.name: losses.detach()}, torch.autograd.grad(losses.sum(), pixels)[0]


@dataclass(frozen=True)
class FeatureMean(OutputGap):
    r"""$w\,\lVert\bar\phi(\mathcal T_c)-\bar\phi(\mathcal S_c)\rVert_2^2$ of the embeddings: the term of DREAM+ (arXiv 2310.15052).

    Attributes:
        weight: w, 0 or more.
    """

    weight: float = 1.0

    name: ClassVar[str] = "features"

    def __post_init__(self):
        if not self.weight >= 0:
            raise CompanionError(f"weight {self.weight!r} of FeatureMean is not allowed: at least 0")

    def see(self, networks: Ensemble, images: Tensor) -> Tensor:
        return embed(networks, images)

    def between(self, real: Tensor, syn: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.weight * class_mean(real, syn)


def embed(networks: Ensemble, images: Tensor) -> Tensor:
    """Embeddings ``(C, n, d)`` of ``(C, n, c, h, w)`` images in one network, to whose weights no gradient flows."""
    return networks.detached().embed(images.flatten(0, 1).unsqueeze(0))[0].unflatten(0, images.shape[:2])


# -- the gradients --------------------------------------------------------------------------------------------------------


def class_gradients(
    template: nn.Module,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    create_graph: bool = False,
    total: int | None = None,
) -> list[Tensor]:
    """Gradient of the mean cross-entropy of every class's own batch, in one backward pass.

    One copy of the weights per class makes the classes independent, so the gradient of the *sum* of the losses with respect to
    copy c is class c's gradient alone.

    Args:
        template, tensors: architecture, and its parameters and buffers stacked as ``(1, ...)``.
        x: ``(C, n, c, h, w)``; labels: ``(C,)``, the class of each batch, or ``(C, n)``, that of each image.
        create_graph: keep the graph, to differentiate the result with respect to ``x``.
        total: divide the summed loss of a batch by this instead of n (it is a part of so many images).
    Returns:
        ``(C, ...)`` per parameter, in parameter order; zero where a parameter has no effect.
    """
    classes, n = x.shape[:2]
    names = [name for name, _ in template.named_parameters()]
    copies = {name: tensor.detach().expand(classes, *tensor.shape[1:]) for name, tensor in tensors.items()}
    copies |= {name: copies[name].clone().requires_grad_() for name in names}
    logits = apply(template, copies, x)  # (C, n, classes)
    target = (labels if labels.dim() == 2 else labels[:, None]).expand(classes, n).flatten()
    # the sum over classes of batch means
    loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="sum") / (total or n)
    return list(
        torch.autograd.grad(
            loss, [copies[name] for name in names], create_graph=create_graph, materialize_grads=True
        )
    )


def _classes_per_call(template: nn.Module, real: Tensor) -> int:
    """All classes in one call where call overhead rules (small maps, or a GPU), one by one where arithmetic does."""
    width = getattr(template, "width", 64)
    map_bytes = real[0, :, 0].numel() * width * 4
    return len(real) if real.is_cuda or map_bytes <= GROUPED_BYTES else 1
