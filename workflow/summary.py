"""What a run would do and what it did, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workflow.state import EXECUTED, FAILED, change, folder, logs, records
from workflow.table import Request, Table


@dataclass(frozen=True)
class Result:
    """How one notebook ended: status ``ok``, ``up to date``, ``failed``, ``not run`` or ``interrupted``."""

    status: str
    path: str = ""
    seconds: float | str = ""
    peak_mb: float | str = ""
    error: str = ""

    @property
    def good(self) -> bool:
        """Whether a result of the present code is there."""
        return self.status in ("ok", "up to date")


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def result(root: Path, table: Table, request: Request, name: str, since: float, interrupted: bool) -> Result:
    """How the notebook ended in the run that began at ``since`` (seconds since 1970)."""
    results = (folder(root, request.run, name) / EXECUTED).relative_to(root)
    _, last = next(records(root, request.run, name), (None, {"ended": 0}))
    if last["ended"] >= since:
        path = results if last["status"] == "ok" else results.with_name(FAILED)
        return Result(last["status"], str(path), last["seconds"], last["peak_mb"], last["error"])
    messages = logs(root, request.run) / f"{name}.log"
    if messages.is_file() and messages.stat().st_mtime >= since:  # it began, and left no record
        error = "interrupted" if interrupted else "its process was ended from outside"
        return Result("interrupted" if interrupted else "failed", error=error)
    why = change(root, table, request, name)
    return Result("not run", error=why) if why else Result("up to date", str(results))


def _print(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as they must be, numbers to the right."""
    texts = [columns, *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        pairs = zip(row, widths, columns, strict=True)
        fitted = [
            text.rjust(n) if name in ("seconds", "peak MB") else text.ljust(n) for text, n, name in pairs
        ]
        print("  ".join(fitted).rstrip())


def print_summary(results: Mapping[str, Result], folder: str) -> None:
    """One line per notebook, then the first error line of each that failed; ``folder`` holds the messages."""
    print()
    rows = [(name, one.status, one.seconds, one.peak_mb, one.path) for name, one in results.items()]
    _print(("notebook", "status", "seconds", "peak MB", "result"), rows)
    for name, result in results.items():
        if not result.good:
            hint = f" (messages: {folder}/{name}.log)" if result.status == "failed" else ""
            print(f"{result.status}: {name}: {result.error}{hint}")


def print_list(table: Table, run: str, reasons: Mapping[str, str]) -> None:
    """Every notebook with its title and whether its result is up to date."""
    rows = [(name, table.notebooks[name].title, why or "up to date") for name, why in reasons.items()]
    _print(("notebook", "title", f"results/{run}"), rows)
    print(f"profiles: {', '.join(table.profiles)}")


def print_plan(reasons: Mapping[str, str]) -> None:
    """What would run and why."""
    rows = [(name, "run" if why else "be skipped", why or "up to date") for name, why in reasons.items()]
    _print(("notebook", "would", "reason"), rows)
