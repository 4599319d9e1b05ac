"""The command line and the scheduling, on a small project of three notebooks in a folder whose name has spaces."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from lib.data import load as load_data
from lib.methods import METHODS
from lib.system import code
from lib.system.errors import CompanionError
from workflow import command, place, state, summary, table

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("10_one", "20_two", "90_all")
LIMIT = 600  # seconds for anything: it is there to end a test that hangs, not to measure
PARAMETERS = 'profile: str = "cpu"\nseed: int = 0\nipc: int | None = None\n'
WRITE = """
import json, os, pathlib
folder = pathlib.Path(os.environ["COMPANION_OUT"], "results", os.environ["COMPANION_RUN"], NAME)
(folder / "table.csv").write_text(f"value\\n{ipc}\\n")
seen = {"cwd": os.path.basename(os.getcwd()), "profile": profile, "ipc": ipc, **os.environ}
(folder / "run.json").write_text(json.dumps(seen))
"""
ROWS = """
outputs: [executed.ipynb, table.csv, run.json]
resources:
  cpu: {cpus: 1, mem_mb: 300, runtime: 5, gpu: 0}
  paper: {cpus: 2, mem_mb: 300, runtime: 5, gpu: 0}
notebooks:
  10_one: {title: First}
  20_two: {title: Second}
  90_all: {title: Last, reads: all}
"""


def write_notebook(
    root: Path, name: str, code: str, parameters: str = PARAMETERS, write: str = WRITE
) -> None:
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# {name}"},
        {"cell_type": "code", "id": "b", "metadata": {"tags": ["parameters"]}, "source": parameters},
        {"cell_type": "code", "id": "c", "metadata": {}, "source": code},
        {"cell_type": "code", "id": "d", "metadata": {}, "source": write.replace("NAME", repr(name)).strip()},
    ]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}
    (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(content))


def write_project(root: Path) -> Path:
    """A copy of the workflow with notebooks that take no time, and a ``lib`` of a few modules beside the needed ones."""
    for name in ("workflow", "lib/system"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "workflow/pages/gallery.py").unlink()
    for name in ("run_all.sh", "environment.yml", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, root)
    for name in ("lib/methods", "lib/plain", "notebooks"):
        (root / name).mkdir()
    for name in ("__init__", "recipes", "methods/__init__"):
        shutil.copy2(ROOT / "lib" / f"{name}.py", root / "lib" / f"{name}.py")
    (root / "lib/one.py").write_text("from lib import shared\nfrom lib.system import errors\n")
    (root / "lib/two.py").write_text("value = 2\n")
    (root / "lib/shared.py").write_text("value = 1\n")
    (root / "workflow/notebooks.yaml").write_text(ROWS)
    write_notebook(root, "10_one", "import lib.one\nprint(lib.one.shared.value)")
    write_notebook(root, "20_two", "from lib.two import value\nvalue")
    write_notebook(root, "90_all", "print('all')")
    return root


def variables(**given: str) -> dict[str, str]:
    """The environment of a call: this Python's, without what tests and other runs set."""
    foreign = ("PYTEST", "COMPANION", "PYTHONPATH", "UV_", "PIP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return kept | {"COMPANION_ENV": sys.prefix, "OMP_NUM_THREADS": "1"} | given


def call(root: Path, *words: str, setup: bool = False, **given: str) -> subprocess.CompletedProcess:
    """``run_all.sh`` from a foreign working directory."""
    words = [str(root / "run_all.sh"), *words, *([] if setup else ["--no-setup"])]
    return subprocess.run(
        words, cwd="/", env=variables(**given), capture_output=True, text=True, timeout=LIMIT
    )


def ran(done: subprocess.CompletedProcess) -> set[str]:
    """The notebooks whose own line says that they were run."""
    return set(re.findall(r"^ *(?:ok|failed|interrupted)  (\d\d_\w+)  [\d.]+ s", done.stdout, re.M))


def would_run(root: Path, *words: str) -> dict[str, str]:
    """The notebooks that a dry run names, with the reason."""
    done = call(root, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\d\d_\w+) +run +(.*?) *$", done.stdout, re.M))


def changes(root: Path, *names: str, **parameters) -> dict[str, str]:
    """The notebooks without a record of their present fingerprint, with what changed; their readers are not followed."""
    rows = table.load(root)
    request = table.Request("cpu", names or NAMES, parameters)
    place.discard(root, rows, request)
    made = state.logs(root, request.run) / "made"
    found = {}
    for name in request.notebooks:
        found[name] = state.change(root, rows, request, name)
        assert bool(found[name]) != (made / state.record_name(root, rows, request, name)).is_file()
    return {name: why for name, why in found.items() if why}


def edit(path: Path, change) -> None:
    """Rewrite a notebook's JSON."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def workplaces(root: Path) -> list[Path]:
    """Folders that notebooks write into and that nobody has put in place."""
    return [path for path in root.glob("results/logs/*/work/*/*") if path.is_dir()]


def wait_for(condition) -> None:
    """Until it holds; the limit only ends a test that hangs."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The project after a first run, and what that run printed."""
    root = write_project(_made(tmp_path_factory.mktemp("project") / "with some spaces"))
    return root, call(root, "--cores", "2")


@pytest.fixture
def project(finished, tmp_path):
    """A fresh copy of the finished project."""
    root = tmp_path / "my copy"
    shutil.copytree(finished[0], root)
    return root


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# ------------------------------------------------------------------ what is run


def test_first_run_executes_all_and_summarises(finished):
    root, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran(done) == set(NAMES)
    for name in NAMES:
        assert re.search(rf"^{name} +ok +[\d.]+ +\d+ +results/cpu/{name}/executed.ipynb", done.stdout, re.M)
        assert {path.name for path in (root / "results/cpu" / name).iterdir()} == {
            "executed.ipynb", "table.csv", "run.json"
        }  # fmt: skip
    assert workplaces(root) == []
    seen = json.loads((root / "results/cpu/10_one/run.json").read_text())
    expected = {
        "cwd": "notebooks",
        "profile": "cpu",
        "ipc": None,
        "COMPANION_RUN": "cpu",
        "COMPANION_BARS": "0",
    }
    expected |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
    expected |= {"MALLOC_TRIM_THRESHOLD_": "4294967296"}
    assert {key: seen[key] for key in expected} == expected


def test_second_run_skips_everything_and_reports_the_gallery(project):
    (project / "workflow/pages/gallery.py").write_text("raise SystemExit(3)\n")
    done = call(project)
    assert not ran(done) and done.stdout.count("up to date") == 3
    assert len(re.findall("^--- ", (project / "results/logs/cpu/snakemake.log").read_text(), re.M)) == 1, (
        "of the first run"
    )
    assert done.returncode == 1 and "FAILED  gallery; see results/logs/cpu/gallery.log" in done.stdout


def test_snakemake_alone_agrees(project):
    (project / "lib/two.py").write_text("value = 3\n")
    words = [
        "--snakefile",
        "workflow/Snakefile",
        "--profile",
        "workflow/profiles/local",
        "--cores",
        "1",
        "--dry-run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"wildcards: nb=(\w+)", done.stdout + done.stderr)) == {"20_two", "90_all"}


def test_texts_run_nothing_and_statements_do(project):
    """A docstring, comments, a heading, stored outputs, times of change: nothing runs. A statement: what imports it."""
    path = project / "lib/system/errors.py"
    assert path in code.closure([project / "notebooks/10_one.ipynb"], project)

    output = {"output_type": "stream", "name": "stdout", "text": "other"}

    def change(notebook):
        notebook["cells"][0]["source"] = "# Another heading"
        notebook["cells"][2] |= {"outputs": [output], "execution_count": 7}

    edit(project / "notebooks/10_one.ipynb", change)
    for file in (project / "lib").glob("*.py"):
        file.touch()
    text = path.read_text()
    first = ast.get_docstring(ast.parse(text), clean=False)
    path.write_text("# a comment\n" + text.replace(first, "Other words."))
    assert would_run(project) == {}
    path.write_text(text + "\nVALUE = 1\n")
    assert would_run(project) == {"10_one": "code of lib/system/errors.py changed", "90_all": "after 10_one"}


def test_what_changed_in_words(project):
    path = project / "notebooks/10_one.ipynb"
    text = path.read_text()
    edit(path, lambda nb: nb["cells"][2].update(source="print(3)"))
    assert changes(project) == {"10_one": "code cells changed"}
    path.write_text(text)
    assert changes(project) == {}, "what it was made from is back"
    assert changes(project, "10_one", ipc=5) == {"10_one": "not run yet"}
    (project / "results/cpu/10_one/table.csv").write_text("value\n9\n")
    assert changes(project) == {"90_all": "table of 10_one changed"}
    shutil.rmtree(project / "results/cpu/10_one")
    assert changes(project) == {"10_one": "not run yet", "90_all": "table of 10_one changed"}
    (project / "results/cpu/20_two/run.json").unlink()
    assert changes(project)["20_two"] == "run.json is missing"
    shutil.rmtree(project / "results/logs")
    assert changes(project, "90_all") == {"90_all": "no record of its run"}


def test_a_method_imported_by_its_name_counts(project):
    (project / "lib/methods/dm.py").write_text("value = 1\n")
    (project / "lib/plain/dm.py").write_text("value = 1\n")
    (project / "lib/methods/dc.py").write_text("value = 1\n")
    (project / "lib/parts.py").write_text('from lib.methods import recipes\n\nPARTS = {"DC": ("dc", "")}\n')
    write_notebook(project, "20_two", "from lib import parts\nname = 'dm'")
    rows = table.load(project)
    lib = state.fingerprint(project, rows, table.Request("cpu", NAMES), "20_two")["lib"]
    assert {"lib/methods/dm.py", "lib/plain/dm.py", "lib/methods/dc.py"} <= lib.keys()
    assert (
        "lib/methods/dm.py"
        not in state.fingerprint(project, rows, table.Request("cpu", NAMES), "10_one")["lib"]
    )


def test_only_force_and_list(project):
    shutil.rmtree(project / "results/cpu/20_two")
    listed = call(project, "--list").stdout
    assert re.search(r"10_one +First +up to date", listed)
    assert re.search(r"20_two +Second +not run yet", listed)
    assert re.search(r"90_all +Last +table of 20_two changed", listed)
    done = call(project, "--only", "90", "notebooks/10_one.ipynb", "--force")
    assert done.returncode == 0 and ran(done) == {"10_one", "90_all"}, done.stdout


def test_a_failing_notebook_stops_no_other_and_loses_nothing(project):
    old = {path: path.read_bytes() for path in (project / "results/cpu/10_one").iterdir()}
    write_notebook(project, "10_one", "raise ValueError('no images\\nat all')")
    (project / "lib/two.py").write_text("value = 3\n")
    done = call(project)
    assert done.returncode == 1
    assert ran(done) == set(NAMES)
    assert '"3"' in (project / "results/cpu/20_two/executed.ipynb").read_text()
    assert re.search(r"^10_one +failed .*results/cpu/10_one/executed.failed.ipynb", done.stdout, re.M)
    assert "failed: 10_one: ValueError: no images (messages: results/logs/cpu/10_one.log)" in done.stdout
    assert re.search(r"^90_all +ok", done.stdout, re.M)
    assert "ValueError" in (project / "results/cpu/10_one/executed.failed.ipynb").read_text()
    assert {path: path.read_bytes() for path in old} == old
    assert changes(project) == {"10_one": "code cells changed"}


@pytest.mark.parametrize(
    ("code", "write", "message"),
    [
        ("pass", "", "ended without writing table.csv, run.json"),
        ("import os\nos._exit(3)", WRITE, "DeadKernelError"),
    ],
)
def test_a_notebook_that_breaks_off_has_failed(project, code, write, message):
    write_notebook(project, "20_two", code, write=write)
    record = project / "record.json"
    words = ["20_two", "--request", '{"notebooks": ["20_two"]}', "--record", str(record)]
    environment = variables(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run(
        [sys.executable, "-m", "workflow.execute", *words],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and message in done.stdout, done.stdout + done.stderr
    kept = json.loads(record.read_text())
    assert kept["status"] == "failed" and message in kept["error"]
    assert changes(project) == {"20_two": "code cells changed"}


def test_the_terminal_says_what_begins_and_how_long_it_takes(project):
    kept = project / "results/cpu/10_one/run.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"seconds": 125.0}))
    shutil.rmtree(project / "results/logs")
    done = call(project, "--only", "10_one", "20_two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^2 of 2 notebooks to run, about \d+ (s|min) on \d+ cores.*, 1 of them for the first time$",
        done.stdout,
        re.M,
    )
    assert re.search(r"^\[[12]/2\] 10_one \.\.\. about 2 min$", done.stdout, re.M), done.stdout
    assert re.search(r"^\[[12]/2\] 20_two \.\.\.$", done.stdout, re.M)
    again = call(project, "--only", "10_one", "20_two")
    assert "0 of 2 notebooks to run" in again.stdout and "..." not in again.stdout


def test_committed_results_are_called_so(project):
    (project / "results/cpu/10_one/executed.ipynb").unlink()
    shutil.rmtree(project / "results/logs")
    assert changes(project)["10_one"] == "committed, not run here"


def test_changed_parameters_get_their_own_results(project):
    before = (project / "results/cpu/10_one/table.csv").read_bytes()
    done = call(project, "--profile", "paper", "--only", "10_one", "--ipc", "5", "-p", "seed=3")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project / "results/paper+ipc=5+seed=3/10_one"
    assert (folder / "table.csv").read_text() == "value\n5\n"
    seen = json.loads((folder / "run.json").read_text())
    assert seen["COMPANION_RUN"] == "paper+ipc=5+seed=3"
    assert (seen["profile"], seen["OMP_NUM_THREADS"]) == ("paper", "2")
    assert (project / "results/cpu/10_one/table.csv").read_bytes() == before
    assert changes(project) == {}


# ------------------------------------------------------------------ interruption


def waiting(root: Path) -> Path:
    """Let the notebook 10_one wait for ever; the file that it makes when it has begun."""
    sign = root / "notebooks/started"
    write_notebook(
        root, "10_one", f"import pathlib, time\npathlib.Path({str(sign)!r}).touch()\ntime.sleep(10000)"
    )
    return sign


def started(root: Path, *words: str, streams: dict | None = None, **given: str) -> subprocess.Popen:
    """A run whose notebook 10_one has begun and waits for ever."""
    sign = waiting(root)
    process = subprocess.Popen(
        [str(root / "run_all.sh"), "--no-setup", "--only", "10_one", *words],
        env=variables(**given), **(streams or {"stdout": subprocess.PIPE, "text": True}),
    )  # fmt: skip
    wait_for(lambda: sign.exists() or process.poll() is not None)
    assert process.poll() is None
    return process


def processes_of(mark: str) -> list[tuple[int, str]]:
    """The processes with this mark in their environment: number and command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"INTERRUPT_TEST={mark}".encode() in (entry / "environ").read_bytes():
                found.append((int(entry.name), (entry / "cmdline").read_text()))
    return found


def still_running(mark: str) -> list[str]:
    return [words for _, words in processes_of(mark)]


def test_an_interrupted_run_loses_nothing_and_leaves_nothing_running(project):
    mark = f"companion-{os.getpid()}-{time.time_ns()}"
    old = {path: path.read_bytes() for path in (project / "results/cpu/10_one").iterdir()}
    process = started(project, INTERRUPT_TEST=mark)
    busy = call(project, "--only", "20")
    assert busy.returncode == 2 and "another run into results/cpu is going on" in busy.stderr
    assert would_run(project, "--only", "20") == {}, "to look is allowed"
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 130 and re.search(r"10_one +interrupted", output), output
    wait_for(lambda: not still_running(mark))
    assert {path: path.read_bytes() for path in (project / "results/cpu/10_one").iterdir()} == old
    assert workplaces(project) == []
    assert changes(project) == {"10_one": "code cells changed"}


def test_ctrl_c_on_a_terminal_stops_everything(project):
    """The key itself, under a pseudo-terminal that is the controlling one."""
    mark = f"companion-{os.getpid()}-{time.time_ns()}"
    master, slave = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave) | {"start_new_session": True}
    streams["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    process = started(project, streams=streams, INTERRUPT_TEST=mark)
    os.write(master, b"\x03")
    assert process.wait(timeout=LIMIT) == 130
    os.close(slave)
    wait_for(lambda: not still_running(mark))
    shown = _everything(master)
    assert re.search(r"^\[1/1\] 10_one \.\.\.", shown, re.M) and re.search(r"10_one +interrupted", shown), (
        shown
    )
    assert "Traceback" not in shown and workplaces(project) == []


def _everything(terminal: int) -> str:
    """What was written to a terminal that nobody holds any more."""
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    return shown.decode().replace("\r\n", "\n")


def test_a_run_in_the_background_writes_plain_lines_and_can_be_stopped(project):
    """``nohup ./run_all.sh &``: the shell starts it with interruptions ignored."""
    mark, log = f"companion-{os.getpid()}-{time.time_ns()}", project / "run.log"
    sign = waiting(project)
    line = f"nohup ./run_all.sh --no-setup --only 10_one > {log.name} 2>&1 & echo $!"
    told = subprocess.run(
        ["bash", "-c", line],
        cwd=project,
        env=variables(INTERRUPT_TEST=mark),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(sign.exists)
    os.kill(int(told.stdout), signal.SIGTERM)
    wait_for(lambda: not still_running(mark))
    shown = log.read_text()
    assert re.search(r"^\[1/1\] 10_one \.\.\.", shown, re.M) and re.search(
        r"^10_one +interrupted", shown, re.M
    ), shown
    assert "\r" not in shown and "\x1b" not in shown and workplaces(project) == []


def test_a_killed_run_is_taken_up(project):
    mark = f"companion-{os.getpid()}-{time.time_ns()}"
    process = started(project, INTERRUPT_TEST=mark)
    for number, _ in processes_of(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    wait_for(lambda: not still_running(mark))
    assert list((project / ".snakemake/locks").iterdir())
    assert changes(project) == {"10_one": "code cells changed"}
    write_notebook(project, "10_one", "pass")
    done = call(project, "--only", "10_one")
    assert done.returncode == 0 and ran(done) == {"10_one"}, done.stdout + done.stderr


class Killed(BaseException):
    """In place of a signal that cannot be caught."""


def test_a_process_killed_while_results_are_put_in_place_loses_none(tmp_path, monkeypatch):
    """Killed before each call that changes a file, one after the other: what comes next finds the old results, or all the new ones."""
    record = {"status": "ok", "ended": 1.0, "made_from": {"code": "x"}}
    made = tmp_path / "results/logs/cpu/made" / state.file_name("10_one", record["made_from"])
    left, real = 0, {name: getattr(os, name) for name in ("rename", "replace", "unlink", "mkdir", "rmdir")}

    def counted(name):
        def act(*words, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real[name](*words, **options)

        return act

    for allowed in range(100):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        shutil.rmtree(tmp_path / "figures", ignore_errors=True)
        work = tmp_path / "results/logs/cpu/work/10_one/abc"
        for base, name in ((tmp_path, "old"), (work, "new")):
            for kind in ("results", "figures"):
                (base / kind / "cpu/10_one").mkdir(parents=True)
                (base / kind / "cpu/10_one" / name).touch()
        left, killed = allowed, False
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                place.put_in_place(work, tmp_path, "cpu", "10_one", record)
            except Killed:
                killed = True
        place.settle(tmp_path, "cpu", "10_one")
        found = {
            path.name
            for kind in ("results", "figures")
            for path in (tmp_path / kind / "cpu/10_one").iterdir()
        }
        assert found == ({"new"} if made.exists() else {"old"}), allowed
        assert not any(work.parent.iterdir())
        if not killed:
            break
    assert allowed > 5 and not killed and made.exists()


def test_how_a_notebook_ended(project):
    rows, request = table.load(project), table.Request("cpu", NAMES)
    record = next(state.records(project, "cpu", "10_one"))[1]

    def result(since: float, interrupted: bool = False) -> summary.Result:
        return summary.result(project, rows, request, "10_one", since, interrupted)

    assert result(record["ended"] - 1).status == "ok" and result(record["ended"] + 1).status == "up to date"
    log = project / "results/logs/cpu/10_one.log"
    os.utime(log, (record["ended"] + 5, record["ended"] + 5))
    assert result(record["ended"] + 1, True).status == "interrupted"
    assert result(record["ended"] + 1).error == "its process was ended from outside"


# ------------------------------------------------------------------ other commands


def test_refresh_writes_outputs_back(project):
    done = call(project, "refresh")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (project / "notebooks/10_one.ipynb").read_text()
    assert '"1\\n"' in text and "injected-parameters" not in text and "papermill" not in text
    assert changes(project) == {}
    assert call(project, "refresh", "--ipc", "5").returncode == 2


def test_clean_keeps_committed_results_environment_and_data(project):
    keep = [
        project / name
        for name in ("data/x", ".venv/x", "results/cpu/10_one/table.csv", "notebooks/10_one.ipynb")
    ]
    drop = [
        project / name
        for name in (
            ".cache/x", ".snakemake/x", "results/cpu+ipc=5/10_one/table.csv", "figures/cpu+ipc=5/x", "results/logs/x",
            "workflow/pages/__pycache__/x", "results/cpu/10_one/executed.failed.ipynb", "lib.egg-info/x",
        )
    ]  # fmt: skip
    for path in (*keep, *drop):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = call(project, "clean")
    assert done.returncode == 0
    assert all(path.exists() for path in keep)
    assert not any(
        path.exists() or path.parent.name.endswith(("info", "cache__")) and path.parent.exists()
        for path in drop
    )
    assert not (project / "results/cpu/10_one/executed.ipynb").exists()


def test_a_test_file_is_looked_for_where_the_command_was_typed(project):
    (project / "tests").mkdir()
    (project / "tests/test_it.py").write_text("def test_it(): pass\n")
    (project / "conftest.py").write_text("")
    words = [str(project / "run_all.sh"), "test", "--no-setup", "--", "test_it.py::test_it", "-n0"]
    done = subprocess.run(
        words, cwd=project / "tests", env=variables(), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_clean_deletes_nothing_that_others_are_writing(project):
    """A run, a notebook that outlived its run, a gallery under way: one line with the process, and everything stays."""
    place_of = ("results/logs/cpu", "results/logs/cpu/work/10_one", "figures/.pages-abc")
    for folder in map(project.joinpath, place_of):
        with state.held(folder / "lock", "busy"):
            done = call(project, "clean")
            assert done.returncode == 1 and "deleting" not in done.stdout
            assert done.stderr.count("\n") == 1 and f"(process {os.getpid()})" in done.stderr, done.stderr
        assert (project / "results/logs/cpu/made").is_dir()
    done = call(project, "clean")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not (project / "figures/.pages-abc").exists() and not (project / "results/logs").exists()


def test_a_lock_that_is_removed_while_somebody_waits_for_it_is_no_lock(tmp_path):
    """As `clean` may do between a run's opening the file and locking it."""
    path = tmp_path / "lock"
    real, removed = fcntl.flock, []

    def removes_it_first(file, how):
        if not removed:
            removed.append(path.unlink())
        return real(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", removes_it_first)
        with state.held(path, "first"), pytest.raises(CompanionError, match=f"second .process {os.getpid()}"):
            with state.held(path, "second"):
                pass


def test_changed_parameters_and_a_look_change_no_file_of_the_repository(project):
    """Not results of the plain profile, not pages, not notebooks; only what git ignores."""
    shutil.copy2(ROOT / ".gitignore", project)
    git = ["git", "-C", str(project), "-c", "user.name=x", "-c", "user.email=x@y.z"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    for words in (
        ["--only", "10_one", "--ipc", "7"],
        ["--list"],
        ["--dry-run", "--force"],
        ["--only", "20_two", "--seed", "0"],
    ):
        done = call(project, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        seen = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
        assert seen.stdout == "", (words, seen.stdout)


def test_a_process_left_behind_is_named(project):
    """The launcher killed outright: who comes next is told which process still holds the folder, and how to stop it."""
    mark = f"companion-{os.getpid()}-{time.time_ns()}"
    process = started(project, INTERRUPT_TEST=mark)
    launcher = int((project / "results/logs/cpu/lock").read_text().split()[0])
    os.kill(launcher, signal.SIGKILL)
    process.wait(timeout=LIMIT)
    busy = call(project, "--only", "20")
    found = re.search(r"going on \(process (\d+); `kill -INT -- -(\d+)` stops it\)", busy.stderr)
    assert busy.returncode == 2 and found and found[1] == found[2] != str(launcher), busy.stderr
    os.kill(int(found[1]), signal.SIGKILL)  # the scheduler, too: the notebook itself is left
    wait_for(lambda: "is still at work" in call(project, "--only", "10").stderr)
    found = re.search(
        r"10_one is still at work \(process (\d+); `kill \1` stops it\)", call(project, "--only", "10").stderr
    )
    assert call(project, "--only", "20").returncode == 0, "another notebook may run"
    os.kill(int(found[1]), signal.SIGTERM)
    wait_for(lambda: not still_running(mark))
    assert workplaces(project) == []


def test_test_command_fails_if_either_part_fails(project):
    (project / "tests").mkdir()
    (project / "tests/test_it.py").write_text("def test_it(): pass\n")
    (project / "tests/test_other.py").write_text("def test_it(): assert False\n")
    (project / "conftest.py").write_text("")
    write_notebook(project, "10_one", "print(1)", write="")
    for name in NAMES[1:]:
        (project / f"notebooks/{name}.ipynb").unlink()

    def test(*words: str) -> subprocess.CompletedProcess:
        return call(project, "test", "--no-setup", *(("--", *words) if words else ()), setup=True)

    cell = {"outputs": [{"output_type": "stream", "name": "stdout", "text": "2\n"}], "execution_count": 1}
    edit(project / "notebooks/10_one.ipynb", lambda notebook: notebook["cells"][2].update(cell))
    done = test("tests/test_it.py", "-n0")
    assert done.returncode == 0 and "1 passed" in done.stdout and "failed" not in done.stdout, done.stdout
    (project / "tests/test_other.py").unlink()
    done = test("-n0")
    assert done.returncode == 1 and "1 passed" in done.stdout and "1 failed" in done.stdout, done.stdout
    assert list(project.glob("results/*/*/executed.failed.ipynb")) == []


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tset"], "unknown command 'tset'; allowed: run test lab refresh gallery lock clean"),
        (["run", "cpu"], "unknown word 'cpu'; a command comes first and is one of: run"),
        (["--onyl", "10"], "unknown option '--onyl'; allowed: --profile --only"),
        (["test", "--only", "10"], "'test' does not take '--only'; allowed: --no-setup"),
        (["--", "x"], "'run' takes no words after --"),
        (["--no-setup", "--only", "13"], "unknown notebook '13'; allowed: 10_one, 20_two, 90_all"),
    ],
)
def test_a_mistake_is_one_line_and_runs_nothing(project, words, message):
    done = call(project, *words, setup=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not ran(done)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only"], "argument --only: expected at least one argument"),
        (["--profile", "papr"], "unknown profile 'papr' (did you mean 'paper'?); allowed: cpu, paper"),
        (["--executor", "cloud"], "unknown executor 'cloud'; allowed: gpu, kubernetes, local, slurm"),
        (["--ipc", "0"], "--ipc must be a whole number >= 1, not '0'"),
        (["--ipc", "-1"], "--ipc"),
        (["--ipc", "ten"], "--ipc must be a whole number >= 1, not 'ten'"),
        (["--seed", "1.5"], "--seed must be a whole number >= 0, not '1.5'"),
        (["--cores", "0"], "--cores must be a whole number >= 1, not '0'"),
        (["-p", "sed=1"], "unknown parameter 'sed' (did you mean 'seed'?); allowed: ipc, seed"),
        (["-p", "seed"], "-p takes NAME=VALUE, not 'seed'"),
        (["-p", "seed=x"], "the parameter seed takes int (default 0), not 'x'"),
        (["-p", "ipc=1.5"], "the parameter ipc takes int or None (default None), not '1.5'"),
        (["-p", "profile=paper"], "the profile is chosen by --profile"),
        (["--dataset", "digits"], "unknown parameter 'dataset'; allowed: ipc, seed"),
        (["refresh", "--seed", "1"], "refresh keeps the outputs of the plain cpu profile"),
    ],
)
def test_a_mistake_in_a_value_is_one_line(finished, monkeypatch, words, message):
    monkeypatch.setattr(command, "ROOT", finished[0])
    words = words if words[0] == "refresh" else ["run", *words]
    with pytest.raises(CompanionError, match=re.escape(message)) as caught:
        command.main(words)
    assert "\n" not in str(caught.value)


def test_parameters_that_only_some_notebooks_have(project, monkeypatch, capsys):
    monkeypatch.setattr(command, "ROOT", project)
    write_notebook(project, "20_two", "pass", parameters='profile: str = "cpu"\n', write="")
    rows = table.load(project)
    command.request_of(command.arguments(["run", "--ipc", "5"]), rows)
    assert "20_two has no parameter 'ipc' and runs without it" in capsys.readouterr().out
    with pytest.raises(CompanionError, match="unknown parameter of 20_two 'ipc'"):
        command.request_of(command.arguments(["run", "--ipc", "5", "--only", "10", "20"]), rows)


def test_ambiguous_beginning_and_missing_notebook(project, monkeypatch):
    monkeypatch.setattr(command, "ROOT", project)
    (project / "workflow/notebooks.yaml").write_text(ROWS + "  11_one: {title: Third}\n")
    rows = table.load(project)
    with pytest.raises(CompanionError, match="fits several; allowed: 10_one, 11_one"):
        command.request_of(command.arguments(["run", "--only", "1"]), rows)
    with pytest.raises(CompanionError, match="11_one.ipynb of workflow/notebooks.yaml does not exist"):
        command.request_of(command.arguments(["run", "--only", "11"]), rows)


def photographs(folder: Path, *shapes: tuple[int, int]) -> None:
    """Two classes with an image of each shape."""
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            Image.new("RGB", shape, (40 * number, 90, 30)).save(folder / name / f"{number}.png")


def test_a_folder_is_looked_for_where_the_command_was_typed(tmp_path, monkeypatch):
    photographs(tmp_path / "pets", (16, 16), (16, 16))
    monkeypatch.setenv("COMPANION_CALLER", str(tmp_path))
    words = ["run", "--only", "20_dm", "--dataset", "folder:pets"]
    request = command.request_of(command.arguments(words), table.load(ROOT))
    assert request.parameters == {"dataset": f"folder:{tmp_path}/pets"}
    assert re.fullmatch(r"cpu\+dataset=folder-[a-zA-Z0-9._-]+-[0-9a-f]{4}", request.run)
    with pytest.raises(CompanionError, match=f"no folder {tmp_path}/cats"):
        command.request_of(command.arguments([*words[:-1], "folder:cats"]), table.load(ROOT))
    with pytest.raises(CompanionError, match="mnist has no small settings"):
        command.request_of(command.arguments([*words[:-1], "mnist"]), table.load(ROOT))


def test_images_of_ones_own_get_a_size(tmp_path, monkeypatch, capsys):
    """What is mixed or large is scaled, with a note; what would take days is refused before anything starts."""
    monkeypatch.setenv("COMPANION_CALLER", str(tmp_path))
    rows = table.load(ROOT)

    def asked(name: str, *more: str) -> table.Request:
        return command.request_of(command.arguments(["run", "--only", "20", "--dataset", name, *more]), rows)

    photographs(tmp_path / "mixed", (40, 30), (64, 48), (50, 50))
    photographs(tmp_path / "tiny", (20, 24), (24, 24))
    photographs(tmp_path / "large", (64, 64), (64, 64))
    cases = {("mixed", 30): (), ("tiny", 20): (), ("large", 32): (), ("mixed", 24): ("-p", "size=24")}
    for (name, size), more in cases.items():
        assert asked(f"folder:{name}", *more).parameters == {"dataset": f"folder:{tmp_path}/{name}@{size}"}
        assert ("scaled to" in capsys.readouterr().out) != bool(more)
    assert asked("folder:mixed@16").parameters == {"dataset": f"folder:{tmp_path}/mixed@16"}
    assert re.fullmatch(r"cpu\+dataset=folder-mixed-16-[0-9a-f]{4}", asked("folder:mixed@16").run)
    data = load_data(asked("folder:mixed").parameters["dataset"])
    assert data.train.shape == (3, 30, 30) and data.train.small
    for words, told in {
        ("folder:large", "-p", "size=64"): "images at 64 pixels have no small settings",
        ("folder:large", "-p", "size=big"): "size must be a whole number of pixels of at least 1, not 'big'",
        ("digits", "-p", "size=16"): "size is of images of your own",
    }.items():
        with pytest.raises(CompanionError, match=told):
            asked(*words)
    large = asked("folder:large", "--profile", "paper")
    assert large.parameters == {"dataset": f"folder:{tmp_path}/large"}


def test_a_run_with_changed_parameters_is_expected_to_take_what_the_plain_one_took(project):
    kept = project / "results/cpu/10_one/run.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"seconds": 125.0}))
    assert state.expected_seconds(project, "cpu+ipc=5", "10_one") == 125.0
    assert state.expected_seconds(project, "paper", "10_one") is None


def test_what_holds_anyway_is_no_changed_parameter():
    """`--seed 0` is the plain run: a notebook and its launcher agree on the folder."""
    words = ["run", "--only", "20_dm", "--seed", "0"]
    request = command.request_of(command.arguments(words), table.load(ROOT))
    assert request.run == "cpu" and request.parameters == {}


def test_unknown_dataset_is_refused_before_anything_runs():
    with pytest.raises(CompanionError, match="unknown dataset 'digit'.*digits"):
        command.request_of(
            command.arguments(["run", "--only", "20_dm", "--dataset", "digit"]), table.load(ROOT)
        )


def test_code_that_is_no_python_is_one_line(project):
    (project / "lib/two.py").write_text("value = (\n")
    done = call(project)
    assert done.returncode == 2 and not ran(done)
    assert len(done.stderr.splitlines()) == 1 and "lib/two.py is no Python" in done.stderr, done.stderr


@pytest.mark.parametrize("cell", ["x = 1 + 1", "import os", "x = y = f()", "a, b = 1, 2"])
def test_parameters_cell_holds_literals_only(project, cell):
    write_notebook(project, "10_one", "pass", parameters=cell)
    with pytest.raises(CompanionError, match="may hold only lines such as"):
        table.parameters_of(project / "notebooks/10_one.ipynb")


def test_parameters_agree_with_papermill(project):
    import papermill

    cell = PARAMETERS + "methods: list[str] = ['a']\nrate = 0.1\n"
    write_notebook(project, "10_one", "pass", parameters=cell)
    path = project / "notebooks/10_one.ipynb"
    known = table.parameters_of(path)
    assert set(papermill.inspect_notebook(str(path))) <= set(known)
    assert known["ipc"].types == ("int", "None") and known["methods"].types == ("list",)
    assert table.value_of(known["methods"], "['a', 'b']") == ["a", "b"]
    assert table.value_of(known["rate"], "1") == 1.0
    assert table.value_of(known["profile"], "10") == "10"
    assert table.value_of(known["ipc"], "None") is None


def test_run_names_are_safe_as_folders():
    request = table.Request("cpu", (), {"b": "../../x", "a": 1})
    assert re.fullmatch(r"cpu\+a=1\+b=x-[0-9a-f]{4}", request.run)


def test_two_holders_of_one_folder_do_not_meet(tmp_path):
    with (
        state.alone(tmp_path, "cpu"),
        state.alone(tmp_path, "paper"),
        pytest.raises(CompanionError, match="another run"),
        state.alone(tmp_path, "cpu"),
    ):
        pass
    with open(tmp_path / "results/logs/cpu/lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ------------------------------------------------------------------ set-up


def shadow(folder: Path, name: str, script: str) -> None:
    """A program ``name`` in ``folder`` to put in front of the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A project without environment, and the variables for a call in which ``uv`` only writes down what it is told."""
    root = write_project(_made(tmp_path / "bare project"))
    uv = f'echo "$* | index ${{UV_INDEX-}} links ${{UV_FIND_LINKS-}}" >> "{tmp_path}/uv"\n'
    shadow(
        tmp_path / "bin",
        "uv",
        uv + f'if [[ -e "{tmp_path}/broken" ]]; then echo "error: no such package"; exit 1; fi',
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nextra-index-url = https://a.example/simple\n  https://b.example/simple\nfind-links = /w\n"
    )
    return root, {"COMPANION_ENV": str(root / ".venv"), "PATH": path, "PIP_CONFIG_FILE": str(config)}


def test_python_too_old_is_one_line(bare, tmp_path):
    root, given = bare
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        shadow(tmp_path / "bin", name, 'if [[ $1 == --version ]]; then echo "Python 3.9.1"; else exit 1; fi')
    done = call(root, setup=True, **given)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Setting up")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert (
        "Python 3.11 or newer with its venv module is needed" in lines[0] and "found Python 3.9.1" in lines[0]
    )
    assert not (root / ".venv").exists()


def test_a_full_disk_is_noticed_before_anything_is_made(bare, tmp_path):
    root, given = bare
    shadow(
        tmp_path / "bin", "df", 'echo "Filesystem 1M-blocks Used Available"; echo "x 9000 8000 1000 90% /"'
    )
    done = call(root, setup=True, **given)
    assert done.returncode == 1
    assert "needs 8000 MB of disk" in done.stderr and "1000 MB free" in done.stderr
    assert not (root / ".venv").exists()


def test_a_foreign_folder_is_never_overwritten(bare):
    root, given = bare
    (root / ".venv").mkdir()
    (root / ".venv/precious.txt").touch()
    done = call(root, setup=True, **given)
    assert done.returncode == 1 and "is not a Python environment" in done.stderr
    assert (root / ".venv/precious.txt").exists()


def test_mistakes_and_help_need_no_environment(bare):
    root, given = bare
    assert call(root, "--help", setup=True, **given).stdout.startswith("Usage: ./run_all.sh")
    assert call(root, "--onyl", setup=True, **given).returncode == 2
    assert not (root / ".venv").exists()
    done = call(root, **given)
    assert done.returncode == 1 and "leave out --no-setup" in done.stderr


def test_set_up_breaks_recovers_and_is_skipped(bare, tmp_path):
    root, given = bare
    (tmp_path / "broken").touch()
    done = call(root, "lab", setup=True, **given)
    assert done.returncode == 1
    assert (
        "installing requirements.lock failed" in done.stderr and str(root / ".setup/setup.log") in done.stderr
    )
    assert "no such package" in done.stderr and not (root / ".venv/.companion-stamp").exists()

    (tmp_path / "broken").unlink()
    done = call(root, "lab", setup=True, **given)  # JupyterLab is not there, the environment is
    assert "Setting up" in done.stderr and "No module named jupyter" in done.stderr
    assert (root / ".venv/.companion-stamp").exists()
    told = (tmp_path / "uv").read_text().splitlines()
    where = "| index https://a.example/simple https://b.example/simple links /w"
    python = root / ".venv/bin/python"
    assert told[-2] == f"pip install --python {python} --compile-bytecode -r requirements.lock {where}"
    assert told[-1].startswith(f"pip install --python {python} --no-deps") and told[-1].endswith(
        f"-e {root} {where}"
    )

    assert "Setting up" not in call(root, "lab", setup=True, **given).stderr
    with open(root / "environment.yml", "a") as file:
        file.write("      - torch==1.0\n")
    done = call(root, "lab", setup=True, **given)
    assert done.returncode == 1 and "requirements.lock lacks torch==1.0" in done.stderr, done.stderr


def test_conda_is_used_where_there_is_one(bare, tmp_path):
    root, given = bare
    shadow(
        tmp_path / "bin",
        "micromamba",
        f'echo "$@" >> "{tmp_path}/called"; echo "error: no such channel"; exit 1',
    )
    done = call(root, setup=True, **given)
    assert done.returncode == 1 and "creating the environment with micromamba failed" in done.stderr
    assert "no such channel" in done.stderr
    words = (tmp_path / "called").read_text().strip()
    assert words == f"create -y -p {root}/.venv -c conda-forge --override-channels python=3.11 pip"


def test_lock_resolves_the_pins(bare, tmp_path):
    root, given = bare
    shadow(tmp_path / "bin", "uv", f'cat > "{tmp_path}/pins"; echo "$@" > "{tmp_path}/uv"')
    done = call(root, "lock", setup=True, **given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "uv").read_text().startswith("pip compile - --universal")
    pins = (tmp_path / "pins").read_text().splitlines()
    assert "torch==2.15.0" in pins and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert not (root / ".venv").exists()


# ------------------------------------------------------------------ table, shell


def test_the_lock_holds_the_pins_and_names_no_host():
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^ +- ([\w.-]+==[\w.]+)$", (ROOT / "environment.yml").read_text(), re.M)
    locked = {line.split(";")[0].strip() for line in lock.splitlines()}
    assert (
        pins
        and {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() + pin[pin.index("=") :] for pin in pins}
        <= locked
    )
    assert "://" not in lock
    for line in lock.splitlines():
        if re.match(r"(nvidia|cuda|triton)", line):
            assert "sys_platform == 'linux'" in line


def test_the_table_fits_the_notebooks_and_profiles():
    from lib.companion.profiles import PROFILES

    rows = table.load(ROOT)
    assert set(rows.profiles) == set(PROFILES)
    there = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert there == set(rows.notebooks)
    assert all(
        set(values) == set(table.RESOURCES)
        for nb in rows.notebooks.values()
        for values in nb.resources.values()
    )
    of_methods = {entry.notebook for entry in METHODS.values()}
    assert set(rows.notebooks["24_ipm"].reads) == of_methods & there
    assert set(rows.notebooks["90_leaderboard"].reads) == there - {"90_leaderboard"}


@pytest.mark.parametrize(
    "wrong", ["reads: [30_x]", "reads: mehods", "resources: {cup: {}}", "resources: {cpu: {mem: 1}}"]
)
def test_a_wrong_row_is_refused(tmp_path, wrong):
    (tmp_path / "workflow").mkdir()
    (tmp_path / "workflow/notebooks.yaml").write_text(ROWS.replace("title: First", f"title: First, {wrong}"))
    with pytest.raises(CompanionError, match="in the row 10_one"):
        table.load(tmp_path)


def test_shell_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [
        "run_all.sh",
        ".ci/run",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "workflow").glob("*.sh")),
    ]
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
