r"""The loss around a set of parameters: slices, worst-case perturbations and the Hessian's spectrum.

A loss is a function of flat parameter vectors $\theta$, ``(P,) -> ()`` and ``(m, P) -> (m,)``, rows independent of one another;
:class:`NetworkLoss` makes one of a network and fixed data. Several points are evaluated in one batched pass wherever they can.
Directions follow Li et al. (NeurIPS 2018, arXiv 1712.09913), spectra Yao et al. (PyHessian, arXiv 1912.07145).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.ensemble import apply
from lib.nets.training import rows_at_once
from lib.system.errors import CompanionError, unknown

Loss = Callable[[Tensor], Tensor]
Product = Callable[[Tensor], Tensor]  # v (P,) -> Hv (P,)
MODES = ("filter", "layer")


class NetworkLoss:
    r"""$\sum_iw_i\,\ell(f_\theta(x_i),y_i)/\sum_iw_i$ as a function of the flattened parameters, ``(..., P) -> (...)``.

    Args:
        network: its buffers stay as they are; call ``network.eval()`` before.
        images: ``(n, c, h, w)``; labels: ``(n,)`` classes or ``(n, C)`` probabilities; weights: ``(n,)``, or None for equal ones.
        buffers: let $\theta$ go on with the floating-point buffers (running statistics), as between two networks.
    Raises:
        CompanionError: images and labels, or labels and network, do not go together.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        buffers: bool = False,
    ):
        self.network, self.images, self.labels = network, images, labels
        self.weights = images.new_ones(len(images)) if weights is None else weights.to(images)
        self.moving, self.fixed = dict(network.named_parameters()), dict(network.named_buffers())
        if buffers:
            running = {name: tensor for name, tensor in self.fixed.items() if tensor.is_floating_point()}
            self.moving |= running
            self.fixed = {name: tensor for name, tensor in self.fixed.items() if name not in running}
        self._check()

    def _check(self) -> None:
        count = (len(self.images), len(self.labels), len(self.weights))
        if len(set(count)) > 1 or not count[0]:
            raise CompanionError(
                "images, labels and weights must be equally many, and at least 1, not {} / {} / {}".format(
                    *count
                )
            )
        try:
            with torch.no_grad():
                outputs = self.network(self.images[:1]).shape[1]
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            raise CompanionError(
                f"the network does not fit images {tuple(self.images.shape[1:])}: {what}"
            ) from error
        soft = self.labels.dim() == 2
        needed = self.labels.shape[1] if soft else int(self.labels.max()) + 1
        if needed > outputs or soft and needed != outputs:
            raise CompanionError(
                f"the network does not fit the labels: it has {outputs} outputs, they need {needed}"
            )

    @property
    def theta(self) -> Tensor:
        """The present parameters, ``(P,)``."""
        return flatten(list(self.moving.values())).detach()

    def __call__(self, theta: Tensor) -> Tensor:
        points = theta.reshape(-1, theta.shape[-1])
        parts = points.split([tensor.numel() for tensor in self.moving.values()], 1)
        tensors = {
            name: part.reshape(len(points), *tensor.shape)
            for (name, tensor), part in zip(self.moving.items(), parts, strict=True)
        }
        tensors |= {name: tensor.expand(len(points), *tensor.shape) for name, tensor in self.fixed.items()}
        rows = len(self.images)
        if not torch.is_grad_enabled() and self.images.dim() == 4:
            rows = rows_at_once(self.network, self.images, len(points))
        batches = zip(self.images.split(rows), self.labels.split(rows), self.weights.split(rows), strict=True)
        total = sum(self._sum(tensors, *batch) for batch in batches)
        return (total / self.weights.sum()).reshape(theta.shape[:-1])

    def _sum(self, tensors: dict[str, Tensor], images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the losses of some images at m points, ``(m,)``."""
        logits = apply(self.network, tensors, images.unsqueeze(0))  # (m, n, C)
        log_p = logits.log_softmax(2)
        if labels.dim() == 2:
            losses = -(labels * log_p).sum(2)
        else:
            losses = -log_p.gather(2, labels[None, :, None].expand(len(log_p), -1, 1))[..., 0]
        return losses @ weights


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
    loss: Loss, theta: Tensor, directions: Tensor, coefficients: Tensor, chunk: int = 4
) -> Tensor:
    r"""$L(\theta+\sum_ka_k\delta_k)$ at every row of coefficients: directions ``(k, P)``, coefficients ``(m, k)`` -> ``(m,)``.

    ``chunk`` points are evaluated in one batched call.
    """
    return torch.cat([loss(theta + a @ directions) for a in coefficients.to(theta).split(chunk)])


def line(loss: Loss, theta: Tensor, direction: Tensor, along: Tensor, chunk: int = 4) -> Tensor:
    r"""$\phi(\alpha)=L(\theta+\alpha\delta)$, direction ``(P,)``, along ``(m,)`` -> ``(m,)``."""
    return slice_losses(loss, theta, direction[None], along[:, None], chunk)


def surface(loss: Loss, theta: Tensor, directions: Tensor, along: Tensor, chunk: int = 4) -> Tensor:
    r"""$L(\theta+a\delta+b\eta)$ on the grid a, b in ``along`` (m,): directions ``(2, P)`` -> ``(m, m)``, a along the rows."""
    grid = torch.cartesian_prod(along, along)
    return slice_losses(loss, theta, directions, grid, chunk).view(len(along), len(along))


def interpolation(
    first: nn.Module, second: nn.Module, images: Tensor, labels: Tensor, along: Tensor, chunk: int = 4
) -> Tensor:
    r"""$L(\theta_1+\alpha(\theta_2-\theta_1))$ between two networks of one architecture, running statistics included.

    along: ``(m,)``, 0 is the first network and 1 the second. Returns ``(m,)``.
    """
    states = [NetworkLoss(network, images, labels, buffers=True) for network in (first, second)]
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.moving.items()} for state in states]
    if shapes[0] != shapes[1]:
        raise CompanionError("two networks to interpolate between must have the same architecture")
    start, end = (state.theta for state in states)
    return line(states[0], start, end - start, along, chunk)


def slope(loss: Loss, points: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(m, P)`` and losses ``(m,)`` at points ``(m, P)``; or of one point ``(P,)``."""
    points = points.detach().requires_grad_()
    values = loss(points)
    (gradients,) = torch.autograd.grad(values.sum(), points, materialize_grads=True)
    return gradients, values.detach()


def hessian_product(loss: Loss, theta: Tensor) -> Product:
    """v -> Hv at theta by double backward; the first pass is done once for all v."""
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    return lambda v: torch.autograd.grad(gradient, theta, v, retain_graph=True, materialize_grads=True)[0]


def lanczos(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
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


def rademacher(count: int, size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs ``(count, size)``."""
    signs = torch.randint(2, (count, size), generator=generator, device=generator.device)
    return (2 * signs - 1).to(like)


def trace(product: Product, probes: Tensor) -> Tensor:
    r"""Hutchinson: the mean of $v^\top Hv$ over probes ``(count, P)`` of random signs."""
    return torch.stack([v @ product(v) for v in probes]).mean()


def spectral_density(product: Product, probes: Tensor, grid: Tensor, width: float, steps: int = 60) -> Tensor:
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
    better) and the given directions ``(s, P)``, where s may be 0; they climb side by side.
    """
    if not rho > 0:
        raise CompanionError(f"perturbation radius {rho} is not allowed: it must be positive")
    gradient, center = slope(loss, theta)
    offsets = rho * F.normalize(torch.cat([gradient[None], -gradient[None], starts]))
    best = torch.full_like(center, -torch.inf)
    for _ in range(steps):
        gradients, values = slope(loss, theta + offsets)
        best = torch.maximum(best, values.max())
        moved = offsets + eta * rho * F.normalize(gradients)
        offsets = rho * F.normalize(moved)  # 0 stays 0 where the loss is constant
    with torch.no_grad():
        return torch.maximum(best, loss(theta + offsets).max()) - center


def worst_difference(
    full: Loss, subset: Loss, theta: Tensor, rho: float, starts: Tensor, steps: int = 20
) -> Tensor:
    r"""$G(\rho)=\max_{\lVert\epsilon\rVert=\rho}|\Delta(\theta+\epsilon)|-|\Delta(\theta)|$ with $\Delta=L_T-L_S$.

    Ascents for both signs, as in :func:`worst_gap`.
    """
    with torch.no_grad():
        center = full(theta) - subset(theta)
    gaps = [
        sign * center + worst_gap(lambda x, s=sign: s * (full(x) - subset(x)), theta, rho, starts, steps)
        for sign in (1, -1)
    ]
    return torch.maximum(*gaps) - center.abs()


def gap_bound(full: Loss, subset: Loss, theta: Tensor, rho: float, start: Tensor, steps: int = 50) -> Tensor:
    r"""$\rho\lVert\nabla\Delta\rVert_2+\frac{\rho^2}2\lVert H_\Delta\rVert_{op}$, above :func:`worst_difference` up to
    order $\rho^3$.

    The operator norm is the larger end of the spectrum by ``steps`` of Lanczos from ``start`` (P,).
    """

    def difference(x: Tensor) -> Tensor:
        return full(x) - subset(x)

    gradient, _ = slope(difference, theta)
    ritz, _, _ = lanczos(hessian_product(difference, theta), start, steps)
    return rho * gradient.norm() + rho**2 / 2 * ritz.abs().max()
