r"""HaBa - Dataset Distillation via Factorization. Liu, Wang, Yang, Ye & Wang, NeurIPS 2022, arXiv 2210.16774.

$$\min_{z,H,\beta}\ \mathcal L_{\mathrm{MTT}}\big(H(z)\big)+\lambda_{club}\,\tfrac12\big(1+\cos(e^0,e^1)\big),\qquad
\min_E\ \lambda_{cls}\,\mathrm{CE}+\lambda_{lik}\,\tfrac12\big(1-\cos(e^0,e^1)\big)+\lambda_{con}\,\mathrm{SupCon}$$

Stored are bases z (``ipc`` of a class) and m tiny hallucinators that all classes share (``lib.formation.hallucinators``); every pair
renders an image, so that m C ipc images come from few numbers. They are driven by MTT's loss, one random hallucinator in each of the
student's steps. An extractor E learns to see two renderings $e^0,e^1$ of a base as one and to tell classes apart
(``lib.match.supervised_contrast``), the hallucinators that it does not.

Paper and code: the set is trained on as all its renderings at once, where the published code draws a hallucinator for every item
anew. That code also standardises every batch by its own mean and deviation, in experts, training and test, which makes an accuracy
depend on its batch; left out. ``identity`` is ours: how near to the identity hallucinators start (published: 0, a random map, from
which a short run does not recover). The accuracy published is the best of the last tenth of the iterations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.augment import families
from lib.data.imageset import ImageSet
from lib.formation.hallucinators import Hallucinators
from lib.match.supervised_contrast import alike, supcon
from lib.match.trajectory import relative_distance
from lib.match.unroll import MODES, Step, walk
from lib.methods.mtt import augmented, chunks, keep_above, segment
from lib.nets.ensemble import Ensemble
from lib.nets.experts import Experts
from lib.nets.flat import template
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
    rate: Tensor  # beta, ()
    optimiser: torch.optim.Optimizer
    extractor: Ensemble  # E, one network
    opponent: torch.optim.Optimizer  # of E
    deck: list[int]  # experts not yet seen in this pass
    labels: Tensor = field(metadata={"constant": True})
    experts: Tensor = field(metadata={"constant": True})
    template: Any = field(metadata={"constant": True})
    train: ImageSet = field(metadata={"constant": True})

    @property
    def hallucinators(self) -> Hallucinators:
        names = ("enc_weight", "enc_bias", "scale", "shift", "dec_weight", "dec_bias")
        return Hallucinators(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class HaBa:
    """Hyper-parameters of the released scripts; the defaults are those of CIFAR-10 with one base a class."""

    iterations: int = 15_000
    hallucinators: int = 5  # m
    channels: int | None = None  # of a base; None: as an image has
    identity: float = 0.0  # ours: where hallucinators start
    steps: int = 50  # N, of the student
    expert_epochs: int = 2  # M
    start_epochs: int = 2  # T+
    lr: float = 100.0  # of the bases
    lr_hallucinators: float = 100.0
    momentum: float = 0.95  # of both
    rate: float = 0.01  # beta at the start
    lr_rate: float = 1e-7
    momentum_rate: float = 0.9
    least_rate: float = 1e-3
    batch: int | None = None  # bases in a student's step; None: all
    adversary: bool = True
    club: float = 0.1  # lambda of the renderings' likeness, against the hallucinators
    con: float = 0.1  # of E: SupCon,
    cls: float = 1.0  # cross-entropy,
    lik: float = 0.1  # likeness
    temperature: float = 0.07
    lr_extractor: float = 0.001
    momentum_extractor: float = 0.9
    extractor: str = "convnet-d3-w128"
    network: str = "convnet-d3-w128"
    init: str = "real"
    augmentation: str = "data"
    gradient: str = "bptt"
    experts: Experts = Experts()

    def __post_init__(self) -> None:
        choose("mode of unrolling", self.gradient, MODES)
        choose("init", self.init, dict.fromkeys(("real", "noise")))
        whole(self, iterations=0, steps=1, expert_epochs=1, start_epochs=1, hallucinators=1)
        positive(self, "lr", "rate", "least_rate", "temperature")
        if self.adversary and self.hallucinators < 2:
            raise CompanionError(
                "1 hallucinator renders no two images of a base: allowed 2 or more, or adversary=False"
            )

    @property
    def reach(self) -> int:
        """The last epoch of an expert that is read."""
        return self.start_epochs - 1 + self.expert_epochs

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
        rate = torch.tensor(self.rate, device=train.device, requires_grad=True)
        groups = [
            {"params": [bases.requires_grad_()], "lr": self.lr, "momentum": self.momentum},
            {"params": numbers, "lr": self.lr_hallucinators, "momentum": self.momentum},
            {"params": [rate], "lr": self.lr_rate, "momentum": self.momentum_rate},
        ]
        extractor = Ensemble.make(self.extractor, train, [generator])
        opponent = torch.optim.SGD(
            list(extractor.parameters.values()), lr=self.lr_extractor, momentum=self.momentum_extractor
        )
        experts, like = self.experts.record(self.network, train, self.reach), template(self.network, train)
        labels = class_major(train.num_classes, ipc, train.device)
        optimiser = torch.optim.SGD(groups, lr=self.lr)
        return State(bases, *numbers, rate, optimiser, extractor, opponent, [], labels, experts, like, train)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of bases, hallucinators and rate, then one of the extractor."""
        start, target = segment(state, self.start_epochs, self.expert_epochs, generator)  # (1, P)
        steps, used = self.student_steps(state, generator)

        student = walk(state.template, start, steps, self.gradient)
        loss, u = relative_distance(student.end, start, target)
        images, rates = student.pull(u)

        state.optimiser.zero_grad()
        torch.autograd.backward(used, images)  # through augmentation and hallucinators
        state.rate.grad = rates.sum()
        metrics = {"loss": loss[0], "rate": state.rate.detach().clone()}
        if self.adversary:
            images, _ = self.two_views(state, generator)
            metrics["alike"] = alike(*state.extractor.detached().embed(images)[0].chunk(2))
            (self.club * metrics["alike"]).backward()
        state.optimiser.step()
        keep_above(state.rate, self.least_rate)
        if self.adversary:
            metrics["extractor"] = self.train_extractor(state, generator)
        return {name: value.detach() for name, value in metrics.items()}

    def student_steps(self, state: State, generator: torch.Generator) -> tuple[list[Step], list[Tensor]]:
        """The student's steps, and their images as they were made: each sees its bases through one hallucinator."""
        rendered, names = state.hallucinators.render(state.bases), families(self.augmentation, state.train)
        steps, used = [], []
        for rows in chunks(len(state.bases), self.batch, self.steps, generator):
            k = 0
            if self.hallucinators > 1:
                k = int(torch.randint(self.hallucinators, (), generator=generator, device=generator.device))
            used.append(augmented(rendered[k, rows], names, generator))
            steps.append(Step(used[-1], state.labels[rows], state.rate))
        return steps, used

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
        bases, rate, train = state.bases.detach().clone(), state.rate.detach().clone(), state.train
        decoder = state.hallucinators.detached()
        return SyntheticSet(bases, state.labels, train.classes, train.transform, decoder, step_size=rate)


_PAPER = HaBa()
_TEN = replace(_PAPER, steps=30, start_epochs=20, lr_rate=1e-5)
_DIGITS = HaBa(
    iterations=60, hallucinators=3, identity=0.8, steps=10, start_epochs=6, lr=10.0, lr_hallucinators=0.05, rate=0.05,
    lr_rate=1e-4, extractor="convnet-d2-w32", network="convnet-d2-w32", augmentation="none",
    experts=Experts(3, lr=0.05, batch=64, augmentation="none"),
)  # fmt: skip
_DEEP = replace(
    _DIGITS, network="convnet-d3-w32", extractor="convnet-d3-w32", start_epochs=2, experts=replace(_DIGITS.experts, lr=0.02)
)  # fmt: skip
_PHOTOS = replace(
    _DEEP, iterations=40, identity=0.9, start_epochs=3, lr=100.0, lr_hallucinators=0.001, rate=0.1
)
_SCRIPTS = "released scripts"
_UNTRIED = "the settings of digits with a deeper network, not chosen on these data"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _DEEP, source=_UNTRIED),
    small("photos16 photos32", _PHOTOS),
    published("cifar10", 1, _PAPER, "mtt", _SCRIPTS, whiten="zca"),
    published(
        "cifar10", 3, replace(_PAPER, channels=1), "mtt", _SCRIPTS, variant="single-channel", whiten="zca"
    ),
    published("cifar10", 10, replace(_TEN, rate=0.001), "mtt", _SCRIPTS, whiten="zca"),
    published("cifar10", 50, _TEN, "mtt", _SCRIPTS, whiten="zca"),
)
