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
from pathlib import Path

from lib.system.errors import CompanionError
from lib.system.files import ROOT, write_text
from workflow.machine import one_gpu
from workflow.place import put_in_place, workplace
from workflow.state import EXECUTED, FAILED, expected_seconds, fingerprint, folder, logs, source
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


def first_line(error: BaseException) -> str:
    """What happened, in one line."""
    if hasattr(error, "ename"):
        lines = str(error.evalue).strip().splitlines() or [""]
        return f"{error.ename}: {lines[0]}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def execute(root: Path, table: Table, request: Request, name: str, threads: int) -> dict:
    """Run the notebook, put its results and record in place, and return its record (see :func:`workflow.state.records`)."""
    made_from = fingerprint(root, table, request, name)
    row, run = table.notebooks[name], request.run
    wants_gpu = row.resources[request.profile]["gpu"]
    begin = time.perf_counter()

    def record(status: str, error: str = "") -> dict:
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
            done = record("ok")
            put_in_place(work, root, run, name, done)
        except KeyboardInterrupt:
            done = record("interrupted", "interrupted")
        except Exception as failure:  # whatever the notebook did, its record must be written
            done = record("failed", first_line(failure))
            folder(root, run, name).mkdir(parents=True, exist_ok=True)
            if (fresh / EXECUTED).is_file():
                shutil.move(fresh / EXECUTED, folder(root, run, name) / FAILED)
    return done


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


def say(line: str) -> None:
    """A line on the terminal in one piece: several notebooks write there at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


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
    say(opening(ROOT, request.run, given.notebook))
    done = execute(ROOT, table, request, given.notebook, given.threads)
    say(f"{done['status']:>11}  {given.notebook}  {done['seconds']} s  {done['error']}".rstrip())
    if done["status"] == "interrupted":
        return 1
    # the name that the scheduler waits for is another one than the record's own when tables that are read were made in the same run
    write_text(given.record, json.dumps(done) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompanionError as error:
        sys.exit(f"error: {error}")
