r"""Free-support Wasserstein barycenter of one cloud of points: m atoms that stand for n points (WMDD, Cuturi & Doucet 2014).

$$\min_{B,w}\ W_2^2\Big(\sum_j w_j\delta_{B_j},\ \tfrac1n\sum_i\delta_{F_i}\Big)=\min_{B,w}\min_{T1=w,\,T^\top1=1/n}
 \sum_{ji}T_{ji}\lVert B_j-F_i\rVert^2 .$$

For fixed weights and plan the best atoms are $B_j=\frac1{w_j}\sum_iT_{ji}F_i$; with $w=1/m$ the alternation of exact plan and
that update is Lloyd's algorithm with clusters of equal mass (mode ``uniform``, what the published code does). For fixed atoms
the best weights are the masses of the Voronoi cells, and the joint optimum is k-means (mode ``alternating``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.match import mmd
from lib.system.errors import CompanionError, unknown
from lib.system.tensors import guard

STILL = 1e-20  # a squared move below which the atoms have not moved but for rounding
MODES = ("uniform", "alternating", "official_weighted")


class Barycenter(NamedTuple):
    r"""What a barycenter is, and how it came about.

    Attributes:
        atoms, weights: ``(m, d)`` and ``(m,)``, in the points' dtype and on their device.
        costs: the transport cost at the start and after every iteration, ``(k + 1,)`` float64 on the CPU.
        moves: $\lVert B_{new}-B_{old}\rVert_F^2$ of every iteration, ``(k,)`` likewise.
    """

    atoms: Tensor
    weights: Tensor
    costs: Tensor
    moves: Tensor


def barycenter(
    points: Tensor,
    atoms: int,
    mode: str = "uniform",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    iterations: int = 100,
    tolerance: float = 1e-7,
    rounds: int = 10,
) -> Barycenter:
    r"""The barycenter with ``atoms`` atoms of the points ``(n, d)`` at weight 1 / n; float64 on the CPU inside.

    Args:
        mode: ``uniform``: weights 1 / m, at most ``iterations`` moves until one is below ``tolerance``;
            ``alternating``: ``rounds`` times Voronoi weights and cell means (an empty cell begins anew at the farthest point);
            ``official_weighted``: the published option for weights, for comparison only. Its constant step oscillates, and its
            ten moves of a fifth leave $0.8^{10}$ of the start in the answer.
        start: initial atoms ``(m, d)``; without it m distinct points drawn by ``generator``.
    Raises:
        CompanionError: unknown mode; m outside 1 to n; neither start nor generator; points that are not finite.
    """
    if mode not in MODES:
        raise unknown("barycenter mode", mode, MODES)
    if isinstance(atoms, bool) or not isinstance(atoms, int) or not 1 <= atoms <= len(points):
        raise CompanionError(f"{atoms!r} atoms for {len(points)} points: allowed 1 to {len(points)}")
    if not points.isfinite().all():
        raise CompanionError("features hold NaN or infinite values: a barycenter needs finite ones")
    if start is None:
        if generator is None:
            raise CompanionError("a barycenter needs its initial atoms, or a generator that draws them")
        rows = torch.randperm(len(points), generator=generator, device=generator.device)[:atoms]
        start = points[rows.to(points.device)]
    if start.shape != (atoms, points.shape[1]):
        raise CompanionError(
            f"initial atoms of shape {tuple(start.shape)}: allowed ({atoms}, {points.shape[1]})"
        )
    cloud, begin = (v.detach().double().cpu().numpy() for v in (points, start))
    solve = {"uniform": _uniform, "alternating": _alternating, "official_weighted": _official}[mode]
    b, w, costs, moves = solve(_Cloud(cloud), begin, iterations, tolerance, rounds)
    b, w = (torch.from_numpy(np.ascontiguousarray(v)).to(points) for v in (b, w))
    return Barycenter(b, w, *(torch.tensor(v, dtype=torch.float64) for v in (costs, moves)))


class _Cloud:
    """The points F, n of them at weight 1 / n, with their squared lengths."""

    def __init__(self, points: np.ndarray):
        self.points, self.lengths = points, np.square(points).sum(1)[:, None]
        self.mass = np.full(len(points), 1 / len(points))

    def cost(self, atoms: np.ndarray) -> np.ndarray:
        """Squared distances ``(n, m)``: the longer side first, which the solver takes a third less time for."""
        squares = self.points @ (-2 * atoms.T)
        squares += self.lengths
        squares += np.square(atoms).sum(1)
        return np.maximum(squares, 0, out=squares)

    def plan(self, weights: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Exact plan ``(n, m)``, its cost, and the potential of the atoms ``(m,)``."""
        plan, log = _solver()(self.mass, weights / weights.sum(), cost, numItermax=1_000_000, log=True)
        return plan, float(log["cost"]), log["v"]


def _solver():
    try:
        import ot
    except ImportError as error:
        raise CompanionError(
            "an exact barycenter needs the package POT (import ot), which is not installed here; "
            "without it: mode='alternating'"
        ) from error
    return ot.emd


def _free_support(cloud: _Cloud, atoms, weights, iterations: int, tolerance: float):
    """Lloyd's algorithm with clusters of the given masses: atoms, costs, moves."""
    plan, cost, _ = cloud.plan(weights, cloud.cost(atoms))
    costs, moves = [cost], []
    while len(moves) < iterations:
        new = (plan.T @ cloud.points) / weights[:, None]
        moves.append(float(np.square(new - atoms).sum()))
        atoms = new
        if moves[-1] > STILL:  # else the plan, and with it the cost, is the one we have
            plan, cost, _ = cloud.plan(weights, cloud.cost(atoms))
        costs.append(cost)
        if moves[-1] <= tolerance:
            break
    return atoms, costs, moves


def _uniform(cloud: _Cloud, atoms, iterations: int, tolerance: float, rounds: int):
    weights = np.full(len(atoms), 1 / len(atoms))
    atoms, costs, moves = _free_support(cloud, atoms, weights, iterations, tolerance)
    return atoms, weights, costs, moves


def _alternating(cloud: _Cloud, atoms, iterations: int, tolerance: float, rounds: int):
    costs, moves = [], []
    for last in [False] * rounds + [True]:
        cost = cloud.cost(atoms)
        nearest = cost.argmin(1)
        distance = cost[np.arange(len(nearest)), nearest]
        costs.append(float(distance.mean()))
        count = np.bincount(nearest, minlength=len(atoms))
        if last:
            return atoms, count / len(nearest), costs, moves
        member = np.eye(len(atoms))[:, nearest]  # (m, n)
        new = member @ cloud.points / np.maximum(count, 1)[:, None]
        empty = np.flatnonzero(count == 0)
        new[empty] = cloud.points[np.argsort(-distance, kind="stable")[: len(empty)]]
        moves.append(float(np.square(new - atoms).sum()))
        atoms = new


def _official(cloud: _Cloud, atoms, iterations: int, tolerance: float, rounds: int):
    weights, costs, moves = np.full(len(atoms), 1 / len(atoms)), [], []
    for _ in range(rounds):
        cost = cloud.cost(atoms)
        costs.append(cloud.plan(weights, cost)[1])
        new, _ = _mirror_descent(cloud, cost, 100, 10.0, decay=False)
        if np.linalg.norm(new - weights) < 1e-6:
            return atoms, weights, costs, moves
        weights = new
        target, _, _ = _free_support(cloud, atoms, weights, iterations, tolerance)
        moves.append(float(np.square(0.2 * (target - atoms)).sum()))
        atoms = 0.8 * atoms + 0.2 * target
    return atoms, weights, [*costs, cloud.plan(weights, cloud.cost(atoms))[1]], moves


def _mirror_descent(cloud: _Cloud, cost, steps: int, rate: float, decay: bool) -> tuple[np.ndarray, float]:
    r"""$w\leftarrow we^{-\eta u}/\lVert\cdot\rVert_1$ from uniform, u the potential of the atoms for the cost divided by its
    maximum; with ``decay`` $\eta_t=\eta/\sqrt t$ and the best weights seen. Weights and their cost (unscaled)."""
    top = cost.max()
    weights = np.full(cost.shape[1], 1 / cost.shape[1])
    best, least = weights, np.inf
    for step in range(1, steps + 1):
        _, value, u = cloud.plan(weights, cost / top)
        if value < least:
            best, least = weights, value
        new = weights * np.exp(-(rate / np.sqrt(step) if decay else rate) * (u - u.mean()))
        new = new / new.sum()
        moved = np.abs(new - weights).sum()
        weights = new
        if moved < 1e-9:
            break
    value = cloud.plan(weights, cost / top)[1]
    if decay and least < value:
        weights, value = best, least
    return weights, float(value * top)


def optimal_weights(
    points: Tensor, atoms: Tensor, steps: int = 100, rate: float = 1.0, decay: bool = True
) -> tuple[Tensor, float]:
    """Weights of fixed atoms by mirror descent on the dual, and their cost; without ``decay`` the published schedule.

    The exact optimum is the mass of the Voronoi cells: the share of the points that are nearest to each atom.
    """
    cloud = _Cloud(points.detach().double().cpu().numpy())
    weights, value = _mirror_descent(
        cloud, cloud.cost(atoms.detach().double().cpu().numpy()), steps, rate, decay
    )
    return torch.from_numpy(weights).to(points), value


def transport_cost(points: Tensor, atoms: Tensor, weights: Tensor) -> float:
    """$W_2^2$ of weighted atoms to the points at weight 1 / n, exact."""
    cloud = _Cloud(points.detach().double().cpu().numpy())
    weights, atoms = (v.detach().double().cpu().numpy() for v in (weights, atoms))
    return cloud.plan(weights, cloud.cost(atoms))[1]


def atom_potential(points: Tensor, atoms: Tensor, weights: Tensor) -> Tensor:
    """Dual potential of the atoms for the cost divided by its maximum, minus its mean, ``(m,)``."""
    cloud = _Cloud(points.detach().double().cpu().numpy())
    cost = cloud.cost(atoms.detach().double().cpu().numpy())
    u = cloud.plan(weights.detach().double().cpu().numpy(), cost / cost.max())[2]
    return torch.from_numpy(u - u.mean()).to(points)


def carried(points: Tensor, atoms: Tensor) -> Tensor:
    """Where the exact plan takes equally heavy atoms: the mean of the mass that each receives, ``(m, d)``.

    For several clouds the mean of these over the clouds is one step towards their common barycenter.
    """
    cloud, here = (_Cloud(v.detach().double().cpu().numpy()) for v in (points, atoms))
    plan, _, _ = cloud.plan(here.mass, cloud.cost(here.points))
    return torch.from_numpy((plan.T @ cloud.points) / here.mass[:, None]).to(atoms)


def mmd_atoms(points: Tensor, start: Tensor, steps: int = 60) -> Tensor:
    """Atoms that lower the squared MMD with a Gaussian kernel, for C clouds at once: ``(C, n, d)``, ``(C, m, d) -> (C, m, d)``.

    By Adam from ``start``, at a tenth of the points' standard deviation per step.
    """
    atoms = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([atoms], lr=0.1 * points.std().item())
    for _ in range(steps):
        (atoms.grad,) = torch.autograd.grad(mmd.mmd(points, atoms).sum(), atoms)
        optimiser.step()
    return atoms.detach()


guard(globals(), finite=True)
