"""The one look of all figures: palette, marks, style file, and files that are the same bytes for the same figure.

Colours are seaborn's "colorblind" palette in fixed order; lines also differ by style and marker and bars by hatching,
so that every figure reads in grey.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
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
LONGEST = 40  # characters of a class's name
STYLE = Path(__file__).with_name("companion.mplstyle")


def use_style() -> None:
    """Apply the shared style to every figure drawn afterwards."""
    import matplotlib.style

    matplotlib.style.use(STYLE)


def save_png(fig, path: Path, names: Iterable[str] = ()) -> None:
    """PNG with a palette at 150 dpi; the same figure gives the same bytes (no version, no date).

    Args:
        names: what a user named, such as a data set, and what is to be read as it stands where it occurs.
    """
    make_legible(fig, names)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    with atomic(path) as temporary:
        temporary.write_bytes(palette_png(buffer.getvalue()))


def ink_on(colour) -> str:
    """White or dark text, whichever is readable on ``colour``."""
    from matplotlib.colors import to_rgb

    return INK if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) > 0.55 else "white"


# -- text that users wrote ------------------------------------------------------------------------------------------------


def literal(text: object) -> str:
    """A user's words for matplotlib: dollar signs begin no formula, an underscore in front hides nothing from a legend, control
    characters are spaces."""
    words = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return (" " if words.startswith("_") else "") + words.replace("$", r"\$")


def class_labels(classes: Sequence[object]) -> list[str]:
    """Names of classes as figures show them: :func:`literal`, cut where they are long, and with their number where no font here
    has all of their characters, or nothing is left of them."""
    labels = []
    for c, name in enumerate(classes):
        words = literal(str(name)[:LONGEST] + ("…" if len(str(name)) > LONGEST else ""))
        lost = {char for char in words if font_with(char) is None}
        known = "".join("?" if char in lost else char for char in words)
        labels.append(
            words if words and not lost else f"class {c}" + (f" ({known})" if known.strip("? ") else "")
        )
    return labels


def make_legible(fig, names: Iterable[str] = ()) -> None:
    """Let every text of a figure be drawn: words that are no formula are shown as they stand, characters that its font lacks come
    from another font of this machine, and are question marks where none has them."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    for axis in fig.findobj(Axis):  # the labels of ticks are made when they are asked for
        before = [label.get_text() for label in axis.get_ticklabels()]
        after = [_legible(text, names) for text in before]
        if after != before:
            axis.set_ticklabels(after)
    for text in fig.findobj(Text):
        text.set_text(_legible(text.get_text(), names))
        others = dict.fromkeys(filter(None, map(font_with, text.get_text())))
        if others:
            text.set_fontfamily([*text.get_fontfamily(), *others])


def _legible(text: str, names: Iterable[str]) -> str:
    for name in names:
        if "$" in name:
            text = text.replace(name, literal(name))
    if not _parses(text):
        text = text.replace("$", r"\$")
    return "".join(char if char == "\n" or font_with(char) is not None else "?" for char in text)


def _parses(text: str) -> bool:
    from matplotlib.cbook import is_math_text
    from matplotlib.mathtext import MathTextParser

    if "$" not in text or not is_math_text(text):
        return True
    try:
        return all(MathTextParser("path").parse(line) for line in text.split("\n") if is_math_text(line))
    except ValueError:
        return False


@functools.cache
def font_with(char: str) -> str | None:
    """The family, of this machine's fonts, that has a character: "" for that of the style, None where there is none."""
    from matplotlib import font_manager

    if (
        char in "\n$"
        or char.isascii()
        and char.isprintable()
        or ord(char) in _characters(font_manager.findfont("DejaVu Sans"))
    ):
        return ""
    fonts = sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (font.style != "normal", font.weight != 400, font.name),
    )
    return next(
        (
            font.name
            for font in fonts
            if "Last Resort" not in font.name and ord(char) in _characters(font.fname)
        ),
        None,
    )


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """The code points that a font file has; none for one that cannot be read or drawn at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        font.set_size(10, 100)  # refused by fonts of pictures, such as emoji
        return frozenset(font.get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
