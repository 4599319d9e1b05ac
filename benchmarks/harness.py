"""Timing of several ways to compute the same thing: values first, then round-robin, medians and ratios."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lib.system.errors import CompanionError
from lib.system.measure import Meter

REFERENCE = "reference"


@dataclass(frozen=True)
class HotSpot:
    """One computation in several candidates, the first of which is the plain reference.

    Attributes:
        unit, units: what a time is given for, and how many of them a call does.
        candidates: name -> call without arguments.
        check: relative difference of every candidate's values from the reference's, on the same random numbers.
        tolerance: candidate -> largest difference that counts as equal; a lower precision has its own.
        most: timed repeats at most, where the reference takes minutes; a single one has no warm-up.
    """

    name: str
    unit: str
    units: int
    candidates: dict[str, Callable[[], object]]
    check: Callable[[], dict[str, float]]
    tolerance: dict[str, float]
    most: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; times are medians."""

    hot_spot: str
    size: str
    ipc: int
    candidate: str
    unit: str
    milliseconds: float
    ratio: float  # the reference's time by this one
    target: float | None
    difference: float
    peak_mib: float | None  # CUDA only


def assert_equal(hot_spot: HotSpot) -> dict[str, float]:
    """The differences of :attr:`HotSpot.check`.

    Raises:
        CompanionError: a candidate's values are not the reference's.
    """
    differences = hot_spot.check()
    for name, difference in differences.items():
        if not difference <= hot_spot.tolerance[name]:
            raise CompanionError(
                f"{hot_spot.name}, {name}: differs from the reference by {difference:.2g}, "
                f"allowed {hot_spot.tolerance[name]:.2g}"
            )
    return {REFERENCE: 0.0} | differences


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference, relative to the reference's norm."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call; by events on a GPU, so that the queue is empty before and after."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def medians(hot_spot: HotSpot, repeats: int, device: torch.device, warm_up: int = 1) -> dict[str, float]:
    """Seconds per unit of every candidate; the candidates take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in hot_spot.candidates}
    for repeat in range(warm_up + repeats):
        for name, call in hot_spot.candidates.items():
            elapsed = seconds(call, device)
            if repeat >= warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) / hot_spot.units for name, values in times.items()}


def measure(
    hot_spot: HotSpot,
    size: str,
    ipc: int,
    repeats: int,
    device: torch.device,
    targets: dict[str, float],
    warm_up: int = 1,
) -> list[Row]:
    """Check, then time; one row per candidate."""
    differences = assert_equal(hot_spot)
    repeats, warm_up = min(repeats, hot_spot.most or repeats), 0 if hot_spot.most == 1 else warm_up
    times = medians(hot_spot, repeats, device, warm_up)
    rows = []
    for name, call in hot_spot.candidates.items():
        peak = _peak(call, device).peak_bytes / 2**20 if device.type == "cuda" else None
        ratio = times[REFERENCE] / times[name]
        rows.append(
            Row(hot_spot.name, size, ipc, name, hot_spot.unit, 1000 * times[name], ratio, targets.get(name),
                differences[name], peak)
        )  # fmt: skip
    return rows


def _peak(call: Callable[[], object], device: torch.device) -> Meter:
    with Meter(device) as meter:
        call()
    return meter


def cost(hot_spot: HotSpot, candidate: str, repeats: int) -> dict[str, float]:
    """Time, page faults and peak memory of one candidate that has a CPU process to itself."""
    call, device = hot_spot.candidates[candidate], torch.device("cpu")
    meter = _peak(call, device)  # the first call; memory above what the process held before
    faults, times = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(min(repeats, hot_spot.most or repeats)):
        times.append(seconds(call, device))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {
        "milliseconds": 1000 * statistics.median(times) / hot_spot.units,
        "page_faults": faults / len(times) / hot_spot.units,
        "peak_mib": meter.peak_bytes / 2**20,
    }
