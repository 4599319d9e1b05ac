r"""A subspace of weights, as the affine span of an expert's way: $\theta_{ref}+\mathrm{span}(U)$ with orthonormal U.

$$D=[\theta_1-\theta_0,\dots,\theta_K-\theta_0],\quad D^\top D=Q\Lambda Q^\top,\quad U=DQ_r\Lambda_r^{-1/2},\qquad
\mathcal P(\theta)=\theta_{ref}+UU^\top(\theta-\theta_{ref})$$

The Gram matrix is K x K, so that nothing of the size of the weights is decomposed; it is formed in float64, since snapshots of one
training run are nearly collinear, and directions whose eigenvalue is below a part of the largest are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.system.errors import CompanionError
from lib.system.tensors import guard

CUT = 1e-4  # of the largest eigenvalue


@dataclass(frozen=True)
class Subspace:
    """An affine subspace of ``(P,)``.

    Attributes:
        basis: U, ``(P, r)``, orthonormal columns; reference: ``(P,)``.
    """

    basis: Tensor
    reference: Tensor

    @classmethod
    def through(cls, points: Tensor, cut: float = CUT, blocks: Sequence[int] | None = None) -> Subspace:
        """The span of the differences of points ``(K + 1, P)`` from the first one.

        Args:
            blocks: lengths of the parts of the vector (layers) that have a span each; None: one for all.
        """
        if len(points) < 2:
            raise CompanionError(f"a subspace through {len(points)} points: at least 2 are needed")
        differences = (points[1:] - points[0]).T  # (P, K)
        if blocks is None:
            return cls(_orthonormal(differences, cut), points[0])
        parts = [_orthonormal(part, cut) for part in differences.split(list(blocks))]
        return cls(torch.block_diag(*parts), points[0])

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def project_vector(self, v: Tensor) -> Tensor:
        r"""$UU^\top v$ of rows ``(.., P)``."""
        return (v @ self.basis) @ self.basis.T

    def project_point(self, theta: Tensor) -> Tensor:
        r"""$\mathcal P(\theta)$ of rows ``(.., P)``."""
        return self.reference + self.project_vector(theta - self.reference)


def spectrum(points: Tensor) -> Tensor:
    """Eigenvalues of the Gram matrix of the differences of points ``(K + 1, P)`` from the first, largest first, ``(K,)`` in float64."""
    differences = (points[1:] - points[0]).double()
    return torch.linalg.eigvalsh(differences @ differences.T).flip(0).clamp(min=0)


def _orthonormal(differences: Tensor, cut: float) -> Tensor:
    """An orthonormal basis ``(P, r)`` of the columns of ``(P, K)``."""
    D = differences.double()
    values, Q = torch.linalg.eigh(D.T @ D)
    kept = values > cut * values[-1]
    U = D @ (Q[:, kept] / values[kept].sqrt())
    # a second pass against rounding, which the division by small eigenvalues enlarges
    return torch.linalg.qr(U).Q.to(differences.dtype) if U.shape[1] else U.to(differences.dtype)


guard(globals(), finite=True)
