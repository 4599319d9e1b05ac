"""How new results take the place of old ones: a process that is killed at any moment loses neither and leaves no mixture for good.

A notebook writes into a folder of its own. When everything is there, the folder gets a note of what is to be done, ``ready.json``;
then results, figures and record are put in place, and the folder goes. Whoever comes next does what a note still asks for
(:func:`settle`), and removes folders without one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.system.errors import CompanionError
from lib.system.files import write_text
from workflow.state import alone, file_name, folder, held, logs, records
from workflow.table import Request, Table

READY = "ready.json"
KINDS = ("results", "figures")


def _above(root: Path, run: str, name: str) -> Path:
    return logs(root, run) / "work" / name


@contextlib.contextmanager
def workplace(root: Path, run: str, name: str, reads: tuple[str, ...]) -> Iterator[Path]:
    """An empty folder to write into, laid out as the project and with the results that may be read linked; gone afterwards.

    It has a new name each time: a kernel whose process was killed may still be writing into the last one.

    Raises:
        CompanionError: another process runs this notebook.
    """
    above = _above(root, run, name)
    with held(above / "lock", f"{name} is being run"):
        settle(root, run, name)
        work = Path(tempfile.mkdtemp(dir=above))
        folder(work, run, name).mkdir(parents=True)
        for other in reads:
            if folder(root, run, other).is_dir():
                folder(work, run, other).symlink_to(folder(root, run, other), target_is_directory=True)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, root: Path, run: str, name: str, record: dict) -> None:
    """Let the results and figures of a workplace, and the record of the run, take the place of the old ones; no signal comes between."""
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        kinds = [kind for kind in KINDS if (work / kind / run / name).is_dir()]
        write_text(work / READY, json.dumps({"kinds": kinds, "record": record}))
        _finish(work, root, run, name)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)


def _finish(work: Path, root: Path, run: str, name: str) -> None:
    """What the note of a workplace asks for, from the beginning or from wherever a killed process left it."""
    note = json.loads((work / READY).read_text(encoding="utf-8"))
    for kind in KINDS:
        new, place, old = (base / kind / run / name for base in (work, root, work / "old"))
        if kind in note["kinds"] and not new.exists():
            continue  # it is in place
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(place, old)
        if new.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new, place)
    made = logs(root, run) / "made" / file_name(name, note["record"]["made_from"])
    write_text(made, json.dumps(note["record"]) + "\n")
    for path, _ in records(root, run, name):
        if path != made:
            path.unlink(missing_ok=True)
    (work / READY).unlink()


def settle(root: Path, run: str, name: str) -> None:
    """Finish what killed processes had ready, and remove what they had not."""
    above = _above(root, run, name)
    for work in above.iterdir() if above.is_dir() else ():
        if work.is_dir():
            if (work / READY).is_file():
                _finish(work, root, run, name)
            shutil.rmtree(work, ignore_errors=True)


def discard(root: Path, table: Table, request: Request) -> None:
    """Settle what killed processes left, and delete the records that name no result: of failures, of what was edited while it ran,
    of results that are gone.

    While another process holds the folder (:func:`workflow.state.alone`) nothing is touched.
    """
    with contextlib.suppress(CompanionError), alone(root, request.run):
        for name in request.notebooks:
            with contextlib.suppress(CompanionError), held_if_there(root, request.run, name):
                settle(root, request.run, name)
                there = [(folder(root, request.run, name) / output).is_file() for output in table.outputs]
                for path, record in records(root, request.run, name):
                    good = record["status"] == "ok" and path.name == file_name(name, record["made_from"])
                    if not (good and all(there)):
                        path.unlink(missing_ok=True)


def held_if_there(root: Path, run: str, name: str, what: str = "") -> contextlib.AbstractContextManager:
    """The lock of a notebook's workplaces, which stays when they go; nothing where it was never run."""
    lock = _above(root, run, name) / "lock"
    return held(lock, what) if lock.exists() else contextlib.nullcontext()


def check_idle(root: Path, request: Request) -> None:
    """Refuse to begin while a notebook of the request is still at work for a run whose own processes were killed.

    Raises:
        CompanionError: naming the notebook and the process.
    """
    for name in request.notebooks:
        with held_if_there(root, request.run, name, f"{name} is still at work"):
            pass
