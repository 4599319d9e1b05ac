"""``python -m workflow.pages.readme``: the parts of README.md that follow from the code and the committed results.

Each stands between ``<!-- begin: NAME -->`` and ``<!-- end -->``: the table of methods, the counts, the notebooks by family, the
map of ``lib/``. ``--check`` writes nothing and says what is out of date.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

import pandas as pd

from lib.companion import benchmark, published, tables, verdicts
from lib.companion.contents import FAMILIES, methods_of, titles
from lib.evaluate.spread import Spread
from lib.methods import METHODS
from lib.system.errors import CompanionError
from lib.system.files import ROOT, write_text
from workflow.pages import evidence

RUN = "cpu"  # whose results are committed
CASES = (("digits", 1), ("fashion14", 1))
QUOTED = ("fashionmnist", 1)
PROTOCOL, NETWORK = "cpu-small", "ConvNet-D3-W128"  # what is judged alike
ROWS = 13  # methods in the table at most; the leaderboard's page has all
BLOCK = re.compile(r"(<!-- begin: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# of the formula first; what is not named here follows by name
ORDER = (
    "data", "nets", "augment", "synset", "match", "formation", "select", "methods", "plain", "recipes", "distill", "compose",
    "evaluate", "kernels", "optim", "recover", "analysis", "scale", "companion", "system",
)  # fmt: skip
OWN, OTHER = (
    "own",
    "other",
)  # how a result is judged otherwise: under its own protocol or labels; other epochs or network


def rewritten(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    """``text`` with every block between markers written anew.

    Raises:
        CompanionError: a block is missing, or nobody writes it.
    """
    found = [match[2] for match in BLOCK.finditer(text)]
    if sorted(found) != sorted(blocks):
        raise CompanionError(
            f"README.md has the blocks {', '.join(found) or 'none'}; wanted, once each: {', '.join(blocks)}"
        )
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]()}\n{match[3]}", text)


def writers(root: Path) -> dict[str, Callable[[], str]]:
    """Block -> what writes it, from the results under ``root``."""
    records = evidence.read_records(root / "results" / RUN)
    frame = tables.read_tables(root / "results")
    frame = frame[frame["run"] == RUN]
    return {
        "counts": lambda: counts(records, evidence.stored(root)),
        "results": lambda: results(frame, records),
        "benchmark": benchmark_table,
        "notebooks": lambda: notebooks(records),
        "rooms": lambda: rooms(root / "lib"),
    }


# -- counts ---------------------------------------------------------------------------------------------------------------


def held(record: dict | None) -> str:
    """Claims confirmed of claims tested: ``7/12``."""
    found = verdicts.tally((record or {}).get("verdicts", []))
    tested = sum(found[outcome] for outcome in verdicts.CLAIMS if outcome != verdicts.UNTESTED)
    return f"{found[verdicts.CONFIRMED]}/{tested}" if tested else ""


def counts(records: dict[str, dict], overnight: pd.DataFrame) -> str:
    """How many methods, papers, notebooks and claims; then the claims of the longer profile, as far as it was run."""
    papers = {entry.paper for entry in METHODS.values() if entry.paper}
    first = (
        f"{len(METHODS)} methods of {len(papers)} papers, {len(records)} notebooks. "
        f"Of {outcomes(one for record in records.values() for one in record['verdicts'])} All are reported with their numbers."
    )
    if overnight.empty:
        return first
    run, lines = overnight["notebook"].nunique(), evidence.path_under(Path()).as_posix()
    told = outcomes(overnight.to_dict("records"))
    return f"{first}\n\nThe profile `{evidence.RUN}`, run for {run} of the notebooks: of {told} [Every line]({lines})."


def outcomes(judged: Iterable[Mapping]) -> str:
    """``420 claims of the papers that they name, 161 are confirmed, ...; of 118 checks ..., 100 hold.``"""
    found = verdicts.tally(judged)
    claims = ", ".join(f"{found[outcome]} are {outcome}" for outcome in verdicts.CLAIMS if found[outcome])
    named, checks = (sum(map(found.get, kind)) for kind in (verdicts.CLAIMS, verdicts.CHECKS))
    return (
        f"{named} claims of the papers that they name, {claims}; of {checks} checks (identities, costs, sanity), "
        f"{found[verdicts.HOLDS]} hold."
    )


# -- the table of methods -------------------------------------------------------------------------------------------------


def results(frame, records: dict[str, dict]) -> str:
    """The methods that are judged alike in all cases, those with the highest accuracy in the last one, and what frames them."""
    standing = tables.standing(frame)
    found = {name: cells for name in METHODS if name != "random" and (cells := alike(standing, name))}
    best = sorted(found, key=lambda name: -found[name][-1].mean)[: ROWS - 1]
    rows = []
    for name in ("random", *best):
        cells = [spread.text() for spread in alike(standing, name) or ()]
        if cells:
            entry = METHODS[name]
            rows.append(
                [paper(name), linked(entry.notebook), *cells, quoted(name), held(records.get(entry.notebook))]
            )
    ceilings = [*(full(standing, *case) for case in CASES), full_published(QUOTED[0])]
    rows.append(["all training data", "", *ceilings, ""])
    columns = ["method", "notebook", *(f"{data}, {ipc} per class" for data, ipc in CASES)]
    return "\n".join(table([*columns, "published, Fashion-MNIST", "claims"], rows))


def benchmark_table() -> str:
    """Published and ours on the papers' data under their protocol, without the seconds."""
    frame = benchmark.stored()
    frame = frame[[column for column in frame if not column.endswith("seconds")]]
    return "\n".join(table(frame.columns, frame.values.tolist()))


def alike(standing, name: str) -> list[Spread]:
    """The accuracies of a method in all cases; empty if one is missing, or judged otherwise than those of the others."""
    found = [chosen(standing, name, *case) for case in CASES]
    return [] if any(one is None or one[1] for one in found) else [tables.spread_in(row) for row, _ in found]


def chosen(standing, name: str, data: str, ipc: int):
    """The row that shows a method in a case, and its mark; None without one.

    One row stands for each protocol and network (:func:`lib.companion.tables.standing`). The common ones go first, then hard
    labels, then the method's own notebook, then the order of its table.
    """
    rows = case_of(standing, data, ipc)
    network = common_network(rows)
    found = [(row, mark_of(row, network)) for _, row in rows[rows["method"] == name].iterrows()]
    own = METHODS[name].notebook
    return min(
        found, key=lambda pair: (bool(pair[1]), pair[1] == OWN, pair[0]["notebook"] != own), default=None
    )


def case_of(standing, data: str, ipc: int):
    """The rows of a data set and IPC."""
    return standing[(standing["dataset"] == data) & (standing["ipc"] == ipc)]


def common_network(rows) -> str | None:
    """The network on which random real images, hence the methods, are judged in a case."""
    found = rows[
        (rows["method"] == "random")
        & (rows["protocol"] == PROTOCOL)
        & (rows["notebook"] == METHODS["random"].notebook)
    ]
    return None if found.empty else found["network"].iloc[0]


def mark_of(row, network: str | None) -> str:
    """ "" for hard labels under the common protocol, else what is different."""
    if row["labels"] != "hard" or row["protocol"].startswith(("own", "regression", "fkd", "fresh")):
        return OWN
    return "" if (row["protocol"], row["network"]) == (PROTOCOL, network) else OTHER


def quoted(name: str) -> str:
    """The published accuracy of a method as published, with the common network."""
    frame = published.numbers([name], [QUOTED[0]])
    frame = frame[(frame["ipc"] == QUOTED[1]) & (frame["variant"] == "") & (frame["network"] == NETWORK)]
    return "" if frame.empty else Spread.stated(frame["acc"].iloc[0], frame["acc_sd"].iloc[0]).text()


def full(standing, data: str, ipc: int) -> str:
    """The accuracy on all training data that stands beside random real images."""
    rows = case_of(standing, data, ipc)
    rows = rows[(rows["method"] == "random") & (rows["protocol"] == PROTOCOL)].dropna(subset=["full_acc"])
    return "" if rows.empty else f"{rows['full_acc'].iloc[0]:.1f}"


def full_published(data: str) -> str:
    frame = published.numbers(["full data"], [data])
    return "" if frame.empty else Spread.stated(frame["acc"].iloc[0], frame["acc_sd"].iloc[0]).text()


def paper(name: str) -> str:
    """``DM (Zhao & Bilen 2023)``, linked where the paper can be read."""
    entry = METHODS[name]
    about = "; ".join(filter(None, [entry.paper, "our reconstruction" if entry.reconstruction else ""]))
    title = f"{entry.title} ({about})" if about else entry.title
    return f"[{title}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else title


# -- notebooks and rooms --------------------------------------------------------------------------------------------------


def notebooks(records: dict[str, dict]) -> str:
    """All notebooks by family: title, papers, and claims confirmed of those tested."""
    lines = []
    for digit, group in groupby(titles().items(), key=lambda pair: pair[0][0]):
        told = []
        for name, _ in group:
            papers = dict.fromkeys(
                METHODS[method].arxiv for method in methods_of(name) if METHODS[method].arxiv
            )
            links = ", ".join(f"[arXiv](https://arxiv.org/abs/{key})" for key in papers)
            notes = ", ".join(filter(None, [links, held(records.get(name))]))
            told.append(f"[{name}](notebooks/{name}.ipynb){f' ({notes})' if notes else ''}")
        lines.append(f"* **{FAMILIES[digit]}**: {', '.join(told)}")
    return "\n".join(lines)


def rooms(folder: Path) -> str:
    """Every package and module at the top of ``folder``, with the first sentence of its docstring."""
    files = {path.stem: path for path in folder.glob("*.py") if path.stem != "__init__"}
    files |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    order = sorted(files, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    lines = [
        [f"`lib/{name}{'' if files[name].stem == '__init__' else '.py'}`", sentence(files[name])]
        for name in order
    ]
    return "\n".join(table(["where", "what"], lines))


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise CompanionError(f"{path} has no docstring to say what it is")
    paragraph = " ".join(docstring.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
    return re.split(r"(?<=[a-z`$)])\. (?=[A-Z])", paragraph)[0].rstrip(".:")


def linked(notebook: str) -> str:
    """A link to a notebook; nothing while a method has none."""
    there = (ROOT / "notebooks" / f"{notebook}.ipynb").is_file()
    return f"[{notebook}](notebooks/{notebook}.ipynb)" if there else ""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    columns = list(columns)
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def main(words: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.pages.readme", description="README.md from code and results."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 and name the parts that are out of date"
    )
    given = parser.parse_args(words)
    readme = ROOT / "README.md"
    try:
        before = readme.read_text(encoding="utf-8")
        after = rewritten(before, writers(ROOT))
    except CompanionError as error:
        print(error, file=sys.stderr)
        return 1
    changed = [
        old[2]
        for old, new in zip(BLOCK.finditer(before), BLOCK.finditer(after), strict=True)
        if old[0] != new[0]
    ]
    if changed:
        print(
            f"README.md: {', '.join(changed)} {'out of date: python -m workflow.pages.readme' if given.check else 'written'}"
        )
    if changed and not given.check:
        write_text(readme, after)
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
