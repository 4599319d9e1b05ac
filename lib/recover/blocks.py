"""What the methods that recover images from a frozen teacher share: blocks, their state, and what saving does to pixels.

Images are made in *blocks*, each with random numbers of its own: a block made alone, in any process, has the bits that it has in
the whole, so that blocks are units of work. What a block holds is part of the objective and never follows from the number of
workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lib.match.batchnorm import Watch
from lib.recover.teacher import in_turn

STORAGE = ("float", "png", "jpeg")


@dataclass(frozen=True)
class Block:
    """A unit of recovery: these classes, and of each these of its images."""

    index: int
    classes: range
    images: range

    def rows(self, ipc: int) -> list[int]:
        """Where the images of the block, class by class, stand in the class-major set."""
        return [c * ipc + j for c in self.classes for j in self.images]

    def __len__(self) -> int:
        return len(self.classes) * len(self.images)


@dataclass
class Prepared:
    """What blocks are recovered from.

    Attributes:
        watch: the frozen teacher; shape: of an image; transform: of the data.
        targets: class -> its tensors by name (none for SRe2L); a worker needs those of the classes of its block only.
    """

    watch: Watch
    shape: tuple[int, int, int]
    transform: object
    device: torch.device
    targets: Mapping[int, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class State:
    """Blocks under way, side by side."""

    pixels: nn.ParameterList  # per block (groups * size, c, h, w), group-major
    optimiser: torch.optim.Optimizer
    done: int
    prepared: Prepared = field(metadata={"constant": True})
    blocks: list[Block] = field(metadata={"constant": True})
    views: list[Tensor] = field(
        metadata={"constant": True}
    )  # per block (R, groups, 7): crop (4), flip, roll (2)
    targets: list[dict[str, Tensor]] = field(metadata={"constant": True})  # per block
    train: object = field(default=None, metadata={"constant": True})
    ipc: int = field(default=0, metadata={"constant": True})


def class_images(train, c: int, chunk: int) -> Iterable[Tensor]:
    """The real images of a class in chunks of consecutive ones, from memory or from a stream."""
    rows = (train.labels == c).nonzero().flatten()
    return (x for x, _ in in_turn(train, rows.split(chunk)))


def bounds(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The normalised values of black and white per channel, ``(c, 1, 1)`` each; none for whitened data."""
    if prepared.transform.config()["kind"] != "standardise":
        infinite = torch.full((prepared.shape[0], 1, 1), torch.inf, device=prepared.device)
        return -infinite, infinite
    black = torch.zeros(prepared.shape[0], 1, 1, device=prepared.device)
    return prepared.transform.forward(black), prepared.transform.forward(black + 1)


def stored_pixels(pixels: Tensor, transform, storage: str) -> Tensor:
    """The pixels as they are after saving: ``float`` unchanged; ``png`` truncated to 8 bits; ``jpeg`` compressed too."""
    if storage == "float":
        return pixels.clone()
    levels = (transform.inverse(pixels).clamp(0, 1) * 255).to(torch.uint8)
    if storage == "jpeg":
        levels = torch.stack([_jpeg(one) for one in levels.cpu()]).to(pixels.device)
    return transform.forward(levels.to(pixels.dtype) / 255)


def _jpeg(image: Tensor) -> Tensor:
    """An image ``(c, h, w)`` of bytes through JPEG at Pillow's default quality (75)."""
    import io

    import numpy as np
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if len(image) == 1 else array).save(buffer, "JPEG")
    back = np.array(Image.open(buffer))
    return torch.from_numpy(back.reshape(array.shape)).permute(2, 0, 1)
