"""Kills a distillation at chosen steps, starts it again each time, and compares with a run that nobody disturbed.

``python kill_me.py FOLDER`` writes ``killed.safetensors``, ``calm.safetensors`` and ``log.json`` to a folder for each method.
Every run is a process of its own, forked before any work was done, and ended by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import torch._dynamo  # the first optimiser imports it, and tqdm.auto comes with the first run: once is enough
import tqdm.auto  # noqa: F401
from helpers import toy_data

from lib.distill import distill
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.dsa import DSA

METHODS = {
    "dm": DM(iterations=60, real_batch=8, network="convnet-d2-w4"),
    # 20 networks, 3 matching steps each: a checkpoint at a multiple of 10 falls into the middle of a network's life
    "dc": DC(outer=20, inner=3, epochs=2, real_batch=8, network="convnet-d2-w4", network_batch=4),
    "dsa-batch": DSA(
        outer=20, inner=3, epochs=2, real_batch=8, network="convnet-d2-w4-batch", network_batch=4
    ),
}
KILLS = (4, 13, "writing", 45)


def run(method, checkpoint: Path | None, result: Path, report, until: int | str | None) -> None:
    """The whole distillation; says every step, and waits for its end at the step, or the half written file, of ``until``."""
    torch.set_num_threads(1)

    def say(step: int, *_) -> None:
        report(step)
        if step == until:
            time.sleep(600)

    if until == "writing":
        write, writes = Path.write_bytes, []

        def half(self, data):
            writes.append(1)
            if len(writes) < 2:
                return write(self, data)
            with open(self, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
            report("writing")
            time.sleep(600)

        Path.write_bytes = half
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 0.0, "snapshots": (0, 5, 30, 60)}
    done = distill(method, toy_data().train, 2, 7, **options, callback=say)
    tensors = {"codes": done.synset.codes, "labels": done.synset.labels}
    tensors |= {f"history.{name}": values for name, values in done.history.items()}
    tensors |= {f"snapshot.{step}": images.contiguous() for step, images in done.snapshots.items()}
    safetensors.torch.save_file(tensors, result)


def spawn(*arguments, until=None) -> list:
    """Fork a run; kill it when it reports ``until``. Returns what it reported."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            run(*arguments, lambda what: os.write(write, f"{what}\n".encode()), until)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(write)
    seen = []
    with os.fdopen(read) as lines:
        for line in lines:
            seen.append("writing" if line == "writing\n" else int(line))
            if seen[-1] == until:
                os.kill(pid, signal.SIGKILL)
                break
    status = os.waitpid(pid, 0)[1]
    expected = -signal.SIGKILL if until else 0
    assert os.waitstatus_to_exitcode(status) == expected, f"the run ended with {status}, not with {expected}"
    return seen


def main(name: str, folder: Path) -> None:
    folder.mkdir()
    method, checkpoint = METHODS[name], folder / "run.checkpoint"
    log = []
    for kill in KILLS:
        seen = spawn(method, checkpoint, folder / "killed.safetensors", until=kill)
        log.append({"kill": kill, "first": seen[0], "checkpoint": checkpoint.is_file()})
    log.append({"kill": None, "first": spawn(method, checkpoint, folder / "killed.safetensors")[0]})
    log[-1]["checkpoint"] = checkpoint.is_file()
    spawn(method, None, folder / "calm.safetensors")
    (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    for method in METHODS:
        main(method, Path(sys.argv[1]) / method)
