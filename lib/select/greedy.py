r"""Greedy selections on features ``(n, d)``: herding, k-center, and k-center on predictions.

All functions return positions in the order of picking, so that a smaller budget is a prefix of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib.select.similarity import symmetric_kl
from lib.system.errors import CompanionError, unknown
from lib.system.tensors import guard

HERDING_RULES = ("icarl", "welling", "deepcore")


def herding(features: Tensor, budget: int, rule: str = "icarl") -> Tensor:
    r"""Pick points whose running mean follows the mean $\mu$ of all.

    With $s_t$ the sum of the first t picks, the next one among the points not picked yet is

    * ``icarl`` (default): $\arg\min_i \lVert (t+1)\mu - s_t - h_i\rVert$ (Rebuffi et al. 2017),
    * ``welling``: $\arg\max_i \langle h_i, (t+1)\mu - s_t\rangle$ (Welling 2009),
    * ``deepcore``: the *argmax* of the first distance, as shipped by the DeepCore library, which picks outliers.
    """
    check_budget(budget, len(features))
    mean = features.mean(0)
    total, taken = (
        torch.zeros_like(mean),
        torch.zeros(len(features), dtype=torch.bool, device=features.device),
    )
    order = []
    for t in range(budget):
        goal = (t + 1) * mean - total
        if rule == "icarl":
            cost = torch.linalg.vector_norm(goal - features, dim=1)
        elif rule == "welling":
            cost = -(features @ goal)
        elif rule == "deepcore":
            cost = -torch.linalg.vector_norm(goal - features, dim=1)
        else:
            raise unknown("herding rule", rule, HERDING_RULES)
        pick = cost.masked_fill(taken, torch.inf).argmin()
        taken[pick] = True
        total = total + features[pick]
        order.append(pick)
    return torch.stack(order)


def k_center(features: Tensor, budget: int, first: int = 0, already_selected: Sequence[int] = ()) -> Tensor:
    r"""Farthest-first traversal (Sener & Savarese 2018): $j=\arg\max_i\min_{s\in S}\lVert h_i-h_s\rVert_2$.

    Its covering radius is at most twice the optimal one. No distance matrix is kept: one ``(n,)`` update per pick.

    Args:
        first: the first centre; not used when centres are given.
        already_selected: centres to begin with; they count towards the budget and come first in the result.
    """

    def distance(center: Tensor) -> Tensor:
        return torch.linalg.vector_norm(features - features[center], dim=1)

    return _farthest_first(distance, len(features), budget, first, already_selected, features.device)


def contextual_diversity(
    logits: Tensor, budget: int, first: int = 0, already_selected: Sequence[int] = ()
) -> Tensor:
    r"""Farthest-first traversal by what the network says (Agarwal et al., ECCV 2020), logits ``(n, C)``.

    The distance is $\tfrac12\mathrm{KL}(p_a\Vert p_b)+\tfrac12\mathrm{KL}(p_b\Vert p_a)$; else as :func:`k_center`.
    """
    divergence = symmetric_kl(logits.log_softmax(1))
    return _farthest_first(
        lambda center: divergence.columns(center[None])[:, 0],
        len(logits),
        budget,
        first,
        already_selected,
        logits.device,
    )


def _farthest_first(
    distance: Callable[[Tensor], Tensor],
    count: int,
    budget: int,
    first: int,
    already_selected: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Picks in order, ties to the lowest index; ``distance``: a centre -> its distances ``(count,)``."""
    check_budget(budget, count)
    centers = torch.tensor([int(i) for i in already_selected] or [int(first)], device=device)
    nearest = torch.stack([distance(center) for center in centers]).amin(0)
    if not bool(nearest.isfinite().all()):
        raise CompanionError("a distance between two images is not finite: did the network diverge?")
    nearest[centers] = -torch.inf  # never picked again, even among duplicates
    picks = [centers]
    for _ in range(budget - len(centers)):
        pick = nearest.argmax()
        picks.append(pick[None])
        nearest = torch.minimum(nearest, distance(pick))
        nearest[pick] = -torch.inf
    return torch.cat(picks)[:budget]


def check_budget(budget: int, available: int) -> None:
    if available < 1:
        raise CompanionError(f"a selection of {budget} is not allowed: there are no images to choose from")
    if not 1 <= budget <= available:
        raise CompanionError(
            f"a selection of {budget} is not allowed: there are 1 to {available} images to choose from"
        )


guard(globals(), finite=True)
