"""``python -m workflow.pages.gallery``: the results as pages to browse, ``figures/index.html``.

Writes what is particular here (a front page, the leaderboard, each notebook with its papers and its provenance) as MyST Markdown and
leaves the rest to Sphinx (``conf.py``). Reads every ``results/<run>/<notebook>/run.json``; the pages need no server and no network.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
import shutil
import sys
import tempfile
from html import escape
from importlib.metadata import files
from itertools import groupby
from pathlib import Path

from lib.companion import tables
from lib.companion.contents import FAMILIES, methods_of
from lib.companion.profiles import PROFILES
from lib.companion.run import output_root
from lib.companion.verdicts import CONFIRMED, CONTRADICTED, FAILS, HOLDS, tally
from lib.methods import METHODS
from lib.system.errors import CompanionError
from lib.system.files import ROOT
from workflow.machine import cores
from workflow.pages import overview
from workflow.state import held

HERE = Path(__file__).parent
TITLE = "Dataset distillation, side by side"
LEAD = (
    "A few synthetic images that teach a network what the whole training set would. "
    "Each card is one method or question run on real data, the paper's claims checked on what was measured."
)
LOOKS = {
    CONFIRMED: "success",
    HOLDS: "success",
    CONTRADICTED: "warning",
    FAILS: "warning",
}  # the others are neither
BORDER = ' border="1"'  # which pandas gives a table
FILTER = '<input class="filter" type="search" placeholder="Filter: DM, fashion14, confirmed ..." aria-label="Filter">'


def build(root: Path, notebooks: Path | None = None) -> list[Path]:
    """Write ``figures/index.html`` and one page per notebook with a run under ``root``.

    Everything is made in a folder of this call's own and then put in place, so that two calls at once leave one whole gallery.

    Args:
        root: folder with ``results/`` and ``figures/``.
        notebooks: folder of the committed notebooks, whose stored outputs are shown where a run kept no
            ``executed.ipynb``; default ``root/notebooks``. Only the ``cpu`` profile's are stored there.

    Returns:
        The pages written, the index first.

    Raises:
        CompanionError: nothing can be written there.
    """
    records, figures = read_records(root / "results"), root / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=figures, prefix=".pages-", ignore_cleanup_errors=True) as made,
            held(Path(made) / "lock", "this gallery is being built"),  # `run_all.sh clean` leaves it alone
        ):
            source, beside, site = (Path(made, name) for name in ("source", "beside", "site"))
            write_sources(source, beside, root, notebooks or root / "notebooks", records)
            sphinx(source, beside, site)
            put_in_place(site, figures)
    except OSError as error:
        raise CompanionError(f"cannot write {figures}: {error.strerror or error}") from error
    return [
        figures / "index.html",
        *(figures / f"{record['page']}.html" for record in records if "page" in record),
    ]


def read_records(results: Path) -> list[dict]:
    """Every readable ``run.json``, by run (cpu, overnight, paper, then others) and notebook; a damaged one is
    named and left out.
    """
    records = []
    for path in sorted(results.glob("*/*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record |= {"run": path.parent.parent.name, "notebook": path.parent.name}
            records.append({"title": path.parent.name, "claim": "", "headline": {}, "figures": {}} | record)
        except (OSError, ValueError, TypeError) as error:
            print(f"left out {path}: {error}", file=sys.stderr)
    order = [*PROFILES, *sorted({record["run"] for record in records} - PROFILES.keys())]
    return sorted(records, key=lambda record: (order.index(record["run"]), record["notebook"]))


def sphinx(source: Path, beside: Path, site: Path) -> None:
    """Make ``site`` from ``source`` and copy what is ``beside`` it; what Sphinx complains of is said."""
    # jsonschema's check of URI formats, which notebooks do not have, costs a second at import
    sys.modules.setdefault("rfc3987_syntax", None)
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    changes = {"html_extra_path": [str(beside)]}
    with patch_docutils(HERE), docutils_namespace():
        doctrees = site.with_name("doctrees")
        app = Sphinx(
            source, HERE, site, doctrees, "html", changes, status=None, warning=sys.stderr, parallel=cores()
        )
        app.build()
    shutil.rmtree(site / "_sources", ignore_errors=True)  # empty
    (site / ".buildinfo").unlink(missing_ok=True)


def put_in_place(site: Path, figures: Path) -> None:
    """Move a finished gallery to where it is read, one after another where several are made at once."""
    with open(figures / ".pages.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for made in sorted(site.iterdir()):
            place, old = figures / made.name, site.parent / f"before-{made.name}"
            if place.exists():
                place.rename(old)
            made.rename(place)


# -- what Sphinx reads ----------------------------------------------------------------------------------------------------


def write_sources(source: Path, beside: Path, root: Path, notebooks: Path, records: list[dict]) -> None:
    """All of ``source``: the notebooks with their pages' names in ``record["page"]``, the leaderboard and the front page; and what
    stands ``beside`` the pages: notebooks to download, and MathJax in one file.
    """
    (script,) = (file for file in files("sphinx-mathjax-offline") if file.match("mathjax/tex-svg.js"))
    (beside / "_static").mkdir(parents=True)
    shutil.copy(script.locate(), beside / "_static")
    for record in records:
        shown = notebook_source(root, notebooks, record)
        if shown is None:
            continue
        record["page"] = f"html/{record['run']}/{record['notebook']}"
        text = shown.read_text(encoding="utf-8")
        content = json.dumps(prepared(json.loads(text), record))
        name = f"{record['page']}.ipynb"
        # beside it the same as a script, which a page may load from a file: see pages.js
        for path, written in (
            (beside / name, text),
            (beside / f"{name}.js", f"keep({json.dumps(text)})\n"),
            (source / name, content),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(written, encoding="utf-8")
    source.mkdir(exist_ok=True)
    board = tables.standing(tables.read_tables(root / "results"))
    (source / "leaderboard.md").write_text(leaderboard(board, records), encoding="utf-8")
    pictures = overview.draw(board, source)
    (source / "index.md").write_text(index(source, root, records, pictures), encoding="utf-8")


def notebook_source(root: Path, notebooks: Path, record: dict) -> Path | None:
    """The notebook to show for a run: as executed, else (cpu profile) as committed, else none."""
    executed = root / "results" / record["run"] / record["notebook"] / "executed.ipynb"
    committed = notebooks / f"{record['notebook']}.ipynb"
    if executed.is_file():
        return executed
    return committed if record["run"] == "cpu" and committed.is_file() else None


def prepared(notebook: dict, record: dict) -> dict:
    """A notebook as its page shows it: code folded, tables that may be wide, papers and a download first, provenance last."""
    cells = [
        cell for cell in notebook["cells"] if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
        for output in cell.get("outputs", ()):
            if "text/html" in (data := output.get("data", {})):
                markup = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
                data["text/html"] = re.sub(r"<table.*?</table>", _wide, markup, flags=re.DOTALL)
    heading = {"cell_type": "markdown", "id": "first", "metadata": {}, "source": f"# {record['title']}\n"}
    first = cells[0] if cells and "".join(cells[0]["source"]).startswith("# ") else heading
    title, _, rest = "".join(first["source"]).partition("\n")
    first["source"] = f"{title}\n\n{papers(record)}\n\n{rest}"
    last = {"cell_type": "markdown", "id": "last", "metadata": {}, "source": provenance(record)}
    return notebook | {"cells": [first, *(cell for cell in cells if cell is not first), last]}


def _wide(table: re.Match) -> str:
    return f'<div class="wide" role="region" aria-label="table" tabindex="0">{table[0].replace(BORDER, "")}</div>'


def papers(record: dict) -> str:
    """The line below a heading: the notebook to download and the papers to read."""
    found = {
        METHODS[name].arxiv: METHODS[name] for name in methods_of(record["notebook"]) if METHODS[name].arxiv
    }
    links = [f'<a href="{record["notebook"]}.ipynb" download>notebook</a>', escape(f"run {record['run']}")]
    links += [
        f'<a href="https://arxiv.org/abs/{key}">{escape(entry.paper)}, arXiv {key}</a>'
        for key, entry in found.items()
    ]
    return f'<p class="facts">{" · ".join(links)}</p>'


def provenance(record: dict) -> str:
    """Code, versions, machine and cost of a run, folded."""
    git = record.get("git", {})
    commit = (git.get("commit") or "none")[:12] + (" with changes" if git.get("dirty") else "")
    given = {name: value for name, value in record.get("parameters", {}).items() if value is not None}
    facts = {
        "commit": commit,
        "parameters": ", ".join(f"{name} = {value}" for name, value in given.items()),
        "machine": f"{record.get('device', '?')}, threads {record.get('threads', '?')}",
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
        "cost": f"{record.get('seconds', 0):.0f} s, peak memory {record.get('peak_mb', 0):,.0f} MB",
    } | {f"stage {name}": f"{stage['seconds']:.1f} s" for name, stage in record.get("stages", {}).items()}
    rows = "\n".join(f"{name}\n: {text(value)}\n" for name, value in facts.items())
    return f"::::{{dropdown}} How this was made\n{rows}\n::::"


def text(words: str) -> str:
    """Words as Markdown that says just them."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|$~&^])", r"\\\1", words)


# -- the front page and the leaderboard -----------------------------------------------------------------------------------


def index(source: Path, root: Path, records: list[dict], pictures: list[str]) -> str:
    """The front page: overview, filter, and the cards of every run by family."""
    parts = ["---\nhide-toc: true\n---", f"# {TITLE}", LEAD]
    for theme, picture in zip(("light", "dark"), pictures, strict=False):
        parts.append(f"![{overview.CAPTION}]({picture}){{.only-{theme} .overview}}")
    if pictures:
        parts.append(f"*{overview.CAPTION}* [All numbers](leaderboard.md) can be sorted and filtered.")
    parts.append(FILTER if records else "No results yet: run the notebooks first.")
    trees = ["```{toctree}\n:hidden:\n\nleaderboard\n```"]
    for (run, digit), group in groupby(records, key=lambda record: (record["run"], record["notebook"][:1])):
        mine = list(group)
        name = f"{'' if run == 'cpu' else f'{run}: '}{FAMILIES.get(digit, 'Others')}"
        cards = "\n".join(card(source, root, record) for record in mine)
        parts.append(f"## {text(name)}\n\n:::::{{grid}} 1 2 2 3\n:gutter: 3\n\n{cards}\n:::::")
        pages = "\n".join(f"{record['title']} <{record['page']}>" for record in mine if "page" in record)
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {name}\n\n{pages}\n```")
    return "\n\n".join([*parts, *trees, ""])


def card(source: Path, root: Path, record: dict) -> str:
    """Pictures, title, claim, ours beside published and verdicts of one run."""
    link = f":link: /{record['page']}\n:link-type: doc\n" if "page" in record else ""
    shown = ""
    for figure in pictures_of(root, record):
        copy = Path("pictures", figure["file"])
        (source / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / figure["file"], source / copy)
        shown += f"![{text(figure.get('caption') or record['title'])}](/{copy.as_posix()})\n"
    numbers = "\n".join(
        f"{name}\n: {text(record['headline'][name])}\n"
        for name in ("ours", "published")
        if record["headline"].get(name)
    )
    outcomes = tally(record.get("verdicts", []))
    badges = " ".join(
        f"{{bdg-{LOOKS.get(name, 'secondary')}-line}}`{n} {name}`" for name, n in outcomes.items() if n
    )
    title = f"{record['notebook'].split('_')[0]} {text(record['title'])}"
    parts = [f"::::{{grid-item-card}} {title}\n{link}", shown, text(record["claim"]), numbers, badges]
    return "\n\n".join(part for part in parts if part) + "\n::::"


def pictures_of(root: Path, record: dict) -> list[dict]:
    """Images before and after distillation, of the case that the run marked if it can be; else the figure it marked, else the first."""
    found = {name: figure for name, figure in record["figures"].items() if (root / figure["file"]).is_file()}
    marked = sorted(found, key=lambda name: not found[name].get("thumbnail"))
    pairs = [
        (f"start_{name[4:]}", name)
        for name in marked
        if name.startswith("end_") and f"start_{name[4:]}" in found
    ]
    return [found[name] for name in (pairs or [marked])[0][: 2 if pairs else 1]]


def leaderboard(board, records: list[dict]) -> str:
    """Every row of every table that stands for a method, to sort and to filter."""
    import pandas as pd

    pages = {(record["run"], record["notebook"]): record["page"] for record in records if "page" in record}
    rows, order = [], ["run", "dataset", "ipc", "labels", "protocol", "network", "acc"]
    for row in board.sort_values(order, ascending=[True] * 6 + [False]).to_dict("records"):
        entry, name = METHODS[row["method"]], escape(tables.label(row["method"]))
        page = pages.get((row["run"], row["notebook"]))
        rows.append(
            {
                "method": f'<a href="https://arxiv.org/abs/{entry.arxiv}">{name}</a>'
                if entry.arxiv
                else name,
                "notebook": f'<a href="{page}.html">{row["notebook"]}</a>' if page else row["notebook"],
                "data": row["dataset"],
                "ipc": row["ipc"],
                "accuracy": f"{row['acc']:.1f}",
                "±": f"{row['acc_sd']:.1f}",
                "sets": row["n"],
                "random": f"{row['random_acc']:.1f}",
                "gain": f"{row['acc'] - row['random_acc']:+.1f}",
                "all data": f"{row['full_acc']:.1f}",
                "labels": row["labels"],
                "protocol": escape(row["protocol"]),
                "network": escape(row["network"]),
                "seconds": f"{row['seconds']:.1f}",
                "bytes": f"{row['bytes_images'] + row['bytes_labels']:.0f}",
                "run": escape(row["run"]),
            }
        )
    frame = pd.DataFrame(rows).replace({"nan": "", "+nan": ""})
    if len(frame) and frame["run"].nunique() == 1:
        frame = frame.drop(columns="run")
    table = (
        frame.to_html(index=False, escape=False, border=0, classes="sortable")
        if rows
        else "<p>No results yet.</p>"
    )
    about = (
        "Accuracy in %, mean ± standard deviation over independent sets. Only rows of the same data, IPC, protocol, network and labels "
        "may be compared: `random` is as many real images, `all data` the whole training set, under that row's protocol. Seconds are of "
        "one distillation on the machine that ran it. A click on a heading sorts; the field takes words of a row, such as `fashion14 hard`."
    )
    return f'---\nhide-toc: true\n---\n\n# Leaderboard\n\n{about}\n\n{FILTER}\n\n<div class="wide">\n{table}\n</div>\n'


def main(words: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.pages.gallery", description="Build figures/index.html."
    )
    parser.add_argument("--root", type=Path, default=output_root(), help="folder with results/ and figures/")
    root = parser.parse_args(words).root
    try:
        pages = build(root, ROOT / "notebooks")
    except CompanionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{pages[0]}: {len(pages) - 1} notebook pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
