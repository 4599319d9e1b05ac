"""The command line and the scheduling, on a small project of three notebooks in a folder whose name has spaces."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from lib.system.errors import CompanionError
from workflow import pins, table

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("10_one", "20_two", "90_all")
PARAMETERS = 'profile: str = "cpu"\nseed: int = 0\nipc: int | None = None\n'
WRITE = """
import json, os, pathlib
folder = pathlib.Path("..", "results", os.environ["COMPANION_RUN"], NAME)
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
  10_one: {title: First, reads: []}
  20_two: {title: Second, reads: []}
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
    """A copy of the workflow with notebooks that take no time, and a ``lib`` of two modules beside the needed ones."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "workflow", root / "workflow", ignore=ignore)
    for name in ("run_all.sh", "environment.yml", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, root)
    (root / "lib").mkdir()
    (root / "notebooks").mkdir()
    for name in ("__init__", "errors", "files", "sources"):
        shutil.copy2(ROOT / "lib" / f"{name}.py", root / "lib")
    (root / "lib/one.py").write_text("from lib import shared\n")
    (root / "lib/two.py").write_text("value = 2\n")
    (root / "lib/shared.py").write_text("value = 1\n")
    (root / "workflow/notebooks.yaml").write_text(ROWS)
    write_notebook(root, "10_one", "import lib.one\nprint(lib.one.shared.value)")
    write_notebook(root, "20_two", "from lib.two import value\nvalue")
    write_notebook(root, "90_all", "print('all')")
    return root


def call(root: Path, *words: str, setup: bool = False, **variables: str) -> subprocess.CompletedProcess:
    """``run_all.sh`` from a foreign working directory."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTEST", "COMPANION", "PYTHONPATH"))
    }
    environment |= {"COMPANION_ENV": sys.prefix, "OMP_NUM_THREADS": "1"} | variables
    words = [str(root / "run_all.sh"), *words, *([] if setup else ["--no-setup"])]
    return subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, timeout=120)


def ran(done: subprocess.CompletedProcess) -> set[str]:
    """The notebooks whose own line says that they were run."""
    return set(re.findall(r"^ *(?:ok|failed|interrupted)  (\d\d_\w+)  [\d.]+ s", done.stdout, re.M))


def would_run(root: Path, *words: str) -> dict[str, str]:
    """The notebooks that a dry run names, with the reason."""
    done = call(root, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\d\d_\w+) +run +(.*?) *$", done.stdout, re.M))


def edit(path: Path, change) -> None:
    """Rewrite a notebook's JSON."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The project after a first run, and what that run printed."""
    root = write_project(_made(tmp_path_factory.mktemp("project") / "with some spaces"))
    return root, call(root, "--cores", "2")


@pytest.fixture
def project(finished, tmp_path):
    """A fresh copy of the finished project."""
    root = tmp_path / "my copy"
    shutil.copytree(finished[0], root, ignore=shutil.ignore_patterns("lock"))
    return root


# ------------------------------------------------------------------ running


def test_first_run_executes_all_and_summarises(finished):
    root, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran(done) == set(NAMES)
    for name in NAMES:
        assert re.search(rf"^{name} +ok +[\d.]+ +\d+ +results/cpu/{name}/executed.ipynb", done.stdout, re.M)
        assert not (root / "results/cpu" / name / "executed.failed.ipynb").exists()


def test_the_kernel_sees_the_run(finished):
    seen = json.loads((finished[0] / "results/cpu/10_one/run.json").read_text())
    expected = {
        "cwd": "notebooks",
        "profile": "cpu",
        "ipc": None,
        "COMPANION_RUN": "cpu",
        "COMPANION_BARS": "0",
    }
    expected |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
    expected |= {"MALLOC_TRIM_THRESHOLD_": "4294967296", "COMPANION_OUT": str(finished[0])}
    assert {key: seen[key] for key in expected} == expected


@pytest.mark.parametrize("engine", ["snakemake", "papermill"])
def test_second_run_skips_everything(project, engine):
    done = call(project, "--engine", engine)
    assert done.returncode == 0 and not ran(done)
    assert done.stdout.count("up to date") == 3


def test_snakemake_alone_agrees_that_nothing_is_to_be_done(project):
    path = project / "notebooks/20_two.ipynb"
    edit(path, lambda nb: nb["cells"][0].update(source="# Another heading"))
    (project / "lib/two.py").touch()
    assert "Nothing to be done" in snakemake(project)
    edit(path, lambda nb: nb["cells"][2].update(source="from lib.two import value\nvalue + 1"))
    assert set(re.findall(r"wildcards: run=cpu, nb=(\w+)", snakemake(project))) == {"20_two", "90_all"}


def snakemake(root: Path) -> str:
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
        [sys.executable, "-m", "snakemake", *words], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_edits_of_text_and_outputs_run_nothing(project):
    output = {"output_type": "stream", "name": "stdout", "text": "other"}

    def change(notebook):
        notebook["cells"][0]["source"] = "# Another heading"
        notebook["cells"][2]["outputs"] = [output]
        notebook["cells"][2]["execution_count"] = 7

    edit(project / "notebooks/10_one.ipynb", change)
    for file in (project / "lib").glob("*.py"):
        file.touch()
    assert would_run(project) == {}


def test_edit_of_a_code_cell_reruns_it_and_its_readers(project):
    edit(project / "notebooks/10_one.ipynb", lambda nb: nb["cells"][2].update(source="print(3)"))
    assert would_run(project) == {"10_one": "code cells changed", "90_all": "after 10_one"}


def test_edit_of_an_imported_file_reruns_only_what_imports_it(project):
    (project / "lib/shared.py").write_text("value = 5\n")
    assert would_run(project) == {"10_one": "lib/shared.py changed", "90_all": "after 10_one"}
    before = (project / "results/cpu/20_two/executed.ipynb").stat().st_mtime_ns
    done = call(project)
    assert done.returncode == 0 and ran(done) == {"10_one", "90_all"}
    assert re.search(r"20_two +up to date", done.stdout)
    assert (project / "results/cpu/20_two/executed.ipynb").stat().st_mtime_ns == before
    assert '"5\\n"' in (project / "results/cpu/10_one/executed.ipynb").read_text()
    assert would_run(project) == {}


def test_changed_or_missing_results_are_noticed(project):
    (project / "results/cpu/10_one/table.csv").write_text("value\n9\n")
    assert would_run(project) == {"90_all": "table of 10_one changed"}
    (project / "results/cpu/20_two/run.json").unlink()
    assert would_run(project)["20_two"] == "run.json is missing"
    (project / "results/cpu/90_all/executed.ipynb").write_text("{")
    assert "does not say" in would_run(project, "--only", "90")["90_all"]


def test_only_force_and_list(project):
    assert set(would_run(project, "--force")) == set(NAMES)
    assert set(would_run(project, "--force", "--only", "20", "notebooks/10_one.ipynb")) == {
        "10_one",
        "20_two",
    }
    shutil.rmtree(project / "results/cpu/20_two")
    assert would_run(project, "--only", "10_one") == {}
    listed = call(project, "--list").stdout
    assert re.search(r"10_one +First +up to date", listed) and re.search(
        r"20_two +Second +not run yet", listed
    )
    done = call(project, "--only", "90_all", "--engine", "papermill")
    assert done.returncode == 0 and ran(done) == {"90_all"}, "what it reads is taken as it is"


@pytest.mark.parametrize("engine", ["snakemake", "papermill"])
def test_a_failing_notebook_stops_no_other(project, engine):
    write_notebook(project, "10_one", "raise ValueError('no images\\nat all')")
    (project / "lib/two.py").write_text("value = 3\n")
    done = call(project, "--engine", engine)
    assert done.returncode == 1
    assert ran(done) == set(NAMES)
    assert re.search(r"^10_one +failed .*results/cpu/10_one/executed.failed.ipynb", done.stdout, re.M)
    assert "failed: 10_one: ValueError: no images (messages: results/logs/cpu/10_one.log)" in done.stdout
    assert re.search(r"^90_all +ok", done.stdout, re.M)
    assert sorted(path.name for path in (project / "results/cpu/10_one").iterdir()) == [
        "executed.failed.ipynb"
    ]
    assert "ValueError" in (project / "results/cpu/10_one/executed.failed.ipynb").read_text()

    if engine == "papermill":
        write_notebook(project, "10_one", "print('repaired')")
        done = call(project, "--engine", engine, "--only", "10_one")
        assert done.returncode == 0
        assert not (project / "results/cpu/10_one/executed.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("code", "write", "message"),
    [
        ("pass", "", "ended without writing table.csv, run.json"),
        ("import os\nos._exit(3)", WRITE, "DeadKernelError"),
    ],
)
def test_a_notebook_that_breaks_off_has_failed(project, code, write, message):
    write_notebook(project, "20_two", code, write=write)
    done = call(project, "--engine", "papermill", "--only", "20_two")
    assert done.returncode == 1 and message in done.stdout, done.stdout
    assert not (project / "results/cpu/20_two/executed.ipynb").exists()


def test_changed_parameters_get_their_own_results(project):
    before = (project / "results/cpu/10_one/table.csv").read_bytes()
    done = call(project, "--only", "10_one", "--ipc", "5", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project / "results/cpu+ipc=5+seed=3/10_one"
    assert (folder / "table.csv").read_text() == "value\n5\n"
    assert json.loads((folder / "run.json").read_text())["COMPANION_RUN"] == "cpu+ipc=5+seed=3"
    assert (project / "results/cpu/10_one/table.csv").read_bytes() == before
    assert would_run(project) == {}
    assert would_run(project, "--only", "10", "-p", "ipc=5", "--seed", "3") == {}


def test_the_profile_decides_folder_and_threads(project):
    done = call(project, "--profile", "paper", "--only", "10_one", "--engine", "papermill")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((project / "results/paper/10_one/run.json").read_text())
    assert (seen["profile"], seen["OMP_NUM_THREADS"]) == ("paper", "2")


def test_parameters_that_only_some_notebooks_have(project):
    write_notebook(project, "20_two", "pass", parameters='profile: str = "cpu"\n', write="")
    done = call(project, "--dry-run", "--ipc", "5")
    assert done.returncode == 0 and "20_two has no parameter 'ipc' and runs without it" in done.stdout
    done = call(project, "--dry-run", "--ipc", "5", "--only", "10", "20")
    assert done.returncode == 2 and "unknown parameter of 20_two 'ipc'" in done.stderr


def test_an_interrupted_run_leaves_nothing_finished_and_nothing_running(project):
    mark = f"companion-{os.getpid()}-{time.time_ns()}"
    write_notebook(
        project, "10_one", "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(100)"
    )
    environment = os.environ | {"COMPANION_ENV": sys.prefix, "INTERRUPT_TEST": mark}
    words = [str(project / "run_all.sh"), "--no-setup", "--only", "10_one"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and not (project / "notebooks/started").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and re.search(r"10_one +interrupted", output), output
    assert not (project / "results/cpu/10_one/executed.ipynb").exists()
    deadline = time.time() + 10
    while _still_running(mark) and time.time() < deadline:
        time.sleep(0.2)
    assert not _still_running(mark)


def _still_running(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"INTERRUPT_TEST={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_two_runs_into_one_folder_do_not_meet(project):
    import fcntl

    path = project / "results/logs/cpu/lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = call(project)
    assert done.returncode == 2 and "another run into results/cpu is going on" in done.stderr


def test_a_failing_gallery_is_reported(project):
    (project / "lib/companion").mkdir()
    (project / "lib/companion/__init__.py").touch()
    (project / "workflow/pages/gallery.py").write_text("raise SystemExit(3)\n")
    done = call(project)
    assert done.returncode == 1 and "FAILED  gallery; see results/logs/cpu/gallery.log" in done.stdout


def test_refresh_writes_outputs_back(project):
    (project / "lib/companion").mkdir()
    (project / "lib/companion/__init__.py").touch()
    shutil.copy2(ROOT / "workflow/pages/normalise.py", project / "lib/companion")
    done = call(project, "refresh")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (project / "notebooks/10_one.ipynb").read_text()
    assert '"1\\n"' in text and "injected-parameters" not in text and "papermill" not in text
    done = call(project, "refresh")
    assert not ran(done) and (project / "notebooks/10_one.ipynb").read_text() == text
    assert call(project, "refresh", "--ipc", "5").returncode == 2


def test_clean_keeps_committed_results_environment_and_data(project):
    keep = [
        project / name
        for name in ("data/x", ".venv/x", "results/cpu/10_one/table.csv", "notebooks/10_one.ipynb")
    ]
    drop = [
        project / name
        for name in (".cache/x", ".snakemake/x", "results/cpu+ipc=5/10_one/table.csv", "figures/cpu+ipc=5/x")
    ]
    for path in (*keep, *drop):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    done = call(project, "clean")
    assert done.returncode == 0
    assert all(path.exists() for path in keep) and not any(path.exists() for path in drop)
    assert not (project / "results/cpu/10_one/executed.ipynb").exists()


def test_test_command_fails_if_either_part_fails(project):
    (project / "tests").mkdir()
    (project / "tests/test_it.py").write_text("def test_it(): pass\n")
    write_notebook(project, "10_one", "print(1)", write="")
    for name in NAMES[1:]:
        (project / f"notebooks/{name}.ipynb").unlink()

    def store(text: str) -> None:
        cell = {"outputs": [{"output_type": "stream", "name": "stdout", "text": text}], "execution_count": 1}
        edit(project / "notebooks/10_one.ipynb", lambda notebook: notebook["cells"][2].update(cell))

    store("2\n")
    done = call(project, "test", "--no-setup", "--", "-n0", setup=True)
    assert done.returncode == 1 and "1 passed" in done.stdout and "1 failed" in done.stdout, done.stdout
    store("1\n")
    done = call(project, "test", "--no-setup", "--", "-n0", setup=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"passed in [\d.]+s", done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tset"], "unknown command 'tset'; allowed: run test lab refresh lock clean"),
        (["run", "cpu"], "unknown word 'cpu'; a command comes first and is one of: run"),
        (["--onyl", "10"], "unknown option '--onyl'; allowed: --profile --only"),
        (["test", "--only", "10"], "'test' does not take '--only'; allowed: --no-setup"),
        (["--", "x"], "'run' takes no words after --"),
        (["--only", "13"], "unknown notebook '13'; allowed: 10_one, 20_two, 90_all"),
        (["--only"], "argument --only: expected at least one argument"),
        (["--profile", "papr"], "unknown profile 'papr' (did you mean 'paper'?); allowed: cpu, paper"),
        (["--executor", "cloud"], "unknown executor 'cloud'; allowed: gpu, kubernetes, local, slurm"),
        (
            ["--engine", "make"],
            "unknown engine 'make' (did you mean 'snakemake'?); allowed: papermill, snakemake",
        ),
        (["--engine", "papermill", "--executor", "slurm"], "--engine papermill runs on this machine only"),
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
    ],
)
def test_a_mistake_is_one_line_and_runs_nothing(project, words, message):
    done = call(project, *words) if words != ["--", "x"] else call(project, "--no-setup", *words, setup=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not ran(done)


def test_ambiguous_beginning_and_missing_notebook(project):
    rows = ROWS.replace("10_one", "11_one")
    (project / "workflow/notebooks.yaml").write_text(
        ROWS + rows.split("notebooks:\n")[1].splitlines()[0] + "\n"
    )
    done = call(project, "--only", "1")
    assert done.returncode == 2 and "fits several; allowed: 10_one, 11_one" in done.stderr
    done = call(project, "--only", "11")
    assert done.returncode == 2 and "11_one.ipynb of workflow/notebooks.yaml does not exist" in done.stderr


def test_unknown_dataset_is_refused_before_anything_runs():
    done = call(ROOT, "--dry-run", "--only", "20_dm", "--dataset", "digit")
    assert done.returncode == 2 and "unknown dataset 'digit'" in done.stderr and "digits" in done.stderr


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
    assert re.fullmatch(r"cpu\+a=1\+b=[0-9a-f]{12}", request.run)


# ------------------------------------------------------------------ set-up


def shadow(folder: Path, name: str, script: str) -> None:
    """A program ``name`` in ``folder`` to put in front of the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A project without environment whose lock is empty, and the variables for a call that stays off the network."""
    root = write_project(_made(tmp_path / "bare project"))
    (root / "environment.yml").write_text("dependencies:\n  - python=3.11\n  - pip\n  - pip:\n")
    (root / "requirements.lock").write_text("")
    path = f"{_made(tmp_path / 'bin')}:{os.environ['PATH']}"
    return root, {
        "COMPANION_ENV": str(root / ".venv"),
        "PATH": path,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }


def wheel_of_setuptools(folder: Path) -> str:
    """The installed setuptools, with which the project is built, packed again as a wheel in ``folder``; its version."""
    found = importlib.metadata.distribution("setuptools")
    with zipfile.ZipFile(folder / f"setuptools-{found.version}-py3-none-any.whl", "w") as wheel:
        for file in found.files:
            if file.parts[0] != ".." and "__pycache__" not in file.parts and "tests" not in file.parts:
                wheel.write(file.locate(), file.as_posix())
    return found.version


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_python_too_old_is_one_line(bare, tmp_path):
    root, variables = bare
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        shadow(tmp_path / "bin", name, '[[ $2 == *print* ]] && echo 3.9\n[[ $2 != *"(3, 11)"* ]]')
    done = call(root, setup=True, **variables)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "Python 3.11 or newer is needed" in done.stderr and "found only 3.9 at" in done.stderr
    assert not (root / ".venv").exists()


def test_a_full_disk_is_noticed_before_anything_is_made(bare, tmp_path):
    root, variables = bare
    shadow(
        tmp_path / "bin", "df", 'echo "Filesystem 1M-blocks Used Available"; echo "x 9000 8000 1000 90% /"'
    )
    done = call(root, setup=True, **variables)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "needs 8000 MB of disk" in done.stderr and "1000 MB free" in done.stderr
    assert not (root / ".venv").exists()


def test_a_foreign_folder_is_never_overwritten(bare):
    root, variables = bare
    (root / ".venv").mkdir()
    (root / ".venv/precious.txt").touch()
    done = call(root, setup=True, **variables)
    assert done.returncode == 1 and "is not a Python environment" in done.stderr
    assert (root / ".venv/precious.txt").exists()


def test_mistakes_and_help_need_no_environment(bare):
    root, variables = bare
    assert call(root, "--help", setup=True, **variables).stdout.startswith("Usage: ./run_all.sh")
    assert call(root, "--onyl", setup=True, **variables).returncode == 2
    assert not (root / ".venv").exists()
    done = call(root, **variables)
    assert done.returncode == 1 and "leave out --no-setup" in done.stderr


def test_set_up_breaks_recovers_and_is_skipped(bare, tmp_path):
    root, variables = bare
    lock, version = root / "requirements.lock", wheel_of_setuptools(tmp_path)
    variables["PIP_FIND_LINKS"] = str(tmp_path)
    lock.write_text("no-such-package-anywhere==1.0\n")
    done = call(root, "lab", setup=True, **variables)
    assert done.returncode == 1
    assert (
        "installing requirements.lock failed" in done.stderr and str(root / ".setup/setup.log") in done.stderr
    )
    assert "no-such-package-anywhere" in (root / ".setup/setup.log").read_text()
    assert not (root / ".venv/.companion-stamp").exists()

    (root / ".venv/bin/pip").unlink()  # as an interruption might leave it
    shutil.rmtree(next((root / ".venv/lib").glob("python*/site-packages/pip")))
    lock.write_text(f"setuptools=={version}\n")
    done = call(root, "lab", setup=True, **variables)  # JupyterLab is not there, the environment is
    assert "Setting up" in done.stderr and "No module named jupyter" in done.stderr
    assert (root / ".venv/.companion-stamp").exists()
    found = [str(root / ".venv/bin/python"), "-c", "import lib; print(lib.__file__)"]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(found, cwd=tmp_path, env=clean, capture_output=True, text=True).stdout.strip()
    assert where == str(root / "lib/__init__.py")

    assert "Setting up" not in call(root, "lab", setup=True, **variables).stderr
    (root / "environment.yml").write_text("dependencies:\n  - python=3.11\n  - pip:\n      - torch==1.0\n")
    done = call(root, "lab", setup=True, **variables)
    assert done.returncode == 1 and "requirements.lock lacks torch==1.0" in done.stderr


def test_conda_is_used_where_there_is_one(bare, tmp_path):
    root, variables = bare
    shadow(
        tmp_path / "bin",
        "micromamba",
        f'echo "$@" >> "{tmp_path}/called"; echo "error: no such channel"; exit 1',
    )
    done = call(root, setup=True, **variables)
    assert done.returncode == 1 and "creating the environment with micromamba failed" in done.stderr
    assert "no such channel" in done.stderr
    words = (tmp_path / "called").read_text().strip()
    assert words == f"create -y -p {root}/.venv -c conda-forge --override-channels python=3.11 pip"


# ------------------------------------------------------------------ pins, table, shell


def test_the_lock_holds_the_pins():
    environment, lock = ((ROOT / name).read_text() for name in ("environment.yml", "requirements.lock"))
    assert pins.missing(environment, lock) == []
    conda, pip = pins.sections(environment)
    assert conda == ["python=3.11", "pip"] and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pip)
    for line in lock.splitlines():
        if re.match(r"(nvidia|cuda|triton)", line):
            assert line.endswith('; sys_platform == "linux"')
    assert pins.missing(environment, lock.replace("papermill==", "papermill==1")) == [
        pin for pin in pip if pin.startswith("papermill==")
    ]


def test_lock_lines_mark_what_only_linux_has():
    report = {
        "install": [
            {"metadata": {"name": n, "version": "1"}} for n in ("triton", "Zeta", "nvidia_x", "alpha")
        ]
    }
    linux = '; sys_platform == "linux"'
    assert pins.lock_lines(report) == ["alpha==1", f"nvidia_x==1{linux}", f"triton==1{linux}", "Zeta==1"]


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


@pytest.mark.parametrize(
    "wrong", ["reads: [30_x]", "reads: [], resources: {cup: {}}", "reads: [], resources: {cpu: {mem: 1}}"]
)
def test_a_wrong_row_is_refused(project, wrong):
    (project / "workflow/notebooks.yaml").write_text(ROWS.replace("First, reads: []", f"First, {wrong}"))
    done = call(project, "--list")
    assert done.returncode == 2 and "in the row 10_one of notebooks.yaml" in done.stderr


def test_shell_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = ["run_all.sh", ".ci/run", "workflow/slurm_single_node.sh", "workflow/slurm_proof.sh"]
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
