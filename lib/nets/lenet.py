"""LeNet of the DC evaluation pool (LeCun et al. 1998, with ReLU and max pooling)."""

from __future__ import annotations

from torch import nn

from lib.nets.layers import BlockNetwork, max_pool, resolve_padding
from lib.system.errors import unknown


class LeNet(BlockNetwork):
    """conv5(6), pool, conv5(16), pool, 120, 84, C; 62 006 parameters at 32x32x3 and 10 classes.

    The first convolution is padded by ``first_padding - 1``: 0, or 2 for 28x28 grey images; the second is
    unpadded.  Below 28 pixels nothing would be left of the map, and both are padded by 2 more.
    Taps: two maps, after each pool.  Embedding: (n, 84).  Only ``norm="none"``.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        size: int,
        *,
        norm: str = "none",
        first_padding: int | None = None,
    ):
        super().__init__()
        if norm != "none":
            raise unknown("norm of LeNet", norm, ["none"])
        extra = 2 if size < 28 else 0
        padding = resolve_padding(first_padding, channels, size) - 1 + extra
        pool1, size = max_pool(size + 2 * padding - 4)
        pool2, size = max_pool(size + 2 * extra - 4, smallest=1)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), pool1),
            nn.Sequential(nn.Conv2d(6, 16, 5, padding=extra), nn.ReLU(), pool2),
        )
        self.neck = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * size * size, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()
        )
        self.classifier = nn.Linear(84, num_classes)
