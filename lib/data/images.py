"""Decoding image files with Pillow: one file, many at once, and what their headers say."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.system.errors import CompanionError

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
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


def common_form(paths: Sequence[Path], size: int | None, pool: ThreadPoolExecutor) -> tuple[int, int]:
    """(side, channels) of all images from their headers: 1 channel if every image is grey, else 3.

    Raises:
        CompanionError: without ``size``, for images of mixed sizes (two are named) or that are not square.
    """
    headers = list(pool.map(lambda path: _with_image(path, lambda image: (image.size, image.mode)), paths))
    channels = 1 if all(mode in ("1", "L", "LA") for _, mode in headers) else 3
    if size is not None:
        return size, channels
    (width, height), most = Counter(shape for shape, _ in headers).most_common(1)[0]
    if most < len(paths):
        odd = next(i for i, (shape, _) in enumerate(headers) if shape != (width, height))
        usual = next(i for i, (shape, _) in enumerate(headers) if shape == (width, height))
        raise CompanionError(
            f"images of mixed sizes: {paths[usual]} is {width}x{height}, {paths[odd]} is "
            f"{headers[odd][0][0]}x{headers[odd][0][1]}; pass size= to scale them all"
        )
    if width != height:
        raise CompanionError(
            f"images are not square: {paths[0]} is {width}x{height}; pass size= to scale and crop"
        )
    return width, channels


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


def files_below(folder: Path) -> list[Path]:
    """The image files in a folder and below it, by suffix, sorted; hidden ones are left out."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in visible(names) if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def visible(names: Iterable[str]) -> list[str]:
    """Names without hidden files and the folder that macOS adds to archives."""
    return [name for name in names if not name.startswith((".", "__MACOSX"))]
