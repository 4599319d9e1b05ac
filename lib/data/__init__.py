"""T: the real data.

``load("digits")`` gives a :class:`Data` with ``train`` and ``test``, each an :class:`ImageSet`: one tensor of
preprocessed images and one of labels on the device, with class-indexed sampling. ``stream("imagenet", ...)`` gives the
same images batch by batch where they do not fit in memory. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lib.data import embedded, folders, streaming, vision
from lib.data.imageset import Data, ImageSet
from lib.data.source import prepare
from lib.data.streaming import Stream
from lib.data.whitening import WHITENINGS, ZCA, PerImageZCA, Standardise, Transform, from_saved
from lib.system.device import resolve_device
from lib.system.errors import CompanionError, unknown
from lib.system.files import data_dir

__all__ = [
    "Data",
    "ImageSet",
    "PerImageZCA",
    "Standardise",
    "Stream",
    "Transform",
    "ZCA",
    "check",
    "from_saved",
    "load",
    "names",
    "stream",
]


def names() -> tuple[str, ...]:
    """What :func:`load` takes as a name."""
    return (*embedded.NAMES, *vision.VISION, *folders.NAMES, f"{folders.PREFIX}/path")


def check(name: str) -> None:
    """Refuse a name that :func:`load` would not know, without touching any data.

    Raises:
        CompanionError: naming the allowed ones.
    """
    if isinstance(name, str) and name.startswith(folders.PREFIX) and name != folders.PREFIX:
        return
    if name not in names():
        raise unknown("dataset", name, names())


def load(
    name: str,
    root: Path | str | None = None,
    device: str | torch.device = "cpu",
    size: int | None = None,
    whiten: str | None = None,
    download: bool | None = None,
) -> Data:
    """A data set as tensors on one device.

    Args:
        name: ``digits``, ``fashion14``, ``photos16``, ``photos32`` (installed with the environment); ``mnist``, ``fashionmnist``,
            ``svhn``, ``cifar10``, ``cifar100``; ``tinyimagenet``, ``imagenet``, a named subset such as ``imagenette``;
            ``folder:/path`` for a folder of class folders (layouts: :mod:`lib.data.folders`).
        root: where data sets lie; default ``$COMPANION_DATA``, else ``data`` in the project.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        size: side in pixels to scale to; default: as stored (Tiny-ImageNet 64, named subsets 128, ImageNet 224).
        whiten: ``zca``, ``zca-kip`` or ``zca-rfad`` instead of the channel normalisation, fitted on the training images and applied
            to both halves (:mod:`lib.data.whitening`).
        download: fetch missing files of the torchvision sets, checksum verified; default: only if
            ``$COMPANION_DOWNLOAD`` is 1.

    Raises:
        CompanionError: one line for an unknown name or option, and for missing, empty or damaged data.
    """
    check(name)
    device = resolve_device(device)
    _check_size(size)
    if whiten is not None and whiten not in WHITENINGS:
        raise unknown("whitening", whiten, WHITENINGS)
    if download is None:
        download = os.environ.get("COMPANION_DOWNLOAD") == "1"
    if name in embedded.NAMES:
        source = embedded.read(name)
    elif name in vision.VISION:
        source = vision.read(name, _root(root), download)
    else:
        source = folders.read(name, _root(root), size)
    return prepare(source, device, size, whiten)


def stream(
    name: str,
    root: Path | str | None = None,
    split: str = "train",
    size: int | None = None,
    device: str | torch.device = "cpu",
    transform: Transform | None = None,
    channels: int = 3,
    resize: int | None = None,
) -> Stream:
    """One half (``train`` or ``test``) of a folder data set, decoded batch by batch.

    Args:
        name, root, size, device: as for :func:`load`; folder data sets only, and a ``folder:`` needs ``size``.
        transform: preprocessing; default ImageNet's channel normalisation. Fitting one here would need a pass over all
            files: to match a set in memory, pass its ``transform``.
        channels: 3, or 1 to read grey images.
        resize: length to which the shorter side is scaled before the centre square of ``size`` is cut out, such as 256 for 224;
            default: ``size``.

    Raises:
        CompanionError: as :func:`load`; a damaged image is named when its batch is drawn.
    """
    check(name)
    if name in (*embedded.NAMES, *vision.VISION):
        raise CompanionError(
            f"{name} fits in memory: use load; in batches: {', '.join(folders.NAMES)}, folder:/path"
        )
    _check_size(size)
    device = resolve_device(device)
    return streaming.open_stream(name, _root(root), split, size, device, transform, channels, resize)


def _root(root: Path | str | None) -> Path:
    return data_dir() if root is None else Path(root).expanduser()


def _check_size(size: int | None) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise CompanionError(f"size must be a whole number of pixels of at least 1, not {size!r}")
