"""How the small settings were chosen: trials on a part of the training images, never on the test half.

    python -m benchmarks.settings                                  # every trial, to benchmarks/settings.csv
    python -m benchmarks.settings --only dm dc --data digits       # these alone; the other rows of the table stay

A fifth of the training images of every class is set aside and judges; the sets are distilled from the rest and evaluated under
``cpu-small`` with networks that no distillation saw; a set that is made for a schedule of its own (DD) by that schedule. The pixel
rate is tried, at otherwise equal settings: papers publish it for a width of 128, and the distances of gradients and features grow
with the width, so that the same rate moves the pixels of a narrow network several times less. While the best value lies at the end
of those tried, the next one of 1, 3, 10, 30, ... is tried, too. A test holds the recipes to a value that lies within a standard error
of the best one: three sets do not tell such values apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor, log10
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from lib import data as datasets
from lib.companion.benchmark import NARROW
from lib.data import Data
from lib.distill import distill
from lib.evaluate import Spread, evaluate, protocol
from lib.evaluate.schedule import Schedule, evaluate_schedule
from lib.methods import recipes
from lib.recipes import TWO_CORES, Recipe
from lib.system.errors import CompanionError, unknown
from lib.system.files import ROOT, write_text

SETS, NETWORKS, MOST = 3, 2, 6  # MOST: values of a field, with those beyond the first grid
TABLE = ROOT / "benchmarks" / "settings.csv"


@dataclass(frozen=True)
class Trial:
    """Values of one field of a method's small row."""

    method: str
    data: str
    values: tuple[float, ...]
    variant: str = ""
    ipc: int = 1
    field: str = "lr"  # of the method, or of a summand of its distance

    @property
    def recipe(self) -> Recipe:
        """The row of the method's table."""
        return recipes(self.method).named(self.data, self.ipc, self.variant)

    @property
    def holder(self) -> Any:
        """What has the field: the row's method, or a summand of its distance."""
        method = self.recipe.method
        if hasattr(method, self.field):
            return method
        return next(part for part in method.distance.parts if hasattr(part, self.field))

    @property
    def value(self) -> float:
        """What the row has in the field."""
        return getattr(self.holder, self.field)

    def method_with(self, value: float) -> Any:
        """The row's method with this value in the field."""
        method, holder = self.recipe.method, self.holder
        changed = replace(holder, **{self.field: value})
        if holder is method:
            return changed
        parts = tuple(changed if part is holder else part for part in method.distance.parts)
        return replace(method, distance=replace(method.distance, parts=parts))

    def rows(self, table: pd.DataFrame) -> pd.Series:
        """Which rows of the table are this trial's."""
        mine = (table["method"] == self.method) & (table["data"] == self.data)
        return mine & (table["variant"] == self.variant) & (table["ipc"] == self.ipc)


LOW, MIDDLE, HIGH, FAST = (0.03, 0.1, 0.3), (0.1, 0.3, 1.0), (0.3, 1.0, 3.0), (1.0, 3.0, 10.0)
TRIALS = [
    *(Trial(name, "digits", FAST) for name in ("dm", "m3d")),
    *(Trial(name, "digits", HIGH) for name in ("datadam", "ddm", "wasserstein", "idc")),
    *(Trial(name, "digits", MIDDLE) for name in ("idm", "dc", "dsa", "dcc")),
    Trial("cafe", "digits", LOW),
    Trial("dd", "digits", (0.01, 0.03, 0.1)),
    Trial("mtt", "digits", (10.0, 30.0, 100.0)),
    Trial("haba", "digits", (3.0, 10.0, 30.0)),
    Trial("haba", "digits", (10.0, 30.0, 100.0), ipc=10),
    Trial("haba", "digits", LOW, "on DM"),
    Trial("esp", "digits", (0.01, 0.03, 0.1)),
    Trial("lcmat_c", "digits", FAST, field="rho"),
    *(Trial(name, "fashion14", FAST) for name in ("dm", "m3d")),
    *(Trial(name, "fashion14", HIGH) for name in ("datadam", "ddm", "wasserstein")),
    *(Trial(name, "fashion14", (0.1, 0.4, 1.0)) for name in ("idm", "dc", "dsa", "dcc")),
    *(Trial(name, "fashion14", MIDDLE) for name in ("cafe", "idc")),
    Trial("dd", "fashion14", LOW),
    Trial("mtt", "fashion14", (30.0, 100.0, 300.0)),
    Trial("haba", "fashion14", (10.0, 30.0, 100.0)),
    Trial("haba", "fashion14", (30.0, 100.0, 300.0), ipc=10),
    Trial("haba", "fashion14", MIDDLE, "on DM"),
    Trial("esp", "fashion14", (0.01, 0.03, 0.1)),
    Trial("idc", "photos16", (0.003, 0.01, 0.03), ipc=5),
    Trial("dsa", "photos16", MIDDLE, ipc=5),
    Trial("idc", "fashionmnist", (1e-4, 1e-3, 1e-2), TWO_CORES),
]


def split(data: Data, part: float = 0.2, seed: int = 0) -> Data:
    """Training images alone: the last ``part`` of a random order of every class judges, the rest trains."""
    generator = torch.Generator().manual_seed(seed)
    keep, judge = [], []
    for c in range(data.train.num_classes):
        rows = (data.train.labels == c).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = round(len(rows) * (1 - part))
        keep.append(rows[:cut])
        judge.append(rows[cut:])
    return replace(data, train=data.train.subset(torch.cat(keep)), test=data.train.subset(torch.cat(judge)))


def beyond(values: list[float], accuracies: list[float]) -> float | None:
    """The next value to try: the neighbour of the best one on the ladder 1, 3, 10, 30, ... if the best lies at an end of those tried
    and fewer than :data:`MOST` were."""
    best = values[max(range(len(values)), key=accuracies.__getitem__)]
    if len(values) >= MOST or min(values) < best < max(values):
        return None
    power = floor(log10(best))
    ladder = [float(f"{m}e{k}") for k in range(power - 2, power + 3) for m in (1, 3)]
    return min(v for v in ladder if v > best) if best == max(values) else max(v for v in ladder if v < best)


def trials(trial: Trial, accuracy: Callable[[float], Spread]) -> list[dict]:
    """A row for every value of the trial's field; ``accuracy`` judges one."""
    found: dict[float, Spread] = {value: accuracy(value) for value in trial.values}
    while (value := beyond(list(found), [spread.mean for spread in found.values()])) is not None:
        found[value] = accuracy(value)
    about = {name: getattr(trial, name) for name in ("method", "data", "variant", "ipc", "field")}
    return [
        about | {"value": value, "accuracy": round(s.mean, 2), "sd": round(s.sd, 2), "n": s.n}
        for value, s in sorted(found.items())
    ]


def judged(trial: Trial, value: float, data: Data) -> Spread:
    """Accuracies of sets of that value on the judging images."""
    method = trial.method_with(value)
    sets = [distill(method, data.train, trial.ipc, seed, cache=True).synset for seed in range(SETS)]
    if trial.recipe.protocol == "own-schedule":
        return evaluate_schedule(sets, data, Schedule(method.network), cache=True).spread
    judge = protocol("cpu-small", data.train) if data.train.small else protocol("dc", network=NARROW)
    return evaluate(sets, data, judge, 0, NETWORKS, cache=True).spread


def main(arguments: list[str] | None = None) -> int:
    """Run the trials; returns the exit status."""
    names, kinds = (tuple(dict.fromkeys(getattr(trial, of) for trial in TRIALS)) for of in ("method", "data"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settings", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=f"of {', '.join(names)}")
    parser.add_argument("--data", nargs="+", metavar="DATA", help=f"of {', '.join(kinds)}")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the rows go (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        for kind, asked, allowed in (("method", given.only, names), ("data set", given.data, kinds)):
            for name in asked or ():
                if name not in allowed:
                    raise unknown(kind, name, allowed)
        _run(
            [t for t in TRIALS if t.method in (given.only or names) and t.data in (given.data or kinds)],
            given.table,
        )
    except CompanionError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(chosen: list[Trial], table: Path) -> None:
    console, data = Console(stderr=True), None
    for trial in chosen:
        if data is None or data.train.name != trial.data:
            data = split(datasets.load(trial.data))
        rows = trials(trial, lambda value, trial=trial, data=data: judged(trial, value, data))
        for row in rows:
            about = f"{trial.method:12} {trial.data:13} {trial.variant:10} {row['field']} {row['value']:<6g}"
            console.print(f"{about} {row['accuracy']:.1f} ± {row['sd']:.1f}")
        old = (
            pd.read_csv(table, keep_default_na=False)
            if table.exists()
            else pd.DataFrame(columns=list(rows[0]))
        )
        frame = pd.concat([old[~trial.rows(old)], pd.DataFrame(rows)], ignore_index=True)
        place = {(t.method, t.data, t.variant, t.ipc): at for at, t in enumerate(TRIALS)}
        keys = zip(frame["method"], frame["data"], frame["variant"], frame["ipc"], strict=True)
        frame["place"] = [place.get(key, len(place)) for key in keys]
        frame = frame.sort_values(["place", "value"], kind="stable").drop(columns="place")
        write_text(table, frame.to_csv(index=False))


if __name__ == "__main__":
    sys.exit(main())
