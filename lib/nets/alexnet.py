"""AlexNet of the DC evaluation pool: five convolutions as Krizhevsky et al. (2012), cut down to 32x32."""

from __future__ import annotations

from torch import nn

from lib.nets.layers import BlockNetwork, max_pool, norm_layer, resolve_padding

# width in halves of the first one, kernel, pool
LAYERS = ((2, 5, True), (3, 5, True), (4, 3, False), (3, 3, False), (3, 3, True))


class AlexNet(BlockNetwork):
    """Five blocks conv - norm - ReLU (- max pool), then one linear layer.

    1 872 202 parameters at 32x32x3 and 10 classes, 1 874 122 with ``norm="batch"`` (AlexNetBN); ``width`` is that of
    the first convolution.  The 5x5
    first convolution is padded by ``first_padding + 1``: 2, or 4 for 28x28 grey images.
    Taps: five maps, after each block.  Embedding: (n, 1.5 width k k) with k = size / 8 (4 at 32 pixels).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        size: int,
        *,
        width: int = 128,
        norm: str = "none",
        first_padding: int | None = None,
    ):
        super().__init__()
        margin = resolve_padding(first_padding, channels, size) - 1
        size, blocks = size + 2 * margin, []
        for i, (halves, kernel, pooled) in enumerate(LAYERS):
            wide = halves * width // 2
            padding = kernel // 2 + (margin if i == 0 else 0)
            block = [nn.Conv2d(channels, wide, kernel, padding=padding), norm_layer(norm, wide), nn.ReLU()]
            if pooled:
                pool, size = max_pool(size, smallest=1 if i == len(LAYERS) - 1 else 2)
                block.append(pool)
            blocks.append(nn.Sequential(*block))
            channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.neck = nn.Flatten()
        self.classifier = nn.Linear(channels * size * size, num_classes)
