"""A small UNet that predicts the noise of an image: two resolutions, one residual block down, in the middle and up on each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.system.errors import CompanionError

GROUPS = 8  # of the norms


def waves(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t at ``width / 2`` frequencies from 1 down to almost 1/10000, ``(n, width)``."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class Residual(nn.Module):
    """norm, SiLU, conv, twice; the second norm is scaled and shifted by time and label (FiLM)."""

    def __init__(self, before: int, width: int, told: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = (nn.Conv2d(channels, width, 3, padding=1) for channels in (before, width))
        self.film = nn.Linear(told, 2 * width)
        self.skip = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """``(x_t, t, y)`` -> noise, ``(n, c, h, w)``; the last layer starts at 0.

    Attributes:
        null: the label that means "no label", C; None where the network has no such class.
    """

    def __init__(
        self, channels: int, num_classes: int, width: int = 48, told: int = 128, guided: bool = True
    ):
        super().__init__()
        if width % GROUPS:
            raise CompanionError(f"width {width} of a UNet: allowed are multiples of {GROUPS}")
        wide, self.null = 2 * width, num_classes if guided else None
        self.time = nn.Sequential(nn.Linear(told, told), nn.SiLU(), nn.Linear(told, told))
        self.label = nn.Embedding(num_classes + guided, told)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down1, self.down2 = Residual(width, width, told), Residual(wide, wide, told)
        self.shrink = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.middle = Residual(wide, wide, told)
        self.up2, self.up1 = Residual(2 * wide, wide, told), Residual(wide + width, width, told)
        self.leave = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """The first prediction is no noise at all."""
        for parameter in self.leave[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told = F.silu(self.time(waves(t, self.time[0].in_features)) + self.label(y))
        fine = self.down1(self.enter(x), told)
        coarse = self.down2(self.shrink(fine), told)
        h = self.middle(coarse, told)
        h = self.up2(torch.cat([h, coarse], 1), told)
        h = F.interpolate(h, size=fine.shape[2:], mode="nearest")
        return self.leave(self.up1(torch.cat([h, fine], 1), told))
