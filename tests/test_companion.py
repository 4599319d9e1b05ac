"""The run of a notebook: what start refuses, what a run writes, and that its judgements are right."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from lib.companion import provenance, start, tables, verdicts
from lib.companion.profiles import PROFILES, cases_of
from lib.system.errors import CompanionError
from lib.system.files import ROOT


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """``start`` writing to a temporary folder; torch's process-wide settings are put back."""
    monkeypatch.setenv("COMPANION_OUT", str(tmp_path))
    monkeypatch.delenv("COMPANION_RUN", raising=False)
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield lambda *words, **options: start(*(words or ("20_dm",)), **options)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profile": "cpi"}, ["profile 'cpi'", "did you mean 'cpu'", "cpu, paper, photos"]),
        ({"dataset": "digit"}, ["dataset 'digit'", "did you mean 'digits'", "photos16"]),
        ({"ipc": 0}, ["ipc", "whole number >= 1", "not 0"]),
        ({"ipc": -3}, ["ipc", "not -3"]),
        ({"ipc": 1.5}, ["ipc", "not 1.5"]),
        ({"ipc": True}, ["ipc", "not True"]),
        ({"seed": -1}, ["seed", ">= 0", "not -1"]),
        ({"threads": 0}, ["threads", ">= 1", "not 0"]),
        ({"device": "tpu"}, ["device", "'tpu'"]),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(begin, options, words):
    with pytest.raises(CompanionError) as error:
        begin(**options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_run_cannot_leave_its_folder(begin, monkeypatch):
    with pytest.raises(CompanionError, match="notebook's name"):
        begin("../20_dm")
    monkeypatch.setenv("COMPANION_RUN", "../../elsewhere")
    with pytest.raises(CompanionError, match="leaves its folder"):
        begin()
    monkeypatch.delenv("COMPANION_RUN")
    with pytest.raises(CompanionError, match="name of an output"):
        begin().save_table(pd.DataFrame({"a": [1]}), "../table")


def test_overrides_replace_the_cases_of_the_profile():
    cpu = PROFILES["cpu"]
    assert cases_of(cpu) == (("digits", 1), ("photos16", 10))
    assert cases_of(cpu, dataset="photos16") == (("photos16", 10),)
    assert cases_of(cpu, dataset="photos32") == (("photos32", 1), ("photos32", 10))
    assert cases_of(cpu, ipc=5) == (("digits", 5), ("photos16", 5))
    assert cases_of(cpu, dataset="digits", ipc=2) == (("digits", 2),)
    assert cases_of(PROFILES["paper"], ipc=3) == (("cifar10", 3),)


def test_start_makes_all_random_streams_repeat(begin):
    def draws():
        run = begin(seed=7, threads=1)
        return (
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),
            torch.rand(2, generator=run.generator(3)).tolist(),
        )

    assert draws() == draws()
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


def test_generators_of_different_seeds_and_offsets_never_coincide(begin):
    firsts = {
        torch.rand(4, generator=begin(seed=seed).generator(offset)).numpy().tobytes()
        for seed in range(3)
        for offset in (0, 1, 2, 999_999)
    }
    assert len(firsts) == 12
    with pytest.raises(CompanionError, match="seed offset"):
        begin().generator(1_000_000)  # would be seed 1, offset 0


def test_verdicts_print_the_judgement_and_keep_the_numbers(begin, capsys):
    run = begin()
    assert run.better("DM beats random", [86, 87, 85], [60, 64, 68])
    assert not run.better("DSA beats DM", [86, 87, 85], [85, 86, 87])
    assert run.close("accuracy of DM (%)", 86.4, 86, tol=1)
    assert not run.check("DM is cheapest", False, dm=3.0, dc=2)
    assert capsys.readouterr().out.splitlines() == [
        "ok  DM beats random by more than 2 standard errors",
        "not at this scale  DSA beats DM by more than 2 standard errors",
        "ok  accuracy of DM (%) within 1 of 86",
        "not at this scale  DM is cheapest",
    ]
    frame = run.verdicts()
    assert list(frame["verdict"]) == ["ok", "not at this scale", "ok", "not at this scale"]
    assert list(frame["difference"]) == ["22.00", "0.00", "0.40", ""]
    assert list(frame["n"]) == ["3 / 3", "3 / 3", "", ""] and frame["other"].iloc[-1] == "dm = 3, dc = 2"
    with pytest.raises(AssertionError, match="must hold"):
        run.check("must hold", False, must=True)


def test_better_is_welchs_criterion():
    a, b = [1.0, 2.0, 3.0], [0.0, 0.0, 3.0, 1.0]
    verdict = verdicts.judge_better("a beats b", a, b)
    expected = np.sqrt(1.0 / 3 + np.var(b, ddof=1) / 4)
    assert verdict.numbers["standard_error"] == pytest.approx(expected)
    threshold = 1.0 / expected  # the difference of the means is 1
    assert verdicts.judge_better("", a, b, threshold - 1e-6).ok
    assert not verdicts.judge_better("", a, b, threshold + 1e-6).ok
    assert not verdicts.judge_better("", [np.nan, 1], [0, 0]).ok
    with pytest.raises(CompanionError, match="at least 2 repetitions"):
        verdicts.judge_better("a beats b", [1], [0, 1])


def test_close_refuses_nothing_silently():
    assert not verdicts.judge_close("acc", float("nan"), 1, 0.5).ok
    assert verdicts.judge_close("acc", 1.5, 1, 0.5).ok
    with pytest.raises(CompanionError, match="tolerance"):
        verdicts.judge_close("acc", 1, 1, 0)


def test_run_json_says_where_everything_comes_from(begin, tmp_path):
    run = begin("20_dm", seed=2, dataset="digits", title="DM", claim="Means are enough.")
    with run.stage("distil"):
        with mmap.mmap(-1, 64 * 2**20) as fresh:  # pages that no earlier test can have left behind
            fresh.write(b"x" * len(fresh))
    with run.stage("distil"):
        pass
    run.record(images=torch.tensor([1, 2]), rate=float("inf"))
    run.headline(ours="86.4", published="26.0")
    run.check("holds", True, difference=float("nan"))
    run.save_table(pd.DataFrame({"a": [1.5]}))
    run.save_set(_Set(), "dm-digits-1")
    run.finish()
    record = json.loads((tmp_path / "results/cpu/20_dm/run.json").read_text())
    assert (record["title"], record["claim"], record["parameters"]["seed"]) == ("DM", "Means are enough.", 2)
    assert record["cases"] == [["digits", 1]]
    assert record["config"] == {"images": [1, 2], "rate": None}  # JSON knows no infinity
    assert record["verdicts"] == [{"text": "holds", "ok": True, "numbers": {"difference": None}}]
    assert set(record["stages"]) == {"distil"} and record["stages"]["distil"]["peak_mb"] > 60
    for kind, name in (("tables", "table"), ("sets", "dm-digits-1")):
        entry = record[kind][name]
        assert entry["sha256"] == provenance.sha256(tmp_path / entry["file"])
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    assert record["threads"] >= 1 and record["device"]


class _Set:
    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"set")


def test_the_run_folder_follows_the_environment(begin, tmp_path, monkeypatch):
    assert begin(profile="photos").results == tmp_path / "results/photos/20_dm"
    monkeypatch.setenv("COMPANION_RUN", "ipc-5")
    run = begin()
    assert (run.results, run.figures) == (tmp_path / "results/ipc-5/20_dm", tmp_path / "figures/ipc-5/20_dm")


def test_a_read_only_results_folder_is_one_line(begin, tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(CompanionError, match="cannot write .*table.csv"):
        begin().save_table(pd.DataFrame({"a": [1]}))


def test_bars_are_off_where_nobody_watches(begin, monkeypatch):
    monkeypatch.delenv("COMPANION_BARS", raising=False)
    assert begin().bars is False  # under pytest
    monkeypatch.setenv("COMPANION_BARS", "1")
    assert begin().bars is True
    monkeypatch.setenv("COMPANION_BARS", "0")
    assert begin().bars is False


def test_importing_the_package_stays_light():
    heavy = "matplotlib seaborn pandas sklearn torchvision nbformat IPython lib.methods lib.data".split()
    code = f"import sys, lib.companion; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def _row(**changes):
    fields = dict(
        notebook="20_dm", method="DM", dataset="digits", ipc=1, network="convnet-d2-w32", protocol="dc"
    )
    return tables.Row(**fields | dict(labels="hard", seed_scheme="3 sets x 5 networks", acc=86.4) | changes)


def test_rows_refuse_what_would_spoil_a_comparison():
    with pytest.raises(CompanionError, match="label type 'firm'.*hard, soft"):
        _row(labels="firm")
    with pytest.raises(CompanionError, match="percent"):
        _row(acc=864)


def test_the_table_survives_the_file(begin, tmp_path):
    run = begin()
    frame = tables.rows_to_frame(
        [run.row(**_fields(_row(acc_std=1.25, n_sets=3, n_networks=5))), _row(method="random")]
    )
    shown = run.save_table(frame)
    back = tables.read_tables(tmp_path / "results")
    assert list(back.columns) == ["run", *tables.COLUMNS]
    assert (
        list(back["method"]) == ["DM", "random"]
        and back["acc_std"][0] == 1.25
        and np.isnan(back["acc_std"][1])
    )
    assert list(shown["accuracy (%)"]) == ["86.4 ± 1.2", "86.4"] and list(shown["n"]) == ["3 x 5", "1 x 1"]
    assert "published" not in shown.columns  # nothing published, no column
    (tmp_path / "results/cpu/20_dm/table.csv").write_text("foreign,columns\n1,2\n")
    assert tables.read_tables(tmp_path / "results").empty


def _fields(row):
    return {name: getattr(row, name) for name in tables.COLUMNS if name not in ("notebook", "commit")}


def test_readable_frames_show_no_digit_that_is_not_stable():
    frame = pd.DataFrame({"x": [0.123456, None], "steps": [100.0, 200.0], "name": ["a", None], "n": [1, 2]})
    shown = tables.readable(frame, digits=2)
    assert shown.to_dict("list") == {
        "x": ["0.12", ""],
        "steps": ["100", "200"],
        "name": ["a", ""],
        "n": [1, 2],
    }


def test_mean_spread_states_n():
    assert tables.mean_spread([85.2, 86.4, 87.6]) == "86.4 ± 1.2 (n=3)"
    assert tables.mean_spread([86.42]) == "86.4 (n=1)"
    assert tables.mean_spread(torch.tensor([[0.25, 0.75]]), digits=2) == "0.50 ± 0.35 (n=2)"
    with pytest.raises(CompanionError, match="at least one value"):
        tables.mean_spread([])
