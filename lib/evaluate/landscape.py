r"""The loss around a set of parameters: slices, worst-case perturbations and the Hessian's spectrum.

A loss is a function of one flat vector $\theta$ ``(P,)``; :func:`network_loss` makes one from a network and fixed data.
Directions follow Li et al. (NeurIPS 2018, arXiv 1712.09913), spectra Yao et al. (PyHessian, arXiv 1912.07145).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import CompanionError, unknown

Loss = Callable[[Tensor], Tensor]
MODES = ("filter", "layer")


def network_loss(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Loss, Tensor]:
    """Mean cross-entropy as a function of the flattened parameters, and the present parameters ``(P,)``.

    Buffers and the training flag of the network stay as they are: call ``network.eval()`` before.
    """
    named = dict(network.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]

    def loss(theta: Tensor) -> Tensor:
        parts = zip(named.items(), theta.split(sizes), strict=True)
        parameters = {name: part.view_as(parameter) for (name, parameter), part in parts}
        return F.cross_entropy(torch.func.functional_call(network, parameters, (images,)), labels)

    return loss, flatten(list(named.values())).detach()


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def normalise(direction: Tensor, weight: Tensor, mode: str = "filter") -> Tensor:
    r"""One tensor of a direction, scaled to its weight.

    ``filter``: every slice f along axis 0 becomes $d_f\lVert w_f\rVert/(\lVert d_f\rVert+10^{-10})$; ``layer``:
    $d\lVert w\rVert/\lVert d\rVert$. Tensors with fewer than two axes (biases, normalisation scales) become exactly 0.
    """
    if mode not in MODES:
        raise unknown("direction mode", mode, MODES)
    if weight.dim() < 2:
        return torch.zeros_like(direction)
    if mode == "layer":
        return direction * (weight.norm() / direction.norm())
    axes, norm = tuple(range(1, weight.dim())), torch.linalg.vector_norm
    ratio = norm(weight, dim=axes, keepdim=True) / (norm(direction, dim=axes, keepdim=True) + 1e-10)
    return direction * ratio


def random_direction(network: nn.Module, generator: torch.Generator, mode: str = "filter") -> Tensor:
    """A normalised Gaussian direction for all parameters, flat ``(P,)``."""
    parts = []
    for weight in network.parameters():
        noise = torch.randn(weight.shape, generator=generator, device=generator.device)
        parts.append(normalise(noise.to(weight), weight.detach(), mode))
    return flatten(parts)


@torch.no_grad()
def slice_losses(
    loss: Loss, theta: Tensor, directions: Tensor, coefficients: Tensor, chunk: int = 16
) -> Tensor:
    r"""$L(\theta+\sum_ka_k\delta_k)$ at every row of coefficients: directions ``(k, P)``, coefficients ``(m, k)`` -> ``(m,)``.

    ``chunk`` points are evaluated in one batched call.
    """
    parts = [torch.vmap(loss)(theta + a @ directions) for a in coefficients.split(chunk)]
    return torch.cat(parts)


def hessian_product(loss: Loss, theta: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> Hv at theta by double backward; the first pass is done once for all v."""
    _, pull = torch.func.vjp(torch.func.grad(loss), theta)
    return lambda v: pull(v)[0]


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values ascending ``(m,)``, the squared first components of their vectors ``(m,)`` and the Ritz vectors ``(P, m)``.

    With full re-orthogonalisation; m < steps when the Krylov space is exhausted. Both ends of the spectrum converge first.
    """
    v = start / start.norm()
    basis, alphas, betas = [v], [], []
    for _ in range(min(steps, len(start))):
        w = product(basis[-1])
        scale = w.norm()
        alphas.append(w @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough
            w = w - known.T @ (known @ w)
        beta = w.norm()
        if beta <= 10 * math.sqrt(len(start)) * torch.finfo(w.dtype).eps * scale:
            break
        betas.append(beta)
        basis.append(w / beta)
    m = len(alphas)
    tridiagonal = torch.diag(torch.stack(alphas))
    if m > 1:
        off = torch.stack(betas[: m - 1])
        tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors[0].square(), torch.stack(basis[:m]).T @ vectors


def top_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int = 100, rtol: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Power iteration: the eigenvalue of the largest magnitude and its unit vector ``(P,)``."""
    v, value = start / start.norm(), torch.full((), torch.inf).to(start)
    for _ in range(steps):
        w = product(v)
        before, value = value, v @ w
        v = w / w.norm().clamp_min(torch.finfo(w.dtype).tiny)
        if (value - before).abs() <= rtol * value.abs():
            break
    return value, v


def rademacher(count: int, size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs ``(count, size)``."""
    signs = torch.randint(2, (count, size), generator=generator, device=generator.device)
    return (2 * signs - 1).to(like)


def trace(product: Callable[[Tensor], Tensor], probes: Tensor) -> Tensor:
    r"""Hutchinson: the mean of $v^\top Hv$ over probes ``(count, P)`` of random signs."""
    return torch.stack([v @ product(v) for v in probes]).mean()


def spectral_density(
    product: Callable[[Tensor], Tensor], probes: Tensor, grid: Tensor, width: float, steps: int = 60
) -> Tensor:
    """Stochastic Lanczos quadrature: the eigenvalue density at the points ``(m,)`` of a grid; it integrates to 1.

    Every Ritz value of every probe ``(P,)`` is smoothed by a Gaussian of that width.
    """
    total = torch.zeros_like(grid)
    for v in probes:
        nodes, weights, _ = lanczos(product, v, steps)
        bumps = (-0.5 * ((grid[:, None] - nodes) / width).square()).exp()
        total += bumps @ weights / (width * math.sqrt(2 * math.pi))
    return total / len(probes)


def worst_gap(
    loss: Loss, theta: Tensor, rho: float, starts: Tensor, steps: int = 20, eta: float = 0.5
) -> Tensor:
    r"""$\max_{\lVert\epsilon\rVert_2=\rho}L(\theta+\epsilon)-L(\theta)$, from below, by projected ascent on the sphere.

    $\epsilon\leftarrow\rho\,(\epsilon+\eta\rho\hat\nabla)/\lVert\cdot\rVert$, the best point seen counts.
    Starts are $\pm\rho\nabla/\lVert\nabla\rVert$ (the first is the one-step value of SAM; ``steps=0`` returns it or
    better) and the given directions ``(s, P)``, where s may be 0.
    """
    if rho <= 0:
        raise CompanionError(f"perturbation radius {rho} is not allowed: it must be positive")
    slope = torch.func.grad_and_value(loss)
    gradient, center = slope(theta)
    best = torch.full_like(center, -torch.inf)
    for start in torch.cat([gradient[None], -gradient[None], starts]):
        offset = rho * F.normalize(start, dim=0)
        for _ in range(steps):
            gradient, value = slope(theta + offset)
            best = torch.maximum(best, value)
            moved = offset + eta * rho * F.normalize(gradient, dim=0)
            offset = rho * F.normalize(moved, dim=0)  # 0 stays 0 where the loss is constant
        best = torch.maximum(best, loss(theta + offset))
    return (best - center).detach()


def worst_difference(
    full: Loss, subset: Loss, theta: Tensor, rho: float, starts: Tensor, steps: int = 20
) -> Tensor:
    r"""$G(\rho)=\max_{\lVert\epsilon\rVert=\rho}|\Delta(\theta+\epsilon)|-|\Delta(\theta)|$ with $\Delta=L_T-L_S$.

    Ascents for both signs, as in :func:`worst_gap`.
    """
    center = (full(theta) - subset(theta)).detach()
    gaps = [
        sign * center + worst_gap(lambda x, s=sign: s * (full(x) - subset(x)), theta, rho, starts, steps)
        for sign in (1, -1)
    ]
    return torch.maximum(*gaps) - center.abs()


def quadratic_gap(gradient: Tensor, hessian: Tensor, rho: float) -> Tensor:
    r"""$\max_{\lVert e\rVert=\rho}g^\top e+\frac12e^\top He$ for a dense Hessian.

    Solved by $e=(\mu I-H)^{-1}g$, with $\mu>\lambda_{\max}$ found by bisection so that $\lVert e\rVert=\rho$.
    Needs a gradient that is not orthogonal to the top eigenvectors (the generic case).
    """
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient
    low, high = values[-1], values[-1] + gradient.norm() / rho  # there the norm is at most rho
    for _ in range(200):
        middle = 0.5 * (low + high)
        if (g / (middle - values)).norm() > rho:
            low = middle
        else:
            high = middle
    e = g / (high - values)
    return g @ e + 0.5 * (values * e.square()).sum()
