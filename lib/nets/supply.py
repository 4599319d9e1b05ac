r"""Which network a step of matching looks at: $\theta\sim\mathcal Q$ as a value, as formations and samplers are.

A supply is a frozen dataclass with ``begin`` (what it keeps), ``draw`` (the network of this step, frozen) and ``after`` (what happens
to its networks once the images have moved). What it keeps goes into a checkpoint, by ``state_dict`` and ``load_state_dict`` or as a
dataclass. A third supply, partly trained networks, is ``lib.nets.bank``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib import nets
from lib.nets.ensemble import Ensemble
from lib.nets.training import batch_loss
from lib.system.errors import unknown, whole


@dataclass
class One:
    """One architecture, its weights, and how many steps were done."""

    network: nn.Module
    percent: Tensor | float = 0.0  # training accuracy of the network of this step, 0 to 100
    done: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "done": self.done}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.network.load_state_dict(saved["network"])
        self.done = saved["done"]


@dataclass(frozen=True)
class Fresh:
    """A new random network, never trained: at every step (DM), or at every ``every``-th one (M3D: 5).

    Attributes:
        every: steps with one network, 1 or more.
    """

    every: int = 1

    def __post_init__(self):
        whole(self, every=1)

    def begin(self, name: str, train, generator: torch.Generator) -> One:
        return One(nets.make(name, train))

    def draw(self, memory: One, generator: torch.Generator) -> nn.Module:
        if memory.done % self.every == 0:
            nets.initialise(memory.network, generator)
        return memory.network.train().requires_grad_(False)

    def after(self, memory: One, train, generator: torch.Generator) -> None:
        memory.done += 1


METERS = {"running": 0.9, "reset": 1.0}  # what earlier counts still weigh after a training step


@dataclass(frozen=True)
class Queue:
    r"""IDM's model queue $\mathcal Q$ (arXiv 2307.09742): networks of different age, a new one every ``interval`` steps in the place of the
    oldest; at every step one is looked at and ``fetch`` of them are trained a little on real images, side by side as one ensemble.

    Paper and code: the training accuracy of a network is cleared by the published code at every evaluation, so that how often one
    evaluates changes the result (``meter="reset"``); here it is by default a running mean that is never cleared. Training batches
    are drawn with replacement.

    Attributes:
        size: networks kept, 1 or more; 1, with start 0, interval 1 and steps 0: as Fresh, anew at every step.
        start: networks at the beginning; interval: a new one every so many steps.
        fetch: networks trained after every step; steps: so many of SGD each; lr, momentum, decay: of that SGD; batch: real images of all
            classes, not augmented.
        meter: "running"; "reset": cleared as published; reset_every: so many steps.
    """

    size: int = 100
    start: int = 3
    interval: int = 30
    fetch: int = 2
    steps: int = 10
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    decay: float = 5e-4
    meter: str = "running"
    reset_every: int = 100

    def __post_init__(self):
        if self.meter not in METERS:
            raise unknown("meter", self.meter, METERS)
        whole(self, size=1, start=0, interval=1, fetch=0, steps=0, batch=1, reset_every=1)

    def begin(self, name: str, train, generator: torch.Generator) -> Queued:
        network = nets.make(name, train)
        correct, seen = torch.zeros(2, self.size, device=train.device).unbind()
        memory = Queued(network, _empty(network, self.size), _empty(network, self.size), correct, seen)
        for _ in range(self.start):
            self.push(memory, generator)
        return memory

    def draw(self, memory: Queued, generator: torch.Generator) -> nn.Module:
        """One network of the queue, any with the same probability."""
        if self.meter == "reset" and memory.done % self.reset_every == 0:
            memory.correct.zero_()
            memory.seen.zero_()
        if memory.done % self.interval == 0:
            self.push(memory, generator)
        k = torch.zeros(1, dtype=torch.long, device=memory.seen.device)
        if memory.count > 1:
            k = torch.randint(memory.count, (1,), generator=generator, device=k.device)
        with torch.no_grad():
            stored = memory.networks.parameters | memory.networks.buffers
            for name, tensor in memory.network.state_dict().items():
                tensor.copy_(stored[name].index_select(0, k)[0])
            memory.percent = memory.percents.index_select(0, k)[0]
        return memory.network.eval().requires_grad_(False)

    def after(self, memory: Queued, train, generator: torch.Generator) -> None:
        """``steps`` SGD steps of ``fetch`` random networks."""
        memory.done += 1
        if not (self.fetch and self.steps):
            return
        device = memory.seen.device
        members = torch.randperm(memory.count, generator=generator, device=device)[: self.fetch]
        networks, velocity = _chosen(memory.networks, members), _chosen(memory.velocity, members)
        correct, seen = memory.correct[members], memory.seen[members]
        shape = (self.steps, len(members), min(self.batch, len(train)))
        for rows in torch.randint(len(train), shape, generator=generator, device=device):
            right = self.train_step(networks.train(), velocity, train.images[rows], train.labels[rows])
            correct = METERS[self.meter] * correct + right
            seen = METERS[self.meter] * seen + rows.shape[1]
        _put_back(memory.networks, members, networks)
        _put_back(memory.velocity, members, velocity)
        memory.correct[members], memory.seen[members] = correct, seen

    def train_step(self, networks: Ensemble, velocity: Ensemble, images: Tensor, labels: Tensor) -> Tensor:
        """One SGD step of K networks on ``(K, n, ...)`` images, in place; how many each had right before it, ``(K,)``."""
        logits = networks(images)
        parameters = list(networks.parameters.values())
        gradients = torch.autograd.grad(batch_loss(logits, labels).sum(), parameters, materialize_grads=True)
        with torch.no_grad():
            for weight, v, gradient in zip(parameters, velocity.parameters.values(), gradients, strict=True):
                v.mul_(self.momentum).add_(gradient).add_(weight, alpha=self.decay)
                weight.sub_(v, alpha=self.lr)
        return (logits.argmax(2) == labels).sum(1)

    @torch.no_grad()
    def push(self, memory: Queued, generator: torch.Generator) -> None:
        """Put a new network into the queue, in the place of the oldest one if it is full."""
        slot = memory.pushed % self.size
        new = nets.initialise(memory.network, generator).state_dict()
        for name, tensor in (memory.networks.parameters | memory.networks.buffers).items():
            tensor[slot] = new[name]
        for tensor in (*memory.velocity.parameters.values(), memory.correct, memory.seen):
            tensor[slot] = 0
        memory.pushed += 1


@dataclass
class Queued:
    """Slot i holds a network, its momentum and its accuracy; the next new network goes to slot ``pushed % size``, which is the
    oldest one's when all are taken."""

    network: nn.Module  # the one that is looked at
    networks: Ensemble
    velocity: Ensemble  # SGD momentum of every weight, stacked like the networks
    correct: Tensor  # (size,) and seen: training images classified rightly, and all, earlier ones discounted
    seen: Tensor
    percent: Tensor | float = 0.0
    pushed: int = 0
    done: int = 0

    @property
    def count(self) -> int:
        """Networks in the queue."""
        return min(self.pushed, self.networks.size)

    @property
    def percents(self) -> Tensor:
        """Training accuracy of every network in the queue, ``(count,)``; 0 for an untrained one."""
        return (100 * self.correct / self.seen.clamp(min=1))[: self.count]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that moves, by name."""
        named = {"correct": self.correct, "seen": self.seen}
        for part in ("networks", "velocity"):
            ensemble = getattr(self, part)
            named |= {f"{part}.{name}": t for name, t in (ensemble.parameters | ensemble.buffers).items()}
        return named

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors(), "pushed": self.pushed, "done": self.done}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved["tensors"][name])
        self.pushed, self.done = saved["pushed"], saved["done"]


def _empty(template: nn.Module, slots: int) -> Ensemble:
    """Room for so many networks, all zero."""
    parts = (dict(template.named_parameters()), dict(template.named_buffers()))
    zeros = [{name: t.new_zeros(slots, *t.shape) for name, t in part.items()} for part in parts]
    return Ensemble(template, *zeros)


def _chosen(networks: Ensemble, members: Tensor) -> Ensemble:
    """A copy of some networks."""
    parameters = {name: t[members].requires_grad_() for name, t in networks.parameters.items()}
    buffers = {name: t[members] for name, t in networks.buffers.items()}
    return Ensemble(networks.template, parameters, buffers)


@torch.no_grad()
def _put_back(networks: Ensemble, members: Tensor, changed: Ensemble) -> None:
    """The inverse of :func:`_chosen`."""
    for mine, theirs in ((networks.parameters, changed.parameters), (networks.buffers, changed.buffers)):
        for name, tensor in mine.items():
            tensor[members] = theirs[name]
