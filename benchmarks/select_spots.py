"""Gradient-based selectors on random last-layer features, each beside a plain one that writes everything out.

``python -m benchmarks.select_spots`` selects 10 % of 50 000 features of width 512 in 10 classes, every selector in a process of
its own, and prints seconds and peak memory as a table (kept in ``benchmarks/selection.md``); the targets are 60 s and 4 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import REFERENCE, HotSpot
from benchmarks.hot_spots import Setting
from lib.select import scores, similarity, submodular
from lib.select.gradmatch import orthogonal_matching
from lib.select.last_layer import LastLayer
from lib.select.pair_cost import curvature_coordinates, diagonal_hessian_at, pair_cost
from lib.system.files import ROOT
from lib.system.measure import Meter

FRACTION, WIDTH, EPS, COORDINATES = 0.1, 512, 0.01, 100
TARGET_SECONDS, TARGET_BYTES = 60, 4e9


def features(
    classes: int, per_class: int, width: int = WIDTH, device="cpu", dtype: torch.dtype = torch.float32
) -> list[LastLayer]:
    """What a trained last layer might see: one group of samples per class, logits in favour of that class."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(width, classes, generator=g) / width**0.5
    groups = []
    for c in range(classes):
        h = torch.randn(per_class, width, generator=g).relu()
        logits = 3 * h @ weight
        logits[:, c] += 2
        labels = torch.full((per_class,), c)
        groups.append(LastLayer(logits.to(device, dtype), h.to(device, dtype), labels.to(device)))
    return groups


# Ours: (samples of one class, budget) -> positions ----------------------------------------------------------------------


def craig(last: LastLayer, budget: int) -> Tensor:
    return _located(similarity.flipped(similarity.euclidean(last.gram(), floor=1e-6)), budget)


def lcmat(last: LastLayer, budget: int) -> Tensor:
    return _located(
        similarity.flipped(pair_cost(last, EPS, curvature_coordinates(last, COORDINATES))), budget
    )


def facility_location(last: LastLayer, budget: int) -> Tensor:
    return _located(similarity.cosine(last.gram()), budget)


def graph_cut(last: LastLayer, budget: int) -> Tensor:
    return submodular.lazy(submodular.GraphCut(similarity.cosine(last.gram())), budget).order


def log_det(last: LastLayer, budget: int) -> Tensor:
    return submodular.lazy(submodular.LogDet(similarity.cosine(last.gram())), budget).order


def gradmatch(last: LastLayer, budget: int) -> Tensor:
    return orthogonal_matching(last.gram(), last.project(last.mean()), budget).order


def glister(last: LastLayer, budget: int) -> Tensor:
    return scores.glister(last, budget)


def grand(last: LastLayer, budget: int) -> Tensor:
    return scores.best(scores.grand(last), budget)


def _located(kernel: similarity.Pairwise, budget: int) -> Tensor:
    return submodular.lazy(submodular.FacilityLocation(kernel), budget).order


# Plain: all gradients and the whole similarity matrix written out, every gain computed at every step -----------------------


def plain_located(matrix: Tensor, budget: int) -> Tensor:
    nearest, order = matrix.new_zeros(len(matrix)), []
    for _ in range(budget):
        gains = (matrix - nearest[:, None]).clamp_min(0).sum(0)
        gains[order] = -torch.inf
        order.append(int(gains.argmax()))
        nearest = torch.maximum(nearest, matrix[:, order[-1]])
    return torch.tensor(order)


def plain_craig(last: LastLayer, budget: int) -> Tensor:
    distance = torch.cdist(last.gradients(), last.gradients())
    return plain_located(distance.max() + 1e-3 - distance, budget)


def plain_lcmat(last: LastLayer, budget: int) -> Tensor:
    g, coordinates = last.gradients(), last.diagonal_hessians().var(0, correction=0).topk(COORDINATES).indices
    curvature = diagonal_hessian_at(last, coordinates)
    cost = torch.cdist(g, g) + EPS * (curvature[:, None] - curvature).abs().sum(2)
    return plain_located(cost.max() + 1e-3 - cost, budget)


def _plain_cosine(last: LastLayer) -> Tensor:
    g = torch.nn.functional.normalize(last.gradients())
    return 0.5 + 0.5 * g @ g.T


def plain_facility_location(last: LastLayer, budget: int) -> Tensor:
    return plain_located(_plain_cosine(last), budget)


def plain_graph_cut(last: LastLayer, budget: int) -> Tensor:
    matrix, order = _plain_cosine(last), []
    for _ in range(budget):
        gains = matrix.sum(0) - 2 * matrix[order].sum(0)
        gains[order] = -torch.inf
        order.append(int(gains.argmax()))
    return torch.tensor(order)


def plain_log_det(last: LastLayer, budget: int) -> Tensor:
    matrix, order = _plain_cosine(last).fill_diagonal_(1), [0]
    for _ in range(budget - 1):
        across = matrix[order]
        schur = 1 - (across * torch.linalg.solve(matrix[order][:, order], across)).sum(0)
        schur[order] = -torch.inf
        order.append(int(schur.argmax()))
    return torch.tensor(order)


def plain_gradmatch(last: LastLayer, budget: int) -> Tensor:
    columns, order = last.gradients().T, []
    target = columns.mean(1)
    residual = target
    for _ in range(budget):
        correlation = columns.T @ residual
        correlation[order] = -torch.inf
        order.append(int(correlation.argmax()))
        a = columns[:, order]
        x = torch.linalg.solve(
            a.T @ a + (len(order) > 1) * torch.eye(len(order), dtype=a.dtype, device=a.device), a.T @ target
        )
        residual = target - a @ x
    return torch.tensor(order)


def plain_glister(last: LastLayer, budget: int) -> Tensor:
    gradients, order = last.gradients(), []
    aim = gradients.mean(0)
    for _ in range(budget):
        gains = gradients @ aim
        gains[order] = -torch.inf
        order.append(int(gains.argmax()))
        step = last.inputs @ last.rows_of(gradients[order].mean(0)).T
        aim = LastLayer(last.logits - 0.1 * step, last.embeddings, last.labels).gradients().mean(0)
    return torch.tensor(order)


def plain_grand(last: LastLayer, budget: int) -> Tensor:
    return last.gradients().norm(dim=1).argsort(descending=True)[:budget]


SELECTORS: dict[str, tuple[Callable, Callable]] = {
    "craig": (craig, plain_craig),
    "facility-location": (facility_location, plain_facility_location),
    "graph-cut": (graph_cut, plain_graph_cut),
    "log-det": (log_det, plain_log_det),
    "gradmatch": (gradmatch, plain_gradmatch),
    "glister": (glister, plain_glister),
    "grand": (grand, plain_grand),
    "lcmat-s": (lcmat, plain_lcmat),
}
AT_SMALL = {
    "S": 145,
    "L": 500,
}  # samples per class that the plain versions can hold: digits; a tenth of CIFAR-10's


def selection(name: str, setting: Setting) -> HotSpot:
    """10 % of every class by one selector; the picks are compared in 64 bits (in 32, rounding decides between near ties)."""
    per_class = AT_SMALL["S" if setting.side < 32 else "L"]
    groups, budget = features(setting.classes, per_class, device=setting.device), round(FRACTION * per_class)
    ours, plain = SELECTORS[name]

    def every(select: Callable, groups: list[LastLayer] = groups) -> list[set[int]]:
        return [set(select(last, budget).tolist()) for last in groups]

    def check() -> dict[str, float]:
        exact = features(setting.classes, per_class, device=setting.device, dtype=torch.float64)
        pairs = zip(every(ours, exact), every(plain, exact), strict=True)
        missed = sum(len(a ^ b) for a, b in pairs) / (2 * budget * len(groups))
        return {candidate: missed}

    candidate = "factors, columns on demand"
    candidates = {REFERENCE: lambda: every(plain), candidate: lambda: every(ours)}
    return HotSpot(f"selection, {name}", "selection", 1, candidates, check, {candidate: 0.0}, most=3)


SELECT_SPOTS = {f"select-{name}": lambda setting, name=name: selection(name, setting) for name in SELECTORS}


def large(name: str, classes: int = 10, per_class: int = 5000) -> dict:
    """Seconds and peak bytes of one selector on all classes, and its targets, in this process."""
    groups, budget = features(classes, per_class), round(FRACTION * per_class)
    start = time.process_time()
    with Meter(torch.device("cpu")) as meter:
        picks = sum(len(SELECTORS[name][0](last, budget)) for last in groups)
    seconds = {"seconds": round(meter.seconds, 2), "cpu_seconds": round(time.process_time() - start, 2)}
    return {"selector": name, "picks": picks, **seconds, "peak_mb": round(meter.peak_bytes / 1e6)}


def main(words: list[str]) -> None:
    if words:
        print(json.dumps(large(words[0])))
        return
    print("# Selecting 10 % of 50 000\n")
    print(
        f"512-d last-layer features, 10 classes, one thread; targets: {TARGET_SECONDS} s, {TARGET_BYTES / 1e9:g} GB"
    )
    print(
        "above the features.\n\n| selector | images | s | processor s | peak MB |\n| --- | --- | --- | --- | --- |"
    )
    for name in SELECTORS:
        command = [sys.executable, "-m", "benchmarks.select_spots", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
        print("|", " | ".join(map(str, json.loads(done.stdout).values())), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
