"""Judgements on measured numbers: a claim, whether it held, and the numbers it was judged by, in one line.

    confirmed      DM beats random real images on digits IPC 1 [86.2 ± 1.4 (n=3) against 64.8 ± 6.1 (n=8)]
    not confirmed  DSA beats DM on digits IPC 1 [86.0 ± 1.0 (n=3) against 86.2 ± 1.4 (n=3)]

The judgement is the same on every machine; the numbers, which are not, stand in square brackets at the end of the line, where
the test of the notebooks drops them (``tests/nbval_sanitize.cfg``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lib.evaluate.spread import Spread, spread_of
from lib.system.errors import CompanionError

HELD, FAILED = "confirmed", "not confirmed"


@dataclass(frozen=True)
class Verdict:
    """One claim of a paper, checked.

    Attributes:
        numbers: what it was judged by, for ``run.json``; shown: the same for a reader, "" for the numbers themselves.
    """

    text: str
    ok: bool
    numbers: dict = field(default_factory=dict)
    shown: str = ""

    @property
    def line(self) -> str:
        """Judgement, claim, and the numbers in square brackets."""
        shown = self.shown or ", ".join(f"{name} = {_number(value)}" for name, value in self.numbers.items())
        numbers = f" [{shown}]" if shown else ""
        return f"{HELD if self.ok else FAILED:<{len(FAILED)}}  {self.text}{numbers}"


def judge_close(text: str, value, target: float, tol: float) -> Verdict:
    """``|value - target| <= tol``; false for a value that is not finite. ``tol`` must be positive.

    Args:
        value: a number, or a result or Spread, whose mean is taken.
    """
    if not tol > 0:
        raise CompanionError(f"the tolerance of {text!r} must be positive, not {tol!r}")
    spread = Spread.of([value]) if isinstance(value, (int, float, np.number)) else spread_of(value, "close")
    mean = spread.mean
    numbers = {"value": mean, "reference": float(target), "difference": mean - target, "tolerance": tol}
    shown = _number(mean) if spread.n == 1 else spread.text(count=True)
    return Verdict(f"{text} within {tol:g} of {target:g}", abs(mean - target) <= tol, numbers, shown)


def judge_better(
    text: str, a, b, *, lower: bool = False, paired: bool = False, n_se: float = 2, digits: int = 1
) -> Verdict:
    """a is better than b by more than ``n_se`` standard errors of the difference.

    Independent repetitions: ``mean(a) - mean(b) > n_se * sqrt(var(a) / n_a + var(b) / n_b)`` with unbiased variances (Welch).
    Paired: ``mean(a - b) > n_se * sqrt(var(a - b) / n)``, the same repetitions (the same sets, say) under two conditions.

    Args:
        a, b: results or Spreads, at least two repetitions each.
        lower: smaller is better, as of losses and gaps.
        digits: decimals of the numbers in the line.
    Raises:
        CompanionError: too few repetitions; paired repetitions whose numbers differ or whose values are not known.
    """  # fmt: skip
    a, b = spread_of(a, f"{text!r}"), spread_of(b, f"{text!r}")
    difference, error = _paired(text, a, b) if paired else _welch(text, a, b)
    gain = -difference if lower else difference
    numbers = {"value": a.mean, "reference": b.mean, "difference": difference, "standard_error": error}
    numbers |= {"n_value": a.n, "n_reference": b.n} | ({"pairs": a.n} if paired else {})
    how = [] if n_se == 2 else [f"by more than {n_se:g} standard error{'' if n_se == 1 else 's'}"]
    shown = f"{a.text(digits, count=True)} against {b.text(digits, count=True)}{', paired' if paired else ''}"
    return Verdict(", ".join([text, *how]), bool(gain > n_se * error), numbers, shown)


def _welch(text: str, a: Spread, b: Spread) -> tuple[float, float]:
    if min(a.n, b.n) < 2:
        raise CompanionError(f"{text!r} needs at least 2 repetitions on both sides, not {a.n} and {b.n}")
    return a.mean - b.mean, math.hypot(a.se, b.se)


def _paired(text: str, a: Spread, b: Spread) -> tuple[float, float]:
    if len(a.values) != len(b.values) or len(a.values) < 2:
        raise CompanionError(
            f"{text!r} needs at least 2 pairs, not {len(a.values)} and {len(b.values)} values"
        )
    gap = Spread.of(x - y for x, y in zip(a.values, b.values, strict=True))
    return gap.mean, gap.se


def _number(value) -> str:
    if isinstance(value, Spread):
        return value.text(count=True)
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
