"""How the small settings of ``fashion14`` were chosen: trials on a part of the training images, never on the test half.

    python -m benchmarks.settings                 # every method of TRIALS, to benchmarks/settings.csv
    python -m benchmarks.settings --only dm dc    # these alone; the other rows of the table stay

A fifth of the training images of every class is set aside and judges; the sets are distilled from the rest, at one image per class,
and evaluated under ``cpu-small`` with networks that no distillation saw; a set that is made for a schedule of its own (DD) by that
schedule. The pixel rate is tried, at otherwise equal settings: papers
publish it for a width of 128, and the distances of gradients and features grow with the width, so that the same rate moves the pixels of
a narrow network several times less. A test holds the recipes to the best row of the table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from lib import data as datasets
from lib.data import Data
from lib.distill import distill
from lib.evaluate import Spread, evaluate, protocol
from lib.evaluate.schedule import Schedule, evaluate_schedule
from lib.methods import recipes
from lib.recipes import Recipe
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError, unknown
from lib.system.files import ROOT, write_text

DATA, IPC, SETS, NETWORKS = "fashion14", 1, 3, 2
TABLE = ROOT / "benchmarks" / "settings.csv"
TRIALS = {  # method -> field -> values
    "dm": {"lr": (1.0, 3.0, 10.0)},
    "datadam": {"lr": (0.3, 1.0, 3.0)},
    "ddm": {"lr": (0.3, 1.0, 3.0)},
    "m3d": {"lr": (1.0, 3.0, 10.0)},
    "idm": {"lr": (0.1, 0.4, 1.0)},
    "wasserstein": {"lr": (0.3, 1.0, 3.0)},
    "dc": {"lr": (0.1, 0.4, 1.0)},
    "dsa": {"lr": (0.1, 0.4, 1.0)},
    "dcc": {"lr": (0.1, 0.4, 1.0)},
    "cafe": {"lr": (0.1, 0.3, 1.0)},
    "idc": {"lr": (0.1, 0.3, 1.0)},
    "dd": {"lr": (0.03, 0.1, 0.3)},
    "haba": {"lr": (10.0, 30.0, 100.0)},
    "esp": {"lr": (0.01, 0.03, 0.1)},
}


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


def trials(name: str, data: Data) -> list[dict]:
    """A row for every value of the method's field."""
    ((field, values),) = TRIALS[name].items()
    recipe, rows = recipes(name).named(DATA), []
    for value in values:
        method = replace(recipe.method, **{field: value})
        runs = [distill(method, data.train, IPC, seed, cache=True) for seed in range(SETS)]
        found = judged(recipe, [run.synset for run in runs], data)
        row = {"method": name, "data": DATA, "ipc": IPC, "field": field, "value": value}
        rows.append(row | {"accuracy": round(found.mean, 2), "sd": round(found.sd, 2), "n": found.n})
    return rows


def judged(recipe: Recipe, sets: list[SyntheticSet], data: Data) -> Spread:
    """Accuracies of the sets on the judging images."""
    if recipe.protocol == "own-schedule":
        return evaluate_schedule(sets, data, Schedule(recipe.method.network), cache=True).spread
    return evaluate(sets, data, protocol("cpu-small", data.train), 0, NETWORKS, cache=True).spread


def main(arguments: list[str] | None = None) -> int:
    """Run the trials; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settings", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the rows go (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        for name in given.only or ():
            if name not in TRIALS:
                raise unknown("method", name, TRIALS)
        _run(given.only or list(TRIALS), given.table)
    except CompanionError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(names: list[str], table: Path) -> None:
    data, console = split(datasets.load(DATA)), Console(stderr=True)
    for name in names:
        rows = trials(name, data)
        for row in rows:
            console.print(
                f"{name:12} {row['field']} {row['value']:<6g} {row['accuracy']:.1f} ± {row['sd']:.1f}"
            )
        old = pd.read_csv(table) if table.exists() else pd.DataFrame(columns=list(rows[0]))
        others = [frame for frame in (old[old["method"] != name],) if len(frame)]
        frame = pd.concat([*others, pd.DataFrame(rows)], ignore_index=True)
        order = {method: place for place, method in enumerate(TRIALS)}
        frame = frame.sort_values("method", key=lambda column: column.map(order), kind="stable")
        write_text(table, frame.to_csv(index=False))


if __name__ == "__main__":
    sys.exit(main())
