r"""BigGAN for 32 pixels (Brock et al., arXiv 1809.11096; the variant of arXiv 2006.10738), with the parameter names of the released files.

$$h=\mathrm{linear}(z),\qquad h\leftarrow\mathrm{sc}(\uparrow h)+\mathrm{conv}_2\,\mathrm{relu}\,\mathrm{bn}_2\,\mathrm{conv}_1\uparrow
\mathrm{relu}\,\mathrm{bn}_1(h),\qquad G=\tanh\,\mathrm{conv}\,\mathrm{relu}\,\mathrm{bn}(h)$$

Three blocks double 4 pixels to 32; $\mathrm{bn}_k(h)=(1+\gamma_y)\,\hat h+\beta_y$ with an embedding of the class for every norm; the
weights of linear and convolutions are divided by their largest singular value, of which ``u0`` is the left vector (``sv0`` is a log). 4.30
million parameters with 10 classes. It is never trained here: the weights are the user's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.generators.prior import Brought, Generator
from lib.system.errors import CompanionError, whole

SIDE, LEAST, BLOCKS = 32, 4, 3


class Spectral:
    """A linear map or convolution whose weight is used by its largest singular value."""

    def with_vectors(self, outputs: int):
        self.register_buffer("u0", torch.randn(1, outputs))
        self.register_buffer("sv0", torch.ones(1))
        return self

    def normalised(self) -> Tensor:
        """One step of the power method from ``u0``, which is kept as it is."""
        W = self.weight.flatten(1)  # (out, in)
        with torch.no_grad():
            v = F.normalize(self.u0 @ W, eps=1e-12)
            u = F.normalize(v @ W.t(), eps=1e-12)
        return self.weight / (v @ W.t() @ u.t()).squeeze()


class Linear(nn.Linear, Spectral):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class Conv(nn.Conv2d, Spectral):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised(), self.bias, padding=self.padding)


def conv(channels: int, width: int, kernel: int = 3) -> Conv:
    return Conv(channels, width, kernel, padding=kernel // 2).with_vectors(width)


class Norm(nn.Module):
    """By stored statistics; scale and shift are learned, or embeddings of the class."""

    def __init__(self, width: int, num_classes: int | None = None):
        super().__init__()
        if num_classes is None:
            self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        else:
            self.gain, self.bias = nn.Embedding(num_classes, width), nn.Embedding(num_classes, width)
        self.register_buffer("stored_mean", torch.zeros(width))
        self.register_buffer("stored_var", torch.ones(width))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return F.batch_norm(x, self.stored_mean, self.stored_var, self.gain, self.bias)
        gain, bias = (table(y)[:, :, None, None] for table in (self.gain, self.bias))
        return F.batch_norm(x, self.stored_mean, self.stored_var) * (1 + gain) + bias


class Block(nn.Module):
    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.conv1, self.conv2, self.conv_sc = conv(width, width), conv(width, width), conv(width, width, 1)
        self.bn1, self.bn2 = Norm(width, num_classes), Norm(width, num_classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        return h + self.conv_sc(F.interpolate(x, scale_factor=2))


class BigGAN32(Generator):
    """Codes ``(128,)``; statistics and singular vectors stay as they were stored, in training mode too."""

    def __init__(self, num_classes: int, latent: int = 128, width: int = 64):
        super().__init__()
        self.latent, self.shape, self.num_classes = (latent,), (3, SIDE, SIDE), num_classes
        wide = 4 * width
        self.linear = Linear(latent, wide * LEAST**2).with_vectors(wide * LEAST**2)
        self.blocks = nn.ModuleList([nn.ModuleList([Block(wide, num_classes)]) for _ in range(BLOCKS)])
        self.output_layer = nn.Sequential(Norm(wide), nn.ReLU(), conv(wide, 3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.check(z)
        h = self.linear(z).unflatten(1, (-1, LEAST, LEAST))
        for (block,) in self.blocks:
            h = block(h, y)
        return torch.tanh(self.output_layer(h))


@dataclass(frozen=True)
class BigGAN(Brought):
    """``weights`` is a released file, or a safetensors file with the same names. The other fields are Brought's.

    Attributes:
        latent: numbers of a code, 1 or more; width: a quarter of the maps of every block, 1 or more.
    """

    kind: ClassVar[str] = "biggan"
    released: ClassVar[str] = "a plain state dict (.pth) or safetensors, with the released names"
    what: str = "BigGAN at 32 pixels"
    where: str = "G_Pretrained_CIFAR10_exp0.pth and others of github.com/VICO-UoE/IT-GAN"
    latent: int = 128
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, latent=1, width=1)

    def make(self, like) -> BigGAN32:
        if tuple(like.shape) != (3, SIDE, SIDE):
            raise CompanionError(f"BigGAN makes images of (3, {SIDE}, {SIDE}), not {tuple(like.shape)}")
        return BigGAN32(like.num_classes, self.latent, self.width).to(like.device)

    def initialise(self, network: nn.Module, generator: torch.Generator) -> None:
        """Nothing: the file says all."""

    def fit(self, network: nn.Module, train, generator: torch.Generator) -> None:
        raise CompanionError(
            f"the prior {self.what} must be brought ({self.where}): weights='FILE' with {self.released}"
        )
