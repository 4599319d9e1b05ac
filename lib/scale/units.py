"""The units of work of a run, and their files.

========== ============================== ==================== ====================================================
stage      one unit                       needs                its file holds
========== ============================== ==================== ====================================================
squeeze    the teacher                    -                    weights
statistics a range of classes             squeeze              barycenters, BatchNorm statistics per class
recover    a block of classes             squeeze, statistics  images (a block is part of the objective, not of the
                                                               cutting: its size never follows the number of workers)
relabel    a range of epochs              squeeze, recover     soft labels of every batch (only ``labels="store"``)
train      one (architecture, seed)       recover, relabel     accuracies with soft and with hard labels, on the way and
                                                               of the last epoch
aggregate  everything                     train                ``table.csv``, ``curves.csv``, ``summary.json`` beside the
                                                               folders
========== ============================== ==================== ====================================================

Somebody else's set (``images`` of the plan) takes the place of statistics and recover: its one unit of ``recover`` reads it.

The files themselves: :mod:`lib.scale.store`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.evaluate.relabel import distillation
from lib.evaluate.soft_labels import FKD
from lib.match.batchnorm import batch_norms
from lib.methods import sre2l, wmdd
from lib.methods.sre2l import SRe2L
from lib.recipes import Recipe
from lib.recover.teacher import make_teacher
from lib.scale.plan import Run
from lib.system.errors import CompanionError, choose, unknown

STAGES = ("squeeze", "statistics", "recover", "relabel", "train", "aggregate")
METHODS = {"sre2l": sre2l.RECIPES, "wmdd": wmdd.RECIPES}


@dataclass(frozen=True)
class Unit:
    """Number ``number`` of its stage; ``first`` to ``last`` (exclusive) are its classes, epochs, or its place in a list."""

    stage: str
    number: int
    first: int
    last: int
    about: str

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.number:04d}.safetensors" if self.stage != "aggregate" else "summary.json"

    def path(self, run: Run) -> Path:
        return run.folder / self.name

    def __str__(self) -> str:
        return f"{self.stage} {self.number}: {self.about}"


# -- which there are ------------------------------------------------------------------------------------------------------


def units(run: Run, stage: str) -> list[Unit]:
    """The units of a stage in order."""
    plan = run.plan
    if stage == "squeeze":
        return [Unit(stage, 0, 0, 1, f"teacher {method(run).teacher.network}")]
    if stage == "statistics":
        if plan.images or type(method(run)).class_targets is SRe2L.class_targets:
            return []  # the running statistics of the teacher are all that SRe2L needs
        return _ranges(stage, run.form.num_classes, plan.classes_per_unit, "classes")
    if stage == "recover" and plan.images:
        return [Unit(stage, 0, 0, 1, f"images of {plan.images}")]
    if stage == "recover":
        return [Unit(stage, b.index, b.index, b.index + 1, _block(b)) for b in blocks(run)]
    if stage == "relabel":
        return (
            _ranges(stage, recipe(run).epochs, plan.epochs_per_unit, "epochs")
            if plan.labels == "store" and "soft" in plan.columns
            else []
        )
    if stage == "train":
        return [
            Unit(stage, n, n, n + 1, f"{name}, seed {seed}") for n, (name, seed) in enumerate(trainings(run))
        ]
    choose("stage", stage, dict.fromkeys(STAGES))
    return [Unit(stage, 0, 0, 1, "table.csv, summary.json")]


def unit(run: Run, stage: str, number: int) -> Unit:
    """One unit by its number, or the one-line error."""
    there = units(run, stage)
    if not 0 <= number < len(there):
        allowed = f"allowed 0 to {len(there) - 1}" if there else "this plan has none"
        raise CompanionError(f"stage {stage} has no unit {number}: {allowed}")
    return there[number]


def needs(run: Run, one: Unit) -> list[Unit]:
    """The units whose files ``one`` reads."""
    if one.stage == "squeeze" or (one.stage == "recover" and run.plan.images):
        return []
    teacher = units(run, "squeeze")
    if one.stage == "statistics":
        return teacher
    if one.stage == "recover":
        wanted = blocks(run)[one.number].classes
        return teacher + [
            part for part in units(run, "statistics") if set(wanted) & set(range(part.first, part.last))
        ]
    if one.stage == "relabel":
        return teacher + units(run, "recover")
    if one.stage == "train":
        return teacher + units(run, "recover") + units(run, "relabel")
    return units(run, "train")


def row(run: Run) -> Recipe:
    """The published settings, or the small ones, that the plan begins with.

    Raises:
        CompanionError: unknown method or variant; the method has no settings for these data.
    """
    plan = run.plan
    recipes = choose("method that recovers images in blocks:", plan.method, METHODS)
    if plan.recipe:
        return recipes.named(plan.recipe, plan.ipc, plan.variant)
    return recipes.find(run.form, plan.ipc, plan.variant)


def method(run: Run):
    """The method of the plan, with its recipe of the teacher.

    Raises:
        CompanionError: as :func:`row`; an unknown field.
    """
    plan, chosen = run.plan, row(run).method
    return changed(chosen, {**plan.options, "teacher": changed(chosen.teacher, plan.teacher)})


def changed(settings, fields: Mapping[str, Any]):
    """Frozen settings with other values in some fields, or the one-line error for a field that they do not have."""
    known = [item.name for item in dataclasses.fields(settings)]
    for name in fields:
        if name not in known:
            raise unknown(f"field of {type(settings).__name__}", name, known)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return dataclasses.replace(settings, **plain)


def recipe(run: Run) -> FKD:
    """How images are relabelled and networks trained: as published for these data."""
    return changed(distillation(row(run).protocol), run.plan.relabel)


def check(run: Run) -> None:
    """Refuse a plan that cannot be carried out, before anything is computed.

    Raises:
        CompanionError: unknown names and fields; an ipc that fits no block; a teacher without BatchNorm layers.
    """
    for stage in STAGES:
        units(run, stage)
    batch_norms(make_teacher(method(run).teacher.network, run.form))
    for name, _ in trainings(run):
        make_teacher(name, run.form)
    if run.plan.images and not Path(run.plan.images).exists():
        raise CompanionError(f"no file or folder {run.plan.images}")


def blocks(run: Run) -> list:
    """The blocks of classes that the method recovers together."""
    return method(run).blocks(run.form.num_classes, run.plan.ipc)


def trainings(run: Run) -> list[tuple[str, int]]:
    """The (architecture, seed) pairs."""
    names = run.plan.architectures or (method(run).teacher.network,)
    return [(name, seed) for name in names for seed in run.plan.seeds]


def _ranges(stage: str, total: int, length: int, what: str) -> list[Unit]:
    cuts = range(0, total, length)
    return [
        Unit(stage, n, first, min(first + length, total), f"{what} {first}-{min(first + length, total) - 1}")
        for n, first in enumerate(cuts)
    ]


def _block(block) -> str:
    images = f", image {block.images[0]}" if len(block.images) == 1 else ""
    return f"classes {block.classes[0]}-{block.classes[-1]}{images}"
