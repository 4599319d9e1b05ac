"""Which real images a step of matching looks at.

A sampler is a frozen dataclass with ``draw(memory, train, count, generator, embed)``: for every class ``count`` real images,
``(C, count, c, h, w)``. What it keeps between two steps lives in a :class:`Memory`, which is part of the method's state;
``embed`` gives the embeddings ``(n, d)`` of ``(n, c, h, w)`` images in the network of this step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lib.data.imageset import class_table
from lib.select.greedy import herding
from lib.select.kmeans import STARTS, k_means, nearest, random_columns, starting_points
from lib.system.errors import CompanionError, choose, unknown

OWN_STREAM = 0x6B2D6D65616E73  # tells the seed of a sampler's own generator from the main one's
Embed = Callable[[Tensor], Tensor]


@dataclass
class Memory:
    """What a sampler keeps: ``age``, the draws since it began or was last restarted, and named tensors."""

    age: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget the age: the next draw is the first one of a new network."""
        self.age = 0

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age, "tensors": self.tensors}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.age, self.tensors = saved["age"], dict(saved["tensors"])


@dataclass(frozen=True)
class RandomBatches:
    """Uniformly, without replacement within a batch.

    Attributes:
        name: as tables have it.
    """

    name: str = "random"

    def draw(
        self, memory: Memory, train, count: int, generator: torch.Generator, embed: Embed | None = None
    ) -> Tensor:
        return train.sample(count, generator)


@dataclass(frozen=True)
class Representative:
    r"""Representative matching (DREAM, arXiv 2302.14416): the images nearest to the centroids of k-means on all embeddings
    of a class in the current network, one per cluster, computed at every ``every``-th draw of a network and kept in between.

    The clustering draws from a generator of its own, which begins from the seed of the main one; the main one moves on as if
    a random batch had been drawn. So two runs that differ in their samplers alone see the same networks and augmentations.

    Attributes:
        every: draws between two clusterings, I; clusters: per class, None: as many as fill the batch; per_cluster: images nearest to each
            centroid (sub-clusters of DREAM+).
        rule: what is representative: "kmeans"; the others of :data:`RULES` are ablations.
        start: of the centroids, "random" or "k-means++"; warm: start from those of the same network's last clustering: fewer iterations;
            iterations: of k-means, at most.
        backend: of k-means: "sklearn" on a CPU, "torch" for all classes at once on a GPU; "auto" takes the one that suits.
        name: as tables have it.
    """

    every: int = 10
    clusters: int | None = None
    per_cluster: int = 1
    rule: str = "kmeans"
    start: str = "random"
    warm: bool = False
    iterations: int = 100
    backend: str = "auto"
    name: str = "representative"

    def __post_init__(self):
        choose("sampling rule", self.rule, RULES)
        if self.start not in STARTS:
            raise unknown("start of k-means", self.start, STARTS)
        for name in ("every", "per_cluster", "iterations"):
            if getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)} is not allowed: at least 1")

    def draw(
        self, memory: Memory, train, count: int, generator: torch.Generator, embed: Embed | None = None
    ) -> Tensor:
        train.indices(count, generator)  # for the main stream alone
        if memory.age % self.every == 0:
            memory.tensors["indices"] = self.pick(memory, train, count, generator.initial_seed(), embed)
        memory.age += 1
        return train.images[memory.tensors["indices"]]

    def pick(self, memory: Memory, train, count: int, seed: int, embed: Embed) -> Tensor:
        """Positions of the representatives of every class in the network of ``embed``, ``(C, clusters * per_cluster)``."""
        count = self.images_per_class(count, train)
        own = torch.Generator()
        if "generator" in memory.tensors:
            own.set_state(memory.tensors["generator"].cpu())
        else:
            own.manual_seed(seed ^ OWN_STREAM)
        table = class_table(train.labels, train.num_classes)
        with torch.no_grad():
            features = Features(embed(train.images).float()[table.clamp(min=0)], table >= 0)
            columns = RULES[self.rule](self, features, count, own, memory)
        memory.tensors["generator"] = own.get_state()
        return table.gather(1, columns)

    def images_per_class(self, count: int, train) -> int:
        """How many images of a class are drawn where a batch of ``count`` is asked for."""
        clusters = count // self.per_cluster if self.clusters is None else self.clusters
        if not 1 <= clusters * self.per_cluster <= train.smallest_class:
            raise CompanionError(
                f"{clusters} clusters with {self.per_cluster} image(s) each are not allowed: "
                f"the batch and the smallest class have room for 1 to {train.smallest_class // self.per_cluster} clusters"
            )
        return clusters * self.per_cluster


@dataclass
class Features:
    """Embeddings of every class, ``(C, n, d)``, and which rows exist, ``(C, n)``."""

    points: Tensor
    valid: Tensor

    @property
    def means(self) -> Tensor:
        """``(C, 1, d)``."""
        total = self.points.masked_fill(~self.valid[:, :, None], 0.0).sum(1, keepdim=True)
        return total / self.valid.sum(1)[:, None, None]

    def smallest(self, cost: Tensor, count: int) -> Tensor:
        """Columns of the images of smallest cost ``(C, n)``."""
        return cost.masked_fill(~self.valid, torch.inf).topk(count, 1, largest=False).indices


def _kmeans(sampler: Representative, features: Features, count: int, own, memory: Memory) -> Tensor:
    clusters, before = count // sampler.per_cluster, memory.tensors.get("centroids")
    if sampler.warm and memory.age and before is not None:
        start = before.to(features.points)
    else:
        start = starting_points(features.points, features.valid, clusters, own, sampler.start)
    centroids = k_means(features.points, features.valid, start, sampler.iterations, backend=sampler.backend)
    if sampler.warm:
        memory.tensors["centroids"] = centroids
    return nearest(features.points, features.valid, centroids, sampler.per_cluster)


def _random(sampler, features: Features, count: int, own, memory) -> Tensor:
    return random_columns(features.valid, count, own)


def _central(sampler, features: Features, count: int, own, memory) -> Tensor:
    return features.smallest((features.points - features.means).square().sum(2), count)


def _far(sampler, features: Features, count: int, own, memory) -> Tensor:
    return features.smallest(-(features.points - features.means).square().sum(2), count)


def _boundary(sampler, features: Features, count: int, own, memory) -> Tensor:
    """By how much nearer an image is to its own class mean than to that of the next class."""
    distance = torch.cdist(features.points, features.means.transpose(0, 1))  # (C, n, C)
    own_class = torch.eye(len(distance), dtype=torch.bool, device=distance.device)[:, None]
    other = distance.masked_fill(own_class, torch.inf).amin(2)
    return features.smallest(other - distance.masked_fill(~own_class, 0.0).sum(2), count)


def _herding(sampler, features: Features, count: int, own, memory) -> Tensor:
    pairs = zip(features.points, features.valid, strict=True)  # the existing rows of a class come first
    return torch.stack([herding(points[valid], count) for points, valid in pairs])


RULES = {
    "kmeans": _kmeans,  # one image per cluster: even and diverse
    "random": _random,  # a random batch that is kept as long
    "central": _central,  # nearest to the class mean: easy images
    "far": _far,  # farthest from the class mean
    "boundary": _boundary,  # nearest to the mean of another class
    "herding": _herding,  # their running mean follows that of the class
}
