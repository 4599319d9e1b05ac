r"""How far a student ends from where an expert went, relative to the expert's own way (MTT, arXiv 2203.11932, eq. 2)."""

from __future__ import annotations

from torch import Tensor

from lib.system.tensors import guard


def relative_distance(student: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\mathcal L=\lVert\theta_N-\theta^*_{t+M}\rVert^2/\lVert\theta^*_t-\theta^*_{t+M}\rVert^2$ and its derivative by the student.

    Args:
        student: $\theta_N$; start: $\theta^*_t$; target: $\theta^*_{t+M}$, ``(K, P)`` each.
    Returns:
        ``(K,)``, 1 for a student that stays at the start, and $2(\theta_N-\theta^*_{t+M})/\lVert\cdot\rVert^2$, ``(K, P)``.
    """
    gap, moved = student - target, (start - target).square().sum(1)
    return gap.square().sum(1) / moved, 2 * gap / moved[:, None]


guard(globals())
