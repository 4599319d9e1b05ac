"""Exact kernels of infinitely wide fully-connected ReLU networks (Jacot et al. 2018; recursion of KIP's library).

For every pair of inputs the recursion carries the NNGP value K, the NTK value Theta and the two own variances q, q':

    input       K = <x, x'> / d,  Theta = 0
    Dense       K <- sw^2 K + sb^2,  Theta <- sw^2 Theta + K        (NTK parameterisation)
                                     Theta <- sw^2 Theta + N_in K_before + 1   (standard; the 1 only with biases)
    ReLU        K <- E[relu(u) relu(v)],  Theta <- Theta P(u > 0, v > 0)       for (u, v) ~ N(0, [[q, K], [K, q']])

with sw = sqrt(2) and sb = 0.1 in KIP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.errors import CompanionError

SIGMA_W = math.sqrt(2)
SIGMA_B = 0.1


class Kernels(NamedTuple):
    """NNGP and NTK of the same network between the same inputs, each (n1, n2)."""

    nngp: Tensor
    ntk: Tensor


class ArcCosine(torch.autograd.Function):
    """The ReLU step of the recursion with its closed-form derivative; see :func:`arc_cosine`."""

    @staticmethod
    def forward(ctx, k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
        product = q1 * q2
        root = torch.addcmul(product, k, k, value=-1)  # q q' - K^2
        # Rounding leaves +-1e-16 q q' where 0 is meant; 45 eps is the 1e-14 of 64-bit floats.
        root = root.masked_fill_(root <= 45 * torch.finfo(k.dtype).eps * product, 0).sqrt_()
        # pi - theta = atan2(root, -K), keeping its digits near theta = pi; for an all-zero input theta is a right angle.
        active = torch.atan2(root, -k).masked_fill_(product == 0, math.pi / 2).div_(2 * math.pi)
        ctx.save_for_backward(k, q1, q2, root, active)
        return torch.addcmul(root / (2 * math.pi), active, k), active

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k: Tensor, grad_active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, q1, q2, root, active = ctx.saved_tensors
        through_angle = (grad_active / root).masked_fill_(root == 0, 0).div_(2 * math.pi)
        to_k = torch.addcmul(through_angle, grad_k, active)
        to_q = grad_k.mul(root).div_(4 * math.pi).addcmul_(through_angle, k, value=-0.5)  # times 1 / q
        # The factor 1 / q is the same for everything that is summed into that q.
        sides = (to_q.sum_to_size(q.shape) * torch.where(q > 0, 1 / q, 0) for q in (q1, q2))
        return to_k.sum_to_size(k.shape), *sides


def arc_cosine(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(u) relu(v)] and P(u > 0, v > 0) for (u, v) ~ N(0, [[q1, k], [k, q2]]), of the broadcast shape (= k's).

    With theta the angle between the inputs: (sqrt(q1 q2 - k^2) + (pi - theta) k) / 2 pi and (pi - theta) / 2 pi. Where the
    radicand vanishes (coincident or opposite inputs) no gradient flows through theta; differentiable once.
    """
    return ArcCosine.apply(k, q1, q2)


def dense(k: Tensor, sigma_w: float, sigma_b: float) -> Tensor:
    """sw^2 k + sb^2 in one pass."""
    return torch.add(k.new_full((), sigma_b**2), k, alpha=sigma_w**2)


def fully_connected(
    x1: Tensor,
    x2: Tensor | None = None,
    depth: int = 1,
    sigma_w: float = SIGMA_W,
    sigma_b: float = SIGMA_B,
    width: int | None = None,
) -> Kernels:
    """Kernels of ``depth`` x (Dense, ReLU) + Dense between the rows of x1 (n1, d) and x2 (n2, d; default x1).

    ``width`` = None is the NTK parameterisation; a number the standard one with that many units in every hidden layer
    (which changes the NTK only). Images are flattened.
    """
    x1 = x1.flatten(1)
    x2 = x1 if x2 is None else x2.flatten(1)
    if depth < 0:
        raise CompanionError(f"depth {depth} of a fully-connected kernel; allowed: 0, 1, 2, ...")
    if x1.shape[1] != x2.shape[1]:
        raise CompanionError(
            f"kernel between inputs of {x1.shape[1]} and {x2.shape[1]} values; allowed: equal"
        )
    fan_in = d = x1.shape[1]
    k = torch.addmm(x1.new_zeros(()), x1, x2.T, beta=0, alpha=1 / d)
    q1, q2 = x1.square().sum(1)[:, None] / d, x2.square().sum(1)[None] / d
    ntk = None
    for layer in range(depth + 1):
        before, k, q1, q2 = k, *(dense(value, sigma_w, sigma_b) for value in (k, q1, q2))
        new = k if width is None else fan_in * before + (sigma_b > 0)
        ntk = new if ntk is None else torch.add(new, ntk, alpha=sigma_w**2)
        if layer < depth:
            k, active = arc_cosine(k, q1, q2)
            ntk, q1, q2, fan_in = ntk * active, q1 / 2, q2 / 2, width
    return Kernels(k, ntk)
