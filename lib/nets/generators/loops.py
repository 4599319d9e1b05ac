"""What the training loops of generative networks share: batches of an epoch, and a running mean of weights."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_epoch(count: int, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Positions 0 .. count - 1 in random order, in batches; a smaller last one is left out."""
    order = torch.randperm(count, generator=generator, device=generator.device)
    size = min(batch, count)
    return list(order[: count // size * size].split(size))


@torch.no_grad()
def follow(mean: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    """A running mean of weights, in place; whole numbers are copied."""
    moving = [name for name, tensor in mean.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([mean[name] for name in moving], [now[name] for name in moving], 1 - decay)
    for name in mean.keys() - set(moving):
        mean[name].copy_(now[name])
