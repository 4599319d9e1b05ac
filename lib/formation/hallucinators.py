r"""HaBa's hallucinators (arXiv 2210.16774): a few tiny affine maps, shared by all classes, each of which renders every stored basis.

$$H_k(z)=\mathrm{Deconv}_k\big(\sigma_k\odot\mathrm{Conv}_k(z)+\mu_k\big)$$

with a 3x3 convolution without padding, its transpose, and full maps $\sigma_k,\mu_k$. No non-linearity and no normalisation.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data.whitening import Transform
from lib.system.errors import CompanionError

KERNEL = 3
NUMBERS = ("enc_weight", "enc_bias", "scale", "shift", "dec_weight", "dec_bias")


@dataclass(frozen=True, eq=False)
class Hallucinators:
    """A formation (see ``lib.formation``) whose numbers are learned, and saved with the set as named tensors: every basis
    ``(in, h, w)`` is trained on as m images ``(out, h, w)``, the basis seen by each hallucinator.

    Attributes:
        enc_weight: ``(m, mid, in, 3, 3)``; enc_bias: ``(m, mid)``: the convolutions.
        scale, shift: ``(m, mid, h - 2, w - 2)``.
        dec_weight: ``(m, mid, out, 3, 3)``, laid out as PyTorch's transposed convolutions; dec_bias: ``(m, out)``.
        name: as stored sets have it.
    """

    enc_weight: Tensor
    enc_bias: Tensor
    scale: Tensor
    shift: Tensor
    dec_weight: Tensor
    dec_bias: Tensor
    name: str = "hallucinators"

    @classmethod
    def make(
        cls,
        count: int,
        bases: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        identity: float = 0.0,
    ) -> Hallucinators:
        r"""Hallucinators to start from: $a I + (1-a)\cdot$ PyTorch's default draw, where I passes a basis on unchanged inside its border.

        Args:
            count: m; bases: channels of a basis; shape: ``(c, h, w)`` of the images; identity: a in [0, 1], 0 as published.
        """
        if not 0 <= identity <= 1:
            raise CompanionError(f"identity {identity!r} of hallucinators: allowed 0 to 1")
        channels, height, width = shape
        if min(height, width) < KERNEL:
            raise CompanionError(
                f"hallucinators for {height}x{width} images: allowed from {KERNEL}x{KERNEL} on"
            )

        def drawn(*size: int, fan_in: int) -> Tensor:
            bound = 1 / math.sqrt(fan_in)
            u = torch.rand(count, *size, generator=generator, device=generator.device)
            return (1 - identity) * bound * (2 * u - 1)

        tap = torch.zeros(KERNEL, KERNEL, device=generator.device)
        tap[KERNEL // 2, KERNEL // 2] = identity
        rows = torch.arange(channels, device=generator.device)
        enters = F.one_hot(rows % bases, bases)[:, :, None, None] * tap  # a grey basis enters every channel
        leaves = torch.eye(channels, device=generator.device)[:, :, None, None] * tap
        fan_in, fan_out = bases * KERNEL**2, channels * KERNEL**2
        maps = torch.zeros(count, channels, height - KERNEL + 1, width - KERNEL + 1, device=generator.device)
        return cls(
            enters + drawn(channels, bases, KERNEL, KERNEL, fan_in=fan_in),
            drawn(channels, fan_in=fan_in),
            maps + 1,
            maps,
            leaves + drawn(channels, channels, KERNEL, KERNEL, fan_in=fan_out),
            drawn(channels, fan_in=fan_out),
        )

    @property
    def numbers(self) -> dict[str, Tensor]:
        """All learned tensors by name."""
        return {name: getattr(self, name) for name in NUMBERS}

    @property
    def multiplicity(self) -> int:
        return len(self.scale)

    @property
    def extra_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.numbers.values())

    @property
    def learned(self) -> bool:
        return True

    def render(self, codes: Tensor) -> Tensor:
        """Every basis seen by every hallucinator, ``(n, in, h, w) -> (m, n, out, h, w)``, in one grouped call."""
        m = self.multiplicity
        x = codes.repeat(1, m, 1, 1)  # (n, m in, h, w)
        x = F.conv2d(x, self.enc_weight.flatten(0, 1), self.enc_bias.flatten(), groups=m)
        x = x * self.scale.flatten(0, 1) + self.shift.flatten(0, 1)
        x = F.conv_transpose2d(x, self.dec_weight.flatten(0, 1), self.dec_bias.flatten(), groups=m)
        return x.unflatten(1, (m, -1)).transpose(0, 1)

    def __call__(self, codes: Tensor) -> Tensor:
        return self.render(codes).flatten(0, 1)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.repeat(self.multiplicity, *[1] * (labels.dim() - 1))

    def on(self, transform: Transform) -> Hallucinators:
        return self

    def check(self, shape: tuple[int, int, int]) -> None:
        height, width = (side + KERNEL - 1 for side in self.scale.shape[2:])
        mine = (self.enc_weight.shape[2], height, width)
        if tuple(shape) != mine:
            raise CompanionError(f"hallucinators for bases of shape {mine}, not {tuple(shape)}")

    def pack(self, images: Tensor) -> Tensor:
        """The first of the real images, ``(m, n, c, h, w) -> (n, in, h, w)``; its mean over channels where a basis has one."""
        bases = self.enc_weight.shape[2]
        return images[0] if images.shape[2] == bases else images[0].mean(1, keepdim=True)

    def detached(self) -> Hallucinators:
        """A copy without gradients."""
        return dataclasses.replace(
            self, **{name: tensor.detach().clone() for name, tensor in self.numbers.items()}
        )
