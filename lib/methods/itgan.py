r"""IT-GAN - Synthesizing Informative Training Samples with GAN. Zhao & Bilen, NeurIPS 2022 workshop, arXiv 2204.07513.

$$\min_z\ \mathbb E_{\theta,\omega}\sum_c(1-\lambda)\Big\lVert\tfrac1m\sum_i f_{c,i}
-\tfrac1n\sum_j\psi_\theta(\mathcal A_\omega x_{c,j})\Big\rVert_2^2
+\lambda\,\tfrac1m\sum_i\lVert f_{c,i}-\psi_\theta(\mathcal A_\omega x_{c,i})\rVert_2^2,\qquad
f_{c,i}=\psi_\theta(\mathcal A_\omega\,G(z_{c,i},c))$$

A conditional generator is frozen; what is learned is a latent z for each of ``ipc`` real images of a class (in the paper: for all). z
starts where its image is like its real partner (inversion, ``lib.nets.generators.inversion``) and is then moved by DM's loss; the
second term keeps every image near its partner, so that the images of a class do not become one. One $\omega$ per class and step, shared
by the three batches.

Paper and code: the released script draws a network for every class, here one serves all classes of a step, as in DM; its Adam per class is
the joint one, coordinate by coordinate. It skips the second term at $\lambda\le10^{-5}$, and so does this. Its default is random
networks, and so it is here; the released latents were made with a bank of partly trained ones: ``networks=Bank()`` (``lib.nets.bank``), the
recipes of variant "bank". Names of the released files print $\lambda$ as 0.000.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib import augment
from lib.augment import augment_by_class, families
from lib.data.imageset import ImageSet
from lib.formation import by_class
from lib.formation.generated import Generated
from lib.match.features import class_mean, paired
from lib.nets.bank import Bank
from lib.nets.ensemble import Ensemble
from lib.nets.generators import BigGAN, Generator, LayeredVAE, Prior, SpatialVAE, the_prior
from lib.nets.generators.inversion import encoded, invert
from lib.nets.generators.prior import room_for, to_data
from lib.nets.supply import Fresh
from lib.nets.training import halving_schedule, sgd_steps
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, choose, positive, whole

INVERSIONS = ("adam", "encoder", "none")
NEGLIGIBLE = 1e-5  # a regulariser up to this is skipped, as in the released script


@dataclass
class State:
    z: Tensor  # (C * ipc, *latent), class-major
    optimiser: torch.optim.Optimizer
    supply: Any  # what the supply of networks keeps
    partners: Tensor = field(metadata={"constant": True})  # the real image of every latent
    generator: Generator = field(metadata={"constant": True})  # G
    train: ImageSet = field(metadata={"constant": True})


@dataclass(frozen=True)
class ITGAN:
    r"""Hyper-parameters of the released scripts; the defaults are those of CIFAR-10.

    Attributes:
        prior: how the generator is trained (``lib.nets.generators``).
        iterations: updates, 0 or more (published: 5000 to 10 000); lr: of the latents; regulariser: $\lambda$, 0 to 1.
        batch: latents of a class that one update moves, always the same ones; None: all.
        real_batch: real images per class and step, 1 or more; the smallest class where it has fewer.
        network: a name of ``lib.nets``; networks: which of them a step looks at (``lib.nets.supply``); augmentation, mode: as DM's.
        inversion: how latents start: "adam"; "encoder": of a prior that has one; "none": standard normal.
        inversion_steps, inversion_lr: of Adam; inversion_batch: images at once; cosine: its rate along a cosine to 0, for few steps.
        classifier_epochs: of the network whose features are inverted; 0: untrained.
    """

    prior: Prior = LayeredVAE()
    iterations: int = 5000
    lr: float = 1e-3
    regulariser: float = 1e-3
    batch: int | None = 1250
    real_batch: int = 500
    network: str = "convnet-d3-w128"
    networks: Any = Fresh()
    augmentation: str = "data"
    mode: str = "single"
    inversion: str = "adam"
    inversion_steps: int = 5000
    inversion_lr: float = 0.1
    inversion_batch: int = 100
    cosine: bool = False
    classifier_epochs: int = 200

    def __post_init__(self) -> None:
        choose("inversion", self.inversion, dict.fromkeys(INVERSIONS))
        whole(
            self, iterations=0, real_batch=1, inversion_steps=0, inversion_batch=1, classifier_epochs=0,
            **({} if self.batch is None else {"batch": 1}),
        )  # fmt: skip
        positive(self, "lr", "inversion_lr")
        if not 0 <= self.regulariser <= 1:
            raise CompanionError(f"regulariser {self.regulariser!r} is not allowed: 0 to 1")

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> ITGAN:
        """The same method with ``count`` iterations."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        G = the_prior(self.prior, train)
        room_for(train.num_classes * ipc, torch.Size(G.latent).numel(), train.device)
        partners = train.sample(ipc, generator).flatten(0, 1)
        z = self.inverted(G, partners, train, generator).requires_grad_()
        supply = self.networks.begin(self.network, train, generator)
        return State(z, torch.optim.Adam([z], lr=self.lr), supply, partners, G, train)

    def inverted(self, G: Generator, images: Tensor, train: ImageSet, generator: torch.Generator) -> Tensor:
        """The latents at which stage 2 starts, ``(C * ipc, *latent)``."""
        y = class_major(train.num_classes, len(images) // train.num_classes, train.device)
        z = G.draw(y, generator)
        if self.inversion == "encoder":
            return encoded(G, images, y, train.transform)
        if self.inversion == "none":
            return z
        seen = Ensemble.make(self.network, train, [generator])
        settings = (self.network, self.classifier_epochs, self.augmentation, self.inversion_steps, self.inversion_lr,
                    self.inversion_batch, self.cosine, self.prior.recipe(), self.prior.weights)  # fmt: skip
        start = (seen.parameters, seen.buffers, z, images, train.fingerprint, train.device.type)
        key = digest(settings, start, code_digest(__name__))

        def compute() -> dict[str, Tensor]:
            psi = self.classifier(seen, train).eval().requires_grad_(False).embed
            options = {"steps": self.inversion_steps, "lr": self.inversion_lr, "cosine": self.cosine}
            parts = (part.split(self.inversion_batch) for part in (images, y, z))
            found = [
                invert(G, psi, x, c, train.transform, begun, **options)
                for x, c, begun in zip(*parts, strict=True)
            ]
            return {"z": torch.cat(found)}

        return stored(f"inversion-{key}", compute)["z"].to(train.device)

    def classifier(self, networks: Ensemble, train: ImageSet) -> torch.nn.Module:
        """The network whose features are inverted, trained on the real images: SGD at 0.01, a tenth after half of the epochs."""
        if self.classifier_epochs:
            rate, drop = halving_schedule(0.01, self.classifier_epochs)
            own = torch.Generator(train.device).manual_seed(0)
            sgd_steps(
                networks, train.images.unsqueeze(0), train.labels.unsqueeze(0), [own], epochs=self.classifier_epochs,
                lr=rate, momentum=0.9, weight_decay=5e-4, batch=256, fresh_at=(drop,),
                augmentation="_".join(families(self.augmentation, train)) or "none",
            )  # fmt: skip
        return networks.network(0)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of all latents, batch by batch, in one network."""
        psi = self.networks.draw(state.supply, generator)
        ipc = len(state.z) // state.train.num_classes
        found = []
        for rows in torch.arange(ipc, device=state.z.device).split(self.batch or ipc):
            con, reg = self.losses(state, psi, rows, generator)
            loss = ((1 - self.regulariser) * con + self.regulariser * reg).sum()
            state.optimiser.zero_grad()
            loss.backward()
            state.optimiser.step()
            found.append(torch.stack([loss, con.sum(), reg.sum()]).detach())
        self.networks.after(state.supply, state.train, generator)
        return dict(zip(("loss", "con", "reg"), torch.stack(found).mean(0), strict=True))

    def losses(
        self, state: State, psi: torch.nn.Module, rows: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$L_{con}$ and $L_{reg}$ of these latents of every class, ``(C,)`` each."""
        train, C = state.train, state.train.num_classes
        z, x = (by_class(all_of, C)[:, rows] for all_of in (state.z, state.partners))  # (C, m, ...)
        y = class_major(C, len(rows), z.device)
        syn = by_class(to_data(state.generator(z.flatten(0, 1), y), train.transform), C)
        real = train.sample(min(self.real_batch, train.smallest_class), generator)
        if names := families(self.augmentation, train):
            omega = augment.draw(names, C, generator, mode=self.mode)
            syn, x, real = (augment_by_class(images, omega) for images in (syn, x, real))

        def features(images: Tensor) -> Tensor:
            return by_class(psi.embed(images.flatten(0, 1)), C)  # (C, m, d)

        f = features(syn)
        with torch.no_grad():
            target = features(real)
        con = class_mean(target, f)
        if self.regulariser <= NEGLIGIBLE:
            return con, torch.zeros_like(con)
        with torch.no_grad():
            r = features(x)
        return con, paired(r, f)

    def finish(self, state: State) -> SyntheticSet:
        """The latents, and the generator as their decoder."""
        train, z = state.train, state.z.detach().clone()
        labels = class_major(train.num_classes, len(z) // train.num_classes, z.device)
        decoder = Generated.of(state.generator, self.prior, train)
        return SyntheticSet(decoder.codes(z, labels), labels, train.classes, train.transform, decoder)


_PAPER = ITGAN(BigGAN())
_DIGITS = ITGAN(
    iterations=150, lr=0.05, batch=None, real_batch=64, network="convnet-d2-w32", augmentation="none", inversion_steps=100,
    cosine=True, classifier_epochs=0,
)  # fmt: skip
_PHOTOS = replace(
    _DIGITS, prior=SpatialVAE(), lr=0.02, real_batch=32, network="convnet-d3-w32", augmentation="data", inversion="encoder"
)  # fmt: skip
_AS_DIGITS = "the settings of digits with a network for 14 pixels and a longer trained prior, not chosen on these data"
_FASHION = replace(_DIGITS, prior=LayeredVAE(steps=1000), real_batch=32, network="convnet-d3-w32")
_SCRIPTS = "released training scripts; one latent for every training image, split in four jobs a class"
_BANK = "what the released latents were made with: snapshots by accuracy, here of training images"
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _FASHION, source=_AS_DIGITS),
    small("photos16 photos32", _PHOTOS),
    published("cifar10", 5000, _PAPER, "itgan", _SCRIPTS),
    published("cifar10", 5000, replace(_PAPER, networks=Bank()), "itgan", _BANK, variant="bank"),
    published(
        "cifar100",
        500,
        replace(_PAPER, batch=500),
        "itgan",
        "released training scripts; jobs of five classes",
    ),
    published(
        "cifar100", 500, replace(_PAPER, batch=500, networks=Bank(least=40.0)), "itgan", _BANK, variant="bank"
    ),
)
