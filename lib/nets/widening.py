"""The network of FRePo: every block twice as wide as the one before, normalised before the convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lib.nets.pool import average_pool
from lib.system.errors import CompanionError


class FeatureNet(nn.Module):
    """depth x [batch norm (not before the first), convolution 3x3 of width w 2^i, ReLU, average pooling 2], flatten, linear.

    Unlike ``lib.nets.ConvNet`` it normalises what enters a convolution, and widens.
    """

    def __init__(self, train, width: int, depth: int, norm: bool):
        super().__init__()
        side, channels, blocks = train.size + 2 * (train.first_padding - 1), train.channels, []
        if side < 2**depth:
            raise CompanionError(
                f"{train.size}-pixel images do not survive {depth} poolings; allowed: {2**depth} or more"
            )
        for i in range(depth):
            padding = 1 if i else train.first_padding
            blocks.append(nn.BatchNorm2d(channels) if norm and i else nn.Identity())
            blocks.append(nn.Conv2d(channels, width * 2**i, 3, padding=padding))
            channels, side = width * 2**i, side // 2
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(channels * side * side, train.num_classes)

    def embed(self, x: Tensor) -> Tensor:
        for norm, convolution in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = average_pool(torch.relu_(convolution(norm(x))))
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """LeCun normal: weights from N(0, 1 / fan-in), cut at two standard deviations; biases 0; norms at their start."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978  # of the cut normal: 1
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std, generator=generator)
                module.bias.zero_()
