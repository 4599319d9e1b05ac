"""The rules that every notebook keeps; their outputs are compared by ``pytest --nbval notebooks``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib.methods import METHODS
from lib.plain import text as text_of
from lib.system.files import ROOT
from lib.system.naming import CASE_PARAMETERS
from workflow.pages.normalise import BYTES, normalised

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TABLE = ROOT / "workflow" / "notebooks.yaml"
CELLS, LINES = 15, 25
LEAST = {"80_selection": 4}  # lines of code of an algorithm, where not 8: some rules are short
WORDS = {
    r"repr\(case": "results are kept by case, not by its text",
    r"at this scale": "a claim is confirmed or not, with its numbers",
    r"\bPRESETS\b|means, spreads|run\.verdicts\(\)": "written in the old way",
}
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
    wrong = [rule for rule, kept in rules.items() if not kept] + _parameter_complaints(code)
    return wrong + _writing(node) + _algorithm_complaints(name, code)


def _writing(node) -> list[str]:
    """How a notebook of this companion says things."""
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    words = [*(cell.source for cell in node.cells), *_texts(_outputs(code))]
    found = {why: re.search(pattern, "\n".join(words)) for pattern, why in WORDS.items()}
    wrong = [f"{why}: {match[0]}" for why, match in found.items() if match]
    nodes = [node for cell in code for node in ast.walk(ast.parse(_python(cell.source)))]
    return wrong + [told for one in nodes if isinstance(one, ast.Call) and (told := _unread_figure(one))]


def _outputs(code) -> list:
    return [output for cell in code for output in cell.outputs]


def _unread_figure(call: ast.Call) -> str:
    """A figure is followed by one sentence that says what to see in it."""
    where = ast.unparse(call.func)
    if not where.endswith(".save_figure") and not re.fullmatch(r"case\w*\.show", where):
        return ""
    see = [keyword.value for keyword in call.keywords if keyword.arg == "see"]
    if see and not (isinstance(see[0], ast.Constant) and not str(see[0].value).strip().endswith(".")):
        return ""
    return f"a figure without a sentence that says what to see (see=...): {ast.unparse(call)[:60]}"


def _python(source: str) -> str:
    """Code without IPython's own lines."""
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


def _algorithm_complaints(name: str, code) -> list[str]:
    """The notebook of a method shows its plain version as it is now; that of the selection rules at least one."""
    outputs = _outputs([cell for cell in code if "algorithm(" in cell.source])
    shown = [
        output.data["text/plain"].rstrip() for output in outputs if "text/markdown" in output.get("data", {})
    ]
    methods = [method for method, entry in METHODS.items() if entry.notebook == name]
    missing = [method for method in methods if not _has_plain(method) or text_of(method) not in shown]
    if name == "80_selection" and len(missing) < len(methods):
        missing = []
    wrong = [f"the algorithm of {method} is not shown as lib/plain/{method}.py has it" for method in missing]
    empty = [text.split("\n")[0] for text in shown if delegates(text, LEAST.get(name, 8))]
    return wrong + [f"what is shown of an algorithm only delegates: {line}" for line in empty]


def _has_plain(method: str) -> bool:
    return (ROOT / "lib" / "plain" / f"{method}.py").is_file()


def delegates(text: str, least: int = 8) -> bool:
    """Whether the source of a function, or of several that belong together, says nothing itself: under ``least`` lines of code, or
    bodies of one call."""
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    try:
        functions = ast.parse(text).body
    except SyntaxError:
        return True
    return len(lines) < least or all(_only_calls(function) for function in functions)


def _only_calls(function: ast.AST) -> bool:
    body = [
        one
        for one in getattr(function, "body", [])
        if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
    ]
    return not body or len(body) == 1 and isinstance(getattr(body[0], "value", None), ast.Call)


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
    wrong += [f"parameter {name} is missing" for name in sorted(missing)]
    return wrong + _unheard(code, {"profile", *CASE_PARAMETERS} & set(found))


def _unheard(code, names: set[str]) -> list[str]:
    """What decides the folder of the results reaches ``start``: else a run with a changed value would write over the plain one."""
    nodes = [node for cell in code for node in ast.walk(ast.parse(_python(cell.source)))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "start"]
    given = [{keyword.arg for keyword in call.keywords} for call in calls]
    return [
        f"parameter {name} does not reach start"
        for name in sorted(names)
        for heard in given
        if name not in heard
    ]


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
    shown = {"text/markdown": f"```python\n{text_of('dm')}\n```", "text/plain": text_of("dm")}
    code = new_code_cell(
        'run.algorithm("dm")',
        outputs=[new_output("stream", name="stdout", text="1\n"), new_output("display_data", shown)],
    )
    code.execution_count = 2
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
        (
            "seed does not reach start",
            lambda node: node.cells[2].update(source="start('20_dm', profile=profile)"),
        ),
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
        ("kept by case", lambda node: node.cells[2].update(source="results[repr(case)]")),
        ("confirmed or not", lambda node: node.cells[0].update(source="# Not at this scale")),
        ("old way", lambda node: node.cells[2].update(source="dm.PRESETS")),
        ("what to see", lambda node: node.cells[2].update(source='run.save_figure(fig, "a", "b.")')),
        ("what to see", lambda node: node.cells[2].update(source='run.save_figure(fig, "a", "b", see="")')),
        ("what to see", lambda node: node.cells[2].update(source="case.show(result)")),
        ("of dm is not shown", lambda node: node.cells[2].outputs.pop()),
        ("of dm is not shown", lambda node: node.cells[2].update(source="print(1)")),
        (
            "of dm is not shown",
            lambda node: node.cells[2].outputs[1].data.update({"text/plain": text_of("dm")[:-9]}),
        ),
        (
            "only delegates",
            lambda node: node.cells[2].outputs[1].data.update({"text/plain": "def dm(p):\n    return f(p)"}),
        ),
    ],
)
def test_a_broken_rule_is_told(rule, change):
    assert any(rule in line for line in _told(change)), _told(change)


def test_a_url_or_fraction_is_no_absolute_path():
    for text in ("https://example.org/home/x", "a/data/b", "1/2", "[x](../results/tmp/x)"):
        assert not ABSOLUTE.search(text)


@pytest.mark.parametrize("method", METHODS)
def test_no_plain_version_only_delegates(method):
    if _has_plain(method):
        assert not delegates(text_of(method), LEAST.get(METHODS[method].notebook, 8))


def test_a_long_call_is_a_delegation_too():
    call = ",\n        ".join(f"a_{i}" for i in range(12))
    assert delegates(f"def dm(p):\n    return f(\n        {call}\n    )")
