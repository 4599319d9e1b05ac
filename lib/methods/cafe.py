r"""CAFE - Learning to Condense Dataset by Aligning Features. Wang, Zhao et al., CVPR 2022, arXiv 2203.01531.

$$\min_{\mathcal S}\ \mathbb E_\theta\ \sum_c\Big[\sum_l w_l\,\lVert\bar f_l(x_c)-\bar f_l(s_c)\rVert_2^2
 + \lVert\bar\psi(x_c)-\bar\psi(s_c)\rVert_2^2\Big]
 - \beta\sum_i\log\operatorname{softmax}\big(\langle\psi(x_i),\bar\psi(s_k)\rangle_k\big)_{y_i}$$

$\bar f_l$ are class means of the maps after ReLU 1, 2, ... (before pooling) and after the last pooling; $\psi$ is the last of
these flattened, so the embedding counts $w_L + 1$ times. It is DM's distance at every layer, plus a *discrimination* term: the
class means of S, as a linear classifier, should recognise real images.

A step here is one network's life, a loop in a loop ("dynamic bi-level"). After every update of the images the accuracy of the
network on real query images is taken; when its last ``window`` values differ by less than ``saturated`` ($\lambda_1$) the network
is used up. Otherwise it is trained on S until the query accuracy moved by more than ``moved`` ($\lambda_2$) within a window.

Paper and code: the code *sums* the cross-entropy over the real batch with weight 0.01, the paper writes the *mean*; both by name.
Neither loop of the code has a bound, and a set too poor to move the network keeps it for ever; ours have, and the history says
how often they were met. The code's accuracies are not reset between two looks, so that each holds a C-th of the one before
(``legacy``). The code adds the network's own cross-entropy on real images, which has no gradient on S: left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.augment import families
from lib.match.distance import Distance
from lib.match.features import ClassMean, Discrimination, LayerMeans
from lib.methods import dm
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict, sgd_steps
from lib.recipes import Recipes, published, small
from lib.synset import class_major
from lib.system.errors import choose, whole

SCHEDULES = ("dynamic", "fixed")
# the pixels' rate is halved at these parts of the run: 1200, 1600 and 1800 of 2000
RATE_DROPS = (0.6, 0.8, 0.9)


@dataclass
class State(dm.State):
    done: int = 0  # networks used up


@dataclass(frozen=True)
class CAFE(dm.DM):
    r"""Hyper-parameters of the published script (CIFAR-10; it has no others). CAFE+DSA: ``augmentation="data"``.

    The other fields are DM's.

    Attributes:
        iterations: networks; max_outer: image updates per network, max_inner: epochs on S between two of them, both 1 or more and ours.
        distance: the published sum, in which the embedding counts $w_L+1$ times.
        query: real training images per class whose accuracy tells when a loop ends.
        schedule: "dynamic", by queries; "fixed": max_outer updates, max_inner epochs between two of them, no queries.
        window: query accuracies that are compared, 1 or more; saturated: $\lambda_1$: the outer loop ends below this range of them;
            moved: $\lambda_2$: the inner loop ends above it.
        legacy: as the published code, which adds to each accuracy the one before, divided by the number of queries.
        lr_network, network_batch: of the training of networks on S.
    """

    iterations: int = 2000
    lr: float = 0.1
    init: str = "noise"
    augmentation: str = "none"
    distance: Distance = ClassMean() + LayerMeans() + Discrimination()
    schedule: str = "dynamic"
    window: int = 10
    saturated: float = 0.04
    moved: float = 0.03
    max_outer: int = 50
    max_inner: int = 50
    query: int = 128
    legacy: bool = False
    lr_network: float = 0.01
    network_batch: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("schedule", self.schedule, dict.fromkeys(SCHEDULES))
        whole(self, window=1, max_outer=1, max_inner=1, query=1)

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        return State(**vars(super().begin(train, ipc, generator)))

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """The life of one network."""
        drops = sum(state.done >= part * self.iterations for part in RATE_DROPS)
        state.optimiser.param_groups[0]["lr"] = self.lr * 0.5**drops
        network = self.networks.draw(state.supply, generator)
        updates, outer, inner = [], [], []

        for t in range(self.max_outer):
            if t:
                inner.append(self.train_network(network, state, generator))
            updates.append(self.match(state, network.train(), generator))
            outer.append(self.accuracy(network, state, outer, generator))
            if spread(outer, self.window) < self.saturated:
                break

        state.done += 1
        return self.metrics(updates, outer, inner, state.pixels.device)

    def train_network(
        self, network: torch.nn.Module, state: State, generator: torch.Generator
    ) -> list[float]:
        """The inner loop: epochs of SGD on the current S; the query accuracy after each."""
        images = state.pixels.detach()
        labels = class_major(state.train.num_classes, state.ipc, images.device)
        strategy = "_".join(families(self.augmentation, state.train)) or "none"
        options = {"epochs": 1, "lr": self.lr_network, "batch": self.network_batch, "augmentation": strategy}
        trace: list[float] = []
        while len(trace) < self.max_inner and not spread(trace, self.window) > self.moved:
            sgd_steps(shared(network), images.unsqueeze(0), labels.unsqueeze(0), [generator], **options)
            trace.append(self.accuracy(network, state, trace, generator))
        return trace

    def accuracy(
        self, network: torch.nn.Module, state: State, before: Sequence[float], generator: torch.Generator
    ) -> float:
        """Accuracy on fresh real images, in one batch; nan where nobody asks: no loop ends by it."""
        if self.schedule == "fixed":
            return math.nan
        query = state.train.sample(min(self.query, state.train.smallest_class), generator)
        labels = class_major(*query.shape[:2], query.device)
        found = (predict(shared(network), query.flatten(0, 1))[0].argmax(1) == labels).double().mean().item()
        return found + before[-1] / len(query) if self.legacy and before else found

    def metrics(
        self, updates: list[dict], outer: list[float], inner: list[list[float]], device
    ) -> dict[str, Tensor]:
        """Losses as means over the life; numbers of updates and epochs; bounds met; accuracies, padded with -1."""
        found = {name: torch.stack([one[name] for one in updates]).mean(0) for name in updates[0]}
        looked, w = self.schedule == "dynamic", self.window
        counts = {
            "outer": len(outer),
            "inner": sum(map(len, inner)),
            "outer_bound": looked and not spread(outer, w) < self.saturated,
            "inner_bound": looked * sum(not spread(one, w) > self.moved for one in inner),
        }
        found |= {name: torch.tensor(float(count), device=device) for name, count in counts.items()}
        traces = [outer, *inner] + [[]] * (self.max_outer - len(inner))
        table = torch.full((1 + self.max_outer, max(self.max_outer, self.max_inner)), -1.0)
        for row, trace in zip(table, traces, strict=True):
            row[: len(trace)] = torch.tensor(trace).nan_to_num(-1.0)
        outer_trace, inner_trace = table[0, : self.max_outer], table[1:, : self.max_inner]
        return found | {"outer_trace": outer_trace, "inner_trace": inner_trace}


def spread(trace: Sequence[float], window: int) -> float:
    """Largest minus smallest of the last ``window`` values; nan, which no bound contains, until there are so many."""
    last = trace[-window:]
    return max(last) - min(last) if len(last) == window else math.nan


def shared(network: torch.nn.Module) -> Ensemble:
    """An ensemble of one that *is* this network: its tensors are views of the network's, so that training reaches both."""
    parameters = {name: p.detach().unsqueeze(0).requires_grad_() for name, p in network.named_parameters()}
    return Ensemble(network, parameters, {name: b.unsqueeze(0) for name, b in network.named_buffers()})


_SMALL = CAFE(
    iterations=4, real_batch=64, network="convnet-d2-w32", window=5, max_outer=15, max_inner=15, query=20
)
_FASHION = replace(
    _SMALL, iterations=3, real_batch=32, network="convnet-d3-w32", init="real", max_outer=10, max_inner=10
)
_PHOTOS = replace(
    _SMALL, iterations=3, real_batch=32, network="convnet-d3-w32", init="real", max_outer=8, max_inner=8
)
_SCRIPT = "published script, which is CIFAR-10's; no other setting is published"
RECIPES = Recipes(
    small("digits", _SMALL),
    small("fashion14", _FASHION),
    small("photos16 photos32", _PHOTOS),
    small("digits", replace(_SMALL, iterations=2, augmentation="data"), "cpu-small-dsa", variant="DSA"),
    small("fashion14", replace(_FASHION, iterations=2, augmentation="data"), "cpu-small-dsa", variant="DSA"),
    small(
        "photos16 photos32",
        replace(_PHOTOS, iterations=2, augmentation="data"),
        "cpu-small-dsa",
        variant="DSA",
    ),
    published("fashionmnist cifar10 cifar100", (1, 10, 50), CAFE(), "cafe", _SCRIPT),
    published(
        "fashionmnist cifar10 cifar100", (1, 10, 50), CAFE(augmentation="data"), "dsa", _SCRIPT, variant="DSA"
    ),
)
