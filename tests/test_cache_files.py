"""Files that appear whole or not at all, keys that know their content, and who imports whom."""

from __future__ import annotations

import ast
import hashlib
import json
import mmap
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lib.system import errors, files
from lib.system.cache import digest, stored
from lib.system.code import closure, code_digest, meaning, module_files
from lib.system.device import resolve_device
from lib.system.errors import CompanionError
from lib.system.files import ROOT, atomic, cache_dir, inside, write_tensors, write_text
from lib.system.measure import Meter

# -- digests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Other:
    lr: float = 0.1
    names: tuple[str, ...] = ("a",)


def test_a_digest_tells_contents_apart():
    t = torch.arange(6.0)
    different = [
        t, t.double(), t.view(2, 3), t.view(3, 2), t + 1e-6, t.int(), t.half(), t.bool(), torch.zeros(6), torch.zeros(0, 6),
        torch.zeros(6, 0), torch.tensor(0.0), 0.0, 0, False, None, "", "0", [0], [[0]], [0, 0], {"0": 0}, {"a": 1, "b": 2},
        {"a": 2, "b": 1}, Settings(), Settings(0.2), Settings(names=("b",)), Other(), t.to(torch.bfloat16),
    ]  # fmt: skip
    assert len({digest(value) for value in different}) == len(different)
    assert digest(1, 2) != digest([1, 2]) and digest("ab", "c") != digest("a", "bc")


def test_a_digest_is_canonical():
    t = torch.arange(6.0).view(2, 3)
    assert digest(t) == digest(t.clone().requires_grad_()) == digest(t.t().contiguous().t())
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) and digest((1, 2)) == digest([1, 2])
    assert digest(Settings()) == digest(Settings(0.1, ("a",)))
    # spelt out: a key of today is found by another process tomorrow
    want = hashlib.sha256(b'["key", 1, 0.5, null, true, {"a": [1, "b"]}]').hexdigest()
    assert digest("key", 1, 0.5, None, True, {"a": (1, "b")}) == want


def test_a_digest_refuses_what_has_no_canonical_form():
    for value in (object(), {1, 2}, lambda: 0, b"bytes", Settings):
        with pytest.raises(TypeError, match="no canonical form"):
            digest(value)


# -- the cache ----------------------------------------------------------------------------------------------------------


def test_stored_computes_once():
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.randn(3, 4).t().requires_grad_(), "b": torch.tensor(2)}

    first, second = stored("key", compute), stored("key", compute)
    assert len(calls) == 1 and first.keys() == second.keys() == {"a", "b"}
    assert all(torch.equal(first[k], second[k]) for k in first) and not first["a"].requires_grad
    stored("other", compute)
    assert len(calls) == 2


def test_stored_survives_damage_and_failure(tmp_path):
    path = tmp_path / "key.safetensors"
    for content in (b"", b"nonsense" * 10):
        path.write_bytes(content)
        assert stored("key", lambda: {"a": torch.ones(2)}, tmp_path)["a"].tolist() == [1, 1]

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        stored("new", fail, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["key.safetensors"]


def test_cache_folder_by_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c"
    monkeypatch.delenv("COMPANION_CACHE")
    assert cache_dir() == ROOT / ".cache"


# -- files --------------------------------------------------------------------------------------------------------------


def test_atomic_writes_whole_files(tmp_path):
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "eins ä")
    write_text(path, "zwei")
    assert path.read_text() == "zwei" and [p.name for p in path.parent.iterdir()] == ["text.txt"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # not the 0600 of a temporary file


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_atomic_leaves_nothing_behind_on_failure(tmp_path, error):
    path = tmp_path / "text.txt"
    path.write_text("old")
    with (
        pytest.raises((RuntimeError, KeyboardInterrupt, CompanionError)) as caught,
        atomic(path) as temporary,
    ):
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["text.txt"]
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {path}: No space left on device"


def test_atomic_when_syncing_or_moving_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(CompanionError, match="No space left"):
            patch.setattr(files.os, name, full)
            write_text(tmp_path / "text.txt", "new")
        assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "text.txt"
    write_text(path, "old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.suffix == ".txt" and temporary.parent == path.parent
    assert path.read_text() == "new"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", Path("/proc/nothing/x"), tmp_path / "folder"):
        with pytest.raises(CompanionError, match=f"cannot write {path}: ") as caught:
            write_text(path, "text")
        assert "\n" not in str(caught.value)
        with pytest.raises(CompanionError, match=f"cannot write {path}: "):
            write_tensors(path, {"a": torch.ones(2)})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_inside(tmp_path):
    assert inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"
    (tmp_path / "link").symlink_to("/etc")
    for name in ("../x", "a/../../x", "/etc/passwd", "link/passwd", f"../{tmp_path.name}x/y"):
        with pytest.raises(CompanionError, match="leaves its folder"):
            inside(tmp_path, name)


# -- who imports whom ---------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path) -> Path:
    """A small ``lib``: a imports b.deep, b.deep imports c; nobody imports d."""
    sources = {
        "lib/__init__.py": "", "lib/a.py": "import torch\nfrom lib.b import deep\n", "lib/b/__init__.py": "",
        "lib/b/deep.py": "def f():\n    from lib.c import g\n    return g\n", "lib/c.py": "import lib.a\ng = 1\n", "lib/d.py": "",
    }  # fmt: skip
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_closure_is_transitive(project):
    names = [p.relative_to(project).as_posix() for p in module_files("lib.a", project)]
    assert names == ["lib/__init__.py", "lib/a.py", "lib/b/__init__.py", "lib/b/deep.py", "lib/c.py"]
    assert module_files("lib.d", project) == [project / "lib/__init__.py", project / "lib/d.py"]


def test_code_digest_sees_every_imported_file(project):
    before = code_digest("lib.a", root=project)
    assert before == code_digest("lib.a", root=project)
    (project / "lib/d.py").write_text("changed = 1\n")
    assert code_digest("lib.a", root=project) == before
    seen = {before}
    for name in ("a.py", "b/__init__.py", "b/deep.py", "c.py", "__init__.py"):
        with open(project / "lib" / name, "a") as file:
            file.write("another = 1\n")
        seen.add(code_digest("lib.a", root=project))
    assert len(seen) == 6
    (project / "lib/c.py").write_text("from lib import d\n")
    assert project / "lib/d.py" in module_files("lib.a", project)


def test_a_file_named_beside_its_module_counts(project):
    (project / "lib/c.py").write_text(
        'from pathlib import Path\nTABLE = Path(__file__).with_name("facts.csv")\n'
    )
    (project / "lib/facts.csv").write_text("a,b\n")
    assert project / "lib/facts.csv" in module_files("lib.a", project)
    before = code_digest("lib.a", root=project)
    (project / "lib/facts.csv").write_text("a,c\n")
    assert code_digest("lib.a", root=project) != before


SOURCE = '''"""A module."""
import os

class A:
    """A class."""
    x = 1

    def f(self, a):
        """A function."""
        return a + 1  # one more

async def g():
    """Alone."""
'''


def test_meaning_is_the_tree_without_docstrings_comments_and_layout(tmp_path):
    path = tmp_path / "m.py"

    def of(text: str) -> str:
        path.write_text(text)
        return meaning(path)

    same = [
        SOURCE,
        SOURCE.replace("A module.", "Another text.\n\nLonger."),
        SOURCE.replace('"""A module."""\n', ""),
        SOURCE.replace("A class.", "b").replace("A function.", "c").replace("Alone.", "d"),
        SOURCE.replace("  # one more", "\n        # two more"),
        SOURCE.replace("a + 1", "(a+1)"),
    ]
    assert len({of(text) for text in same}) == 1
    other = [
        SOURCE.replace("a + 1", "a + 2"),
        SOURCE.replace("x = 1", '"""Not first: a statement."""'),
        SOURCE.replace("return a + 1", 'return """text"""'),
        SOURCE.replace("import os", "import os\n'a string that documents nothing'"),
        SOURCE.replace('"""A function."""', 'f"""A function."""'),
    ]
    assert len({of(text) for text in (SOURCE, *other)}) == len(other) + 1
    path.write_text("def f(:\n")
    with pytest.raises(CompanionError, match="m.py is no Python: .*line 1"):
        meaning(path)


def test_no_comment_in_the_library_changes_a_digest(tmp_path):
    """Changed texts of a file that everything imports alter no key of the cache; a changed statement alters all."""
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    names, path = (
        ("lib.methods.dm", "lib.distill", "lib.evaluate.networks"),
        tmp_path / "lib/system/errors.py",
    )

    def digests() -> list[str]:
        assert all(path in module_files(name, tmp_path) for name in names)
        return [code_digest(name, root=tmp_path) for name in names]

    before, text = digests(), path.read_text()
    first = ast.get_docstring(ast.parse(text), clean=False)
    path.write_text("# a comment\n" + text.replace(first, "Other words."))
    assert digests() == before
    path.write_text(text + "\nVALUE = 1\n")
    assert all(was != now for was, now in zip(before, digests(), strict=True))


def test_code_digest_of_the_real_methods():
    files = {p.relative_to(ROOT).as_posix() for p in module_files("lib.methods.dm")}
    wanted = {"lib/methods/dm.py", "lib/match/features.py", "lib/augment/__init__.py", "lib/nets/convnet.py"}
    assert wanted <= files
    assert "lib/methods/dc.py" not in files and "lib/companion/run.py" not in files
    assert code_digest("lib.methods.dm") != code_digest("lib.methods.dc")
    assert "dc.py" in {p.name for p in module_files("lib.methods.dsa")}


def test_notebooks(project):
    cells = [
        {"cell_type": "markdown", "source": ["import lib.d"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "from lib import c\n", "!ls\n", "x = 1"]},
        {"cell_type": "code", "source": "print(x)"},
    ]
    path = project / "n.ipynb"

    def of(cells: list[dict]) -> str:
        path.write_text(json.dumps({"cells": cells}))
        return meaning(path)

    before = of(cells)
    found = {p.relative_to(project).as_posix() for p in closure([path], project)}
    assert "lib/c.py" in found and "lib/a.py" in found and "lib/d.py" not in found
    commented = {"cell_type": "code", "source": "# what it is\nprint(x)", "outputs": ["3"]}
    assert of([cells[1], commented]) == before
    joined = {
        "cell_type": "code",
        "source": ["%matplotlib inline\n", "from lib import c\n", "!ls\n", "x = 1\n", "print(x)"],
    }
    changed = {"cell_type": "code", "source": "print(2 * x)"}
    magic = {"cell_type": "code", "source": "%time\nprint(x)"}
    others = [of(some) for some in ([joined], [cells[1], changed], [cells[1], magic])]
    assert len({before, *others}) == 4


# -- errors, devices, measuring -----------------------------------------------------------------------------------------


def test_unknown_names():
    error = errors.unknown("dataset", "digit", ("photos16", "digits"))
    assert str(error) == "unknown dataset 'digit' (did you mean 'digits'?); allowed: digits, photos16"
    assert str(errors.unknown("seed", 3, ("a",))) == "unknown seed 3; allowed: a"
    assert errors.choose("x", "a", {"a": 1}) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_devices_without_a_gpu():
    assert resolve_device() == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(
            CompanionError, match=f"device '{name}': CUDA is not available.*allowed here: auto, cpu"
        ):
            resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "mps"])
def test_unknown_devices(name):
    with pytest.raises(CompanionError, match="unknown device .*allowed: auto, cpu, cuda, cuda:N"):
        resolve_device(name)


def test_meter():
    with Meter() as meter:
        block = mmap.mmap(-1, 48 * 2**20)  # fresh pages, whatever the allocator keeps
        block.write(b"x" * len(block))
    assert 0 < meter.seconds < 10
    if sys.platform == "linux":
        assert 40 * 2**20 < meter.peak_bytes < 200 * 2**20


def test_errors_and_files_need_no_torch():
    code = "import sys, lib.system.errors, lib.system.files, lib.system.code; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
