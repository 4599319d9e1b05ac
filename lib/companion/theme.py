"""The one look of all figures: palette, marks, style file, and files that are the same bytes for the same figure.

Colours are seaborn's "colorblind" palette in fixed order; lines also differ by style and marker and bars by hatching,
so that every figure reads in grey.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from lib.system.files import atomic
from lib.system.pictures import palette_png

PALETTE = (
    "#0173b2",
    "#d55e00",
    "#029e73",
    "#cc78bc",
    "#de8f05",
    "#56b4e9",
    "#ca9161",
    "#949494",
    "#fbafe4",
    "#ece133",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
INK, FAINT = "#333333", "#9aa0a6"
HUE, TINT, GREY = (
    PALETTE[0],
    "#a8cde6",
    "#b3b6ba",
)  # of bars: the one looked at, the others, what they are compared with
STYLE = Path(__file__).with_name("companion.mplstyle")


def use_style() -> None:
    """Apply the shared style to every figure drawn afterwards."""
    import matplotlib.style

    matplotlib.style.use(STYLE)


def save_png(fig, path: Path) -> None:
    """PNG with a palette at 150 dpi; the same figure gives the same bytes (no version, no date)."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    with atomic(path) as temporary:
        temporary.write_bytes(palette_png(buffer.getvalue()))


def ink_on(colour) -> str:
    """White or dark text, whichever is readable on ``colour``."""
    from matplotlib.colors import to_rgb

    return INK if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) > 0.55 else "white"
