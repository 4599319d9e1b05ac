"""The commands ``run`` and ``refresh`` of run_all.sh: check the request, run what is out of date, say what came of it."""

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
from collections.abc import Iterator
from pathlib import Path

from lib.system.errors import CompanionError, unknown
from lib.system.files import ROOT, write_text
from workflow.machine import cores, memory_mb
from workflow.state import plan, stale
from workflow.summary import print_list, print_plan, print_summary, results_of
from workflow.table import Request, Table, check_parameters, load, parameters_of, request_from, select

EXECUTORS = ("local", "gpu", "slurm", "kubernetes")
ENGINES = ("snakemake", "papermill")
SHORTCUTS = ("dataset", "ipc", "seed")


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str):
        raise CompanionError(message)


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
    parser.add_argument("--engine", default="snakemake")
    for switch in ("--force", "--dry-run", "--list"):
        parser.add_argument(switch, action="store_true")
    return parser.parse_args(words)


def whole(option: str, text: str, least: int) -> int:
    """A whole number >= ``least`` from the command line."""
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise CompanionError(f"{option} must be a whole number >= {least}, not {text!r}")
    return int(text)


def request_of(given: argparse.Namespace, table: Table) -> Request:
    """The request meant by the command line, every name and value checked.

    Raises:
        CompanionError: for the first one that is wrong.
    """
    for kind, value, allowed in (("executor", given.executor, EXECUTORS), ("engine", given.engine, ENGINES)):
        if value not in allowed:
            raise unknown(kind, value, allowed)
    if given.engine == "papermill" and given.executor in ("slurm", "kubernetes"):
        raise CompanionError(
            f"--engine papermill runs on this machine only, not by --executor {given.executor}"
        )
    if given.cores is not None:
        given.cores = whole("--cores", given.cores, 1)
    if given.ipc is not None:
        whole("--ipc", given.ipc, 1)
    if given.seed is not None:
        whole("--seed", given.seed, 0)
    chosen = select(table, given.only)
    request_from({"profile": given.profile}, table)
    pairs = [(name, getattr(given, name)) for name in SHORTCUTS if getattr(given, name) is not None]
    for text in given.p:
        name, equals, value = text.partition("=")
        if not equals:
            raise CompanionError(f"-p takes NAME=VALUE, not {text!r}")
        pairs.append((name, value))
    known = {name: parameters_of(ROOT / "notebooks" / f"{name}.ipynb") for name in chosen}
    parameters = check_parameters(pairs, known, strict=given.only is not None)
    if given.dataset is not None:
        import lib.data

        lib.data.check(given.dataset)
    for name in parameters:
        without = [nb for nb in chosen if name not in known[nb]]
        if without:
            print(f"note: {', '.join(without)} has no parameter {name!r} and runs without it")
    return Request(given.profile, chosen, parameters)


# ------------------------------------------------------------------ engines


def snakemake_words(request: Request, given: argparse.Namespace, todo: list[str], config: Path) -> list[str]:
    """The call of Snakemake that runs ``todo`` and what depends on it."""
    folder = ROOT / "workflow"
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
        words += ["--cores", str(given.cores or cores()), "--quiet", "host", "progress"]
        if given.executor == "local":
            words += ["--resources", f"mem_mb={memory_mb()}", "gpu=1"]
    else:
        words += ["--jobs", str(given.cores)] if given.cores else []
    if given.executor == "slurm" and not accounting():
        words += ["--slurm-status-command", "squeue"]
    if given.executor == "kubernetes" and not importlib.util.find_spec(
        "snakemake_executor_plugin_kubernetes"
    ):
        raise CompanionError(
            "--executor kubernetes needs its plugin and some preparation, see workflow/README.md"
        )
    # Results of the other engine and of a deleted .snakemake folder are judged by what is stored in them.
    return words + ["--forcerun", *(f"results/{request.run}/{name}/executed.ipynb" for name in todo)]


def accounting() -> bool:
    """Whether this SLURM cluster keeps a job history; without one jobs are followed in the queue."""
    try:
        return (
            subprocess.run(["sacct", "--noheader", "-S", "now"], capture_output=True, timeout=30).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def by_snakemake(request: Request, table: Table, given: argparse.Namespace) -> int:
    """Run under Snakemake; its own messages go to a log file, the notebooks' lines to the terminal."""
    logs = ROOT / "results" / "logs" / request.run
    reasons = plan(ROOT, table, request, given.force)
    if not stale(reasons):
        return 0
    config = logs / "request.json"
    write_text(config, json.dumps(request.config()))
    if given.executor in ("slurm", "kubernetes"):
        print(
            f"jobs go to {given.executor}; the scheduler's messages are in {logs.relative_to(ROOT)}/snakemake.log",
            flush=True,
        )
    status = call(snakemake_words(request, given, stale(reasons), config), logs / "snakemake.log")

    # What reads tables takes those that exist when another notebook failed.
    ended = results_of(ROOT, table, request, since=given.begin)
    failed = [name for name, result in ended.items() if result.status == "failed"]
    waiting = [name for name in stale(reasons) if ended[name].status == "not run"]
    waiting = [name for name in waiting if set(failed) & set(table.notebooks[name].reads)]
    if waiting:
        rest = Request(request.profile, tuple(waiting), request.parameters)
        write_text(config, json.dumps(rest.config()))
        call(snakemake_words(rest, given, waiting, config), logs / "snakemake.log")
    return status


def call(words: list[str], log: Path) -> int:
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


def by_papermill(request: Request, table: Table, given: argparse.Namespace) -> int:
    """Run one notebook after another, judging each when its turn comes."""
    status = 0
    for name in request.notebooks:
        if not plan(ROOT, table, Request(request.profile, (name,), request.parameters), given.force)[name]:
            continue
        threads = table.notebooks[name].resources[request.profile]["cpus"]
        one = json.dumps({**request.config(), "notebooks": [name]})
        words = [sys.executable, "-m", "workflow.execute", name, "--request", one, "--threads", str(threads)]
        status = call(words, ROOT / "results" / "logs" / request.run / f"{name}.log") or status
    return status


@contextlib.contextmanager
def alone(request: Request) -> Iterator[None]:
    """One run per results folder at a time; the lock goes with the process, however that ends."""
    import fcntl

    path = ROOT / "results" / "logs" / request.run / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise CompanionError(f"cannot write to {path.parent}: {error.strerror}") from error
    with file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompanionError(f"another run into results/{request.run} is going on") from None
        yield


def build_gallery(request: Request) -> int:
    """Tables and figures/index.html from whatever has run."""
    if not (ROOT / "lib" / "companion" / "gallery.py").is_file():
        print("no gallery: workflow/pages/gallery.py does not exist")
        return 0
    log = ROOT / "results" / "logs" / request.run / "gallery.log"
    done = call([sys.executable, "-m", "workflow.pages.gallery"], log)
    if done:
        print(f"FAILED  gallery; see {log.relative_to(ROOT)}")
    return done


def refresh(executed: list[str]) -> int:
    """Write the outputs of executed notebooks back into notebooks/, in the form in which git keeps them."""
    if not executed:
        return 0
    return subprocess.run(
        [sys.executable, "-m", "workflow.pages.normalise", "--from", *executed], cwd=ROOT
    ).returncode


def main(words: list[str]) -> int:
    given = arguments(words)
    given.begin = time.time()
    table = load(ROOT)
    request = request_of(given, table)
    if given.command == "refresh" and (given.profile != "cpu" or request.parameters):
        raise CompanionError(
            "refresh keeps the outputs of the plain cpu profile; it takes no other profile or parameters"
        )
    if given.list:
        print_list(ROOT, table, request)
        return 0
    if given.dry_run:
        print_plan(plan(ROOT, table, request, given.force))
        return 0

    with alone(request):
        interrupted, engine = False, by_papermill if given.engine == "papermill" else by_snakemake
        try:
            status = engine(request, table, given)
        except KeyboardInterrupt:
            interrupted, status = True, 130
        results = results_of(ROOT, table, request, since=given.begin)
        print_summary(results, ROOT / "results" / "logs" / request.run, status)
        if interrupted:
            return 130
        if given.command == "refresh":
            status = refresh([result.path for result in results.values() if result.good]) or status
        gallery = build_gallery(request)
    return 1 if status or gallery or not all(result.good for result in results.values()) else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        sys.exit(main(sys.argv[1:]))
    except CompanionError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
