r"""Coresets: real images chosen by what a proxy network makes of them. They have no steps.

The selectors that DeepCore collects (Guo, Zhao & Bai, DEXA 2022, arXiv 2204.08499), each by its name in :data:`RULES`: scores
(the best images of every class), farthest-first traversals, matching pursuit, Glister, and greedy maximisation of a set function
of last-layer gradients $g_i=[e;\ \mathrm{vec}(e\,h^\top)]$, $e=p-y$. The rules themselves are in ``lib.select``.

Paper and code: ``variant="paper"`` follows the papers; ``variant="deepcore"`` is what the published library does where it
differs: gradients of batch *means* (the short last batch weighs more), CRAIG's weights plus 1, Glister's direction never updated,
the least divergent images for CAL, outliers for herding, redundant images for log-det, logits for least confidence, the most
*certain* images where classes are not balanced, never-learned images last for Forgetting. The library looks at images through a
pretrained ResNet for k-center and CAL; here it is the proxy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lib.methods.selection import class_rows, real_set
from lib.select import greedy, scores, similarity, submodular
from lib.select.gradmatch import orthogonal_matching
from lib.select.last_layer import LastLayer, batch_scale
from lib.select.proxy import Proxy, Trained, train_proxy
from lib.synset import SyntheticSet
from lib.system.errors import choose, unknown

Choice = tuple[Tensor, Tensor | None]  # positions in the order of picking, and their weights


@dataclass(frozen=True)
class ProxySelection(ABC):
    """What selections by a proxy share: train it, choose within every class, hand back the images with their positions."""

    proxy: Proxy = field(default_factory=Proxy)
    balanced: bool = True  # choose within every class; False: among all images at once
    fraction: float | None = None  # of the images, in (0, 1], instead of images per class
    optimiser: str = "lazy"  # of set functions; lib.select.submodular.OPTIMISERS
    epsilon: float = 0.1  # of the stochastic optimiser; DeepCore's 0.9 is nearly a random choice
    variant: str = "paper"

    VARIANTS: ClassVar = scores.VARIANTS

    def total_steps(self, ipc: int) -> int:
        return 0

    def begin(self, train, ipc: int, generator: torch.Generator) -> SyntheticSet:
        if self.variant not in self.VARIANTS:
            raise unknown("variant", self.variant, self.VARIANTS)
        groups = self.groups(train, ipc)
        proxies = self.proxies(train, generator)
        picks, weights = [], []
        for rows, budget in groups:
            order, weight = self.pick(proxies, rows, budget, generator)
            picks.append(rows[order])
            weights.append(weight)
        weighted = None if weights[0] is None else torch.cat(weights).float()
        return real_set(train, torch.cat(picks), weighted)

    def finish(self, state: SyntheticSet) -> SyntheticSet:
        return state

    def proxies(self, train, generator: torch.Generator) -> list[Trained]:
        """The trained networks that the rule looks at."""
        return [train_proxy(self.proxy, train, generator)]

    def groups(self, train, ipc: int) -> list[tuple[Tensor, int]]:
        """Positions to choose among, and how many: per class, or all together."""
        if self.balanced:
            rows = class_rows(train)
        else:
            rows = [torch.arange(len(train), device=train.device)]
        counts = [len(part) for part in rows]
        budgets = [ipc * train.num_classes // len(rows)] * len(rows)
        if self.fraction is not None:
            budgets = scores.class_budgets(counts, self.fraction)
        for count, budget in zip(counts, budgets, strict=True):
            greedy.check_budget(budget, count)
        return list(zip(rows, budgets, strict=True))

    @abstractmethod
    def pick(self, proxies: list[Trained], rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        """Positions among ``rows``, and weights where the rule has them."""

    def gradients(self, trained: Trained, rows: Tensor) -> LastLayer:
        """Last-layer gradients of these images; in a published variant, of the means of consecutive batches."""
        last = trained.last[rows]
        if self.variant == "paper":
            return last
        return replace(last, scale=batch_scale(len(rows), self.proxy.batch).to(last.logits))

    def greedily(self, function: submodular.SetFunction, budget: int, generator: torch.Generator) -> Tensor:
        return submodular.maximise(function, budget, self.optimiser, generator, self.epsilon).order


@dataclass(frozen=True)
class Coreset(ProxySelection):
    """A selection by the rule of that name; budgets and defaults as in DeepCore's published commands."""

    rule: str = "craig"
    weighted: bool = True  # keep the weights of CRAIG and GradMatch
    repeats: int = 10  # proxies that GraNd and EL2N average over
    neighbours: int = 10  # of CAL
    iterations: int = 50  # of DeepFool
    ridge: float = 1.0  # of GradMatch
    eta: float = 0.1  # Glister's learning rate
    refresh: int = 1  # picks between two updates of Glister's direction

    def begin(self, train, ipc: int, generator: torch.Generator) -> SyntheticSet:
        choose("rule", self.rule, RULES)
        return super().begin(train, ipc, generator)

    def proxies(self, train, generator: torch.Generator) -> list[Trained]:
        counts = {"uniform": 0, "grand": self.repeats, "el2n": self.repeats}
        return [train_proxy(self.proxy, train, generator) for _ in range(counts.get(self.rule, 1))]

    def pick(self, proxies: list[Trained], rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        order, weights = RULES[self.rule](self, proxies, rows, budget, generator)
        return order, weights if self.weighted else None


# Rules: (method, proxies, rows, budget, generator) -> positions among the rows and weights --------------------------------


def _uniform(method: Coreset, proxies, rows: Tensor, budget: int, generator) -> Choice:
    return torch.randperm(len(rows), generator=generator, device=rows.device)[:budget], None


def _herding(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    rule = "icarl" if method.variant == "paper" else "deepcore"
    return greedy.herding(proxies[0].last.embeddings[rows], budget, rule), None


def _farthest_first(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    first = int(torch.randint(len(rows), (), generator=generator, device=rows.device))
    if method.rule == "k_center":
        return greedy.k_center(proxies[0].last.embeddings[rows], budget, first), None
    return greedy.contextual_diversity(proxies[0].last.logits[rows], budget, first), None


def _uncertainty(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    logits = proxies[0].last.logits[rows]
    if method.rule == "least_confidence":
        values = scores.confidence(logits, method.variant)
    else:
        values = scores.negative_entropy(logits) if method.rule == "entropy" else scores.margin(logits)
    certain = (
        method.variant == "deepcore" and not method.balanced
    )  # its unbalanced branch sorts the other way round
    return scores.best(values, budget, largest=certain), None


def _forgetting(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    values = scores.forgetting(proxies[0].correct[:, rows], method.variant)
    if method.variant == "deepcore":  # it reverses an ascending sort, and with it the order of ties
        return len(rows) - 1 - scores.best(values.flip(0), budget), None
    return scores.best(values, budget), None


def _error_norm(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    everything = torch.arange(len(proxies[0].train), device=rows.device)
    score = scores.grand if method.rule == "grand" else scores.el2n
    total = sum(score(method.gradients(trained, everything)) for trained in proxies)
    return scores.best(total[rows] / len(proxies), budget), None


def _cal(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    last = proxies[0].last[rows]
    values = scores.cal(last.logits, scores.neighbours(last.embeddings, method.neighbours))
    return scores.best(values, budget, largest=method.variant == "paper"), None


def _deepfool(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    values = scores.deepfool(proxies[0].network, proxies[0].train.images[rows], method.iterations)
    return scores.best(values, budget, largest=False), None


def _craig(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    distance = similarity.euclidean(method.gradients(proxies[0], rows).gram(), floor=1e-6)
    kernel = similarity.flipped(distance)
    order = method.greedily(submodular.FacilityLocation(kernel), budget, generator)
    return order, submodular.cluster_sizes(kernel, order, method.variant)


def _gradmatch(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    last = method.gradients(proxies[0], rows)
    return orthogonal_matching(last.gram(), last.project(last.mean()), budget, method.ridge).kept()


def _glister(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    refresh = method.refresh if method.variant == "paper" else 0
    return scores.glister(method.gradients(proxies[0], rows), budget, eta=method.eta, refresh=refresh), None


def _cosine_function(method: Coreset, proxies: list[Trained], rows: Tensor, budget: int, generator) -> Choice:
    kernel = similarity.cosine(method.gradients(proxies[0], rows).gram())
    if method.rule == "log_det":
        function = submodular.LogDet(kernel, method.variant)
    else:
        kinds = {"facility_location": submodular.FacilityLocation, "graph_cut": submodular.GraphCut}
        function = kinds[method.rule](kernel)
    return method.greedily(function, budget, generator), None


RULES: dict[str, Callable[..., Choice]] = {
    "uniform": _uniform,
    "herding": _herding,
    "k_center": _farthest_first,
    "contextual_diversity": _farthest_first,
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

SMALL_PROXIES = {
    "digits": Proxy(network="mlp"),
    "photos16": Proxy(network="convnet-d3-w32", epochs=5),
    "photos32": Proxy(network="convnet-d3-w32", epochs=5),
}
PRESETS = {name: Coreset(proxy=proxy, repeats=3, iterations=10) for name, proxy in SMALL_PROXIES.items()} | {
    "paper": Coreset(),
    "paper-resnet18": Coreset(proxy=Proxy(network="resnet18-batch")),  # the published network
}
