"""The commands ``run`` and ``refresh`` of run_all.sh: check the request, hand it to Snakemake, say what came of it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from lib.system.errors import CompanionError, choose
from lib.system.files import ROOT, write_text
from lib.system.naming import without_usual
from lib.system.terminal import Parser
from workflow.machine import cores, memory_mb
from workflow.place import check_idle, discard
from workflow.state import alone, expected_seconds, logs, reasons, record_name
from workflow.summary import duration, print_list, print_plan, print_summary, result
from workflow.table import Request, Table, check_parameters, load, parameters_of, request_from, select

EXECUTORS = ("local", "gpu", "slurm", "kubernetes")
SHORTCUTS = ("dataset", "ipc", "seed")


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; help is in run_all.sh."""
    parser = Parser(prog="run_all.sh", allow_abbrev=False, add_help=False)
    parser.add_argument("command")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--only", nargs="+", action="extend")
    for name in SHORTCUTS:
        parser.add_argument(f"--{name}")
    parser.add_argument("-p", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--cores")
    parser.add_argument("--executor", default="local")
    for switch in ("--force", "--dry-run", "--list"):
        parser.add_argument(switch, action="store_true")
    given = parser.parse_args(words)
    choose("executor", given.executor, dict.fromkeys(EXECUTORS))
    for name, least in (("cores", 1), ("ipc", 1), ("seed", 0)):
        text = getattr(given, name)
        if text is not None and not (text.isascii() and text.isdigit() and int(text) >= least):
            raise CompanionError(f"--{name} must be a whole number >= {least}, not {text!r}")
    return given


def request_of(given: argparse.Namespace, table: Table) -> Request:
    """The request meant by the command line, every name and value checked.

    Raises:
        CompanionError: for the first one that is wrong.
    """
    chosen = select(table, given.only)
    request_from({"profile": given.profile}, table)
    pairs = [(name, getattr(given, name)) for name in SHORTCUTS if getattr(given, name) is not None]
    for text in given.p:
        name, equals, value = text.partition("=")
        if not equals:
            raise CompanionError(f"-p takes NAME=VALUE, not {text!r}")
        pairs.append((name, value))
    pairs = own_images(pairs, given.profile)
    known = {name: parameters_of(ROOT / "notebooks" / f"{name}.ipynb") for name in chosen}
    parameters = check_parameters(pairs, known, strict=given.only is not None)
    if "dataset" in parameters:
        from lib.companion.profiles import cases_of, profile_named

        cases_of(profile_named(given.profile), parameters["dataset"])
    return Request(given.profile, chosen, without_usual(parameters))


def own_images(pairs: list[tuple[str, str]], profile: str) -> list[tuple[str, str]]:
    """``dataset=folder:pets`` as an absolute path with its size in pixels; relative ones start where the command was typed.

    The size is what ``size=N`` says. Without one, images that are not all square and alike, or larger than the small settings
    are written for, are scaled to the largest such size that enlarges none.

    Raises:
        CompanionError: there is no such folder or size, or what it holds would take days.
    """
    values = dict(pairs)
    kind, _, name = values.get("dataset", "").partition(":")
    if kind != "folder" or not name:
        if "size" in values:
            raise CompanionError("size is of images of your own: --dataset folder:PATH -p size=32")
        return pairs
    from lib.data.folders import look_at, place_of
    from lib.data.imageset import SMALL_COUNT, SMALL_SIDE

    place, size = place_of(name)
    path = Path(os.environ.get("COMPANION_CALLER", "."), place).resolve()
    if not path.is_dir():
        raise CompanionError(f"dataset {values['dataset']!r}: there is no folder {path}")
    if "size" in values:
        size = values["size"]
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise CompanionError(f"size must be a whole number of pixels of at least 1, not {size!r}")
        size = int(size)
    count, found = look_at(f"folder:{path}")
    like = {width for width, _ in found} if len(found) == 1 and found[0][0] == found[0][1] else None
    if size is None and (like is None or profile != "paper" and max(like) > SMALL_SIDE):
        size = min(SMALL_SIDE, *(side for shape in found for side in shape))
        (w, h), (wide, high) = found[0], found[-1]
        print(
            f"note: images of {w}x{h} to {wide}x{high} pixels are scaled to {size}; -p size=N for another size"
        )
    side = size or max(like)
    if profile != "paper" and (side > SMALL_SIDE or count > SMALL_COUNT):
        raise CompanionError(
            f"{count} images at {side} pixels have no small settings, only the published ones, which take days on a CPU: "
            f"-p size={SMALL_SIDE} or less and at most {SMALL_COUNT} images, or --profile paper on a GPU"
        )
    dataset = f"folder:{path}{'' if size is None else f'@{size}'}"
    return [(name, dataset if name == "dataset" else value) for name, value in pairs if name != "size"]


# ------------------------------------------------------------------ Snakemake


def snakemake(table: Table, request: Request, given: argparse.Namespace) -> list[str]:
    """The call of Snakemake for this request, which is written to a file with the names of the records that it is to make."""
    folder, config = ROOT / "workflow", logs(ROOT, request.run) / "request.json"
    names = {nb: record_name(ROOT, table, request, nb) for nb in request.notebooks}
    write_text(config, json.dumps(request.config() | {"records": names}))
    words = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(folder / "Snakefile"),
        "--directory",
        str(ROOT),
    ]
    words += ["--profile", str(folder / "profiles" / given.executor), "--configfile", str(config)]
    if given.executor in ("local", "gpu"):
        words += ["--cores", given.cores or str(cores()), "--quiet", "host", "progress"]
        if given.executor == "local":
            words += ["--resources", f"mem_mb={memory_mb()}", "gpu=1"]
    else:
        words += ["--jobs", given.cores] if given.cores else []
    if given.executor == "slurm" and not accounting():
        words += ["--slurm-status-command", "squeue"]
    if given.executor == "kubernetes" and not importlib.util.find_spec(
        "snakemake_executor_plugin_kubernetes"
    ):
        raise CompanionError(
            "--executor kubernetes needs its plugin and some preparation, see workflow/README.md"
        )
    return words + (["--forceall"] if given.force else [])


def accounting() -> bool:
    """Whether this SLURM cluster keeps a job history; without one jobs are followed in the queue."""
    try:
        words = ["sacct", "--noheader", "-S", "now"]
        return subprocess.run(words, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def announce(table: Table, request: Request, pending: list[str]) -> None:
    """Say how many notebooks run and about how long that takes; their own lines count against it."""
    known = [expected_seconds(ROOT, request.run, nb) for nb in pending]
    total, unknown = sum(filter(None, known)), known.count(None)
    about = (
        f", about {duration(total / min(cores(), len(pending)))} on {cores()} cores by the times of earlier runs"
        if total
        else ""
    )
    more = f", {unknown} of them for the first time" if total and unknown else ""
    print(f"{len(pending)} of {len(request.notebooks)} notebooks to run{about}{more}", flush=True)
    started = logs(ROOT, request.run) / "started"
    started.unlink(missing_ok=True)
    os.environ["COMPANION_PENDING"] = str(len(pending))


def run(table: Table, request: Request, given: argparse.Namespace, lock: IO[str]) -> int:
    """Run what Snakemake decides; its own messages go to a log file, the notebooks' lines to the terminal."""
    log, killed = logs(ROOT, request.run) / "snakemake.log", logs(ROOT, request.run) / "running"
    words = snakemake(table, request, given)
    if given.executor in ("slurm", "kubernetes"):
        print(
            f"jobs go to {given.executor}; the scheduler's messages are in {log.relative_to(ROOT)}",
            flush=True,
        )
    if killed.exists():  # the last run could not take Snakemake's lock away
        call([*words, "--unlock"], log, lock)
    killed.touch()
    try:
        return call(words, log, lock)
    finally:
        killed.unlink(missing_ok=True)


def call(words: list[str], log: Path, lock: IO[str]) -> int:
    """Run a program with its messages appended to ``log``; an interruption is passed on to all it started, and awaited."""
    with open(log, "a", encoding="utf-8") as messages:
        messages.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")
        messages.flush()
        # A session of its own, so that Ctrl-C and SIGTERM take the same way. The lock of alone() is inherited: should this
        # process be killed outright, the folder stays taken until the scheduler has ended too.
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stderr=messages,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=False,
        )
        lock.write(f"{process.pid} ")
        lock.flush()
        try:
            return process.wait()
        except KeyboardInterrupt:
            _stop(process)
            raise


def _stop(process: subprocess.Popen) -> None:
    """Interrupt a session and wait; a second interruption, or a minute, ends it at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ------------------------------------------------------------------ afterwards


def build_gallery(request: Request, lock: IO[str]) -> int:
    """Tables and figures/index.html from whatever has run, if anything has changed since they were built."""
    if not (ROOT / "workflow" / "pages" / "gallery.py").is_file():
        print("no gallery: workflow/pages/gallery.py does not exist")
        return 0
    index = ROOT / "figures" / "index.html"
    if gallery_is_current(index):
        return 0
    log, begin = logs(ROOT, request.run) / "gallery.log", time.time()
    done = call([sys.executable, "-m", "workflow.pages.gallery"], log, lock)
    if done:
        print(f"FAILED  gallery; see {log.relative_to(ROOT)}")
    else:  # it shows what there was when it began
        os.utime(index, (begin, begin))
    return done


def gallery_is_current(index: Path) -> bool:
    """Whether the index is younger than every result, notebook and piece of code that it is made of, and than the folders that
    these lie in: one that lost a file has changed, too."""
    if not index.is_file():
        return False
    made_of = (
        "results/*",
        "results/*/*",
        "results/*/*/*",
        "notebooks",
        "notebooks/*",
        "workflow/**/*",
        "lib",
        "lib/**/*",
    )
    built = index.stat().st_mtime_ns
    files = (path for pattern in made_of for path in ROOT.glob(pattern))
    return all(
        path.stat().st_mtime_ns < built
        for path in files
        if "__pycache__" not in path.parts and path.relative_to(ROOT).parts[:2] != ("results", "logs")
    )


def refresh(executed: list[str]) -> int:
    """Write the outputs of executed notebooks back into notebooks/, in the form in which git keeps them."""
    if not executed:
        return 0
    words = [sys.executable, "-m", "workflow.pages.normalise", "--from", *executed]
    return subprocess.run(words, cwd=ROOT).returncode


def main(words: list[str]) -> int:
    given, begin, table = arguments(words), time.time(), load(ROOT)
    request = request_of(given, table)
    if given.command == "refresh" and (given.profile != "cpu" or request.parameters):
        raise CompanionError(
            "refresh keeps the outputs of the plain cpu profile; it takes no other profile or parameters"
        )
    if given.list or given.dry_run:
        why = reasons(ROOT, table, request, given.force)
        print_list(table, request.run, why) if given.list else print_plan(why)
        return 0

    discard(ROOT, table, request)
    with alone(ROOT, request.run) as lock:
        check_idle(ROOT, request)
        pending = [name for name, why in reasons(ROOT, table, request, given.force).items() if why]
        announce(table, request, pending)
        try:
            status = run(table, request, given, lock) if pending else 0
        except KeyboardInterrupt:
            status = 130
        results = {nb: result(ROOT, table, request, nb, begin, status == 130) for nb in request.notebooks}
        messages = logs(ROOT, request.run).relative_to(ROOT)
        print_summary(results, str(messages))
        if status == 130:
            return status
        if status and all(one.status != "failed" for one in results.values()):
            print(f"the scheduler ended with status {status}; see {messages}/snakemake.log")
        if given.command == "refresh":
            status = refresh([one.path for one in results.values() if one.good]) or status
        gallery = build_gallery(request, lock)
    return 1 if status or gallery or not all(one.good for one in results.values()) else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    # A shell starts a job in the background with interruptions ignored, which children inherit: undone here for all of them.
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except CompanionError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
