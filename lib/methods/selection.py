r"""Real images as the synthetic set: the baselines of every table, and coresets. They have no steps.

``RandomReal`` draws uniformly. All others look at the images through a proxy network that is trained for a few epochs on the full
data (``lib.select.proxy``), and choose class by class: ``Herding`` and ``KCenter`` in its features $h$, ``Coreset`` by one of the
rules that DeepCore collects (Guo, Zhao & Bai, DEXA 2022, arXiv 2204.08499): scores (the best images of every class),
farthest-first traversals, matching pursuit, Glister, and greedy maximisation of a set function of last-layer gradients
$g_i=[e;\ \mathrm{vec}(e\,h^\top)]$, $e=p-y$. What a rule does with a proxy is in ``lib.select.rules``.

Paper and code: ``variant="paper"`` follows the papers; ``variant="deepcore"`` is what the published library does where it
differs: gradients of batch *means* (the short last batch weighs more), CRAIG's weights plus 1, Glister's direction never updated,
the least divergent images for CAL, redundant images for log-det, logits for least confidence, the most *certain* images where
classes are not balanced, never-learned images last for Forgetting, and outliers for herding (``rule="deepcore"``). The library
looks at images through a pretrained ResNet for k-center and CAL; here it is the proxy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.data.imageset import ImageSet
from lib.recipes import Recipes, published, small, two_cores
from lib.select import greedy, scores, submodular
from lib.select.last_layer import LastLayer, batch_scale
from lib.select.proxy import Proxy, Trained, embeddings, train_proxy
from lib.select.rules import RULES, Choice
from lib.select.subset import groups, real_set
from lib.synset import SyntheticSet
from lib.system.errors import choose, unknown, whole


@dataclass(frozen=True)
class Selection(ABC):
    """What all selections share: look at the data once, choose in every group, hand back the images with their positions.

    Attributes:
        balanced: choose within every class; False: among all images at once.
        fraction: of the images, in (0, 1], instead of images per class.
    """

    balanced: bool = True
    fraction: float | None = None

    def total_steps(self, ipc: int) -> int:
        return 0

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> SyntheticSet:
        parts = groups(train, ipc, self.balanced, self.fraction)
        seen = self.look(train, generator)
        picks, weights = [], []
        for rows, budget in parts:
            order, weight = self.pick(seen, rows, budget, generator)
            picks.append(rows[order])
            weights.append(weight)
        weighted = None if weights[0] is None else torch.cat(weights).float()
        return real_set(train, torch.cat(picks), weighted)

    def finish(self, state: SyntheticSet) -> SyntheticSet:
        return state

    @abstractmethod
    def look(self, train: ImageSet, generator: torch.Generator) -> Any:
        """What the choice is made by, once for all groups."""

    @abstractmethod
    def pick(self, seen: Any, rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        """Positions among ``rows``, and weights where the rule has them."""


@dataclass(frozen=True)
class RandomReal(Selection):
    """Uniformly drawn real images, without replacement. The fields are Selection's."""

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> SyntheticSet:
        if self.balanced and self.fraction is None:  # the draw that distilled images start from
            return real_set(train, train.indices(ipc, generator).flatten())
        return super().begin(train, ipc, generator)

    def look(self, train: ImageSet, generator: torch.Generator) -> None:
        return None

    def pick(self, seen: None, rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        return torch.randperm(len(rows), generator=generator, device=rows.device)[:budget], None


# -- in features ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InFeatures(Selection):
    """A choice among points ``(N, d)``: the features of a trained proxy, of its network untrained, or the pixels.

    The other fields are Selection's.

    Attributes:
        proxy: the network and its training (``lib.select.proxy``).
        features: "proxy"; "random": of the network untrained; or "pixels" (``lib.select.proxy.embeddings``).
    """

    proxy: Proxy = field(default_factory=lambda: Proxy("convnet-d3-w128"))
    features: str = "proxy"

    def look(self, train: ImageSet, generator: torch.Generator) -> Tensor:
        return embeddings(train, self.features, self.proxy, generator)


@dataclass(frozen=True)
class Herding(InFeatures):
    """Greedy picks whose mean feature follows the class mean (Welling 2009; ``rule`` as in ``lib.select.greedy.herding``).

    The other fields are InFeatures'.

    Attributes:
        rule: "icarl", "welling" or "deepcore".
    """

    rule: str = "icarl"

    def pick(self, points: Tensor, rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        return greedy.herding(points[rows], budget, self.rule), None


@dataclass(frozen=True)
class KCenter(InFeatures):
    """Farthest-first picks from a random first one (Sener & Savarese, ICLR 2018). The fields are InFeatures'."""

    def pick(self, points: Tensor, rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        first = torch.randint(len(rows), (), generator=generator, device=rows.device)
        return greedy.k_center(points[rows], budget, int(first)), None


# -- by a proxy's outputs and gradients -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProxySelection(Selection):
    """What selections by the outputs and last-layer gradients of a proxy share. The other fields are Selection's.

    Attributes:
        proxy: the network and its training (``lib.select.proxy``); variant: "paper", or the published code's reading, one of
            ``VARIANTS``.
        optimiser: of set functions, one of ``lib.select.submodular.OPTIMISERS``; epsilon: of the stochastic one (DeepCore's 0.9 is nearly
            a random choice).
    """

    proxy: Proxy = field(default_factory=Proxy)
    optimiser: str = "lazy"
    epsilon: float = 0.1
    variant: str = "paper"

    VARIANTS: ClassVar = scores.VARIANTS

    def __post_init__(self) -> None:
        if self.variant not in self.VARIANTS:
            raise unknown("variant", self.variant, self.VARIANTS)
        choose("optimiser", self.optimiser, dict.fromkeys(submodular.OPTIMISERS))

    def look(self, train: ImageSet, generator: torch.Generator) -> list[Trained]:
        """The trained networks that the rule looks at."""
        return [train_proxy(self.proxy, train, generator)]

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
    """A selection by the rule of that name; budgets and defaults as in DeepCore's published commands.

    The other fields are ProxySelection's.

    Attributes:
        rule: one of ``lib.select.rules.RULES``.
        weighted: keep the weights of CRAIG and GradMatch; ridge: of GradMatch.
        repeats: proxies that GraNd and EL2N average over; neighbours: of CAL; iterations: of DeepFool; 1 or more.
        eta: Glister's learning rate; refresh: picks between two updates of its direction, 0: none.
    """

    rule: str = "craig"
    weighted: bool = True
    repeats: int = 10
    neighbours: int = 10
    iterations: int = 50
    ridge: float = 1.0
    eta: float = 0.1
    refresh: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("rule", self.rule, RULES)
        whole(self, repeats=1, neighbours=1, iterations=1, refresh=0)

    def look(self, train: ImageSet, generator: torch.Generator) -> list[Trained]:
        proxy = self.proxy
        if self.rule == "forgetting":  # it counts events of the whole training
            proxy = replace(proxy, until=None)
        count = self.repeats if self.rule in ("grand", "el2n") else 1
        return [train_proxy(proxy, train, generator) for _ in range(count)]

    def pick(self, seen: list[Trained], rows: Tensor, budget: int, generator: torch.Generator) -> Choice:
        order, weights = RULES[self.rule](self, seen, rows, budget, generator)
        return order, weights if self.weighted else None


# -- recipes ----------------------------------------------------------------------------------------------------------------

CONVNET, RESNET = Proxy("convnet-d3-w128"), Proxy("resnet18-batch")
TABLES = "the coreset columns of distillation tables: ConvNet, 1, 10 or 50 images per class"
DEEPCORE = "DeepCore's published commands"
# On small data a proxy stops at 65 % of the training images, where gradients are still there (lib.select.proxy).
SMALL_PROXIES = {
    "digits": Proxy("mlp", until=0.65),
    "fashion14": Proxy("convnet-d3-w32", epochs=5, until=0.65),
    "photos16 photos32": Proxy("convnet-d3-w32", epochs=5, until=0.65),
}


def _in_tables(made) -> Recipes:
    """A baseline of distillation tables, in the features of the network that is evaluated."""
    sets, deep = "mnist fashionmnist svhn cifar10 cifar100", replace(CONVNET, network="convnet-d4-w128")
    return Recipes(
        small("digits", made(Proxy("convnet-d2-w32"))),
        small("fashion14", made(Proxy("convnet-d3-w32", epochs=1))),  # of ten times as many images
        small("photos16 photos32", made(Proxy("convnet-d3-w32"))),
        two_cores(
            made(Proxy("convnet-d3-w32", epochs=2)), source="two of ten epochs, a quarter of the width"
        ),
        published(sets, (1, 10, 50), made(CONVNET), "dc", TABLES),
        published("tinyimagenet", (1, 10, 50), made(deep), "dc", TABLES),
        published("cifar10", None, made(RESNET), "deepcore", DEEPCORE, variant="deepcore"),
    )


RANDOM = _in_tables(lambda proxy: RandomReal())
HERDING = _in_tables(lambda proxy: Herding(proxy=proxy))
K_CENTER = _in_tables(lambda proxy: KCenter(proxy=proxy))
CORESETS = Recipes(  # of every rule; lib.methods.recipes puts its name in
    *(small(names, Coreset(proxy=proxy, repeats=3, iterations=10)) for names, proxy in SMALL_PROXIES.items()),
    published("cifar10", None, Coreset(proxy=RESNET), "deepcore", DEEPCORE),
    published(
        "cifar100",
        5,
        Coreset(proxy=RESNET),
        "deepcore",
        "LCMat's published scripts, a hundredth of the images",
    ),
)
