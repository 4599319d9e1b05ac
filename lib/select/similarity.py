r"""Similarities and distances of n points as columns that are computed when they are asked for.

No ``(n, n)`` matrix is kept for many points (50 000 would need 10 GB; see :func:`held`). Kernels are built on each other, from
the Gram kernel $\langle g_i,g_j\rangle$ of last-layer gradients (:meth:`lib.select.last_layer.LastLayer.gram`) or of
explicit vectors (:func:`linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.system.tensors import guard

CHUNK = 2**24  # entries of the columns that are alive at one time
HELD = 2**26  # entries of the largest matrix that is kept: 8192 points, as in one class of most datasets


@dataclass(frozen=True)
class Pairwise:
    """A symmetric function of two points: ``columns(indices (m,)) -> (n, m)`` and its ``diagonal`` (n,)."""

    columns: Callable[[Tensor], Tensor]
    diagonal: Tensor

    def __len__(self) -> int:
        return len(self.diagonal)

    def chunks(self, indices: Tensor | None = None) -> Iterator[Tensor]:
        """The indices (default: all) cut so that their columns hold at most :data:`CHUNK` entries."""
        indices = torch.arange(len(self), device=self.diagonal.device) if indices is None else indices
        return iter(indices.split(max(1, CHUNK // len(self))))

    def matrix(self) -> Tensor:
        """All columns, ``(n, n)``: only for few points."""
        return torch.cat([self.columns(part) for part in self.chunks()], 1)

    def max(self) -> Tensor:
        return torch.stack([self.columns(part).max() for part in self.chunks()]).max()


def dense(matrix: Tensor) -> Pairwise:
    """The kernel of a symmetric matrix ``(n, n)`` that exists already; its rows, contiguous in memory, serve as columns."""
    return Pairwise(lambda columns: matrix[columns].T, matrix.diagonal())


def held(kernel: Pairwise) -> Pairwise:
    """The same kernel with its matrix computed once, if that has at most :data:`HELD` entries."""
    return dense(kernel.matrix()) if len(kernel) ** 2 <= HELD else kernel


def linear(vectors: Tensor) -> Pairwise:
    """Inner products of the rows of ``(n, D)``."""
    return Pairwise(lambda columns: vectors @ vectors[columns].T, vectors.square().sum(1))


def cosine(gram: Pairwise) -> Pairwise:
    r"""$s_{ij}=\tfrac12+\tfrac12\cos(g_i,g_j)\in[0,1]$, exactly 1 on the diagonal; a zero vector has cosine 0 with all others."""
    norms = gram.diagonal.sqrt().clamp_min(torch.finfo(gram.diagonal.dtype).tiny)

    def columns(indices: Tensor) -> Tensor:
        values = gram.columns(indices) / norms[:, None] / norms[indices]
        return _on_diagonal(0.5 + 0.5 * values, indices, 1.0)

    return Pairwise(columns, torch.ones_like(norms))


def euclidean(gram: Pairwise, floor: float = 0.0) -> Pairwise:
    r"""$D_{ij}=\sqrt{\max(\lVert g_i-g_j\rVert^2,\text{floor}^2)}$; the diagonal is ``floor`` itself, without rounding noise."""

    def columns(indices: Tensor) -> Tensor:
        squares = gram.diagonal[:, None] + gram.diagonal[indices] - 2 * gram.columns(indices)
        return _on_diagonal(squares.clamp_min(floor**2).sqrt(), indices, floor)

    return Pairwise(columns, torch.full_like(gram.diagonal, floor))


def flipped(distance: Pairwise, offset: float | Tensor | None = None) -> Pairwise:
    r"""The similarity offset $-D$. The default offset $\max D+10^{-3}$ keeps it positive, which facility location needs."""
    distance = held(distance)
    offset = distance.max() + 1e-3 if offset is None else offset
    return Pairwise(lambda indices: offset - distance.columns(indices), offset - distance.diagonal)


def symmetric_kl(log_p: Tensor) -> Pairwise:
    r"""Contextual diversity (Agarwal et al. 2020): $D_{ab}=\tfrac12\mathrm{KL}(p_a\Vert p_b)+\tfrac12\mathrm{KL}(p_b\Vert p_a)$.

    It equals $\tfrac12\langle p_a-p_b,\log p_a-\log p_b\rangle$: two matrix products of the log-probabilities ``(n, C)``.
    """
    p = log_p.exp()
    own = (p * log_p).sum(1)

    def columns(indices: Tensor) -> Tensor:
        crossed = p @ log_p[indices].T + log_p @ p[indices].T
        values = 0.5 * (own[:, None] + own[indices] - crossed)
        return _on_diagonal(values.clamp_min(0), indices, 0.0)

    return Pairwise(columns, torch.zeros_like(own))


def _on_diagonal(values: Tensor, indices: Tensor, value: float) -> Tensor:
    values[indices, torch.arange(len(indices), device=indices.device)] = value
    return values


guard(globals(), finite=True)
