"""What a paper published for a data set and a number of images per class: one row of a method's table.

    RECIPES = Recipes(
        small("digits", DM(iterations=200, ...)),                                     # ours, for small data, at any IPC
        published("cifar10 cifar100", (1, 10, 50), DM(), "dsa", "section 4.1"),       # the paper's, for these and no others
    )
    RECIPES.find(data.train, ipc=10).method

A missing row is an error that lists the rows: nothing falls back to another data set's or IPC's settings. Small data without a
row of its own takes the small row of the nearest image size, which the recipe's ``source`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lib.system.errors import CompanionError, unknown

TWO_CORES = "two cores"  # the variant of published data that a laptop distils
SIDES = {
    "digits": 8,
    "fashion14": 14,
    "photos16": 16,
    "fashionmnist": 28,
    "photos32": 32,
}  # of the data that small rows are written for


@dataclass(frozen=True)
class Recipe:
    """One row: settings of a method, and how its authors judged it.

    Attributes:
        data: name of the data set; ipc: images per class, None for any.
        method: the settings; variant: "" for the method as published, else the name of the variant.
        protocol: name of the evaluation that belongs to the row (``lib.evaluate.PROTOCOLS``, or an ``own-...`` one).
        source: section, table or script that says so.
        whiten: whitening of the data (``lib.data.load``), None for channel normalisation.
        small: ours, for two cores; not the paper's.
    """

    data: str
    ipc: int | None
    method: Any
    protocol: str
    source: str
    variant: str = ""
    whiten: str | None = None
    small: bool = False

    def __str__(self) -> str:
        variant = f" ({self.variant})" if self.variant else ""
        return f"{self.data}{'' if self.ipc is None else f' IPC {self.ipc}'}{variant}"


def small(
    data: str,
    method: Any,
    protocol: str = "cpu-small",
    *,
    ipc: int | None = None,
    variant: str = "",
    source: str = "chosen for two cores",
) -> list[Recipe]:
    """Our rows for small data sets (names separated by spaces), at any IPC or at this one."""
    return [Recipe(name, ipc, method, protocol, source, variant, small=True) for name in data.split()]


def two_cores(method: Any, *, ipc: int | None = None, protocol: str = "dc", source: str) -> list[Recipe]:
    """Our rows for the real Fashion-MNIST on a laptop, variant :data:`TWO_CORES`: of the published method as much as a core does in
    minutes."""
    return small("fashionmnist", method, protocol, ipc=ipc, variant=TWO_CORES, source=source)


def published(
    data: str,
    ipc: int | tuple[int, ...] | None,
    method: Any,
    protocol: str,
    source: str,
    *,
    variant: str = "",
    whiten: str | None = None,
) -> list[Recipe]:
    """The paper's rows: one for every data set (names separated by spaces) and IPC; None where the paper names none."""
    counts = ipc if isinstance(ipc, tuple) else (ipc,)
    return [
        Recipe(name, count, method, protocol, source, variant, whiten)
        for name in data.split()
        for count in counts
    ]


class Recipes:
    """The table of a method: what :func:`small` and :func:`published` give, in order."""

    def __init__(self, *groups: list[Recipe]):
        self.rows: dict[tuple[str, int | None, str], Recipe] = {}
        for row in (row for group in groups for row in group):
            key = (row.data, row.ipc, row.variant)
            if key in self.rows:
                raise CompanionError(f"two recipes for {row}: a data set, IPC and variant have one")
            self.rows[key] = row

    def __iter__(self) -> Iterator[Recipe]:
        return iter(self.rows.values())

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of all variants; "" is the method as published."""
        return tuple(dict.fromkeys(row.variant for row in self))

    def named(self, data: str, ipc: int | None = None, variant: str = "") -> Recipe:
        """The row of that data set and IPC, by name alone.

        Raises:
            CompanionError: there is none; the line lists the rows.
        """
        if variant not in self.variants:
            raise unknown("variant", variant, self.variants)
        row = self.rows.get((data, ipc, variant)) or self.rows.get((data, None, variant))
        if row is None:
            asked = f"{data}{'' if ipc is None else f' IPC {ipc}'}{f' ({variant})' if variant else ''}"
            raise CompanionError(f"no recipe for {asked}; there are recipes for {', '.join(map(str, self))}")
        return row

    def find(self, train, ipc: int, variant: str = "") -> Recipe:
        """The row for these training images (an ``ImageSet``): its data set's own, else, for small data, the one of the
        nearest image size.

        Raises:
            CompanionError: as :meth:`named`.
        """
        try:
            return self.named(train.name, ipc, variant)
        except CompanionError:
            mine = [row for row in self if row.small and row.variant == variant and row.ipc in (None, ipc)]
            if not train.small or not mine:
                raise
        nearest = min(mine, key=lambda row: (abs(SIDES[row.data] - train.size), SIDES[row.data], row.ipc is None))
        return replace(nearest, source=f"the small settings of {nearest.data} ({nearest.source})")
