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


def rows_of(record: dict) -> list[dict]:
    """A row for every verdict of a ``run.json``."""
    rows = []
    for one in record["verdicts"]:
        row = {"notebook": record["notebook"], "outcome": one["outcome"], "claim": one["text"]}
        brackets = (
            one["said"].removeprefix(one["text"]).removeprefix(f" ({one['source']})")
        )  # " [numbers]", or nothing
        rows.append(
            row | {"source": one["source"], "numbers": brackets[2:-1], "commit": record["git"]["commit"]}
        )
    return rows


def stored(root: Path = ROOT) -> pd.DataFrame:
    """The table as it is; empty where nothing was run."""
    path = path_under(root)
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=COLUMNS)


def renewed(root: Path) -> pd.DataFrame:
    """The table with the rows of the runs that are there."""
    paths = sorted((root / "results" / RUN).glob("*/run.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    before = stored(root)
    kept = before[~before["notebook"].isin([record["notebook"] for record in found])]
    new = pd.DataFrame([row for record in found for row in rows_of(record)], columns=COLUMNS)
    return pd.concat([kept, new], ignore_index=True).sort_values("notebook", kind="stable", ignore_index=True)


def main() -> int:
    """Write the table."""
    table = renewed(ROOT)
    tables.write_csv(table, path_under(ROOT))
    print(
        f"{path_under(ROOT).relative_to(ROOT)}: {len(table)} verdicts of {table['notebook'].nunique()} notebooks"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
