r"""FRePo - Dataset Distillation using Neural Feature Regression with Pooling. Zhou, Nezhadarya & Ba, NeurIPS 2022,
arXiv 2206.00719.

$$\min_{X_s,\,y_s}\ \tfrac12\,\mathrm{mean}_i\lVert\hat y_{t,i}-y_{t,i}\rVert^2
 -\mathrm{mean}_j\min\big(y_{s,j}^{(1)}-y_{s,j}^{(2)},\ \tfrac1C\big),\qquad
\hat y_t=\Phi_t\Phi_s^\top\big(\Phi_s\Phi_s^\top+\lambda\tfrac{\operatorname{tr}}{m}I\big)^{-1}y_s$$

where $\Phi$ are the features of one network of a pool. The last layer is trained to convergence in closed form; the features
are held fixed for the step and come from networks that are themselves trained on the current S, one Adam step each time they are
used, and drawn anew after M + 1 such steps. (RFAD takes N fresh networks instead; KIP infinitely wide ones.) $y^{(1)}, y^{(2)}$
are the two largest entries of a learned label.

Code: the published code is the reference. Its whitening of high resolutions in blocks is left out; ``lib.data.load(...,
whiten="zca")`` whitens centred pixels as it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.formation.start import initial_pixels
from lib.kernels import ridge
from lib.nets.widening import FeatureNet
from lib.optim.lamb import Lamb
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, check_several

LOWEST = 0.1  # of the cosine schedule, times lr
NETWORK_BATCH = 1000  # synthetic images in one training step of a network


@dataclass
class State:
    pixels: Tensor  # X_s, (m, c, h, w)
    labels: Tensor  # y_s, (m, C)
    optimiser: Lamb
    pool: nn.ModuleList  # N networks
    trainer: torch.optim.Adam  # of all of them; a step moves those with a gradient
    ages: list[int]  # training steps since the last reset, staggered at the start
    current: int
    done: int
    train: object = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})


@dataclass(frozen=True)
class FRePo:
    r"""Hyper-parameters of the published commands.

    Attributes:
        iterations: updates, 0 or more; networks: N, the pool; online_updates: M; a network older than so many training steps is drawn
            anew.
        lr: of images and labels, along a cosine to a tenth; lr_network: of the pool.
        real_batch: real images of all classes in a step; ridge: $\lambda$, times the mean of the diagonal, 0 or more.
        width, depth: of the pool's networks: channels of the first block, and blocks (4 for 64 pixels); norm: batch norm in them.
        flip: add mirror images to the support; off for digits, and for CIFAR-100 from IPC 10.
        learn_labels: labels are learned, too; init: where images start: "real" or "noise".
    """

    iterations: int = 500_000
    networks: int = 10
    online_updates: int = 100
    lr: float = 3e-4
    lr_network: float = 3e-4
    real_batch: int = 1024
    ridge: float = 1e-6
    width: int = 128
    depth: int = 3
    norm: bool = True
    flip: bool = True
    learn_labels: bool = True
    init: str = "real"

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        self.check()
        check_several(train.num_classes, "FRePo")
        pixels = initial_pixels(train, ipc, self.init, generator).requires_grad_()
        classes, hard = train.num_classes, class_major(train.num_classes, ipc, pixels.device)
        labels = ridge.centred_one_hot(hard, classes, pixels.dtype) / math.sqrt(classes / 10)
        learned = [pixels, labels.requires_grad_()] if self.learn_labels else [pixels]
        pool = [
            FeatureNet(train, self.width, self.depth, self.norm).to(train.device)
            for _ in range(self.networks)
        ]
        for network in pool:
            network.reset(generator)
        pool = nn.ModuleList(pool)
        trainer = torch.optim.Adam(pool.parameters(), lr=self.lr_network)
        optimiser = Lamb(learned, lr=self.lr)
        ages = [i * (self.online_updates // self.networks) for i in range(self.networks)]
        return State(pixels, labels, optimiser, pool, trainer, ages, 0, 0, train, ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of images and labels in the features of one network, one training step of that network, and the next."""
        network = state.pool[state.current].eval().requires_grad_(False)
        rows = torch.randperm(len(state.train), generator=generator, device=state.pixels.device)[
            : self.real_batch
        ]
        with torch.no_grad():
            phi_t = network.embed(state.train.images[rows])

        loss = self.objective(network.embed, state.pixels, state.labels, phi_t, state.train.labels[rows])

        state.optimiser.zero_grad()
        loss.backward()
        for group in state.optimiser.param_groups:
            group["lr"] = self.rate(state.done)
        state.optimiser.step()
        self.advance(state, generator)
        state.done += 1
        state.current = int(torch.randint(self.networks, (), generator=generator, device=rows.device))
        labels = state.labels.detach()
        return {
            "loss": loss.detach().float(),
            "label_max": labels.amax(1).mean(),
            "label_margin": ridge.lead(labels).mean(),
        }

    def objective(self, phi, pixels: Tensor, labels: Tensor, phi_t: Tensor, y_t: Tensor) -> Tensor:
        """Loss of the regression from features ``phi`` of S (and its mirror images) to ``phi_t`` (n, D), classes y_t (n,)."""
        support, y_s = (
            (torch.cat([pixels, pixels.flip(3)]), labels.repeat(2, 1)) if self.flip else (pixels, labels)
        )
        phi_s, phi_t = (
            phi(support).double(),
            phi_t.double(),
        )  # lambda lies below the rounding of a 32-bit Gram matrix
        prediction = ridge.predict(phi_t @ phi_s.T, phi_s @ phi_s.T, y_s.double(), self.ridge)
        wanted = ridge.centred_one_hot(y_t, labels.shape[1])
        return labels.shape[1] * ridge.mse(prediction, wanted) + ridge.margin(labels)

    def rate(self, done: int) -> float:
        """Cosine from lr to a tenth of it."""
        return self.lr * (LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * done / self.iterations)))

    def advance(self, state: State, generator: torch.Generator) -> None:
        """Train the used network by one step on S as it is now; when it is older than M, draw it anew instead."""
        k = state.current
        network = state.pool[k]
        if state.ages[k] > self.online_updates:
            network.reset(generator)
            for parameter in network.parameters():
                state.trainer.state.pop(parameter, None)
            state.ages[k] = 0
            return
        images, labels = state.pixels.detach(), state.labels.detach()
        if len(images) > NETWORK_BATCH:
            rows = torch.randperm(len(images), generator=generator, device=images.device)[:NETWORK_BATCH]
            images, labels = images[rows], labels[rows]
        network.train().requires_grad_(True)
        state.trainer.zero_grad()
        (F.mse_loss(network(images), labels) * labels.shape[1] / 2).backward()
        state.trainer.step()
        state.trainer.zero_grad()
        state.ages[k] += 1

    def finish(self, state: State) -> SyntheticSet:
        """The images with their learned labels, or with hard ones."""
        hard = class_major(state.train.num_classes, state.ipc, state.pixels.device)
        labels = state.labels.detach().clone() if self.learn_labels else hard
        return SyntheticSet(state.pixels.detach().clone(), labels, state.train.classes, state.train.transform)

    def check(self) -> None:
        for name, least in {
            "networks": 1,
            "online_updates": 0,
            "width": 1,
            "depth": 1,
            "real_batch": 1,
        }.items():
            if getattr(self, name) < least:
                raise CompanionError(f"{name} {getattr(self, name)}; allowed: {least} or more")
        if not self.ridge >= 0:
            raise CompanionError(f"ridge {self.ridge:g}; allowed: 0 or more")


_SMALL = FRePo(
    iterations=100, networks=4, online_updates=20, lr=3e-2, lr_network=3e-3, real_batch=128, width=32
)
_PHOTOS = replace(_SMALL, lr=3e-3, iterations=80)
_COMMANDS = "published commands"
_NO_FLIP, _DEEP = FRePo(flip=False), FRePo(depth=4)
RECIPES = Recipes(
    small("digits", replace(_SMALL, flip=False), "own-rfad"),
    small("fashion14", replace(_SMALL, flip=False, iterations=60), "own-rfad"),
    small("photos16 photos32", _PHOTOS, "own-rfad"),
    published("mnist fashionmnist", (1, 10, 50), _NO_FLIP, "own-frepo", _COMMANDS),
    published("cifar10", (1, 10, 50), FRePo(), "own-frepo", _COMMANDS, whiten="zca"),
    published("cifar100", 1, FRePo(), "own-frepo", _COMMANDS, whiten="zca"),
    published("cifar100", (10, 50), _NO_FLIP, "own-frepo", f"{_COMMANDS}: no flips from IPC 10 on", whiten="zca"),
    published("tinyimagenet", 1, _DEEP, "own-frepo", _COMMANDS, whiten="zca"),
    published("tinyimagenet", 10, replace(_DEEP, flip=False), "own-frepo", f"{_COMMANDS}: no flips", whiten="zca"),
    published("imagenet", (1, 2), replace(_DEEP, flip=False), "own-frepo",
              f"{_COMMANDS}: 64 pixels, no flips; theirs are whitened in blocks", whiten="zca"),
)  # fmt: skip
