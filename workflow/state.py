"""What a result was made from, under which name that is remembered, and in words what has changed since."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

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


def discard(root: Path, table: Table, request: Request) -> None:
    """Delete the records that name no result: of failures, of what was edited while it ran, of results that are gone.

    While another process holds the folder (:func:`alone`) nothing is touched.
    """
    with contextlib.suppress(CompanionError), alone(root, request.run):
        for name in request.notebooks:
            there = [(folder(root, request.run, name) / output).is_file() for output in table.outputs]
            for path, record in records(root, request.run, name):
                good = record["status"] == "ok" and path.name == file_name(name, record["made_from"])
                if not (good and all(there)):
                    path.unlink(missing_ok=True)


def expected_seconds(root: Path, run: str, name: str) -> float | None:
    """What the notebook took the last time, here or where its committed results were made; None if nobody knows."""
    seconds = next(
        (record["seconds"] for _, record in records(root, run, name) if record["status"] == "ok"), None
    )
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        seconds = seconds or json.loads(
            (folder(root, run, name) / "run.json").read_text(encoding="utf-8")
        ).get("seconds")
    return seconds


@contextlib.contextmanager
def alone(root: Path, run: str) -> Iterator[None]:
    """One run per results folder at a time; the lock goes with the process and its children, however these end."""
    path = logs(root, run) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise CompanionError(f"cannot write to {path.parent}: {error.strerror}") from error
    with file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            by = f" (process {holder}; `kill {holder}` stops it)" if holder.isdigit() else ""
            raise CompanionError(f"another run into results/{run} is going on{by}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


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
