"""Is a notebook's result up to date? What it was made from is stored in the executed notebook and compared with now."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from lib.system.code import closure, meaning
from workflow.table import Request, Table, parameters_for, parameters_of

EXECUTED, FAILED = "executed.ipynb", "executed.failed.ipynb"


def source(root: Path, name: str) -> Path:
    """The notebook itself."""
    return root / "notebooks" / f"{name}.ipynb"


def folder(root: Path, run: str, name: str) -> Path:
    """Where a run of the notebook writes."""
    return root / "results" / run / name


def record_file(root: Path, run: str, name: str) -> Path:
    """How the last execution ended: status, seconds, peak memory, first line of the error."""
    return root / "results" / "logs" / run / f"{name}.json"


def tables_read(root: Path, table: Table, request: Request, name: str) -> list[Path]:
    """The ``table.csv`` of every notebook that this one reads and that exists or is part of the run."""
    paths = {other: folder(root, request.run, other) / "table.csv" for other in table.notebooks[name].reads}
    return [path for other, path in paths.items() if other in request.notebooks or path.is_file()]


def fingerprint(root: Path, table: Table, request: Request, name: str) -> dict:
    """Everything a result depends on: code cells, parameters, imported files of ``lib``, tables read."""
    path = source(root, name)
    return {
        "code": meaning(path),
        "parameters": parameters_for(request, parameters_of(path)),
        "lib": {file.relative_to(root).as_posix(): meaning(file) for file in closure([path], root)},
        "reads": {
            file.parent.name: _sha256(file)
            for file in tables_read(root, table, request, name)
            if file.is_file()
        },
    }


def _sha256(path: Path) -> str:
    return _hash(path, path.stat().st_mtime_ns)


@functools.cache
def _hash(path: Path, _changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored_fingerprint(path: Path) -> dict | None:
    """The fingerprint in an executed notebook; None for a missing or damaged file or one that was run by hand."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["companion"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reason(root: Path, table: Table, request: Request, name: str) -> str:
    """Why the notebook must run, in a few words; empty if its result is up to date."""
    results = folder(root, request.run, name)
    absent = [output for output in table.outputs if not (results / output).is_file()]
    if absent:
        return "not run yet" if EXECUTED in absent else f"{absent[0]} is missing"
    was, now = stored_fingerprint(results / EXECUTED), fingerprint(root, table, request, name)
    if was is None:
        return f"{EXECUTED} does not say what it was made from"
    if was["code"] != now["code"]:
        return "code cells changed"
    if was["parameters"] != now["parameters"]:
        return "parameters changed"
    for key, text in (("lib", "{} changed"), ("reads", "table of {} changed")):
        changed = sorted(k for k in was[key].keys() | now[key].keys() if was[key].get(k) != now[key].get(k))
        if changed:
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return text.format(changed[0] + others)
    return ""


def plan(root: Path, table: Table, request: Request, force: bool = False) -> dict[str, str]:
    """The reason of every notebook of the request, in running order; what reads a table that will change runs too."""
    reasons: dict[str, str] = {}
    for name in request.notebooks:
        why = "forced" if force else reason(root, table, request, name)
        upstream = [other for other in table.notebooks[name].reads if reasons.get(other)]
        reasons[name] = why or (f"after {upstream[0]}" if upstream else "")
    return reasons


def stale(reasons: dict[str, str]) -> Collection[str]:
    """The notebooks that must run."""
    return [name for name, why in reasons.items() if why]
