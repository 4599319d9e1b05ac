r"""Maximum mean discrepancy (M3D, arXiv 2312.15927; Gretton et al. 2012) between the embedded class batches of S and T.

$$\mathrm{MMD}^2_c = \overline{K_{TT}} - 2\,\overline{K_{TS}} + \overline{K_{SS}}$$

Real embeddings are ``(C, n, d)``, synthetic ones ``(C, m, d)``. A kernel is a function ``(x, y, bandwidth) -> (C, |x|, |y|)``.
Two conventions of a bandwidth live side by side: M3D's ``gaussian`` divides a *squared* distance by b, the textbook ``rbf``
divides it by $2\sigma^2$.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.match.distance import At, Distance, check_weight
from lib.match.features import class_mean
from lib.system.errors import CompanionError, choose
from lib.system.tensors import guard

Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    r"""$\lVert x_i - y_j\rVert^2$, ``(C, n, d), (C, m, d) -> (C, n, m)``, by one matrix product; >= 0.

    Both sets are moved to a common origin first (which changes no distance): otherwise the product cancels badly for
    features with a large mean. The distance of a point to itself is exactly 0 if ``x is y``.
    """
    origin = y.detach().mean(-2, keepdim=True)
    same = x is y
    x = x - origin
    y = x if same else y - origin
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    squares = (squares - 2 * x @ y.transpose(-1, -2)).clamp(min=0)
    if same:
        squares = squares.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0)
    return squares


def distances(x: Tensor, y: Tensor) -> Tensor:
    r"""$\lVert x_i - y_j\rVert$, ``(C, n, m)``, with gradient 0 (not infinite) where two points coincide."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def mean_squared_distance(real: Tensor, syn: Tensor) -> Tensor:
    r"""M3D's bandwidth $b = \frac{1}{N^2-N}\sum_{ij}\lVert z_i-z_j\rVert^2$ over the union of both sets, ``(C,)``, detached.

    Equals twice the trace of the union's unbiased covariance, so no N x N matrix is needed.
    """
    union = torch.cat([real, syn], -2).detach()
    return 2 * union.var(-2).sum(-1)


def median_distance(real: Tensor, syn: Tensor) -> Tensor:
    """Median distance between different points of the union of both sets, ``(C,)``, detached."""
    union = torch.cat([real, syn], -2).detach()
    i, j = torch.triu_indices(union.shape[-2], union.shape[-2], 1, device=union.device)
    return distances(union, union)[..., i, j].median(-1).values


def gaussian(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    r"""$\sum_{j=0}^4 \exp(-\lVert x-y\rVert^2 / (b\,2^{j-2}))$, five widths from b/4 to 4b; 5 on the diagonal."""
    widest = (-squared_distances(x, y) / (4 * b)).exp()  # each next width is the square of the one before
    total, power = widest, widest
    for _ in range(4):
        power = power.square()
        total = total + power
    return total


def linear(x: Tensor, y: Tensor, b: None = None) -> Tensor:
    r"""$x^\top y$: the MMD is the squared distance of the means (DM)."""
    return x @ y.transpose(-1, -2)


def poly(x: Tensor, y: Tensor, b: None = None) -> Tensor:
    r"""$(x^\top y + 1)^2$: matches first and second moments."""
    return (linear(x, y) + 1).square()


def laplace_code(x: Tensor, y: Tensor, b: None = None, gammas: tuple[float, ...] = (0.1, 1.0, 5.0)) -> Tensor:
    r"""$\sum_\gamma \exp(-\gamma\lVert x-y\rVert^2)$: what M3D's code calls Laplace; three Gaussians of fixed width."""
    squares = squared_distances(x, y)
    return sum((-gamma * squares).exp() for gamma in gammas)


def laplace(x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    r"""$\exp(-\lVert x-y\rVert/\sigma)$."""
    return (-distances(x, y) / sigma).exp()


def rbf(x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    r"""$\exp(-\lVert x-y\rVert^2/2\sigma^2)$."""
    return (-squared_distances(x, y) / (2 * sigma**2)).exp()


def energy(x: Tensor, y: Tensor, b: None = None) -> Tensor:
    r"""$-\lVert x-y\rVert$: the MMD is the energy distance (the kernel is only conditionally positive definite)."""
    return -distances(x, y)


KERNELS: dict[str, Kernel] = {
    "gaussian": gaussian,
    "linear": linear,
    "poly": poly,
    "laplace_code": laplace_code,
    "laplace": laplace,
    "rbf": rbf,
    "energy": energy,
}
# The rule that sets the bandwidth of the kernels that have one.
BANDWIDTHS = {"gaussian": mean_squared_distance, "laplace": median_distance, "rbf": median_distance}


def mmd(
    real: Tensor,
    syn: Tensor,
    kernel: str | Kernel = "gaussian",
    bandwidth: float | Tensor | None = None,
    biased: bool = True,
) -> Tensor:
    r"""Squared MMD of each class, ``(C, n, d), (C, m, d) -> (C,)``.

    Args:
        kernel: a name of :data:`KERNELS`, or a function with their signature.
        bandwidth: a number or ``(C,)``; default: the rule of :data:`BANDWIDTHS`, recomputed for every batch and without gradient.
        biased: plain means with the diagonals (M3D; >= 0), or without them (unbiased; can be negative).
    Raises:
        CompanionError: if the kernel is unknown, the bandwidth is not positive or an unbiased estimate has one point only.
    """
    function = choose("kernel", kernel, KERNELS) if isinstance(kernel, str) else kernel
    if bandwidth is None and kernel in BANDWIDTHS:
        bandwidth = BANDWIDTHS[kernel](real, syn)
        # Coinciding points have no scale: any positive one gives the same kernel.
        bandwidth = torch.where(bandwidth > 0, bandwidth, 1)
    elif isinstance(bandwidth, (int, float)) and not bandwidth > 0:
        raise CompanionError(f"bandwidth {bandwidth} is not allowed: it must be positive")
    if bandwidth is not None:
        bandwidth = torch.as_tensor(bandwidth, dtype=real.dtype, device=real.device).reshape(-1, 1, 1)
    means = _within_mean(function(real, real, bandwidth), biased)
    means = means + _within_mean(function(syn, syn, bandwidth), biased)
    return means - 2 * function(real, syn, bandwidth).mean((-2, -1))


def _within_mean(gram: Tensor, biased: bool) -> Tensor:
    n = gram.shape[-1]
    if biased:
        return gram.mean((-2, -1))
    if n < 2:
        raise CompanionError("an unbiased MMD of 1 image per class does not exist: allowed are 2 or more")
    return (gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * n - n)


def witness(points: Tensor, real: Tensor, syn: Tensor, kernel: Kernel, bandwidth: Tensor | None) -> Tensor:
    r"""$f^*(z) \propto \frac1n\sum_i k(x_i, z) - \frac1m\sum_j k(y_j, z)$ at the points ``(C, k, d)``, ``(C, k)``."""
    return kernel(points, real, bandwidth).mean(-1) - kernel(points, syn, bandwidth).mean(-1)


@dataclass(frozen=True)
class MMD(Distance):
    r"""M3D's $w\,\mathrm{MMD}^2_c$ (:func:`mmd`, biased); term ``mmd``. With the linear kernel it is DM's distance, term ``mean``.

    Attributes:
        kernel: one of :data:`KERNELS`; bandwidth: "adaptive", the rule of :data:`BANDWIDTHS`, or a positive number.
        weight: w, 0 or more.
    """

    kernel: str = "gaussian"
    bandwidth: float | str = "adaptive"
    weight: float = 1.0

    def __post_init__(self):
        choose("kernel", self.kernel, KERNELS)
        check_weight(self)
        number = isinstance(self.bandwidth, (int, float)) and self.bandwidth > 0
        if self.bandwidth != "adaptive" and not number:
            raise CompanionError(
                f"bandwidth {self.bandwidth!r} is not allowed: 'adaptive' or a positive number"
            )

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        a, b = real["embedding"], syn["embedding"]
        if self.kernel == "linear":  # the same number without a Gram matrix
            return {"mean": self.weight * class_mean(a, b)}
        bandwidth = None if self.bandwidth == "adaptive" else self.bandwidth
        return {"mmd": self.weight * mmd(a, b, self.kernel, bandwidth)}


guard(globals())
