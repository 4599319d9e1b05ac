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
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.system.errors import CompanionError
from lib.system.tensors import guard

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
        value, active, *saved = _relu(k, q1, q2)
        ctx.save_for_backward(active, *saved)
        return value, active

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_value: Tensor, grad_active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        active, *saved = ctx.saved_tensors
        through_angle, *to_q = _relu_backward(saved, grad_value, grad_active.clone())
        return through_angle.addcmul_(grad_value, active), *to_q


def arc_cosine(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, Tensor]:
    """E[relu(u) relu(v)] and P(u > 0, v > 0) for (u, v) ~ N(0, [[q1, k], [k, q2]]), of the broadcast shape (= k's).

    With theta the angle between the inputs: (sqrt(q1 q2 - k^2) + (pi - theta) k) / 2 pi and (pi - theta) / 2 pi. Where the
    radicand vanishes (coincident or opposite inputs) no gradient flows through theta; differentiable once.
    """
    return ArcCosine.apply(k, q1, q2)


def _relu(k: Tensor, q1: Tensor, q2: Tensor) -> tuple[Tensor, ...]:
    """The two results of :func:`arc_cosine`, then what :func:`_relu_backward` needs of them."""
    inverse1, inverse2 = (
        torch.where(q > 0, q.rsqrt(), 0) for q in (q1, q2)
    )  # a blank input is at a right angle
    opposite = (k * -inverse1).mul_(inverse2)  # -cos theta
    sine = torch.addcmul(k.new_ones(()), opposite, opposite, value=-1)
    # Rounding leaves +-1e-16 where 0 is meant; 45 eps is the 1e-14 of 64-bit floats.
    sine = F.threshold_(sine, 45 * torch.finfo(k.dtype).eps, 0).sqrt_()
    # pi - theta = pi / 2 - atan(opposite / sine), exact at its ends (sine 0), in two thirds of the time of atan2
    active = torch.div(opposite, sine).atan_().mul_(-0.5 / math.pi).add_(0.25)
    value = torch.addcmul(sine, opposite, active, value=-2 * math.pi)
    return value.mul_(q1 * inverse1 / (2 * math.pi)).mul_(q2 * inverse2), active, opposite, sine, q1, q2


def _relu_backward(saved: Sequence[Tensor], grad_value: Tensor, grad_active: Tensor) -> tuple[Tensor, ...]:
    """Gradients with respect to k through the angle alone (grad_value * active is the rest), q1 and q2.

    ``grad_active`` is overwritten.
    """
    opposite, sine, q1, q2 = saved
    inverse1, inverse2 = (torch.where(q > 0, q.rsqrt(), 0) for q in (q1, q2))
    to_cosine = grad_active.div_(F.threshold(sine, 0, math.inf))  # 0 where the sine vanishes; times 1 / 2 pi
    # The derivative along log sqrt(q) is the same for both sides.
    to_scale = (grad_value * sine).mul_(q1 * inverse1 / (2 * math.pi)).mul_(q2 * inverse2)
    to_scale.addcmul_(to_cosine, opposite, value=1 / (2 * math.pi))
    sides = (to_scale.sum_to_size(i.shape) * i.square() / 2 for i in (inverse1, inverse2))
    return to_cosine.mul_(inverse1 / (2 * math.pi)).mul_(inverse2), *sides


def dense(k: Tensor, sigma_w: float, sigma_b: float) -> Tensor:
    """sw^2 k + sb^2 in one pass."""
    return torch.add(k.new_full((), sigma_b**2), k, alpha=sigma_w**2)


class FullyConnected(torch.autograd.Function):
    """The recursion between the rows of x1 and x2 (None: x1) with its derivative in closed form, in few passes over the
    (n1, n2) pairs.

    ``a`` = sw^2, ``b`` = sb^2; Dense layer l adds ``rates[l]`` value + ``offset`` to the NTK, which in the NTK
    parameterisation is its own output (rate a, offset b).
    """

    @staticmethod
    def forward(ctx, x1, x2, a: float, b: float, rates: list[float], offset: float) -> tuple[Tensor, Tensor]:
        d, saved = x1.shape[1], []
        q1 = torch.linalg.vector_norm(x1, dim=1).square()[:, None] / d
        q2 = q1.T if x2 is None else torch.linalg.vector_norm(x2, dim=1).square()[None] / d
        value = torch.addmm(x1.new_zeros(()), x1, (x1 if x2 is None else x2).T, beta=0, alpha=1 / d)
        ntk = active = None
        for layer, rate in enumerate(rates):
            own = (rate, offset) == (a, b)
            new = None if own else torch.add(value.new_full((), offset), value, alpha=rate)
            k, q1, q2 = value.mul_(a).add_(b), a * q1 + b, a * q2 + b
            new = k if own else new
            ntk = torch.addcmul(new, ntk, active, value=a) if layer else new
            if layer < len(rates) - 1:
                value, active, *parts = _relu(k, q1, q2)
                saved += [ntk, active, *parts]
                q1, q2 = q1 / 2, q2 / 2
        ctx.save_for_backward(x1, x2, *saved)
        ctx.a, ctx.ratios = a, [rate / a for rate in rates]  # d (the layer's own part of the NTK) / dk
        ctx.set_materialize_grads(False)
        return k, ntk

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_k: Tensor | None, grad_ntk: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_k is None and grad_ntk is None:
            return (None,) * 6
        x1, x2, *saved = ctx.saved_tensors
        *lower, top = ctx.ratios
        to_k, to_ntk = (
            _plus(grad_k, grad_ntk, top),
            grad_ntk,
        )  # dL/dk, the NTK's own part included, and dL/dntk
        q1, q2 = x1.new_zeros(len(x1), 1), x1.new_zeros(1, len(x1 if x2 is None else x2))
        for layer in reversed(range(len(lower))):  # every layer's factor a is left to the end
            ntk, active, *parts = saved[6 * layer : 6 * (layer + 1)]
            to_active = torch.zeros_like(ntk) if to_ntk is None else to_ntk * ntk
            through_angle, to_q1, to_q2 = _relu_backward(parts, to_k, to_active)
            to_k = through_angle.addcmul_(_plus(to_k, to_ntk, lower[layer]), active)
            to_ntk = None if to_ntk is None or layer == 0 else to_ntk * active
            q1, q2 = q1 / 2 + to_q1, q2 / 2 + to_q2
        scale = ctx.a ** (len(lower) + 1) / x1.shape[1]
        if x2 is None:
            to_k, x2, q1 = to_k + to_k.T, x1, q1 + q2.T
        needed = ctx.needs_input_grad
        to_x1 = torch.addmm(2 * q1 * x1, to_k, x2).mul_(scale) if needed[0] else None
        to_x2 = torch.addmm(2 * q2.T * x2, to_k.T, x1).mul_(scale) if needed[1] else None
        return to_x1, to_x2, None, None, None, None


def _plus(a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """a + scale b, where an absent one is zero."""
    if a is None or b is None:
        return a if b is None else b * scale if scale != 1 else b
    return torch.add(a, b, alpha=scale)


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
    (which changes the NTK only). Images are flattened. Differentiable once.

    Raises:
        CompanionError: for a depth below 0, weights of no variance, and inputs of unequal size.
    """
    x1 = x1.flatten(1)
    x2 = x2 if x2 is None else x2.flatten(1)
    if depth < 0:
        raise CompanionError(f"depth {depth} of a fully-connected kernel; allowed: 0, 1, 2, ...")
    if not (sigma_w > 0 and sigma_b >= 0):
        raise CompanionError(f"sigma_w {sigma_w:g}, sigma_b {sigma_b:g}; allowed: above 0, and 0 or more")
    if x2 is not None and x1.shape[1] != x2.shape[1]:
        raise CompanionError(
            f"kernel between inputs of {x1.shape[1]} and {x2.shape[1]} values; allowed: equal"
        )
    a, b = float(sigma_w) ** 2, float(sigma_b) ** 2
    if width is None:
        rates, offset = [a] * (depth + 1), b
    else:
        rates, offset = [float(x1.shape[1])] + [float(width)] * depth, float(b > 0)
    return Kernels(*FullyConnected.apply(x1, x2, a, b, rates, offset))


guard(globals())
