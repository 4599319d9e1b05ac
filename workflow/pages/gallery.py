"""``python -m workflow.pages.gallery``: the results as pages to browse, ``figures/index.html``.

Reads every ``results/<run>/<notebook>/run.json``; needs no server, no script and nothing from the network.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import sys
import tempfile
from html import escape
from itertools import count, groupby
from pathlib import Path
from urllib.parse import quote

from lib.companion.contents import FAMILIES
from lib.companion.profiles import PROFILES
from lib.companion.run import output_root
from lib.companion.verdicts import CONFIRMED, CONTRADICTED, FAILS, HOLDS, tally
from lib.system.errors import CompanionError
from lib.system.files import ROOT
from workflow.pages.page import notebook_body, shell, style_sheet
from workflow.state import held

TITLE = "Dataset distillation, side by side"
LEAD = (
    "A few synthetic images that teach a network what the whole training set would. "
    "Each card is one method or question run on real data, the paper's claims checked on what was measured."
)


def build(root: Path, notebooks: Path | None = None) -> list[Path]:
    """Write ``figures/index.html``, one page per notebook with a run and the style sheet under ``root``.

    Everything is written to a folder of this call's own and then put in place, so that two calls at once leave one whole gallery
    and a reader never sees half a page.

    Args:
        root: folder with ``results/`` and ``figures/``.
        notebooks: folder of the committed notebooks, whose stored outputs are shown where a run kept no
            ``executed.ipynb``; default ``root/notebooks``. Only the ``cpu`` profile's are stored there.

    Returns:
        The pages written, the index first.

    Raises:
        CompanionError: nothing can be written there.
    """
    records = read_records(root / "results")
    figures = root / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=figures, prefix=".pages-", ignore_cleanup_errors=True) as made,
            held(Path(made) / "lock", "this gallery is being built"),  # `run_all.sh clean` leaves it alone
        ):
            pages = write_pages(Path(made), root, notebooks or root / "notebooks", records)
            put_in_place(Path(made), figures)
    except OSError as error:
        raise CompanionError(f"cannot write {figures}: {error.strerror or error}") from error
    return [figures / page for page in pages]


def write_pages(made: Path, root: Path, notebooks: Path, records: list[dict]) -> list[str]:
    """All files of the gallery under ``made``; returns the pages' names, the index first."""
    pages = ["index.html"]
    (made / "html").mkdir()
    for record in records:
        source = notebook_source(root, notebooks, record)
        if source is not None:
            record["page"] = f"html/{record['run']}/{record['notebook']}.html"
            pages.append(record["page"])
            write_page(made / record["page"], source, record)
    (made / "style.css").write_text(style_sheet(), encoding="utf-8")
    index = shell(TITLE, index_body(root, records), description=LEAD)
    (made / "index.html").write_text(index, encoding="utf-8")
    return pages


def put_in_place(made: Path, figures: Path) -> None:
    """Move a finished gallery to where it is read; the one that stood there leaves with ``made``.

    Of two calls at once the later one's stays. A folder cannot replace another in one step, hence the tries.
    """
    for attempt in count():
        with contextlib.suppress(FileNotFoundError):
            (figures / "html").rename(made / f"before-{attempt}")
        try:
            (made / "html").rename(figures / "html")
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt >= 100:
                raise
    for name in ("style.css", "index.html"):
        (made / name).replace(figures / name)


def read_records(results: Path) -> list[dict]:
    """Every readable ``run.json``, by run (cpu, overnight, paper, then others) and notebook; a damaged one is
    named and left out.
    """
    records = []
    for path in sorted(results.glob("*/*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record |= {"run": path.parent.parent.name, "notebook": path.parent.name}
            records.append(
                {"title": path.parent.name, "claim": "", "headline": {}, "figures": {}, "tables": {}} | record
            )
        except (OSError, ValueError, TypeError) as error:
            print(f"left out {path}: {error}", file=sys.stderr)
    order = list(PROFILES)
    return sorted(
        records,
        key=lambda r: (order.index(r["run"]) if r["run"] in order else len(order), r["run"], r["notebook"]),
    )


def notebook_source(root: Path, notebooks: Path, record: dict) -> Path | None:
    """The notebook to show for a run: as executed, else (cpu profile) as committed, else none."""
    executed = root / "results" / record["run"] / record["notebook"] / "executed.ipynb"
    committed = notebooks / f"{record['notebook']}.ipynb"
    if executed.is_file():
        return executed
    return committed if record["run"] == "cpu" and committed.is_file() else None


def write_page(page: Path, source: Path, record: dict) -> None:
    """One notebook as HTML with a way back and its provenance."""
    page.parent.mkdir(parents=True, exist_ok=True)
    name = f"{record['notebook']} · {record['run']}"
    body = f"""<nav class="top"><a href="../../index.html">← All results</a><span>{escape(name)}</span></nav>
<main class="notebook">
{notebook_body(source, page, record["title"])}
{provenance(record)}
</main>"""
    text = shell(f"{record['title']} ({record['run']})", body, root="../../", description=record["claim"])
    page.write_text(text, encoding="utf-8")


def index_body(root: Path, records: list[dict]) -> str:
    """Header and one section per run, its cards by family."""
    parts = [f"<header><h1>{escape(TITLE)}</h1><p>{escape(LEAD)}</p></header>\n<main>"]
    for run in dict.fromkeys(record["run"] for record in records):
        about = f'<p class="about">{escape(PROFILES[run].description)}</p>' if run in PROFILES else ""
        mine = [record for record in records if record["run"] == run]
        families = "\n".join(family(root, key, list(group)) for key, group in groupby(mine, key=_digit))
        parts.append(f"<section><h2>{escape(run)}</h2>{about}\n{families}</section>")
    if not records:
        parts.append("<p>No results yet: run the notebooks first.</p>")
    return "\n".join(parts) + "\n</main>"


def family(root: Path, digit: str, records: list[dict]) -> str:
    """The cards of the notebooks whose numbers begin with one digit."""
    cards = "\n".join(card(root, record) for record in records)
    name = FAMILIES.get(digit, "Others")
    return f'<h3 class="family">{escape(name)}</h3>\n<div class="cards">\n{cards}\n</div>'


def _digit(record: dict) -> str:
    return record["notebook"][:1]


def card(root: Path, record: dict) -> str:
    """Thumbnail, title, claim, ours beside published, verdicts and files of one run."""
    title = escape(record["title"])
    link = quote(record["page"]) if "page" in record else None
    heading = f'<a href="{link}">{title}</a>' if link else title
    headline = record["headline"]
    numbers = "".join(
        f"<div><dt>{name}</dt><dd>{escape(headline[key]).replace(' ± ', '&nbsp;±&nbsp;')}</dd></div>"
        for key, name in (("ours", "ours"), ("published", "published"))
        if headline.get(key)
    )
    return f"""<article class="card">
{thumbnail(root, record)}
<h4><span class="number">{escape(record["notebook"].split("_")[0])}</span> {heading}</h4>
<p class="claim">{escape(record["claim"])}</p>
{f"<dl>{numbers}</dl>" if numbers else ""}
{verdict_list(record)}
{file_list(root, record)}
</article>"""


def thumbnail(root: Path, record: dict) -> str:
    """The figure marked as thumbnail, else the first one that exists."""
    chosen = sorted(record["figures"].values(), key=lambda figure: not figure.get("thumbnail"))
    for figure in chosen:
        if (root / figure["file"]).is_file():
            caption = escape(figure.get("caption", ""))
            source = f'<img loading="lazy" src="{_link(figure["file"])}" alt="{caption}">'
            return f'<div class="thumbnail">{source}</div>'
    return '<div class="thumbnail empty" aria-hidden="true"></div>'


LOOKS = {CONFIRMED: "held", HOLDS: "held", CONTRADICTED: "failed", FAILS: "failed"}  # the others are neither


def verdict_list(record: dict) -> str:
    """How the claims and checks came out, unfolding to their lines."""
    verdicts = record.get("verdicts", [])
    if not verdicts:
        return ""
    pills = " ".join(
        f'<span class="pill {LOOKS.get(outcome, "open")}">{n} {outcome}</span>'
        for outcome, n in tally(verdicts).items()
        if n
    )
    lines = "".join(
        f'<li class="{LOOKS.get(verdict["outcome"], "open")}"><b>{verdict["outcome"]}</b> {escape(verdict["said"])}</li>'
        for verdict in verdicts
    )
    return f'<details class="verdicts"><summary>{pills}</summary><ul>{lines}</ul></details>'


def file_list(root: Path, record: dict) -> str:
    """Links to the figures and tables that exist."""
    links = []
    for kind in ("figures", "tables"):
        for name, entry in record[kind].items():
            path = Path(entry["file"])
            if (root / path).is_file():
                links.append(f'<li><a href="{_link(path)}">{escape(name + path.suffix)}</a></li>')
    number = f"{len(links)} file{'s' if len(links) != 1 else ''}"
    return (
        f'<details class="files"><summary>{number}</summary><ul>{"".join(links)}</ul></details>'
        if links
        else ""
    )


def provenance(record: dict) -> str:
    """Code, versions, machine and cost of a run, folded."""
    git = record.get("git", {})
    commit = git["commit"][:12] if git.get("commit") else "none"
    commit += " with changes" if git.get("dirty") else ""
    facts = {
        "commit": commit,
        "parameters": ", ".join(
            f"{k} = {v}" for k, v in record.get("parameters", {}).items() if v is not None
        ),
        "machine": f"{record.get('device', '?')}, threads {record.get('threads', '?')}",
        "versions": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
        "cost": f"{record.get('seconds', 0):.0f} s, peak memory {record.get('peak_mb', 0):,.0f} MB",
    }
    for name, stage in record.get("stages", {}).items():
        facts[f"stage {name}"] = f"{stage['seconds']:.1f} s"
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    return f'<details class="provenance"><summary>How this was made</summary><dl>{rows}</dl></details>'


def _link(path: Path | str) -> str:
    """The way from ``figures/`` to a file recorded relative to the root."""
    path = Path(path)
    return quote(
        path.relative_to("figures").as_posix() if path.parts[0] == "figures" else f"../{path.as_posix()}"
    )


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
