"""A labelled set of images as two tensors on one device, and drawing from it class by class."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from lib.data.whitening import Transform
from lib.system.cache import digest
from lib.system.cards import card, rows_of, sheet
from lib.system.errors import CompanionError
from lib.system.tensors import check_labels, check_tensor

# Differentiable siamese augmentation: all families for natural images, no mirror images of digits (DSA, section 4).
NATURAL = "color_crop_cutout_flip_scale_rotate"
DIGITS = "color_crop_cutout_scale_rotate"
SMALL_SIDE, SMALL_COUNT = (
    32,
    20_000,
)  # what two cores distil in seconds has at most so many pixels a side, and images


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """N images of C classes, preprocessed, on one device.

    ``images`` (N, c, h, w) float32 are ``transform.forward`` of pixels in [0, 1]; ``transform.inverse`` gives
    these back. ``labels`` (N,) int64 count from 0 in the order of ``classes``. ``augmentation`` is the strategy
    string of :mod:`lib.augment` that suits the data, ``first_padding`` the padding of a ConvNet's first layer
    (3 where 28 px become 32, else 1).
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    transform: Transform
    augmentation: str = NATURAL
    first_padding: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        """Image and label at a position, or images and labels of a slice; normalised."""
        return self.images[index], self.labels[index]

    def as_dataset(self) -> TensorDataset:
        """The set for a ``DataLoader``: pairs (image, label), normalised."""
        return TensorDataset(self.images, self.labels)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"ImageSet({self.name}: {len(self)} images {shape}, {self.num_classes} classes)"

    def show(self, per_class: int = 8) -> Image.Image:
        """The first images of every class, one row per class, as a picture (JupyterLab displays it; ``.save`` writes it)."""
        return self._picture(per_class, self.num_classes)

    def _repr_html_(self) -> str:
        return card(repr(self), self._picture())

    def _picture(self, *how: int) -> Image.Image:
        table = rows_of(self.labels, self.num_classes, *how)
        chosen = table[table >= 0]
        table[table >= 0] = torch.arange(len(chosen))
        return sheet(self.transform.inverse(self.images[chosen]), table)

    def check(self) -> None:
        """Refuse images that are not finite 32-bit numbers ``(N, c, h, w)`` and labels that are not N class indices beside them;
        whoever is given a set begins with this.

        Raises:
            CompanionError: in one line.
        """
        self._sound  # noqa: B018

    @functools.cached_property
    def _sound(self) -> bool:
        what = f"images of {self.name!r}"
        check_tensor(what, self.images)
        if self.images.dtype != torch.float32 or self.images.dim() != 4:
            shape = tuple(self.images.shape)
            raise CompanionError(
                f"{what} must be torch.float32 (N, c, h, w), not {self.images.dtype} {shape}"
            )
        what = f"labels of {self.name!r}"
        check_tensor(what, self.labels, floating=False, like=self.images)
        if tuple(self.labels.shape) != (len(self.images),):
            raise CompanionError(f"{what} are {tuple(self.labels.shape)} for {len(self.images)} images")
        check_labels(what, self.labels, self.num_classes)
        return True

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image."""
        return tuple(self.images.shape[1:])

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """Side of the square images in pixels."""
        return self.images.shape[2]

    @property
    def small(self) -> bool:
        """Whether small networks and short runs are the point: at most 32 pixels a side and 20 000 images."""
        return self.size <= SMALL_SIDE and len(self) <= SMALL_COUNT

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @functools.cached_property
    def _table(self) -> Tensor:
        return class_table(self.labels, self.num_classes)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Images per class, (C,) int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @functools.cached_property
    def smallest_class(self) -> int:
        """Number of images of the smallest class: the largest n that :meth:`sample` takes."""
        return int(self.counts.min())

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels: the same on every device, different for another preprocessing."""
        return digest(self.images, self.labels)

    def of_class(self, c: int) -> Tensor:
        """All images of class ``c``, (n_c, c, h, w)."""
        return self.images[self.labels == c]

    def indices(self, n: int, generator: torch.Generator) -> Tensor:
        """For every class n positions without replacement, uniformly: (C, n) int64.

        Raises:
            CompanionError: for n < 1 or n larger than the smallest class.
        """
        check_per_class(n, self.smallest_class, self.classes, self.counts)
        return draw(self._table, n, generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """For every class n images without replacement: (C, n, c, h, w); errors as :meth:`indices`."""
        return self.images[self.indices(n, generator)]

    def subset(self, indices: Tensor | list[int]) -> ImageSet:
        """The images at these positions, in this order; all classes keep their label."""
        indices = torch.as_tensor(indices, dtype=torch.long, device=self.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on another device."""
        moved = {"images": self.images.to(device), "labels": self.labels.to(device)}
        return replace(self, **moved, transform=self.transform.to(device))


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """The two halves of a data set; ``test`` is preprocessed with the statistics of ``train``."""

    train: ImageSet
    test: ImageSet

    def __repr__(self) -> str:
        return f"Data(train={self.train!r}, test={self.test!r})"

    def _repr_html_(self) -> str:
        return self.train._repr_html_() + self.test._repr_html_()

    def to(self, device: torch.device | str) -> Data:
        return Data(self.train.to(device), self.test.to(device))


def class_table(labels: Tensor, num_classes: int) -> Tensor:
    """Row c lists the positions of class c in ascending order, padded with -1: (C, size of the largest class)."""
    counts = torch.bincount(labels, minlength=num_classes)
    positions = torch.argsort(labels, stable=True)  # (N,) grouped by class
    rows = labels[positions]
    columns = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[rows]
    table = labels.new_full((num_classes, int(counts.max())), -1)
    table[rows, columns] = positions
    return table


def draw(table: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n distinct entries of every row of a :func:`class_table`, uniformly: the n largest of random keys, (C, n)."""
    keys = torch.rand(table.shape, generator=generator, device=generator.device).to(table.device)
    keys = keys.masked_fill(table < 0, -1.0)
    return table.gather(1, keys.topk(n, dim=1).indices)


def check_per_class(n: int, smallest: int, classes: tuple[str, ...], counts: Tensor) -> None:
    """Refuse a number of images per class that the data cannot give."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise CompanionError(f"images per class must be a whole number of at least 1, not {n!r}")
    if n > smallest:
        name = classes[int(counts.argmin())]
        raise CompanionError(
            f"{n} images per class asked for, but the smallest class ({name!r}) has {smallest}"
        )
