r"""DiM - Distilling Dataset into Generative Model. Wang, Gu, Zhou, Zhu, Jiang & You, 2023, arXiv 2303.04707.

$$\min_G\ \mathcal L_G(x,y)+\lambda\,\mathbb E_{\phi,\omega}\operatorname{mean}_{b,k}
\big(\log\operatorname{softmax}\phi(\mathcal A_\omega x)-\log\operatorname{softmax}\phi(\mathcal A_\omega G(z_y))\big)^2,\qquad
\min_D\ \mathcal L_D$$

A conditional GAN is trained on the real data (``lib.nets.generators.gan``: $\mathcal L_G,\mathcal L_D$); then its training goes on with
one more term: generated images shall have the logits of real images of the same class, in networks $\phi$ of a pool of architectures. One
is drawn anew every epoch, and trained on real images between two steps. What is stored is the generator: the number of images per class
is chosen when it is used, and a learner may draw new ones in every epoch (``lib.evaluate.fresh``), which is how the paper judges it. The
set of a run is *fixed*: so many draws per class.

Paper and code: the paper speaks of a pool of models, the code keeps one live model per epoch. The published code normalises images of
[-1, 1] by the statistics of [0, 1] inside the matching, ours are mapped to [0, 1] first. ``weight=0`` is the first stage continued, bit
for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import augment, nets
from lib.augment import families
from lib.data.imageset import ImageSet
from lib.formation.generated import Generated
from lib.match.seen import GAPS, feature_gap, gradient_gap, logit_gap
from lib.nets.generators.gan import ACGAN, GAN, critic_step, generator_loss
from lib.nets.generators.loops import rows_of_epoch
from lib.nets.generators.prior import the_prior, to_data, to_generator
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, positive, whole

MATCHED = ("logit", "feat", "grad")


class Pool:
    """One live network of a pool of architectures, and its optimiser."""

    def __init__(self, names: tuple[str, ...], train: ImageSet):
        self.names, self.train = names, train
        self.which, self.network, self.optimiser = -1, None, None

    def take(self, which: int) -> None:
        """The architecture of that number, of any weights."""
        self.which, self.network = which, nets.make(self.names[which], self.train)
        self.optimiser = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def renew(self, generator: torch.Generator) -> None:
        """Another architecture with new weights."""
        self.take(int(torch.randint(len(self.names), (), generator=generator, device=generator.device)))
        nets.initialise(self.network, generator).train()

    def state_dict(self) -> dict[str, Any]:
        if self.network is None:
            return {"which": -1}
        parts = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
        return {"which": self.which} | parts

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved["which"] < 0:
            return
        self.take(saved["which"])
        self.network.load_state_dict(saved["network"])
        self.network.train()
        self.optimiser.load_state_dict(saved["optimiser"])


@dataclass
class State:
    network: GAN
    optimiser: torch.optim.Optimizer  # of the generator
    opponent: torch.optim.Optimizer  # of the critic
    pool: Pool
    deck: Tensor  # (batches, batch) positions not yet seen in this epoch
    done: int
    codes: Tensor  # of the fixed set
    labels: Tensor = field(metadata={"constant": True})
    train: ImageSet = field(metadata={"constant": True})


@dataclass(frozen=True)
class DiM:
    r"""Hyper-parameters of the published command; section 4.1.

    Attributes:
        prior: how generator and critic are trained in the first stage.
        iterations: steps of the second, 0 or more (default: 100 epochs of CIFAR-10); lr: of both networks; batch: images, 2 or more.
        match: what is matched: "logit", "feat" or "grad"; gap: d, the distance of features and gradients, "l1", ...; weight: of the
            matching, 0 or more (published for features and gradients: 0.001).
        pool: names of ``lib.nets`` that $\phi$ is drawn from; network_steps: of its training before every step; renew_every: steps
            between two draws, None: an epoch.
        augmentation: families combined as IDC does; one draw for the whole batch.
    """

    prior: ACGAN = ACGAN()
    iterations: int = 100 * (50_000 // 64)
    lr: float = 5e-6
    batch: int = 64
    match: str = "logit"
    gap: str = "l1"
    weight: float = 0.01
    pool: tuple[str, ...] = (
        "convnet-d3-w128", "resnet10-w32-batch", "resnet18-w32-batch", "resnet10ap-w32-batch", "resnet18ap-w32-batch"
    )  # fmt: skip
    network_steps: int = 16
    renew_every: int | None = None
    augmentation: str = "color_crop_cutout"

    def __post_init__(self) -> None:
        choose("kind of matching", self.match, dict.fromkeys(MATCHED))
        choose("distance", self.gap, GAPS)
        positive(self, "lr")
        whole(self, iterations=0, batch=2, network_steps=0)
        if self.renew_every is not None:
            whole(self, renew_every=1)
        if not isinstance(self.prior, ACGAN):
            raise CompanionError(f"prior {self.prior!r} has no critic: allowed is an ACGAN")
        if not self.weight >= 0:
            raise CompanionError(f"weight {self.weight!r} is not allowed: 0 or more")
        if not self.pool:
            raise CompanionError("an empty pool: allowed is one network or more")
        for name in self.pool:
            nets.parse(name)

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> DiM:
        """The same method with ``count`` steps of matching."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        network = the_prior(self.prior, train).requires_grad_(True).train()
        optimiser, opponent = network.optimisers(self.lr)
        labels = class_major(train.num_classes, ipc, train.device)
        codes, deck = network.draw(labels, generator), labels.new_zeros(0, min(self.batch, len(train)))
        return State(network, optimiser, opponent, Pool(self.pool, train), deck, 0, codes, labels, train)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the generator, then one of the critic, on the same real batch."""
        rows = self.rows(state, generator)
        x, y = state.train.images[rows], state.train.labels[rows]
        fake = state.network(state.network.draw(y, generator), y)  # in [-1, 1]

        adversarial = generator_loss(state.network, fake, y)
        gap = torch.zeros_like(adversarial)
        if self.weight:
            gap = self.weight * self.matching(state, x, to_data(fake, state.train.transform), y, generator)
        state.optimiser.zero_grad()
        (adversarial + gap).backward()
        state.optimiser.step()

        real, penalty = to_generator(x, state.train.transform), self.prior.penalty_at(state.done)
        critic = critic_step(state.network, state.opponent, real, y, generator, penalty)
        state.done += 1
        return {"loss": (adversarial + gap).detach(), "matching": gap.detach(), "critic": critic}

    def rows(self, state: State, generator: torch.Generator) -> Tensor:
        """Positions of the next real batch; every image once in an epoch, a smaller last batch left out."""
        new = not len(state.deck)
        if new:
            state.deck = torch.stack(rows_of_epoch(len(state.train), self.batch, generator))
        if self.weight and (new if self.renew_every is None else state.done % self.renew_every == 0):
            state.pool.renew(generator)
        rows, state.deck = state.deck[-1], state.deck[:-1]
        return rows

    def matching(
        self, state: State, x: Tensor, fake: Tensor, y: Tensor, generator: torch.Generator
    ) -> Tensor:
        """How differently the network of the pool, trained a little more, sees real and generated images."""
        names = families(self.augmentation, state.train)
        self.train_network(state, names, generator)
        if names:  # one transform and its parameters for all images
            omega = augment.draw(names, 1, generator, mode="idc").repeat(2 * len(x))
            x, fake = augment.apply(torch.cat([x, fake]), omega).chunk(2)
        phi = state.pool.network.requires_grad_(self.match == "grad")
        if self.match == "logit":
            return logit_gap(phi(x).detach(), phi(fake))
        if self.match == "feat":
            return feature_gap([tap.detach() for tap in phi.taps(x)], phi.taps(fake), self.gap)
        weights = [w for w in phi.parameters() if w.dim() == 4]
        real = torch.autograd.grad(F.cross_entropy(phi(x), y), weights)
        return gradient_gap(
            real, torch.autograd.grad(F.cross_entropy(phi(fake), y), weights, create_graph=True), self.gap
        )

    def train_network(self, state: State, names: tuple[str, ...], generator: torch.Generator) -> None:
        """Some steps of $\\phi$ on random real batches, each image transformed by itself, without cutout."""
        kept = tuple(name for name in names if name != "cutout")
        phi, train = state.pool.network.requires_grad_(True), state.train
        shape = (self.network_steps, min(self.batch, len(train)))
        for rows in torch.randint(len(train), shape, generator=generator, device=train.device):
            x = train.images[rows]
            if kept:
                x = augment.apply(x, augment.draw(kept, 1, generator, len(rows), mode="idc"))
            state.pool.optimiser.zero_grad()
            F.cross_entropy(phi(x), train.labels[rows]).backward()
            state.pool.optimiser.step()

    def finish(self, state: State) -> SyntheticSet:
        """So many draws of every class, with the generator as their decoder."""
        decoder = Generated.of(state.network, self.prior, state.train)
        codes, train = decoder.codes(state.codes, state.labels), state.train
        return SyntheticSet(codes, state.labels, train.classes, train.transform, decoder)


_PAPER = DiM()
_DIGITS = DiM(
    prior=ACGAN(
        steps=600, lr=1e-3, batch=64, width=64, least=2, convs=(0, 0), critic_width=64, critic_convs=2, strided=(1, 2),
        penalty_every=4, average=0.98,
    ),
    iterations=100, lr=5e-5, weight=1.0, pool=("convnet-d2-w16", "convnet-d2-w32", "convnet-d2-w48"), network_steps=2, renew_every=50,
    augmentation="none",
)  # fmt: skip
_LONG = replace(  # two minutes of a core instead of half of one
    _DIGITS,
    prior=replace(
        _DIGITS.prior, steps=1000, lr=5e-4, convs=(1, 1), critic_convs=4, strided=(2, 4), penalty_every=1
    ),
)
_FASHION = replace(
    _DIGITS,
    prior=replace(_DIGITS.prior, least=4, critic_convs=3, strided=(1, 2, 3)),
    pool=("convnet-d3-w16", "convnet-d3-w32", "convnet-d3-w48"),
)


def _of(images: int, convs: tuple[int, ...] = (3, 1, 0)) -> DiM:
    """The published command on so many training images."""
    prior = replace(_PAPER.prior, steps=150 * (images // 128), convs=convs)
    return replace(_PAPER, prior=prior, iterations=100 * (images // 64))


_COMMAND = "the published command; section 4.1"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("digits", _LONG, variant="long", source="judged by a fifth of the training images: 95.0 % against 91.6 %, new images at IPC 1"),
    small(
        "fashion14",
        _FASHION,
        source="the settings of digits with networks for 14 pixels, not chosen on these data",
    ),
    published("cifar10", (1, 10, 50), _of(50_000), "dim", _COMMAND),
    published("svhn", (1, 10, 50), _of(73_257), "dim", _COMMAND),
    published("mnist fashionmnist", (1, 10, 50), _of(60_000), "dim", _COMMAND),
)
