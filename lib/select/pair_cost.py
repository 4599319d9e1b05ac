r"""Loss-curvature matching on the last layer: the pair cost of LCMat-S, and by how much two sets differ.

Shin et al. (AISTATS 2023, arXiv 2303.04449); the cost is that of the official code, on per-sample gradients.
Layout of a vector of the layer's parameters: bias ``C``, then the weight ``C x d`` row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match import curvature
from lib.select.last_layer import LastLayer
from lib.select.similarity import Pairwise, euclidean


def curvature_coordinates(last: LastLayer, count: int) -> Tensor:
    """The coordinates whose diagonal Hessian varies most over the samples, most first, ties by lowest index: ``(K,)``.

    Population variances from the first two moments: two matrix products, no ``(n, C (1 + d))``.
    """
    q, squares = last.curvatures.double(), last.inputs.double().square()
    rows = (q.square().T @ squares.square()) / len(last) - (q.T @ squares / len(last)).square()
    variance = torch.cat([rows[:, 0], rows[:, 1:].flatten()])
    return variance.argsort(descending=True, stable=True)[:count]


def diagonal_hessian_at(last: LastLayer, coordinates: Tensor) -> Tensor:
    """The diagonal Hessians of all samples at some coordinates, ``(n, K)``."""
    classes, width = last.logits.shape[1], last.embeddings.shape[1]
    weight = coordinates - classes  # negative: a bias
    row = torch.where(weight < 0, coordinates, weight.div(width, rounding_mode="floor"))
    column = torch.where(weight < 0, 0, weight % width + 1)
    return last.curvatures[:, row] * last.inputs[:, column].square()


def pair_cost(last: LastLayer, eps: float, coordinates: Tensor) -> Pairwise:
    r"""$D_{ij}=\lVert g_i-g_j\rVert_2+\varepsilon\sum_{k\in K}|\lambda_{ik}-\lambda_{jk}|$, exactly 0 on the diagonal.

    $\sum_i\min_{j\in S}D_{ij}$ bounds the gradient and curvature gaps of a subset S: facility location on an offset minus D
    makes it small. $\varepsilon=0$ is CRAIG's distance.
    """
    gradient, curvature = euclidean(last.gram()), diagonal_hessian_at(last, coordinates)

    def columns(indices: Tensor) -> Tensor:
        return gradient.columns(indices) + eps * torch.cdist(curvature, curvature[indices], p=1)

    return Pairwise(columns, gradient.diagonal)


def gaps(full: LastLayer, subset: LastLayer) -> dict[str, Tensor]:
    r"""How far the unweighted means of two sets are apart at the last layer.

    ``loss`` (absolute, cross-entropy), ``gradient`` (L2), ``hessian_l1`` and ``hessian_max`` (diagonal Hessians: L1 norm, and
    largest entry of the absolute difference), ``gradient_variance`` (L1 of the coordinates' population variances).
    """
    hessian = _mean_curvature(full) - _mean_curvature(subset)
    return {
        "loss": (_loss(full) - _loss(subset)).abs(),
        "gradient": (full.mean() - subset.mean()).norm(),
        "hessian_l1": hessian.abs().sum(),
        "hessian_max": hessian.abs().max(),
        "gradient_variance": (gradient_variance(full) - gradient_variance(subset)).abs().sum(),
    }


def top_eigenvalue(full: LastLayer, subset: LastLayer, start: Tensor, steps: int = 100) -> Tensor:
    r"""$|\lambda_1|$ of the difference of the full Hessians of the last layer, by ``steps`` power iterations from ``start``.

    start: ``(C, 1 + d)``. Nothing of the size $(C(1+d))^2$ is made.
    """
    sides = [curvature.Outputs(o.inputs[None], o.logits[None], o.labels[:1]) for o in (full, subset)]
    return curvature.top_eigenvalue(*sides, start[None], steps)[0]


def gradient_variance(last: LastLayer) -> Tensor:
    r"""Population variance of every gradient coordinate, ``(C, 1 + d)``.

    $\frac1n(E^{\odot2})^\top\tilde H^{\odot2}-(\frac1nE^\top\tilde H)^{\odot2}$ with $\tilde H=[1,H]$.
    """
    n = len(last)
    return last.errors.square().T @ last.inputs.square() / n - (last.errors.T @ last.inputs / n).square()


def _loss(last: LastLayer) -> Tensor:
    return F.nll_loss(last.log_p, last.labels)


def _mean_curvature(last: LastLayer) -> Tensor:
    return last.curvatures.T @ last.inputs.square() / len(last)  # (C, 1 + d)
