r"""Two renderings of every base in the eyes of an extractor: what HaBa's sides play for (arXiv 2210.16774).

Embeddings ``(n, d)`` each, row i of both of the same base. The hallucinators lower :func:`alike`, the extractor lowers one minus it,
and :func:`supcon`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.system.tensors import guard


def alike(e0: Tensor, e1: Tensor) -> Tensor:
    r"""$\mathrm{mean}_i\,\tfrac12\big(1+\cos(e^0_i,e^1_i)\big)$, in [0, 1]."""
    return (1 + F.cosine_similarity(e0, e1, dim=1)).mean() / 2


def supcon(e0: Tensor, e1: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    r"""Supervised contrastive loss of both views as anchors.

    $$\operatorname{mean}_a\ -\tfrac1{|P(a)|}\sum_{p\in P(a)}\log\frac{e^{s_{ap}/T}}{\sum_{q\ne a}e^{s_{aq}/T}}$$

    with cosines s and P(a) the other rows of the class of a, among them its other view.
    """
    e = F.normalize(torch.cat([e0, e1]), dim=1)
    y, itself = torch.cat([labels, labels]), torch.eye(len(e), dtype=torch.bool, device=e.device)
    positive = (y[:, None] == y) & ~itself
    share = (e @ e.T / temperature).masked_fill(itself, float("-inf")).log_softmax(1)
    return -(share.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


guard(globals())
