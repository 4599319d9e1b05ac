"""Makes the embedded ``fashion14.npz``: ``python -m lib.data.fashion14 [--root FOLDER]``.

1000 training and 200 test images of each class of the real Fashion-MNIST (files verified by SHA-256), chosen by NumPy's legacy
generator, whose stream never changes, then reduced to 14x14 by the mean of 2x2 pixels, rounded to bytes. The licence of
Fashion-MNIST (MIT, Zalando SE) stands beside the file.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

from lib.data import fashion
from lib.system.errors import CompanionError
from lib.system.files import atomic, data_dir

FILE = Path(__file__).with_name("fashion14.npz")
PER_CLASS = {"train": 1000, "test": 200}


def chosen(labels: np.ndarray, count: int, generator: np.random.RandomState) -> np.ndarray:
    """Ascending positions of ``count`` images of every class, class after class."""
    rows = [generator.permutation(np.flatnonzero(labels == c))[:count] for c in range(len(fashion.CLASSES))]
    return np.concatenate([np.sort(part) for part in rows])


def halved(images: np.ndarray) -> np.ndarray:
    """``(n, 28, 28)`` bytes -> ``(n, 14, 14)`` bytes: means of 2x2 pixels, rounded half up."""
    sums = images.astype(np.uint16).reshape(len(images), 14, 2, 14, 2).sum((2, 4))
    return ((sums + 2) // 4).astype(np.uint8)


def make(halves: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> bytes:
    """The file's content."""
    generator, arrays = np.random.RandomState(0), {}
    for (images, labels), (half, count) in zip(halves, PER_CLASS.items(), strict=True):
        rows = chosen(labels.numpy(), count, generator)
        arrays[f"{half}_images"] = halved(images[:, 0].numpy()[rows])
        arrays[f"{half}_labels"] = labels.numpy()[rows].astype(np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.data.fashion14", description=__doc__)
    parser.add_argument(
        "--root", type=Path, help="where data sets lie (default: $COMPANION_DATA, else data/)"
    )
    root = parser.parse_args(arguments).root or data_dir()
    try:
        folder = fashion.find(root)
        if folder is None:
            raise fashion.absent(root)
        content = make(fashion.read(folder))
        with atomic(FILE) as temporary:
            temporary.write_bytes(content)
    except CompanionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{FILE.name}: {len(content) / 1e6:.2f} MB from {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
