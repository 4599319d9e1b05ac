"""Which files of ``lib`` a notebook or module depends on, and what their code means, found without running anything.

Two things ask: the workflow (re-run a notebook only when code it imports changed) and the cache (a stored result is valid
only for the code that made it). What counts is the syntax tree: comments, layout and docstrings may change freely.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.system.errors import CompanionError
from lib.system.files import ROOT

FILE_NAME = re.compile(r"^[\w-]+\.(?!py$)\w+$")  # a string that may name a file beside its module
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def closure(paths: Iterable[Path | str], root: Path = ROOT) -> list[Path]:
    """Every file under ``lib/`` that the given Python files or notebooks import, directly or not, sorted; with the files of
    other kinds that such a module names and that lie beside it (a table, a style)."""
    todo, seen = [Path(path) for path in paths], set()
    while todo:
        path = todo.pop()
        for found in _uses(path, path.stat().st_mtime_ns, root):
            if found not in seen:
                seen.add(found)
                todo.append(found)
    return sorted(seen)


def module_files(name: str, root: Path = ROOT) -> list[Path]:
    """The file of the module ``name`` (such as ``lib.methods.dm``) and all of ``lib`` that it imports."""
    start = _files_of(name, root)
    return sorted({*start, *closure(start, root)})


def code_digest(*names: str, root: Path = ROOT) -> str:
    """SHA-256 over the :func:`meaning` of the named modules and of everything in ``lib`` that they import."""
    files = sorted({file for name in names for file in module_files(name, root)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()} {meaning(file)}\n".encode())
    return digest.hexdigest()


def meaning(path: Path) -> str:
    """SHA-256 of what a file does: of its syntax tree without docstrings, for a notebook that of its code cells with their
    boundaries and magics; of all bytes for a file of another kind. Trees of different Python versions may differ.

    Raises:
        CompanionError: the file is no Python.
    """
    return _read(path, path.stat().st_mtime_ns)[0]


def imports(path: Path) -> frozenset[str]:
    """What a file imports of ``lib``, by name: ``lib.methods`` and ``lib.methods.method``."""
    return _read(path, path.stat().st_mtime_ns)[1]


def strings(path: Path) -> frozenset[str]:
    """By which a file may name a module or a file: what is first in a call, ``f("dm")``, or stands in a table at the top of a
    module; all strings of a notebook."""
    return _read(path, path.stat().st_mtime_ns)[2]


@functools.cache
def _read(path: Path, _changed: int) -> tuple[str, frozenset[str], frozenset[str]]:
    """Meaning, names imported from ``lib``, :func:`strings`; the time of change is part of the cache's key."""
    if path.suffix not in (".py", ".ipynb"):
        return hashlib.sha256(path.read_bytes()).hexdigest(), frozenset(), frozenset()
    notebook = path.suffix == ".ipynb"
    digest, imported, texts = hashlib.sha256(), set(), set()
    for source in _cells(path) if notebook else [path.read_text(encoding="utf-8")]:
        lines = source.splitlines()
        magics = [line for line in lines if notebook and _magic(line)]
        try:
            tree = ast.parse("\n".join(line for line in lines if line not in magics))
        except SyntaxError as error:
            raise CompanionError(f"{path} is no Python: {error.msg}, line {error.lineno}") from error
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
            imported.update(_imports(node))
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                texts.add(node.args[0].value)
        tables = (
            [tree]
            if notebook
            else [line for line in tree.body if isinstance(line, (ast.Assign, ast.AnnAssign))]
        )
        texts.update(
            node.value for table in tables for node in ast.walk(table) if isinstance(node, ast.Constant)
        )
        digest.update("\0".join([ast.dump(tree), *magics, ""]).encode())
    return digest.hexdigest(), frozenset(imported), frozenset(text for text in texts if isinstance(text, str))


def _imports(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        # "from lib.match import features" may name a submodule
        names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return (name for name in names if name.split(".")[0] == "lib")


@functools.cache
def _uses(path: Path, changed: int, root: Path) -> tuple[Path, ...]:
    """The files that ``path`` names itself."""
    _, imported, texts = _read(path, changed)
    modules = [file for name in imported for file in _files_of(name, root)]
    beside = [path.with_name(text) for text in texts if FILE_NAME.match(text) and path.suffix == ".py"]
    return (*modules, *(file for file in beside if file.is_file()))


def _cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _magic(line: str) -> bool:
    return line.lstrip().startswith(("%", "!"))


def _files_of(name: str, root: Path) -> list[Path]:
    """A module's own file and the ``__init__`` files of the packages above it."""
    parts, files = name.split("."), []
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        files += [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
    return files
