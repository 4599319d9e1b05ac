"""Real data that is already installed: scikit-learn's digits, a part of Fashion-MNIST, and crops of ten colour photographs.

``digits``: 1797 grey 8x8 images, pixels / 16, in the split of scikit-learn's
``train_test_split(X, y, test_size=360, random_state=0, stratify=y)`` (1437 / 360).

``fashion14``: 1000 training and 200 test images of each class of Fashion-MNIST (MIT licence), reduced to 14x14 by
:mod:`lib.data.fashion14`; a ConvNet's first layer pads them to 16.

``photos32`` and ``photos16``: which of ten photographs is a small crop from? Each photograph is cut into blocks of
64 px; every fourth block in a shuffled order belongs to the test half; crops of 32 px lie inside one block, so no test
pixel occurs in a training crop. Training crops are 8 px apart, test crops do not overlap. ``photos16`` is the 2x2 area
average of ``photos32``. Every class has 400 training crops and 28 to 60 test crops (what its photograph has room for),
so accuracies are to be averaged over classes.

Files are read straight from the installed packages (no download); importing scikit-learn would take over a second.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.data.fashion import CLASSES as FASHION
from lib.data.imageset import DIGITS
from lib.data.source import Source, to_unit
from lib.system.errors import CompanionError

NAMES = ("digits", "fashion14", "photos16", "photos32")

BLOCK, CROP, TRAIN_STRIDE = 64, 32, 8
TRAIN_PER_CLASS, MOST_TEST_PER_CLASS = 400, 60

# class, file in an installed package, SHA-256
_PHOTOS = """
astronaut skimage/data/astronaut.png 88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5
chelsea skimage/data/chelsea.png 596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb
coffee skimage/data/coffee.png cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7
hubble_deep_field skimage/data/hubble_deep_field.jpg 3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4
immunohistochemistry skimage/data/ihc.png f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef
retina skimage/data/retina.jpg 38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6
rocket skimage/data/rocket.jpg c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c
stereo_motorcycle skimage/data/motorcycle_left.png db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179
china sklearn/datasets/images/china.jpg 8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29
flower sklearn/datasets/images/flower.jpg a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638
"""
PHOTOS = {name: (file, sha256) for name, file, sha256 in map(str.split, _PHOTOS.strip().splitlines())}
DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
DIGITS_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
PROJECTS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def read(name: str) -> Source:
    """The data set of that name, one of :data:`NAMES`."""
    if name == "digits":
        return _digits()
    if name == "fashion14":
        return _fashion14()
    halves = _photo_halves()
    if name == "photos16":
        halves = tuple((F.avg_pool2d(to_unit(images), 2), labels) for images, labels in halves)
    return Source(name, *halves, classes=tuple(PHOTOS))


def _digits() -> Source:
    with gzip.open(io.BytesIO(_packaged(DIGITS_FILE, DIGITS_SHA256)), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)  # (1797, 64 + 1)
    images = torch.from_numpy(table[:, :64]).view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(table[:, 64]).long()
    with np.load(Path(__file__).with_name("digits_split.npz"), allow_pickle=False) as split:
        halves = [torch.from_numpy(split[half].astype(np.int64)) for half in ("train", "test")]
    train, test = [(images[half], labels[half]) for half in halves]
    return Source("digits", train, test, classes=tuple("0123456789"), augmentation=DIGITS)


def _fashion14() -> Source:
    with np.load(Path(__file__).with_name("fashion14.npz"), allow_pickle=False) as file:
        halves = [
            (
                torch.from_numpy(file[f"{half}_images"])[:, None],
                torch.from_numpy(file[f"{half}_labels"]).long(),
            )
            for half in ("train", "test")
        ]
    return Source("fashion14", *halves, classes=FASHION, first_padding=2)


def _photo_halves() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    images, labels = ([], []), ([], [])
    for label, name in enumerate(PHOTOS):
        photo = photograph(name)
        for half, corners in enumerate(crop_corners(name, *photo.shape[1:])):
            images[half].append(cut(photo, corners))
            labels[half].append(torch.full((len(corners),), label))
    train, test = [(torch.cat(i), torch.cat(l)) for i, l in zip(images, labels, strict=True)]
    return train, test


def photograph(name: str) -> Tensor:
    """One of the ten photographs, (3, height, width) uint8."""
    from PIL import Image

    with Image.open(io.BytesIO(_packaged(*PHOTOS[name]))) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def crop_corners(name: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Top left corners (row, column) of the training and the test crops of a photograph: (400, 2) and (n, 2)."""
    # NumPy's legacy generator is guaranteed never to change its stream; torch.randperm has no such promise.
    generator = np.random.RandomState(list(PHOTOS).index(name))
    blocks = _grid(range(0, height - BLOCK + 1, BLOCK), range(0, width - BLOCK + 1, BLOCK))
    blocks = blocks[generator.permutation(len(blocks))]
    in_test = torch.arange(len(blocks)) % 4 == 0

    def crops(chosen: Tensor, stride: int, most: int) -> Tensor:
        steps = range(0, BLOCK - CROP + 1, stride)
        corners = (chosen[:, None] + _grid(steps, steps)).flatten(0, 1)
        return corners[generator.permutation(len(corners))[:most]]

    return crops(blocks[~in_test], TRAIN_STRIDE, TRAIN_PER_CLASS), crops(
        blocks[in_test], CROP, MOST_TEST_PER_CLASS
    )


def cut(photo: Tensor, corners: Tensor) -> Tensor:
    """The crops (n, 3, 32, 32) of a photograph (3, height, width) at these corners (n, 2)."""
    rows, columns = (corners[:, :, None] + torch.arange(CROP)).unbind(1)  # (n, 32) each
    return photo[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1).contiguous()


def _grid(rows: range, columns: range) -> Tensor:
    return torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns))


@functools.cache
def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise CompanionError(
            f"{PROJECTS[package]} is not installed; get it with: pip install {PROJECTS[package]}"
        )
    return Path(spec.submodule_search_locations[0])


def _packaged(file: str, sha256: str) -> bytes:
    """A file of an installed package, checked to be the one that this project's numbers were measured on."""
    package, _, inner = file.partition("/")
    path, project = _folder(package) / inner, PROJECTS[package]
    repair = f"pip install --force-reinstall {project}"
    if not path.is_file():
        raise CompanionError(f"the installed {project} has no {path}; get it with: {repair}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CompanionError(
            f"{path} is damaged or another version (its SHA-256 differs); repair with: {repair}"
        )
    return content
