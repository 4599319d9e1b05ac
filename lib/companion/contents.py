"""What there is to read: the notebooks by family, with the methods that each shows.

Names and titles come from the table of notebooks (``workflow/notebooks.yaml``), methods and papers from ``lib.methods.METHODS``,
claims from the committed results.
"""

from __future__ import annotations

import json
from itertools import groupby

from lib.companion.shown import markdown
from lib.methods import METHODS
from lib.system.files import ROOT

# the first digit of a notebook's number
FAMILIES = {
    "0": "Begin here",
    "1": "Performance: what training on the set leads to",
    "2": "Distributions of features",
    "3": "Augmentation: what a stored image is trained on as",
    "4": "Data space: where images are searched for",
    "5": "Model space: which networks look",
    "6": "Losses: what else is compared",
    "7": "Efficiency: which real images are looked at",
    "8": "Selection and analysis",
    "9": "Everything together",
}


def titles() -> dict[str, str]:
    """Notebook -> title, in reading order."""
    import yaml

    table = yaml.safe_load((ROOT / "workflow" / "notebooks.yaml").read_text(encoding="utf-8"))
    return {name: row["title"] for name, row in table["notebooks"].items()}


def methods_of(notebook: str) -> list[str]:
    """Names of the methods whose own notebook this is."""
    return [name for name, entry in METHODS.items() if entry.notebook == notebook]


def claims() -> dict[str, str]:
    """Notebook -> its claim in one line, of those that have run under the ``cpu`` profile."""
    paths = (ROOT / "results" / "cpu").glob("*/run.json")
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")).get("claim", "") for path in paths}


def contents() -> str:
    """The list of notebooks as Markdown: families, and one line per notebook with a link, its papers and its claim."""
    lines, claim = [], claims()
    for digit, group in groupby(titles().items(), key=lambda pair: pair[0][0]):
        lines += ["", f"**{digit}x {FAMILIES[digit]}**", ""]
        for name, title in group:
            papers = list(dict.fromkeys(METHODS[method].paper for method in methods_of(name)))
            told = "; ".join(filter(None, papers))
            lines.append(
                f"* [{name}]({name}.ipynb){f' ({told})' if told else ''}: {claim.get(name) or title}"
            )
    return "\n".join(lines).strip()


def show() -> None:
    """Display :func:`contents`."""
    markdown(contents())
