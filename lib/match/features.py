r"""Feature matching: distances between the embedded class batches of S and T.

Embeddings are ``(C, n, d)`` for the real and ``(C, m, d)`` for the synthetic images; distances are ``(C,)``, one per class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.system.errors import CompanionError


def class_mean(real: Tensor, syn: Tensor) -> Tensor:
    r"""$\lVert \frac1n\sum_i e^T_{c,i} - \frac1m\sum_j e^S_{c,j}\rVert_2^2$, summed over features (DM, arXiv 2110.04181).

    This is the squared MMD with a linear kernel (biased form).
    """
    return (real.mean(1) - syn.mean(1)).square().sum(-1)


def layer_means(real: Sequence[Tensor], syn: Sequence[Tensor]) -> Tensor:
    r"""$A_{l,c}$: :func:`class_mean` of every layer's maps, unweighted, ``(L, C)`` (CAFE, arXiv 2203.01531, section 3.1).

    Maps are ``(C, n, ...)`` and ``(C, m, ...)``; the distance is summed over channels and positions.
    """
    return torch.stack([class_mean(r.flatten(2), s.flatten(2)) for r, s in zip(real, syn, strict=True)])


def discrimination_logits(real: Tensor, syn: Tensor) -> Tensor:
    r"""$o_{c,i,k} = \langle e^T_{c,i},\, \bar e^S_k\rangle$, ``(C, n, C)``: the synthetic class means as a linear classifier."""
    return torch.einsum("cnd,kd->cnk", real, syn.mean(1))


def discrimination(real: Tensor, syn: Tensor) -> Tensor:
    r"""$\sum_i -\log\mathrm{softmax}(o_{c,i})_c$ over the real images of each class, ``(C,)`` (CAFE, section 3.2).

    A *sum* over images as in the released code; the paper writes the mean over all ``C n`` images.
    """
    return -discrimination_logits(real, syn).log_softmax(-1).diagonal(dim1=0, dim2=2).sum(0)


def cafe(real: Sequence[Tensor], syn: Sequence[Tensor], weights: Sequence[float], beta: float) -> Tensor:
    r"""$\sum_l w_l A_{l,c} + A_{\mathrm{embed},c} + \beta\,\mathcal L_{d,c}$, ``(C,)`` (CAFE, equation 6).

    The flattened last map is the embedding, so the last layer counts $w_L + 1$ times.

    Args:
        real, syn: maps per layer, ``(C, n, ...)`` and ``(C, m, ...)``.
        weights: one per layer; released: 0.1, 0.1, 1, 1 for ReLU 1, 2, 3 and the last pooling.
        beta: weight of the summed discrimination loss; released: 0.01.
    """
    if len(weights) != len(real):
        raise CompanionError(f"{len(weights)} layer weights for {len(real)} layers: allowed is one per layer")
    per_layer = layer_means(real, syn)
    aligned = sum(weight * distance for weight, distance in zip(weights, per_layer, strict=True))
    return aligned + per_layer[-1] + beta * discrimination(real[-1].flatten(2), syn[-1].flatten(2))


def class_aware(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each class's synthetic images, ``(C, m, K)`` and labels ``(C, m)`` or ``(C, 1)`` -> ``(C,)``."""
    labels = labels.expand(logits.shape[:2]).unsqueeze(-1)
    return -logits.log_softmax(-1).gather(-1, labels).squeeze(-1).mean(1)


def idm(
    real: Tensor,
    syn: Tensor,
    logits: Tensor,
    labels: Tensor,
    accuracy: float | Tensor,
    ce_weight: float = 0.5,
) -> Tensor:
    r"""$\lVert\bar e^T_c - \bar e^S_c\rVert^2 + \lambda\,a_\theta\,\overline{\mathrm{CE}}_c$, ``(C,)`` (IDM, arXiv 2307.09742).

    Args:
        logits, labels: the sampled network's outputs for the decoded images, ``(C, m, K)``, and their labels ``(C, m)``.
        accuracy: $a_\theta$, training accuracy of that network in **percent** (0 to 100), 0 if it was never trained.
        ce_weight: $\lambda$, 0.1 to 3 in the official commands: at full accuracy 0.5 weighs the cross-entropy 50 times.
    """
    return class_mean(real, syn) + ce_weight * accuracy * class_aware(logits, labels)
