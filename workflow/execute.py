"""Run one notebook with papermill: ``python -m workflow.execute 20_dm --request {"profile":"cpu"}``.

Both engines run notebooks through this program. A finished notebook becomes ``executed.ipynb`` in one step; one that
failed stays as far as it came under ``executed.failed.ipynb``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lib.system.errors import CompanionError
from lib.system.files import ROOT, write_text
from workflow.machine import gpus
from workflow.state import EXECUTED, FAILED, fingerprint, folder, record_file, source
from workflow.table import Request, Table, load, request_from

START_TIMEOUT = 120  # seconds for the kernel; a busy machine has been seen to need more than a minute


def environment(root: Path, run: str, threads: int) -> dict[str, str]:
    """Variables for the kernel."""
    return {
        "COMPANION_RUN": run,
        "COMPANION_OUT": str(root),
        "COMPANION_BARS": "0",
        "OMP_NUM_THREADS": str(threads),
        # glibc: keep freed blocks up to 1 GiB in the process instead of mapping them afresh each time
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


@contextlib.contextmanager
def one_gpu(root: Path) -> Iterator[dict[str, str]]:
    """Hold a GPU that no other notebook of this project holds; waits for one. Without any GPU nothing is held."""
    import fcntl

    names = gpus()
    if not names:
        yield {}
        return
    locks = root / "results" / "logs"
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        for name in names:
            with open(locks / f"gpu-{name}.lock", "w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": name}
                return
        time.sleep(2)


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


def finish(results: Path, outputs: tuple[str, ...], made_from: dict) -> None:
    """Turn the working copy into the finished notebook, with what it was made from inside."""
    absent = [output for output in outputs if output != EXECUTED and not (results / output).is_file()]
    if absent:
        raise CompanionError(f"the notebook ended without writing {', '.join(absent)}")
    content = json.loads((results / FAILED).read_text(encoding="utf-8"))
    content["metadata"]["companion"] = {"fingerprint": made_from}
    write_text(results / EXECUTED, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (results / FAILED).unlink()


def first_line(error: BaseException) -> str:
    """What happened, in one line."""
    if hasattr(error, "ename"):
        lines = str(error.evalue).strip().splitlines() or [""]
        return f"{error.ename}: {lines[0]}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def execute(root: Path, table: Table, request: Request, name: str, threads: int) -> dict:
    """Run the notebook and return its record (also stored, see :func:`workflow.state.record_file`)."""
    results, record = folder(root, request.run, name), record_file(root, request.run, name)
    made_from = fingerprint(root, table, request, name)
    for output in (*table.outputs, FAILED):
        (results / output).unlink(missing_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    os.environ.update(environment(root, request.run, threads))
    wants_gpu = table.notebooks[name].resources[request.profile]["gpu"]

    begin, status, error = time.perf_counter(), "ok", ""
    try:
        with one_gpu(root) if wants_gpu else contextlib.nullcontext({}) as chosen:
            os.environ.update(chosen)
            run_papermill(root, name, made_from["parameters"], results / FAILED)
            finish(results, table.outputs, made_from)
    except KeyboardInterrupt:
        status, error = "interrupted", "interrupted"
    except Exception as failure:  # whatever the notebook did, its record must be written
        status, error = "failed", first_line(failure)
    unit = 1 if sys.platform == "darwin" else 1024
    done = {
        "status": status,
        "seconds": round(time.perf_counter() - begin, 1),
        # of the largest child that has ended, which is the kernel
        "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6),
        "error": error,
        "ended": time.time(),
    }
    write_text(record, json.dumps(done) + "\n")
    return done


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workflow.execute", allow_abbrev=False)
    parser.add_argument("notebook")
    parser.add_argument("--request", required=True, help="the request as JSON")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    table = load(ROOT)
    request = request_from(json.loads(given.request), table)
    done = execute(ROOT, table, request, given.notebook, given.threads)
    print(f"{done['status']:>8}  {given.notebook}  {done['seconds']} s  {done['error']}".rstrip(), flush=True)
    return 0 if done["status"] == "ok" else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompanionError as error:
        sys.exit(f"error: {error}")
