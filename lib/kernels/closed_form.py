"""Closed-form distillation of kernel ridge regression (Chen, Huang, Weng, NeurIPS 2024), as pure functions.

Data as **columns**, as in the paper: features phi (p, n), labels Y (k, n), teacher W = Y phi_lambda^+ (k, p) with

    phi_lambda^+ = V diag(s / (s^2 + lambda)) U^T   for   phi = U diag(s) V^T.

A set (phi_S, Y_S) with m points has W as its own ridge solution iff phi_S,lambda_S^+ is an admissible

    D = Y_S^+ W + (I - Y_S^+ Y_S) Z      for some Z (m, p)      (theorems 4.1 and 5.1),

so one chooses Y_S and Z, forms D and inverts its singular values. Everything is meant for 64-bit tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib.kernels import ridge
from lib.system.errors import CompanionError
from lib.system.tensors import guard


def _spectral(a: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """U diag(f(s)) V^T of a = U diag(s) V^T, with f = 0 on singular values that are 0 up to rounding."""
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    zero = s <= max(a.shape) * torch.finfo(a.dtype).eps * s[0]
    return u * torch.where(zero, 0, function(torch.where(zero, 1, s))) @ vt


def regularised_features(phi: Tensor, lam: float) -> Tensor:
    """phi_lambda = U diag((s^2 + lambda) / s) V^T, the pseudo-inverse of :func:`regularised_pinv`; (p, n)."""
    return _spectral(phi, lambda s: s + lam / s)


def regularised_pinv(phi: Tensor, lam: float) -> Tensor:
    """phi_lambda^+ = (phi^T phi + lambda I)^-1 phi^T, the Moore-Penrose inverse at lambda = 0; (n, p)."""
    if not lam >= 0:
        raise CompanionError(f"lambda {float(lam):g}; allowed: 0 or more")
    return _spectral(phi, lambda s: s / (s.square() + lam)).T


class RidgePath(NamedTuple):
    """W(lambda) = left diag(1 / (values + lambda)) right for every lambda > 0: left (k, r), values (r,), right (r, p)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def __call__(self, lam: float) -> Tensor:
        """W(lambda), (k, p)."""
        if not lam > 0:
            raise CompanionError(f"lambda {float(lam):g} on a ridge path; allowed: greater than 0")
        return self.left / (self.values + lam) @ self.right

    def best(self, lams: Tensor, phi: Tensor, labels: Tensor) -> tuple[int, Tensor]:
        """Position of the lambda with the best accuracy on features (p, n), labels (n,), the first of equals, and the
        accuracy of every lambda, (L,); no matrix of the size p x p is formed."""
        projected = self.right @ phi
        scores = (self.left / (self.values + lam) @ projected for lam in lams.to(phi))
        accuracy = torch.stack([(s.argmax(0) == labels).double().mean() for s in scores])
        return int(accuracy.argmax()), accuracy


def ridge_path(phi: Tensor, y: Tensor) -> RidgePath:
    """The ridge solutions W(lambda) = Y phi_lambda^+ of all lambda > 0 from one eigendecomposition.

    phi phi^T = Q L Q^T gives W = Y phi^T Q (L + lambda)^-1 Q^T; with fewer points than features, phi^T phi is taken.
    """
    primal = phi.shape[1] >= phi.shape[0]
    values, q = torch.linalg.eigh(phi @ phi.T if primal else phi.T @ phi)
    if primal:
        return RidgePath((y @ phi.T) @ q, values.clamp_min(0), q.T)
    return RidgePath(y @ q, values.clamp_min(0), (phi @ q).T)


def cyclic_labels(k: int, ipc: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[I_k, ..., I_k] (k, k ipc): the class index runs fastest."""
    return torch.eye(k, dtype=dtype).repeat(1, ipc)


def admissible(y_s: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """D = Y_S^+ W + (I - Y_S^+ Y_S) Z (m, p); with m = k, Z does not matter.

    Raises:
        CompanionError: when the labels (k, m) have rank below k, so that no W can be reached in general.
    """
    rank, k = int(torch.linalg.matrix_rank(y_s)), len(y_s)
    if rank < k:
        raise CompanionError(
            f"labels of rank {rank} for {k} classes; allowed: rank {k}, with {k} points or more"
        )
    pinv = torch.linalg.pinv(y_s)
    return pinv @ w + z - pinv @ (y_s @ z)


def noise(y_s: Tensor, w: Tensor, generator: torch.Generator, scale: float = 0.1) -> Tensor:
    """Z (m, p) for images from noise: scale times the standard deviation of the entries of Y_S^+ W."""
    shape = (y_s.shape[1], w.shape[1])
    z = torch.randn(shape, generator=generator, dtype=w.dtype, device=generator.device).to(w.device)
    return scale * (torch.linalg.pinv(y_s) @ w).std() * z


def nearest(y_s: Tensor, w: Tensor, phi_real: Tensor, lam: float = 0.0) -> Tensor:
    """Z (m, p) whose D is the admissible one nearest to that of real images, features (p, m) (corollary 4.1.1).

    The best labels for it are Y_S = W phi_lambda(real), :func:`labels_for`.
    """
    pinv = torch.linalg.pinv(y_s)
    gap = regularised_pinv(phi_real, lam) - pinv @ w
    return gap - pinv @ (y_s @ gap)


def labels_for(phi: Tensor, w: Tensor, lam: float = 0.0) -> Tensor:
    """Y_S = W phi_lambda (k, m): least-squares labels of fixed points, exact from m = p points of rank p on (theorem 4.2)."""
    return w @ (regularised_features(phi, lam) if lam > 0 else phi)


def clipped(d: Tensor, lam: float) -> float:
    """min(lambda_S, 1 / (4 s_1^2)) with s_1 the largest singular value of D: above it no real features exist."""
    return min(float(lam), float(1 / (4 * torch.linalg.matrix_norm(d, 2).square())))


def solve_features(d: Tensor, lam: float = 0.0, signs: Tensor | float = 1.0) -> Tensor:
    """phi_S (p, m) with phi_S,lambda^+ = D (m, p): D^+ at lambda = 0, else s_i = (1 +- sqrt(1 - 4 lambda s_i'^2)) / (2 s_i').

    ``signs`` picks the root: 1 or -1, or one of them per singular value of D in descending order.

    Raises:
        CompanionError: for lambda < 0 or above the bound of :func:`clipped`.
    """
    if not lam >= 0:
        raise CompanionError(f"lambda_S {float(lam):g}; allowed: 0 or more")
    if lam == 0:
        return torch.linalg.pinv(d)
    bound = clipped(d, math.inf)
    if lam > bound * (1 + 1e-12):
        raise CompanionError(f"lambda_S {float(lam):g} leaves no real features; allowed: at most {bound:g}")

    def root(s: Tensor) -> Tensor:
        # Clamped because at the bound the radicand of the largest singular value is 0 up to rounding.
        larger = (1 + (1 - 4 * lam * s.square()).clamp_min(0).sqrt()) / (2 * s)
        # The two roots multiply to lambda, which spares the smaller one its cancellation.
        return torch.where(torch.as_tensor(signs, device=s.device) > 0, larger, lam / larger)

    return _spectral(d, root).T


def student(phi_s: Tensor, y_s: Tensor, lam: float = 0.0) -> Tensor:
    """W_S = Y_S phi_S,lambda^+ (k, p), the ridge solution of a distilled set."""
    return y_s @ regularised_pinv(phi_s, lam)


def deep_linear(
    weights: Sequence[Tensor], w: Tensor, y_s: Tensor, z: Tensor | None = None
) -> tuple[Tensor, int]:
    """Images X_S (d, m) for phi(x) = P x, P = W_L ... W_1, that widens: d < p, lambda_S = 0 (theorem 5.3).

    m = k: X_S = P^+ (Y_S^+ W)^+, exact iff the columns of W^+ Y_S lie in range(P), as they do for a W that ridge regression
    has found on features P x. m > k: the recipe, with H = [P W_1^+, W^+ W - I] = U S V^T and V_22 the lower right block of V,

        [C_1; C_2] = H^+ W^+ Y_S,  B = V_22^-1 (Z (I - Y_S^+ Y_S) - C_2),  X_S = W_1^+ (V_12 B + C_1).

    The recipe assumes an invertible V_22. Its rank is returned: with d < p it is d (the kernel of H forces row(W) and
    null(W) into a d-dimensional space otherwise), so the pseudo-inverse stands for V_22^-1 and nothing is promised.

    Args:
        weights: (p_l, p_{l-1}), the first one (p_1, d); w: (k, p); y_s: (k, m) of rank k; z: Z' (p, m), needed for m > k.
    Returns:
        X_S, and the rank of V_22 (p where m = k, which does not need it).
    """
    rank, (k, m) = int(torch.linalg.matrix_rank(y_s)), y_s.shape
    if rank < k:
        raise CompanionError(
            f"labels of rank {rank} for {k} classes; allowed: rank {k}, with {k} points or more"
        )
    product = functools.reduce(lambda a, b: b @ a, weights)
    pinv, p = torch.linalg.pinv, len(product)
    if m == k:
        return pinv(product) @ pinv(pinv(y_s) @ w), p
    first = pinv(weights[0])
    width = first.shape[1]
    eye = torch.eye(p, dtype=w.dtype, device=w.device)
    h = torch.cat([product @ first, pinv(w) @ w - eye], 1)
    v = torch.linalg.svd(h).Vh.T
    v12, v22 = v[:width, p:], v[width:, p:]
    c1, c2 = (pinv(h) @ pinv(w) @ y_s).split([width, p])
    b = pinv(v22) @ (z - z @ pinv(y_s) @ y_s - c2)
    return first @ (v12 @ b + c1), int(torch.linalg.matrix_rank(v22))


def kip_labels(phi_s: Tensor, gram: Tensor, moment: Tensor, lam: Tensor | float) -> tuple[Tensor, Tensor]:
    """One step of the paper's KIP baseline: labels re-solved on the whole training set, and the student; differentiable.

    Y_S = Y (M phi)^+ with M = (phi_S^T phi_S + lambda I)^-1 phi_S^T (m, p), written as R^T M^T (M G M^T)^+ so that
    nothing of the size of the training set appears: ``gram`` G = phi phi^T (p, p), ``moment`` R = phi Y^T (p, k).
    Returns Y_S (k, m) and W_S = Y_S M (k, p).
    """
    m = ridge.solve(ridge.regularised(phi_s.T @ phi_s, lam, scaled=False), phi_s.T)
    y_s = moment.T @ m.T @ torch.linalg.pinv(m @ gram @ m.T, hermitian=True)
    return y_s, y_s @ m


def privacy_noise(
    y_s: Tensor,
    y: Tensor,
    bound: float,
    sigma_min: float,
    epsilon: float,
    delta: float,
    standard: bool = True,
) -> float:
    """Standard deviation of Z that makes every row (epsilon, delta)-private at lambda = 0 (theorem 6.2).

    max_i c sqrt(ln(1.25 / delta)) B |[Y_S^+]_i Y| / (sigma_min^2 epsilon |[I - Y_S^+ Y_S]_i|), for inputs no longer than
    B and smallest singular value of the data sigma_min. c = 2 as printed; the Gaussian mechanism as usually stated
    (``standard``) needs 2 sqrt(2).

    Raises:
        CompanionError: with one point per class, where Z drops out and no privacy is possible.
    """
    pinv = torch.linalg.pinv(y_s)
    free = (torch.eye(len(pinv), dtype=pinv.dtype, device=pinv.device) - pinv @ y_s).norm(dim=1)
    if float(free.min()) < 1e-9:
        raise CompanionError(
            f"{len(pinv)} points for {len(y_s)} classes leave no room for noise; allowed: more points"
        )
    constant = 2 * math.sqrt((2 if standard else 1) * math.log(1.25 / delta))
    return float((constant * bound * (pinv @ y).norm(dim=1) / (sigma_min**2 * epsilon * free)).max())


guard(globals(), finite=True)
