"""The rules of :class:`lib.methods.selection.Coreset`, by name: what of a proxy they look at, and what they do with it.

A rule is a function of the settings p, the trained proxies, the positions to choose among, how many, and random numbers; it
returns positions among the rows in the order of picking, and weights where it has them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib.select import greedy, scores, similarity, submodular
from lib.select.gradmatch import orthogonal_matching
from lib.select.proxy import Trained

Choice = tuple[Tensor, Tensor | None]  # positions in the order of picking, and their weights


def _contextual_diversity(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    first = int(torch.randint(len(rows), (), generator=generator, device=rows.device))
    return greedy.contextual_diversity(proxies[0].last.logits[rows], budget, first), None


def _uncertainty(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    logits = proxies[0].last.logits[rows]
    if p.rule == "least_confidence":
        values = scores.confidence(logits, p.variant)
    else:
        values = scores.negative_entropy(logits) if p.rule == "entropy" else scores.margin(logits)
    certain = p.variant == "deepcore" and not p.balanced  # its unbalanced branch sorts the other way round
    return scores.best(values, budget, largest=certain), None


def _forgetting(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    values = scores.forgetting(proxies[0].correct[:, rows], p.variant)
    if p.variant == "deepcore":  # it reverses an ascending sort, and with it the order of ties
        return len(rows) - 1 - scores.best(values.flip(0), budget), None
    return scores.best(values, budget), None


def _error_norm(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    everything = torch.arange(len(proxies[0].train), device=rows.device)
    score = scores.grand if p.rule == "grand" else scores.el2n
    total = sum(score(p.gradients(trained, everything)) for trained in proxies)
    return scores.best(total[rows] / len(proxies), budget), None


def _cal(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    last = proxies[0].last[rows]
    values = scores.cal(last.logits, scores.neighbours(last.embeddings, min(p.neighbours, len(rows) - 1)))
    return scores.best(values, budget, largest=p.variant == "paper"), None


def _deepfool(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    values = scores.deepfool(proxies[0].network, proxies[0].train.images[rows], p.iterations)
    return scores.best(values, budget, largest=False), None


def _craig(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    distance = similarity.euclidean(p.gradients(proxies[0], rows).gram(), floor=1e-6)
    kernel = similarity.flipped(distance)
    order = p.greedily(submodular.FacilityLocation(kernel), budget, generator)
    return order, submodular.cluster_sizes(kernel, order, p.variant)


def _gradmatch(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    last = p.gradients(proxies[0], rows)
    return orthogonal_matching(last.gram(), last.project(last.mean()), budget, p.ridge).kept()


def _glister(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    refresh = p.refresh if p.variant == "paper" else 0
    return scores.glister(p.gradients(proxies[0], rows), budget, eta=p.eta, refresh=refresh), None


def _cosine_function(p, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    kernel = similarity.cosine(p.gradients(proxies[0], rows).gram())
    if p.rule == "log_det":
        function = submodular.LogDet(kernel, p.variant)
    else:
        kinds = {"facility_location": submodular.FacilityLocation, "graph_cut": submodular.GraphCut}
        function = kinds[p.rule](kernel)
    return p.greedily(function, budget, generator), None


RULES: dict[str, Callable[..., Choice]] = {
    "contextual_diversity": _contextual_diversity,
    "least_confidence": _uncertainty,
    "entropy": _uncertainty,
    "margin": _uncertainty,
    "forgetting": _forgetting,
    "grand": _error_norm,
    "el2n": _error_norm,
    "cal": _cal,
    "deepfool": _deepfool,
    "craig": _craig,
    "gradmatch": _gradmatch,
    "glister": _glister,
    "facility_location": _cosine_function,
    "graph_cut": _cosine_function,
    "log_det": _cosine_function,
}
