"""`DM?` tells every field of a class: what IPython's question mark shows is the nearest docstring, and what that refers to."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import pytest

from lib.evaluate.protocol import Protocol
from lib.evaluate.regression import FeatureRegression, Regression
from lib.evaluate.relabel import FKD
from lib.formation.channels import ChannelMix
from lib.formation.hallucinators import Hallucinators
from lib.formation.mosaic import Mosaic
from lib.formation.tiles import MultiFormation
from lib.match.distance import Distance
from lib.match.gradient import Gap
from lib.methods import METHODS, method
from lib.methods.haba import Features
from lib.nets.generators.prior import Prior
from lib.nets.starts import Fixed, Pretrained, Random
from lib.nets.supply import Queue
from lib.recipes import Recipe
from lib.select.sampler import Representative

NAMED = re.compile(r"(?:^|[;,.])\s+((?:\w+,\s+)*\w+): ", re.MULTILINE)  # `lr, momentum: of SGD on the pixels; most: ...`


def inherited(base: type) -> Iterator[type]:
    """A class of ours and all that inherit from it, as far as they are imported."""
    yield base
    for kind in base.__subclasses__():
        yield from inherited(kind)


def values(kind: type) -> Iterator[type]:
    """A class and the classes of the values that its fields have by default."""
    yield kind
    if not inspect.isabstract(kind):
        for field in dataclasses.fields(kind):
            given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            parts = getattr(given, "parts", None)
            for part in parts if isinstance(parts, tuple) else (given,):
                if dataclasses.is_dataclass(part):
                    yield from values(type(part))


ALONE = [Protocol, Regression, FeatureRegression, FKD, Recipe, ChannelMix, Hallucinators, Mosaic, MultiFormation, Features,
         Random, Fixed, Pretrained, Queue, Representative]  # fmt: skip
KINDS = {kind for name in METHODS for kind in values(method(name))} | set(ALONE)
KINDS |= {
    kind for base in (Distance, Gap, Prior) for kind in inherited(base) if kind.__module__.startswith("lib.")
}
KINDS = sorted(
    (kind for kind in KINDS if dataclasses.fields(kind) and kind.__name__[0] != "_"),
    key=lambda kind: kind.__qualname__,
)


def told(kind: type) -> set[str]:
    """The fields that somebody reads of: named in the section, or told by a class whose fields the docstring refers to."""
    text = kind.__doc__ or ""
    assert inspect.getdoc(kind) == inspect.cleandoc(text), f"{kind.__name__} has no docstring of its own"
    section = text.partition("Attributes:")[2].partition("Raises:")[0]
    names = {name for found in NAMED.findall(section) for name in re.split(r",\s+", found)}
    for base in kind.__mro__[1:]:
        if re.search(rf"\bfields are {base.__name__}'", text):
            names |= told(base)
    return names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__qualname__)
def test_every_field_is_told_where_the_question_mark_shows_it(kind):
    missing = {field.name for field in dataclasses.fields(kind)} - told(kind)
    assert not missing, f"{kind.__name__}? does not tell {', '.join(sorted(missing))}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__qualname__)
def test_no_comment_repeats_what_the_docstring_tells(kind):
    source, first = inspect.getsourcelines(kind)
    names = "|".join(field.name for field in dataclasses.fields(kind))
    beside = [line for line in source if re.match(rf"    ({names}): .*  # ", line) and "fmt:" not in line]
    assert not beside, f"{kind.__module__}, line {first}: {beside[0].strip()}"


def test_a_field_that_nobody_tells_is_found():
    @dataclasses.dataclass(frozen=True)
    class Base:
        """A base.

        Attributes:
            a, b: numbers; c: another one.
        """

        a: int = 0
        b: int = 0
        c: int = 0

    class Silent(Base):
        """It says nothing."""

    class Speaks(Base):
        """The other fields are Base's.

        Attributes:
            d: "x"; or "y": not a field.
        """

    assert told(Base) == {"a", "b", "c"} and told(Silent) == set() and {"a", "b", "c", "d"} <= told(Speaks)
