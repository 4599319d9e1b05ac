"""One file per paper. A method is a frozen dataclass: its fields are the paper's hyper-parameters, its functions
``begin``, ``step`` and ``finish`` are the algorithm; ``lib.distill.distill`` owns the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lib.errors import unknown

T = TypeVar("T")


def preset(table: Mapping[str, T], name: str, fallback: str = "paper") -> T:
    """A method's settings for a data set, or its published ones where the data set has none of its own.

    Raises:
        CompanionError: neither ``name`` nor ``fallback`` is in the table.
    """
    if name not in table and fallback not in table:
        raise unknown("preset", name, table)
    return table.get(name, table.get(fallback))
