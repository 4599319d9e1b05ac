r"""Real images as the synthetic set: the baselines of every table. They have no steps.

``RandomReal`` draws uniformly; ``Herding`` and ``KCenter`` choose in a feature space, class by class: by default the embedding of
a proxy network trained on the full data (10 epochs, SGD 0.1 with Nesterov momentum 0.9, weight decay 5e-4, constant rate, as in
DeepCore, arXiv 2204.08499).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.nets.ensemble import Ensemble
from lib.nets.training import predict_embeddings
from lib.select.greedy import herding, k_center
from lib.select.proxy import Proxy, train_proxy
from lib.synset import SyntheticSet
from lib.system.errors import unknown

FEATURES = ("proxy", "random", "pixels")


@dataclass(frozen=True)
class RandomReal:
    """Uniformly drawn real images, without replacement."""

    def total_steps(self, ipc: int) -> int:
        return 0

    def begin(self, train, ipc: int, generator: torch.Generator) -> SyntheticSet:
        return real_set(train, train.indices(ipc, generator).flatten())

    def finish(self, state: SyntheticSet) -> SyntheticSet:
        return state


@dataclass(frozen=True)
class Herding(RandomReal):
    """Greedy picks whose mean embedding follows the class mean (Welling 2009; ``rule`` as in ``lib.select.greedy.herding``)."""

    rule: str = "icarl"
    features: str = "proxy"  # or "random" (an untrained network), or "pixels"
    network: str = "convnet-d3-w128"
    proxy_epochs: int = 10

    def begin(self, train, ipc: int, generator: torch.Generator) -> SyntheticSet:
        points = embeddings(train, self.features, self.network, self.proxy_epochs, generator)
        picks = [rows[self.pick(points[rows], ipc, generator)] for rows in class_rows(train)]
        return real_set(train, torch.cat(picks))

    def pick(self, points: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
        """Positions among the points ``(n, d)`` of one class."""
        return herding(points, ipc, self.rule)


@dataclass(frozen=True)
class KCenter(Herding):
    """Farthest-first picks from a random first one (Sener & Savarese, ICLR 2018)."""

    def pick(self, points: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
        first = torch.randint(len(points), (), generator=generator, device=points.device)
        return k_center(points, ipc, int(first))


def real_set(train, indices: Tensor, weights: Tensor | None = None) -> SyntheticSet:
    """Real images as a synthetic set, with their positions and weights."""
    return SyntheticSet(
        train.images[indices].clone(),
        train.labels[indices],
        train.classes,
        train.transform,
        weights=weights,
        indices=indices,
    )


def class_rows(train) -> list[Tensor]:
    """Positions of the images of every class."""
    return [(train.labels == c).nonzero().flatten() for c in range(train.num_classes)]


def embeddings(train, kind: str, network: str, epochs: int, generator: torch.Generator) -> Tensor:
    """Features ``(N, d)`` of all training images: of a trained proxy (cached), an untrained network, or the pixels."""
    if kind == "proxy":
        return train_proxy(Proxy(network, epochs), train, generator).last.embeddings
    if kind == "random":
        return predict_embeddings(Ensemble.make(network, train, [generator]), train.images)[0]
    if kind == "pixels":
        return train.images.flatten(1)
    raise unknown("features", kind, FEATURES)


_SMALL = {"digits": "convnet-d2-w32", "photos16": "convnet-d3-w32", "photos32": "convnet-d3-w32"}
RANDOM = RandomReal()
HERDING = {name: Herding(network=network) for name, network in _SMALL.items()} | {"paper": Herding()}
K_CENTER = {name: KCenter(network=network) for name, network in _SMALL.items()} | {"paper": KCenter()}
