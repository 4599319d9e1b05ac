"""Which files of ``lib`` a notebook or module depends on, found from its import statements without running anything.

Two things ask: the workflow (re-run a notebook only when code it imports changed) and the cache (a stored result is valid
only for the code that made it).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lib.system.files import ROOT


def notebook_code(path: Path) -> str:
    """The code cells of a notebook joined as one module, notebook magics dropped."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join(
        line for cell in source for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))
    )


def closure(paths: Iterable[Path | str], root: Path = ROOT) -> list[Path]:
    """Every file under ``lib/`` that the given Python files or notebooks import, directly or not, sorted."""
    todo, seen = [Path(path) for path in paths], set()
    while todo:
        path = todo.pop()
        for found in _imports(path, path.stat().st_mtime_ns, root):
            if found not in seen:
                seen.add(found)
                todo.append(found)
    return sorted(seen)


def module_files(name: str, root: Path = ROOT) -> list[Path]:
    """The file of the module ``name`` (such as ``lib.methods.dm``) and all of ``lib`` that it imports."""
    start = _files_of(name, root)
    return sorted({*start, *closure(start, root)})


def code_digest(*names: str, root: Path = ROOT) -> str:
    """SHA-256 over the sources of the named modules and of everything in ``lib`` that they import."""
    files = sorted({file for name in names for file in module_files(name, root)})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _imports(path: Path, _changed: int, root: Path) -> tuple[Path, ...]:
    """Direct imports from ``lib``; the modification time is part of the cache key."""
    source = notebook_code(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # "from lib.match import features" may name a submodule
            names += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(file for name in names if name.split(".")[0] == "lib" for file in _files_of(name, root))


def _files_of(name: str, root: Path) -> list[Path]:
    """A module's own file and the ``__init__`` files of the packages above it."""
    parts, files = name.split("."), []
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        files += [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
    return files
