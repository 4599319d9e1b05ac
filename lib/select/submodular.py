r"""Set functions of a similarity s and four ways to maximise them greedily (Iyer et al. 2021; DeepCore, arXiv 2204.08499).

A function object holds the set A picked so far: ``gains(candidates)`` is what each would add, ``add(pick)`` puts one into A.
Ties, up to rounding, go to the lowest index, so that all optimisers agree on which of two mutually nearest points they take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.select.greedy import check_budget
from lib.select.similarity import Pairwise, held
from lib.system.errors import CompanionError, unknown
from lib.system.tensors import guard


class FacilityLocation:
    r"""$f(A)=\sum_i\max_{a\in A}s_{ia}$ for $s\ge0$; gain $\sum_i[s_{ij}-m_i]_+$ with the running maximum m, 0 at first."""

    def __init__(self, similarity: Pairwise):
        self.similarity, self.nearest = held(similarity), torch.zeros_like(similarity.diagonal)

    def __len__(self) -> int:
        return len(self.similarity)

    def gains(self, candidates: Tensor) -> Tensor:
        parts = self.similarity.chunks(candidates)
        return torch.cat(
            [(self.similarity.columns(c) - self.nearest[:, None]).clamp_min_(0).sum(0) for c in parts]
        )

    def add(self, pick: Tensor) -> None:
        self.nearest = torch.maximum(self.nearest, self.similarity.columns(pick[None])[:, 0])


class GraphCut:
    r"""$f(A)=\lambda\sum_i\sum_{a}s_{ia}-\sum_{a,b}s_{ab}$; gain $\lambda\sum_is_{ij}-2\sum_{a}s_{aj}$.

    The gain's constant $-s_{jj}$ is left out, as in DeepCore. Not monotone: gains may become negative once A covers half.
    """

    def __init__(self, similarity: Pairwise, balance: float = 1.0):
        self.similarity = similarity
        sums = torch.cat([similarity.columns(c).sum(0) for c in similarity.chunks()])
        self.values = balance * sums

    def __len__(self) -> int:
        return len(self.similarity)

    def gains(self, candidates: Tensor) -> Tensor:
        return self.values[candidates]

    def add(self, pick: Tensor) -> None:
        self.values = self.values - 2 * self.similarity.columns(pick[None])[:, 0]


class LogDet:
    r"""$f(A)=\log\det S_A$; gain: the Schur complement $s_{jj}-s_{jA}S_A^{-1}s_{Aj}$ (its logarithm is what f grows by).

    ``variant="deepcore"`` returns $s_{jA}S_A^{-1}s_{Aj}$ as shipped: the sign is lost, and the most redundant point wins
    (such gains grow: :func:`lazy` does not hold for them).
    Complements come from a Cholesky factor that grows by one row ``(n,)`` per pick.
    """

    def __init__(self, similarity: Pairwise, variant: str = "paper"):
        if variant not in ("paper", "deepcore"):
            raise unknown("variant", variant, ("paper", "deepcore"))
        self.similarity, self.variant = similarity, variant
        self.schur = similarity.diagonal.clone()
        self.factor: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.similarity)

    def gains(self, candidates: Tensor) -> Tensor:
        schur = self.schur[candidates]
        return schur if self.variant == "paper" else self.similarity.diagonal[candidates] - schur

    def add(self, pick: Tensor) -> None:
        row = self.similarity.columns(pick[None])[:, 0]
        if self.factor:
            factor = torch.stack(self.factor)  # (t, n)
            row = row - factor[:, pick] @ factor
        if self.schur[pick] <= 0:  # a repetition of what is picked: it adds no row
            return
        row = row / self.schur[pick].sqrt()
        self.factor.append(row)
        self.schur = (self.schur - row.square()).clamp_min(0)


SetFunction = FacilityLocation | GraphCut | LogDet


@dataclass(frozen=True)
class Picks:
    """A greedy selection: positions in the order of picking, the gain of each at its step, and how many gains were computed."""

    order: Tensor
    gains: Tensor
    evaluations: int


def naive(function: SetFunction, budget: int) -> Picks:
    """All gains at every step."""
    everything = torch.arange(len(function), device=function.similarity.diagonal.device)
    return stochastic(function, budget, candidates=[everything] * budget)


def lazy(function: SetFunction, budget: int, accept: float = 1.0, batch: int = 16) -> Picks:
    r"""Minoux's lazy greedy: an old gain is an upper bound, so only the largest are recomputed until the largest is a new one.

    With ``accept`` $\beta<1$ it is approximate: a pick is taken as soon as its new gain is at least $\beta$ times the old one
    (DeepCore: 0.9). The order equals :func:`naive` for $\beta=1$. Worth it where a gain is dear (facility location); graph cut
    and log-det keep all their gains up to date.

    Args:
        batch: how many of the largest old gains are recomputed at one time; only for $\beta=1$, where the order stays the same.
    """
    check_budget(budget, len(function))
    old = function.gains(torch.arange(len(function), device=function.similarity.diagonal.device))
    order, gains, evaluations = [], [], len(function)
    known = torch.ones_like(old, dtype=torch.bool)  # gains that belong to the present step
    for step in range(budget):
        while not known[pick := first_largest(old)]:
            bound = old[pick].clone()
            block = pick[None]
            if accept == 1 and batch > 1:  # never more than what is left, so that nothing is picked twice
                block = torch.cat([block, old.topk(min(batch, len(old) - step) - 1).indices])
            old[block] = function.gains(block)
            known[block] = True
            evaluations += len(block)
            if accept < 1 and old[pick] >= accept * bound:
                break
        order.append(pick)
        gains.append(old[pick].clone())
        function.add(pick)
        old[pick] = -torch.inf
        known.zero_()
    return Picks(torch.stack(order), torch.stack(gains), evaluations)


def stochastic(
    function: SetFunction,
    budget: int,
    generator: torch.Generator | None = None,
    epsilon: float = 0.1,
    candidates: Sequence[Tensor] | None = None,
) -> Picks:
    r"""Greedy over a random sample of what is left, of constant size $\max(\mathrm{round}(-\ln\epsilon\cdot n/k),1)$.

    DeepCore's default $\epsilon=0.9$ makes that nearly a random choice; the literature uses 0.01 to 0.1.

    Args:
        candidates: the samples themselves, one ``(c,)`` per step, instead of drawn ones; what was picked before is left out.
    """
    count = len(function)
    check_budget(budget, count)
    size = max(round(-math.log(epsilon) * count / budget), 1)
    left = torch.ones(count, dtype=torch.bool, device=function.similarity.diagonal.device)
    order, gains, evaluations = [], [], 0
    for step in range(budget):
        if candidates is None:
            free = left.nonzero().flatten()
            sample = (
                free[torch.randperm(len(free), generator=generator, device=free.device)[:size]].sort().values
            )
        else:
            sample = candidates[step][left[candidates[step]]]
        values = function.gains(sample)
        at = first_largest(values)
        order.append(sample[at])
        gains.append(values[at])
        function.add(sample[at])
        left[sample[at]] = False
        evaluations += len(sample)
    return Picks(torch.stack(order), torch.stack(gains), evaluations)


OPTIMISERS = ("naive", "lazy", "approximate_lazy", "stochastic")


def maximise(
    function: SetFunction,
    budget: int,
    optimiser: str = "lazy",
    generator: torch.Generator | None = None,
    epsilon: float = 0.1,
) -> Picks:
    """One of the four greedy optimisers by name; ``approximate_lazy`` accepts a gain from 0.9 of its bound on."""
    if optimiser == "stochastic":
        return stochastic(function, budget, generator, epsilon)
    if optimiser in ("lazy", "approximate_lazy"):
        return lazy(function, budget, accept=0.9 if optimiser == "approximate_lazy" else 1.0)
    if optimiser == "naive":
        return naive(function, budget)
    raise unknown("optimiser", optimiser, OPTIMISERS)


def first_largest(values: Tensor) -> Tensor:
    """Index of the largest value; among those equal to it up to 16 units of rounding, the first."""
    top = values.max()
    if not torch.isfinite(top):
        raise CompanionError(f"a selection gain is {float(top)}: are the features finite?")
    slack = 16 * torch.finfo(values.dtype).eps * top.abs()
    return (values >= top - slack).to(torch.uint8).argmax()


def cluster_sizes(similarity: Pairwise, selected: Tensor, variant: str = "paper") -> Tensor:
    """CRAIG's weights (Mirzasoleiman et al. 2020): points whose most similar pick this is, ``(k,)``; they sum to n.

    Ties go to the pick with the lowest index. ``deepcore`` adds 1 to every weight, as shipped.
    """
    if variant not in ("paper", "deepcore"):
        raise unknown("variant", variant, ("paper", "deepcore"))
    ascending, place = selected.sort()
    owner = similarity.columns(ascending).argmax(1)
    sizes = torch.bincount(owner, minlength=len(selected)).to(similarity.diagonal.dtype)
    weights = torch.empty_like(sizes)
    weights[place] = sizes
    return weights if variant == "paper" else weights + 1


guard(globals(), finite=True)
