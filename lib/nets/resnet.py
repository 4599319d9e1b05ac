"""ResNet18 with the CIFAR stem (He et al., CVPR 2016), ResNet10, and their average-pooled forms (DSA, DM, IDC)."""

from __future__ import annotations

from torch import Tensor, nn

from lib.nets.layers import BlockNetwork, norm_layer

MULTIPLES = (
    1,
    2,
    4,
    8,
)  # widths of the four stages; every stage but the first halves the map


class BasicBlock(nn.Module):
    """relu(f(x) + shortcut(x)) with f = conv3 - norm - ReLU - conv3 - norm.

    The map is halved by ``stride=2`` in the first convolution and in the 1x1 shortcut, or, with
    ``pool=True``, by a 2x2 average after the first ReLU and after the 1x1 shortcut.
    """

    def __init__(self, channels: int, width: int, norm: str, stride: int = 1, pool: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, width)
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if channels != width:
            project = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, self.pool, norm_layer(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.pool(self.relu(self.norm1(self.conv1(x))))
        return self.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(BlockNetwork):
    """Stem conv3(64), four stages of two basic blocks with stride 2, global average, linear 512 -> C.

    11 173 962 parameters at 32x32x3 and 10 classes.  The published ResNets pad the stem by 1 for 28x28 grey
    images too, so ``first_padding`` is not used.  Below 16 pixels the strides that would leave less than
    2x2 are left out.
    Taps: four maps, after each stage.  Embedding: (n, 8 width); ``width`` is that of the stem.
    """

    average_pooled = False
    blocks_of_a_stage = 2

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
        stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        stages, before = [[stem, norm_layer(norm, width), nn.ReLU()], [], [], []], width
        for stage, wide in zip(stages, (width * multiple for multiple in MULTIPLES), strict=True):
            halved = size // 2 if self.average_pooled else (size + 1) // 2
            halve = wide != before and halved >= 2
            how = {"pool": halve} if self.average_pooled else {"stride": 2 if halve else 1}
            more = (BasicBlock(wide, wide, norm) for _ in range(self.blocks_of_a_stage - 1))
            stage += [BasicBlock(before, wide, norm, **how), *more]
            size, before = halved if halve else size, wide
        self.blocks = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        average = nn.Identity() if self.average_pooled else nn.AdaptiveAvgPool2d(1)
        self.neck = nn.Sequential(average, nn.Flatten())
        self.classifier = nn.Linear(before * (size**2 if self.average_pooled else 1), num_classes)


class ResNet18AP(ResNet18):
    """ResNet18 with stride 1 and 2x2 average pools in place of stride 2, and no global average.

    11 250 762 parameters at 32x32x3 and 10 classes.  Embedding: (n, 8 width k k) with k = size / 8 rounded down
    (4 at 32 pixels, 3 at 28).
    """

    average_pooled = True


class ResNet10(ResNet18):
    """ResNet18 with one block in every stage (IDC, DiM). 4 903 242 parameters at 32x32x3 and 10 classes."""

    blocks_of_a_stage = 1


class ResNet10AP(ResNet18AP):
    """ResNet18AP with one block in every stage (IDC, DiM)."""

    blocks_of_a_stage = 1
