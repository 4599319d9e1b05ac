"""Checkpoints of a training loop: one safetensors file, replaced in one step, from which the loop goes on with the same bits.

at = Training(tensors, optimiser, generators)
checkpoint.begin(at)                # puts back what was kept, if anything was
for epoch in range(at.epoch, epochs):
    at.new_epoch(epoch)             # the generators are where they were when this epoch began
    order = ...                     # drawn again
    for batch in batches[at.goes_on():]:
        ...
        checkpoint.after(at)
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from lib.system.files import write_tensors


class Training:
    """A training under way: what its next step depends on.

    Attributes:
        tensors: of the networks, by name; they are put back in place.
        generators: that the steps draw from. Those of a device that networks with dropout use are :func:`of_device`.
        epoch, batch: batches of the current epoch that are done.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        generators: Sequence[torch.Generator] = (),
    ):
        self.tensors, self.optimiser, self.generators = dict(tensors), optimiser, list(generators)
        self.epoch, self.batch = 0, 0
        self.begun: list[Tensor] = []  # states of the generators at the start of the epoch
        self.inside: list[Tensor] | None = (
            None  # where a loop that goes on within an epoch has to put them, once
        )

    def new_epoch(self, epoch: int) -> None:
        """Before anything of the epoch is drawn."""
        if self.inside is not None:
            for generator, state in zip(self.generators, self.begun, strict=True):
                generator.set_state(state)
            return
        self.epoch, self.batch = epoch, 0
        self.begun = [generator.get_state().clone() for generator in self.generators]

    def goes_on(self) -> int:
        """The batch of this epoch to go on with, 0 for a new one; after everything that is drawn once per epoch."""
        for generator, state in zip(self.generators, self.inside or (), strict=False):
            generator.set_state(state)
        self.inside = None
        return self.batch

    # -- as tensors ---------------------------------------------------------------------------------------------------

    def packed(self) -> dict[str, Tensor]:
        """Copies of everything, by name."""
        found = {f"network.{name}": tensor for name, tensor in self.tensors.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            found |= {
                f"optimiser.{index}.{name}": torch.as_tensor(value)
                for name, value in values.items()
                if value is not None
            }
        for k, (generator, begun) in enumerate(zip(self.generators, self.begun, strict=True)):
            found |= {f"generator.{k}": generator.get_state(), f"begun.{k}": begun}
        return found

    def unpack(self, found: Mapping[str, Tensor], epoch: int, batch: int) -> None:
        """Put packed tensors back, in place."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(found[f"network.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in found.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        count = range(len(self.generators))
        self.begun = [found[f"begun.{k}"] for k in count]
        self.inside = [found[f"generator.{k}"] for k in count]
        self.epoch, self.batch = epoch, batch


@dataclass
class Checkpoint:
    """Where a training is kept.

    Attributes:
        path: of the file; key: of everything that the training depends on: a file of another key is of no use and is replaced.
        seconds: at most so many are lost, and the time of a step.
        kept: tensors of the caller that are kept with it, such as accuracies on the way.
        writes: False in processes that only read, all but one of those that train together.
    """

    path: Path
    key: str
    seconds: float = 60.0
    kept: dict[str, Tensor] = field(default_factory=dict)
    writes: bool = True

    def begin(self, training: Training) -> None:
        """Put back what is in the file, if it is of this training."""
        self.written = time.monotonic()
        if (found := self._read()) is None:
            return
        tensors, epoch, batch = found
        training.unpack(tensors, epoch, batch)
        self.kept |= {
            name.removeprefix("kept."): tensor for name, tensor in tensors.items() if name.startswith("kept.")
        }

    def after(self, training: Training) -> None:
        """After every step: count it, and write the file if it is time."""
        training.batch += 1
        if self.writes and time.monotonic() - self.written >= self.seconds:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write the file, now."""
        tensors = training.packed() | {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        at = {"key": self.key, "epoch": training.epoch, "batch": training.batch}
        write_tensors(self.path, tensors, {"at": json.dumps(at)})
        self.written = time.monotonic()

    def end(self, training: Training) -> None:
        """After the last step, where more is to be done before what was made is kept elsewhere."""
        if self.writes:
            self.write(training)

    def done(self) -> None:
        """The training has ended and what it made is kept elsewhere."""
        if self.writes:
            self.path.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Tensor], int, int] | None:
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                at = json.loads((file.metadata() or {})["at"])
                if at["key"] != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, at["epoch"], at["batch"]
        except (safetensors.SafetensorError, OSError, KeyError, ValueError):
            return None  # as if it were not there


class Unkept(Checkpoint):
    """No file: the loop is the same."""

    def __init__(self):
        super().__init__(Path(), "", writes=False)

    def begin(self, training: Training) -> None:
        pass


def of_device(device: torch.device | str) -> list[torch.Generator]:
    """PyTorch's own generators, from which dropout draws."""
    device = torch.device(device)
    found = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    return found
