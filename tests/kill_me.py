"""Kills a distillation at chosen steps, starts it again each time, and compares with a run that nobody disturbed.

``python kill_me.py METHOD FOLDER`` writes ``killed.safetensors``, ``calm.safetensors`` and ``log.json`` to the folder. Every run
is a process of its own, forked before any work was done, and ended by SIGKILL.
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
from helpers import toy_data

from lib.distill import distill
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.dsa import DSA

METHODS = {
    "dm": DM(iterations=60, real_batch=8, network="convnet-d2-w4"),
    "dm-batch": DM(iterations=60, real_batch=8, network="convnet-d2-w4-batch", init="noise"),
    # 20 networks, 3 matching steps each: a checkpoint at a multiple of 10 falls into the middle of a network's life
    "dc": DC(outer=20, inner=3, epochs=2, real_batch=8, network="convnet-d2-w4", network_batch=4),
    "dsa-batch": DSA(outer=20, inner=3, epochs=2, real_batch=8, network="convnet-d2-w4-batch", network_batch=4),
}
KILLS = (4, 13, 27, "writing", 45)  # the first comes before any checkpoint


def run(method, checkpoint: Path | None, result: Path, report, stall: bool) -> None:
    """The whole distillation; says every step, and stops in the middle of its second checkpoint when asked to stall."""
    torch.set_num_threads(1)
    if stall:
        write, writes = Path.write_bytes, []

        def half(self, data):
            writes.append(1)
            if len(writes) < 2:
                return write(self, data)
            with open(self, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
            report("writing")
            time.sleep(60)

        Path.write_bytes = half
    options = {"checkpoint": checkpoint, "checkpoint_seconds": 0.0, "snapshots": (0, 5, 30, 60)}
    done = distill(method, toy_data().train, 2, 7, **options, callback=lambda step, *_: report(step))
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
            run(*arguments, lambda what: os.write(write, f"{what}\n".encode()), until == "writing")
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
    main(sys.argv[1], Path(sys.argv[2]))
