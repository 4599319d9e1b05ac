"""Errors that a user caused: one line that names the bad value and what is allowed."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable


class CompanionError(ValueError):
    """A mistake in the input, told in one line; command-line tools print it without a traceback."""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> CompanionError:
    """The error for a name that does not exist: ``unknown dataset 'digit' (did you mean 'digits'?); allowed: digits, ...``."""
    names = sorted(str(name) for name in allowed)
    folded = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(str(value).lower(), folded, n=1)
    hint = f" (did you mean {folded[close[0]]!r}?)" if close else ""
    return CompanionError(f"unknown {kind} {value!r}{hint}; allowed: {', '.join(names)}")


def choose(kind: str, value: str, table: dict):
    """``table[value]``, or the one-line error above."""
    if value not in table:
        raise unknown(kind, value, table)
    return table[value]


def positive(value, *names: str) -> None:
    """Refuse fields that are not positive."""
    for name in names:
        if not getattr(value, name) > 0:
            raise CompanionError(f"{name} {getattr(value, name)!r} is not allowed: it must be positive")


def whole(value, **least: int) -> None:
    """Refuse fields that are not whole numbers of at least so much."""
    for name, smallest in least.items():
        number = getattr(value, name)
        if isinstance(number, bool) or not isinstance(number, int) or number < smallest:
            raise CompanionError(f"{name} must be a whole number of at least {smallest}, not {number!r}")


def check_several(classes: int, who: str) -> None:
    """Refuse a single class where there is nothing to tell apart.

    Raises:
        CompanionError: naming who needs more.
    """
    if classes < 2:
        raise CompanionError(f"{who} needs at least 2 classes, these data have {classes}")


LARGEST_SEED = 2**63 - 1  # torch takes 64 bits with a sign


def integer(value: object) -> int | None:
    """A whole number of any integer type (NumPy's, a tensor's) as Python's; None for what is none, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_seed(seed: object) -> int:
    """``seed`` as a plain whole number, else the one-line error."""
    number = integer(seed)
    if number is None or not 0 <= number <= LARGEST_SEED:
        raise CompanionError(f"seed {seed!r} is not allowed: a whole number from 0 to {LARGEST_SEED}")
    return number
