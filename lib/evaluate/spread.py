"""One meaning of plus-minus: the spread of independent repetitions, made here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lib.system.errors import CompanionError


@dataclass(frozen=True)
class Spread:
    """Values of independent repetitions (one per distilled set, not per evaluation network: networks trained on one set share it).

    Attributes:
        values: in the order of the repetitions, so that two spreads over the same seeds can be compared pair by pair.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float], scale: float = 1.0) -> Spread:
        """Of numbers, tensors or arrays of one dimension; ``scale=100`` makes percent of fractions.

        Raises:
            CompanionError: for no value at all.
        """
        numbers = tuple(scale * float(value) for value in values)
        if not numbers:
            raise CompanionError("a spread of no values: at least 1 is needed")
        return cls(numbers)

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / self.n

    @property
    def sd(self) -> float:
        """Standard deviation with n - 1; nan for a single value, which has none."""
        if self.n < 2:
            return math.nan
        return math.sqrt(math.fsum((value - self.mean) ** 2 for value in self.values) / (self.n - 1))

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return self.sd / math.sqrt(self.n)

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 1, *, count: bool = False) -> str:
        """``86.2 ± 1.4``, with ``count`` ``86.2 ± 1.4 (n=3)``; a single value has no spread."""
        spread = f" ± {self.sd:.{digits}f}" if self.n > 1 else ""
        return f"{self.mean:.{digits}f}{spread}{f' (n={self.n})' if count else ''}"
