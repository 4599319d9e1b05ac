"""What this machine offers to local runs; ``python -m workflow.machine PROGRAM ...`` runs a program with a GPU of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from lib.system.files import ROOT


def cores() -> int:
    """Cores this process may use (fewer than the machine has inside a container or under taskset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_mb() -> int:
    """Memory that is free now, in MB; notebooks run side by side only as far as their ``mem_mb`` fit."""
    import psutil

    return int(psutil.virtual_memory().available / 1e6)


def gpus() -> list[str]:
    """The GPUs this process may use, as words for ``CUDA_VISIBLE_DEVICES``."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


@contextlib.contextmanager
def one_gpu() -> Iterator[dict[str, str]]:
    """Hold a GPU that no other process of this project holds; waits for one. Nothing is held where there is none, or where SLURM
    has given the job its own."""
    names = [] if "SLURM_JOB_ID" in os.environ else gpus()
    locks = ROOT / "results" / "logs"
    locks.mkdir(parents=True, exist_ok=True)
    while names:
        for name in names:
            with open(locks / f"gpu-{os.uname().nodename}-{name}.lock", "w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": name}
                return
        time.sleep(2)
    yield {}


if __name__ == "__main__":
    with one_gpu() as chosen:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | chosen).returncode)
