"""The gallery: every link and picture resolves, text is text, and a real browser has nothing to complain about."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat import writes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from lib.companion import plots, start, tables
from lib.evaluate import Spread
from lib.system.files import ROOT
from workflow.pages import gallery

HOSTILE = "DM <script>alert('x')</script> & \"quotes\" *stars* $5"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"
)
BROAD, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A project folder with two runs, one with an executed notebook, and its gallery."""
    root = tmp_path_factory.mktemp("site")
    strict = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.setenv("COMPANION_OUT", str(root))
        patch.setenv("COMPANION_RUN", "cpu")
        picture = _results("20_dm", HOSTILE)
        patch.setenv("COMPANION_RUN", "overnight")
        _results("90_leaderboard", "Side by side", profile="overnight")
    torch.use_deterministic_algorithms(strict)
    (root / "results/cpu/20_dm/executed.ipynb").write_text(_executed(picture))
    broken = root / "results/cpu/99_broken/run.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    assert _gallery(root).returncode == 0
    return root


def _gallery(root: Path) -> subprocess.CompletedProcess:
    """The command, in a process of its own: Sphinx keeps what it registered."""
    words = [sys.executable, "-m", "workflow.pages.gallery", "--root", str(root)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def _results(notebook: str, title: str, profile: str = "cpu") -> bytes:
    run = start(notebook, profile=profile, title=title, claim=f"claim of {title}")
    fig = plots.curves({"DM": np.linspace(1, 0, 20)}, title="Loss")
    run.save_figure(fig, "loss", f"caption of {title}", see="The loss falls.")
    plt.close(fig)
    fields = {
        "notebook": notebook,
        "config": "0" * 12,
        "dataset": "digits",
        "ipc": 1,
        "network": "convnet-d2-w32",
    }
    fields |= {"protocol": "cpu-small", "labels": "hard", "seeds": "seed 0: 3 sets x 2 networks"}
    rows = [tables.Row(method=name, accuracy=Spread.of([80.0, 90.0]), **fields) for name in ("random", "dm")]
    run.save_table(tables.rows_to_frame(rows) if notebook == "20_dm" else pd.DataFrame({"a": [1.0]}))
    run.check(f"{title} holds", True)
    run.check("this one does not", False)
    run.headline(ours="digits IPC 1: 86.4 ± 1.2", published="CIFAR-10 IPC 1: 26.0 ± 0.8")
    run.finish()
    return (run.figures / "loss.png").read_bytes()


def _executed(picture: bytes) -> str:
    encoded = base64.b64encode(picture).decode()
    outputs = [
        new_output("stream", name="stdout", text="ok  1 < 2 & <b>not bold</b>\n"),
        new_output(
            "display_data", {"image/png": encoded}, metadata={"image/png": {"alt": "The loss <falls>"}}
        ),
        new_output("display_data", {"image/png": encoded}),
        new_output(
            "display_data", {"text/markdown": "```python\ndef dm(p): return p\n```", "text/plain": "dm"}
        ),
        new_output("execute_result", {"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "1"}),
    ]
    cells = [
        new_markdown_cell(
            "# Matching\n\n$$\\min_{\\mathcal S}\\ \\big\\|x\\big\\|^2$$\n\nwith $\\psi_\\theta$"
        ),
        new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("x = 1 < 2", outputs=outputs, execution_count=1),
    ]
    return writes(new_notebook(cells=cells))


class _Links(HTMLParser):
    def __init__(self, page: Path):
        super().__init__()
        self.found, self.images = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found += [attributes[key] for key in ("href", "src") if attributes.get(key) and tag != "form"]
        if tag == "img":
            self.images.append(attributes)


def _pages(site: Path) -> list[Path]:
    figures = site / "figures"
    return sorted([*figures.glob("*.html"), *figures.glob("html/**/*.html")])


def _text(site: Path, page: str) -> str:
    """What is read on a page: its article."""
    return (site / "figures" / page).read_text().split("<article")[1].split("</article>")[0]


def _dead_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere, and what it would fetch from the network."""
    links = _Links(page)
    assert links.found and all(image["alt"] for image in links.images)
    dead = []
    for link in links.found:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            known = re.match(
                r"https://(arxiv\.org/abs/|www\.sphinx-doc\.org|github\.com/pradyunsg|pradyunsg\.me)|data:",
                link,
            )
            dead += [] if known else [link]
        elif parts.path and not (page.parent / unquote(parts.path)).is_file():
            dead.append(link)
    return dead


def test_every_link_and_picture_resolves(site):
    names = {page.name for page in _pages(site)}
    assert names == {"index.html", "leaderboard.html", "search.html", "20_dm.html"}
    assert {page.name: dead for page in _pages(site) if (dead := _dead_links(page))} == {}


def test_nothing_is_loaded_from_the_network(site):
    for page in _pages(site):
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert not loaded, page.name
    assert (site / "figures/_static/tex-svg.js").stat().st_size > 1e6


def test_titles_and_outputs_are_text_not_markup(site):
    index, page = _text(site, "index.html"), _text(site, "html/cpu/20_dm.html")
    assert "<script>alert" not in index + page
    shown = html.unescape(re.sub("<[^>]*>", "", index))
    assert f"20 {HOSTILE}" in shown
    assert "<b>not bold</b>" not in page and "not bold" in page
    alts = [image["alt"] for image in _Links(site / "figures/html/cpu/20_dm.html").images]
    assert len(alts) == 2 and all(alts)


def test_a_card_tells_claim_numbers_and_verdicts(site):
    index = _text(site, "index.html")
    assert index.count('"sd-card ') == 2
    for words in ("1 holds", "1 fails", "26.0", "86.4", "claim of Side by side"):
        assert words in index
    assert index.index("Distributions of features") < index.index("overnight: Everything together")
    assert index.count('href="html/') == 1  # the overnight run kept no notebook


def test_the_overview_shows_what_was_measured(site):
    index = _text(site, "index.html")
    assert (
        re.search('class="overview only-light"|class="only-light overview"', index) and "only-dark" in index
    )


def test_the_overview_has_the_colours_of_the_page(site):
    corners = {
        Image.open(path).convert("RGB").getpixel((1, 1))
        for path in (site / "figures/_images").glob("overview-*.png")
    }
    assert corners == {(255, 255, 255), (19, 20, 22)}


def test_the_leaderboard_has_every_row_once(site):
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>", _text(site, "leaderboard.html"))
    assert len(rows) == 2 and "random real images" in rows
    assert '<a href="html/cpu/20_dm.html">20_dm</a>' in _text(site, "leaderboard.html")


def test_a_notebook_page_folds_code_shows_the_algorithm_and_can_be_downloaded(site):
    page = _text(site, "html/cpu/20_dm.html")
    assert (
        page.count('<details class="admonition hide above-input"') == 1
    )  # injected parameters are not shown
    folded = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert '<span class="k">def</span>' in folded and '<span class="mi">1</span>' not in folded
    assert page.count('class="wide"') == 1 and page.count("<mjx") == 0 and page.count("math notranslate") == 2
    assert "arxiv.org/abs/2110.04181" in page and "base64" not in page
    assert (site / "figures/html/cpu/20_dm.ipynb").read_text() == (
        site / "results/cpu/20_dm/executed.ipynb"
    ).read_text()


def test_building_again_changes_nothing_and_leaves_no_stale_picture(site):
    stale = site / "figures/html/cpu/99_gone.html"
    before = _state(site)
    stale.write_text("old")
    assert _gallery(site).returncode == 0
    assert _state(site) == before


def _state(site: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (site / "figures").rglob("*") if path.is_file()}


def test_galleries_at_once_leave_one_whole_gallery(site):
    before = _state(site)
    words = [sys.executable, "-m", "workflow.pages.gallery", "--root", str(site)]
    calls = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(3)
    ]
    assert [call.wait() for call in calls] == [0, 0, 0], [call.stderr.read() for call in calls]
    assert _state(site) == before
    assert not list((site / "figures").glob(".pages-*"))


def test_a_folder_that_cannot_be_written_is_one_line(site, tmp_path, capsys):
    shutil.copytree(site / "results", tmp_path / "results")
    (tmp_path / "figures").write_text("in the way")
    assert gallery.main(["--root", str(tmp_path)]) == 1
    assert re.fullmatch(r"(?s).*cannot write .*figures: File exists\n", capsys.readouterr().err)


def test_pictures_before_and_after_are_preferred_to_a_marked_plot(tmp_path):
    names = {"rules": True, "start_dm_digits": False, "end_dm_digits": False, "end_alone": True}
    figures = {name: {"file": f"{name}.png", "thumbnail": marked} for name, marked in names.items()}
    for name in names:
        (tmp_path / f"{name}.png").touch()
    found = [figure["file"] for figure in gallery.pictures_of(tmp_path, {"figures": figures})]
    assert found == ["start_dm_digits.png", "end_dm_digits.png"]
    (tmp_path / "start_dm_digits.png").unlink()
    found = [figure["file"] for figure in gallery.pictures_of(tmp_path, {"figures": figures})]
    assert found == ["rules.png"]


def test_a_damaged_record_is_named_and_left_out(site, capsys):
    assert {record["notebook"] for record in gallery.read_records(site / "results")} == {
        "20_dm",
        "90_leaderboard",
    }
    assert re.search(r"left out .*99_broken.run\.json", capsys.readouterr().err)


def test_without_results_the_page_says_so(tmp_path):
    assert _gallery(tmp_path).stderr == ""
    assert "No results yet" in (tmp_path / "figures/index.html").read_text()


def test_committed_outputs_stand_in_for_an_executed_notebook(tmp_path):
    record = {"run": "cpu", "notebook": "20_dm"}
    notebooks = tmp_path / "notebooks"
    assert gallery.notebook_source(tmp_path, notebooks, record) is None
    notebooks.mkdir()
    (notebooks / "20_dm.ipynb").write_text("{}")
    assert gallery.notebook_source(tmp_path, notebooks, record) == notebooks / "20_dm.ipynb"
    assert gallery.notebook_source(tmp_path, notebooks, record | {"run": "overnight"}) is None


# -- in a browser: the pages of the committed results ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """All pages of the project, built as ``./run_all.sh gallery`` does, in a folder of their own."""
    root = tmp_path_factory.mktemp("committed")
    for name in ("results", "figures"):
        (root / name).mkdir()
        (root / name / "cpu").symlink_to(ROOT / name / "cpu")
    done = _gallery(root)
    assert done.returncode == 0 and done.stderr == ""
    return root / "figures"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        shown = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield shown
        shown.close()


class _Watched:
    """A browser window that keeps what its pages complain of and what they ask of the network."""

    def __init__(self, browser, size: dict, **options):
        self.page = browser.new_context(viewport=size, **options).new_page()
        self.wrong = []
        kinds = ("error", "warning")
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type in kinds else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda asked: self.wrong.append(f"failed: {asked.url}"))
        self.page.on(
            "request",
            lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or self.wrong.append(asked.url),
        )

    def open(self, path: Path):
        self.page.goto(path.as_uri())
        self.settle()
        return self.page

    def settle(self) -> None:
        """Until equations and pictures are there."""
        self.page.wait_for_load_state("load")
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        self.page.evaluate(
            "() => { for (const image of document.images) image.loading = 'eager';"
            " return Promise.allSettled([...document.images].filter(i => i.checkVisibility()).map(i => i.decode())) }"
        )


MEASURE = """() => {
  const shown = [...document.images].filter(image => image.checkVisibility() && image.src);
  const equations = [...document.querySelectorAll("article mjx-container")].filter(one => one.checkVisibility());
  const beyond = equations.filter(one => one.getBoundingClientRect().right > innerWidth + 1);
  return {
    sideways: document.documentElement.scrollWidth - innerWidth,
    broken: shown.filter(image => !image.naturalWidth).map(image => image.src),
    beyond: beyond.map(one => one.parentElement.textContent),
    spilled: [...document.querySelectorAll("article td")].filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent),
    unread: document.querySelectorAll("mjx-merror, [data-mjx-error], mjx-container [fill=red]").length,
    raw: [...document.querySelectorAll(".math")].filter(one => !one.querySelector("mjx-container")).length,
  };
}"""
WELL = {"sideways": 0, "broken": [], "beyond": [], "spilled": [], "unread": 0, "raw": 0}


@needs_browser
@pytest.mark.parametrize(("size", "scheme"), [(BROAD, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_every_page_is_shown_without_complaint(committed, browser, size, scheme):
    pages = [*committed.glob("*.html"), *committed.glob("html/**/*.html")]
    assert len(pages) > 30
    window = _Watched(browser, size, color_scheme=scheme)
    wrong = {path.stem: dead for path in pages if (dead := _dead_links(path))}
    for path in pages:
        found = window.open(path).evaluate(MEASURE)
        if found != WELL or window.wrong:
            wrong[path.stem] = (found, window.wrong.copy())
            window.wrong.clear()
    assert wrong == {}, wrong


@needs_browser
def test_a_reader_walks_from_the_front_door_to_a_figure_and_on(committed, browser):
    window = _Watched(browser, BROAD)
    page = window.open(committed / "index.html")
    page.fill("input.filter", "DM: distribution")
    cards = page.locator("article .sd-col:visible")
    assert 0 < cards.count() < 6
    cards.filter(has_text="20 DM").click(force=True)  # its link covers the card
    window.settle()
    assert "20_dm" in page.url and page.locator("mjx-container svg").count() > 1
    with page.expect_download() as kept:
        page.get_by_role("link", name="notebook", exact=True).click()
    stored = committed / "html/cpu/20_dm.ipynb"
    assert (
        kept.value.suggested_filename == stored.name and kept.value.path().read_bytes() == stored.read_bytes()
    )
    assert not page.locator("details.hide pre").first.is_visible()
    assert page.locator(".cell_output .highlight-python").first.is_visible()
    page.locator(".cell_output img").first.click()
    assert page.locator("dialog.shown img").is_visible()
    page.keyboard.press("Escape")
    page.locator("dialog.shown img").wait_for(state="hidden")
    page.locator("a.next-page").click()
    window.settle()
    assert "21_m3d" in page.url and not window.wrong


@needs_browser
def test_the_leaderboard_sorts_and_filters(committed, browser):
    window = _Watched(browser, BROAD)
    page = window.open(committed / "leaderboard.html")
    everything = page.locator("tbody tr").count()
    page.fill("input.filter", "fashion14 hard")
    rows = page.locator("tbody tr:visible")
    assert 0 < rows.count() < everything
    names = page.locator("thead th").all_inner_texts()
    heading = page.locator("thead th").nth(names.index("accuracy"))
    for order, click in (("descending", heading.click), ("ascending", lambda: heading.press("Enter"))):
        click()
        found = [
            float(text)
            for text in page.locator(
                f"tbody tr:visible td:nth-child({names.index('accuracy') + 1})"
            ).all_inner_texts()
        ]
        assert heading.get_attribute("aria-sort") == order and found == sorted(
            found, reverse=order == "descending"
        )
    assert not window.wrong


@needs_browser
def test_search_finds_without_a_server(committed, browser):
    window = _Watched(browser, BROAD)
    page = window.open(committed / "index.html")
    page.locator(".sidebar-search").fill("Sinkhorn")
    page.keyboard.press("Enter")
    page.locator("#search-results li a").first.wait_for()
    assert not window.wrong


@needs_browser
def test_the_browser_test_notices_what_it_looks_for(committed, browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<body><img src="none.png"><script>nosuch()</script><p style="width:900px">wide</p><span class="math">x</span>'
        f'<script src="{(committed / "_static/tex-svg.js").as_uri()}"></script>'
        '<article><table><tr><td style="max-width:4em;white-space:nowrap">longer than its cell</td></tr></table></article>'
        r"<p>\(\nosuchcommand\) and \(\frac{1}\)</p></body>"
    )
    window = _Watched(browser, PHONE)
    found = window.open(bad).evaluate(MEASURE)
    assert found["sideways"] > 400 and found["broken"] and found["raw"] == 1 and found["unread"] >= 2
    assert found["spilled"] == ["longer than its cell"]
    assert "nosuch is not defined" in "".join(window.wrong) and "none.png" in "".join(window.wrong)


def _tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_what_is_built_is_not_committed_and_what_is_committed_is_small():
    files = _tracked("figures", "results")
    assert {path.suffix for path in files} <= {".png", ".csv", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 15e6
    kinds = {path: path.read_bytes()[25] for path in files if path.suffix == ".png"}
    assert [path for path, kind in kinds.items() if kind != 3] == []  # 3: pixels are numbers of a palette


def test_a_set_is_committed_once_for_a_method_and_case():
    names = [path.name for path in _tracked("results") if path.suffix == ".safetensors"]
    assert len(names) == len(set(names))
