"""Small data for the tests, random images whose classes can be told apart; and what the tests of recipes share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from lib.data.imageset import Data, ImageSet
from lib.data.whitening import Standardise
from lib.evaluate.protocol import PROTOCOLS
from lib.methods import recipes
from lib.system.checkpoint import Checkpoint
from lib.system.errors import CompanionError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Killed(Exception):
    """Ends a run in the middle."""


@contextlib.contextmanager
def killed_after(step: int) -> Iterator[None]:
    """A training loop within is kept after every second step, and must be killed right after this one."""
    after, steps = Checkpoint.after, []

    def interrupted(self, training):
        steps.append(1)
        self.seconds = 0 if len(steps) % 2 else 1e9
        after(self, training)
        if len(steps) == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "after", interrupted)
        yield


def toy_data(
    classes: int = 3, per_class: int = 20, channels: int = 1, size: int = 8, noise: float = 0.6, seed: int = 0
) -> Data:
    """Each class is one random pattern plus noise: easy with many images, not with one."""
    g = generator(seed)
    patterns = torch.randn(classes, 1, channels, size, size, generator=g)
    names = tuple(f"class {c}" for c in range(classes))
    transform = Standardise(torch.full((channels,), 0.5), torch.full((channels,), 0.25))

    def half(count: int) -> ImageSet:
        images = patterns + noise * torch.randn(classes, count, channels, size, size, generator=g)
        labels = torch.arange(classes).repeat_interleave(count)
        order = torch.randperm(len(labels), generator=g)
        # tests that do not ask for flips should not depend on them: the strategy without
        strategy = "color_crop_cutout_scale_rotate"
        return ImageSet("toy", images.flatten(0, 1)[order], labels[order], names, transform, strategy)

    return Data(half(per_class), half(per_class))


def with_fields(method: Any, **changes) -> Any:
    """``dataclasses.replace`` with those changes alone whose fields the method has."""
    names = {one.name for one in dataclasses.fields(method)}
    return dataclasses.replace(method, **{name: value for name, value in changes.items() if name in names})


# -- recipes: the published rows, typed off the papers and codes ------------------------------------------------------------


def published_rows(published: dict[tuple[str, str], list[tuple]]) -> list:
    """Parameters ``(name, variant, data, ipc, judged, fields)``, one for every row of a typed table.

    Args:
        published: (method, variant) -> groups (data sets in one string, IPCs, protocol, base fields, changes to them).
    """
    return [
        pytest.param(name, variant, data, ipc, judged, base | changes, id=f"{name}{variant and '-' + variant}-{data}-{ipc}")
        for (name, variant), groups in published.items()
        for names, counts, judged, base, changes in groups
        for data in names.split()
        for ipc in counts
    ]  # fmt: skip


def check_published(
    name: str, variant: str, data: str, ipc: int, judged: str, fields: dict[str, Any]
) -> None:
    """The recipe of a typed row has its fields and its protocol, and says where they are from."""
    recipe = recipes(name).named(data, ipc, variant)
    assert {field: getattr(recipe.method, field) for field in fields} == fields
    assert recipe.protocol == judged and recipe.protocol in PROTOCOLS
    assert not recipe.small and recipe.source


def typed_and_found(rows: list, names: Iterable[str]) -> tuple[set[tuple], set[tuple]]:
    """(method, variant, data, IPC) of the typed rows, and of the published recipes of these methods."""
    typed = {case.values[:4] for case in rows}
    found = {
        (name, row.variant, row.data, row.ipc) for name in names for row in recipes(name) if not row.small
    }
    return typed, found


def check_missing(name: str, data: str, ipc: int) -> None:
    """What was not published is an error of one line that lists the rows."""
    with pytest.raises(
        CompanionError, match=f"no recipe for {data} IPC {ipc}; there are recipes for digits"
    ) as caught:
        recipes(name).named(data, ipc)
    assert "\n" not in str(caught.value)
