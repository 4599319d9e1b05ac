"""Data sets that are too large for memory: image files decoded when a batch asks for them."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.data.folders import IMAGENET_MEAN, IMAGENET_STD, NAMES, SIZES, TEST_NAMES, find
from lib.data.images import WORKERS, decode, decode_crop
from lib.data.imageset import NATURAL, ImageSet, check_per_class, class_table, draw
from lib.data.source import channel_statistics, to_unit
from lib.data.whitening import Transform
from lib.system.errors import CompanionError, unknown

# Batches decoded ahead of the one in use.
AHEAD = 2


@dataclass(frozen=True, eq=False)
class Stream:
    """Half a data set as files: N images of C classes that become tensors batch by batch.

    Each image is scaled (shorter side to ``resize``, or to ``size`` where that is None), centre cropped to (channels, size, size),
    moved to ``device`` and passed through ``transform``. ``labels`` (N,) int64 and everything drawn at random stay on the CPU.
    """

    name: str
    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    channels: int
    transform: Transform
    device: torch.device
    augmentation: str = NATURAL
    first_padding: int = 1
    resize: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @functools.cached_property
    def counts(self) -> Tensor:
        """Images per class, (C,) int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @functools.cached_property
    def smallest_class(self) -> int:
        return int(self.counts.min())

    @functools.cached_property
    def _table(self) -> Tensor:
        return class_table(self.labels, self.num_classes)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")

    def images(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (any shape), normalised: (*indices.shape, c, h, w)."""
        return self._collect(self._submit(indices.flatten())).view(*indices.shape, *self.shape)

    def batches(
        self, generator: torch.Generator | None, batch: int, drop_last: bool = False
    ) -> Iterator[tuple]:
        """One pass over all images in random order (None: in the order of the files): (images, labels) on the device.

        The next batches are decoded while one is in use. The last batch may be short.
        """
        if generator is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=generator, device=generator.device).cpu()
        chunks = order.split(batch)
        if drop_last and len(chunks[-1]) < batch:
            chunks = chunks[:-1]
        yield from self.in_turn(chunks)

    def in_turn(self, chunks: Iterable[Tensor], crops: Iterable | None = None) -> Iterator[tuple]:
        """(images, labels) on the device at each of these chunks of positions (m,); the next ones are decoded meanwhile.

        Args:
            crops: for every chunk the random parts to cut from the whole images (``lib.augment.views.Crops``), instead of the
                scaled centre.
        """
        waiting: deque = deque()
        for chunk, crop in zip(chunks, itertools.repeat(None) if crops is None else crops, strict=False):
            waiting.append((chunk, self._submit(chunk, crop)))
            if len(waiting) > AHEAD:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def indices(self, n: int, generator: torch.Generator) -> Tensor:
        """For every class n positions without replacement: (C, n); errors as :meth:`ImageSet.indices`."""
        check_per_class(n, self.smallest_class, self.classes, self.counts)
        return draw(self._table, n, generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """For every class n images without replacement, decoded now: (C, n, c, h, w)."""
        return self.images(self.indices(n, generator))

    def of_class(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        """n images of one class without replacement, (n, c, h, w): a real batch where all classes are too many."""
        row = self._table[c : c + 1, : int(self.counts[c])]
        check_per_class(n, row.shape[1], self.classes[c : c + 1], self.counts[c : c + 1])
        return self.images(draw(row, n, generator)[0])

    def take(self, indices: Tensor) -> ImageSet:
        """The images at these positions (m,) as a set in memory."""
        return ImageSet(
            self.name,
            self.images(indices),
            self.labels[indices].to(self.device),
            self.classes,
            self.transform,
            self.augmentation,
            self.first_padding,
        )

    def _submit(self, indices: Tensor, crop=None) -> list:
        paths = [self.paths[i] for i in indices.tolist()]
        if crop is None:
            return [self._pool.submit(decode, path, self.size, self.channels, self.resize) for path in paths]
        return [
            self._pool.submit(
                decode_crop, path, self.size, self.channels, functools.partial(crop.box, k), flip
            )
            for k, (path, flip) in enumerate(zip(paths, crop.flips.tolist(), strict=True))
        ]

    def _collect(self, futures: list) -> Tensor:
        # decoders hand out views with the channels last; on a CPU, PyTorch 2.15's kernels for narrow networks write beyond such memory
        pixels = torch.from_numpy(np.stack([future.result() for future in futures])).contiguous()
        return self.transform.forward(to_unit(pixels.to(self.device)))

    def _finish(self, indices: Tensor, futures: list) -> tuple[Tensor, Tensor]:
        return self._collect(futures), self.labels[indices].to(self.device)


def open_stream(
    name: str,
    root: Path,
    split: str,
    size: int | None,
    device: torch.device,
    transform: Transform | None,
    channels: int,
    resize: int | None = None,
) -> Stream:
    """See :func:`lib.data.stream`."""
    if split not in ("train", *TEST_NAMES):
        raise unknown("split", split, ("train", "test"))
    if channels not in (1, 3):
        raise unknown("number of channels", channels, ("1", "3"))
    listing = find(name, root)
    half = listing.train if split == "train" else listing.test
    size = size or listing.size
    if size is None:
        raise CompanionError(
            f"reading {name} in batches needs size= (pixels); usual for {NAMES[0]}: {SIZES[NAMES[0]]}"
        )
    if resize is not None and resize < size:
        raise CompanionError(
            f"resize {resize} is smaller than size {size}: no square of {size} pixels can be cut from that"
        )
    if transform is None:
        used = slice(channels) if channels == 3 else slice(0, 1)
        transform = channel_statistics(IMAGENET_MEAN[used], IMAGENET_STD[used])
    labels = torch.tensor(half.labels)
    return Stream(
        listing.name,
        half.paths,
        labels,
        listing.classes,
        size,
        channels,
        transform.to(device),
        device,
        resize=resize,
    )
