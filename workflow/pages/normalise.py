"""``python -m workflow.pages.normalise``: notebooks with their outputs in the one form in which git keeps
them.

A rerun that changes no result must change no byte: timestamps, papermill's records, widget state, versions
    and random cell ids go; pictures lose their metadata and are stored with a palette so that a notebook
    stays small.
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import re
import sys
from pathlib import Path

import nbformat

from lib.system.errors import CompanionError
from lib.system.files import ROOT, write_text
from lib.system.pictures import palette_png

BYTES = 300_000  # of a notebook; pictures shrink until it fits
# pixels across, and colours: what is tried, one after the other
SIZES = ((1000, 256), (800, 256), (640, 256), (640, 64), (480, 64), (360, 64), (360, 32), (300, 32))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
# ipykernel's remark on its own transport, harmless; every other line on stderr stays.
TRANSPORT = re.compile(r"^.*Kernel is running over TCP without encryption.*\n?", re.M)


def normalised(text: str) -> str:
    """The notebook ``text`` (JSON) in its one normal form; normalising again changes nothing.

    Raises:
        CompanionError: if ``text`` is no notebook.
    """
    for size in SIZES:
        written = _written(_notebook(text), *size)
        if len(written.encode()) <= BYTES:
            break
    return written


def _notebook(text: str):
    try:
        return nbformat.reads(text, as_version=4)
    except Exception as error:  # nbformat raises its own, json's and jsonschema's errors
        raise CompanionError(f"not a notebook: {str(error).splitlines()[0]}") from error


def _written(node, width: int, colours: int) -> str:
    node.nbformat, node.nbformat_minor = 4, 5
    node.metadata = copy.deepcopy(METADATA)
    node.cells = [cell for cell in node.cells if not _injected(cell)]
    count = 0
    for number, cell in enumerate(node.cells):
        tags = sorted(set(cell.metadata.get("tags", [])))
        cell.id, cell.metadata = f"cell-{number:02d}", {"tags": tags} if tags else {}
        cell.source = "\n".join(line.rstrip() for line in cell.source.rstrip().split("\n"))
        if cell.cell_type == "code":
            count += bool(cell.outputs or cell.execution_count)
            cell.execution_count = count if cell.outputs or cell.execution_count else None
            cell.outputs = _outputs(cell.outputs, cell.execution_count, width, colours)
    return nbformat.writes(nbformat.from_dict(node), version=4).rstrip("\n") + "\n"


def _injected(cell) -> bool:
    return "injected-parameters" in cell.metadata.get("tags", [])


def _outputs(outputs, count: int | None, width: int, colours: int) -> list:
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            text = TRANSPORT.sub("", output.text) if output.name == "stderr" else output.text
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += text
            elif text:
                kept.append(nbformat.from_dict({"output_type": "stream", "name": output.name, "text": text}))
            continue
        if "data" in output:
            if WIDGET in output.data:
                continue
            if "image/png" in output.data:
                output.data["image/png"] = _small_png(output.data["image/png"], width, colours)
            alt = output.metadata.get("image/png", {}).get("alt")
            output.metadata = {"image/png": {"alt": alt}} if alt else {}
        if output.output_type == "execute_result":
            output.execution_count = count
        kept.append(output)
    return kept


def _small_png(encoded: str, width: int, colours: int) -> str:
    """At most ``width`` pixels wide, so many colours, no metadata; what is so already comes back as it is."""
    return base64.b64encode(palette_png(base64.b64decode(encoded), colours, width)).decode() + "\n"


def adopt(executed: Path, notebook: Path) -> str:
    """The executed notebook in normal form, fit to replace ``notebook``.

    Raises:
        CompanionError: if it is the run of other code, of other parameters than the notebook's own, or a
            failed one.
    """
    ran, stored = (_notebook(path.read_text(encoding="utf-8")) for path in (executed, notebook))
    for cell in ran.cells:
        if _injected(cell) and not _literals(cell.source).items() <= _defaults(stored).items():
            raise CompanionError(
                f"{executed} ran with other parameters than {notebook}: {cell.source.strip()}"
            )
        if cell.cell_type == "code" and any(output.output_type == "error" for output in cell.outputs):
            raise CompanionError(f"{executed} ended in an error")
    if _code(ran) != _code(stored):
        raise CompanionError(f"{executed} ran other code than {notebook} holds now: run it again")
    # The prose may have moved on since the run: only outputs are taken over.
    outputs = iter([cell for cell in ran.cells if cell.cell_type == "code" and not _injected(cell)])
    for cell in stored.cells:
        if cell.cell_type == "code":
            source = next(outputs)
            cell.outputs, cell.execution_count = source.outputs, source.execution_count
    return normalised(nbformat.writes(stored))


def _code(node) -> list[str]:
    return [cell.source.strip() for cell in node.cells if cell.cell_type == "code" and not _injected(cell)]


def _defaults(node) -> dict:
    return {
        name: value
        for cell in node.cells
        if "parameters" in cell.metadata.get("tags", [])
        for name, value in _literals(cell.source).items()
    }


def _literals(source: str) -> dict:
    """Names and values of the literal assignments in ``source``."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found


def main(words: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.pages.normalise", description="Notebooks in normal form."
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to normalise in place")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 naming what is not normal"
    )
    parser.add_argument(
        "--from",
        dest="executed",
        nargs="+",
        type=Path,
        default=[],
        help="results/<run>/<name>/executed.ipynb whose outputs go to notebooks/<name>.ipynb",
    )
    given = parser.parse_args(words)
    try:
        pairs = [(path, normalised(path.read_text(encoding="utf-8"))) for path in given.notebooks]
        for executed in given.executed:
            notebook = ROOT / "notebooks" / f"{executed.resolve().parent.name}.ipynb"
            pairs.append((notebook, adopt(executed, notebook)))
    except (CompanionError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    changed = [(path, text) for path, text in pairs if path.read_text(encoding="utf-8") != text]
    for path, text in changed:
        print(f"{path}: {'not normalised' if given.check else 'normalised'}")
        if not given.check:
            write_text(path, text)
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
