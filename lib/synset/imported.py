"""Sets that others released, as synthetic sets of ours, so that they can be judged under one protocol.

========================== ==============================================================================================
folder of class folders    JPEG or PNG files, as SRe2L, CDA and WMDD release them, or ours (:meth:`SyntheticSet.export`)
``.pt``, ``.pth``          of the DC family: ``{"data": [[images, labels], ...]}``, one set per run; ``[images, labels]``; a
                           dictionary with images and labels; MTT's tensor of images with its labels in a file of their own
``.npz``                   arrays ``images`` and ``labels``, as KIP's
``.safetensors``           ours
========================== ==============================================================================================

Pixels mean nothing without their *space*: ``unit`` is [0, 1], ``normalised`` the channel normalisation of the data, and ``zca``
(MTT), ``zca-kip``, ``zca-rfad`` a whitening, in which case the data must be loaded with the same one: a network that learns
whitened images is tested on whitened images. Nothing in a file is executed: ``torch.load`` reads tensors, numbers and containers.
"""

from __future__ import annotations

import csv
import pickle
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.data.images import WORKERS, decode_all, files_below, tell_left_out, visible
from lib.data.subsets import SUBSETS
from lib.data.whitening import WHITENINGS
from lib.synset import SyntheticSet, class_major
from lib.synset.export import IMAGES
from lib.system.errors import CompanionError, unknown

SPACES = ("normalised", "unit", *WHITENINGS)
PIXELS = ("images", "image_syn", "data", "x")
LABELS = ("labels", "label_syn", "targets", "y")
NUMBER = re.compile(r"\D*(\d+)(\D.*)?")


@dataclass(frozen=True)
class Released:
    """What a file holds: images ``(m, c, h, w)``, bytes or numbers of some space, labels ``(m,)`` or ``(m, C)``, and weights ``(m,)``
    where an export of ours has some."""

    images: Tensor
    labels: Tensor
    weights: Tensor | None = None


def synsets(
    path: Path | str, like, space: str = "normalised", labels: Path | str | None = None
) -> list[SyntheticSet]:
    """All sets of a file or folder, for the data ``like`` (an ``ImageSet``, loaded with the whitening that ``space`` names).

    Args:
        labels: MTT's second file, for a file of images only; without it their classes are taken to be in order.
    Raises:
        CompanionError: another kind of file, other keys, shapes or classes; pickled code; a space that is not that of the data.
    """
    if space not in SPACES:
        raise unknown("space", space, SPACES)
    path, kind = Path(path), like.transform.config()["kind"]
    if path.suffix == ".safetensors":
        return [_own(path, like)]
    if space in WHITENINGS and kind != space:
        raise CompanionError(
            f"{path} is to be read as {space}, the data are {kind}: load them with whiten={space!r}"
        )
    found = all_in(path, like.name, like.classes, like.shape, labels)
    about = {"method": f"released set {path.name}", "dataset": like.name, "space": space}
    return [
        SyntheticSet(
            _in_space_of(one.images, like.transform, space, path).to(like.device),
            one.labels.to(like.device),
            like.classes,
            like.transform,
            weights=None if one.weights is None else one.weights.to(like.device),
            meta=about | {"ipc": len(one.images) / like.num_classes},
        )
        for one in found
    ]


def read(path: Path | str, name: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> Released:
    """The one set of a folder of image files (bytes) or of a file of ours (normalised), with hard labels.

    Raises:
        CompanionError: as :func:`synsets`; several sets, or tensors whose space is not known.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, name, classes, shape)
    if path.suffix != ".safetensors":
        raise CompanionError(f"{path} is neither a folder of images nor a .safetensors file of ours")
    found = SyntheticSet.load(path)
    _check_classes(path, found.classes, classes)
    return Released(_checked(path, found.images, shape), found.hard_labels)


def all_in(
    path: Path, name: str, classes: tuple[str, ...], shape, labels: Path | str | None = None
) -> list[Released]:
    """Images and labels of all sets of a folder, ``.pt`` or ``.npz``."""
    if path.is_dir():
        return [_folder(path, name, classes, shape)]
    if not path.is_file():
        raise CompanionError(f"no file or folder {path}")
    content = _arrays(path) if path.suffix == ".npz" else load_tensors(path)
    others = None if labels is None else load_tensors(Path(labels))
    pairs = _pairs(path, content, others, len(classes))
    return [Released(_checked(path, x, shape), _labels(path, y, len(x), len(classes))) for x, y in pairs]


# -- files of tensors -----------------------------------------------------------------------------------------------------


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors, numbers and containers of these; numbers may be NumPy's."""
    if not path.is_file():
        raise CompanionError(f"no file {path}")
    numbers = [
        np._core.multiarray.scalar,
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
    ]
    old = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")
    try:
        with torch.serialization.safe_globals([*numbers, old]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CompanionError(
            f"{path} holds pickled code{what}; allowed: tensors, numbers, lists, dictionaries"
        ) from error
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        raise CompanionError(
            f"{path} is damaged or no file of torch.save ({type(error).__name__})"
        ) from error


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, OSError, TypeError, EOFError) as error:
        raise CompanionError(
            f"{path} is damaged or holds other things than arrays ({type(error).__name__})"
        ) from error


def _pairs(path: Path, content: Any, labels: Any, classes: int) -> list[tuple[Any, Any]]:
    """The (images, labels) in what a file holds."""
    if isinstance(content, dict):
        runs = content.get("data")
        if (
            isinstance(runs, (list, tuple))
            and runs
            and all(isinstance(run, (list, tuple)) and len(run) == 2 for run in runs)
        ):
            return [tuple(run) for run in runs]
        x, y = ([name for name in names if name in content] for names in (PIXELS, LABELS))
        if not x or not (y or labels is not None):
            names = ", ".join(map(str, list(content)[:8])) or "none"
            raise CompanionError(
                f"{path} has the keys {names}; needed: data with runs of [images, labels], "
                f"or one of {', '.join(PIXELS)} with one of {', '.join(LABELS)}"
            )
        return [(content[x[0]], content[y[0]] if labels is None else labels)]
    if isinstance(content, (list, tuple)) and len(content) == 2 and isinstance(content[0], Tensor):
        return [(content[0], content[1])]
    if not isinstance(content, Tensor):
        kind = (
            f"{type(content).__name__} of {len(content)}"
            if isinstance(content, (list, tuple))
            else type(content).__name__
        )
        raise CompanionError(
            f"{path} holds a {kind}; allowed: a tensor, [images, labels], or a dictionary of these"
        )
    if labels is None:
        if len(content) % classes:
            raise CompanionError(
                f"{path} holds {len(content)} images without labels, which do not divide among {classes} classes"
            )
        labels = class_major(classes, len(content) // classes, "cpu")
    return [(content, labels)]


def _checked(path: Path, images: Any, shape: tuple[int, int, int]) -> Tensor:
    """Images ``(m, c, h, w)`` of the data's shape, also from ``(m, h, w, c)``; finite."""
    c, h, w = shape
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise CompanionError(f"{path}: images are {what}; allowed: a tensor (m, {c}, {h}, {w})")
    if tuple(images.shape[1:]) == (h, w, c) != (c, h, w):
        images = images.permute(0, 3, 1, 2)
    if tuple(images.shape[1:]) != (c, h, w):
        raise CompanionError(
            f"{path}: images are {tuple(images.shape)}, those of the data (m, {c}, {h}, {w})"
        )
    images = images.detach().contiguous()
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point() or not images.isfinite().all():
        raise CompanionError(
            f"{path}: images must be bytes or finite floating point numbers, not {images.dtype}"
        )
    return images.float()


def _labels(path: Path, labels: Any, count: int, classes: int) -> Tensor:
    """Class indices ``(m,)``, or ``(m, C)`` soft labels."""
    shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    if shape == (count, classes):
        return labels.detach().float()
    if shape not in ((count,), (count, 1)):
        raise CompanionError(
            f"{path}: labels are {shape}; allowed: ({count},) class indices or ({count}, {classes})"
        )
    labels = labels.detach().flatten()
    if (labels != labels.long()).any() or labels.min() < 0 or labels.max() >= classes:
        low, high = labels.min().item(), labels.max().item()
        raise CompanionError(
            f"{path}: labels from {low:g} to {high:g}; allowed: whole numbers from 0 to {classes - 1}"
        )
    return labels.long()


def _in_space_of(images: Tensor, transform, space: str, path: Path) -> Tensor:
    """The images as the networks of these data see them."""
    if images.dtype == torch.uint8:
        return transform.to("cpu").forward(images.float() / 255)
    low, high = images.min().item(), images.max().item()
    if space == "unit":
        if low < 0 or high > 1:
            raise CompanionError(
                f"{path}: values from {low:.3g} to {high:.3g} are not of the space unit; allowed: [0, 1]"
            )
        return transform.to("cpu").forward(images)
    if space == "normalised" and low >= 0 and high <= 1:
        raise CompanionError(
            f"{path}: all values lie in [0, 1]: read it as the space unit, not as normalised"
        )
    return images


# -- folders of images, and files of ours ------------------------------------------------------------------------------------


def _folder(folder: Path, name: str, classes: tuple[str, ...], shape: tuple[int, int, int]) -> Released:
    """All image files below class folders, which are named by class, by synset, or by number (``new000``, ``3_cat``)."""
    base = folder / "train" if (folder / "train").is_dir() else folder
    names = sorted(visible(entry.name for entry in base.iterdir() if entry.is_dir()))
    labels = _folder_labels(base, names, name, classes)
    paths, of, left_out = [], [], Counter()
    for folder_name, label in sorted(labels.items(), key=lambda pair: pair[1]):
        found = files_below(base / folder_name, left_out)
        if not found:
            raise CompanionError(
                f"the class folder {base / folder_name} has no readable image (.png, .jpg, ...)"
            )
        paths += found
        of += [label] * len(found)
    tell_left_out(base, left_out)
    with ThreadPoolExecutor(WORKERS) as pool:
        return Released(
            decode_all(paths, shape[-1], shape[0], pool), torch.tensor(of), _folder_weights(folder, paths)
        )


def _folder_weights(folder: Path, paths: list[Path]) -> Tensor | None:
    """The weights of images that :meth:`SyntheticSet.export` wrote."""
    table = folder / IMAGES
    if not table.is_file():
        return None
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = {row["file"]: row for row in csv.DictReader(file)}
        mine = [rows[path.relative_to(folder).as_posix()].get("weight") for path in paths]
        return None if None in mine else torch.tensor([float(weight) for weight in mine])
    except (KeyError, ValueError, csv.Error) as error:
        raise CompanionError(f"{table} does not fit the images beside it ({error})") from error


def _folder_labels(base: Path, names: list[str], data: str, classes: tuple[str, ...]) -> dict[str, int]:
    """Folder name -> label."""
    if len(names) != len(classes):
        raise CompanionError(
            f"{base} has {len(names)} class folders, the data {len(classes)} classes; allowed: the same number"
        )
    for known in (classes, SUBSETS.get(data, ())):
        if set(names) == set(known):
            return {name: known.index(name) for name in names}
    numbers = [int(match[1]) if (match := NUMBER.fullmatch(name)) else -1 for name in names]
    if sorted(numbers) == list(range(len(classes))):
        return dict(zip(names, numbers, strict=True))
    strange = next((name for name in names if name not in classes), names[0])
    raise CompanionError(
        f"{base}: the folder {strange!r} is no class of {data} ({', '.join(classes[:3])}, ...) and the folders are not "
        f"numbered 0 to {len(classes) - 1}"
    )


def _own(path: Path, like) -> SyntheticSet:
    found = SyntheticSet.load(path)
    _check_classes(path, found.classes, like.classes)
    mine, theirs = like.transform.config()["kind"], found.transform.config()["kind"]
    if mine != theirs:
        raise CompanionError(
            f"{path} is in the space {theirs}, the data in {mine}: load them with the same whitening"
        )
    _checked(path, found.images, like.shape)
    return found.to(like.device)


def _check_classes(path: Path, theirs: tuple[str, ...], mine: tuple[str, ...]) -> None:
    if theirs != mine:
        first = next(
            (f"{a!r} there, {b!r} here" for a, b in zip(theirs, mine, strict=False) if a != b),
            "other numbers",
        )
        raise CompanionError(f"{path} has {len(theirs)} classes, the data {len(mine)}: {first}")
