r"""HaBa - Dataset Distillation via Factorization. Liu, Wang, Yang, Ye & Wang, NeurIPS 2022, arXiv 2210.16774.

$$\min_{z,H}\ \mathcal L\big(H(z)\big)+\lambda_{club}\,\tfrac12\big(1+\cos(e^0,e^1)\big),\qquad
\min_E\ \lambda_{cls}\,\mathrm{CE}+\lambda_{lik}\,\tfrac12\big(1-\cos(e^0,e^1)\big)+\lambda_{con}\,\mathrm{SupCon}$$

Stored are bases z (``ipc`` of a class) and m tiny hallucinators that all classes share (``lib.formation.hallucinators``); every pair
renders an image, so that m C ipc images come from few numbers. Any loss of images can drive them (``objective``, of
``lib.match.rendered``): ``Trajectories``, MTT's, as published, with one random hallucinator in each of the student's steps; or
``Features``, DM's, which sees all renderings of a class at once. An extractor E learns to see two renderings $e^0,e^1$ of a base as one and
to tell classes apart (``lib.match.supervised_contrast``), the hallucinators that it does not.

Paper and code: the set is trained on as all its renderings at once, where the published code draws a hallucinator for every item
anew. That code also standardises every batch by its own mean and deviation, in experts, training and test, which makes an accuracy
depend on its batch; left out. ``identity`` is ours: how near to the identity hallucinators start (published: 0, a random map, from
which a short run does not recover). The accuracy published is the best of the last tenth of the iterations. The paper says that any
loss will do; how DM drives hallucinators is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.augment import augmented, families
from lib.data.imageset import ImageSet
from lib.formation.hallucinators import NUMBERS, Hallucinators
from lib.match.rendered import Features, Trajectories
from lib.match.supervised_contrast import alike, supcon
from lib.match.trajectory import chunks
from lib.nets.ensemble import Ensemble
from lib.nets.experts import Experts
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, positive, whole


@dataclass
class State:
    bases: Tensor  # z, (n, in, h, w)
    enc_weight: Tensor  # and the next five: the hallucinators
    enc_bias: Tensor
    scale: Tensor
    shift: Tensor
    dec_weight: Tensor
    dec_bias: Tensor
    memory: Any  # of the objective
    optimiser: torch.optim.Optimizer
    extractor: Ensemble  # E, one network
    opponent: torch.optim.Optimizer  # of E
    labels: Tensor = field(metadata={"constant": True})
    train: ImageSet = field(metadata={"constant": True})

    @property
    def hallucinators(self) -> Hallucinators:
        return Hallucinators(**{name: getattr(self, name) for name in NUMBERS})


@dataclass(frozen=True)
class HaBa:
    r"""Hyper-parameters of the released scripts; the defaults are those of CIFAR-10 with one base a class.

    Attributes:
        iterations: updates, 0 or more; hallucinators: m; channels: of a base, None: as an image has.
        identity: ours: how near to the identity hallucinators start, 0 to 1.
        objective: ``Trajectories()`` or ``Features()``; batch: bases that a student's step and the extractor see, None: all.
        lr: of the bases; lr_hallucinators: of the hallucinators; momentum: of both.
        adversary: hallucinators play against a learned extractor E; club: $\lambda$ of their likeness, against the hallucinators; con,
            cls, lik: weights of E's contrastive loss, cross-entropy and likeness; temperature: of the contrastive loss, above 0.
        extractor: E, a name of ``lib.nets``; lr_extractor, momentum_extractor: of its SGD.
        network, augmentation: as DM's; init: where bases start: "real" or "noise".
    """

    iterations: int = 15_000
    hallucinators: int = 5
    channels: int | None = None
    identity: float = 0.0
    objective: Any = Trajectories()
    lr: float = 100.0
    lr_hallucinators: float = 100.0
    momentum: float = 0.95
    batch: int | None = None
    adversary: bool = True
    club: float = 0.1
    con: float = 0.1
    cls: float = 1.0
    lik: float = 0.1
    temperature: float = 0.07
    lr_extractor: float = 0.001
    momentum_extractor: float = 0.9
    extractor: str = "convnet-d3-w128"
    network: str = "convnet-d3-w128"
    init: str = "real"
    augmentation: str = "data"

    def __post_init__(self) -> None:
        choose("init", self.init, dict.fromkeys(("real", "noise")))
        whole(self, iterations=0, hallucinators=1)
        positive(self, "lr", "temperature")
        if self.adversary and self.hallucinators < 2:
            raise CompanionError(
                "1 hallucinator renders no two images of a base: allowed 2 or more, or adversary=False"
            )

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> HaBa:
        """The same method with ``count`` updates of the bases."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        if self.batch is not None and not 1 <= self.batch <= train.num_classes * ipc:
            raise CompanionError(
                f"batch {self.batch} of a student: there are {train.num_classes * ipc} bases"
            )
        channels = self.channels or train.channels
        if self.init == "real":
            bases = train.sample(ipc, generator).flatten(0, 1)
            bases = bases if channels == train.channels else bases.mean(1, keepdim=True)
        else:
            shape = (train.num_classes * ipc, channels, *train.shape[1:])
            bases = torch.randn(shape, generator=generator, device=train.device)
        H = Hallucinators.make(self.hallucinators, channels, train.shape, generator, self.identity)
        H.check(tuple(bases.shape[1:]))
        numbers = [tensor.clone().requires_grad_() for tensor in H.numbers.values()]
        extractor = Ensemble.make(self.extractor, train, [generator])
        opponent = torch.optim.SGD(
            list(extractor.parameters.values()), lr=self.lr_extractor, momentum=self.momentum_extractor
        )
        memory = self.objective.begin(self, train, generator)
        groups = [
            {"params": [bases.requires_grad_()], "lr": self.lr, "momentum": self.momentum},
            {"params": numbers, "lr": self.lr_hallucinators, "momentum": self.momentum},
            *self.objective.groups(memory),
        ]
        labels, optimiser = (
            class_major(train.num_classes, ipc, train.device),
            torch.optim.SGD(groups, lr=self.lr),
        )
        return State(bases, *numbers, memory, optimiser, extractor, opponent, labels, train)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of bases and hallucinators, then one of the extractor."""
        state.optimiser.zero_grad()
        metrics = self.objective.descend(self, state, generator)
        if self.adversary:
            images, _ = self.two_views(state, generator)
            metrics["alike"] = alike(*state.extractor.detached().embed(images)[0].chunk(2))
            (self.club * metrics["alike"]).backward()
        state.optimiser.step()
        self.objective.after(state.memory)
        if self.adversary:
            metrics["extractor"] = self.train_extractor(state, generator)
        return {name: value.detach() for name, value in metrics.items()}

    def two_views(self, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same bases seen by two hallucinators, ``(1, 2 n, c, h, w)``, and their labels ``(n,)``."""
        (rows,) = chunks(len(state.bases), self.batch, 1, generator)
        pair = torch.randperm(self.hallucinators, generator=generator, device=generator.device)[:2]
        images = state.hallucinators.render(state.bases[rows])[pair].flatten(0, 1)
        images = augmented(images, families(self.augmentation, state.train), generator)
        return images.unsqueeze(0), state.labels[rows]

    def train_extractor(self, state: State, generator: torch.Generator) -> Tensor:
        """One step of E on renderings of the bases as they are now, to which no gradient flows."""
        with torch.no_grad():
            images, y = self.two_views(state, generator)
        e = state.extractor.embed(images)[0]
        weight, bias = (state.extractor.parameters[f"classifier.{name}"][0] for name in ("weight", "bias"))
        entropy = F.cross_entropy(F.linear(e, weight, bias), y.repeat(2))
        loss = self.cls * entropy + self.lik * (1 - alike(*e.chunk(2)))
        loss = loss + self.con * supcon(*e.chunk(2), y, self.temperature)
        state.opponent.zero_grad()
        loss.backward()
        state.opponent.step()
        return loss

    def finish(self, state: State) -> SyntheticSet:
        """Bases, and the hallucinators as their decoder."""
        bases, train, rate = state.bases.detach().clone(), state.train, self.objective.step_size(state.memory)
        decoder = state.hallucinators.detached()
        return SyntheticSet(bases, state.labels, train.classes, train.transform, decoder, step_size=rate)


_PAPER, _TEN = HaBa(), Trajectories(steps=30, start_epochs=20, lr_rate=1e-5)
_STUDENTS = Trajectories(
    steps=10,
    start_epochs=6,
    rate=0.05,
    lr_rate=1e-4,
    experts=Experts(3, lr=0.05, batch=64, augmentation="none"),
)
_DIGITS = HaBa(
    iterations=40, hallucinators=3, identity=0.8, objective=_STUDENTS, lr=10.0, lr_hallucinators=0.05,
    extractor="convnet-d2-w32", network="convnet-d2-w32", augmentation="none",
)  # fmt: skip
_SLOWER = replace(_STUDENTS, start_epochs=2, experts=replace(_STUDENTS.experts, lr=0.02))
_DEEP = replace(
    _DIGITS, iterations=60, objective=_SLOWER, network="convnet-d3-w32", extractor="convnet-d3-w32"
)  # fmt: skip
_PHOTOS = replace(
    _DEEP, iterations=40, identity=0.9, objective=replace(_SLOWER, start_epochs=3, rate=0.1),
    lr=100.0, lr_hallucinators=0.001,
)  # fmt: skip
_BY_DM = replace(_DIGITS, iterations=60, objective=Features(64), lr=0.3, lr_hallucinators=1.5e-4)
_BY_DM_DEEP = replace(_DEEP, iterations=50, objective=Features(32), lr=0.1, lr_hallucinators=1.5e-3)
_SCRIPTS = "released scripts"
_CHOSEN = "pixel rate chosen among three or more by a fifth of the training images"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("digits", replace(_DIGITS, iterations=100), ipc=10, source=_CHOSEN),
    small("fashion14", _DEEP, source=_CHOSEN),
    small("fashion14", replace(_DEEP, lr=100.0), ipc=10, source=_CHOSEN),
    small("digits", _BY_DM, variant="on DM", source=_CHOSEN),
    small("fashion14", _BY_DM_DEEP, variant="on DM", source=_CHOSEN),
    small("photos16 photos32", _PHOTOS),
    published("cifar10", 1, _PAPER, "mtt", _SCRIPTS, whiten="zca"),
    published(
        "cifar10", 3, replace(_PAPER, channels=1), "mtt", _SCRIPTS, variant="single-channel", whiten="zca"
    ),
    published(
        "cifar10", 10, replace(_PAPER, objective=replace(_TEN, rate=0.001)), "mtt", _SCRIPTS, whiten="zca"
    ),
    published("cifar10", 50, replace(_PAPER, objective=_TEN), "mtt", _SCRIPTS, whiten="zca"),
)
