r"""Real images as the synthetic set: the baselines of every table. They have no steps.

``RandomReal`` draws uniformly; ``Herding`` and ``KCenter`` choose in a feature space, class by class: by default the embedding of
a proxy network trained on the full data (10 epochs, SGD 0.1 with Nesterov momentum 0.9, weight decay 5e-4, constant rate, as in
DeepCore, arXiv 2204.08499).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.cache import digest, stored
from lib.errors import unknown
from lib.methods.pixels import pixel_set
from lib.nets.ensemble import Ensemble
from lib.select.greedy import herding, k_center
from lib.sources import code_digest
from lib.synset import SyntheticSet
from lib.train import predict_embeddings, sgd_steps

FEATURES = ("proxy", "random", "pixels")


@dataclass(frozen=True)
class RandomReal:
    """Uniformly drawn real images, without replacement."""

    def total_steps(self, ipc: int) -> int:
        return 0

    def begin(self, train, ipc: int, generator: torch.Generator) -> SyntheticSet:
        return self._set(train, train.indices(ipc, generator).flatten(), ipc)

    def finish(self, state: SyntheticSet) -> SyntheticSet:
        return state

    @staticmethod
    def _set(train, indices: Tensor, ipc: int) -> SyntheticSet:
        chosen = pixel_set(train.images[indices], train, ipc)
        chosen.indices = indices
        return chosen


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
        return self._set(train, torch.cat(picks), ipc)

    def pick(self, points: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
        """Positions among the points ``(n, d)`` of one class."""
        return herding(points, ipc, self.rule)


@dataclass(frozen=True)
class KCenter(Herding):
    """Farthest-first picks from a random first one (Sener & Savarese, ICLR 2018)."""

    def pick(self, points: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
        first = torch.randint(len(points), (), generator=generator, device=points.device)
        return k_center(points, ipc, int(first))


def class_rows(train) -> list[Tensor]:
    """Positions of the images of every class."""
    return [(train.labels == c).nonzero().flatten() for c in range(train.num_classes)]


def embeddings(train, kind: str, network: str, epochs: int, generator: torch.Generator) -> Tensor:
    """Features ``(N, d)`` of all training images: of a trained proxy (cached), an untrained network, or the pixels."""
    if kind == "pixels":
        return train.images.flatten(1)
    if kind not in FEATURES:
        raise unknown("features", kind, FEATURES)
    key = digest(kind, network, epochs, train.fingerprint, generator.get_state().cpu(), code_digest(__name__))

    def compute() -> dict[str, Tensor]:
        proxy = Ensemble.make(network, train, [generator])
        if kind == "proxy":
            images, labels = train.images.unsqueeze(0), train.labels.unsqueeze(0)
            options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "batch": 128}
            sgd_steps(proxy, images, labels, [generator], epochs=epochs, **options)
        return {"embedding": predict_embeddings(proxy, train.images)[0], "generator": generator.get_state()}

    found = stored(f"embedding-{key}", compute)
    generator.set_state(
        found["generator"]
    )  # the draws that follow do not depend on whether the cache was warm
    return found["embedding"].to(train.device)


_SMALL = {"digits": "convnet-d2-w32", "photos16": "convnet-d3-w32", "photos32": "convnet-d3-w32"}
RANDOM = RandomReal()
HERDING = {name: Herding(network=network) for name, network in _SMALL.items()} | {"paper": Herding()}
K_CENTER = {name: KCenter(network=network) for name, network in _SMALL.items()} | {"paper": KCenter()}
