"""Kills a run of six small notebooks at random moments, starts it again each time, and looks at what is there after every kill.

    PYTHONPATH=. python tests/kill_run.py --kills 100

A kill is SIGKILL to one process of the run (launcher, scheduler, a notebook's process, its kernel) or to all of them. Then, when what is
left of the run has ended: every file is whole, every notebook has the results that it had before or newer ones, results and figures are
of one generation, and a record never speaks of other results than those that are there. At the end a run that nobody disturbs must find
nothing damaged. Whenever all six are done their code changes, so that there is always something to lose.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from test_run_all import LIMIT, PARAMETERS, processes_of, variables, workplaces, write_notebook, write_project

from workflow import place, state, table

NAMES = tuple(f"{k}0_notebook" for k in range(1, 7))
LINES = 2000  # of a table: a half-written one is shorter
WRITE = f"""
import json, os, pathlib, time
from lib.shared import value
out, run = pathlib.Path(os.environ["COMPANION_OUT"]), os.environ["COMPANION_RUN"]
for kind, file in (("results", "table.csv"), ("figures", "a.png"), ("results", "run.json")):
    folder = out / kind / run / NAME
    folder.mkdir(parents=True, exist_ok=True)
    time.sleep(0.05)
    (folder / file).write_text(json.dumps([value] * {LINES}))
"""


def make(root: Path) -> Path:
    """The project: six notebooks, the last of which reads the tables of the others."""
    write_project(root)
    for path in (root / "notebooks").iterdir():
        path.unlink()
    for name in NAMES:
        write_notebook(root, name, "from lib.shared import value", PARAMETERS, WRITE)
    head = (root / "workflow/notebooks.yaml").read_text().split("notebooks:")[0]
    rows = [f"  {name}: {{title: x{', reads: all' if name == NAMES[-1] else ''}}}\n" for name in NAMES]
    (root / "workflow/notebooks.yaml").write_text(f"{head}notebooks:\n{''.join(rows)}")
    return root


def generation(path: Path) -> int:
    """The one value of a whole file."""
    values = json.loads(path.read_text())
    assert len(values) == LINES and len(set(values)) == 1, f"{path} is a mixture"
    return values[0]


def check(root: Path, before: dict[str, int], now: int) -> dict[str, int]:
    """Everything that is promised; returns the generation of every notebook's results."""
    rows, request = table.load(root), table.Request("cpu", NAMES)
    place.discard(root, rows, request)  # what the next call of run_all.sh begins with
    assert workplaces(root) == [], "a workplace is left"
    found = {}
    for name in NAMES:
        results, figures = (root / kind / "cpu" / name for kind in ("results", "figures"))
        strange = [path for path in results.parent.glob(f"{name}/.*")] + list(figures.glob(".*"))
        assert not strange, strange
        if not results.exists():
            assert name not in before and not figures.exists(), f"{name} has lost its results"
            continue
        files = [results / "table.csv", results / "run.json", figures / "a.png"]
        values = {generation(path) for path in files if path.exists()}
        if values:  # else it only ever failed: executed.failed.ipynb
            assert all(path.exists() for path in files) and len(values) == 1, f"{name}: {values}"
            json.loads((results / "executed.ipynb").read_text())
            (found[name],) = values
        assert before.get(name, 0) <= found.get(name, 0) <= now, f"{name} went back"
        for _, record in state.records(root, "cpu", name):
            assert record["status"] == "ok", record
            fresh = state.change(root, rows, request, name) == ""
            assert not fresh or found[name] == now, f"{name}: the record is of other results"
    return found


def kill_something(mark: str, chance: random.Random) -> str:
    """SIGKILL to one process of the run, or to all; what it was."""
    running = processes_of(mark)
    if not running:
        return ""
    if chance.random() < 0.3:
        chosen, what = running, "all"
    else:
        chosen = [chance.choice(running)]
        words = chosen[0][1]
        kinds = {"ipykernel": "kernel", "workflow.execute": "notebook", "snakemake": "scheduler", "workflow.command": "launcher"}
        what = next((kind for word, kind in kinds.items() if word in words), "other")
    killed = 0
    for process, _ in chosen:
        try:
            os.kill(process, signal.SIGKILL)
            killed += 1
        except ProcessLookupError:
            pass
    return what if killed else ""


def torment(root: Path, kills: int, seed: int = 0, say=lambda line: None) -> Counter:
    """So many kills, each followed by the checks; how often which process was hit. Ends with a run that nobody disturbs."""
    chance, hit, found, now = random.Random(seed), Counter(), {}, 1
    mark, shared = f"companion-kill-{os.getpid()}-{time.time_ns()}", root / "lib/shared.py"
    shared.write_text(f"value = {now}\n")
    words = [str(root / "run_all.sh"), "--no-setup", "--cores", "2"]
    given = variables(INTERRUPT_TEST=mark)

    def start() -> subprocess.Popen:
        return subprocess.Popen(words, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    while hit.total() < kills:
        process = start()
        time.sleep(chance.uniform(0.2, 9.0))
        what = kill_something(mark, chance)
        end = time.monotonic() + LIMIT
        while processes_of(mark):  # survivors end by themselves
            assert time.monotonic() < end, processes_of(mark)
            time.sleep(0.05)
        process.communicate()
        found = check(root, found, now)
        if what:
            hit[what] += 1
            say(f"{hit.total():4}  {what:10} {len([1 for value in found.values() if value == now])} of 6 new, generation {now}")
        if all(found.get(name) == now for name in NAMES):
            now += 1
            shared.write_text(f"value = {now}\n")
    process = start()
    assert process.wait(LIMIT) == 0, process.stderr.read()
    assert check(root, found, now) == dict.fromkeys(NAMES, now)
    return hit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hit = torment(make(Path(folder) / "project"), given.kills, given.seed, lambda line: print(line, flush=True))
    print(f"{hit.total()} kills ({', '.join(f'{n} {what}' for what, n in hit.most_common())}): nothing lost, nothing half-written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
