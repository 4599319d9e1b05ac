"""VGG11 of the DC evaluation pool (Simonyan and Zisserman, ICLR 2015, configuration A, with norms)."""

from __future__ import annotations

from torch import nn

from lib.nets.layers import BlockNetwork, max_pool, norm_layer, resolve_padding

# widths of the 3x3 convolutions before each pool, as multiples of the first
STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))


class VGG11(BlockNetwork):
    """Eight 3x3 convolutions conv - norm - ReLU with five max pools, global average, linear 512 -> C.

    9 231 114 parameters at 32x32x3 and 10 classes, with instance or batch norm; ``width`` is that of the
    first convolution.  At 32 pixels the last map
    is 1x1; larger images leave k x k, and the global average (the identity at 32) keeps the 512 features.
    Below 32 pixels the pools that would leave less than 2x2 before a further norm are left out.
    Taps: five maps, after each pool.  Embedding: (n, 8 width).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        size: int,
        *,
        width: int = 64,
        norm: str = "instance",
        first_padding: int | None = None,
    ):
        super().__init__()
        padding = resolve_padding(first_padding, channels, size)
        size, blocks = size + 2 * (padding - 1), []
        for i, multiples in enumerate(STAGES):
            block = []
            for wide in (width * multiple for multiple in multiples):
                block += [nn.Conv2d(channels, wide, 3, padding=padding), norm_layer(norm, wide), nn.ReLU()]
                channels, padding = wide, 1
            pool, size = max_pool(size, smallest=1 if i == len(STAGES) - 1 else 2)
            blocks.append(nn.Sequential(*block, pool))
        self.blocks = nn.Sequential(*blocks)
        self.neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, num_classes)
