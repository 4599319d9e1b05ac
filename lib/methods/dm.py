r"""DM - Dataset Condensation with Distribution Matching. Zhao & Bilen, WACV 2023, arXiv 2110.04181.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c \Big\lVert \tfrac1n\sum_i \psi_\theta(\mathcal A_\omega(x_{c,i}))
 - \tfrac1m\sum_j \psi_\theta(\mathcal A_\omega(s_{c,j}))\Big\rVert_2^2$$

with a new random network $\psi_\theta$ (flattened output of the convolutional body) at every step, never trained.
Sum over classes and over features; the published code prints the loss divided by the number of classes, but optimises this one.
Differs from the published code: random numbers come from one explicit generator (that code re-seeds from the clock).

The relatives of DM are other values of the same fields: what is compared (``distance``, ``lib.match``), in which networks
(``networks``, ``lib.nets.supply``), what a stored image is trained on as (``formation``), which real images are looked at
(``sampler``). The step is written once, here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib import nets
from lib.augment import families, siamese
from lib.data.imageset import ImageSet
from lib.formation import Pixels, at_most, by_class, decode_by_class
from lib.formation.start import SPACES, clamp_to_space, from_space, initial_codes, pixel_set
from lib.match.distance import At, Distance, Look
from lib.match.features import ClassMean
from lib.nets.supply import Fresh
from lib.nets.training import rows_at_once
from lib.optim.sequential import pixel_sgd
from lib.recipes import Recipes, published, small, two_cores
from lib.select.sampler import Memory, RandomBatches
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError, choose, positive, whole

REAL_ROWS = 4096  # at most so many real images per forward pass, where no batch norm mixes them


@dataclass
class State:
    """What changes from step to step."""

    pixels: Tensor
    optimiser: torch.optim.Optimizer
    supply: Any  # what the supply of networks keeps
    compared: Any  # what the distance keeps
    train: ImageSet = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})
    memory: Memory = field(default_factory=Memory)  # of the sampler


@dataclass(frozen=True)
class DM:
    """Hyper-parameters of section 4.1 and of the published commands.

    Attributes:
        iterations: updates of the images, 0 or more; lr, momentum: of SGD on the pixels, lr above 0 (published: 10 from IPC 100 on,
            CIFAR-10).
        real_batch: real images per class and step, 1 or more; the smallest class where it has fewer.
        network: a name of ``lib.nets``; networks: which of them a step looks at (``lib.nets.supply``).
        init: where stored images start: "real", "noise", or "mix", several real images packed into each.
        augmentation: "data": the data set's DSA strategy; "none"; or families joined by ``_`` (``lib.augment``); mode: how they combine,
            "single" as DSA, "multiple" or "idc".
        mixed: real images in bfloat16.
        distance: what is compared, a value or a sum of values of ``lib.match``.
        formation: what a stored image is trained on as (``lib.formation``); sampler: which real images a step looks at
            (``lib.select.sampler``).
        most: at most so many decoded images of a class are compared, drawn anew each step; None: all.
        space: of the stored pixels, "normalised", or "unit": [0, 1], clamped before every step.
        sequential: a joint step that equals one step per class in turn (``lib.optim.sequential``).
    """

    iterations: int = 20_000
    lr: float = 1.0
    momentum: float = 0.5
    real_batch: int = 256
    network: str = "convnet-d3-w128"
    init: str = "real"
    augmentation: str = "data"
    mixed: bool = False
    mode: str = "single"
    distance: Distance = ClassMean()
    networks: Any = Fresh()
    formation: Any = Pixels()
    sampler: Any = RandomBatches()
    most: int | None = None
    space: str = "normalised"
    sequential: bool = False

    def __post_init__(self) -> None:
        choose("pixel space", self.space, dict.fromkeys(SPACES))
        if not isinstance(self.distance, Distance):
            raise CompanionError(
                f"{self.distance!r} is no distance: allowed are those of lib.match and their sums"
            )
        positive(self, "lr")
        whole(self, iterations=0, real_batch=1, **({} if self.most is None else {"most": 1}))

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> DM:
        """The same method with ``count`` updates of the images."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        pixels = initial_codes(self.formation, train, ipc, self.init, generator, self.space)
        optimiser = pixel_sgd(pixels, self.lr, self.momentum, train.num_classes, self.sequential)
        supply = self.networks.begin(self.network, train, generator)
        self.distance.check(supply.network, ipc)
        return State(pixels, optimiser, supply, self.distance.begin(train, generator), train, ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of all images."""
        clamp_to_space(state.pixels, self.space)
        metrics = self.differentiate(state, generator)
        state.optimiser.step()
        self.after(state, generator)
        return metrics

    def differentiate(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss that the next network sees, its gradient left in ``state.pixels.grad``; nothing moves."""
        network = state.supply.network
        if self.distance.looks:
            network = self.networks.draw(state.supply, generator)
        return self.compare(state, network, generator)

    def after(self, state: State, generator: torch.Generator) -> None:
        """What follows an update of the images."""
        self.networks.after(state.supply, state.train, generator)

    def match(self, state: State, network: torch.nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Update the images by the distance that one network sees."""
        metrics = self.compare(state, network, generator)
        state.optimiser.step()
        return metrics

    def compare(
        self, state: State, network: torch.nn.Module, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The distance that one network sees, and its gradient."""
        real = self.real(state, network, generator)  # (C, n, c, h, w)
        real, syn = self.transform(real, self.images(state, generator), state.train, generator)

        with torch.no_grad(), torch.autocast(real.device.type, torch.bfloat16, enabled=self.mixed):
            target = self.observe_real(network, real)
        current = self.distance.observe(Look(network, syn, self.distance.taps))
        at = At(network, state.supply.percent, generator, state.compared)
        terms = self.distance.terms(target, current, at)
        if not terms:
            raise CompanionError(f"{self.distance} has no term at IPC {state.ipc}: add another distance")
        loss = sum(term.sum() for term in terms.values())

        state.optimiser.zero_grad()
        loss.backward()
        parts = {name: term.detach().sum() for name, term in terms.items()} if len(terms) > 1 else {}
        return {"loss": loss.detach()} | parts | at.measured

    def images(self, state: State, generator: torch.Generator) -> Tensor:
        """The synthetic images that are compared, ``(C, m, c, h, w)``: what the stored ones are decoded to."""
        pixels = from_space(state.pixels, state.train, self.space)
        decoded = decode_by_class(
            self.formation.on(state.train.transform), by_class(pixels, state.train.num_classes)
        )
        return decoded if self.most is None else at_most(decoded, self.most, generator)

    def real(self, state: State, network: torch.nn.Module, generator: torch.Generator) -> Tensor:
        """The real batch of every class, ``(C, n, c, h, w)``."""
        count = min(self.real_batch, state.train.smallest_class)
        return self.sampler.draw(
            state.memory, state.train, count, generator, functools.partial(embed, network)
        )

    def transform(
        self, real: Tensor, syn: Tensor, train: ImageSet, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$\mathcal A_\omega$ with one $\omega$ per class, shared by its real and synthetic images."""
        return siamese(real, syn, families(self.augmentation, train), generator, self.mode)

    def observe_real(self, network: torch.nn.Module, real: Tensor) -> dict[str, Tensor]:
        """What the distance keeps of the real batch, in float32 and in parts of equal size; a batch norm sees all classes at
        once, as published."""

        def observe(images: Tensor) -> dict[str, Tensor]:
            return self.distance.observe(Look(network, images, self.distance.taps))

        classes, count = real.shape[:2]
        if nets.has_batch_norm(network):
            return {name: tensor.float() for name, tensor in observe(real).items()}
        rows = min(REAL_ROWS, rows_at_once(network, real[0]))
        if rows >= count:
            groups = [observe(group) for group in real.split(rows // count)]
        else:
            size = equal_parts(count, rows)
            groups = [
                _joined([observe(part) for part in real[c : c + 1].split(size, 1)], 1) for c in range(classes)
            ]
        return {name: tensor.float() for name, tensor in _joined(groups, 0).items()}

    def finish(self, state: State) -> SyntheticSet:
        return pixel_set(state.pixels, state.train, state.ipc, self.formation, self.space)


def _joined(parts: list[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


@torch.no_grad()
def embed(network: torch.nn.Module, images: Tensor) -> Tensor:
    """Embeddings ``(n, d)`` of many images, a chunk at a time."""
    return torch.cat([network.embed(part) for part in images.split(rows_at_once(network, images))])


def equal_parts(count: int, most: int) -> int:
    """The largest divisor of ``count`` up to ``most``; ``count`` itself if they are all small (a prime, say)."""
    size = next(size for size in range(min(count, most), 0, -1) if count % size == 0)
    return size if 4 * size >= min(count, most) else count


_PAPER = DM()
_SMALL = DM(iterations=300, real_batch=64, network="convnet-d3-w32")
_NARROW = DM(lr=4.0, real_batch=128, network="convnet-d3-w32")
_CUT = "300 or 500 of 20 000 steps, half of the real batch, a quarter of the width: its distance sums over features, so four times the rate"
_COMMANDS = "section 4.1 and the published commands"
RECIPES = Recipes(
    small("digits", DM(iterations=200, real_batch=64, network="convnet-d2-w32", augmentation="none")),
    small(
        "fashion14", DM(iterations=100, lr=3.0, real_batch=32, network="convnet-d3-w32", augmentation="none")
    ),
    small("photos16 photos32", _SMALL),
    two_cores(replace(_NARROW, iterations=300), ipc=1, source=_CUT),
    two_cores(replace(_NARROW, iterations=500), ipc=10, source=_CUT),
    published("mnist fashionmnist svhn cifar10 cifar100", (1, 10, 50), _PAPER, "dsa", _COMMANDS),
    published(
        "cifar10",
        (100, 200, 500, 1000, 1250),
        replace(_PAPER, lr=10.0),
        "dsa",
        "section 4.2: rate 10 from IPC 100 on",
    ),
    published("cifar100", (100, 125), _PAPER, "dsa", "section 4.2"),
    published(
        "tinyimagenet",
        (1, 10, 50),
        replace(_PAPER, network="convnet-d4-w128"),
        "dsa",
        "section 4.1: a fourth block",
    ),
)
