"""A part of the real images: among which positions to choose and how many, and the set that the chosen ones make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.data.imageset import ImageSet
from lib.select.greedy import check_budget
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError


def real_set(train: ImageSet, indices: Tensor, weights: Tensor | None = None) -> SyntheticSet:
    """Real images as a synthetic set, with their positions and weights."""
    return SyntheticSet(
        train.images[indices].clone(),
        train.labels[indices],
        train.classes,
        train.transform,
        weights=weights,
        indices=indices,
    )


def class_rows(train: ImageSet) -> list[Tensor]:
    """Positions of the images of every class."""
    return [(train.labels == c).nonzero().flatten() for c in range(train.num_classes)]


def groups(
    train: ImageSet, ipc: int, balanced: bool = True, fraction: float | None = None
) -> list[tuple[Tensor, int]]:
    """Positions to choose among, and how many: of every class, or (``balanced=False``) of all images at once.

    Args:
        fraction: of the images of each group, in (0, 1], instead of ``ipc`` per class.
    Raises:
        CompanionError: a group has fewer images than are to be chosen, or none is.
    """
    rows = class_rows(train) if balanced else [torch.arange(len(train), device=train.device)]
    counts = [len(part) for part in rows]
    if fraction is None:
        budgets = [ipc * train.num_classes // len(rows)] * len(rows)
    else:
        budgets = class_budgets(counts, fraction)
    for count, budget in zip(counts, budgets, strict=True):
        check_budget(budget, count)
    return list(zip(rows, budgets, strict=True))


def class_budgets(counts: Sequence[int], fraction: float) -> list[int]:
    """Images per class for a fraction in (0, 1]: ``round(fraction * count)``, half to even."""
    if not 0 < fraction <= 1:
        raise CompanionError(f"fraction {fraction} is not allowed: it must lie in (0, 1]")
    return [round(fraction * int(count)) for count in counts]
