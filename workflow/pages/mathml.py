"""Formulae of a notebook as MathML, which browsers draw themselves: no script, no web font, right in dark
pages, too.
"""

from __future__ import annotations

import html
import re
import unicodedata
from xml.etree import ElementTree

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
# Operators whose index stands underneath in a displayed formula.
LIMITS = {"min", "max", "lim", "sup", "inf", "argmin", "argmax", "arg min", "arg max", "∑", "∏"}
# Sized bars and braces, such as \big\|, come back from the converter unread.
BARS = {
    "\\{": "{",
    "\\}": "}",
    "\\|": "‖",
    "\\Vert": "‖",
    "\\lVert": "‖",
    "\\rVert": "‖",
    "\\vert": "|",
    "\\lvert": "|",
    "\\rvert": "|",
}
# What the converter reads wrongly, and what says the same.
REWRITTEN = {
    r"\operatorname*": r"\operatorname",
    r"\arg\min": r"\operatorname{arg\,min}",
    r"\arg\max": r"\operatorname{arg\,max}",
}
STYLES = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK", "bold": "BOLD", "fraktur": "FRAKTUR"}
STYLES |= {"bold-italic": "BOLD ITALIC", "monospace": "MONOSPACE", "sans-serif": "SANS-SERIF"}


def mathml(tex: str, *, display: bool) -> str:
    """``tex`` as a ``<math>`` element; a formula that cannot be read stays visible as its source."""
    from latex2mathml.converter import convert

    ElementTree.register_namespace("", NAMESPACE)
    source = f'<code class="tex">{html.escape(tex.strip())}</code>'
    try:
        known = tex.strip().replace("\n", " ")
        for unread, read in REWRITTEN.items():
            known = known.replace(unread, read)
        root = ElementTree.fromstring(convert(known, display="block" if display else "inline"))
    except Exception:  # the converter's errors have no common class
        return source
    for element in root.iter():
        element.text = BARS.get(element.text, element.text)
        if (element.text or "").startswith("\\"):  # a command that it passed on unread
            return source
        _letters(element)
        if display:
            _limits(element)
    root.set("aria-label", tex.strip())
    return ElementTree.tostring(root, encoding="unicode")


def _letters(element) -> None:
    """Browsers' MathML knows no ``mathvariant="script"``; Unicode has the letters themselves."""
    style = STYLES.get(element.get("mathvariant", ""))
    if style is None or not element.text or not re.fullmatch(r"[A-Za-z0-9]+", element.text):
        return
    element.text = "".join(_styled(letter, style) for letter in element.text)
    del element.attrib["mathvariant"]


def _styled(letter: str, style: str) -> str:
    kind = "DIGIT" if letter.isdigit() else "CAPITAL" if letter.isupper() else "SMALL"
    name = unicodedata.name(letter).split()[-1]
    # A few letters were in Unicode before the mathematical block and have no second code point there.
    for prefix in ("MATHEMATICAL ", "", "BLACK-LETTER " if style == "FRAKTUR" else ""):
        try:
            return unicodedata.lookup(f"{prefix}{style} {kind} {name}")
        except KeyError:
            continue
    return letter


def _limits(element) -> None:
    tag = element.tag.removeprefix(f"{{{NAMESPACE}}}")
    if tag in ("msub", "msup", "msubsup") and "".join(element[0].itertext()).strip() in LIMITS:
        element.tag = f"{{{NAMESPACE}}}" + {"msub": "munder", "msup": "mover", "msubsup": "munderover"}[tag]
