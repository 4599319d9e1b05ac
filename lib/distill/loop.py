"""A distillation under way: its steps, its checkpoints, and the guard against non-finite values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.distill.interruption import asked_to_stop
from lib.distill.kept import read_checkpoint, refuse_another, write_checkpoint
from lib.distill.method import describe
from lib.distill.packing import learned, pack, unpack
from lib.distill.progress import Progress
from lib.system.errors import CompanionError

GUARD_EVERY = 10  # steps between two looks at the metrics (a look waits for a GPU)


class Run:
    """The state of a distillation under way, and its checkpoints.

    Attributes:
        method, train, ipc: what is distilled; key: hash of all that the result depends on; checkpoint: the file.
        every: seconds between two checkpoints, None: only an interruption writes one.
        wanted: steps whose images are kept; done, total: steps.
        history: metric -> looks at it, in order; snapshots: step -> stored images.
        seconds_before: of the runs that this one goes on from.
    """

    def __init__(
        self,
        method,
        train,
        ipc: int,
        seed: int,
        key: str,
        checkpoint: Path,
        every: float | None,
        wanted: list[int],
    ):
        self.method, self.key, self.checkpoint, self.every = method, key, checkpoint, every
        self.data, self.ipc = train.name, ipc
        data = f"{train.name} {train.fingerprint[:8]} on {train.device.type}"
        self.about = describe(method) | {"data": data, "ipc": ipc, "seed": seed}
        self.generator = torch.Generator(train.device).manual_seed(seed)
        self.total, self.wanted = method.total_steps(ipc), wanted
        self.state = method.begin(train, ipc, self.generator)
        self.done, self.seconds_before = 0, 0.0
        self.history: dict[str, list[Tensor]] = {}
        self.snapshots: dict[int, Tensor] = {}
        self.started = time.perf_counter()
        if checkpoint.is_file():
            self._load()
        elif 0 in wanted:
            self._snapshot()

    def to_the_end(self, progress: bool | None, callback) -> None:
        """All steps that are left."""
        good, due, saved, pending = None, False, time.perf_counter(), []
        shown = Progress(progress, self.method, self.data, self.ipc, self.total, self.done)
        with shown, asked_to_stop() as asked:
            while self.done < self.total:
                if not pending and self.every is not None:
                    good = self.core()
                    if due:
                        self.save(good)
                        saved = time.perf_counter()
                try:
                    metrics = self.method.step(self.state, self.generator)
                except KeyboardInterrupt:  # asked for twice, or not in the main thread
                    raise KeyboardInterrupt(self._interrupted(good)) from None
                self.done += 1
                pending.append(metrics)
                if self.done in self.wanted:
                    self._snapshot()
                if callback is not None:
                    callback(self.done, self.state, metrics)
                # slow steps are looked at one by one, so that a checkpoint is never older than the caller allows
                due = self.every is not None and time.perf_counter() - saved > self.every
                if due or asked or len(pending) == GUARD_EVERY or self.done == self.total:
                    self._look(pending, good)
                    shown.forward(len(pending), self.history)
                    pending = []
                if asked and self.done < self.total:
                    raise KeyboardInterrupt(self._interrupted(self.core())) from None

    def _interrupted(self, good: dict | None) -> str:
        """Keep a good state, and say so."""
        name = type(self.method).__name__
        if good is None:
            return f"{name} was interrupted in step {self.done + 1} of {self.total}, whose state is lost"
        self.save(good)
        return f"{name} was interrupted; the same call goes on from step {good['done']} of {self.total} ({self.checkpoint})"

    def _look(self, pending: list[dict[str, Tensor]], good: dict | None) -> None:
        """Move the metrics to the history; stop if one of them, or a learned value, is not finite."""
        columns = {name: torch.stack([metrics[name] for metrics in pending]).cpu() for name in pending[0]}
        first = self.done - len(pending) + 1
        for name, values in columns.items():
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                self._stop(
                    f"{name} is {values[bad[0, 0]].item()} at step {first + bad[0, 0].item()}",
                    first - 1,
                    good,
                )
        if not all(bool(tensor.isfinite().all()) for tensor in learned(self.state)):
            self._stop(f"a learned value is not finite after step {self.done}", first - 1, good)
        for name, values in columns.items():
            self.history.setdefault(name, []).append(values)

    def _stop(self, what: str, good_step: int, good: dict | None) -> None:
        kept = "; no checkpoint was asked for"
        if good is not None:
            self.save(good)
            kept = f"; the last good state (step {good_step}) is in {self.checkpoint}"
        raise CompanionError(f"{type(self.method).__name__} stopped: {what}{kept}")

    def _snapshot(self) -> None:
        self.snapshots[self.done] = self.method.finish(self.state).stored()[0].cpu()

    def core(self) -> dict[str, Any]:
        """What the next step depends on, copied."""
        return {"done": self.done, "generator": self.generator.get_state().clone(), "state": pack(self.state)}

    def save(self, core: dict[str, Any]) -> None:
        """Write a checkpoint of plain tensors, numbers and strings (loadable with ``weights_only=True``)."""
        about = {
            "key": self.key,
            "configuration": self.about,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "history": {name: torch.cat(parts)[: core["done"]] for name, parts in self.history.items()},
            "snapshots": {step: images for step, images in self.snapshots.items() if step <= core["done"]},
        }
        write_checkpoint(self.checkpoint, core | about)

    def _load(self) -> None:
        packed = read_checkpoint(self.checkpoint)
        refuse_another(self.checkpoint, packed, self.key, self.about)
        unpack(self.state, packed["state"])
        self.generator.set_state(packed["generator"])
        self.done, self.seconds_before = packed["done"], packed["seconds"]
        self.history = {name: [values] for name, values in packed["history"].items()}
        self.snapshots = packed["snapshots"]
