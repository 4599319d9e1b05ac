"""Finite feature maps: invertible ones for closed-form distillation, random ConvNet features for kernel estimates.

The invertible maps take data as **columns**, (d, n) -> (p, n), as the paper on kernel ridge regression does; the ConvNet
features take images (n, c, h, w) and return rows (n, D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.kernels.fc import SIGMA_B, SIGMA_W
from lib.nets.pool import average_pool
from lib.system.errors import CompanionError
from lib.system.tensors import guard

MAP_VALUES = 2**20  # of one layer at a time without gradients: stays in the cache of a CPU core
MAP_VALUES_CUDA = 2**28


@dataclass(frozen=True, eq=False)
class Identity:
    """phi(x) = x: linear ridge regression."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, phi: Tensor) -> Tensor:
        return phi


@dataclass(frozen=True, eq=False)
class LeakyNet:
    """phi(x) = a(W_L ... a(W_1 x)), a = LeakyReLU, no biases; weights (p_l, p_{l-1}) that never widen, so phi is onto."""

    weights: tuple[Tensor, ...]
    slope: float = 0.1

    @classmethod
    def draw(
        cls, widths: tuple[int, ...], generator: torch.Generator, slope: float = 0.1, device: str = "cpu"
    ) -> LeakyNet:
        """Weights from N(0, 1 / fan-in); ``widths`` = (d, p_1, ..., p_L), 64 bits."""
        shapes = zip(widths[1:], widths[:-1], strict=True)
        return cls(tuple(_normal((p, d), d**-0.5, generator, device) for p, d in shapes), slope)

    def __call__(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = F.leaky_relu(w @ x, self.slope)
        return x

    def inverse(self, phi: Tensor, exact: bool = True) -> Tensor:
        """The shortest x with phi(x) = ``phi``: W^+ a^-1(...), by least squares (d, n).

        Raises:
            CompanionError: if ``exact``, where a layer widens, so that most feature vectors have no x.
        """
        for w in reversed(self.weights):
            if exact:
                _onto(w)
            phi = torch.linalg.lstsq(w, torch.where(phi < 0, phi / self.slope, phi)).solution
        return phi


@dataclass(frozen=True, eq=False)
class Fourier:
    """phi(x) = sqrt(2 / p) cos(A x + b), A (p, d), b (p,): random Fourier features of a Gaussian kernel."""

    a: Tensor
    b: Tensor

    @classmethod
    def draw(
        cls, d: int, p: int, generator: torch.Generator, variance: float | None = None, device: str = "cpu"
    ) -> Fourier:
        """A from N(0, variance), b from U[0, pi], 64 bits.

        The published 1/1000 is right for 784 standardised pixels; the default 0.8 / d keeps the same Var(a^T x).
        """
        scale = math.sqrt(0.8 / d if variance is None else variance)
        b = torch.rand(p, generator=generator, dtype=torch.float64, device=generator.device) * math.pi
        return cls(_normal((p, d), scale, generator, device), b.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        return math.sqrt(2 / len(self.a)) * torch.cos(self.a @ x + self.b[:, None])

    def inverse(self, phi: Tensor, rescale: bool = True) -> Tensor:
        """A^+ (arccos(sqrt(p / 2) phi) - b), (d, n).

        ``rescale`` first divides by the largest absolute entry, which multiplies the ridge solution by a constant and
        leaves its arg-max alone; without it, entries beyond sqrt(2 / p) are an error.
        """
        _onto(self.a)
        v = math.sqrt(len(self.a) / 2) * phi
        largest = v.abs().max()
        if not rescale and largest > 1 + 1e-9:
            raise CompanionError(
                f"Fourier feature {float(largest):.3g} times sqrt(2/p); allowed: -1 to 1, or rescale"
            )
        v = (v / largest if rescale else v).clamp(-1, 1)
        return torch.linalg.lstsq(self.a, v.arccos() - self.b[:, None]).solution


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator, device: str) -> Tensor:
    z = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (z * std).to(device)


def _onto(w: Tensor) -> None:
    p, d = w.shape
    if p > d:
        raise CompanionError(
            f"{p} features of {d} inputs cannot be inverted exactly; allowed: at most {d} features"
        )


Blocks = list[tuple[Tensor, Tensor]]


def random_blocks(
    nets: int,
    channels: int,
    generator: torch.Generator,
    width: int = 256,
    depth: int = 3,
    sigma_w: float = SIGMA_W,
    sigma_b: float = SIGMA_B,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Blocks:
    """``depth`` layers of ``nets`` random ConvNets: weight (nets, width, c_in, 3, 3), bias (nets, width) each.

    Weights from N(0, sw^2 / (9 c_in)), biases from N(0, sb^2) (RFAD: width 256, depth 3).
    """
    fan = [channels, *[width] * (depth - 1)]
    if min(nets, channels, width, depth) < 1:
        raise CompanionError(
            f"{nets} networks of width {width} and depth {depth}; allowed: at least 1 of each"
        )

    def normal(shape: tuple[int, ...], std: float) -> Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).mul_(std).to(device)
        )

    weights = (normal((nets, width, c, 3, 3), sigma_w / math.sqrt(9 * c)) for c in fan)
    return [(w, normal((nets, width), sigma_b)) for w in weights]


def conv_features(x: Tensor, blocks: Blocks) -> Tensor:
    """Features of x (n, c, h, w) under N networks of [conv 3x3, ReLU, average pooling 2], divided by sqrt(N D).

    The networks run as one grouped convolution; without gradients a few images at a time, so that memory does not grow
    with n. Returns (n, N D): network by network, each flattened as (width, h, w).
    """
    if min(x.shape[2:]) < 2 ** len(blocks):
        raise CompanionError(
            f"{min(x.shape[2:])}-pixel images do not survive {len(blocks)} poolings; allowed: {2 ** len(blocks)} or more"
        )
    if not torch.is_grad_enabled():
        values = blocks[0][1].numel() * x[0, 0].numel()
        rows = max(1, (MAP_VALUES_CUDA if x.is_cuda else MAP_VALUES) // values)
        return torch.cat([_grouped(part, blocks) for part in x.split(rows)])
    return _grouped(x, blocks)


def _grouped(x: Tensor, blocks: Blocks) -> Tensor:
    for index, (weight, bias) in enumerate(blocks):
        groups = 1 if index == 0 else len(weight)  # the first layer's networks share the image
        x = F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=1, groups=groups)
        x = average_pool(torch.relu_(x))
    phi = x.flatten(1)
    return phi / math.sqrt(phi.shape[1])


def conjugate_kernel(
    phi1: Tensor, phi2: Tensor, sigma_w: float = SIGMA_W, sigma_b: float = SIGMA_B
) -> Tensor:
    """sw^2 phi1 phi2^T + sb^2, the kernel of a random last layer; (n1, n2), an estimate of the NNGP kernel."""
    return sigma_w**2 * phi1 @ phi2.T + sigma_b**2


guard(globals())
