r"""DCGM - Dataset Condensation via Generative Model. Zhang, Wang, Xue, Yan, Zhang, Bai & Shou, 2023, arXiv 2309.07698. A reconstruction.

$$\min_{E,G}\ \mathbb E_{\theta,\omega}\ \sum_c\Big\lVert\tfrac1n\sum_i f_{c,i}-\bar r_c\Big\rVert_2^2
+\lambda_a\,\mathcal R_{intra}+\lambda_e\,\mathcal R_{inter}+\lambda_g\,\mathcal L_G,\qquad
f_{c,i}=\psi_\theta(\mathcal A_\omega\,G(e_{c,i},c))$$

Learned are a code $e_{c,i}$ for every condensed image and the generator G, which all classes share: the numbers to store hardly grow
with classes and pixels. $\mathcal R_{intra}$ drives the images of a class apart, $\mathcal R_{inter}$ the centres of classes
(``lib.match.relations``). The GAN loss $\mathcal L_G$ keeps images of new noise realistic while the generator is learned, against a critic
that is trained beside it (``lib.nets.generators.gan``).

Reconstruction: there is no code of the authors, and what could be read is the abstract and the objective above without the formulas of its
terms, without architecture, settings and tables. The two relation losses, the kind of GAN, Adam, all weights and rates are ours. The
GAN loss is off (weight 0) unless asked for: the small VAEs have no critic.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib import augment
from lib.augment import augment_by_class, families
from lib.data.imageset import ImageSet
from lib.formation import by_class
from lib.formation.generated import Generated
from lib.match import relations
from lib.match.features import class_mean
from lib.nets.generators import BigGAN, Generator, LayeredVAE, Prior, SpatialVAE, the_prior
from lib.nets.generators.gan import ACGAN, critic_step, generator_loss
from lib.nets.generators.inversion import encoded
from lib.nets.generators.prior import room_for, to_data, to_generator
from lib.nets.supply import Fresh
from lib.recipes import Recipe, Recipes, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, positive, whole

STARTS = ("normal", "encoder")


@dataclass
class State:
    codes: Tensor  # E, (C * ipc, *latent), class-major
    generator: Generator  # G, a copy that is learned; with a GAN loss its critic, too
    optimiser: torch.optim.Optimizer
    opponent: torch.optim.Optimizer | None  # of the critic
    done: int
    supply: Any  # what the supply of networks keeps
    train: ImageSet = field(metadata={"constant": True})


@dataclass(frozen=True)
class DCGM:
    r"""Our choices: no settings are known.

    Attributes:
        prior: how the generator is trained (``lib.nets.generators``).
        iterations: updates, 0 or more; lr: of the codes; lr_generator: of the generator (1e-5 for large pretrained ones);
            learn_generator: whether it moves.
        intra, inter: $\lambda_a$ and $\lambda_e$, weights of the relations within and between classes, 0 or more; margin_intra,
            margin_inter: cosines up to these count for nothing.
        gan: $\lambda_g$, weight of the GAN loss, 0 or more; above 0 the prior is an ACGAN, whose batch, penalty and critic serve here.
        centred: relations around the mean real feature; False: around 0, where all cosines are near 0.9.
        start: of the codes: "normal"; "encoder": those of random real images.
        real_batch: real images per class and step, 1 or more; the smallest class where it has fewer.
        network: a name of ``lib.nets``; networks: which of them a step looks at (``lib.nets.supply``).
        augmentation, mode: as DM's.
    """

    prior: Prior = LayeredVAE()
    iterations: int = 5000
    lr: float = 0.02
    lr_generator: float = 5e-4
    learn_generator: bool = True
    intra: float = 1.0
    inter: float = 1.0
    margin_intra: float = 0.0
    margin_inter: float = 0.0
    gan: float = 0.0
    centred: bool = True
    start: str = "normal"
    real_batch: int = 256
    network: str = "convnet-d3-w128"
    networks: Any = Fresh()
    augmentation: str = "data"
    mode: str = "single"

    def __post_init__(self) -> None:
        choose("start", self.start, dict.fromkeys(STARTS))
        whole(self, iterations=0, real_batch=1)
        positive(self, "lr", "lr_generator")
        for name in ("intra", "inter", "gan"):
            if not getattr(self, name) >= 0:
                raise CompanionError(f"{name} {getattr(self, name)!r} is not allowed: 0 or more")
        if self.gan and not isinstance(self.prior, ACGAN):
            raise CompanionError(
                f"prior {self.prior!r} has no critic: with gan={self.gan} an ACGAN is allowed"
            )
        if self.gan and not self.learn_generator:
            raise CompanionError(
                f"gan {self.gan} for a frozen generator: allowed is 0, or learn_generator=True"
            )

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> DCGM:
        """The same method with ``count`` updates."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        trained = the_prior(self.prior, train)
        room_for(train.num_classes * ipc, torch.Size(trained.latent).numel(), train.device)
        y = class_major(train.num_classes, ipc, train.device)
        if self.start == "encoder":
            codes = encoded(trained, train.sample(ipc, generator).flatten(0, 1), y, train.transform)
        else:
            codes = trained.draw(y, generator)
        G = copy.deepcopy(trained).requires_grad_(True) if self.gan else trained.alone()
        opponent = G.optimisers(self.lr_generator)[1] if self.gan else None
        groups = [{"params": [codes.requires_grad_()], "lr": self.lr}]
        if self.learn_generator:
            own = G.own() if self.gan else list(G.parameters())
            groups.append({"params": own, "lr": self.lr_generator})
        else:
            G.requires_grad_(False)
        supply = self.networks.begin(self.network, train, generator)
        return State(codes, G, torch.optim.Adam(groups), opponent, 0, supply, train)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of codes and generator."""
        psi, train, C = self.networks.draw(state.supply, generator), state.train, state.train.num_classes
        y = class_major(C, len(state.codes) // C, state.codes.device)
        syn = by_class(to_data(state.generator(state.codes, y), train.transform), C)  # (C, n, c, h, w)
        real = train.sample(min(self.real_batch, train.smallest_class), generator)
        if names := families(self.augmentation, train):
            omega = augment.draw(names, C, generator, mode=self.mode)
            syn, real = augment_by_class(syn, omega), augment_by_class(real, omega)

        f = psi.embed(syn.flatten(0, 1))  # (C n, d)
        with torch.no_grad():
            r = by_class(psi.embed(real.flatten(0, 1)), C)
        mu = r.mean((0, 1)) if self.centred else 0.0
        match = class_mean(r, by_class(f, C)).sum()
        apart = relations.intra(f, y, mu, self.margin_intra)
        between = relations.inter(f, y, mu, self.margin_inter)
        found = {"match": match, "intra": apart, "inter": between}
        loss = match + self.intra * apart + self.inter * between
        if self.gan:
            x, t = self.criticised(state, generator)
            found["gan"] = generator_loss(
                state.generator, state.generator(state.generator.draw(t, generator), t), t
            )
            loss = loss + self.gan * found["gan"]

        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        if self.gan:
            penalty = self.prior.penalty_at(state.done)
            found["critic"] = critic_step(state.generator, state.opponent, x, t, generator, penalty)
        state.done += 1
        self.networks.after(state.supply, train, generator)
        return {name: value.detach() for name, value in ({"loss": loss} | found).items()}

    def criticised(self, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Real images for the critic, in [-1, 1], and their classes."""
        train = state.train
        rows = torch.randint(len(train), (self.prior.batch,), generator=generator, device=train.device)
        return to_generator(train.images[rows], train.transform), train.labels[rows]

    def finish(self, state: State) -> SyntheticSet:
        """The codes, and the learned generator as their decoder."""
        train, codes = state.train, state.codes.detach().clone()
        labels = class_major(train.num_classes, len(codes) // train.num_classes, codes.device)
        decoder = Generated.of(state.generator, self.prior, train)
        return SyntheticSet(decoder.codes(codes, labels), labels, train.classes, train.transform, decoder)


_DIGITS = DCGM(iterations=150, real_batch=64, network="convnet-d2-w32", augmentation="none")
_PHOTOS = replace(
    _DIGITS, prior=SpatialVAE(), start="encoder", real_batch=32, network="convnet-d3-w32", augmentation="data"
)  # fmt: skip
_AS_DIGITS = "the settings of digits with a network for 14 pixels and a longer trained prior, not chosen on these data"
_FASHION = replace(_DIGITS, prior=LayeredVAE(steps=1000), real_batch=32, network="convnet-d3-w32")
_OURS = "our choices, not tried: no settings of the authors are known"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _FASHION, source=_AS_DIGITS),
    small("photos16 photos32", _PHOTOS),
    [
        Recipe("cifar10", ipc, DCGM(BigGAN(), lr_generator=1e-5), "dsa", _OURS, "reconstruction")
        for ipc in (1, 10, 50)
    ],
)
