r"""Feature matching: distances between the embedded class batches of S and T.

Embeddings are ``(C, n, d)`` for the real and ``(C, m, d)`` for the synthetic images; distances are ``(C,)``, one per class.
"""

from __future__ import annotations

from torch import Tensor


def class_mean(real: Tensor, syn: Tensor) -> Tensor:
    r"""$\lVert \frac1n\sum_i e^T_{c,i} - \frac1m\sum_j e^S_{c,j}\rVert_2^2$, summed over features (DM, arXiv 2110.04181).

    This is the squared MMD with a linear kernel (biased form).
    """
    return (real.mean(1) - syn.mean(1)).square().sum(-1)
