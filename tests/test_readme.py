"""README.md: what follows from code and results is what they say now, and its example runs."""

from __future__ import annotations

import re

import pytest

import lib
from lib.companion import contents, tables
from lib.data import embedded
from lib.evaluate.spread import Spread
from lib.methods import METHODS
from lib.system.errors import CompanionError
from lib.system.files import ROOT
from workflow.pages import readme

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {match[2]: match[0] for match in readme.BLOCK.finditer(TEXT)}


def _row(method: str, acc: float = 50.0, **changes) -> tables.Row:
    fields = {"notebook": METHODS[method].notebook, "config": "0" * 12, "dataset": "digits", "ipc": 1}
    fields |= {
        "network": "convnet-d2-w32",
        "protocol": "cpu-small",
        "labels": "hard",
        "seeds": "seed 0: 3 sets x 2 networks",
    }
    return tables.Row(**fields | {"method": method, "accuracy": Spread.of([acc - 1, acc, acc + 1])} | changes)


def _chosen(*rows: tables.Row) -> tuple[str, str]:
    """Accuracy and mark of what shows DM on digits IPC 1 beside random real images."""
    frame = tables.standing(tables.rows_to_frame([_row("random", 60.0), *rows]))
    row, mark = readme.chosen(frame, "dm", "digits", 1)
    return f"{row['acc']:.0f}", mark


def test_the_generated_parts_are_up_to_date():
    wanted = {
        name: f"<!-- begin: {name} -->\n{write()}\n<!-- end -->"
        for name, write in readme.writers(ROOT).items()
    }
    stale = [name for name, block in wanted.items() if block != BLOCKS[name]]
    assert not stale, f"{', '.join(stale)}: run python -m workflow.pages.readme"


def test_every_room_of_the_library_is_on_the_map_once():
    (folder,) = lib.__path__
    found = {
        path.name for path in (ROOT / folder).iterdir() if path.name not in ("__init__.py", "__pycache__")
    }
    assert sorted(re.findall(r"^\| `lib/([\w.]+)` \| .+ \|$", BLOCKS["rooms"], re.MULTILINE)) == sorted(found)


def test_every_data_set_that_comes_with_the_project_is_named():
    assert [name for name in embedded.NAMES if f"`{name}`" not in TEXT] == []


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    short = code.replace("distill(method", "distill(replace(method, iterations=2)")
    short = short.replace('protocol("cpu-small", data.train)', 'protocol("cpu-small", data.train, epochs=2)')
    assert short.count("iterations=2)") == short.count("epochs=2)") == 1
    monkeypatch.chdir(tmp_path)
    exec(f"from dataclasses import replace\n{short}", {})
    assert re.search(r"\d+\.\d %", capsys.readouterr().out)
    assert (tmp_path / "set.safetensors").is_file() and any((tmp_path / "my_set").iterdir())


def test_hard_labels_under_the_common_protocol_have_no_mark():
    assert _chosen(_row("dm", 86.0)) == ("86", "")


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ({"labels": "soft"}, readme.OWN),
        ({"protocol": "own-kernel"}, readme.OWN),
        ({"protocol": "cpu-small-half"}, readme.OTHER),
        ({"network": "convnet-d2-w16"}, readme.OTHER),
    ],
)
def test_what_is_judged_otherwise_is_marked_and_gives_way(change, mark):
    other = _row("dm", 98.0, **change)
    assert _chosen(other) == ("98", mark) and _chosen(other, _row("dm")) == ("50", "")


def test_own_protocols_give_way_to_other_epochs():
    rows = [_row("dm", 98.0, protocol="own-kernel"), _row("dm", 70.0, protocol="cpu-small-half")]
    assert _chosen(*rows) == ("70", readme.OTHER)


def test_a_variant_never_stands_for_the_method():
    frame = tables.standing(tables.rows_to_frame([_row("random"), _row("dm", variant="noise")]))
    assert readme.chosen(frame, "dm", "digits", 1) is None


def test_the_table_holds_what_is_judged_alike_in_all_cases_best_first():
    both = [{"dataset": data, "ipc": ipc} for data, ipc in readme.CASES]
    rows = [
        _row(name, acc, **case)
        for name, acc in (("random", 40.0), ("dc", 60.0), ("dm", 70.0))
        for case in both
    ]
    rows += [_row("mtt", 90.0, **both[0]), _row("kip", 95.0, protocol="own-kernel", **both[0])]
    rows += [_row("kip", 95.0, protocol="own-kernel", **both[1])]
    lines = readme.results(tables.rows_to_frame(rows), {}).split("\n")[2:]
    assert [re.match(r"\| \[?(\w+)", line)[1] for line in lines] == ["random", "DM", "DC", "all"]


def test_the_table_is_short_and_every_notebook_is_linked_once():
    assert 5 < len(BLOCKS["results"].splitlines()) - 4 <= 15
    for name in contents.titles():
        assert BLOCKS["notebooks"].count(f"(notebooks/{name}.ipynb)") == 1
        assert (
            len(re.findall(rf"^\* \[{name}\]\({name}\.ipynb\).*: \S", contents.contents(), re.MULTILINE)) == 1
        )


def test_blocks_are_wanted_once_each():
    text = "a <!-- begin: one -->\nold\n<!-- end --> b"
    assert readme.rewritten(text, {"one": lambda: "new"}) == "a <!-- begin: one -->\nnew\n<!-- end --> b"
    with pytest.raises(CompanionError, match="blocks one; wanted, once each: two"):
        readme.rewritten(text, {"two": lambda: ""})


def test_a_check_changes_nothing_and_names_the_part(monkeypatch, tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- begin: one -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "writers", lambda root: {"one": lambda: "new"})
    assert readme.main(["--check"]) == 1 and "one out of date" in capsys.readouterr().out
    assert "old" in (tmp_path / "README.md").read_text()
    assert readme.main([]) == 0 and "new" in (tmp_path / "README.md").read_text()
    capsys.readouterr()
    assert readme.main(["--check"]) == 0 and capsys.readouterr().out == ""
