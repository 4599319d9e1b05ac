"""How a set of images shows itself: one picture with a row per class, and the card that JupyterLab displays."""

from __future__ import annotations

import base64
import io
import math
from html import escape

import torch
from PIL import Image
from torch import Tensor

from lib.system.errors import CompanionError, integer

CLASSES, SIDE, GAP = 10, 48, 2  # classes in a card, pixels an image gets at least, pixels between two


def rows_of(labels: Tensor, classes: int, per_class: int = 8, most: int = CLASSES) -> Tensor:
    """Positions to show: of the first ``most`` classes the first ``per_class`` images; one row of all classes where each has one.

    Returns:
        ``(rows, columns)`` positions, -1 where a class has fewer images.
    """
    count = integer(per_class)
    if count is None or count < 1:
        raise CompanionError(
            f"images per class to show must be a whole number of at least 1, not {per_class!r}"
        )
    found = [(labels == c).nonzero().flatten()[:count] for c in range(min(classes, most))]
    columns = max((len(row) for row in found), default=0)
    table = torch.full((len(found), columns), -1, dtype=torch.long)
    for row, positions in zip(table, found, strict=True):
        row[: len(positions)] = positions
    return table.T if columns == 1 else table


def sheet(images01: Tensor, table: Tensor) -> Image.Image:
    """One picture of images ``(N, c, h, w)`` in [0, 1], laid out as ``table`` says, enlarged by a whole factor.

    Images of other than three channels show their first one.
    """
    images = images01.detach().cpu()
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    height, width = images.shape[2:]
    scale = max(1, math.ceil(SIDE / max(height, width)))
    high, wide = height * scale + GAP, width * scale + GAP
    page = Image.new("RGB", (table.shape[1] * wide + GAP, table.shape[0] * high + GAP), "white")
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for r, row in enumerate(table.tolist()):
        for c, position in enumerate(row):
            if position >= 0:
                image = Image.fromarray(pixels[position]).resize(
                    (width * scale, height * scale), Image.Resampling.NEAREST
                )
                page.paste(image, (c * wide + GAP, r * high + GAP))
    return page


def card(title: str, picture: Image.Image) -> str:
    """Title and picture as HTML."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure style="margin: 0"><figcaption>{escape(title)}</figcaption>'
        f'<img alt="{escape(title)}" src="data:image/png;base64,{source}" style="max-width: 100%; image-rendering: pixelated"></figure>'
    )
