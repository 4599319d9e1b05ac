"""The one loop: progress, checkpoint and resume, snapshots, timing, and a guard against non-finite values.

A method (see ``lib.methods``) is three functions, ``begin``, ``step`` and ``finish``; everything around them is here, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.distill.kept import read_checkpoint
from lib.distill.loop import Run
from lib.distill.method import (
    Method,
    configuration_key,
    describe,
    identity,
    no_negative,
    provenance,
    settings_digest,
)
from lib.distill.packing import learned, pack, unpack
from lib.distill.result import Distilled, read_result, write_result
from lib.synset import check_ipc
from lib.system.cache import digest
from lib.system.device import check_default_type
from lib.system.errors import check_seed
from lib.system.files import cache_dir
from lib.system.measure import Meter

__all__ = [
    "Distilled",
    "Method",
    "configuration_key",
    "describe",
    "distill",
    "identity",
    "learned",
    "no_negative",
    "pack",
    "read_checkpoint",
    "settings_digest",
    "unpack",
]


def distill(
    method: Method | str,
    train,
    ipc: int,
    seed: int = 0,
    *,
    snapshots: Sequence[int] = (),
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 30.0,
    cache: bool = False,
    progress: bool | None = None,
    callback: Callable[[int, Any, dict[str, Tensor]], None] | None = None,
) -> Distilled:
    """Run a method from its beginning, or from its checkpoint, to its synthetic set.

    Interrupted (Ctrl-C, the stop button of JupyterLab), it ends the step it is in, keeps its state and says so; the same call goes on.

    The result depends on the arguments method, train, ipc and seed alone: a run that is killed and started again ends with
    the same bits (on the same machine and thread count).

    Args:
        method: its settings, ``DM(iterations=300)``; a name, ``"dm"``, stands for its recipe for these data (``lib.recipes``).
        train: the data to distil: an ``ImageSet``, or both halves (``lib.data.Data``), of which the training half is taken.
        ipc: stored images per class; seed: of every random choice.
        snapshots: steps whose images are kept (0 is the initial set).
        checkpoint: file to save the state to, at least every ``checkpoint_seconds``, and to go on from if it exists; removed at
            the end. With ``cache`` it has a place of its own.
        cache: keep the result under a key of configuration, data, seed and code, and return it at once when it is there.
        progress: say first what is about to be done, then show a bar with method, data and the last value of the first metric;
            None: on a terminal.
        callback: called with (steps done, state, metrics) after every step.
    Raises:
        CompanionError: ipc, seed or a number among the settings out of range; images or labels that are none; a checkpoint of another
            configuration; a non-finite value (the last good state stays in the checkpoint, if there is one).
    """
    check_default_type()
    train = getattr(train, "train", train)
    train.check()
    if isinstance(method, str):
        from lib.methods import recipes

        method = recipes(method).find(train, ipc).method
    no_negative(method)
    ipc, seed = check_ipc(ipc, train.smallest_class), check_seed(seed)
    key = configuration_key(method, train, ipc, seed)
    stored = cache_dir() / f"{key}-{digest(sorted(snapshots))[:8]}.safetensors"
    if cache and stored.is_file() and (found := read_result(stored)) is not None:
        return dataclasses.replace(found, synset=found.synset.to(train.device))
    kept = cache or checkpoint is not None  # otherwise only an interruption writes it
    checkpoint = Path(checkpoint or stored.with_suffix(".checkpoint"))
    with Meter(train.device) as meter:
        every = checkpoint_seconds if kept else None
        run = Run(method, train, ipc, seed, key, checkpoint, every, sorted(snapshots))
        run.to_the_end(progress, callback)
        synset = method.finish(run.state)
    synset.meta = provenance(method, train, ipc, seed) | synset.meta
    history = {name: torch.cat(parts) for name, parts in run.history.items()}
    result = Distilled(synset, history, run.snapshots, meter.seconds + run.seconds_before, meter.peak_bytes)
    if cache:
        write_result(stored, result)
    checkpoint.unlink(missing_ok=True)
    return result
