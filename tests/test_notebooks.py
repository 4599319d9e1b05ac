"""The rules that every notebook keeps; their outputs are compared by ``pytest --nbval notebooks``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.system.files import ROOT
from workflow.pages.normalise import BYTES, normalised

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TABLE = ROOT / "workflow" / "notebooks.yaml"
CELLS, LINES = 15, 25
NAME = re.compile(r"\d\d_[a-z0-9_]+")
ABSOLUTE = re.compile(r"(?<![\w.:/<])(?:/(?:home|root|tmp|usr|work|mnt|data|Users|opt|var)/|[A-Z]:\\\\)")
INSTALL = re.compile(r"^\s*[!%]\s*(?:pip|conda|mamba|apt)\b", re.MULTILINE)


def complaints(name: str, text: str) -> list[str]:
    """What is wrong with a notebook, one line each; nothing if all is well."""
    node = nbformat.reads(text, as_version=4)
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    sources = "\n".join(cell.source for cell in node.cells)
    rules = {
        "the name is NN_lower_case": NAME.fullmatch(name),
        "a heading comes first": node.cells and node.cells[0].source.startswith("# "),
        f"at most {CELLS} code cells": len(code) <= CELLS,
        f"no code cell over {LINES} lines": all(len(cell.source.splitlines()) <= LINES for cell in code),
        "no absolute path": not ABSOLUTE.search(sources + "".join(_texts(outputs))),
        "no installation": not INSTALL.search(sources),
        "cell ids are unique": len({cell.id for cell in node.cells}) == len(node.cells),
        f"under {BYTES} bytes": len(text.encode()) <= BYTES,
        "kernel python3": node.metadata.get("kernelspec", {}).get("name") == "python3",
        "outputs are stored": any(cell.outputs for cell in code)
        and all(cell.execution_count for cell in code),
        "no output is an error": all(output.output_type != "error" for output in outputs),
        "nothing on stderr": all(output.get("name") != "stderr" for output in outputs),
        "in normal form (python -m workflow.pages.normalise)": normalised(text) == text,
    }
    return [rule for rule, kept in rules.items() if not kept] + _parameter_complaints(code)


def _texts(outputs) -> list[str]:
    return [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]


def _parameter_complaints(code) -> list[str]:
    """One cell tagged ``parameters`` with the four common names, annotated literals only."""
    cells = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        return [f"exactly one parameters cell, not {len(cells)}"]
    found, wrong = [], []
    for statement in ast.parse(cells[0].source).body:
        if not isinstance(statement, ast.AnnAssign) or statement.value is None:
            wrong.append(f"parameters are annotated assignments, not: {ast.unparse(statement)}")
            continue
        found.append(ast.unparse(statement.target))
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            wrong.append(f"parameters are literals, not: {ast.unparse(statement)}")
    missing = {"profile", "seed"} - set(found)
    return wrong + [f"parameter {name} is missing" for name in sorted(missing)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path: Path):
    assert complaints(path.stem, path.read_text(encoding="utf-8")) == []


def test_the_table_and_the_folder_name_the_same_notebooks():
    rows = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["notebooks"]
    assert sorted(rows) == [path.stem for path in NOTEBOOKS]


def _good() -> nbformat.NotebookNode:
    parameters = new_code_cell(
        'profile: str = "cpu"\nseed: int = 0', metadata={"tags": ["parameters"]}, execution_count=1
    )
    code = new_code_cell("1", outputs=[new_output("stream", name="stdout", text="1\n")], execution_count=2)
    node = new_notebook(cells=[new_markdown_cell("# Title"), parameters, code])
    return nbformat.reads(normalised(nbformat.writes(node)), as_version=4)


def _told(change) -> list[str]:
    node = _good()
    change(node)
    return complaints("20_dm", nbformat.writes(node).rstrip("\n") + "\n")


def test_a_good_notebook_passes():
    assert _told(lambda node: None) == []
    assert "the name is NN_lower_case" in complaints("dm", nbformat.writes(_good()) + "\n")


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("heading", lambda node: node.cells.pop(0)),
        ("not 0", lambda node: node.cells[1].metadata.clear()),
        ("not 2", lambda node: node.cells[2].metadata.update(tags=["parameters"])),
        (
            "are literals",
            lambda node: node.cells[1].update(source="profile: str = 'cpu'\nseed: int = 1 + abs(2)"),
        ),
        ("are annotated", lambda node: node.cells[1].update(source="profile: str = 'cpu'\nseed = 0")),
        ("parameter seed is missing", lambda node: node.cells[1].update(source="profile: str = 'cpu'")),
        ("over 25 lines", lambda node: node.cells[2].update(source="x = 1\n" * 26 + "x")),
        ("at most 15", lambda node: node.cells.extend(new_code_cell("1") for _ in range(14))),
        ("absolute path", lambda node: node.cells[2].update(source="open('/home/me/x')")),
        ("absolute path", lambda node: node.cells[2].outputs[0].update(text="wrote /tmp/x\n")),
        ("installation", lambda node: node.cells[2].update(source="!pip install x")),
        ("stderr", lambda node: node.cells[2].outputs[0].update(name="stderr")),
        ("is an error", lambda node: node.cells[2].outputs.append(new_output("error", traceback=["x"]))),
        ("outputs are stored", lambda node: node.cells[2].update(outputs=[])),
        ("kernel", lambda node: node.metadata.kernelspec.update(name="conda-env")),
        ("normal form", lambda node: node.metadata.update(papermill={})),
        ("under 300000", lambda node: node.cells[2].outputs[0].update(text="x" * 300_000)),
    ],
)
def test_a_broken_rule_is_told(rule, change):
    assert any(rule in line for line in _told(change)), _told(change)


def test_a_url_or_fraction_is_no_absolute_path():
    for text in ("https://example.org/home/x", "a/data/b", "1/2", "[x](../results/tmp/x)"):
        assert not ABSOLUTE.search(text)
