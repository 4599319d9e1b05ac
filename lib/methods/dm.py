r"""DM - Dataset Condensation with Distribution Matching. Zhao & Bilen, WACV 2023, arXiv 2110.04181.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c \Big\lVert \tfrac1n\sum_i \psi_\theta(\mathcal A_\omega(x_{c,i}))
 - \tfrac1m\sum_j \psi_\theta(\mathcal A_\omega(s_{c,j}))\Big\rVert_2^2$$

with a new random network $\psi_\theta$ (flattened output of the convolutional body) at every step, never trained.
Sum over classes and over features; the published code prints the loss divided by the number of classes, but optimises this one.
Differs from the published code: random numbers come from one explicit generator (that code re-seeds from the clock).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib import augment, nets
from lib.match import features
from lib.methods.pixels import augment_by_class, by_class, families, initial_pixels, pixel_set
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


@dataclass(frozen=True)
class DM:
    """Hyper-parameters of section 4.1 and of the published commands; the relatives of DM override :meth:`distance`."""

    iterations: int = 20_000
    lr: float = 1.0  # of the pixels; 10 from IPC 100 on (CIFAR-10)
    momentum: float = 0.5
    real_batch: int = 256  # per class; the smallest class where it has fewer
    network: str = "convnet-d3-w128"
    init: str = "real"
    augmentation: str = "data"  # "data": the data set's DSA strategy; "none"
    mixed: bool = False  # embed the real images in bfloat16 (they carry no gradient)

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        pixels = initial_pixels(train, ipc, self.init, generator).requires_grad_()
        optimiser = torch.optim.SGD([pixels], lr=self.lr, momentum=self.momentum)
        return State(pixels, optimiser, train, nets.make(self.network, train), ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of all images."""
        train, classes = state.train, state.train.num_classes
        psi = self.embedding(state, generator)
        real = train.sample(min(self.real_batch, train.smallest_class), generator)  # (C, n, c, h, w)
        syn = by_class(state.pixels, classes)  # (C, m, c, h, w)
        if names := families(self.augmentation, train):
            omega = augment.draw(names, classes, generator)  # one per class, shared by real and synthetic
            real, syn = augment_by_class(real, omega), augment_by_class(syn, omega)

        with torch.no_grad(), torch.autocast(real.device.type, torch.bfloat16, enabled=self.mixed):
            target = self.embed_real(state, psi, real)
        loss = self.distance(target, by_class(psi(syn.flatten(0, 1)), classes)).sum()

        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        return {"loss": loss.detach()}

    def distance(self, real: Tensor, syn: Tensor) -> Tensor:
        """Distance of every class between embeddings ``(C, n, d)`` and ``(C, m, d)``: here of the means."""
        return features.class_mean(real, syn)

    def embedding(self, state: State, generator: torch.Generator):
        r"""A new $\psi_\theta$: images ``(n, c, h, w)`` -> ``(n, d)``."""
        network = nets.initialise(state.network, generator).train().requires_grad_(False)
        return network.embed

    def embed_real(self, state: State, psi, real: Tensor) -> Tensor:
        """Embeddings of the real batch, ``(C, n, d)`` in float32; a batch norm sees all classes at once, as published."""
        rows = real.flatten(0, 1)
        parts = (
            [rows]
            if nets.has_batch_norm(state.network)
            else rows.split(min(REAL_ROWS, rows_at_once(state.network, rows)))
        )
        return by_class(torch.cat([psi(part) for part in parts]).float(), len(real))

    def finish(self, state: State) -> SyntheticSet:
        return pixel_set(state.pixels, state.train, state.ipc)


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
