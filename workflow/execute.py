"""Run one notebook with papermill: ``python -m workflow.execute 20_dm --request {"profile":"cpu"} --record FILE``.

It writes into a folder of its own, which takes the place of the old results in one step when everything is there. A notebook that
failed leaves these as they were, and itself, as far as it came, as ``executed.failed.ipynb`` beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lib.system.errors import CompanionError
from lib.system.files import ROOT, write_text
from workflow.machine import one_gpu
from workflow.state import (
    EXECUTED,
    FAILED,
    expected_seconds,
    file_name,
    fingerprint,
    folder,
    logs,
    records,
    source,
)
from workflow.summary import duration
from workflow.table import Request, Table, load, request_from

START_TIMEOUT = 120  # seconds for the kernel; a busy machine has been seen to need more than a minute


def environment(root: Path, work: Path, run: str, threads: int) -> dict[str, str]:
    """Variables for the kernel."""
    return {
        "COMPANION_RUN": run,
        "COMPANION_OUT": str(work),
        "COMPANION_BARS": "0",
        "OMP_NUM_THREADS": str(threads),
        # glibc: keep freed blocks up to 1 GiB in the process instead of mapping them afresh each time
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


@contextlib.contextmanager
def workplace(root: Path, run: str, name: str, reads: tuple[str, ...]) -> Iterator[Path]:
    """An empty folder to write into, laid out as the project and with the results that may be read linked; gone afterwards."""
    work = logs(root, run) / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    folder(work, run, name).mkdir(parents=True)
    for other in reads:
        if folder(root, run, other).is_dir():
            folder(work, run, other).symlink_to(folder(root, run, other), target_is_directory=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_papermill(root: Path, name: str, parameters: dict, target: Path) -> None:
    """Execute into ``target``; raises what the failing cell raised as ``PapermillExecutionError``."""
    # jsonschema's check of URI formats, which notebooks do not have, costs a second at import
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill

    papermill.execute_notebook(
        str(source(root, name)),
        str(target),
        parameters=parameters,
        cwd=str(root / "notebooks"),
        kernel_name="python3",
        progress_bar=False,
        start_timeout=START_TIMEOUT,
    )


def put_in_place(work: Path, root: Path, run: str, name: str) -> None:
    """Let the new results and figures take the place of the old ones; no signal comes between."""
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        for kind in ("results", "figures"):
            new, place, old = (base / kind / run / name for base in (work, root, work / "old"))
            old.parent.mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                shutil.move(place, old)
            if new.exists():
                shutil.move(new, place)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)


def first_line(error: BaseException) -> str:
    """What happened, in one line."""
    if hasattr(error, "ename"):
        lines = str(error.evalue).strip().splitlines() or [""]
        return f"{error.ename}: {lines[0]}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def execute(root: Path, table: Table, request: Request, name: str, threads: int) -> dict:
    """Run the notebook and return its record (see :func:`workflow.state.records`)."""
    made_from = fingerprint(root, table, request, name)
    row, run = table.notebooks[name], request.run
    wants_gpu = row.resources[request.profile]["gpu"]
    begin, status, error = time.perf_counter(), "ok", ""
    with workplace(root, run, name, row.reads) as work:
        fresh = folder(work, run, name)
        os.environ.update(environment(root, work, run, threads))
        try:
            with one_gpu() if wants_gpu else contextlib.nullcontext({}) as chosen:
                os.environ.update(chosen)
                run_papermill(root, name, made_from["parameters"], fresh / EXECUTED)
            absent = [output for output in table.outputs if not (fresh / output).is_file()]
            if absent:
                raise CompanionError(f"the notebook ended without writing {', '.join(absent)}")
            put_in_place(work, root, run, name)
        except KeyboardInterrupt:
            status, error = "interrupted", "interrupted"
        except Exception as failure:  # whatever the notebook did, its record must be written
            status, error = "failed", first_line(failure)
            folder(root, run, name).mkdir(parents=True, exist_ok=True)
            if (fresh / EXECUTED).is_file():
                shutil.move(fresh / EXECUTED, folder(root, run, name) / FAILED)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "status": status,
        "seconds": round(time.perf_counter() - begin, 1),
        # of the largest child that has ended, which is the kernel
        "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6),
        "error": error,
        "ended": time.time(),
        "made_from": made_from,
    }


def remember(root: Path, run: str, name: str, record: dict, wanted: Path) -> None:
    """Write the record under its own name, in place of the earlier ones, and under the name that the scheduler waits for,
    which is another one when tables that the notebook reads were made in the same run."""
    text = json.dumps(record) + "\n"
    if record["status"] == "ok":
        for path, _ in records(root, run, name):
            path.unlink(missing_ok=True)
        write_text(logs(root, run) / "made" / file_name(name, record["made_from"]), text)
    write_text(wanted, text)


def opening(root: Path, run: str, name: str) -> str:
    """``[3/40] 18_krr ... about 40 s``: the how-manieth of those that run, and what it took the last time."""
    started = logs(root, run) / "started"
    started.parent.mkdir(parents=True, exist_ok=True)
    with open(started, "a+", encoding="utf-8") as file:  # appended in one piece, by several processes
        file.write(f"{name}\n")
        file.flush()
        file.seek(0)
        place = file.read().split().index(name) + 1
    of, seconds = os.environ.get("COMPANION_PENDING", ""), expected_seconds(root, run, name)
    return f"[{place}{f'/{of}' if of else ''}] {name} ..." + (
        f" about {duration(seconds)}" if seconds else ""
    )


def main(words: list[str] | None = None) -> int:
    """1 after an interruption; a notebook that failed has its record and stops nobody."""
    parser = argparse.ArgumentParser(prog="python -m workflow.execute", allow_abbrev=False)
    parser.add_argument("notebook")
    parser.add_argument("--request", required=True, help="the request as JSON")
    parser.add_argument("--record", required=True, type=Path, help="file for how it ended")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    table = load(ROOT)
    request = request_from(json.loads(given.request), table)
    print(opening(ROOT, request.run, given.notebook), flush=True)
    done = execute(ROOT, table, request, given.notebook, given.threads)
    print(
        f"{done['status']:>11}  {given.notebook}  {done['seconds']} s  {done['error']}".rstrip(), flush=True
    )
    if done["status"] == "interrupted":
        return 1
    remember(ROOT, request.run, given.notebook, done, given.record)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompanionError as error:
        sys.exit(f"error: {error}")
