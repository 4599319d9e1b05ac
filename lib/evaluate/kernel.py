r"""Accuracy without a network: the kernel ridge regression that stands on a distilled set.

$$\hat Y_t = K_{ts}\,(K_{ss} + r I)^{-1}\, Y_s,\qquad r = \lambda\,\mathrm{tr}(K_{ss})/m\ \text{("scaled") or}\ \lambda .$$

Sets of KIP, RFAD, FRePo and KRR are made for such a predictor, and their labels for squared error: real numbers that may be
negative. What a network makes of them is another question (:func:`lib.evaluate.evaluate`, with hard labels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib.evaluate.networks import accuracy
from lib.kernels import ridge

Kernel = Callable[[Tensor, Tensor], Tensor]  # inputs (n1, ...), (n2, ...) -> (n1, n2)


@torch.no_grad()
def kernel_accuracy(
    kernel: Kernel,
    support: Tensor,
    targets: Tensor,
    test,
    lam: float = 1e-6,
    scaled: bool = True,
    chunk: int = 1024,
) -> float:
    """Test accuracy in [0, 1] of the ridge regression on ``support``; class-balanced as in :func:`lib.evaluate.evaluate`.

    Args:
        kernel: K(x1, x2) of two batches of images; the support's own kernel is K(support, support).
        support: images (m, c, h, w); the test images are taken in their type, 32 or 64 bits.
        targets: labels (m, C) of the regression: one-hot, centred one-hot or learned.
        test: an ``ImageSet``; lam, scaled: the ridge; chunk: test images per kernel block.
    Raises:
        CompanionError: a kernel that is not finite, or not positive definite with that ridge.
    """
    weights = ridge.solve(ridge.regularised(kernel(support, support), lam, scaled), targets.to(support))
    return predictor_accuracy(lambda x: kernel(x, support) @ weights, test, support.dtype, chunk)


@torch.no_grad()
def predictor_accuracy(
    predict: Callable[[Tensor], Tensor], test, dtype: torch.dtype = torch.float64, chunk: int = 1024
) -> float:
    """Test accuracy in [0, 1] of any function from images (n, c, h, w) to scores (n, C)."""
    scores = torch.cat([predict(images.to(dtype)) for images in test.images.split(chunk)])
    return float(accuracy(scores[None], test))
