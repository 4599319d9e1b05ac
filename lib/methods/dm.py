r"""DM - Dataset Condensation with Distribution Matching. Zhao & Bilen, WACV 2023, arXiv 2110.04181.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c \Big\lVert \tfrac1n\sum_i \psi_\theta(\mathcal A_\omega(x_{c,i}))
 - \tfrac1m\sum_j \psi_\theta(\mathcal A_\omega(s_{c,j}))\Big\rVert_2^2$$

with a new random network $\psi_\theta$ (flattened output of the convolutional body) at every step, never trained.
Sum over classes and over features; the published code prints the loss divided by the number of classes, but optimises this one.
Differs from the published code: random numbers come from one explicit generator (that code re-seeds from the clock).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib import augment, nets
from lib.augment import augment_by_class, families
from lib.formation import Pixels, by_class, decode_by_class
from lib.formation.start import initial_codes, pixel_set
from lib.match import features
from lib.select.sampler import Memory, RandomBatches
from lib.synset import SyntheticSet
from lib.train import rows_at_once

REAL_ROWS = 4096  # at most so many real images per forward pass, where no batch norm mixes them


@dataclass
class State:
    """What changes from step to step."""

    pixels: Tensor
    optimiser: torch.optim.Optimizer
    train: object = field(metadata={"constant": True})
    network: torch.nn.Module = field(
        metadata={"constant": True}
    )  # an architecture; its weights are drawn at every step
    ipc: int = field(metadata={"constant": True})
    memory: Memory = field(default_factory=Memory, kw_only=True)  # of the sampler


@dataclass(frozen=True)
class DM:
    """Hyper-parameters of section 4.1 and of the published commands.

    The methods that differ from DM by their objective override :meth:`observe` (what is looked at in the network) and
    :meth:`terms` (how the real and the synthetic observations are compared); some also the network, the initial images, the
    images that are made of what is stored, or the transform. The step is written once, here.
    """

    iterations: int = 20_000
    lr: float = 1.0  # of the pixels; 10 from IPC 100 on (CIFAR-10)
    momentum: float = 0.5
    real_batch: int = 256  # per class; the smallest class where it has fewer
    network: str = "convnet-d3-w128"
    init: str = "real"
    augmentation: str = "data"  # "data": the data set's DSA strategy; "none"
    mixed: bool = False  # observe the real images in bfloat16 (they carry no gradient)
    mode: str = (
        "single"  # how augmentation families combine: "single", as DSA, or "idc" or "multiple" (lib.augment)
    )
    formation: Any = Pixels()  # what a stored image is trained on as (lib.formation)
    sampler: Any = RandomBatches()  # which real images a step looks at (lib.select.sampler)

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        pixels = initial_codes(self.decoder, train, ipc, self.init, generator).requires_grad_()
        optimiser = torch.optim.SGD([pixels], lr=self.lr, momentum=self.momentum)
        return State(pixels, optimiser, train, nets.make(self.network, train), ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of all images."""
        return self.match(state, self.encoder(state, generator), generator)

    def match(self, state: State, network: torch.nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Update the images by the distance that one network sees."""
        train = state.train
        real = self.real(state, network, generator)  # (C, n, c, h, w)
        real, syn = self.transform(real, self.images(state, generator), train, generator)

        with torch.no_grad(), torch.autocast(real.device.type, torch.bfloat16, enabled=self.mixed):
            target = self.observe_real(network, real)
        terms = self.terms(state, target, self.observe(network, syn))
        loss = sum(term.sum() for term in terms.values())

        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        parts = {name: term.detach().sum() for name, term in terms.items()} if len(terms) > 1 else {}
        return {"loss": loss.detach()} | parts

    def observe(self, network: torch.nn.Module, images: Tensor) -> list[Tensor]:
        """What the network shows of ``(C, n, c, h, w)`` images: tensors ``(C, n, ...)``, here the embeddings.

        A mean over the images of a class is written ``(C, 1, ...)``: real batches come in parts of equal size, so the mean of
        the parts' means is the mean of the batch, and no map of a whole batch need be kept.
        """
        return [by_class(network.embed(images.flatten(0, 1)), len(images))]

    def terms(self, state: State, real: list[Tensor], syn: list[Tensor]) -> dict[str, Tensor]:
        """The summands of the objective by name, each ``(C,)``; with more than one, each is in the history."""
        return {"mean": features.class_mean(real[0], syn[0])}

    def encoder(self, state: State, generator: torch.Generator) -> torch.nn.Module:
        r"""The network $\psi_\theta$ of this step: a new one."""
        return nets.initialise(state.network, generator).train().requires_grad_(False)

    @property
    def decoder(self):
        """The formation in use."""
        return self.formation

    def images(self, state: State, generator: torch.Generator) -> Tensor:
        """The synthetic images that are compared, ``(C, m, c, h, w)``: what the stored ones are decoded to."""
        stored = by_class(state.pixels, state.train.num_classes)
        return decode_by_class(self.decoder.on(state.train.transform), stored)

    def real(self, state: State, network: torch.nn.Module, generator: torch.Generator) -> Tensor:
        """The real batch of every class, ``(C, n, c, h, w)``."""
        count = min(self.real_batch, state.train.smallest_class)
        return self.sampler.draw(
            state.memory, state.train, count, generator, functools.partial(embed, network)
        )

    def transform(
        self, real: Tensor, syn: Tensor, train, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$\mathcal A_\omega$ with one $\omega$ per class, shared by its real and synthetic images."""
        if names := families(self.augmentation, train):
            omega = augment.draw(names, len(real), generator, mode=self.mode)
            real, syn = augment_by_class(real, omega), augment_by_class(syn, omega)
        return real, syn

    def observe_real(self, network: torch.nn.Module, real: Tensor) -> list[Tensor]:
        """:meth:`observe` in float32 and in parts of equal size; a batch norm sees all classes at once, as published."""
        classes, count = real.shape[:2]
        if nets.has_batch_norm(network):
            return [tensor.float() for tensor in self.observe(network, real)]
        rows = min(REAL_ROWS, rows_at_once(network, real[0]))
        if rows >= count:
            groups = [self.observe(network, group) for group in real.split(rows // count)]
        else:
            size = equal_parts(count, rows)
            groups = []
            for c in range(classes):
                parts = [self.observe(network, part) for part in real[c : c + 1].split(size, 1)]
                groups.append([torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)])
        return [torch.cat(tensors).float() for tensors in zip(*groups, strict=True)]

    def finish(self, state: State) -> SyntheticSet:
        return pixel_set(state.pixels, state.train, state.ipc, self.decoder)


@torch.no_grad()
def embed(network: torch.nn.Module, images: Tensor) -> Tensor:
    """Embeddings ``(n, d)`` of many images, a chunk at a time."""
    return torch.cat([network.embed(part) for part in images.split(rows_at_once(network, images))])


def equal_parts(count: int, most: int) -> int:
    """The largest divisor of ``count`` up to ``most``; ``count`` itself if they are all small (a prime, say)."""
    size = next(size for size in range(min(count, most), 0, -1) if count % size == 0)
    return size if 4 * size >= min(count, most) else count


_CIFAR = DM()
# Published settings (card: official commands; the same for MNIST, FashionMNIST, SVHN, CIFAR-10/100 at IPC 1, 10 and 50).
PRESETS = {
    "digits": DM(iterations=200, real_batch=64, network="convnet-d2-w32", augmentation="none"),
    "photos16": DM(iterations=300, real_batch=64, network="convnet-d3-w32"),
    "photos32": DM(iterations=300, real_batch=64, network="convnet-d3-w32"),
    "paper": _CIFAR,
    "paper-ipc100": replace(_CIFAR, lr=10.0),
    "paper-tinyimagenet": replace(_CIFAR, network="convnet-d4-w128"),
}
