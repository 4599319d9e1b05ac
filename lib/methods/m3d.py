r"""M3D - Dataset Condensation by Minimizing Maximum Mean Discrepancy. Zhang et al., AAAI 2024, arXiv 2312.15927.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c \overline{K_{TT}} - 2\,\overline{K_{TS}} + \overline{K_{SS}},\qquad
 K_{ij} = \sum_{l=-2}^{2} \exp\Big(-\frac{\lVert z_i-z_j\rVert^2}{2^l\,b_c}\Big),\quad
 z = \psi_\theta(\mathcal A_\omega(D_f(\cdot)))$$

the squared maximum mean discrepancy (plain means, diagonals included) with a kernel that sees all moments; DM is the same
with the linear kernel, which sees the mean alone. $b_c$ is the mean squared distance within the union of both batches, without
gradient. From IDC (arXiv 2205.14959) come the mosaics, ``D_f`` (a stored image is f x f images), the augmentation of the
matching, and several updates per network.

Differs from the published code: all classes take one joint step, with the rate and the momentum that make it equal to that
code's step per class (``sequential``); cells are cut where the factor divides the side. The learning rates of the published
tables are in files that were not available, so ``lr`` of the "paper" settings is that of a derived project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib import nets
from lib.formation import at_most, by_class, decode_by_class, mosaic_or
from lib.formation.mosaic import Mosaic
from lib.formation.start import initial_codes, pixel_set
from lib.match import mmd
from lib.methods import dm
from lib.methods.dm import DM
from lib.optim.sequential import sequential_rates
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError, choose, unknown

SPACES = ("unit", "normalised")


@dataclass
class State(dm.State):
    """DM's; the network lasts several steps, so it is kept."""

    network: torch.nn.Module
    done: int = 0


@dataclass(frozen=True)
class M3D(DM):
    """Hyper-parameters of the released configuration."""

    iterations: int = 5000
    lr: float = 10.0
    real_batch: int = 128
    init: str = "mix"  # every cell a real image; "real": whole real images; "noise"
    augmentation: str = "color_crop_cutout"
    mode: str = "idc"  # of the augmentation: colour and cutout always; "single": one family, as DM
    kernel: str = "gaussian"  # any of lib.match.mmd; "linear" is DM's objective
    bandwidth: float | str = "adaptive"  # or a positive number
    ipm: int = 5  # iterations per model: steps that share a network
    factor: int = 2  # a stored image is factor x factor training images
    batch_syn_max: int = 200  # at most so many decoded images of a class are compared
    space: str = "unit"  # pixels in [0, 1], clamped before every step; "normalised": DM's, free
    sequential: bool = True  # the joint step that equals one step per class

    def __post_init__(self):
        choose("kernel", self.kernel, mmd.KERNELS)
        if self.space not in SPACES:
            raise unknown("pixel space", self.space, SPACES)
        if self.bandwidth != "adaptive" and not (
            isinstance(self.bandwidth, (int, float)) and self.bandwidth > 0
        ):
            raise CompanionError(
                f"bandwidth {self.bandwidth!r} is not allowed: 'adaptive' or a positive number"
            )
        for name in ("ipm", "factor", "batch_syn_max"):
            if getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)} is not allowed: at least 1")
        mosaic_or(self.factor, self.formation)

    @property
    def decoder(self):
        return mosaic_or(self.factor, self.formation)

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        packing = {"mode": "nearest"} if isinstance(self.decoder, Mosaic) else {}
        pixels = initial_codes(self.decoder, train, ipc, self.init, generator, **packing)
        if self.space == "unit":
            pixels = train.transform.inverse(pixels)
        lr, momentum = self.lr, self.momentum
        if self.sequential:
            lr, momentum = sequential_rates(lr, momentum, train.num_classes)
        optimiser = torch.optim.SGD([pixels.requires_grad_()], lr=lr, momentum=momentum)
        return State(pixels, optimiser, train, nets.make(self.network, train), ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        if self.space == "unit":
            with torch.no_grad():
                state.pixels.clamp_(0, 1)
        metrics = super().step(state, generator)
        state.done += 1
        return metrics

    def encoder(self, state: State, generator: torch.Generator) -> torch.nn.Module:
        """A new network at every ``ipm``-th step."""
        if state.done % self.ipm == 0:
            nets.initialise(state.network, generator)
        return state.network.train().requires_grad_(False)

    def terms(self, state: State, real: list[Tensor], syn: list[Tensor]) -> dict[str, Tensor]:
        if self.kernel == "linear":  # the same number without a Gram matrix
            return super().terms(state, real, syn)
        bandwidth = None if self.bandwidth == "adaptive" else self.bandwidth
        return {"mmd": mmd.mmd(real[0], syn[0], self.kernel, bandwidth)}

    def images(self, state: State, generator: torch.Generator) -> Tensor:
        """The decoded images, at most ``batch_syn_max`` of each class, drawn anew at every step."""
        stored = by_class(self.normalised(state), state.train.num_classes)
        decoded = decode_by_class(self.decoder.on(state.train.transform), stored)
        return at_most(decoded, self.batch_syn_max, generator)

    def normalised(self, state: State) -> Tensor:
        """The stored images in the space of the data, ``(C * ipc, c, h, w)``."""
        return state.train.transform.forward(state.pixels) if self.space == "unit" else state.pixels

    def finish(self, state: State) -> SyntheticSet:
        with torch.no_grad():
            pixels = state.pixels
            if self.space == "unit":
                pixels = state.train.transform.forward(pixels.clamp(0, 1))
            return pixel_set(pixels, state.train, state.ipc, self.decoder)


_CIFAR = M3D()
_SMALL = M3D(iterations=100, real_batch=64, network="convnet-d2-w32", factor=1, ipm=1, sequential=False,
             space="normalised", augmentation="none", mode="single")  # fmt: skip
_PHOTOS = replace(_SMALL, iterations=40, lr=3.0, network="convnet-d3-w32", factor=2, batch_syn_max=20,
                  augmentation="data")  # fmt: skip
# The released defaults; published accuracies come from per-data-set files with other learning rates.
PRESETS = {
    "digits": _SMALL,
    "photos16": _PHOTOS,
    "photos32": _PHOTOS,
    "paper": _CIFAR,
    "paper-released-lr": replace(_CIFAR, lr=5e-3),
    "paper-28px": replace(_CIFAR, iterations=10_000),
    "paper-tinyimagenet": replace(_CIFAR, network="convnet-d4-w128"),
}
