r"""GradMatch (Killamsetty et al. 2021, arXiv 2103.00123): a weighted subset whose gradient is the mean gradient.

Orthogonal matching pursuit on the gradients' inner products alone: with the Gram kernel $G=A^\top A$ and $c=A^\top b$, the
correlations with the residual $r=b-A_Sx$ are $A^\top r=c-G_{:S}\,x$.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.select.greedy import check_budget
from lib.select.similarity import Pairwise
from lib.system.tensors import guard


@dataclass(frozen=True)
class Match:
    """Picks in order ``(k,)``, the last ridge solution and the non-negative weights, both in that order.

    A weight may be 0: :meth:`kept` leaves such picks out, so a subset can be smaller than the budget.
    """

    order: Tensor
    ridge: Tensor
    weights: Tensor

    def kept(self) -> tuple[Tensor, Tensor]:
        """The picks with a positive weight, and these weights."""
        positive = self.weights > 0
        return self.order[positive], self.weights[positive]


def orthogonal_matching(gram: Pairwise, target: Tensor, budget: int, ridge: float = 1.0) -> Match:
    r"""Pick $\arg\max_jA_j^\top r$ (signed, not yet picked; ties: lowest index), refit all weights, repeat.

    The refit is $x=(A_S^\top A_S+\lambda I)^{-1}A_S^\top b$, without $\lambda$ for the first pick; at the end the
    non-negative least squares solution of these normal equations. A budget of 1 has weight 1.

    Args:
        gram: inner products of the samples' gradients.
        target: $c=A^\top b$, ``(n,)``: inner products with the gradient that is to be matched.
        ridge: $\lambda$.
    """
    check_budget(budget, len(gram))
    chosen = target.new_empty(len(gram), budget)  # columns of G
    factor = target.new_zeros(budget, budget)  # Cholesky factor of A_S^T A_S + ridge I
    order = torch.empty(0, dtype=torch.long, device=target.device)
    correlation, x = target.clone(), target[:0]
    for step in range(budget):
        pick = correlation.argmax()
        chosen[:, step] = gram.columns(pick[None])[:, 0]
        factor = _grow(factor, step, chosen[order, step], chosen[pick, step] + ridge)
        order = torch.cat([order, pick[None]])
        if step:
            x = torch.cholesky_solve(target[order, None], factor[: step + 1, : step + 1])[:, 0]
        else:
            x = target[order] / chosen[pick, 0]
        correlation = target - chosen[:, : step + 1] @ x
        correlation[order] = -torch.inf
    if budget == 1:
        return Match(order, x, torch.ones_like(x))
    return Match(order, x, non_negative(chosen[order], target[order], ridge))


def non_negative(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    r"""$\arg\min_{x\ge0}\lVert(G+\lambda I)x-c\rVert_2$ for a small G ``(k, k)``."""
    from scipy.optimize import nnls  # not needed by anything else: start-up time

    system = gram.double().cpu() + ridge * torch.eye(len(gram), dtype=torch.float64)
    return torch.from_numpy(nnls(system.numpy(), target.double().cpu().numpy())[0]).to(target)


def _grow(factor: Tensor, size: int, column: Tensor, diagonal: Tensor) -> Tensor:
    """A lower Cholesky factor with one more row, in place."""
    row = torch.linalg.solve_triangular(factor[:size, :size], column[:, None], upper=False)[:, 0]
    factor[size, :size] = row
    # without ridge, repeated samples make the matrix singular: the smallest pivot keeps the weights finite
    smallest = torch.finfo(diagonal.dtype).eps * diagonal
    factor[size, size] = (diagonal - row.square().sum()).clamp_min(smallest).sqrt()
    return factor


guard(globals(), finite=True)
