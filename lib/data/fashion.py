"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747; MIT licence): 60 000 / 10 000 grey images of 28 px, ten classes.

Four IDX files, plain or gzip-compressed, from wherever they are: torchvision's download, Debian's package
``dataset-fashion-mnist``, or a folder that the user names. Whatever the way, the *uncompressed* bytes are checked.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.system.errors import CompanionError

PAGE = "https://github.com/zalandoresearch/fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
PACKAGE = "apt-get install dataset-fashion-mnist"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# (half, content) -> file, SHA-256 of the uncompressed bytes
FILES = {
    ("train", "images"): ("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    ("train", "labels"): ("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ("test", "images"): ("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    ("test", "labels"): ("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}  # fmt: skip


def find(root: Path) -> Path | None:
    """The folder that holds the four files: torchvision's under ``root``, ``root`` itself, or that of Debian's package."""
    for folder in (root / "FashionMNIST" / "raw", root / "fashion-mnist", root, INSTALLED):
        if all(_file(folder, name) for name, _ in FILES.values()):
            return folder
    return None


def read(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The training and the test half: uint8 images ``(N, 1, 28, 28)`` and int64 labels ``(N,)``.

    Raises:
        CompanionError: a file is damaged or another one than that of the literature.
    """
    halves = []
    for half in ("train", "test"):
        images, labels = (_array(folder, *FILES[half, content]) for content in ("images", "labels"))
        halves.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return tuple(halves)


def absent(root: Path) -> CompanionError:
    """The one line that says where it was looked for and how to get it."""
    return CompanionError(
        f"fashionmnist is neither in {root} nor in {INSTALLED}; get it with: python -m lib.data fashionmnist --root {root} "
        f"(downloads from {PAGE}), or on Debian and Ubuntu: {PACKAGE}"
    )


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _array(folder: Path, name: str, sha256: str) -> np.ndarray:
    """The content of an IDX file of bytes."""
    path = _file(folder, name)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise CompanionError(
            f"{path} is damaged ({error}): delete it and get it again from {PAGE}"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CompanionError(
            f"{path} is damaged or another file (its SHA-256 differs): get it again from {PAGE}"
        )
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
