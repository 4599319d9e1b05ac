"""The gallery: every link and picture resolves, text is text, and a real browser has nothing to complain about."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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

from lib.companion import plots, start
from lib.system.files import ROOT
from workflow.pages import gallery
from workflow.pages.mathml import mathml
from workflow.pages.page import Pictures, markdown, output_html

HOSTILE = "DM <script>alert('x')</script> & \"quotes\""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=4000"
).split()


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
    gallery.build(root)
    return root


def _results(notebook: str, title: str, profile: str = "cpu") -> bytes:
    run = start(notebook, profile=profile, title=title, claim=f"claim of {title}")
    fig = plots.curves({"DM": np.linspace(1, 0, 20)}, title="Loss")
    run.save_figure(fig, "loss", f"caption of {title}", see="The loss falls.")
    plt.close(fig)
    run.save_table(pd.DataFrame({"a": [1.0]}))
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
        self.found, self.images, self.tags = [], [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.found += [attributes[key] for key in ("href", "src") if key in attributes]
        if tag == "img":
            self.images.append(attributes)


def _pages(site: Path) -> list[Path]:
    return sorted((site / "figures").rglob("*.html"))


def test_every_link_and_picture_resolves_without_a_network(site):
    assert [page.name for page in _pages(site)] == ["20_dm.html", "index.html"]
    for page in _pages(site):
        links = _Links(page)
        assert links.found
        for link in links.found:
            if link == "data:,":
                continue
            parts = urlsplit(link)
            assert not parts.scheme and not parts.netloc, f"{page.name} needs the network: {link}"
            assert (page.parent / unquote(parts.path)).is_file(), f"{page.name}: {link} leads nowhere"
        assert "script" not in links.tags
        assert all(image["alt"] for image in links.images)


def test_titles_and_outputs_are_text_not_markup(site):
    index = (site / "figures/index.html").read_text()
    assert html.escape(HOSTILE) in index and "<script>" not in index
    page = (site / "figures/html/cpu/20_dm.html").read_text()
    assert "<b>not bold</b>" not in page and "&lt;b&gt;not bold" in page
    assert [image["alt"] for image in _Links(site / "figures/html/cpu/20_dm.html").images] == [
        "The loss <falls>",
        f"Figure 2 of {HOSTILE}",
    ]


def test_a_card_tells_claim_numbers_and_verdicts(site):
    index = (site / "figures/index.html").read_text()
    assert index.count("<article") == 2
    for words in (
        "1 holds",
        "1 fails",
        "this one does not",
        "26.0",
        "86.4",
        "claim of Side by side",
        "loss.png",
    ):
        assert words in index
    assert index.index(">cpu</h2>") < index.index(">overnight</h2>")
    assert index.count('href="html/') == 1  # the overnight run kept no notebook


def test_a_notebook_page_folds_code_and_draws_formulae(site):
    page = (site / "figures/html/cpu/20_dm.html").read_text()
    assert page.count('<details class="code">') == 1  # parameters that were injected are not shown
    assert '<pre class="stdout">ok  1 &lt; 2' in page and page.count('<div class="scroll"') == 1
    assert page.count("<math") == 2 and "$" not in re.sub(r'aria-label="[^"]*"', "", page)
    assert "base64" not in page and len(page) < 40_000


def test_building_again_changes_nothing_and_leaves_no_stale_picture(site):
    def state():
        return {path: path.read_bytes() for path in (site / "figures").rglob("*") if path.is_file()}

    before = state()
    stale = site / "figures/html/cpu/20_dm_files/figure_99.png"
    stale.write_bytes(b"old")
    gallery.build(site)
    assert state() == before


def test_three_galleries_at_once_leave_one_whole_gallery(site):
    before = {path: path.read_bytes() for path in (site / "figures").rglob("*") if path.is_file()}
    with ThreadPoolExecutor(3) as pool:
        for made in [pool.submit(gallery.build, site) for _ in range(9)]:
            made.result()
    assert {path: path.read_bytes() for path in (site / "figures").rglob("*") if path.is_file()} == before
    assert not list((site / "figures").glob(".pages-*"))


def test_a_folder_that_cannot_be_written_is_one_line(site, tmp_path, capsys):
    shutil.copytree(site / "results", tmp_path / "results")
    (tmp_path / "figures").write_text("in the way")
    assert gallery.main(["--root", str(tmp_path)]) == 1
    assert re.fullmatch(r"(?s).*cannot write .*figures: File exists\n", capsys.readouterr().err)


def test_cards_stand_in_families(site):
    index = (site / "figures/index.html").read_text()
    assert re.findall('class="family">([^<:]+)', index) == [
        "Distributions of features",
        "Everything together",
    ]


def test_an_algorithm_that_a_cell_shows_is_open_and_coloured():
    shown = output_html(
        new_output(
            "display_data", {"text/markdown": "```python\ndef dm(p): return p\n```", "text/plain": "dm"}
        ),
        Pictures(Path("none"), ""),
    )
    assert shown.startswith('<div class="open">') and '<span class="k">def</span>' in shown
    assert "details" not in shown


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("costs `$5` and `$6`", 0),
        ("```\n$x$\n```", 0),
        (r"\$5 and \$6", 0),
        ("$a$ and $b$", 2),
        ("| $|a|$ | b |\n| --- | --- |\n| $c$ | d |", 2),
        ("above\n$$a\n+ b$$\nbelow", 1),
        ("\\begin{align*}a &= b\\end{align*}", 1),
    ],
)
def test_formulae_are_told_from_prose_and_code(text, wanted):
    made = markdown(text)
    assert made.count("<math") == wanted, made
    assert not re.search("[\ue000\ue001]", made)
    assert ("<table" in made) == text.startswith("|")


def test_a_damaged_record_is_named_and_left_out(site, capsys):
    assert {record["notebook"] for record in gallery.read_records(site / "results")} == {
        "20_dm",
        "90_leaderboard",
    }
    assert re.search(r"left out .*99_broken.run\.json", capsys.readouterr().err)


def test_without_results_the_page_says_so(tmp_path):
    gallery.build(tmp_path)
    assert "No results yet" in (tmp_path / "figures/index.html").read_text()


def test_committed_outputs_stand_in_for_an_executed_notebook(tmp_path):
    record = {"run": "cpu", "notebook": "20_dm"}
    notebooks = tmp_path / "notebooks"
    assert gallery.notebook_source(tmp_path, notebooks, record) is None
    notebooks.mkdir()
    (notebooks / "20_dm.ipynb").write_text("{}")
    assert gallery.notebook_source(tmp_path, notebooks, record) == notebooks / "20_dm.ipynb"
    assert gallery.notebook_source(tmp_path, notebooks, record | {"run": "overnight"}) is None


@pytest.mark.parametrize(
    ("tex", "words"),
    [
        (r"\min_{\mathcal S} x", ["munder", "𝒮"]),
        (r"\mathbb E_{\theta}", ["𝔼", "θ"]),
        (r"\big\| x \big\|", ["‖"]),
        (r"\operatorname*{arg\,min}_x f", ["munder"]),
        (r"\frac{1}{N}\sum_{i=1}^N", ["mfrac", "∑"]),
        (r"\mathcal L, \mathcal B", ["ℒ", "ℬ"]),
        (r"\Big\{\arg\min_x f\Big\}", ["{", "munder", "arg"]),
        ("a,\\\nb", ["a", "b"]),
    ],
)
def test_formulae_use_what_browsers_draw(tex, words):
    out = mathml(tex, display=True)
    assert all(word in out for word in words), out
    assert "mathvariant" not in out and "\\" not in re.sub(r'aria-label="[^"]*"', "", out)


def test_an_unreadable_formula_stays_visible():
    for tex in (r"\left( 1 < 2", r"1 < \nosuchcommand x"):
        assert mathml(tex, display=False) == f'<code class="tex">{html.escape(tex)}</code>'


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_page_without_complaint(site, width, tmp_path):
    for page in _pages(site):
        probes = _probes(page, width)
        try:
            dom, complaints = _browse(probes[0], tmp_path / f"{page.stem}-{width}")
        finally:
            for probe in probes:
                probe.unlink()
        assert not complaints, complaints
        facts = dict(re.findall(r'data-([a-z]+)="([^"]*)"', re.search(r"<html[^>]*>", dom)[0]))
        assert facts["broken"] == "" and int(facts["images"]) > 0, facts
        assert int(facts["width"]) == width
        assert int(facts["overflow"]) <= 0, (
            f"{page.name} scrolls sideways at {width} pixels: {facts['overflow']}"
        )


def _probes(page: Path, width: int) -> tuple[Path, Path]:
    """The page with a script that measures it (it has none itself), in a frame: no window is as narrow as a phone."""
    frame, probe = (page.with_name(f"{kind}-{page.name}") for kind in ("frame", "probe"))
    script = """<script>addEventListener("load", () => {
      const images = [...document.images], root = document.documentElement;
      const broken = images.filter(image => !image.naturalWidth).map(image => image.src).join(" ");
      const overflow = root.scrollWidth - innerWidth;
      parent.postMessage({broken, overflow, images: images.length, width: innerWidth}, "*");
    })</script></body>"""
    text = page.read_text(encoding="utf-8").replace('loading="lazy"', "").replace("</body>", script)
    probe.write_text(text, encoding="utf-8")
    listen = (
        'addEventListener("message", event => Object.assign(document.documentElement.dataset, event.data))'
    )
    shown = f'<iframe src="{probe.name}" style="border: 0; width: {width}px; height: 1200px"></iframe>'
    frame.write_text(
        f"<!doctype html><html><body><script>{listen}</script>{shown}</body></html>", encoding="utf-8"
    )
    return frame, probe


def _browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's final DOM and what the browser's console said."""
    words = [
        CHROMIUM,
        *QUIET,
        f"--user-data-dir={profile}",
        "--window-size=1400,1200",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_browser_test_notices_what_it_looks_for(site, tmp_path):
    page = site / "figures" / "bad.html"
    page.write_text(
        '<body><img src="none.png"><script>nosuch()</script><p style="width:900px">wide</p></body>'
    )
    try:
        probes = _probes(page, 390)
        dom, complaints = _browse(probes[0], tmp_path / "bad")
    finally:
        for path in (page, *probes):
            path.unlink()
    assert "nosuch is not defined" in "".join(complaints) and "none.png" in dom
    assert int(re.search(r'data-overflow="(\d+)"', dom)[1]) > 400


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
