"""Kernel ridge regression: the solver that KIP, RFAD, FRePo and the closed forms share.

Data as rows: K_ts is (targets, support), labels are (support, classes). Predictions are

    y_hat_t = K_ts (K_ss + ridge I)^-1 y_s,    ridge = lambda tr(K_ss) / m  ("scaled", differentiable)  or  lambda.

Kernels may be 32-bit; the factorisation is always done in 64 bits, because lambda = 1e-6 lies below 32-bit rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.system.errors import CompanionError, check_several
from lib.system.tensors import guard


def regularised(k_ss: Tensor, lam: float, scaled: bool = True) -> Tensor:
    """K_ss + ridge I in 64 bits, (m, m); ``lam`` >= 0, times the mean of the diagonal if ``scaled``."""
    if not lam >= 0:
        raise CompanionError(f"ridge {float(lam):g}; allowed: 0 or more")
    k = k_ss.double()
    ridge = lam * k.diagonal().mean() if scaled else lam
    return k + ridge * torch.eye(len(k), dtype=k.dtype, device=k.device)


def condition(a: Tensor) -> float:
    """2-norm condition number of a symmetric matrix, inf where it is singular."""
    size = torch.linalg.eigvalsh(a.detach().double()).abs()
    return float(size.max() / size.min())


class Solve(torch.autograd.Function):
    """a^-1 b by the Cholesky factor of a, which the backward pass uses again: db = a^-1 dx, da = -db x^T."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        factor = cholesky(a)
        x = torch.cholesky_solve(b, factor)
        ctx.save_for_backward(factor, x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        factor, x = ctx.saved_tensors
        to_b = torch.cholesky_solve(grad, factor)
        return -to_b @ x.mT if ctx.needs_input_grad[0] else None, to_b


def solve(a: Tensor, b: Tensor) -> Tensor:
    """a^-1 b of a symmetric positive definite matrix by Cholesky in 64 bits, in the type of b. Differentiable once.

    Raises:
        CompanionError: with the condition number when ``a`` is not positive definite, and when it is not finite.
    """
    return Solve.apply(a.double(), b.double()).to(b.dtype)


def cholesky(a: Tensor) -> Tensor:
    """Lower factor of a symmetric positive definite matrix, without gradient.

    Raises:
        CompanionError: as :func:`solve`.
    """
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed or not factor.diagonal().isfinite().all():
        if not a.isfinite().all():
            bad = int((~a.isfinite()).sum())
            raise CompanionError(
                f"{bad} of {a.numel()} entries of the kernel are not finite; allowed: finite inputs"
            )
        raise CompanionError(
            f"the {len(a)}x{len(a)} kernel is not positive definite (condition number {condition(a):.1e}); "
            "allowed: distinct support points, or a larger ridge"
        )
    return factor


def predict(k_ts: Tensor, k_ss: Tensor, y_s: Tensor, lam: float = 1e-6, scaled: bool = True) -> Tensor:
    """K_ts (K_ss + ridge I)^-1 y_s, shape (targets, classes)."""
    return k_ts @ solve(regularised(k_ss, lam, scaled), y_s).to(k_ts.dtype)


def label_solve(k_ts: Tensor, k_ss: Tensor, y_t: Tensor, lam: float = 1e-6, scaled: bool = True) -> Tensor:
    """The labels (m, C) that minimise the loss of fixed support points: (K_ts (K_ss + ridge I)^-1)^+ y_t.

    Label Solve of KIP. Without gradient; the pseudo-inverse is taken in 64 bits. Singular values below the rounding error of
    the solution, eps times the condition number, count as zero: two copies of an image would otherwise get labels of 1e10.
    """
    with torch.no_grad():
        a = regularised(k_ss, lam, scaled)
        m = solve(a, k_ts.double().T).T
        noise = torch.finfo(m.dtype).eps * max(*m.shape, condition(a))
        return (torch.linalg.pinv(m, rtol=noise) @ y_t.double()).to(y_t.dtype)


def label_solve_regularised(k_ts: Tensor, k_ss: Tensor, y_t: Tensor, lam: float = 1e-6) -> Tensor:
    """KIP's published form (K_ss + r I) (K_st K_ts + r I)^-1 K_st y_t with r = lam / m, not scaled by the trace.

    It needs no matrix of the size of the targets but K_ts, and tends to :func:`label_solve` as lam -> 0.
    """
    with torch.no_grad():
        k, r = k_ts.double(), lam / len(k_ss)
        inner = solve(regularised(k.T @ k, r, scaled=False), k.T @ y_t.double())
        return (regularised(k_ss, r, scaled=False) @ inner).to(y_t.dtype)


def centred_one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One-hot minus 1/C: entries 1 - 1/C and -1/C, shape (n, C)."""
    return F.one_hot(labels.long(), classes).to(dtype) - 1 / classes


def accuracy(prediction: Tensor, labels: Tensor) -> float:
    """Share of rows, in [0, 1], whose largest entry is at the label (n,)."""
    return float((prediction.argmax(1) == labels).double().mean())


def mse(prediction: Tensor, y: Tensor) -> Tensor:
    """1/2 mean over targets and classes of the squared error (KIP, RFAD). FRePo sums over classes: C times this."""
    return (prediction - y).square().mean() / 2


def platt(prediction: Tensor, labels: Tensor, log_scale: Tensor) -> Tensor:
    """Cross-entropy of e^k times the predictions, k learned (RFAD's Platt scaling); labels (n,)."""
    return F.cross_entropy(log_scale.exp() * prediction, labels.long())


def lead(y: Tensor) -> Tensor:
    """Largest minus second largest entry of every row, ``(m, C)`` -> ``(m,)``."""
    check_several(y.shape[1], "the lead of a class over the next")
    first, second = y.topk(2, dim=1).values.unbind(1)
    return first - second


def margin(y: Tensor, wanted: float = 1.0) -> Tensor:
    """FRePo's label term: minus the mean over rows of min(largest - second largest entry, wanted / C); RCIG wants half; y (m, C)."""
    return -lead(y).clamp_max(wanted / y.shape[1]).mean()


guard(globals())
