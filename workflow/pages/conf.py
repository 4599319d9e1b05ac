"""How Sphinx makes the pages; ``workflow/pages/gallery.py`` writes what it reads. Nothing is executed, nothing is fetched."""

from docutils import nodes

project = "Dataset distillation, side by side"
copyright = "the authors of the companion; images as in the data cards"
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = project
html_show_copyright = html_show_sphinx = html_copy_source = html_use_index = False
html_static_path = ["static"]
html_css_files, html_js_files = ["pages.css"], ["pages.js"]
smartquotes = False
html_show_search_summary = False  # read by fetch, which browsers refuse to files
pygments_style, pygments_dark_style = "friendly", "one-dark"

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show, nb_code_prompt_hide = "Show the {type}", "Hide the {type}"
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # notebooks may skip a level

mathjax_path = "tex-svg.js"  # one file, its fonts inside
mathjax3_config = {"svg": {"fontCache": "local"}}
copybutton_selector = "div.cell_input pre, div.highlight-python pre"
copybutton_exclude = ".linenos, .gp, .go"


def describe_pictures(app, tree):
    """A figure's sentence, which follows it, is what a reader hears who cannot see it."""
    following = list(tree.findall(lambda node: isinstance(node, (nodes.image, nodes.paragraph))))
    for node, after in zip(following, [*following[1:], None], strict=True):
        if isinstance(node, nodes.image) and not node.get("alt"):
            node["alt"] = after.astext() if isinstance(after, nodes.paragraph) else "figure"


def setup(app):
    app.connect("doctree-read", describe_pictures)
