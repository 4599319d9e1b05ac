"""``python -m workflow.pages.evidence``: every verdict of the overnight runs, in ``results/overnight/verdicts.csv``.

The figures, tables and sets of some notebooks only are committed from that profile; the lines of all notebooks that were run are.
Rows of a notebook whose ``run.json`` is there are written anew, those of the others stay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from lib.companion import tables
from lib.system.files import ROOT

RUN = "overnight"
COLUMNS = ("notebook", "outcome", "claim", "source", "numbers", "commit")


def path_under(root: Path) -> Path:
    """Where the table lies."""
    return root / "results" / RUN / "verdicts.csv"


def read_records(folder: Path) -> dict[str, dict]:
    """``run.json`` of every notebook of a run, by its name."""
    paths = sorted(folder.glob("*/run.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def rows_of(notebook: str, record: dict) -> list[dict]:
    """A row for every verdict of a ``run.json``."""
    rows, commit = [], record["git"]["commit"]
    for one in record["verdicts"]:
        text, source = one["text"], one["source"]
        brackets = one["said"].removeprefix(text).removeprefix(f" ({source})")  # " [numbers]", or nothing
        values = (notebook, one["outcome"], text, source, brackets[2:-1], commit)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def stored(root: Path = ROOT) -> pd.DataFrame:
    """The table as it is; empty where nothing was run."""
    path = path_under(root)
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=COLUMNS)


def renewed(root: Path) -> pd.DataFrame:
    """The table with the rows of the runs that are there."""
    records, before = read_records(root / "results" / RUN), stored(root)
    kept = before[~before["notebook"].isin(list(records))]
    new = pd.DataFrame([row for pair in records.items() for row in rows_of(*pair)], columns=COLUMNS)
    return pd.concat([kept, new], ignore_index=True).sort_values("notebook", kind="stable", ignore_index=True)


def write(root: Path) -> pd.DataFrame:
    """Bring the table up to date, and return it."""
    table = renewed(root)
    tables.write_csv(table, path_under(root))
    return table


def main() -> int:
    """Write the table and say how much is in it."""
    table, place = write(ROOT), path_under(ROOT).relative_to(ROOT)
    print(f"{place}: {len(table)} verdicts of {table['notebook'].nunique()} notebooks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
