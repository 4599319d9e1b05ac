r"""Optimal transport between the embedded class batches of S and T: exact, entropic, sliced, one-dimensional, Gaussian.

Embeddings are ``(C, n, d)`` for the real and ``(C, m, d)`` for the synthetic images; distances are ``(C,)``. Weights are ``(n,)``
or ``(C, n)`` and sum to 1; default: uniform. A plan P is ``(C, n, m)`` with P 1 = a (real) and P^T 1 = b (synthetic).

Gradients follow the envelope theorem: the optimal plan is a constant, only the cost under it is differentiated.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match.mmd import distances, squared_distances
from lib.system.errors import CompanionError, unknown
from lib.system.tensors import guard


def cost_matrix(x: Tensor, y: Tensor, p: int = 2) -> Tensor:
    r"""$\lVert x_i-y_j\rVert^p$ for p = 1 (Euclidean) or 2 (its square), ``(C, n, m)``."""
    if p not in (1, 2):
        raise unknown("transport exponent p", p, ("1", "2"))
    return distances(x, y) if p == 1 else squared_distances(x, y)


def _weights(weights: Tensor | None, points: Tensor) -> Tensor:
    """``(C, n)`` in float64."""
    count = points.shape[-2]
    if weights is None:
        return torch.full(points.shape[:-1], 1 / count, dtype=torch.float64, device=points.device)
    if weights.shape[-1] != count:
        raise CompanionError(
            f"{weights.shape[-1]} weights for {count} points: allowed is one weight per point"
        )
    return weights.to(points.device, torch.float64).expand(points.shape[:-1])


def _finite(x: Tensor, y: Tensor) -> None:
    if not (x.isfinite().all() and y.isfinite().all()):
        raise CompanionError("features hold NaN or infinite values: transport needs finite ones")


# ---------------------------------------------------------------- exact (linear program)


def exact_plan(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Optimal plan and dual potentials, by POT's network simplex in float64 on the CPU, class by class.

    Args:
        cost: ``(C, n, m)``; a: ``(C, n)``; b: ``(C, m)``.
    Returns:
        Plan ``(C, n, m)`` and potentials f ``(C, n)``, g ``(C, m)``: $f_i+g_j\le M_{ij}$ and
        $\langle P,M\rangle=\langle a,f\rangle+\langle b,g\rangle$. In the cost's dtype and on its device.
    Raises:
        CompanionError: if POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise CompanionError(
            "exact transport needs the package POT (import ot), which is not installed here; "
            "without it: sinkhorn, sliced, or transport in one dimension"
        ) from error

    arrays = [v.detach().double().cpu().numpy() for v in (cost, a, b)]
    solved = []
    for one, row, column in zip(*arrays, strict=True):
        column = column * (row.sum() / column.sum())  # the solver compares the two sums
        plan, log = ot.emd(row, column, one, numItermax=1_000_000, log=True)
        solved.append((plan, log["u"], log["v"]))
    return tuple(
        torch.stack([torch.as_tensor(v) for v in part]).to(cost) for part in zip(*solved, strict=True)
    )


def wasserstein(
    real: Tensor, syn: Tensor, p: int = 2, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    r"""$W_p^p$ = $\min_P\langle P, \lVert x_i-y_j\rVert^p\rangle$ for p = 1 or 2, ``(C,)``: exact, not rooted.

    The gradient of p = 2 with respect to a synthetic point is $2(b_jy_j-\sum_iP_{ij}x_i)$; that of p = 1 is at most $b_j$ long.
    """
    _finite(real, syn)
    with torch.no_grad():
        cost = cost_matrix(real.double(), syn.double(), p)
        plan, _, _ = exact_plan(cost, _weights(a, real), _weights(b, syn))
    return (plan.to(real) * cost_matrix(real, syn, p)).sum((-2, -1))


def wasserstein_dual(
    real: Tensor, syn: Tensor, p: int = 1, a: Tensor | None = None, b: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""$\max_{f_i+g_j\le M_{ij}}\langle a,f\rangle+\langle b,g\rangle$, equal to :func:`wasserstein`: value ``(C,)``, f and g."""
    _finite(real, syn)
    real, syn = real.detach().double(), syn.detach().double()
    a, b = _weights(a, real), _weights(b, syn)
    _, f, g = exact_plan(cost_matrix(real, syn, p), a, b)
    return (a * f).sum(-1) + (b * g).sum(-1), f, g


def lipschitz_extension(points: Tensor, syn: Tensor, g: Tensor) -> Tensor:
    r"""$\theta(z)=\min_j(\lVert z-y_j\rVert-g_j)$, ``(C, k)``: the 1-Lipschitz witness of $W_1$ from its dual potential g.

    $\sum_i a_i\theta(x_i)-\sum_j b_j\theta(y_j) = W_1$ (Kantorovich-Rubinstein).
    """
    return (distances(points, syn) - g.unsqueeze(-2)).min(-1).values


def witness_gap(
    values_real: Tensor, values_syn: Tensor, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    r"""$\mathbb E_T\theta-\mathbb E_S\theta$ of a critic's values ``(C, n)`` and ``(C, m)``: at most $W_1$ if 1-Lipschitz."""

    def mean(values: Tensor, weights: Tensor | None) -> Tensor:
        return values.mean(-1) if weights is None else (weights * values).sum(-1)

    return mean(values_real, a) - mean(values_syn, b)


# ---------------------------------------------------------------- entropic (Sinkhorn)


@dataclass(frozen=True)
class Entropic:
    r"""Solution of $OT_\varepsilon=\min_P\langle P,M\rangle+\varepsilon\,\mathrm{KL}(P\|ab^\top)$, detached, per class."""

    plan: Tensor  # (C, n, m)
    f: Tensor  # (C, n)
    g: Tensor  # (C, m)
    transport: Tensor  # (C,), <P, M>
    objective: Tensor  # (C,), OT_eps as the dual value <a, f> + <b, g>
    error: Tensor  # (C,), L1 error of the plan's marginals
    sweeps: int


def _soft_min(cost: Tensor, potential: Tensor, weights: Tensor, eps: Tensor) -> Tensor:
    r"""$-\varepsilon\,\mathrm{LSE}_j[\log w_j+(h_j-M_{ij})/\varepsilon]$, ``(C, n)``."""
    inner = weights.log().unsqueeze(-2) + (potential.unsqueeze(-2) - cost) / eps.unsqueeze(-1)
    return -eps * inner.logsumexp(-1)


def default_tolerance(cost: Tensor) -> float:
    """L1 error of a plan's marginals that its number format allows."""
    return 1e-6 if cost.dtype == torch.float64 else 1e-4


def _not_converged(error: Tensor, sweeps: int, tolerance: float) -> None:
    message = f"Sinkhorn stopped after {sweeps} sweeps with marginal error {error.max().item():.3g}"
    warnings.warn(f"{message} (tolerance {tolerance:g})", stacklevel=3)


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    tolerance: float | None = None,
    sweeps: int = 1000,
    symmetric: bool = False,
    warn: bool = True,
) -> Entropic:
    r"""Log-domain Sinkhorn for C problems at once, with $\varepsilon$ annealed from max M (halved per sweep).

    Args:
        cost, a, b: ``(C, n, m)``, ``(C, n)``, ``(C, m)``.
        eps: absolute regularisation, a number or ``(C,)``, > 0.
        tolerance: stop once the L1 error of every plan's marginals is below it (looked at every tenth sweep); default:
            1e-6 in float64, 1e-4 in float32, which the rounding of the exponents allows.
        symmetric: the cost is a set against itself and a = b: one potential with the averaged update, which needs tens of
            sweeps where alternating updates need thousands.
        warn: say so if it does not converge; without it the caller looks at the result's ``error``.
    Warns:
        UserWarning: with the marginal error, if the tolerance is not reached within ``sweeps``.
    """
    cost, a, b = cost.detach(), a.to(cost), b.to(cost)
    if tolerance is None:
        tolerance = default_tolerance(cost)
    eps = torch.as_tensor(eps, dtype=cost.dtype, device=cost.device).expand(len(cost)).unsqueeze(-1)  # (C, 1)
    if not (eps > 0).all():
        raise CompanionError(
            f"Sinkhorn regularisation {eps.min().item():g} is not allowed: it must be positive"
        )
    current = torch.maximum(eps, cost.amax((-2, -1)).unsqueeze(-1))
    f, g, flipped = torch.zeros_like(a), torch.zeros_like(b), cost.transpose(-1, -2)
    for sweep in range(1, sweeps + 1):
        if symmetric:
            f = g = 0.5 * (f + _soft_min(cost, f, a, current))
        else:
            f = _soft_min(cost, g, b, current)
            g = _soft_min(flipped, f, a, current)
        at_target = sweep % 10 == 0 and bool((current == eps).all())
        if at_target and _marginal_error(_plan(cost, f, g, a, b, eps), a, b).max() < tolerance:
            break
        current = torch.maximum(eps, current / 2)
    plan = _plan(cost, f, g, a, b, eps)
    error = _marginal_error(plan, a, b)
    if warn and not error.max() < tolerance:
        _not_converged(error, sweeps, tolerance)
    objective = (a * f).sum(-1) + (b * g).sum(-1)
    return Entropic(plan, f, g, (plan * cost).sum((-2, -1)), objective, error, sweep)


def _plan(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> Tensor:
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps.unsqueeze(-1)
    return a.unsqueeze(-1) * b.unsqueeze(-2) * exponent.exp()


def _marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows, columns = (plan.sum(-1) - a).abs().sum(-1), (plan.sum(-2) - b).abs().sum(-1)
    return torch.maximum(rows, columns)


def sinkhorn_divergence(
    real: Tensor,
    syn: Tensor,
    eps: float | Tensor | None = None,
    p: int = 2,
    a: Tensor | None = None,
    b: Tensor | None = None,
    tolerance: float | None = None,
    sweeps: int = 1000,
) -> Tensor:
    r"""$S_\varepsilon=OT_\varepsilon(T,S)-\frac12OT_\varepsilon(T,T)-\frac12OT_\varepsilon(S,S)$, ``(C,)`` (Feydy et al. 2019).

    Not negative up to the tolerance and 0 for equal sets; without the self terms the atoms of S shrink to the mean.
    Goes to $W_p^p$ for small $\varepsilon$ and, for p = 2, to DM's squared distance of the means for large.

    Args:
        eps: absolute; default: 0.05 times the median cost of the class's batch, detached.
    Warns:
        UserWarning: as :func:`sinkhorn`.
    """
    value, error = divergence_and_error(real, syn, eps, p, a, b, tolerance, sweeps)
    tolerance = tolerance or default_tolerance(value)
    if not error.max() < tolerance:
        _not_converged(error, sweeps, tolerance)
    return value


def divergence_and_error(
    real: Tensor,
    syn: Tensor,
    eps: float | Tensor | None = None,
    p: int = 2,
    a: Tensor | None = None,
    b: Tensor | None = None,
    tolerance: float | None = None,
    sweeps: int = 1000,
    relative: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """:func:`sinkhorn_divergence` and the largest marginal error of its three plans, both ``(C,)``; nothing is warned of.

    Args:
        relative: without ``eps``, the regularisation as a multiple of the median cost.
    """
    _finite(real, syn)
    a, b = _weights(a, real), _weights(b, syn)
    cost = cost_matrix(real, syn, p)
    if eps is None:
        median = cost.detach().flatten(1).median(1).values
        eps = relative * torch.where(median > 0, median, 1)  # coinciding points have no scale
    parts, errors = [], []
    for matrix, left, right, same in (
        (cost, a, b, False),
        (cost_matrix(real, real, p), a, a, True),
        (cost_matrix(syn, syn, p), b, b, True),
    ):
        solved = sinkhorn(matrix, left, right, eps, tolerance, sweeps, symmetric=same, warn=False)
        under_plan = (solved.plan * matrix).sum((-2, -1))
        # the value, with the envelope's gradient
        parts.append(solved.objective + under_plan - under_plan.detach())
        errors.append(solved.error)
    return parts[0] - 0.5 * parts[1] - 0.5 * parts[2], torch.stack(errors).amax(0)


# ---------------------------------------------------------------- one dimension and slices


def wasserstein_1d(
    x: Tensor, y: Tensor, p: int = 2, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    r"""$\int_0^1|Q_x(u)-Q_y(u)|^p\,du$ of points on a line, ``(..., n), (..., m) -> (...)``; weights as the points, or None.

    Uniform weights and n a multiple of m: the sorted points side by side; otherwise both cumulative weights are merged.
    """
    n, m = x.shape[-1], y.shape[-1]
    (x, order_x), (y, order_y) = x.sort(-1), y.sort(-1)
    if a is None and b is None and (n % m == 0 or m % n == 0):
        x = x.repeat_interleave(max(m // n, 1), -1)
        return (x - y.repeat_interleave(max(n // m, 1), -1)).abs().pow(p).mean(-1)
    grid_x, grid_y = _cumulative(a, order_x, x), _cumulative(b, order_y, y)
    levels = torch.cat([grid_x, grid_y], -1).sort(-1).values  # (..., n + m)
    widths = levels.diff(dim=-1, prepend=torch.zeros_like(levels[..., :1]))
    i = torch.searchsorted(grid_x, levels).clamp(max=n - 1)
    j = torch.searchsorted(grid_y, levels).clamp(max=m - 1)
    return (widths * (x.gather(-1, i) - y.gather(-1, j)).abs().pow(p)).sum(-1)


def _cumulative(weights: Tensor | None, order: Tensor, points: Tensor) -> Tensor:
    """Cumulative weight of the sorted points, in their shape, ending at 1."""
    if weights is None:
        count = points.shape[-1]
        grid = torch.arange(1, count + 1, dtype=points.dtype, device=points.device) / count
        return grid.expand(points.shape).contiguous()
    total = weights.to(points).expand(points.shape).gather(-1, order).cumsum(-1)
    return total / total[..., -1:]


def directions(dim: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform unit vectors as columns, ``(dim, count)``, in the dtype and on the device of ``like``."""
    normal = torch.randn(dim, count, generator=generator, device=generator.device).to(like)
    return F.normalize(normal, dim=0)


def sliced(
    real: Tensor,
    syn: Tensor,
    columns: Tensor,
    p: int = 2,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    r"""$W_p^p$ of the projections on each column of ``(d, L)``, ``(C, L)``; $SW_p^p$ is their mean (Bonneel et al. 2015)."""
    x, y = ((points @ columns).transpose(-1, -2) for points in (real, syn))  # (C, L, n)
    a, b = (None if w is None else w.unsqueeze(-2) for w in (a, b))
    return wasserstein_1d(x, y, p, a, b)


# ---------------------------------------------------------------- Gaussians


def gaussian_w2(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    r"""$W_2^2$ of two Gaussians.

    $\lVert\delta\rVert^2+\mathrm{tr}(\Sigma_1+\Sigma_2-2(\Sigma_1^{1/2}\Sigma_2\Sigma_1^{1/2})^{1/2})$.

    Means are ``(..., d)``, covariances ``(..., d, d)``.
    """
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum(-1)
    traces = (cov_x + cov_y).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean_x - mean_y).square().sum(-1) + traces - 2 * cross


def bures(real: Tensor, syn: Tensor) -> Tensor:
    """:func:`gaussian_w2` of the fitted moments (biased covariances), ``(C,)``: a lower bound of the exact $W_2^2$."""

    def covariance(points: Tensor) -> Tensor:
        centred = points - points.mean(-2, keepdim=True)
        return centred.transpose(-1, -2) @ centred / points.shape[-2]

    return gaussian_w2(real.mean(-2), covariance(real), syn.mean(-2), covariance(syn))


guard(globals())
