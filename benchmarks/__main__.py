"""Time the library's hot spots against plain per-class and per-network loops, and write the table.

    python -m benchmarks                                   # everything, on the GPU if there is one
    python -m benchmarks --sizes S --only dm,dsa --quick   # a look
    python -m benchmarks --device cuda --sizes L --real-batch 256 --ipc 1,10,50

Sizes: S is 3x8x8, ConvNet depth 2 width 32; L is 3x32x32, depth 3 width 128 (CIFAR); 10 classes, 64 real images per class.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import child, report
from benchmarks.child import SPOTS
from benchmarks.feature_spots import FEATURE_SPOTS
from benchmarks.harness import REFERENCE, Row, measure
from benchmarks.hot_spots import SIZES, Setting
from benchmarks.kernel_spots import KERNEL_SPOTS
from benchmarks.sampler_spots import SAMPLER_SPOTS
from benchmarks.select_spots import SELECT_SPOTS
from lib.system.allocator import keep_large_blocks
from lib.system.device import resolve_device
from lib.system.errors import CompanionError, unknown
from lib.system.files import ROOT

# the hot spots whose memory and page faults are measured, at size L
MEMORY = (
    "dm",
    "evaluation",
    "krr-search",
    "datadam",
    "ddm",
    "cafe",
    "idm",
    "kip-fc",
    "kip-conv-grad",
    "mtt-recompute",
    "dd-recompute",
    "sampling",
    "inversion",
    "itgan",
    "latents",
)
ONCE = {
    "test",
    "rcig",
    "experts",
    *KERNEL_SPOTS,
    *SELECT_SPOTS,
    *SAMPLER_SPOTS,
}  # do not depend on the IPC asked for
ONLY_AT = {"krr-digits": "S", "rcig": "S", "experts": "S"}
FAMILY = list(FEATURE_SPOTS)  # of DM
# hot spot -> ratio to reach in float32 and, where the real side may be bfloat16, with that
TARGETS = {
    "S": {"dm": (2.5,), "dc": (1.8,), "dsa": (1.8,), "idc": (1.8,), "evaluation": (1.8,), "siamese": (6.0,), "test": (1.5,),
          "krr-search": (2.0,), "mtt": (2.5,), "dd": (1.5,), "rcig": (30.0,), "experts": (1.5,),
          "kip-fc": (2.0, 2.5), "kip-conv": (3.0,), "kip-conv-grad": (3.0,), **dict.fromkeys(FAMILY, (2.5,))},
    "L": {"dm": (1.15, 1.5), "dc": (1.05, 1.4), "dsa": (1.05, 1.4), "idc": (1.05, 1.4), "evaluation": (1.1,), "siamese": (1.4,),
          "test": (1.15,), "krr-search": (7.0,),
          "kip-fc": (1.4, 2.5), "kip-conv": (2.0,), "kip-conv-grad": (2.0,), **dict.fromkeys(FAMILY, (1.15, 1.5))},
    "cuda": {"dm": (3.0, 3.0), "dc": (2.0, 2.0), "dsa": (2.0, 2.0), "idc": (2.0, 2.0), "evaluation": (8.0,), "siamese": (5.0,),
             "test": (2.0,)},
}  # fmt: skip


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="S,L", help="S, L or both (default)")
    parser.add_argument("--only", default=",".join(SPOTS), help=f"of {','.join(SPOTS)}")
    parser.add_argument("--repeats", type=int, help="per candidate; default 30 at S and on a GPU, 5 at L")
    parser.add_argument("--quick", action="store_true", help="3 repeats, no separate processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--allocator", default="tuned", choices=child.ALLOCATORS, help="of this process")
    parser.add_argument("--real-batch", type=int, default=64, help="real images per class (default 64)")
    parser.add_argument("--ipc", default="10", help="synthetic images per class, one or several: 1,10,50")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results; default benchmarks/ for a full run, nothing is written for a part",
    )
    return parser.parse_args(words)


def listed(kind: str, text: str, allowed: Sequence[str]) -> list[str]:
    """The words of a comma-separated list, each one of ``allowed``."""
    words = [word for word in text.split(",") if word]
    for word in words:
        if word not in allowed:
            raise unknown(kind, word, allowed)
    if not words:
        raise CompanionError(f"no {kind} given; allowed: {', '.join(allowed)}")
    return words


def counts(kind: str, values: Sequence[object]) -> list[int]:
    """Whole numbers of at least 1."""
    for value in values:
        if not str(value).isdigit() or int(str(value)) < 1:
            raise CompanionError(f"{kind} must be a whole number of at least 1, not {value!r}")
    if not values:
        raise CompanionError(f"no {kind} given: whole numbers of at least 1")
    return [int(str(value)) for value in values]


def limit_half_precision() -> str:
    """Some virtual machines report the tile unit AMX but stop a program that uses it: then keep oneDNN away from it.

    To be called before the first operation, because oneDNN reads its limit once. Returns a note for the table.
    """
    product = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"
    if subprocess.run([sys.executable, "-c", product], capture_output=True).returncode >= 0:
        return ""
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    return "bfloat16 without AMX, which this machine reports and refuses; such a processor is then slower in bfloat16"


def timings(
    settings: dict[str, Setting],
    chosen: list[str],
    ipcs: list[int],
    repeats: dict[str, int],
    console: Console,
) -> list[Row]:
    rows = []
    for size, setting in settings.items():
        goals = TARGETS["cuda" if setting.device.type == "cuda" else size]
        for name in chosen:
            if ONLY_AT.get(name, size) != size:
                continue
            for ipc in ipcs[:1] if name in ONCE else ipcs:
                console.print(f"{name}, size {size}, IPC {ipc} ...", style="dim")
                hot_spot = SPOTS[name](replace(setting, ipc=ipc))
                fast = [candidate for candidate in hot_spot.candidates if candidate != REFERENCE]
                targets = dict(zip(fast, goals.get(name, ()), strict=False))
                rows += measure(hot_spot, size, ipc, repeats[size], setting.device, targets, setting.warm_up)
    return rows


def costs(chosen: list[str], setting: Setting, ipc: int, repeats: int, console: Console) -> list[dict]:
    """Memory, page faults and time of every candidate with either allocator setting, at size L on the CPU."""
    found = []
    changes = {"ipc": ipc, "real": setting.real}
    for name in (name for name in MEMORY if name in chosen):
        hot_spot = SPOTS[name](replace(setting, ipc=ipc))
        for k in range(len(hot_spot.candidates)):
            for allocator in child.ALLOCATORS:
                console.print(f"{name}, candidate {k}, allocator {allocator} ...", style="dim")
                values = child.in_process(name, k, allocator, "L", changes, repeats, torch.get_num_threads())
                found.append({"hot_spot": hot_spot.name, "size": "L", "allocator": allocator, **values})
    return found


def main(words: Sequence[str] | None = None, console: Console | None = None) -> report.Results:
    given, console = arguments(words), console or report.terminal()
    sizes, chosen = listed("size", given.sizes, list(SIZES)), listed("hot spot", given.only, list(SPOTS))
    ipcs = counts("ipc", [word for word in given.ipc.split(",") if word])
    threads, real = counts("threads", [given.threads])[0], counts("real batch", [given.real_batch])[0]
    asked = counts("repeats", [given.repeats])[0] if given.repeats is not None else 3 if given.quick else None
    device = resolve_device(given.device)
    repeats = {size: asked or (30 if size == "S" or device.type == "cuda" else 5) for size in sizes}
    warm_up = 5 if device.type == "cuda" else 1
    settings = {size: replace(SIZES[size], real=real, device=device, warm_up=warm_up) for size in sizes}
    note = limit_half_precision() if device.type == "cpu" and any(s.mixed for s in settings.values()) else ""
    torch.set_num_threads(threads)
    tuned = given.allocator == "tuned" and keep_large_blocks()

    rows = timings(settings, chosen, ipcs, repeats, console)
    separate = []
    if device.type == "cpu" and "L" in sizes and not given.quick:
        separate = costs(chosen, settings["L"], ipcs[0], max(1, repeats["L"] // 2), console)
    shapes = (
        f"10 classes, IPC {given.ipc}, {real} real images per class; sizes as in `python -m benchmarks -h`"
    )
    results = report.Results(
        report.header(device, "tuned" if tuned else "default", shapes, note), rows, separate
    )

    for key, value in results.header.items():
        console.print(f"{key}: {value}", highlight=False)
    report.show("Time", *report.timing_cells(rows), console)
    if separate:
        report.show("Memory and allocator", *report.cost_cells(separate), console)
    whole = len(sizes) == len(SIZES) and len(chosen) == len(SPOTS) and not given.quick
    if given.out or whole:
        folder, stem = given.out or ROOT / "benchmarks", "results" if device.type == "cpu" else "results_cuda"
        report.write(results, folder, stem)
        console.print(f"written: {folder / stem}.md, {folder / stem}.json", highlight=False)
    return results


if __name__ == "__main__":
    try:
        main()
    except CompanionError as error:
        sys.exit(f"error: {error}")
