"""Judgements on measured numbers: what a paper claims, how it came out here, and the numbers it was judged by, in one line.

    confirmed        DM beats random on digits IPC 1 (Table 1) [86.2 ± 1.4 (n=3) against 64.8 ± 6.1 (n=8): +21.4, 95 % 16.1 to 26.7]
    not resolved     DSA beats DM on digits IPC 1 (Table 2) [86.0 ± 1.0 (n=3) against 86.2 ± 1.4 (n=3): -0.2, 95 % -3.0 to 2.6]
    not tested here  DM is cheap at IPC 1250 (section 4.2) [needs CIFAR-10 at paper scale]
    holds            the loss falls in every run [largest end = 0.2]

A *claim* is a sentence of a paper about which of two is better. It is *confirmed* where the 95 % interval of the difference lies on the
side that the paper says, *contradicted* where it lies on the other, *not resolved* where it covers zero: too few repetitions, or no
effect. A *check* is an identity, a cost or a sanity test: it holds or fails, and is counted apart.

The judgement is the same on every machine; the numbers, which are not, stand in square brackets at the end of the line, where
the test of the notebooks drops them (``tests/nbval_sanitize.cfg``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

from lib.evaluate.spread import Spread, spread_of
from lib.system.errors import CompanionError

CONFIRMED, CONTRADICTED, UNRESOLVED, UNTESTED = "confirmed", "contradicted", "not resolved", "not tested here"
CLAIMS = (CONFIRMED, CONTRADICTED, UNRESOLVED, UNTESTED)
HOLDS, FAILS = "holds", "fails"
CHECKS = (HOLDS, FAILS)
WIDTH = max(map(len, CLAIMS))  # of the column of judgements
LEVEL = 0.95  # of the intervals


@dataclass(frozen=True)
class Verdict:
    """One claim of a paper, or one check, judged.

    Attributes:
        outcome: one of :data:`CLAIMS` or :data:`CHECKS`.
        source: section or table of the paper whose sentence it is; "" for a check.
        numbers: what it was judged by, for ``run.json``; shown: the same for a reader, "" for the numbers themselves.
    """

    text: str
    outcome: str
    source: str = ""
    numbers: dict = field(default_factory=dict)
    shown: str = ""

    @property
    def ok(self) -> bool:
        """Whether the claim is confirmed or the check holds."""
        return self.outcome in (CONFIRMED, HOLDS)

    @property
    def said(self) -> str:
        """Claim, source, and the numbers in square brackets."""
        shown = self.shown or ", ".join(f"{name} = {_number(value)}" for name, value in self.numbers.items())
        return self.text + (f" ({self.source})" if self.source else "") + (f" [{shown}]" if shown else "")

    @property
    def line(self) -> str:
        """Judgement, then :attr:`said`."""
        return f"{self.outcome:<{WIDTH}}  {self.said}"


def judge_check(text: str, ok: bool, **numbers) -> Verdict:
    """A check that somebody else has made; ``numbers`` (or results, Spreads) are what it was judged by."""
    known = {name: getattr(value, "spread", value) for name, value in numbers.items()}
    return Verdict(text, HOLDS if ok else FAILS, numbers=known)


def judge_close(text: str, value, target: float, tol: float) -> Verdict:
    """The check ``|value - target| <= tol``; fails for a value that is not finite. ``tol`` must be positive.

    Args:
        value: a number, or a result or Spread, whose mean is taken.
    """
    if not tol > 0:
        raise CompanionError(f"the tolerance of {text!r} must be positive, not {tol!r}")
    spread = Spread.of([value]) if isinstance(value, (int, float, np.number)) else spread_of(value, "close")
    mean = spread.mean
    numbers = {"value": mean, "reference": float(target), "difference": mean - target, "tolerance": tol}
    shown = _number(mean) if spread.n == 1 else spread.text(count=True)
    outcome = HOLDS if abs(mean - target) <= tol else FAILS
    return Verdict(f"{text} within {tol:g} of {target:g}", outcome, numbers=numbers, shown=shown)


def judge_untested(text: str, source: str, needs: str) -> Verdict:
    """A claim of the paper that cannot be judged here, and what judging it would need."""
    return Verdict(text, UNTESTED, source, {"needs": needs}, f"needs {needs}")


def judge_better(
    text: str, a, b, source: str, *, lower: bool = False, paired: bool = False, digits: int = 1
) -> Verdict:
    r"""The claim that a is better than b, judged by Student's 95 % interval of the difference $d$ of the means.

    Independent repetitions (Welch): $d \pm t_\nu\sqrt{s_a^2/n_a + s_b^2/n_b}$ with the degrees of freedom $\nu$ of Welch and
    Satterthwaite. Paired, the same repetitions (the same sets, say) under two conditions: the same of the n differences, with
    $\nu = n - 1$. The effect size is d over the pooled standard deviation (Cohen), of pairs over that of the differences.

    Args:
        a, b: results or Spreads, at least two repetitions each.
        source: section or table of the paper that claims it.
        lower: smaller is better, as of losses and gaps.
        digits: decimals of the numbers in the line.
    Raises:
        CompanionError: no source; too few repetitions; paired repetitions whose numbers differ or whose values are not known.
    """
    if not source.strip():
        raise CompanionError(f"the claim {text!r} needs its source, such as 'Table 2' or 'section 4.1'")
    a, b = spread_of(a, f"{text!r}"), spread_of(b, f"{text!r}")
    difference, error, freedom, unit = _paired(text, a, b) if paired else _welch(text, a, b)
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error if error > 0 else 0.0
    low, high = difference - half, difference + half
    outcome = CONFIRMED if low > 0 else CONTRADICTED if high < 0 else UNRESOLVED
    if lower and outcome != UNRESOLVED:
        outcome = CONTRADICTED if outcome == CONFIRMED else CONFIRMED
    numbers = {"value": a.mean, "reference": b.mean, "difference": difference, "standard_error": error}
    numbers |= {"low": low, "high": high, "effect": difference / unit if unit > 0 else math.nan}
    numbers |= {"n_value": a.n, "n_reference": b.n} | ({"pairs": a.n} if paired else {})
    shown = (
        f"{a.text(digits, count=True)} against {b.text(digits, count=True)}{', paired' if paired else ''}: "
    )
    shown += f"{difference:+.{digits}f}, {LEVEL:.0%} {low:.{digits}f} to {high:.{digits}f}".replace("%", " %")
    return Verdict(text, outcome, source, numbers, shown)


def _welch(text: str, a: Spread, b: Spread) -> tuple[float, float, float, float]:
    if min(a.n, b.n) < 2:
        raise CompanionError(f"{text!r} needs at least 2 repetitions on both sides, not {a.n} and {b.n}")
    va, vb = a.se**2, b.se**2
    spread = va**2 / (a.n - 1) + vb**2 / (b.n - 1)
    freedom = (va + vb) ** 2 / spread if spread > 0 else a.n + b.n - 2
    pooled = math.sqrt(((a.n - 1) * a.sd**2 + (b.n - 1) * b.sd**2) / (a.n + b.n - 2))
    return a.mean - b.mean, math.hypot(a.se, b.se), freedom, pooled


def _paired(text: str, a: Spread, b: Spread) -> tuple[float, float, float, float]:
    if len(a.values) != len(b.values) or len(a.values) < 2:
        raise CompanionError(
            f"{text!r} needs at least 2 pairs, not {len(a.values)} and {len(b.values)} values"
        )
    gap = Spread.of(x - y for x, y in zip(a.values, b.values, strict=True))
    return gap.mean, gap.se, gap.n - 1, gap.sd


def tally(verdicts: Iterable[Mapping]) -> dict[str, int]:
    """How often each outcome occurs among verdicts as ``run.json`` holds them; all outcomes, in order."""
    outcomes = [verdict["outcome"] for verdict in verdicts]
    return {outcome: outcomes.count(outcome) for outcome in CLAIMS + CHECKS}


def _number(value) -> str:
    if isinstance(value, Spread):
        return value.text(count=True)
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
