"""What formations need to know of a data set's colours, and their fields as plain values."""

from __future__ import annotations

from lib.data.whitening import Standardise, Transform
from lib.system.errors import CompanionError


def colours(transform: Transform, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels, for a formation that needs to know the colours of [0, 1].

    Raises:
        CompanionError: for whitened data, whose pixels are no colours.
    """
    if not isinstance(transform, Standardise):
        raise CompanionError(
            f"formation {name!r} needs the colours of pixels, the data is {transform.kind!r}: allowed is 'standardise'"
        )
    return tuple(transform.mean.tolist()), tuple(transform.std.tolist())


def as_tuples(formation, *names: str) -> None:
    """Fields that come out of a file as lists, as the tuples they were."""

    def plain(value):
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    for name in names:
        object.__setattr__(formation, name, plain(getattr(formation, name)))
