"""What a run did, as tables for the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from workflow.state import EXECUTED, FAILED, folder, plan, reason, record_file
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


def results_of(root: Path, table: Table, request: Request, since: float) -> dict[str, Result]:
    """The result of every notebook of the request; records older than ``since`` (seconds since 1970) are of earlier runs."""
    return {name: _result(root, table, request, name, since) for name in request.notebooks}


def _result(root: Path, table: Table, request: Request, name: str, since: float) -> Result:
    results = folder(root, request.run, name)
    executed, failed = (str((results / file).relative_to(root)) for file in (EXECUTED, FAILED))
    try:
        record = json.loads(record_file(root, request.run, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {"ended": 0}
    if record["ended"] >= since:
        path = executed if record["status"] == "ok" else failed
        return Result(record["status"], path, record["seconds"], record["peak_mb"], record["error"])
    why = reason(root, table, request, name)
    return Result("not run", "", error=why) if why else Result("up to date", executed)


def console() -> Console:
    """A terminal as wide as it is, and wide enough for paths where the output goes to a file."""
    wide = Console(highlight=False)
    return wide if wide.is_terminal else Console(width=140, highlight=False)


def _table(*columns: str) -> RichTable:
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in ("seconds", "peak MB")
        shown.add_column(column, justify="right" if right else "left", overflow="fold")
    return shown


def print_summary(results: dict[str, Result], logs: Path, status: int) -> None:
    """One line per notebook, then the first error line of each that failed."""
    shown = _table("notebook", "status", "seconds", "peak MB", "result")
    for name, result in results.items():
        seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
        peak = "" if result.peak_mb is None else f"{result.peak_mb:.0f}"
        colour = COLOURS[result.status]
        shown.add_row(name, f"[{colour}]{result.status}[/]", seconds, peak, result.path)
    out = console()
    out.print()
    out.print(shown)
    logs = logs.relative_to(logs.parents[2])
    for name, result in results.items():
        if not result.good:
            hint = f" (messages: {logs / name}.log)" if result.status == "failed" else ""
            out.print(f"{result.status}: {name}: {result.error}{hint}", markup=False, soft_wrap=True)
    if status not in (0, 130) and all(result.status != "failed" for result in results.values()):
        out.print(
            f"the scheduler ended with status {status}; see {logs / 'snakemake.log'}",
            markup=False,
            soft_wrap=True,
        )


def print_list(root: Path, table: Table, request: Request) -> None:
    """Every notebook with its title and whether its result is up to date."""
    shown = _table("notebook", "title", f"results/{request.run}")
    for name, why in plan(root, table, request).items():
        shown.add_row(name, table.notebooks[name].title, why or "up to date")
    out = console()
    out.print(shown)
    out.print(f"profiles: {', '.join(table.profiles)}")


def print_plan(reasons: dict[str, str]) -> None:
    """What would run and why."""
    shown = _table("notebook", "would", "reason")
    for name, why in reasons.items():
        shown.add_row(name, "run" if why else "be skipped", why or "up to date")
    console().print(shown)
