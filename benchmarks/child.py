"""One candidate in a process of its own: its time, page faults and peak memory as a line of JSON on standard output."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import torch

from benchmarks.feature_spots import FEATURE_SPOTS
from benchmarks.formation_spots import FORMATION_SPOTS
from benchmarks.generator_spots import GENERATOR_SPOTS
from benchmarks.harness import cost
from benchmarks.hot_spots import HOT_SPOTS, SIZES
from benchmarks.kernel_spots import KERNEL_SPOTS
from benchmarks.sampler_spots import SAMPLER_SPOTS
from benchmarks.select_spots import SELECT_SPOTS
from benchmarks.unroll_spots import UNROLL_SPOTS
from lib.system.allocator import keep_large_blocks
from lib.system.files import ROOT

ALLOCATORS = ("default", "tuned")
SPOTS = {
    **HOT_SPOTS, **FEATURE_SPOTS, **FORMATION_SPOTS, **KERNEL_SPOTS, **SELECT_SPOTS, **UNROLL_SPOTS, **SAMPLER_SPOTS,
    **GENERATOR_SPOTS,
}  # fmt: skip


def in_process(
    hot_spot: str,
    candidate: int,
    allocator: str,
    size: str,
    changes: dict[str, int],
    repeats: int,
    threads: int,
) -> dict:
    """:func:`benchmarks.harness.cost` of candidate number ``candidate`` in a new Python process on the CPU."""
    arguments = [hot_spot, str(candidate), allocator, size, json.dumps(changes), str(repeats), str(threads)]
    command = [sys.executable, "-m", "benchmarks.child", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child", description=__doc__)
    for name in ("hot_spot", "candidate", "allocator", "size", "changes", "repeats", "threads"):
        parser.add_argument(name)
    given = parser.parse_args()
    torch.set_num_threads(int(given.threads))
    if given.allocator == "tuned":
        keep_large_blocks()
    hot_spot = SPOTS[given.hot_spot](replace(SIZES[given.size], **json.loads(given.changes)))
    name = list(hot_spot.candidates)[int(given.candidate)]
    print(json.dumps({"candidate": name, "unit": hot_spot.unit, **cost(hot_spot, name, int(given.repeats))}))


if __name__ == "__main__":
    main()
