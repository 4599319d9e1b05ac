r"""K-means of every class at once, on padded features ``(C, n, d)`` whose existing rows are marked by ``valid`` ``(C, n)``.

Lloyd's algorithm minimises $\sum_i\min_j\lVert h_i-\mu_j\rVert_2^2$. scikit-learn does it class by class on the CPU, a batched
version in torch does it for all classes at once elsewhere; from the same start both reach the same centroids (up to rounding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.data.imageset import draw
from lib.system.errors import choose, unknown
from lib.system.tensors import guard

STARTS = ("random", "k-means++")


def k_means(
    points: Tensor,
    valid: Tensor,
    start: Tensor,
    iterations: int = 100,
    tolerance: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """Centroids ``(C, k, d)``.

    Args:
        points: ``(C, n, d)``; valid: ``(C, n)``, False where a class has no n-th image; start: ``(C, k, d)``.
        iterations: at most so many; tolerance: stop when the centroids' squared movement is below this share of the features'
            mean variance (scikit-learn's rule).
        backend: "sklearn", "torch", or "auto": scikit-learn for tensors on the CPU.
    """
    if backend == "auto":
        backend = "torch" if points.is_cuda else "sklearn"
    run = choose("k-means backend", backend, {"sklearn": _sklearn, "torch": _lloyd})
    return run(points, valid, start, iterations, tolerance)


def starting_points(
    points: Tensor, valid: Tensor, k: int, generator: torch.Generator, rule: str = "random"
) -> Tensor:
    """k points of every class to start from, ``(C, k, d)``: different ones at random, or spread out by k-means++.

    The generator lives on the CPU, so that a GPU starts from the same points.
    """
    if rule == "random":
        return take(points, random_columns(valid, k, generator))
    if rule != "k-means++":
        raise unknown("start of k-means", rule, STARTS)
    draws = torch.rand(k, len(points), 1, generator=generator).to(points)
    weight = valid.to(
        points.dtype
    )  # first uniformly, then by the squared distance to the nearest point so far
    chosen = []
    for u in draws:
        total = weight.cumsum(1)
        at = torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=valid.shape[1] - 1)
        at = torch.where(
            valid.gather(1, at), at, torch.zeros_like(at)
        )  # duplicates only: no distance is left
        chosen.append(take(points, at))
        nearest = (points - chosen[-1]).square().sum(2).masked_fill(~valid, 0.0)
        weight = nearest if len(chosen) == 1 else torch.minimum(weight, nearest)
    return torch.cat(chosen, 1)


def random_columns(valid: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k different existing columns of every row, uniformly, ``(C, k)``; the generator lives on the CPU."""
    columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    return draw(columns.masked_fill(~valid, -1), k, generator)


def nearest(points: Tensor, valid: Tensor, centroids: Tensor, count: int = 1) -> Tensor:
    """Columns of the ``count`` points nearest to each centroid, ``(C, k * count)``, centroid by centroid."""
    exact = "donot_use_mm_for_euclid_dist"  # a point at its centroid has distance 0, not a rounding error
    distance = torch.cdist(centroids, points, compute_mode=exact).masked_fill(~valid[:, None], torch.inf)
    return distance.topk(count, 2, largest=False).indices.flatten(1)


def take(points: Tensor, columns: Tensor) -> Tensor:
    """``points[c, columns[c]]``, ``(C, k, d)``."""
    return points.gather(1, columns[:, :, None].expand(-1, -1, points.shape[2]))


def _sklearn(points: Tensor, valid: Tensor, start: Tensor, iterations: int, tolerance: float) -> Tensor:
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    found = []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters
        for x, rows, first in zip(points.cpu(), valid.cpu(), start.cpu(), strict=True):
            model = KMeans(len(first), init=first.numpy(), n_init=1, max_iter=iterations, tol=tolerance)
            found.append(torch.from_numpy(model.fit(x[rows].numpy()).cluster_centers_))
    return torch.stack(found).to(start)


def _lloyd(points: Tensor, valid: Tensor, start: Tensor, iterations: int, tolerance: float) -> Tensor:
    count = valid.sum(1)[:, None]
    mean = points.masked_fill(~valid[:, :, None], 0.0).sum(1, keepdim=True) / count[:, :, None]
    points, centroids = (points - mean).masked_fill(~valid[:, :, None], 0.0), start - mean
    limit = tolerance * (points.square().sum(1) / count).mean(1)
    labels, moving = None, torch.ones(len(points), dtype=torch.bool, device=points.device)
    for _ in range(iterations):
        distance, before = torch.cdist(points, centroids).square(), labels
        labels = _fill_empty(*distance.min(2)[::-1], valid, centroids.shape[1])
        updated = _means(points, labels, valid, centroids)
        shift = (updated - centroids).square().sum((1, 2))
        centroids = torch.where(moving[:, None, None], updated, centroids)
        moving = moving & (shift > limit)
        if before is not None:
            moving = moving & (labels != before).any(1)
        if not bool(moving.any()):
            break
    return centroids + mean


def _fill_empty(labels: Tensor, distance: Tensor, valid: Tensor, k: int) -> Tensor:
    """Labels with every empty cluster given the point that is farthest from its centroid (the second one the next, ...)."""
    hot = torch.zeros(*labels.shape[:1], k, device=labels.device).scatter_add_(1, labels, valid.float())
    empty = hot == 0
    if not bool(empty.any()):
        return labels
    farthest = distance.masked_fill(~valid, -1.0).argsort(1, descending=True)[:, :k]  # (C, k)
    order = empty.long().argsort(dim=1, descending=True, stable=True)  # the empty clusters first
    used = torch.arange(k, device=labels.device) < empty.sum(1, keepdim=True)
    return labels.scatter(1, farthest, torch.where(used, order, labels.gather(1, farthest)))


def _means(points: Tensor, labels: Tensor, valid: Tensor, centroids: Tensor) -> Tensor:
    """The mean of every cluster; a cluster without points stays where it is."""
    weight = valid.to(points.dtype)
    size = torch.zeros_like(centroids[:, :, 0]).scatter_add_(1, labels, weight)[:, :, None]
    total = torch.zeros_like(centroids).scatter_add_(1, labels[:, :, None].expand_as(points), points)
    return torch.where(size > 0, total / size.clamp(min=1), centroids)


guard(globals(), finite=True)
