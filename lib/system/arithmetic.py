"""In which numbers and in which order in memory networks are applied: as written (32 bits), or faster on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.system.errors import unknown

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Arithmetic:
    """How networks are applied. The default changes nothing, not a bit.

    Attributes:
        precision: ``bfloat16`` runs forward and backward pass under PyTorch's autocast; weights, optimiser, losses and statistics
            stay 32 bits.
        channels_last: images and maps lie in memory pixel by pixel, which is what tensor cores read. On GPUs only: on a CPU
            PyTorch's kernels write beyond their memory for networks with four channels (seen with 2.15).
    """

    precision: str = "float32"
    channels_last: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)

    def __call__(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``network(x)`` for images ``(n, c, h, w)``, or ``(1, n, c, h, w)`` for an ensemble; 32 bits come back."""
        if self.channels_last and x.is_cuda:
            flat = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            x = flat if x.dim() == 4 else flat.unsqueeze(0)
        if self.precision == "float32":
            return network(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return widened(network(x))

    def laid_out(self, network: nn.Module) -> nn.Module:
        """The network with its kernels in the same order, in place."""
        on_gpu = next(network.parameters()).is_cuda
        return network.to(memory_format=torch.channels_last) if self.channels_last and on_gpu else network


PLAIN = Arithmetic()


def widened(x: Tensor) -> Tensor:
    """16 bits as 32; everything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x
