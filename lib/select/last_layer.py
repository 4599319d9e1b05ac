r"""Per-sample gradients of the cross-entropy by the last linear layer, kept as two factors.

With $z=Wh+b$, $p=\mathrm{softmax}(z)$ and $e=p-y$, the gradient is $g=[e;\ \mathrm{vec}(e\,h^\top)]$: bias first, then the
weight row by row. Its $C(1+d)$ entries are written out only where a vector is asked for; everything else follows from
$\langle g_i,g_j\rangle=\langle e_i,e_j\rangle(1+\langle h_i,h_j\rangle)$.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.select.similarity import Pairwise


@dataclass(frozen=True)
class LastLayer:
    """What the last layer saw and said for n samples.

    Args:
        logits: ``(n, C)``.
        embeddings: the layer's inputs h, ``(n, d)``.
        labels: ``(n,)`` int64.
        scale: factor of every sample's loss, ``(n,)`` or a number; :func:`batch_scale` gives the factor that published
            code leaves in.
    """

    logits: Tensor
    embeddings: Tensor
    labels: Tensor
    scale: Tensor | float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> LastLayer:
        scale = self.scale[rows] if isinstance(self.scale, Tensor) else self.scale
        return LastLayer(self.logits[rows], self.embeddings[rows], self.labels[rows], scale)

    def with_logits(self, logits: Tensor) -> LastLayer:
        """The same samples with other outputs."""
        moved = LastLayer(logits, self.embeddings, self.labels, self.scale)
        moved.__dict__["inputs"] = self.inputs  # the same: no second copy
        return moved

    @cached_property
    def log_p(self) -> Tensor:
        return self.logits.log_softmax(1)

    @cached_property
    def errors(self) -> Tensor:
        """Scaled e = p - y, ``(n, C)``: the bias part of the gradients."""
        return self._scaled(self.log_p.exp() - F.one_hot(self.labels, self.logits.shape[1]))

    @cached_property
    def inputs(self) -> Tensor:
        """[1, h], ``(n, 1 + d)``."""
        return F.pad(self.embeddings, (1, 0), value=1.0)

    @cached_property
    def curvatures(self) -> Tensor:
        r"""Scaled $q=p\odot(1-p)$, ``(n, C)``; the exact diagonal Hessian of a sample is $[q;\ q\otimes h^{\odot2}]$."""
        return self._scaled(self.log_p.exp() * (1 - self.log_p.exp()))

    def _scaled(self, values: Tensor) -> Tensor:
        return values * (self.scale[:, None].to(values) if isinstance(self.scale, Tensor) else self.scale)

    def gram(self) -> Pairwise:
        """Inner products of the gradients."""

        def columns(indices: Tensor) -> Tensor:
            return (self.errors @ self.errors[indices].T).mul_(self.inputs @ self.inputs[indices].T)

        return Pairwise(columns, self.norms().square())

    def norms(self) -> Tensor:
        r"""$\lVert g_i\rVert=\lVert e_i\rVert\sqrt{1+\lVert h_i\rVert^2}$, ``(n,)``."""
        return self.errors.norm(dim=1) * self.inputs.norm(dim=1)

    def mean(self) -> Tensor:
        """The mean gradient, ``(C (1 + d),)``."""
        return _flat(self.errors.T @ self.inputs / len(self))

    def project(self, vector: Tensor) -> Tensor:
        r"""$\langle g_i,r\rangle=e_i^\top R\,[1;h_i]$ for one vector r ``(C (1 + d),)``, as ``(n,)``."""
        return (self.inputs @ self.rows_of(vector).T * self.errors).sum(1)

    def rows_of(self, vector: Tensor) -> Tensor:
        """A vector of the parameters as ``(C, 1 + d)``, bias in the first column."""
        classes = self.logits.shape[1]
        return torch.cat([vector[:classes, None], vector[classes:].unflatten(0, (classes, -1))], 1)

    def gradients(self) -> Tensor:
        """The gradients written out, ``(n, C (1 + d))``: only for few samples."""
        return _flat(self.errors[:, :, None] * self.inputs[:, None, :])

    def diagonal_hessians(self) -> Tensor:
        """The diagonal Hessians written out, ``(n, C (1 + d))``: only for few samples."""
        return _flat(self.curvatures[:, :, None] * self.inputs.square()[:, None, :])


def batch_scale(count: int, batch: int) -> Tensor:
    """1 / size of the consecutive batch that holds each sample, ``(count,)`` float64.

    Published selection code differentiates the *mean* loss of a batch: the few samples of a short last batch then weigh more.
    """
    sizes = torch.full((count,), batch, dtype=torch.float64)
    if count % batch:
        sizes[-(count % batch) :] = count % batch
    return 1 / sizes


def _flat(rows: Tensor) -> Tensor:
    """``(..., C, 1 + d)`` with the bias in the first column to ``(..., C (1 + d))`` with the bias first."""
    return torch.cat([rows[..., 0], rows[..., 1:].flatten(-2)], -1)
