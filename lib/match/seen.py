r"""How differently one network sees two batches: DiM's three distances (arXiv 2303.04707), of logits, of features, of gradients.

$$L_{logit}=\operatorname{mean}_{b,k}\big(\log\operatorname{softmax}\phi(x_b)_k-\log\operatorname{softmax}\phi(\hat x_b)_k\big)^2,\qquad
L_{feat}=\sum_l d\big(\operatorname{mean}_bF_l(x),\operatorname{mean}_bF_l(\hat x)\big),\qquad L_{grad}=\sum_l d(g_l,\hat g_l)$$

Logits are compared image by image, so the batches have the same labels; d is one of :data:`GAPS`, and gradients are those of
convolutions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor


def cosine_rows(a: Tensor, b: Tensor) -> Tensor:
    """One minus cosine, summed over the first axis."""
    a, b = a.flatten(1), b.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()


GAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda a, b: (a - b).abs().sum(),
    "mse": lambda a, b: (a - b).square().sum(),
    "l1_mean": lambda a, b: (a - b).abs().flatten(1).mean(1).sum(),
    "cos": cosine_rows,
}


def logit_gap(real: Tensor, fake: Tensor) -> Tensor:
    """$L_{logit}$ of logits ``(n, C)``, the same labels row by row."""
    return (F.log_softmax(real, 1) - F.log_softmax(fake, 1)).square().mean()


def feature_gap(real: Iterable[Tensor], fake: Iterable[Tensor], gap: str = "l1") -> Tensor:
    """$L_{feat}$ of maps ``(n, c, h, w)``, layer by layer; the batches may differ in size."""
    return sum(GAPS[gap](a.mean(0), b.mean(0)) for a, b in zip(real, fake, strict=True))


def gradient_gap(real: Iterable[Tensor], fake: Iterable[Tensor], gap: str = "l1") -> Tensor:
    """$L_{grad}$ of gradients of all weights: those with four axes count."""
    return sum(GAPS[gap](a, b) for a, b in zip(real, fake, strict=True) if a.dim() == 4)
