"""MLP of the DC evaluation pool (Zhao, Mopuri, Bilen, ICLR 2021): flatten, 128, 128, C with ReLU."""

from __future__ import annotations

from torch import nn

from lib.nets.layers import BlockNetwork
from lib.system.errors import unknown


class MLP(BlockNetwork):
    """Two hidden layers; 411 146 parameters at 32x32x3 and 10 classes.

    Taps: two (n, width).  Embedding: (n, width).  Only ``norm="none"``; ``first_padding`` is not used.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        size: int,
        *,
        norm: str = "none",
        first_padding: int | None = None,
        width: int = 128,
    ):
        super().__init__()
        if norm != "none":
            raise unknown("norm of the MLP", norm, ["none"])
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, width), nn.ReLU()),
            nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        )
        self.neck = nn.Identity()
        self.classifier = nn.Linear(width, num_classes)
