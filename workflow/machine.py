"""What this machine offers to local runs."""

from __future__ import annotations

import os


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
