r"""Contrastive gradient matching: one gradient for all classes together (DCC, arXiv 2202.02916).

$$D\Big(\nabla_\theta\,\ell\big(\textstyle\bigcup_c\mathcal S_c\big),\
\tfrac1C\sum_c\nabla_\theta\,\ell(\mathcal T_c)\Big)$$

What all classes share cancels in the sum, what tells them apart remains. Gradients are lists of ``(1, *parameter shape)``, so
that any distance D of ``lib.match.gradient`` takes them as those of a single class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.match.gradient import Gap, GradientGap, RowCosine, class_gradients
from lib.nets.ensemble import Ensemble
from lib.nets.training import rows_at_once
from lib.system.errors import whole


def union_gradient(
    template: nn.Module,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    labels: Tensor,
    create_graph: bool = False,
    total: int | None = None,
) -> list[Tensor]:
    """Gradient of the mean cross-entropy of images of any classes.

    With equally many images of every class this is the mean of the class gradients, provided that the network treats each
    image by itself (no batch norm in training mode).

    Args:
        tensors: parameters and buffers of one network, stacked as ``(1, ...)``.
        x: ``(n, c, h, w)``; labels: ``(n,)``.
        total: divide the summed loss by this instead of n (x is a part of so many images).
    Returns:
        ``(1, ...)`` per parameter, in parameter order; zero where a parameter has no effect.
    """
    return class_gradients(template, tensors, x[None], labels[None], create_graph, total)


@dataclass(frozen=True)
class Contrastive(Gap):
    r"""D of the two mean gradients. There is one distance for all classes: the loss of each is its C-th part.

    Attributes:
        distance: D.
        rows: at most so many synthetic images in a second-order pass; None: all. D is not linear in the sum, so parts are put
            together by the chain rule: first $\bar g=\sum_j g_j$ without a graph, then $v=\partial D/\partial\bar g$, then
            $\nabla_X\langle g_j(X),v\rangle$ part by part. The result is the same, the memory that of one part.
    """

    distance: GradientGap = RowCosine()
    rows: int | None = None

    def __post_init__(self):
        if self.rows is not None:
            whole(self, rows=1)

    def match(
        self,
        networks: Ensemble,
        real: Tensor,
        syn: Tensor,
        generator: torch.Generator | None = None,
        mixed: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        template, tensors = networks.template, networks.parameters | networks.buffers
        classes = torch.arange(len(real), device=real.device)
        with torch.autocast(real.device.type, torch.bfloat16, enabled=mixed):
            target = _in_parts(template, tensors, real, classes, rows_at_once(template, real[0]))
        if self.rows is None or self.rows >= len(syn) * syn.shape[1]:
            loss, gradient = self._whole(template, tensors, target, syn, classes)
        else:
            loss, gradient = self._in_rows(template, tensors, target, syn, classes)
        return {self.name: loss.expand(len(real)) / len(real)}, gradient.view(syn.shape)

    def _whole(
        self, template: nn.Module, tensors: Mapping[str, Tensor], target, syn: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """D and its gradient by one pass with all images."""
        pixels = syn.detach().flatten(0, 1).requires_grad_()
        labels = classes.repeat_interleave(syn.shape[1])
        current = union_gradient(template, tensors, pixels, labels, create_graph=True)
        loss = self.distance.between(current, target).sum()
        return loss.detach(), torch.autograd.grad(loss, pixels)[0]

    def _in_rows(
        self, template: nn.Module, tensors: Mapping[str, Tensor], target, syn: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same, ``rows`` images at a time."""
        pixels, labels = syn.detach().flatten(0, 1), classes.repeat_interleave(syn.shape[1])
        current = [g.requires_grad_() for g in _in_parts(template, tensors, syn.detach(), classes, self.rows)]
        loss = self.distance.between(current, target).sum()
        direction = torch.autograd.grad(loss, current, materialize_grads=True)
        gradients = []
        for part, own in zip(pixels.split(self.rows), labels.split(self.rows), strict=True):
            part = part.clone().requires_grad_()
            gradient = union_gradient(template, tensors, part, own, create_graph=True, total=len(pixels))
            along = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True))
            gradients.append(torch.autograd.grad(along, part)[0])
        return loss.detach(), torch.cat(gradients)


def _in_parts(
    template: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, labels: Tensor, rows: int
) -> list[Tensor]:
    """:func:`union_gradient` of ``(C, n, c, h, w)`` images, ``rows`` at a time."""
    images, repeated = x.flatten(0, 1), labels.repeat_interleave(x.shape[1])
    total: list[Tensor] = []
    for part, own in zip(images.split(rows), repeated.split(rows), strict=True):
        found = union_gradient(template, tensors, part, own, total=len(images))
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total
