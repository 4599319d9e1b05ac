r"""What drives stored bases and a learned renderer (HaBa, arXiv 2210.16774; ``lib.formation.hallucinators``): any loss of images,
differentiated through the renderer.

An objective is a value with ``begin`` (what it keeps: its *memory*), ``groups`` (what else is learned), ``descend`` (adds the gradients of
one step), ``after`` (once all have moved) and ``step_size``. It reads of the method ``network``, ``augmentation``, ``batch`` and
``hallucinators``, of its state ``bases``, ``hallucinators``, ``labels``, ``memory`` and ``train``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib.augment import augmented, families, siamese
from lib.data.imageset import ImageSet
from lib.formation import by_class
from lib.match.features import class_mean
from lib.match.trajectory import chunks, keep_above, relative_distance, segment
from lib.match.unroll import MODES, Step, walk
from lib.nets.experts import Experts
from lib.nets.flat import template
from lib.nets.supply import Fresh
from lib.system.errors import choose, positive, whole


@dataclass
class Students:
    """What :class:`Trajectories` keeps."""

    rate: Tensor  # beta, ()
    experts: Tensor  # (count, epochs + 1, P)
    template: Any
    deck: list[int] = field(default_factory=list)  # experts not yet seen in this pass

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "deck": self.deck}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.rate.copy_(saved["rate"])
        self.deck = list(saved["deck"])


@dataclass(frozen=True)
class Trajectories:
    r"""MTT's loss (``lib.methods.mtt``) of a student that sees its bases through one random hallucinator in each of its steps, at a
    learned rate $\beta$.

    Attributes:
        steps: N, of the student; expert_epochs: M; start_epochs: $T^+$; 1 or more.
        rate: $\beta$ at the start, least_rate: below which it is not let; lr_rate, momentum_rate: of its SGD.
        gradient: "bptt"; "recompute": exact, with the memory of one step; "tesla"; experts: how they are trained (``lib.nets.experts``).
    """

    steps: int = 50
    expert_epochs: int = 2
    start_epochs: int = 2
    rate: float = 0.01
    lr_rate: float = 1e-7
    momentum_rate: float = 0.9
    least_rate: float = 1e-3
    gradient: str = "bptt"
    experts: Experts = Experts()

    def __post_init__(self) -> None:
        choose("mode of unrolling", self.gradient, MODES)
        whole(self, steps=1, expert_epochs=1, start_epochs=1)
        positive(self, "rate", "least_rate")

    @property
    def reach(self) -> int:
        """The last epoch of an expert that is read."""
        return self.start_epochs - 1 + self.expert_epochs

    def begin(self, haba: Any, train: ImageSet, generator: torch.Generator) -> Students:
        rate = torch.tensor(self.rate, device=train.device, requires_grad=True)
        experts = self.experts.record(haba.network, train, self.reach)
        return Students(rate, experts, template(haba.network, train))

    def groups(self, memory: Students) -> list[dict[str, Any]]:
        """What else is learned."""
        return [{"params": [memory.rate], "lr": self.lr_rate, "momentum": self.momentum_rate}]

    def descend(self, haba: Any, state: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Add the gradients of bases, hallucinators and rate to them."""
        memory = state.memory
        start, target = segment(memory, self.start_epochs, self.expert_epochs, generator)  # (1, P)
        steps, used = self.student_steps(haba, state, generator)

        student = walk(memory.template, start, steps, self.gradient)
        loss, u = relative_distance(student.end, start, target)
        images, rates = student.pull(u)

        torch.autograd.backward(used, images)  # through augmentation and hallucinators
        memory.rate.grad = rates.sum()
        return {"loss": loss[0], "rate": memory.rate.detach().clone()}

    def student_steps(
        self, haba: Any, state: Any, generator: torch.Generator
    ) -> tuple[list[Step], list[Tensor]]:
        """The student's steps, and their images as they were made."""
        rendered, names = state.hallucinators.render(state.bases), families(haba.augmentation, state.train)
        steps, used = [], []
        for rows in chunks(len(state.bases), haba.batch, self.steps, generator):
            k, m = 0, haba.hallucinators
            if m > 1:
                k = int(torch.randint(m, (), generator=generator, device=generator.device))
            used.append(augmented(rendered[k, rows], names, generator))
            steps.append(Step(used[-1], state.labels[rows], state.memory.rate))
        return steps, used

    def after(self, memory: Students) -> None:
        """Once all have moved."""
        keep_above(memory.rate, self.least_rate)

    def step_size(self, memory: Students) -> Tensor | None:
        return memory.rate.detach().clone()


@dataclass(frozen=True)
class Features:
    r"""DM's loss (``lib.methods.dm``): the mean embedding of all renderings of a class against that of real images, in a new random
    network at every step. No experts, no unrolling.

    Attributes:
        real_batch: real images per class and step, 1 or more.
    """

    real_batch: int = 256

    def __post_init__(self) -> None:
        whole(self, real_batch=1)

    def begin(self, haba: Any, train: ImageSet, generator: torch.Generator) -> Any:
        return Fresh().begin(haba.network, train, generator)

    def groups(self, memory: Any) -> list[dict[str, Any]]:
        return []

    def descend(self, haba: Any, state: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Add the gradients of bases and hallucinators to them."""
        train, network = state.train, Fresh().draw(state.memory, generator)
        real = train.sample(min(self.real_batch, train.smallest_class), generator)  # (C, n, c, h, w)
        rendered = state.hallucinators.render(state.bases)  # (m, C ipc, c, h, w)
        syn = torch.cat(
            [by_class(images, train.num_classes) for images in rendered], 1
        )  # (C, m ipc, c, h, w)
        real, syn = siamese(real, syn, families(haba.augmentation, train), generator)
        with torch.no_grad():
            target = network.embed(real.flatten(0, 1)).unflatten(0, real.shape[:2])
        loss = class_mean(target, network.embed(syn.flatten(0, 1)).unflatten(0, syn.shape[:2])).sum()
        loss.backward()
        return {"loss": loss}

    def after(self, memory: Any) -> None:
        """Nothing else moves."""

    def step_size(self, memory: Any) -> Tensor | None:
        return None
