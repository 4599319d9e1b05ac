"""Small data for the tests: random images whose classes can be told apart."""

from __future__ import annotations

import torch

from lib.data.imageset import Data, ImageSet
from lib.data.whitening import Standardise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_data(
    classes: int = 3, per_class: int = 20, channels: int = 1, size: int = 8, noise: float = 0.6, seed: int = 0
) -> Data:
    """Each class is one random pattern plus noise: easy with many images, not with one."""
    g = generator(seed)
    patterns = torch.randn(classes, 1, channels, size, size, generator=g)
    names = tuple(f"class {c}" for c in range(classes))
    transform = Standardise(torch.full((channels,), 0.5), torch.full((channels,), 0.25))

    def half(count: int) -> ImageSet:
        images = patterns + noise * torch.randn(classes, count, channels, size, size, generator=g)
        labels = torch.arange(classes).repeat_interleave(count)
        order = torch.randperm(len(labels), generator=g)
        # tests that do not ask for flips should not depend on them: the strategy without
        strategy = "color_crop_cutout_scale_rotate"
        return ImageSet("toy", images.flatten(0, 1)[order], labels[order], names, transform, strategy)

    return Data(half(per_class), half(per_class))
