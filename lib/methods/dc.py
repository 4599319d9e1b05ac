r"""DC - Dataset Condensation with Gradient Matching. Zhao, Mopuri & Bilen, ICLR 2021, arXiv 2006.05929.

$$\min_{\mathcal S}\ \mathbb E_{\theta_0}\sum_{t=0}^{T-1}\sum_c
D\big(\nabla_\theta\ell(\mathcal S_c;\theta_t),\ \nabla_\theta\ell(\mathcal T_c;\theta_t)\big),\qquad
\theta_{t+1}=\theta_t-\eta_\theta\nabla_\theta\ell(\mathcal S;\theta_t)\ \text{(}\varsigma_\theta\text{ times)}.$$

A step here is one matching step; the networks restart every T steps. D is a value (``distance``, ``lib.match.gradient``), the
row-wise cosine distance if not told otherwise.

Paper and code: the paper's Algorithm 1 updates the classes one after the other, the code sums their losses and steps once; the
classes are disjoint pixels, so the two coincide. The paper counts network *steps*, the code epochs over S; we count epochs
(equal while C * IPC <= 256). The code's outer range is inclusive (1001 networks); ours is the paper's 1000.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib import augment, nets
from lib.augment import augment_by_class, families
from lib.data.imageset import ImageSet
from lib.formation import Pixels, at_most, by_class, decode_by_class
from lib.formation.start import SPACES, clamp_to_space, from_space, initial_codes, pixel_set
from lib.match.gradient import Gap, RowCosine
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict_embeddings, sgd_steps
from lib.optim.sequential import pixel_sgd
from lib.recipes import Recipes, published, small, two_cores
from lib.select.sampler import Memory, RandomBatches
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, whole

# IPC -> (matching steps T per network, epochs of network training between two of them); appendix and code
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
NORM_IMAGES = 16  # real images per class that set the batch-norm statistics before a matching step


@dataclass
class State:
    pixels: Tensor
    optimiser: torch.optim.Optimizer
    networks: Ensemble  # one network
    t: int  # matching steps done with this network
    train: ImageSet = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})
    memory: Memory = field(default_factory=Memory, kw_only=True)  # of the sampler


@dataclass(frozen=True)
class DC:
    """Hyper-parameters of the paper's section 3.1 and of the published commands.

    Attributes:
        outer: networks, K; inner: matching steps per network, T; epochs: of network training between two of them; 1 or more, None: by IPC
            (:data:`LOOPS`).
        lr, momentum: of SGD on the pixels (published: 0.01 when matching with an MLP); lr_network, network_batch: of the network's
            training.
        real_batch: real images per class and step, 1 or more; the smallest class where it has fewer.
        network: a name of ``lib.nets``.
        init: where stored images start: "noise", "real", or "mix", several real images packed into each.
        distance: what is compared, a value or a sum of values of ``lib.match.gradient``.
        augmentation: "none"; "data": the data set's DSA strategy; or families joined by ``_`` (``lib.augment``); mode: how they combine,
            "single" as DSA, "multiple" or "idc"; siamese: real and synthetic images share it.
        mixed: real gradients in bfloat16.
        formation: what a stored image is trained on as (``lib.formation``); sampler: which real images a step looks at
            (``lib.select.sampler``).
        most: at most so many decoded images of a class are compared, drawn anew each step; None: all.
        space: of the stored pixels, "normalised", or "unit": [0, 1], clamped whenever a network begins, and at the end.
        sequential: a joint step that equals one step per class in turn (``lib.optim.sequential``).
    """

    outer: int = 1000
    inner: int | None = None
    epochs: int | None = None
    lr: float = 0.1
    momentum: float = 0.5
    lr_network: float = 0.01
    real_batch: int = 256
    network_batch: int = 256
    network: str = "convnet-d3-w128"
    init: str = "noise"
    distance: Gap = RowCosine()
    augmentation: str = "none"
    siamese: bool = True
    mixed: bool = False
    mode: str = "single"
    formation: Any = Pixels()
    sampler: Any = RandomBatches()
    most: int | None = None
    space: str = "normalised"
    sequential: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.distance, Gap):
            raise CompanionError(
                f"distance {self.distance!r} does not compare gradients: allowed are the values of lib.match.gradient, "
                "such as RowCosine()"
            )
        choose("pixel space", self.space, dict.fromkeys(SPACES))
        whole(self, outer=0, real_batch=1)
        for name in ("inner", "epochs", "most"):
            if getattr(self, name) is not None:
                whole(self, **{name: 1})

    def loops(self, ipc: int) -> tuple[int, int]:
        """$(T, \\varsigma_\\theta)$ for this IPC: the published table, else T = IPC and about 500 / IPC epochs."""
        published = LOOPS.get(ipc, (ipc, max(1, round(500 / ipc))))
        return self.inner or published[0], self.epochs or published[1]

    def total_steps(self, ipc: int) -> int:
        return self.outer * self.loops(ipc)[0]

    def with_steps(self, count: int, ipc: int = 1) -> DC:
        """The same method with ``count`` updates of the images at this IPC, in whole networks."""
        return replace(self, outer=-(-count // self.loops(ipc)[0]))

    def rate(self, train: ImageSet, ipc: int) -> float:
        """The learning rate of the pixels."""
        return self.lr

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        pixels = initial_codes(self.formation, train, ipc, self.init, generator, self.space)
        rate = self.rate(train, ipc)
        # one optimiser for the whole run
        optimiser = pixel_sgd(pixels, rate, self.momentum, train.num_classes, self.sequential)
        return State(pixels, optimiser, Ensemble.make(self.network, train, [generator]), 0, train, ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One matching step, then (unless the network is about to be replaced) its training on S."""
        metrics = self.differentiate(state, generator)
        state.optimiser.step()
        self.after(state, generator)
        return metrics

    def after(self, state: State, generator: torch.Generator) -> None:
        """What follows an update of the images: training the network on S."""
        inner, epochs = self.loops(state.ipc)
        state.t = (state.t + 1) % inner
        if state.t:
            self.train_network(state, epochs, generator)

    def new_network(self, state: State, generator: torch.Generator) -> None:
        """What happens every T steps: a fresh network, with which the sampler begins anew."""
        state.networks = Ensemble.make(self.network, state.train, [generator])
        state.memory.restart()
        clamp_to_space(state.pixels, self.space)

    def differentiate(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """The distance at the current network, its sum and that of every class; its gradient is left in ``state.pixels.grad``."""
        if state.t == 0:
            self.new_network(state, generator)
        real = self.real(state, generator)  # (C, B, c, h, w)
        syn = self.images(state, generator)  # (C, M, c, h, w)
        real, syn = self.transform(real, syn, state.train, generator)
        networks = state.networks.train()
        if nets.has_batch_norm(networks.template):
            self.freeze_batch_norm(state, generator)

        terms, gradient = self.compared(state).match(networks, real, syn, generator, self.mixed)

        state.optimiser.zero_grad()
        syn.backward(gradient)  # through the augmentation and the formation to the pixels
        losses = sum(terms.values())
        parts = {name: term.sum() for name, term in terms.items()} if len(terms) > 1 else {}
        return {"loss": losses.sum(), "per_class": losses} | parts

    def compared(self, state: State) -> Gap:
        """The distance of this step."""
        return self.distance

    def real(self, state: State, generator: torch.Generator) -> Tensor:
        """The real batch of every class, ``(C, B, c, h, w)``."""

        def embed(images: Tensor) -> Tensor:
            return predict_embeddings(state.networks, images)[0]

        count = min(self.real_batch, state.train.smallest_class)
        return self.sampler.draw(state.memory, state.train, count, generator, embed)

    def images(self, state: State, generator: torch.Generator) -> Tensor:
        """The synthetic images that are compared, ``(C, M, c, h, w)``: what the stored ones are decoded to."""
        decoded = self.decode(state, by_class(self.normalised(state), state.train.num_classes))
        return decoded if self.most is None else at_most(decoded, self.most, generator)

    def normalised(self, state: State) -> Tensor:
        """The stored images in the space of the data, ``(C * ipc, c, h, w)``."""
        return from_space(state.pixels, state.train, self.space)

    def decode(self, state: State, stored: Tensor) -> Tensor:
        """What normalised stored images are trained on as, ``(C, m, c, h, w) -> (C, k m, c, h, w)``."""
        return decode_by_class(self.formation.on(state.train.transform), stored)

    @torch.no_grad()
    def decoded_set(self, state: State) -> tuple[Tensor, Tensor]:
        """All of S as networks learn it: images ``(k C ipc, c, h, w)`` and their labels."""
        labels = class_major(state.train.num_classes, state.ipc, state.pixels.device)
        images = self.decode(state, self.normalised(state).detach().unsqueeze(0))[0]
        return images, self.formation.labels(labels)

    def transform(
        self, real: Tensor, syn: Tensor, train, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$\mathcal A_\omega$ with one $\omega$ per class, shared by both sides if siamese."""
        if names := families(self.augmentation, train):
            omega = augment.draw(names, len(real), generator, mode=self.mode)
            real = augment_by_class(real, omega)
            if not self.siamese:
                omega = augment.draw(names, len(real), generator, mode=self.mode)
            syn = augment_by_class(syn, omega)
        return real, syn

    def freeze_batch_norm(self, state: State, generator: torch.Generator) -> None:
        """Set running statistics from a joint batch of all classes, then use them on both sides."""
        count = min(NORM_IMAGES, state.train.smallest_class)
        with torch.no_grad():
            state.networks(state.train.sample(count, generator).flatten(0, 1).unsqueeze(0))
        for module in state.networks.template.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()

    def train_network(self, state: State, epochs: int, generator: torch.Generator) -> None:
        """$\\varsigma_\\theta$ epochs of plain SGD on the current S; augmentation here is per image, not siamese."""
        strategy = "_".join(families(self.augmentation, state.train)) or "none"
        images, labels = self.decoded_set(state)
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
        )

    def finish(self, state: State) -> SyntheticSet:
        return pixel_set(state.pixels, state.train, state.ipc, self.formation, self.space)


_PAPER = DC()
_DIGITS = DC(real_batch=64, network="convnet-d2-w32", outer=120, lr=3.0)
_FASHION = DC(real_batch=32, network="convnet-d3-w32", outer=40, lr=3.0)
_PHOTOS = DC(real_batch=32, network="convnet-d3-w32", outer=4, inner=5, epochs=5, init="real")
_NARROW = DC(lr=0.4, real_batch=64, network="convnet-d3-w32")
FEW = {
    "outer": 20,
    "inner": 10,
    "epochs": 10,
    "init": "real",
}  # at IPC 10, where a network costs ten matching steps
CUT = "few of 1000 networks, a quarter of real batch and width: the distance sums over channels, so four times the rate"
FEWER = "a tenth to a third of the networks of IPC 1: each costs ten matching steps here, with fifty epochs between them"
_COMMANDS = "section 3.1 and the published commands"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _FASHION),
    small("digits", replace(_DIGITS, outer=12), ipc=10, source=FEWER),
    small("fashion14", replace(_FASHION, outer=12), ipc=10, source=FEWER),
    small("photos16 photos32", _PHOTOS),
    two_cores(replace(_NARROW, outer=200), ipc=1, source=CUT),
    two_cores(replace(_NARROW, **FEW), ipc=10, source=f"{CUT}; epochs cut, from real images"),
    published("mnist", (1, 10, 20, 30, 40, 50), _PAPER, "dc-mnist", _COMMANDS),
    published("fashionmnist svhn cifar10", (1, 10, 20, 30, 40, 50), _PAPER, "dc", _COMMANDS),
    published("cifar100", (1, 10), _PAPER, "dc", _COMMANDS),
    published(
        "mnist",
        1,
        replace(_PAPER, network="mlp", lr=0.01),
        "dc-mnist",
        "Table 2: a lower rate for an MLP",
        variant="mlp",
    ),
)
