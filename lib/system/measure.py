"""Wall seconds and peak memory of a stage."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch


class Meter:
    """``with Meter(device) as meter: ...`` then ``meter.seconds`` and ``meter.peak_bytes``.

    Memory is the device's peak allocation on CUDA. On a CPU it is the peak resident size of the process *above what it was at
    the start of the stage*; where the kernel does not let a process reset its high-water mark, the growth of the overall mark
    (a lower bound).
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.seconds = 0.0
        self.peak_bytes = 0
        self._seen = 0

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
        else:
            _reset_high_water_mark()
            self._base = high_water_mark()
            _active.append(self)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = max(self._seen, high_water_mark())
            _active.remove(self)
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = max(0, peak - self._base)


def high_water_mark() -> int:
    """Peak resident size of this process in bytes (since the last reset, on Linux)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_peak() -> int:
    """Peak resident size of this process in bytes, whatever stages were measured in between."""
    return max(_before_resets, high_water_mark())


_active: list[Meter] = []
_before_resets = 0


def _reset_high_water_mark() -> None:
    """Begin a new mark; what the old one said is kept for the process and for the stages that this one lies in."""
    global _before_resets
    mark = high_water_mark()
    _before_resets = max(_before_resets, mark)
    for meter in _active:
        meter._seen = max(meter._seen, mark)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
