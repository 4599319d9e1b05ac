r"""A student that follows a part of an expert's way: which part, on which images, and how far from it the student ends (MTT, arXiv
2203.11932)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from lib.system.tensors import guard


def relative_distance(student: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    r"""Equation 2: $\mathcal L=\lVert\theta_N-\theta^*_{t+M}\rVert^2/\lVert\theta^*_t-\theta^*_{t+M}\rVert^2$ and its derivative by
    the student.

    Args:
        student: $\theta_N$; start: $\theta^*_t$; target: $\theta^*_{t+M}$, ``(K, P)`` each.
    Returns:
        ``(K,)``, 1 for a student that stays at the start, and $2(\theta_N-\theta^*_{t+M})/\lVert\cdot\rVert^2$, ``(K, P)``.
    """
    gap, moved = student - target, (start - target).square().sum(1)
    return gap.square().sum(1) / moved, 2 * gap / moved[:, None]


def segment(state, start_epochs: int, span: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""$\theta^*_t$ and $\theta^*_{t+M}$, ``(1, P)`` each: experts in a random order, again and again, each at a random t."""
    if not state.deck:
        order = torch.randperm(len(state.experts), generator=generator, device=generator.device)
        state.deck = order.tolist()
    k = state.deck.pop()
    t = int(torch.randint(start_epochs, (), generator=generator, device=generator.device))
    pair = state.experts[k, [t, t + span]].to(generator.device)
    return pair[:1], pair[1:]


def chunks(m: int, batch: int | None, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of S for every step: parts of a permutation, the last and perhaps short one first, as published."""
    left: list[Tensor] = []
    for _ in range(steps):
        if not left:
            left = list(torch.randperm(m, generator=generator, device=generator.device).split(batch or m))
        yield left.pop()


def keep_above(rate: Tensor, least: float) -> None:
    """Clamp a learned rate in place, and say so once."""
    with torch.no_grad():
        if not bool(rate >= least):
            warnings.warn(f"the learned rate fell below {least:g} and is kept there", stacklevel=2)
            rate.clamp_(min=least)


guard(globals())
