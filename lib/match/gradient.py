r"""Gradient matching: per-class parameter gradients of S and T, and the distance between them (DC, arXiv 2006.05929, eq. 9-10).

$$\sum_c D\big(\nabla_\theta \ell(\mathcal S_c;\theta),\ \nabla_\theta \ell(\mathcal T_c;\theta)\big),
\qquad
D(A,B)=\sum_{\text{layers}}\sum_{\text{rows } r}
\Big(1-\frac{\langle A_r,B_r\rangle}{\lVert A_r\rVert\,\lVert B_r\rVert+10^{-6}}\Big).$$

Gradients carry a leading class axis: a gradient is a list of ``(C, *parameter shape)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.ensemble import apply
from lib.system.errors import CompanionError

EPS = 1e-6  # of the published code, added to the product of the norms
GROUPED_BYTES = (
    4 * 2**20
)  # on a CPU, classes share one call while the input-size maps of one class stay below this


def rowwise_cosine(syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """DC's distance, ``(C,)``: one minus cosine, summed over rows (output channels) and layers.

    Vectors (biases, affine norm weights) are dropped. A row that is zero on either side costs exactly 1.
    """
    total = syn[0].new_zeros(len(syn[0]))
    for a, b in zip(syn, real, strict=True):
        if a.dim() > 2:
            a, b = (
                a.flatten(2) if a.dim() > 3 else a,
                b.flatten(2) if b.dim() > 3 else b,
            )  # (C, rows, entries)
            cosine = (a * b).sum(-1) / (
                torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1) + EPS
            )
            total = total + (1 - cosine).sum(-1)
    return total


def squared_error(syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Ablation ``mse``: squared norm of the difference of all parameters as one vector, ``(C,)``."""
    return (_vector(syn) - _vector(real)).square().sum(-1)


def cosine(syn: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Ablation ``cos``: one minus the cosine of all parameters as one vector, ``(C,)``."""
    a, b = _vector(syn), _vector(real)
    return 1 - (a * b).sum(-1) / (
        torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1) + EPS
    )


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


def layer_sum(
    syn: Sequence[Tensor], real: Sequence[Tensor], metric: str = "mse", parts: str = "conv"
) -> Tensor:
    """IDC's distances (arXiv 2205.14959), ``(C,)``: plain sums over the parameters that count, not divided by their number.

    Args:
        metric: of :data:`METRICS`, between rows (output channels; every entry of a vector is a row of its own).
        parts: ``conv``: convolution weights alone (the published choice); ``weights``: all but vectors; ``all``.
    Raises:
        CompanionError: the network has no such parameter, as an MLP has no convolution.
    """
    counted = [pair for pair in zip(syn, real, strict=True) if pair[0].dim() > LOWEST[parts]]
    if not counted:
        raise CompanionError(
            f"distance '{parts}-{metric}' compares convolutions, and this network has none: allowed for it are "
            f"'weights-{metric}' and 'all-{metric}'"
        )
    total = syn[0].new_zeros(len(syn[0]))
    for pair in counted:
        rows = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2) for x in pair)  # (C, rows, entries)
        total = total + METRICS[metric](*rows)
    return total


LOWEST = {"conv": 4, "weights": 2, "all": 1}  # dimensions, that of the classes included, are more than this
METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda a, b: (a - b).square().sum((1, 2)),
    "l1": lambda a, b: (a - b).abs().sum((1, 2)),
    "l1_mean": lambda a, b: (a - b).abs().mean(2).sum(1),
    "cos": lambda a, b: rowwise_cosine([a], [b]),
}

DISTANCES: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "ours": rowwise_cosine,
    "mse": squared_error,
    "cos": cosine,
} | {
    f"{parts}-{metric}": partial(layer_sum, metric=metric, parts=parts)
    for parts in LOWEST
    for metric in METRICS
}


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


def matching_step(
    template: nn.Module,
    tensors: Mapping[str, Tensor],
    real: Tensor,
    syn: Tensor,
    labels: Tensor,
    distance: str = "ours",
    mixed: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The distance of every class and its gradient with respect to the synthetic images.

    Args:
        real: ``(C, B, c, h, w)``; syn: ``(C, M, c, h, w)`` (augmented already where the method augments).
        mixed: compute the real gradients, which are only a target, in bfloat16.
    Returns:
        $D_c$, ``(C,)``, and $\partial \sum_c D_c / \partial$ ``syn``, shaped as ``syn``.
    """
    pixels = syn.detach().requires_grad_()
    size = _classes_per_call(template, real)
    losses, gradients = [], []
    for part in range(0, len(real), size):
        of = slice(part, part + size)
        with torch.autocast(real.device.type, torch.bfloat16, enabled=mixed):
            target = class_gradients(template, tensors, real[of], labels[of])
        current = class_gradients(template, tensors, pixels[of], labels[of], create_graph=True)
        loss = DISTANCES[distance](current, target)
        gradients.append(torch.autograd.grad(loss.sum(), pixels)[0][of])
        losses.append(loss.detach())
    return torch.cat(losses), torch.cat(gradients)


def _classes_per_call(template: nn.Module, real: Tensor) -> int:
    """All classes in one call where call overhead rules (small maps, or a GPU), one by one where arithmetic does."""
    width = getattr(template, "width", 64)
    map_bytes = real[0, :, 0].numel() * width * 4
    return len(real) if real.is_cuda or map_bytes <= GROUPED_BYTES else 1
