"""Decoding image files with Pillow: one file, many at once, and what their headers say."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.system.errors import CompanionError

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}
WORKERS = min(16, os.cpu_count() or 1)


def decode(path: Path, size: int | None, channels: int, resize: int | None = None) -> np.ndarray:
    """One image as uint8 (c, h, w); grey for 1 channel, else RGB without transparency.

    With ``size`` the shorter side is scaled to ``resize`` (None: to ``size``; bilinear, antialiased) and a centre square of ``size``
    is cut out, pixel for pixel as torchvision's ``Resize(resize)`` and ``CenterCrop(size)`` do. Orientation tags are ignored, as there.

    Raises:
        CompanionError: for a file that Pillow cannot read to its end.
    """
    return _pixels(
        path, channels, lambda image: image if size is None else _resize_and_crop(image, size, resize or size)
    )


def decode_crop(
    path: Path, size: int, channels: int, box: Callable[[int, int], Sequence[int]], mirrored: bool
) -> np.ndarray:
    """A part of an image, cut from the whole of it and then scaled to ``size`` (bilinear, antialiased), uint8 (c, size, size).

    Args:
        box: height and width of the image -> (top, left, height, width) of the part in pixels.
    """
    from PIL import Image

    def cut(image):
        top, left, height, width = box(image.height, image.width)
        part = image.crop((left, top, left + width, top + height))
        return part.resize((size, size), Image.Resampling.BILINEAR)

    pixels = _pixels(path, channels, cut)
    return pixels[..., ::-1] if mirrored else pixels


def _pixels(path: Path, channels: int, use: Callable) -> np.ndarray:
    """What ``use`` makes of an image of 1 or 3 channels, as uint8 (c, h, w)."""
    mode = "L" if channels == 1 else "RGB"
    pixels = _with_image(path, lambda image: np.asarray(use(image.convert(mode))))
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def decode_all(paths: Sequence[Path], size: int, channels: int, pool: ThreadPoolExecutor) -> Tensor:
    """Many images as one tensor (N, c, size, size) uint8; they must have that size already if they are not scaled."""
    out = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)
    rows = out.numpy()

    def fill(i: int) -> None:
        rows[i] = decode(paths[i], size, channels)

    # Pillow leaves Python's lock while it decodes, so threads are enough.
    for _ in pool.map(fill, range(len(paths))):
        pass
    return out


def shapes(paths: Sequence[Path], pool: ThreadPoolExecutor) -> list[tuple[int, int]]:
    """The different (width, height) of images, smallest first, from their headers."""
    return sorted({shape for shape, _, _ in pool.map(lambda path: _with_image(path, _header), paths)})


def common_form(paths: Sequence[Path], size: int | None, pool: ThreadPoolExecutor) -> tuple[int, int]:
    """(side, channels) of all images from their headers: 1 channel if every image is grey, else 3.

    Of files with several pictures, animations or pages, the first one is read; a warning says how many there are.

    Raises:
        CompanionError: without ``size``, for images of mixed sizes (two are named) or that are not square.
    """
    headers = list(pool.map(lambda path: _with_image(path, _header), paths))
    several = [path for path, header in zip(paths, headers, strict=True) if header[2]]
    if several:
        warnings.warn(
            f"{len(several)} of {len(paths)} files hold several pictures, of which the first one is read: {several[0]}"
            + (", ..." if len(several) > 1 else ""),
            stacklevel=2,
        )
    channels = 1 if all(mode in ("1", "L", "LA") for _, mode, _ in headers) else 3
    if size is not None:
        return size, channels
    (width, height), most = Counter(shape for shape, _, _ in headers).most_common(1)[0]
    if most < len(paths):
        odd = next(i for i, (shape, _, _) in enumerate(headers) if shape != (width, height))
        usual = next(i for i, (shape, _, _) in enumerate(headers) if shape == (width, height))
        raise CompanionError(
            f"images of mixed sizes: {paths[usual]} is {width}x{height}, {paths[odd]} is "
            f"{headers[odd][0][0]}x{headers[odd][0][1]}; pass size= to scale them all"
        )
    if width != height:
        raise CompanionError(
            f"images are not square: {paths[0]} is {width}x{height}; pass size= to scale and crop"
        )
    return width, channels


def _header(image) -> tuple[tuple[int, int], str, bool]:
    """Size, mode, and whether there are several pictures (previews in a camera's file are none)."""
    return image.size, image.mode, image.format != "MPO" and getattr(image, "is_animated", False)


def _with_image(path: Path, use: Callable):
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels of more than 8 bits; convert it to 8 bits first")
            return use(image)
    # Pillow tells of damage by many types of exception
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CompanionError(f"cannot read the image {path}: {reason}") from error


def _resize_and_crop(image, size: int, resize: int):
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    if short != resize:
        width, height = [resize if side == short else int(resize * side / short) for side in (width, height)]
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def files_below(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """The image files in a folder and below it, by suffix, sorted; hidden ones are left out.

    Args:
        left_out: the suffixes of the other files are counted here.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in visible(names):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                found.append(Path(parent, name))
            elif left_out is not None and name not in SYSTEM_FILES:
                left_out[suffix or "without a suffix"] += 1
    return sorted(found)


def tell_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Warn, in one line, that files of a folder are not read, and how many of which kind."""
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
        warnings.warn(
            f"{folder}: {left_out.total()} files are left out: {kinds}; read are {', '.join(sorted(SUFFIXES))}",
            stacklevel=2,
        )


def visible(names: Iterable[str]) -> list[str]:
    """Names without hidden files and the folder that macOS adds to archives."""
    return [name for name in names if not name.startswith((".", "__MACOSX"))]
