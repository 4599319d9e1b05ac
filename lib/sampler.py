"""Which real images a step of matching looks at.

A sampler is a frozen dataclass with ``draw(memory, train, count, generator, embed)``: for every class ``count`` real images,
``(C, count, c, h, w)``. What it keeps between two steps lives in a :class:`Memory`, which is part of the method's state;
``embed`` gives the embeddings ``(n, d)`` of ``(n, c, h, w)`` images in the network of this step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Embed = Callable[[Tensor], Tensor]


@dataclass
class Memory:
    """What a sampler keeps: ``age``, the draws since it began or was last restarted, and named tensors."""

    age: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget the age: the next draw is the first one of a new network."""
        self.age = 0

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age, "tensors": self.tensors}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.age, self.tensors = saved["age"], dict(saved["tensors"])


@dataclass(frozen=True)
class RandomBatches:
    """Uniformly, without replacement within a batch."""

    name: str = "random"

    def draw(
        self, memory: Memory, train, count: int, generator: torch.Generator, embed: Embed | None = None
    ) -> Tensor:
        return train.sample(count, generator)
