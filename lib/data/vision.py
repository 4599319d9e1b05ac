"""MNIST, FashionMNIST, SVHN, CIFAR-10 and CIFAR-100 in torchvision's layout on disk.

torchvision downloads them from the authors' pages and verifies checksums. CIFAR's files are pickles: torchvision opens
them only after their MD5 matched the table in its source, so no pickle of unknown content is ever loaded.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.data import fashion
from lib.data.imageset import DIGITS, NATURAL
from lib.data.source import Source, channel_statistics
from lib.system.errors import CompanionError


@dataclass(frozen=True)
class Facts:
    """One data set: torchvision's class, what to find under the root, the page it comes from and how it is used."""

    torchvision: str
    marker: str
    page: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    first_padding: int = 1


# Channel statistics: those of the DC, DSA and DM code, so that numbers compare.
VISION = {
    "mnist": Facts(
        "MNIST",
        "MNIST/raw",
        "http://yann.lecun.com/exdb/mnist",
        (0.1307,),
        (0.3081,),
        DIGITS,
        first_padding=3,
    ),
    "fashionmnist": Facts(
        "FashionMNIST",
        "FashionMNIST/raw",
        fashion.PAGE,
        (0.2861,),
        (0.3530,),
        NATURAL,
        first_padding=3,
    ),
    "svhn": Facts(
        "SVHN",
        "train_32x32.mat",
        "http://ufldl.stanford.edu/housenumbers",
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        DIGITS,
    ),
    "cifar10": Facts(
        "CIFAR10",
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        NATURAL,
    ),
    "cifar100": Facts(
        "CIFAR100",
        "cifar-100-python",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
        NATURAL,
    ),
}


def read(name: str, root: Path, download: bool) -> Source:
    """The data set under ``root``, fetched first if ``download``.

    Raises:
        CompanionError: when it is not there, does not pass its checks, or cannot be downloaded.
    """
    if name == "fashionmnist":
        return _fashion(root, download)
    facts = VISION[name]
    command = f"python -m lib.data {name} --root {root}"
    if not download and not (root / facts.marker).exists():
        raise CompanionError(
            f"{name} is not in {root} (no {facts.marker} there); get it with: {command}"
            f" (downloads from {facts.page})"
        )
    dataset = getattr(importlib.import_module("torchvision.datasets"), facts.torchvision)
    if download:
        _download(name, facts, dataset, root)
    try:
        halves = [_open(dataset, root, train) for train in (True, False)]
        (images, labels), test = [_tensors(facts, half) for half in halves]
        if len(images) != len(labels) or len(test[0]) != len(test[1]):
            raise ValueError("numbers of images and labels differ")
        classes = tuple("0123456789") if facts.augmentation == DIGITS else tuple(halves[0].classes)
        if not 0 <= min(labels.min(), test[1].min()) <= max(labels.max(), test[1].max()) < len(classes):
            raise ValueError("labels out of range")
    # whatever a reader makes of a damaged file
    except Exception as error:
        raise CompanionError(
            f"the files of {name} in {root / facts.marker} are damaged or incomplete ({_line(error)}); "
            f"delete them and run: {command}"
        ) from error
    normalisation = channel_statistics(facts.mean, facts.std)
    return Source(
        name, (images, labels), test, classes, normalisation, facts.augmentation, facts.first_padding
    )


def _fashion(root: Path, download: bool) -> Source:
    """Fashion-MNIST from any of its places (:mod:`lib.data.fashion`); downloaded only if it is in none of them."""
    facts, folder = VISION["fashionmnist"], fashion.find(root)
    if folder is None and download:
        _download("fashionmnist", facts, importlib.import_module("torchvision.datasets").FashionMNIST, root)
        folder = fashion.find(root)
    if folder is None:
        raise fashion.absent(root)
    normalisation = channel_statistics(facts.mean, facts.std)
    return Source(
        "fashionmnist", *fashion.read(folder), fashion.CLASSES, normalisation, NATURAL, facts.first_padding
    )


def _open(dataset: type, root: Path, train: bool, download: bool = False):
    half = {"split": "train" if train else "test"} if dataset.__name__ == "SVHN" else {"train": train}
    return dataset(root, download=download, **half)


def _tensors(facts: Facts, half) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, c, h, w) and labels (N,) of one half."""
    images = torch.as_tensor(np.asarray(half.data))
    if images.ndim == 3:  # grey: (N, h, w)
        images = images[:, None]
    elif facts.torchvision != "SVHN":  # CIFAR keeps channels last
        images = images.permute(0, 3, 1, 2)
    labels = half.labels if facts.torchvision == "SVHN" else half.targets
    return images.contiguous(), torch.as_tensor(np.asarray(labels), dtype=torch.long)


def _download(name: str, facts: Facts, dataset: type, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for train in (True, False):
            _open(dataset, root, train, download=True)
    # network, disk and checksum failures come as many types
    except Exception as error:
        raise CompanionError(f"cannot download {name} from {facts.page} to {root}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
