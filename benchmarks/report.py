"""What was measured and where, as tables for the terminal, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row
from lib.system.files import write_text

CLAIM = (
    "Times are medians of interleaved repeats; *ratio* is the time of the plain reference loop, run in the same "
    "process, by the candidate's. *Difference* is the relative error of the candidate's values (loss and image gradient, "
    "learned weights, logits, pixels) against the reference's on the same random numbers, asserted before timing."
)
COSTS = (
    "Each line is a process of its own. *Memory* is the peak of the first call above what the process held before it; "
    "page faults are per unit, after the first call. *tuned* is `lib.system.allocator`."
)


@dataclasses.dataclass(frozen=True)
class Results:
    """All of one run: where, the timings, and the costs of single processes (CPU only)."""

    header: dict[str, str]
    rows: list[Row]
    costs: list[dict]


def header(device: torch.device, allocator: str, settings: str, note: str = "") -> dict[str, str]:
    """Everything that a timing depends on."""
    cuda = device.type == "cuda"
    lines = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "dtype": "float32, except the rows that say bfloat16",
        "convolutions in TF32": str(torch.backends.cudnn.allow_tf32) if cuda else "",
        "allocator": allocator,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shapes": settings,
        "note": note,
    }
    return {key: value for key, value in lines.items() if value}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def timing_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column names, and text for every row."""
    memory = any(row.peak_mib is not None for row in rows)
    columns = ["hot spot", "size", "IPC", "candidate", "ms", "per", "ratio", "target", "difference"]
    cells = []
    for row in rows:
        target = (
            ""
            if row.target is None
            else f">= {row.target:g} {'met' if row.ratio >= row.target else 'missed'}"
        )
        line = [row.hot_spot, row.size, str(row.ipc), row.candidate, f"{row.milliseconds:.3g}", row.unit]
        line += [f"{row.ratio:.2f}", target, f"{row.difference:.0e}" if row.difference else ""]
        cells.append(line + ([f"{row.peak_mib:.0f}"] if memory else []))
    return columns + (["peak MiB"] if memory else []), cells


def cost_cells(costs: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """The same for the single processes."""
    columns = ["hot spot", "size", "candidate", "allocator", "ms", "per", "page faults", "memory, MiB"]
    cells = [
        [c["hot_spot"], c["size"], c["candidate"], c["allocator"], f"{c['milliseconds']:.3g}", c["unit"],
         f"{c['page_faults']:,.0f}", f"{c['peak_mib']:.0f}"]
        for c in costs
    ]  # fmt: skip
    return columns, cells


def terminal() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show(title: str, columns: list[str], cells: list[list[str]], console: Console) -> None:
    """A table on the terminal."""
    table = Table(*columns, title=title, title_justify="left")
    for line in cells:
        table.add_row(*line)
    console.print(table)


def markdown(results: Results) -> str:
    """The file ``results.md``."""
    lines = ["# Benchmarks", "", *(f"- {key}: {value}" for key, value in results.header.items())]
    lines += ["", CLAIM, "", *_markdown_table(*timing_cells(results.rows))]
    if results.costs:
        lines += ["", "## Memory and allocator", "", COSTS, "", *_markdown_table(*cost_cells(results.costs))]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: list[str], cells: list[list[str]]) -> list[str]:
    table = [columns, ["---"] * len(columns), *cells]
    return ["| " + " | ".join(line) + " |" for line in table]


def write(results: Results, folder: Path, stem: str) -> None:
    """``<stem>.md`` and ``<stem>.json`` in ``folder``."""
    write_text(folder / f"{stem}.md", markdown(results))
    write_text(folder / f"{stem}.json", json.dumps(dataclasses.asdict(results), indent=1) + "\n")
