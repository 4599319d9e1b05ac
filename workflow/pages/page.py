"""Notebooks as light HTML pages: nbconvert's plain body in a shell of our own, code folded away, pictures as
files.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from lib.system.files import atomic, write_text
from workflow.pages.mathml import mathml

STYLE = Path(__file__).with_name("gallery.css")

# Of nbconvert's basic template only the prompts go and the code cells fold.
TEMPLATE = """{% extends 'basic/index.html.j2' %}
{% block in_prompt %}{% endblock %}
{% block empty_in_prompt %}{% endblock %}
{% block output_area_prompt %}{% endblock %}
{% block input %}<details class="code"><summary>Code</summary>{{ super() }}</details>{% endblock %}
"""


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


def write_style(path: Path) -> None:
    """The style sheet with the colours of code for light and dark pages."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="friendly", nobackground=True).get_style_defs(".highlight")
    dark = HtmlFormatter(style="one-dark", nobackground=True).get_style_defs(".highlight")
    sheet = STYLE.read_text(encoding="utf-8")
    write_text(path, f"{sheet}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n")


def notebook_body(notebook: Path, page: Path, title: str) -> str:
    """The body of ``notebook`` for the file ``page``, its pictures written to the folder ``<page
    stem>_files``.
    """
    import nbformat
    from jinja2 import DictLoader

    node = nbformat.read(notebook, as_version=4)
    node.cells = [cell for cell in node.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for number, output in enumerate(_pictures(node), 1):
        caption = output.metadata.get("image/png", {}).get("alt") or f"Figure {number} of {title}"
        output.metadata["image/png"] = {"alt": caption}
    folder = f"{page.stem}_files"
    exporter = _exporter()(
        template_name="basic",
        template_file="page.html.j2",
        extra_loaders=[DictLoader({"page.html.j2": TEMPLATE})],
        exclude_anchor_links=True,
    )
    exporter.register_preprocessor("nbconvert.preprocessors.ExtractOutputPreprocessor", enabled=True)
    resources = {"output_files_dir": folder, "unique_key": "output"}
    body, resources = exporter.from_notebook_node(node, resources=resources)
    _write_pictures(page.parent, folder, resources.get("outputs", {}))
    # wide tables scroll inside their own box; a picture loads when it comes into view
    body = re.sub(
        r"(<table.*?</table>)",
        r'<div class="scroll" role="region" aria-label="table" tabindex="0">\1</div>',
        body,
        flags=re.DOTALL,
    )
    return re.sub(r"<img (?![^>]*loading=)", '<img loading="lazy" ', body)


def _pictures(node) -> list:
    outputs = [output for cell in node.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def _write_pictures(parent: Path, folder: str, pictures: dict[str, bytes]) -> None:
    """Write the page's pictures and remove those of an earlier version."""
    for name, content in pictures.items():
        with atomic(parent / name) as temporary:
            temporary.write_bytes(content)
    kept = {Path(name).name for name in pictures}
    for path in (parent / folder).glob("*"):
        if path.name not in kept:
            path.unlink()


def _exporter():
    """nbconvert's HTML exporter with formulae as MathML (made here: importing nbconvert takes a second)."""
    from nbconvert.exporters import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return mathml(body, display=True)

        def inline_math(self, body: str) -> str:
            return mathml(body, display=False)

        def latex_environment(self, name: str, body: str) -> str:
            return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)

    class Exporter(HTMLExporter):
        def default_filters(self):
            yield from super().default_filters()
            yield (
                "markdown2html",
                lambda text: MarkdownWithMath(
                    renderer=Renderer(escape=False, exclude_anchor_links=True)
                ).render(text),
            )

    return Exporter
