"""What a run would do and what it did, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from workflow.state import EXECUTED, FAILED, change, folder, logs, records
from workflow.table import Request, Table

COLOURS = {
    "ok": "green",
    "up to date": "green",
    "failed": "red",
    "not run": "yellow",
    "interrupted": "yellow",
}


@dataclass(frozen=True)
class Result:
    """How one notebook ended: status ``ok``, ``up to date``, ``failed``, ``not run`` or ``interrupted``."""

    status: str
    path: str
    seconds: float | None = None
    peak_mb: float | None = None
    error: str = ""

    @property
    def good(self) -> bool:
        """Whether a result of the present code is there."""
        return self.status in ("ok", "up to date")


def result(root: Path, table: Table, request: Request, name: str, since: float, interrupted: bool) -> Result:
    """How the notebook ended in the run that began at ``since`` (seconds since 1970)."""
    places = {
        status: folder(root, request.run, name) / file
        for status, file in (("ok", EXECUTED), ("failed", FAILED))
    }
    paths = {status: str(path.relative_to(root)) for status, path in places.items() if path.is_file()}
    _, last = next(records(root, request.run, name), (None, {"ended": 0}))
    if last["ended"] >= since:
        status = last["status"]
        return Result(status, paths.get(status, ""), last["seconds"], last["peak_mb"], last["error"])
    messages = logs(root, request.run) / f"{name}.log"
    if messages.is_file() and messages.stat().st_mtime >= since:  # it began, and left no record
        if interrupted:
            return Result("interrupted", "", error="interrupted")
        return Result("failed", "", error="its process was ended from outside")
    why = change(root, table, request, name)
    return Result("not run", "", error=why) if why else Result("up to date", paths["ok"])


def _console() -> Console:
    """A terminal as wide as it is, and wide enough for paths where the output goes to a file."""
    wide = Console(highlight=False)
    return wide if wide.is_terminal else Console(width=140, highlight=False)


def _print(columns: list[str], rows: list[tuple]) -> None:
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("seconds", "peak MB")
        shown.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    _console().print(shown)


def print_summary(results: Mapping[str, Result], folder: str) -> None:
    """One line per notebook, then the first error line of each that failed; ``folder`` holds the messages."""
    rows = []
    for name, result in results.items():
        seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
        peak = "" if result.peak_mb is None else f"{result.peak_mb:.0f}"
        rows.append((name, f"[{COLOURS[result.status]}]{result.status}[/]", seconds, peak, result.path))
    print()
    _print(["notebook", "status", "seconds", "peak MB", "result"], rows)
    for name, result in results.items():
        if not result.good:
            hint = f" (messages: {folder}/{name}.log)" if result.status == "failed" else ""
            print(f"{result.status}: {name}: {result.error}{hint}")


def print_list(table: Table, run: str, reasons: Mapping[str, str]) -> None:
    """Every notebook with its title and whether its result is up to date."""
    rows = [(name, table.notebooks[name].title, why or "up to date") for name, why in reasons.items()]
    _print(["notebook", "title", f"results/{run}"], rows)
    print(f"profiles: {', '.join(table.profiles)}")


def print_plan(reasons: Mapping[str, str]) -> None:
    """What would run and why."""
    rows = [(name, "run" if why else "be skipped", why or "up to date") for name, why in reasons.items()]
    _print(["notebook", "would", "reason"], rows)
