"""Notebooks as light HTML pages: prose, formulae, outputs; the plain algorithm open and highlighted, other code folded away,
pictures as files beside the page.

A notebook's JSON is read as it is and written by a few functions, one per kind of cell and output. nbconvert would do the same
through templates and three HTML parsers, in a minute instead of seconds for all pages.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import mistune  # comes with nbconvert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from workflow.pages.mathml import mathml

STYLE = Path(__file__).with_name("gallery.css")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# code is matched first, so that a dollar in it stays one
MATH = re.compile(
    r"(?P<code>^```.*?^```|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?<!\\)\$\$(?P<block>.+?)(?<!\\)\$\$"
    r"|(?P<environment>\\begin\{(?P<name>[a-z]+\*?)\}.*?\\end\{(?P=name)\})"
    r"|(?<![$\\])\$(?P<inline>[^$]+?)(?<!\\)\$",
    re.DOTALL | re.MULTILINE,
)
HELD = "\ue000{}\ue001"  # the place of a formula while the text is read: private letters that no text has
HELD_PLACE = re.compile("\ue000(\\d+)\ue001")
SCROLLED = r'<div class="scroll" role="region" aria-label="table" tabindex="0">\1</div>'


def shell(title: str, body: str, *, root: str = "", description: str = "") -> str:
    """A complete page; ``root`` is the relative way to the folder of ``style.css``."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="{html.escape(description)}">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{root}style.css">
</head>
<body>
{body}
</body>
</html>
"""


def style_sheet() -> str:
    """The style sheet with the colours of code for light and dark pages."""
    light = HtmlFormatter(style="friendly", nobackground=True).get_style_defs(".highlight")
    dark = HtmlFormatter(style="one-dark", nobackground=True).get_style_defs(".highlight")
    sheet = STYLE.read_text(encoding="utf-8")
    return f"{sheet}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def notebook_body(notebook: Path, page: Path, title: str) -> str:
    """The body of ``notebook`` (format 4) for the file ``page``, its pictures written to the folder ``<page stem>_files``."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    pictures = Pictures(page.parent / f"{page.stem}_files", title)
    return "\n".join(part for cell in cells for part in _cell(cell, pictures))


class Pictures:
    """The pictures of a page, as files by number."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title, self.count = folder, title, 0

    def add(self, encoded: str, caption: str | None) -> str:
        """The ``<img>`` of one more picture."""
        self.count += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"figure_{self.count:02d}.png"
        (self.folder / name).write_bytes(base64.b64decode(encoded))
        caption = html.escape(caption or f"Figure {self.count} of {self.title}")
        return f'<img loading="lazy" src="{self.folder.name}/{name}" alt="{caption}">'


def _cell(cell: dict, pictures: Pictures) -> Iterator[str]:
    if "injected-parameters" in cell["metadata"].get("tags", []):
        return
    if cell["cell_type"] == "markdown":
        yield f'<div class="text">{markdown(_joined(cell["source"]))}</div>'
    elif cell["cell_type"] == "code":
        source = coloured(_joined(cell["source"]), "python")
        yield f'<details class="code"><summary>Code</summary>{source}</details>'
        for output in cell["outputs"]:
            yield f'<div class="output">{output_html(output, pictures)}</div>'


def output_html(output: dict, pictures: Pictures) -> str:
    """What a reader sees of an output: the picture, else markup, else text."""
    if output["output_type"] == "stream":
        return _text(_joined(output["text"]), output["name"])
    if output["output_type"] == "error":
        return _text("\n".join(output["traceback"]), "stderr")
    data = {kind: _joined(content) for kind, content in output["data"].items() if kind in KINDS}
    if "image/png" in data:
        caption = output["metadata"].get("image/png", {}).get("alt")
        return pictures.add(data["image/png"], caption)
    if "text/markdown" in data:
        return f'<div class="open">{markdown(data["text/markdown"])}</div>'
    if "<script" not in data.get("text/html", "<script"):
        markup = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        # wide tables scroll inside their own box
        return re.sub(r"(<table.*?</table>)", SCROLLED, markup, flags=re.DOTALL)
    return _text(data.get("text/plain", ""), "text")


KINDS = ("image/png", "text/markdown", "text/html", "text/plain")


def _text(text: str, kind: str) -> str:
    return f'<pre class="{kind}">{html.escape(ANSI.sub("", text).rstrip())}</pre>'


def _joined(text: str | list[str]) -> str:
    """Notebook files keep text as one string or as lines."""
    return text if isinstance(text, str) else "".join(text)


def coloured(code: str, language: str) -> str:
    """Code as HTML with classes for its colours; an unknown language stays plain."""
    try:
        lexer = _lexer(language)
    except ClassNotFound:
        return f'<div class="highlight"><pre>{html.escape(code)}</pre></div>'
    return highlight(code, lexer, HtmlFormatter()).rstrip()


@functools.cache
def _lexer(language: str):
    return get_lexer_by_name(language)


def markdown(text: str) -> str:
    """Prose as HTML, formulae as MathML."""
    formulae: list[str] = []

    def hold(match: re.Match) -> str:
        if match["code"]:
            return match["code"]
        display = match["inline"] is None
        formulae.append(mathml(match["inline"] or match["block"] or match["environment"], display=display))
        place = HELD.format(len(formulae) - 1)
        return f"\n\n{place}\n\n" if display and _alone(match) else place

    made = _markdown()(MATH.sub(hold, text))
    made = re.sub(r"(<table.*?</table>)", SCROLLED, made, flags=re.DOTALL)
    return HELD_PLACE.sub(lambda match: formulae[int(match[1])], made)


def _alone(match: re.Match) -> bool:
    """Whether a formula begins and ends its lines: then it is a paragraph of its own."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    return before.rpartition("\n")[2].strip() == "" == after.partition("\n")[0].strip()


class _Renderer(mistune.HTMLRenderer):
    def block_code(self, code: str, info: str | None = None) -> str:
        return coloured(code, (info or "text").split()[0]) + "\n"


@functools.cache
def _markdown() -> mistune.Markdown:
    return mistune.create_markdown(
        renderer=_Renderer(escape=False), plugins=["table", "strikethrough", "url"]
    )
