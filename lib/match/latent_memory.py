r"""Minimax diffusion's two criteria (arXiv 2311.15529) on predicted clean latents $\hat z$, and the memories that they look into.

$$\mathcal L_r^c=1-\min_{q\in Q_c,\,m\in M_c}\sigma(q,m),\qquad \mathcal L_d^c=\max_{q\in Q_c,\,d\in D_c}\sigma(q,d)$$

$Q_c$: the $\hat z$ of class c in the batch; $M_c$: the last real latents of c; $D_c$: the last predictions of c; $\sigma$: cosine of the
flattened latents. One pair per class and criterion has a gradient. A class whose memory is empty has no term.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.system.errors import CompanionError, integer


class Memory:
    """The last ``size`` latents of every class, oldest dropped first.

    Attributes:
        kept: ``(C, size, d)``, slot j of a class rewritten at every ``size``-th latent; seen: latents of every class so far, ``(C,)``.
    """

    def __init__(self, num_classes: int, size: int, like: Tensor):
        if integer(size) is None or size < 1:
            raise CompanionError(f"memory {size!r} is not allowed: a whole number of at least 1")
        self.shape = tuple(like.shape[1:])
        self.kept = like.new_zeros(num_classes, size, like[0].numel())
        self.seen = torch.zeros(num_classes, dtype=torch.long, device=like.device)

    @property
    def size(self) -> int:
        return self.kept.shape[1]

    def cosines(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """With every latent of the own class, ``(n, size)``, and which of these slots are filled."""
        self.check(latents)
        kept = self.kept[labels]  # a copy: the slots may be rewritten before the backward pass
        filled = torch.arange(self.size, device=labels.device) < self.seen[labels, None]
        q = F.normalize(latents.flatten(1), dim=1, eps=0)
        lengths = kept.norm(dim=2).masked_fill(~filled, 1)
        return (kept @ q.unsqueeze(2)).squeeze(2) / lengths, filled

    @torch.no_grad()
    def write(self, latents: Tensor, labels: Tensor) -> None:
        """Append latents in their order."""
        self.check(latents)
        same = labels[:, None] == labels
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)  # of the own class in this batch
        rows = later < self.size
        slots = (self.seen[labels] + earlier) % self.size
        self.kept[labels[rows], slots[rows]] = latents.detach().flatten(1)[rows].to(self.kept.dtype)
        self.seen += torch.bincount(labels, minlength=len(self.seen))

    def of(self, c: int) -> Tensor:
        """The latents of class c, oldest first, ``(n, *shape)``."""
        seen = int(self.seen[c])
        kept = self.kept[c, :seen] if seen <= self.size else self.kept[c].roll(-(seen % self.size), 0)
        return kept.unflatten(1, self.shape)

    def check(self, latents: Tensor) -> None:
        if tuple(latents.shape[1:]) != self.shape:
            raise CompanionError(f"latents of {tuple(latents.shape[1:])} for a memory of {self.shape}")

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "seen": self.seen}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.kept.copy_(saved["kept"])
        self.seen.copy_(saved["seen"])


def representativeness(latents: Tensor, labels: Tensor, real: Memory) -> Tensor:
    r"""$\mathcal L_r^c$, ``(C,)`` in [0, 2]; nan for a class that is not in the batch, or whose memory is empty."""
    return 1 - _extreme(latents, labels, real, "amin")


def diversity(latents: Tensor, labels: Tensor, own: Memory) -> Tensor:
    r"""$\mathcal L_d^c$, ``(C,)`` in [-1, 1]; nan as in :func:`representativeness`."""
    return _extreme(latents, labels, own, "amax")


def mean_over_classes(per_class: Tensor, labels: Tensor) -> Tensor:
    """The sum of the terms that there are, divided by the number of classes in the batch."""
    present = torch.bincount(labels, minlength=len(per_class)).count_nonzero()
    return torch.where(per_class.isnan(), 0.0, per_class).sum() / present


def _extreme(latents: Tensor, labels: Tensor, memory: Memory, which: str) -> Tensor:
    """The smallest or largest cosine of every class, over the block of its latents and its memory."""
    cosines, filled = memory.cosines(latents, labels)
    never = float("inf") if which == "amin" else float("-inf")
    found = getattr(torch.where(filled, cosines, never), which)(1)
    start = torch.full((len(memory.seen),), never, dtype=found.dtype, device=found.device)
    found = start.scatter_reduce(0, labels, found, which)
    return torch.where(found.isinf(), float("nan"), found)
