r"""IDC - Dataset Condensation via Efficient Synthetic-Data Parameterization. Kim et al., ICML 2022, arXiv 2205.14959.

$$\min_{\mathcal S}\ \mathbb E_{\theta_0}\sum_{t}\sum_c\ \sum_{l\in\text{conv}}
d\big(\nabla_{\theta_l}\ell(\mathcal A_\omega(f(\mathcal S_c));\theta_t),\
\nabla_{\theta_l}\ell(\mathcal A_\omega(\mathcal T_c);\theta_t)\big),\qquad
\theta_{t+1}=\theta_t-\eta_\theta\nabla_\theta\ell(\mathcal A(\mathcal T);\theta_t)$$

DSA with three changes. A *multi-formation* f makes several training images of every stored one (``lib.formation``): its tiles,
enlarged. The networks learn from *real* data between two steps, so that their gradients keep telling something. And d is a plain
sum over the convolutions (squared or absolute differences), so that lengths of gradients count. IDC-I is IDC without f.

Paper and code: pixels live in [0, 1] and are clamped once per network. The code steps the optimiser of all images after every
class; a joint step with the rate and momentum that make it equal takes its place (``sequential``). The code cycles through
shuffled real images and starts with the first ones of every class; here batches and initial images are drawn at random. Its
pools of pretrained networks (ImageNet-100) are here networks trained for as many epochs when they are needed (``early``);
networks kept for several rounds and the distance of features are not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib.augment import families
from lib.data.imageset import ImageSet
from lib.formation import MultiFormation, Pixels, at_most, bounded, by_class, decode_by_class
from lib.match.gradient import Gap, LayerSum
from lib.methods import dc
from lib.methods.dsa import DSA
from lib.nets.training import sgd, sgd_steps
from lib.recipes import Recipe, Recipes, published, small, two_cores
from lib.system.errors import CompanionError, unknown, whole

INNER_DATA = ("real", "syn")


@dataclass
class State(dc.State):
    """DC's, with ``pixels`` in [0, 1]; the networks' optimiser remembers its momentum from step to step."""

    network_optimiser: torch.optim.Optimizer = field(kw_only=True)


@dataclass(frozen=True)
class IDC(DSA):
    """Hyper-parameters of the published "reproduce" settings (CIFAR). The other fields are DSA's.

    Attributes:
        outer: networks; inner: matching steps per network; lr: of the pixels, times IPC / 10 and (side / base_side)^2; base_side: in
            pixels.
        real_batch: real images per class and step; network_batch: of the network's training.
        init: "mix": a real image in every tile; "real": whole real images; "noise".
        distance: ``LayerSum("mse")`` or ``LayerSum("l1")``; ``parts="weights"``: with the classifier.
        augmentation, mode: of the matching; augmentation_network: of the network's training; cutmix: its probability per batch.
        formation: IDC's tiles; bound: decode just ``most`` images of a class, the first ones at the factor, the rest at smaller ones.
        inner_data: what networks learn from: "real"; "syn": S, as DSA; n_data: real images that a network sees between two steps.
        momentum_network, decay_network: of its SGD; early: its epochs on all real data before its first step, 0 or more.
    """

    outer: int = 2000
    inner: int | None = 100
    lr: float = 5e-3
    base_side: int = 32
    real_batch: int = 64
    network_batch: int = 64
    init: str = "mix"
    distance: Gap = LayerSum("mse")
    augmentation: str = "color_crop_cutout"
    mode: str = "idc"
    formation: Any = MultiFormation(2)
    most: int | None = 128
    space: str = "unit"
    sequential: bool = True
    bound: bool = False
    inner_data: str = "real"
    n_data: int = 2000
    momentum_network: float = 0.9
    decay_network: float = 5e-4
    augmentation_network: str = "color_crop"
    cutmix: float = 0.5
    early: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, n_data=1, base_side=1, network_batch=1, early=0)
        if self.inner_data not in INNER_DATA:
            raise unknown("inner data", self.inner_data, INNER_DATA)
        if self.bound and not (
            isinstance(self.formation, MultiFormation) and self.formation.kind == "single"
        ):
            raise CompanionError(
                f"bound with formation {self.formation.name!r}: allowed is a MultiFormation of kind 'single'"
            )
        if self.bound and self.most is None:
            raise CompanionError("bound without most: how many decoded images a class may have must be given")

    def rate(self, train: ImageSet, ipc: int) -> float:
        """The learning rate of the pixels: gradients of larger means and larger images are smaller."""
        return self.lr * ipc / 10 * (train.size / self.base_side) ** 2

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        start = super().begin(train, ipc, generator)
        return State(**vars(start), network_optimiser=self.learner(start.networks))

    def new_network(self, state: State, generator: torch.Generator) -> None:
        super().new_network(state, generator)
        state.network_optimiser = self.learner(state.networks)
        if self.early:
            self.learn(state, state.train.images, state.train.labels, self.early, generator)

    def learner(self, networks) -> torch.optim.Optimizer:
        """The optimiser of a network, for as long as it lives."""
        return sgd(list(networks.parameters.values()), self.momentum_network, self.decay_network)

    def images(self, state: State, generator: torch.Generator) -> Tensor:
        """The decoded images, ``(C, n, c, h, w)``: at most ``most`` of each class."""
        if not self.bound:
            return super().images(state, generator)
        stored = by_class(self.normalised(state), state.train.num_classes)
        parts, done = [], 0
        for factor, count in bounded(self.formation.factor, state.ipc, self.most):
            formation = replace(self.formation, factor=factor).on(state.train.transform)
            parts.append(decode_by_class(formation, stored[:, done : done + count]))
            done += count
        return at_most(torch.cat(parts, 1), self.most, generator)

    def train_network(self, state: State, epochs: int, generator: torch.Generator) -> None:
        """``n_data`` real images, drawn without replacement, or ``epochs`` times all decoded synthetic ones."""
        if self.inner_data == "real":
            train, wanted = state.train, math.ceil(self.n_data / self.network_batch) * self.network_batch
            rows = torch.randperm(len(train), generator=generator, device=train.device)[:wanted]
            images, labels, epochs = train.images[rows], train.labels[rows], 1
        else:
            images, labels = self.decoded_set(state)
        self.learn(state, images, labels, epochs, generator)

    def learn(
        self, state: State, images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator
    ) -> None:
        """Epochs of the network, every image with an augmentation of its own, and CutMix."""
        strategy = "_".join(families(self.augmentation_network, state.train)) or "none"
        sgd_steps(
            state.networks,
            images.unsqueeze(0),
            labels.unsqueeze(0),
            [generator],
            epochs=epochs,
            lr=self.lr_network,
            batch=self.network_batch,
            augmentation=strategy,
            mode=self.mode,
            cutmix=self.cutmix,
            optimiser=state.network_optimiser,
        )


_CIFAR = IDC()
_L1 = replace(_CIFAR, distance=LayerSum("l1"), lr=1e-4, n_data=500)
_SVHN = replace(_CIFAR, n_data=500)
_MNIST = replace(_L1, base_side=28)
_TEN = replace(
    _L1, lr=3e-3, outer=500, base_side=224, network="resnet10ap", formation=MultiFormation(3, pad=True),
    early=10, cutmix=1.0,
)  # fmt: skip
_HUNDRED = replace(
    _TEN, lr=1e-3, lr_network=0.1, decay_network=1e-4, real_batch=128, network_batch=128, early=5
)
_SMALL = replace(_CIFAR, real_batch=32, network_batch=32, inner=10, outer=3, n_data=128)
_DIGITS = replace(_SMALL, network="convnet-d2-w32", lr=1.0, base_side=8, cutmix=0.0)
_FASHION = replace(_DIGITS, lr=0.3, network="convnet-d3-w32", base_side=14)
_PHOTOS = replace(_SMALL, outer=2, inner=5, network="convnet-d3-w32", most=12, lr=0.003)
_NARROW = replace(_L1, outer=10, inner=10, n_data=128, network="convnet-d3-w32", lr=0.1)
_CUT = "100 of 200 000 steps, 128 of 500 real images between two, a quarter of the width; the rate chosen on a part of the training images"
_REPRODUCE = "official settings (reproduce)"


def without(method: IDC) -> IDC:
    """IDC-I: the same without multi-formation."""
    return replace(method, formation=Pixels(), bound=False)


def rows(of: Callable[[IDC], Any], variant: str = "") -> list[list[Recipe]]:
    """The small rows, whose rates were chosen for their size, and those that hold with and without multi-formation."""
    return [
        small("digits", of(_DIGITS), variant=variant),
        small("fashion14", of(_FASHION), variant=variant),
        small("photos16", of(replace(_PHOTOS, base_side=16)), variant=variant),
        small("photos32", of(_PHOTOS), variant=variant),
        published("cifar10 cifar100", (1, 10, 20, 50), of(_CIFAR), "idc", _REPRODUCE, variant=variant),
        published("fashionmnist", (1, 10, 50), of(_L1), "idc", _REPRODUCE, variant=variant),
        published("svhn", (10, 50), of(_SVHN), "idc", _REPRODUCE, variant=variant),
    ]


RECIPES = Recipes(
    *rows(lambda method: method),
    two_cores(_NARROW, ipc=1, protocol="idc", source=_CUT),
    published("svhn", 1, _SVHN, "idc", _REPRODUCE),
    published("mnist", (1, 10, 50), replace(_MNIST, augmentation="color_crop", cutmix=0.0), "idc-plain", _REPRODUCE),
    # 90 and 180 decoded images of a class; "bound" from 20 stored ones on
    published("imageidc", 10, _TEN, "idc-imagenet-1000", _REPRODUCE),
    published("imageidc", 20, replace(_TEN, bound=True), "idc-imagenet-1000", _REPRODUCE),
    published("imagenet100", 10, _HUNDRED, "idc-imagenet-667", _REPRODUCE),
    published("imagenet100", 20, replace(_HUNDRED, bound=True), "idc-imagenet-667", _REPRODUCE),
    # IDC-I; what is particular to MNIST above holds for factors above 1 only
    *rows(without, "I"),
    published("svhn", 1, without(_SVHN), "idc-cutout", _REPRODUCE, variant="I"),
    published("mnist", (1, 10, 50), without(_MNIST), "idc", _REPRODUCE, variant="I"),
    published("imageidc", 10, without(_TEN), "idc-imagenet-2000", _REPRODUCE, variant="I"),
    published("imageidc", 20, without(_TEN), "idc-imagenet-1500", _REPRODUCE, variant="I"),
    published("imagenet100", 10, without(_HUNDRED), "idc-imagenet-1333", _REPRODUCE, variant="I"),
    published("imagenet100", 20, without(_HUNDRED), "idc-imagenet-1000", _REPRODUCE, variant="I"),
)  # fmt: skip
