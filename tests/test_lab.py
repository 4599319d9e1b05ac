"""JupyterLab as `./run_all.sh lab` starts it, in a real browser: the start page, and a distillation that is resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from test_run_all import variables

from lib.system.files import ROOT
from workflow.pages.normalise import METADATA

pytest.importorskip("jupyterlab", reason="no JupyterLab in this environment")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT = 120  # seconds for anything: it is there to end a test that hangs, not to measure
START, MINE = "notebooks/00_start_here.ipynb", "notebooks/mine.ipynb"
STEPS, FIRST = 150, 10  # of the distillation; that is seen before it is interrupted
PREPARE = """
import time
from lib.data import load
from lib.distill import distill
from lib.methods.dm import DM

data = load("digits")
method = DM(iterations=STEPS, real_batch=8, network="convnet-d2-w4", augmentation="none")

def tell(step, state, metrics):
    print(step, end=" ", flush=True)
    time.sleep(pause)
"""
DISTIL = """
result = distill(method, data, ipc=1, callback=tell)
print("steps", len(result.history["loss"]))
"""
# What a window of JupyterLab shows, by its own application object (``--expose-app-in-browser``).
NOTEBOOK = """path => {
  const found = [...globalThis.jupyterapp?.shell.widgets('main') ?? []].find(one => one.context?.path === path);
  if (!found?.context.isReady || !found.sessionContext.session?.kernel) return null;
  const cells = [...found.content.model.cells].map(one => one.toJSON());
  return {
    kernel: found.sessionContext.session.kernel.status,
    finished: found.finished,
    current: jupyterapp.shell.currentWidget === found,
    changed: found.context.model.dirty,
    trusted: [...found.content.model.cells].filter(one => one.type === 'code').every(one => one.trusted),
    code: cells.flatMap((one, place) => one.cell_type === 'code' ? [place] : []),
    texts: cells.map(one => (one.outputs ?? []).map(part => [part.text ?? part.evalue ?? []].flat().join('')).join('')),
    shown: cells.map(one => (one.outputs ?? []).map(part => part.output_type)),
    lines: cells.map(one => (one.outputs ?? []).flatMap(part => part.traceback ?? []).join('\\n').split('\\n').length),
  };
}"""
RUN = """([path, place]) => {
  const found = [...jupyterapp.shell.widgets('main')].find(one => one.context?.path === path);
  found.content.activeCellIndex = place;
  found.content.deselectAll();
  found.finished = false;
  jupyterapp.commands.execute('notebook:run-cell').finally(() => { found.finished = true; });
}"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """What JupyterLab needs of the project, with one result and one notebook of ours, in a folder whose name has spaces."""
    root = tmp_path_factory.mktemp("lab") / "my copy"
    for name in ("lib", "workflow"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", START, "results/cpu/20_dm/table.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    cells = (PREPARE.replace("STEPS", str(STEPS)), "pause = 0.1", DISTIL, "pause = 0")
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=METADATA), root / MINE)
    return root


@pytest.fixture(scope="module")
def address(project, tmp_path_factory):
    """Of the running server, without a path; with a token in the query everything is allowed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home, log = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("log") / "lab.log"
    own = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("RUNTIME", "CONFIG", "DATA")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind) for kind in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "COMPANION_CACHE": str(home / "cache")}
    words = ["lab", "--no-setup", "--", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    words += [f"--ServerApp.port={port}", "--IdentityProvider.token=t"]
    with open(log, "w") as said:
        process = subprocess.Popen(
            [str(project / "run_all.sh"), *words], cwd=home, env=variables(**own), stdout=said, stderr=said
        )
    try:
        end = time.monotonic() + LIMIT
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            with contextlib.suppress(OSError):
                ask(f"http://127.0.0.1:{port}", "api/status")
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=LIMIT)


def ask(address: str, path: str):
    request = urllib.request.Request(f"{address}/{path}", headers={"Authorization": "token t"})
    return urllib.request.urlopen(request, timeout=LIMIT)


def test_results_lie_beside_the_notebooks(address):
    """As a browser would ask for them."""
    names = {entry["name"] for entry in json.load(ask(address, "api/contents"))["content"]}
    assert {"notebooks", "results", "run_all.sh"} <= names
    table = json.load(ask(address, "api/contents/results/cpu/20_dm/table.csv"))["content"]
    assert table.startswith("notebook,") and ask(address, "").url.endswith(f"/lab/tree/{START}")


class Window:
    """JupyterLab in a browser."""

    def __init__(self, page, address: str):
        self.page, self.address = page, address
        page.set_default_timeout(1000 * LIMIT)

    def open(self, path: str = "") -> None:
        """The page at a path of the server; without one, where JupyterLab itself begins."""
        self.page.goto(f"{self.address}/{path}?token=t")

    def wait_for(self, path: str, condition) -> dict:
        """What is seen of a notebook as soon as the condition holds."""
        end, seen = time.monotonic() + LIMIT, None
        while seen is None or not condition(seen):
            assert time.monotonic() < end, seen
            time.sleep(0.1)
            seen = self.page.evaluate(NOTEBOOK, path)
        return seen

    def start(self, path: str, place: int) -> None:
        """Begin to run a cell."""
        self.wait_for(path, lambda seen: seen["kernel"] == "idle" and seen["current"])
        self.page.evaluate(RUN, [path, place])

    def run(self, path: str, place: int) -> dict:
        """Run a cell to its end."""
        self.start(path, place)
        return self.wait_for(path, lambda seen: seen["finished"])


@pytest.fixture
def window(address):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Window(browser.new_page(), address)
        browser.close()


def test_the_start_page_is_open_trusted_unchanged_and_runs(window, project):
    """All that precedes its first distillation; its other cells are run by the notebooks' own tests."""
    before = (project / START).read_bytes()
    window.open()
    seen = window.wait_for(START, lambda seen: seen["kernel"] == "idle")
    time.sleep(1)  # what opening it changes, a kernel's answer changes a little later
    seen = window.wait_for(START, lambda seen: True)
    assert seen["trusted"] and not seen["changed"] and (project / START).read_bytes() == before
    for place in seen["code"][:3]:
        seen = window.run(START, place)
        assert "error" not in seen["shown"][place], seen["texts"][place]
    assert "digits: " in seen["texts"][place] and "display_data" in seen["shown"][place]
    assert seen["changed"] and (project / START).read_bytes() == before


def test_an_interrupted_distillation_is_resumed_by_its_cell(window, project):
    window.open(f"lab/tree/{MINE}")
    for place in (0, 1):
        seen = window.run(MINE, place)
        assert "error" not in seen["shown"][place], seen["texts"][place]
    window.start(MINE, 2)
    window.wait_for(MINE, lambda seen: len(seen["texts"][2].split()) > FIRST)
    window.page.evaluate("() => { jupyterapp.commands.execute('notebook:interrupt-kernel') }")
    seen = window.wait_for(MINE, lambda seen: seen["finished"])
    done = int(seen["texts"][2].partition("goes on from step ")[2].split()[0])
    assert (
        FIRST < done < STEPS
        and f"DM was interrupted; the same call goes on from step {done} of {STEPS}" in seen["texts"][2]
    )
    assert seen["lines"][2] < 40, "a traceback of our own frames"

    window.run(MINE, 3)
    words = window.run(MINE, 2)["texts"][2].split()
    assert words[0] == str(done + 1) and words[-3:] == [str(STEPS), "steps", str(STEPS)]
    window.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    window.wait_for(MINE, lambda seen: not seen["changed"])
    assert json.loads((project / MINE).read_text())["metadata"] == METADATA
