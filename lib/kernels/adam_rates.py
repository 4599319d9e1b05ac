"""How RCIG's code finds the rate of a short Adam run on a quadratic (arXiv 2302.06755): by trials before the distillation, and by the
runs of the last iterations during it."""

from __future__ import annotations

from torch import Tensor

GROWTH, RETREAT, TRIALS = 1.2, 0.7, 100  # of a rate that is being tuned


def falls(seen: Tensor) -> bool:
    """Whether every value is below the one before."""
    return bool((seen[1:] < seen[:-1]).all())


def tuned(run, rate: float) -> float:
    """A fifth more after every trial, the first failing one included; then 0.7 times that: about the last that passed."""
    for _ in range(TRIALS):
        passed = falls(run(rate))
        rate *= GROWTH
        if not passed:
            break
    return rate * RETREAT


def adapted(above: float, fell: float) -> float:
    """The factor of a rate in use, by the shares of runs that ended above their start and that fell at every step."""
    if above >= 0.29:
        return 0.9
    return 1.05 if fell >= 0.7 else 1.0
