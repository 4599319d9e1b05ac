"""One meaning of plus-minus: the spread of independent repetitions, made here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lib.system.errors import CompanionError


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of independent repetitions (one value per distilled set, not per evaluation network: networks
    trained on one set share it).

    Attributes:
        n: number of repetitions; 0 where a source does not state it.
        mean, sd: sd with n - 1; nan for a single value, which has none, and where a source states none.
        values: in the order of the repetitions, so that two spreads over the same seeds can be compared pair by pair; empty where
            only the moments are known (:meth:`stated`).
    """

    n: int
    mean: float
    sd: float
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float], scale: float = 1.0) -> Spread:
        """Of numbers, tensors or arrays of one dimension; ``scale=100`` makes percent of fractions.

        Raises:
            CompanionError: for no value at all.
        """
        numbers = tuple(scale * float(value) for value in values)
        if not numbers:
            raise CompanionError("a spread of no values: at least 1 is needed")
        n, mean = len(numbers), math.fsum(numbers) / len(numbers)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in numbers) / (n - 1)) if n > 1 else math.nan
        return cls(n, mean, sd, numbers)

    @classmethod
    def stated(cls, mean: float, sd: float | None = None, n: int = 0) -> Spread:
        """Of the moments that a table or a paper states."""
        return cls(int(n), float(mean), math.nan if sd is None else float(sd))

    @property
    def se(self) -> float:
        """Standard error of the mean; nan where it is not known."""
        return self.sd / math.sqrt(self.n) if self.n > 0 else math.nan

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 1, *, count: bool = False) -> str:
        """``86.2 ± 1.4``, with ``count`` ``86.2 ± 1.4 (n=3)``; a single value has no spread."""
        spread = f" ± {self.sd:.{digits}f}" if math.isfinite(self.sd) else ""
        return f"{self.mean:.{digits}f}{spread}{f' (n={self.n})' if count and self.n else ''}"


def spread_of(value: Any, where: str) -> Spread:
    """The spread itself, or that of a result or evaluation (their ``spread``).

    Raises:
        CompanionError: for anything else, such as a bare number; ``where`` says who asked.
    """
    found = getattr(value, "spread", value)
    if not isinstance(found, Spread):
        raise CompanionError(
            f"{where} takes results, evaluations or Spreads, not {type(value).__name__}; Spread.of([...]) makes one of numbers"
        )
    return found
