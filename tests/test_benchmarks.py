"""The benchmarks run, compare equal things and write their table. No test here looks at a clock."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import child, report
from benchmarks.harness import REFERENCE, assert_equal, cost, measure
from benchmarks.hot_spots import HOT_SPOTS, Setting
from lib.system.errors import CompanionError

TINY = Setting(side=8, depth=1, width=8, classes=3, ipc=2, real=4, test=9, epochs=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", child.SPOTS)
def test_every_fast_path_has_the_values_of_its_reference(name):
    setting = (
        dataclasses.replace(TINY, depth=2) if name == "datadam" else TINY
    )  # its last layer takes no part
    hot_spot = child.SPOTS[name](setting)
    differences = assert_equal(hot_spot)
    assert list(differences) == list(hot_spot.candidates)
    assert list(differences)[0] == REFERENCE
    assert len(differences) == (3 if name == "kip-fc" else 2)  # KIP in two precisions at every size
    assert all(difference < 1e-3 for difference in differences.values())


def test_several_batches_are_compared_in_the_same_order():
    """300 images are two mini-batches of shuffled positions."""
    assert_equal(HOT_SPOTS["evaluation"](dataclasses.replace(TINY, ipc=100)))


@pytest.mark.parametrize("name", HOT_SPOTS)
def test_other_values_are_refused(name):
    """A check that cannot fail would prove nothing: hold every candidate to a difference below zero, or to NaN."""
    hot_spot = HOT_SPOTS[name](TINY)
    fast = list(hot_spot.candidates)[1]
    impossible = dataclasses.replace(hot_spot, tolerance={fast: -1.0})
    with pytest.raises(CompanionError, match="differs from the reference"):
        assert_equal(impossible)
    with pytest.raises(CompanionError, match="nan"):
        assert_equal(dataclasses.replace(hot_spot, check=lambda: {fast: float("nan")}))


def test_the_check_notices_another_augmentation(monkeypatch):
    from benchmarks import reference

    monkeypatch.setattr(reference, "FAMILIES", dict.fromkeys(reference.FAMILIES, lambda x, u: 1.01 * x))
    for name in ("dm", "dsa"):
        monkeypatch.setattr(
            importlib.import_module(f"lib.plain.{name}"), "siamese", lambda x, omega: 1.01 * x
        )
    for name in ("dm", "dsa", "siamese", "evaluation"):
        with pytest.raises(CompanionError, match="differs from the reference"):
            assert_equal(HOT_SPOTS[name](TINY))


def test_a_candidate_that_fails_its_check_is_never_timed():
    calls = []
    hot_spot = dataclasses.replace(
        HOT_SPOTS["siamese"](TINY), check=lambda: {"fast": 1.0}, tolerance={"fast": 0.5},
        candidates={REFERENCE: lambda: calls.append(0), "fast": lambda: calls.append(1)},
    )  # fmt: skip
    with pytest.raises(CompanionError):
        measure(hot_spot, "S", 1, 2, CPU, {})
    assert calls == []


def test_candidates_take_turns():
    calls = []
    hot_spot = dataclasses.replace(
        HOT_SPOTS["siamese"](TINY), check=lambda: {"fast": 0.0}, tolerance={"fast": 0.5},
        candidates={REFERENCE: lambda: calls.append(0), "fast": lambda: calls.append(1)},
    )  # fmt: skip
    rows = measure(hot_spot, "S", 1, 2, CPU, {"fast": 3.0}, warm_up=1)
    assert calls == [0, 1] * 3
    assert [row.candidate for row in rows] == [REFERENCE, "fast"]
    assert rows[0].ratio == 1 and rows[0].target is None and rows[1].target == 3.0


def test_a_slow_reference_is_timed_once_without_warm_up():
    calls = []
    hot_spot = dataclasses.replace(
        HOT_SPOTS["siamese"](TINY), check=lambda: {"fast": 0.0}, tolerance={"fast": 0.5}, most=1,
        candidates={REFERENCE: lambda: calls.append(0), "fast": lambda: calls.append(1)},
    )  # fmt: skip
    measure(hot_spot, "L", 1, 5, CPU, {})
    assert calls == [0, 1]


def test_half_precision_candidates_are_listed_where_the_library_has_them():
    """Only built, not run: some processors stop at the instruction."""
    mixed = dataclasses.replace(TINY, mixed=True)
    assert {name: len(HOT_SPOTS[name](mixed).candidates) for name in HOT_SPOTS} == {
        "dm": 3, "dc": 3, "dsa": 3, "evaluation": 2, "siamese": 2, "test": 2,
    }  # fmt: skip


def test_one_process_reports_time_faults_and_memory():
    found = cost(HOT_SPOTS["dm"](TINY), REFERENCE, 1)
    assert set(found) == {"milliseconds", "page_faults", "peak_mib"}
    assert all(value >= 0 for value in found.values())


def test_a_candidate_runs_in_a_process_of_its_own():
    tiny = {"depth": 1, "width": 4, "side": 8, "real": 2, "ipc": 1}
    found = child.in_process("dm", 1, "tuned", "S", tiny, 1, 1)
    assert found["candidate"] == "all classes at once" and found["unit"] == "step"
    assert found["milliseconds"] > 0


@pytest.fixture
def tiny_sizes(monkeypatch):
    monkeypatch.setattr(command, "SIZES", {"S": TINY, "L": dataclasses.replace(TINY, side=16)})


def test_the_command_prints_and_writes_the_table(tmp_path, tiny_sizes, capsys):
    words = [
        "--sizes",
        "S",
        "--quick",
        "--repeats",
        "1",
        "--real-batch",
        "4",
        "--ipc",
        "1,2",
        "--device",
        "cpu",
    ]
    words += ["--only", "dm,dc,dsa,evaluation,siamese,test,krr-search"]
    results = command.main([*words, "--out", str(tmp_path)], Console(width=160))
    assert {row.hot_spot for row in results.rows} == {
        "DM step", "DC matching step", "DSA matching step", "evaluation", "siamese DSA", "test pass",
        "KRR ridge search",
    }  # fmt: skip
    assert {row.ipc for row in results.rows if row.hot_spot == "DM step"} == {1, 2}
    assert "evaluation" in capsys.readouterr().out

    saved = json.loads((tmp_path / "results.json").read_text())
    assert [row["candidate"] for row in saved["rows"]] == [row.candidate for row in results.rows]
    assert {"date", "device", "threads", "dtype", "allocator", "torch"} <= set(saved["header"])
    text = (tmp_path / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(results.rows)
    assert len({line.count("|") for line in table}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_a_part_is_printed_but_does_not_replace_the_committed_table(tiny_sizes, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *arguments: pytest.fail("written"))
    command.main(
        ["--sizes", "S", "--only", "siamese", "--repeats", "1", "--device", "cpu"], Console(quiet=True)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "Q"], "unknown size 'Q'"),
        (["--only", "dmm"], "unknown hot spot 'dmm'.*'dm'"),
        (["--ipc", "0"], "ipc must be a whole number of at least 1, not '0'"),
        (["--ipc", "1,x"], "not 'x'"),
        (["--real-batch", "-3"], "real batch must be"),
        (["--repeats", "0"], "repeats must be"),
        (["--threads", "0"], "threads must be"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--sizes", ","], "no size"),
    ],
)
def test_bad_words_are_told_in_one_line(words, message):
    with pytest.raises(CompanionError, match=message) as error:
        command.main(words, Console(quiet=True))
    assert "\n" not in str(error.value)
