"""Judgements on measured numbers: a claim, whether it held, and the numbers it was judged by.

The printed line holds only the judgement, which is the same on every machine; the numbers go to ``run.json``
and to the table of :func:`frame`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lib.system.errors import CompanionError

HELD, FAILED = "ok", "not at this scale"


@dataclass(frozen=True)
class Verdict:
    """One claim of a paper, checked."""

    text: str
    ok: bool
    numbers: dict = field(default_factory=dict)

    @property
    def line(self) -> str:
        """``ok  DM beats random`` or ``not at this scale  DM beats random``."""
        return f"{HELD if self.ok else FAILED}  {self.text}"


def judge_close(name: str, value: float, target: float, tol: float) -> Verdict:
    """``|value - target| <= tol``; false for a value that is not finite. ``tol`` must be positive."""
    if not tol > 0:
        raise CompanionError(f"the tolerance of {name!r} must be positive, not {tol!r}")
    value = float(value)
    numbers = {"value": value, "reference": float(target), "difference": value - target, "tolerance": tol}
    return Verdict(f"{name} within {tol:g} of {target:g}", abs(value - target) <= tol, numbers)


def judge_better(text: str, a: Sequence[float], b: Sequence[float], n_se: float = 2) -> Verdict:
    """``mean(a) - mean(b) > n_se * sqrt(var(a)/n_a + var(b)/n_b)`` with unbiased variances (Welch).

    Args:
        a, b: one accuracy per independent repetition (per distilled set, not per evaluation network: networks
            trained on the same set are not independent of one another), at least two each.

    Raises:
        CompanionError: for fewer than two repetitions on either side.
    """
    a, b = (np.asarray(values, dtype=float).ravel() for values in (a, b))
    if min(a.size, b.size) < 2:
        raise CompanionError(
            f"{text!r} needs at least 2 repetitions on both sides, not {a.size} and {b.size}"
        )
    difference = float(a.mean() - b.mean())
    error = math.sqrt(a.var(ddof=1) / a.size + b.var(ddof=1) / b.size)
    numbers = {"value": float(a.mean()), "reference": float(b.mean()), "difference": difference}
    numbers |= {"standard_error": error, "n_value": int(a.size), "n_reference": int(b.size)}
    plural = "" if n_se == 1 else "s"
    return Verdict(f"{text} by more than {n_se:g} standard error{plural}", difference > n_se * error, numbers)


def judge_better_paired(text: str, a: Sequence[float], b: Sequence[float], n_se: float = 2) -> Verdict:
    """``mean(a - b) > n_se * sqrt(var(a - b) / n)``: the same repetitions (the same sets, say) under two conditions.

    Raises:
        CompanionError: for fewer than two pairs, or lists of different lengths.
    """
    a, b = (np.asarray(values, dtype=float).ravel() for values in (a, b))
    if a.size != b.size or a.size < 2:
        raise CompanionError(f"{text!r} needs at least 2 pairs, not {a.size} and {b.size} values")
    differences = a - b
    error = float(differences.std(ddof=1)) / math.sqrt(a.size)
    numbers = {
        "value": float(a.mean()),
        "reference": float(b.mean()),
        "difference": float(differences.mean()),
    }
    numbers |= {
        "standard_error": error,
        "n_value": int(a.size),
        "n_reference": int(b.size),
        "pairs": int(a.size),
    }
    plural = "" if n_se == 1 else "s"
    return Verdict(
        f"{text} by more than {n_se:g} standard error{plural} (paired)",
        bool(differences.mean() > n_se * error),
        numbers,
    )


def frame(verdicts: Sequence[Verdict]):
    """One row per verdict with the numbers behind it; what is not in the common columns stands under ``other``."""
    import pandas as pd

    common = {"value": "value", "reference": "reference", "difference": "difference"}
    common |= {"standard_error": "standard error", "tolerance": "tolerance"}
    rows = []
    for verdict in verdicts:
        numbers = dict(verdict.numbers)
        row = {"verdict": HELD if verdict.ok else FAILED, "claim": verdict.text}
        row |= {name: numbers.pop(key) for key, name in common.items() if key in numbers}
        if "n_value" in numbers:
            row["n"] = f"{numbers.pop('n_value')} / {numbers.pop('n_reference')}"
        if numbers:
            row["other"] = ", ".join(
                f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in numbers.items()
            )
        rows.append(row)
    columns = ["verdict", "claim", *common.values(), "n", "other"]
    used = [name for name in columns if name in ("verdict", "claim") or any(name in row for row in rows)]
    return pd.DataFrame(rows, columns=used)
