"""What a result was made from, under which name that is remembered, and in words what has changed since."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lib.methods import METHODS
from lib.system.code import closure, imports, meaning, module_files, strings
from lib.system.errors import CompanionError
from workflow.table import Request, Table, parameters_of

EXECUTED, FAILED = "executed.ipynb", "executed.failed.ipynb"


def source(root: Path, name: str) -> Path:
    """The notebook itself."""
    return root / "notebooks" / f"{name}.ipynb"


def folder(root: Path, run: str, name: str) -> Path:
    """Where the results of the notebook lie."""
    return root / "results" / run / name


def logs(root: Path, run: str) -> Path:
    """Messages and records of the run."""
    return root / "results" / "logs" / run


def fingerprint(root: Path, table: Table, request: Request, name: str) -> dict:
    """Everything a result depends on: code cells, parameters, imported code of ``lib``, content of the tables read."""
    path = source(root, name)
    files = {*closure([path], root)}
    # methods are also imported by their names, in notebooks and wherever these functions are at hand
    by_name = {"lib.methods.method", "lib.methods.recipes"}
    naming = [path, *(file for file in files if imports(file) & by_name)]
    named = {word for file in naming for word in strings(file)} & METHODS.keys()
    modules = [module for word in named for module in (METHODS[word].module, f"lib.plain.{word}")]
    files |= {file for module in modules for file in module_files(module, root)}
    tables = {nb: folder(root, request.run, nb) / "table.csv" for nb in table.notebooks[name].reads}
    return {
        "code": meaning(path),
        "parameters": request.of(parameters_of(path)),
        "lib": {file.relative_to(root).as_posix(): meaning(file) for file in sorted(files)},
        "tables": {nb: meaning(file) for nb, file in tables.items() if file.is_file()},
    }


def file_name(name: str, made_from: dict) -> str:
    """Of the record of a result."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return f"{name}.{digest[:16]}.json"


def record_name(root: Path, table: Table, request: Request, name: str) -> str:
    """Of the record that a current result of the notebook has."""
    return file_name(name, fingerprint(root, table, request, name))


def records(root: Path, run: str, name: str) -> Iterator[tuple[Path, dict]]:
    """The records of a notebook, the latest first: how it ended (status, seconds, peak_mb, error, ended), made_from."""
    found = []
    for path in (logs(root, run) / "made").glob(f"{name}.*.json"):
        try:
            found.append((path, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            found.append((path, {"status": "damaged", "ended": 0, "made_from": {}}))
    return iter(sorted(found, key=lambda pair: pair[1]["ended"], reverse=True))


def expected_seconds(root: Path, run: str, name: str) -> float | None:
    """What the notebook took the last time, here or where its committed results were made; of a run with changed parameters that has
    not been made, what the plain one took. None if nobody knows."""
    seconds = next(
        (record["seconds"] for _, record in records(root, run, name) if record["status"] == "ok"), None
    )
    for made in (run, run.partition("+")[0]):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            about = (folder(root, made, name) / "run.json").read_text(encoding="utf-8")
            seconds = seconds or json.loads(about).get("seconds")
    return seconds


@contextlib.contextmanager
def alone(root: Path, run: str) -> Iterator[IO[str]]:
    """One run per results folder at a time; the lock goes with the process and its children, however these end.

    Yields the lock's file, to which further processes that hold it are added: one that a killed process leaves behind can be named.
    """
    with held(logs(root, run) / "lock", f"another run into results/{run} is going on") as file:
        os.set_inheritable(file.fileno(), True)
        yield file


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[IO[str]]:
    """Hold a lock file, in which the holder's process id stands.

    Raises:
        CompanionError: another process holds it; the line says ``what``, and which process.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
        except OSError as error:
            raise CompanionError(f"cannot write to {path.parent}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CompanionError(f"{what}{_by(file.read().split())}") from None
            except OSError:
                pass  # a file system without locks
            if not _same_file(file, path):
                continue  # somebody removed it between opening and locking
            file.truncate(0)
            file.write(f"{os.getpid()} ")
            file.flush()
            yield file
            return


def _same_file(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _by(processes: list[str]) -> str:
    """Which of the holders is alive, and how it is stopped: itself, or the session of the one that it left behind."""
    for number, process in enumerate(processes):
        with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
            os.kill(int(process), 0)
            stop = f"kill {process}" if number == 0 else f"kill -INT -- -{process}"
            return f" (process {process}; `{stop}` stops it)"
    return ""


def reasons(root: Path, table: Table, request: Request, force: bool = False) -> dict[str, str]:
    """Why each notebook of the request has to run, in words; "" for one whose result is current and reads no table that is to change."""
    why = {name: change(root, table, request, name) for name in request.notebooks}
    if force:
        return {name: reason or "forced" for name, reason in why.items()}

    def after(name: str) -> str:
        return next((f"after {nb}" for nb in table.notebooks[name].reads if why.get(nb)), "")

    while late := {name: after(name) for name in why if not why[name] and after(name)}:
        why |= late
    return why


def change(root: Path, table: Table, request: Request, name: str) -> str:
    """What is different from the latest result, in a few words; empty if that is current. It explains, it does not decide."""
    results, now = folder(root, request.run, name), fingerprint(root, table, request, name)
    absent = [output for output in table.outputs if not (results / output).is_file()]
    made = [record["made_from"] for _, record in records(root, request.run, name) if record["status"] == "ok"]
    if not absent and now in made:
        return ""
    if absent and EXECUTED not in absent:
        return f"{absent[0]} is missing"
    if absent or not made:
        if absent == [EXECUTED] and not made:
            return "committed, not run here"
        failed = (results / FAILED).is_file()
        return "failed the last time" if failed else "not run yet" if absent else "no record of its run"
    was = made[0]
    if was["code"] != now["code"]:
        return "code cells changed"
    if was["parameters"] != now["parameters"]:
        return "parameters changed"
    for key, text in (("lib", "code of {} changed"), ("tables", "table of {} changed")):
        changed = sorted(k for k in was[key].keys() | now[key].keys() if was[key].get(k) != now[key].get(k))
        if changed:
            return text.format(changed[0] + (f" and {len(changed) - 1} more" if len(changed) > 1 else ""))
    return "no record of its run"
