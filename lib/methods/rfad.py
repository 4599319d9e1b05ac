r"""RFAD - Efficient Dataset Distillation using Random Feature Approximation. Loo, Hasani, Amini & Rus, NeurIPS 2022,
arXiv 2210.12067.

$$\min_{X_s,\,y_s,\,T,\,k}\ \ell\big(\hat K_{ts}(\hat K_{ss}+\lambda\tfrac{\operatorname{tr}\hat K_{ss}}mI)^{-1}y_s,\ y_t\big),
\qquad \hat K(x,x')=2\,\Phi(x)\,\Phi(x')^\top+0.01,\qquad
\Phi=\tfrac1{\sqrt{ND}}\,[f_{\theta_1},\dots,f_{\theta_N}]$$

with N new random ConvNets at every step, so that $\hat K$ estimates their NNGP kernel: the kernel regression of KIP with another
kernel, at the cost of a few forward passes. $\ell$ is half the mean squared error on centred one-hot labels (``mse``) or the
cross-entropy of $e^k\hat y_t$, k learned (``platt``). T is a linear map of the flattened pixels; the distilled images are $X_sT$.

Paper and code: T is in the code only. Validation images are drawn here without replacement, and a corruption mask acts on single
channel values. The published gradient accumulation merely skips steps, and its starts by herding or variance are left out.
Whitening is a matter of the data, and of the recipes: ``zca-rfad`` for CIFAR, ``zca-kip`` for SVHN.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib.formation.start import initial_pixels
from lib.kernels import ridge
from lib.kernels.feature_maps import Blocks, conjugate_kernel, conv_features, random_blocks
from lib.optim.adabelief import AdaBelief
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose

LOSSES = ("mse", "platt")
VALIDATION_SEED = 0  # of the validation networks, the same in every run


@dataclass
class Validation:
    """Networks that are never trained on, and what they say about some training images."""

    blocks: Blocks
    features: Tensor
    labels: Tensor


@dataclass
class State:
    pixels: Tensor  # X_s, (m, c, h, w)
    labels: Tensor  # y_s, (m, C)
    transform: Tensor  # T, (d, d)
    log_scale: Tensor  # k, 64 bits
    optimiser: AdaBelief
    best: dict[str, Tensor]  # images, labels and validation loss of the best step so far
    best_step: int
    done: int
    loss: Tensor
    checked: Tensor  # the last validation loss
    train: object = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})
    start: Tensor = field(metadata={"constant": True})
    mask: Tensor = field(metadata={"constant": True})  # (m, c, h, w): where a value stays at its start
    validation: Validation | None = field(metadata={"constant": True})


@dataclass(frozen=True)
class RFAD:
    r"""Hyper-parameters of the published code, which uses the same ones for every data set and IPC.

    Attributes:
        iterations: updates, 0 or more; networks: N, new at every step; width, depth: their channels and blocks, 1 or more.
        loss: "platt" or "mse"; learn_labels: labels are learned, too; ridge: $\lambda$, times the mean of the diagonal, 0 or more.
        real_batch: targets per batch, of all classes; batches: so many in a step.
        lr: of pixels and labels; lr_transform: of T; lr_scale: of k.
        init: where images start: "real" or "noise"; corruption: share of the values that stay there, 0 to below 1.
        validate_every: steps; 0: no validation, the last step is the result; validation_images: per class (published: 100 with 100
            classes); validation_networks: that look at them; patience: steps without a better validation loss after which nothing moves
            any more.
        mixed: real features in bfloat16.
    """

    iterations: int = 100_000
    networks: int = 8
    width: int = 256
    depth: int = 3
    loss: str = "platt"
    learn_labels: bool = True
    ridge: float = 5e-3
    real_batch: int = 1280
    batches: int = 4
    lr: float = 1e-3
    lr_transform: float = 5e-5
    lr_scale: float = 1e-2
    init: str = "real"
    corruption: float = 0.0
    validate_every: int = 40
    validation_images: int = 500
    validation_networks: int = 16
    patience: int = 1000
    mixed: bool = False

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        self.check(train)
        start = initial_pixels(train, ipc, self.init, generator)
        mask = torch.rand(start.shape, generator=generator, device=start.device) < self.corruption
        hard = class_major(train.num_classes, ipc, start.device)
        labels = ridge.centred_one_hot(hard, train.num_classes, start.dtype).requires_grad_(self.learn_labels)
        pixels = start.clone().requires_grad_()
        transform = torch.eye(start[0].numel(), device=start.device).requires_grad_()
        log_scale = torch.zeros((), dtype=torch.float64, device=start.device).requires_grad_()
        groups = [
            {"params": [pixels, *([labels] if self.learn_labels else [])]},
            {"params": [transform], "lr": self.lr_transform},
            {"params": [log_scale], "lr": self.lr_scale},
        ]
        optimiser = AdaBelief(groups, lr=self.lr)
        zero, validation = torch.zeros((), device=start.device), self.validation_of(train, generator)
        state = State(pixels, labels, transform, log_scale, optimiser, {}, 0, 0, zero, zero.clone(),
                      train, ipc, start, mask, validation)  # fmt: skip
        self.remember(state)
        return state

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of pixels, labels, T and k with N new networks; now and then a look at the validation loss."""
        if state.validation is None or state.done - state.best_step < self.patience:
            blocks = self.draw(state.train, self.networks, generator)
            phi_t, y_t = self.targets(state.train, blocks, generator)

            loss = self.objective(state, conv_features(self.images(state), blocks), phi_t, y_t)

            state.optimiser.zero_grad()
            loss.backward()
            state.optimiser.step()
            state.loss = loss.detach()
        state.done += 1
        if state.validation is not None and state.done % self.validate_every == 0:
            self.remember(state)
        metrics = {"loss": state.loss, "scale": state.log_scale.detach().exp()}
        return metrics if state.validation is None else metrics | {"validation": state.checked}

    def objective(self, state: State, phi_s: Tensor, phi_t: Tensor, y_t: Tensor) -> Tensor:
        """Loss of the kernel regression from features (m, N D) to those of targets (n, N D) with classes ``y_t`` (n,)."""
        k_ss, k_ts = conjugate_kernel(phi_s, phi_s), conjugate_kernel(phi_t, phi_s)
        prediction = ridge.predict(k_ts, k_ss, state.labels, self.ridge)
        if self.loss == "platt":
            return ridge.platt(prediction, y_t, state.log_scale)
        return ridge.mse(prediction, ridge.centred_one_hot(y_t, prediction.shape[1], prediction.dtype))

    def images(self, state: State) -> Tensor:
        """X_s T, with the masked values put back to their start."""
        moved = (state.pixels.flatten(1) @ state.transform).view(state.pixels.shape)
        return torch.where(state.mask, state.start, moved)

    def draw(self, train, networks: int, generator: torch.Generator) -> Blocks:
        return random_blocks(networks, train.channels, generator, self.width, self.depth, device=train.device)

    def targets(self, train, blocks: Blocks, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features without gradient and classes of batches of real images, each without replacement."""
        count = min(self.real_batch, len(train))
        draws = (
            torch.randperm(len(train), generator=generator, device=train.device) for _ in range(self.batches)
        )
        rows = torch.cat([order[:count] for order in draws])
        return self.features(train.images[rows], blocks), train.labels[rows]

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Blocks) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.mixed):
            return conv_features(images, blocks).float()

    def validation_of(self, train, generator: torch.Generator) -> Validation | None:
        """Networks of a fixed seed, and their features of training images drawn once."""
        if not self.validate_every:
            return None
        own = torch.Generator(train.device).manual_seed(VALIDATION_SEED)
        blocks = self.draw(train, self.validation_networks, own)
        rows = train.indices(min(self.validation_images, train.smallest_class), generator).flatten()
        return Validation(blocks, self.features(train.images[rows], blocks), train.labels[rows])

    @torch.no_grad()
    def remember(self, state: State) -> None:
        """Take the validation loss, and keep what is the best so far."""
        images, seen = self.images(state), state.validation
        if seen is not None:
            phi_s = conv_features(images, seen.blocks)
            state.checked = self.objective(state, phi_s, seen.features, seen.labels)
        if not state.best or state.checked < state.best["loss"]:
            kept = {"images": images, "labels": state.labels, "loss": state.checked}
            state.best, state.best_step = {name: value.clone() for name, value in kept.items()}, state.done

    def finish(self, state: State) -> SyntheticSet:
        """The best images and labels by validation loss, or the last ones; hard labels unless they were learned."""
        train = state.train
        with torch.no_grad():
            last = {"images": self.images(state), "labels": state.labels}
        chosen = last if state.validation is None else state.best
        hard = class_major(train.num_classes, state.ipc, state.pixels.device)
        labels = chosen["labels"].detach().clone() if self.learn_labels else hard
        return SyntheticSet(chosen["images"].clone(), labels, train.classes, train.transform)

    def check(self, train) -> None:
        choose("loss", self.loss, dict.fromkeys(LOSSES))
        if not 0 <= self.corruption < 1:
            raise CompanionError(f"corruption {self.corruption}; allowed: from 0 to below 1")
        if not self.ridge >= 0:
            raise CompanionError(f"ridge {self.ridge:g}; allowed: 0 or more")
        if train.size < 2**self.depth:
            raise CompanionError(
                f"{train.size}-pixel images do not survive {self.depth} poolings; allowed: {2**self.depth} or more"
            )
        for name in ("networks", "width", "depth", "real_batch", "batches", "validation_networks"):
            if getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)}; allowed: 1 or more")
        if not 0 <= self.validate_every <= self.iterations:
            raise CompanionError(
                f"validation every {self.validate_every} of {self.iterations} steps; allowed: 0 to {self.iterations}"
            )


_SMALL = RFAD(
    iterations=120,
    networks=4,
    width=32,
    real_batch=128,
    batches=1,
    lr=2e-2,
    validation_images=30,
    validation_networks=8,
)
_FASHION = replace(_SMALL, iterations=80)
_PHOTOS = replace(
    _SMALL, iterations=80, networks=2, lr=1e-2, lr_transform=1e-5
)  # T of 768 values overfits at 5e-5
_CODE = "the published command line with --platt --learn_labels"
_MSE = {"loss": "mse", "learn_labels": False}


def _rows(changes: dict, source: str, variant: str = "") -> list:
    """The same for every data set and IPC, but for the validation images of 100 classes and the whitening."""
    few = {"validation_images": 100}
    return [
        *published("mnist fashionmnist", (1, 10, 50), RFAD(**changes), "own-rfad", source, variant=variant),
        *published("svhn", (1, 10, 50), RFAD(**changes), "own-rfad", source, variant=variant, whiten="zca-kip"),
        *published("cifar10", (1, 10, 50), RFAD(**changes), "own-rfad", source, variant=variant, whiten="zca-rfad"),
        *published("cifar100", (1, 10), RFAD(**few, **changes), "own-rfad", source, variant=variant, whiten="zca-rfad"),
    ]  # fmt: skip


RECIPES = Recipes(
    small("digits", _SMALL, "own-rfad"),
    small("fashion14", _FASHION, "own-rfad"),
    small("photos16 photos32", _PHOTOS, "own-rfad"),
    small("digits", replace(_SMALL, **_MSE), "own-rfad", variant="mse"),
    small("fashion14", replace(_FASHION, **_MSE), "own-rfad", variant="mse"),
    small("photos16 photos32", replace(_PHOTOS, **_MSE), "own-rfad", variant="mse"),
    _rows({}, _CODE),
    _rows(_MSE, "the published command line: squared error, fixed labels", "mse"),
    published("celeba", None, RFAD(batches=1, init="noise", corruption=0.8, learn_labels=False), "own-kernel",
              "the published CelebA experiment: 64 pixels, two classes"),
)  # fmt: skip
