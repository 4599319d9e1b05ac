"""Data sets that are folders of image files: Tiny-ImageNet, ImageNet-1K, its named subsets, and any folder of yours.

Layouts, below the data root or at the folder itself::

    imagenet/{train,val}/<synset>/*.JPEG                  ImageNet-1K and the subsets of lib.data.subsets
    tiny-imagenet-200/train/<synset>/images/*.JPEG        Tiny-ImageNet as it is distributed: the test half is
    tiny-imagenet-200/val/{images/,val_annotations.txt}   val, whose labels stand in a text file
    <folder>/{train,test}/<class>/*.png                   yours; val, valid or validation may stand for test
    <folder>/<class>/*.png                                yours, split here: see :func:`split_by_class`

Yours are named ``folder:/path``, or ``folder:/path@32`` to have them scaled to 32 pixels.

A class is a folder, labels follow the alphabetical order of the class folders (the listed order for named subsets).
"""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.data.images import (
    SUFFIXES,
    WORKERS,
    common_form,
    decode_all,
    files_below,
    shapes,
    tell_left_out,
    visible,
)
from lib.data.imageset import NATURAL
from lib.data.memory import check_fits
from lib.data.source import Source, channel_statistics
from lib.data.subsets import SUBSETS, class_names
from lib.data.whitening import Standardise
from lib.system.errors import CompanionError

PREFIX = "folder:"
NAMES = ("imagenet", "tinyimagenet", *SUBSETS)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_CLASSES = 1000
# Tiny-ImageNet is distributed at 64 px; MTT uses the subsets at 128; 224 is what ImageNet classifiers take.
SIZES = {"tinyimagenet": 64, "imagenet": 224, **dict.fromkeys(SUBSETS, 128)}
TEST_NAMES = ("test", "val", "valid", "validation")
PAGES = {
    "tinyimagenet": "http://cs231n.stanford.edu/tiny-imagenet-200.zip (unpack it there)",
    "imagenet": "https://image-net.org/download.php (needs an account; validation images sorted into class folders)",
}


@dataclass(frozen=True)
class Files:
    """One half of a data set on disk: image files with their labels."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """A data set on disk. ``size`` is the side to scale to unless told otherwise, None = as it is."""

    name: str
    train: Files
    test: Files
    classes: tuple[str, ...]
    size: int | None = None
    channels: int | None = None
    transform: Standardise | None = None


def find(name: str, root: Path) -> Listing:
    """The files and labels of a data set: one of :data:`NAMES` below ``root``, or ``folder:/path``. For a folder of yours a
    warning says how many files are not read.

    Raises:
        CompanionError: when it is not there, or a class has no image.
    """
    if name.startswith(PREFIX):
        return _own(place_of(name)[0])
    imagenet = dict(size=SIZES[name], channels=3, transform=channel_statistics(IMAGENET_MEAN, IMAGENET_STD))
    if name == "tinyimagenet":
        base = _below(root, name, ("tiny-imagenet-200", "tiny-imagenet"))
        return Listing(name, *_tiny(base), **imagenet)
    base = _below(root, name, ("imagenet", "ILSVRC2012"))
    if name == "imagenet":
        synsets = _class_folders(base / "train")
        if len(synsets) != IMAGENET_CLASSES:
            raise CompanionError(
                f"{base / 'train'} has {len(synsets)} class folders; imagenet needs {IMAGENET_CLASSES} "
                f"(for a part of it use a named subset or {PREFIX}{base})"
            )
        classes = synsets
    else:
        synsets, classes = SUBSETS[name], class_names(name)
    return Listing(
        name, _by_class(base / "train", synsets), _by_class(base / "val", synsets), classes, **imagenet
    )


def place_of(name: str) -> tuple[Path, int | None]:
    """Folder and side of ``folder:/path`` and ``folder:/path@32``; a folder whose own name ends so comes first."""
    path = Path(name.removeprefix(PREFIX)).expanduser()
    sized = re.fullmatch(r"(.+)@([1-9][0-9]*)", str(path))
    return (Path(sized[1]), int(sized[2])) if sized and not path.is_dir() else (path, None)


def look_at(name: str) -> tuple[int, list[tuple[int, int]]]:
    """Number of training images of ``folder:/path`` and the different (width, height) of all, from their headers alone.

    Raises:
        CompanionError: as :func:`find`, and for a damaged file.
    """
    listing = find(name, Path())
    with ThreadPoolExecutor(WORKERS) as pool:
        return len(listing.train.paths), shapes(listing.train.paths + listing.test.paths, pool)


def read(name: str, root: Path, size: int | None) -> Source:
    """Decode a whole data set into memory, scaled to ``size`` (None: as its name or :class:`Listing` says)."""
    listing = find(name, root)
    if size is None and name.startswith(PREFIX):
        size = place_of(name)[1]
    paths = listing.train.paths + listing.test.paths
    with ThreadPoolExecutor(WORKERS) as pool:
        size, channels = size or listing.size, listing.channels
        if size is None or channels is None:
            size, channels = common_form(paths, size, pool)
        check_fits(name, (len(paths), channels, size, size))
        halves = [
            (decode_all(half.paths, size, channels, pool), torch.tensor(half.labels))
            for half in (listing.train, listing.test)
        ]
    padding = 3 if channels == 1 else 1
    return Source(listing.name, *halves, listing.classes, listing.transform, NATURAL, padding)


def split_by_class(files: Files, num_classes: int) -> tuple[Files, Files]:
    """Training and test files where a folder has no test half: of every class one image in five, at least one.

    Deterministic: per class, the files in alphabetical order are shuffled with NumPy's ``RandomState(0)`` (whose stream
    never changes) and the first fifth is the test part. Another class coming or going changes nothing.
    """
    train, test = [], []
    for label in range(num_classes):
        paths = sorted(path for path, other in zip(files.paths, files.labels, strict=True) if other == label)
        if len(paths) < 2:
            raise CompanionError(
                f"{paths[0].parent} has one image; splitting off a test part needs at least two"
            )
        order = np.random.RandomState(0).permutation(len(paths))
        cut = max(1, round(len(paths) / 5))
        test += [(paths[i], label) for i in sorted(order[:cut])]
        train += [(paths[i], label) for i in sorted(order[cut:])]
    return _files(train), _files(test)


def _own(base: Path) -> Listing:
    if not base.is_dir():
        reason = "is not a folder" if base.exists() else "does not exist"
        raise CompanionError(f"{base} {reason}; expected {base}/train/<class>/*.png or {base}/<class>/*.png")
    name = PREFIX + base.resolve().name
    train = base / "train" if _is_half(base) else base
    classes = _class_folders(train)
    if len(classes) == 1:
        deeper = [
            folder for folder in (train / classes[0]).iterdir() if folder.is_dir() and visible([folder.name])
        ]
        hint = (
            f"; did you mean {PREFIX}{train / classes[0]}, which has {len(deeper)} folders?"
            if len(deeper) > 1
            else ""
        )
        raise CompanionError(
            f"{train} has one class folder, {classes[0]!r}; at least two classes are needed{hint}"
        )
    found = (
        next((base / half for half in TEST_NAMES if (base / half).is_dir()), None) if train != base else None
    )
    files = _by_class(train, classes, tell=True)
    if found is None:
        return Listing(name, *split_by_class(files, len(classes)), classes)
    strange = sorted(set(_class_folders(found)) - set(classes))
    if strange:
        raise CompanionError(
            f"{found / strange[0]} has no counterpart in {train}; classes there: {', '.join(classes)}"
        )
    return Listing(name, files, _by_class(found, classes, tell=True), classes)


def _below(root: Path, name: str, folders: tuple[str, ...]) -> Path:
    """The first of ``root/folder`` and ``root`` itself that has a train folder."""
    places = [*(root / folder for folder in folders), root]
    for place in places:
        if (place / "train").is_dir():
            return place
    page = PAGES.get(name, PAGES["imagenet"])
    raise CompanionError(f"{name} is not in {root} (no train folder in {places[0]}); get it from {page}")


def _is_half(base: Path) -> bool:
    """Whether ``base/train`` holds class folders. A class may have that name: it holds images; so does a half into which some went
    astray, which no folders lie beside but the other half's."""
    train = base / "train"
    if not train.is_dir() or not _images_in(train):
        return train.is_dir()
    others = set(_class_folders(base)) - {"train"}
    return others <= set(TEST_NAMES) and any(files_below(path) for path in train.iterdir() if path.is_dir())


def _images_in(folder: Path) -> list[str]:
    """Image files of the folder itself."""
    return [
        name
        for name in visible(entry.name for entry in folder.iterdir() if entry.is_file())
        if Path(name).suffix.lower() in SUFFIXES
    ]


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = visible(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise CompanionError(f"{folder} has no class folders; expected {folder}/<class>/*.png")
    return tuple(sorted(names))


def _by_class(folder: Path, names: tuple[str, ...], tell: bool = False) -> Files:
    """The files of ``folder/name`` for each name, labelled by position; ``tell`` whether others are left out."""
    absent = [name for name in names if not (folder / name).is_dir()]
    if absent:
        listed = ", ".join(repr(name) for name in absent[:20]) + (", ..." if len(absent) > 20 else "")
        raise CompanionError(
            f"{folder} has no class folder {listed} ({len(absent)} of {len(names)} are missing)"
        )
    pairs, left_out = [], Counter()
    for label, name in enumerate(names):
        paths = files_below(folder / name, left_out)
        if not paths:
            raise CompanionError(f"the class folder {folder / name} has no readable image (.png, .jpg, ...)")
        pairs += [(path, label) for path in paths]
    if tell:
        if beside := _images_in(folder):
            left_out["beside the class folders"] = len(beside)
        tell_left_out(folder, left_out)
    return _files(pairs)


def _tiny(base: Path) -> tuple[Files, Files, tuple[str, ...]]:
    synsets = _class_folders(base / "train")
    notes = base / "val" / "val_annotations.txt"
    if notes.is_file():
        rows = [line.split("\t") for line in notes.read_text(encoding="utf-8").splitlines() if line.strip()]
        labels = {synset: label for label, synset in enumerate(synsets)}
        wrong = next((row for row in rows if len(row) < 2 or row[1] not in labels), None)
        if wrong or not rows:
            raise CompanionError(f"{notes} is damaged: no known class in the line {wrong}")
        test = _files([(base / "val" / "images" / row[0], labels[row[1]]) for row in rows])
    else:  # sorted into class folders by the user
        test = _by_class(base / "val", synsets)
    words = base / "words.txt"
    lines = words.read_text(encoding="utf-8").splitlines() if words.is_file() else []
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    classes = tuple(names.get(synset, synset).split(",")[0] for synset in synsets)
    return _by_class(base / "train", synsets), test, classes


def _files(pairs: list[tuple[Path, int]]) -> Files:
    paths, labels = zip(*pairs, strict=True)
    return Files(paths, labels)
