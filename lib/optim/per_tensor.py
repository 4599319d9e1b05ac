"""What optimisers of the Adam family share: two running statistics per tensor, and the loop over the tensors."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class PerTensor(torch.optim.Optimizer):
    """Keeps, for every tensor theta with a gradient, the number of its steps and two statistics of its shape, 0 at first."""

    statistics: ClassVar[tuple[str, str]]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                if not state:
                    state.update(step=0, **{name: torch.zeros_like(theta) for name in self.statistics})
                state["step"] += 1
                self.move(theta, *(state[name] for name in self.statistics), state["step"], group)

    @abstractmethod
    def move(self, theta: Tensor, m: Tensor, s: Tensor, t: int, group: dict) -> None:
        """Step t of one tensor, in place: its statistics, then itself."""
