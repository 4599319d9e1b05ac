"""The run of a notebook: what start refuses, what a run writes, and that its judgements are right."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from nbval.plugin import get_sanitize_patterns
from scipy import stats

from lib.companion import contents, plots, provenance, start, tables, verdicts
from lib.companion.profiles import PROFILES, cases_of
from lib.evaluate.spread import Spread
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
        ({"profile": "cpi"}, ["profile 'cpi'", "did you mean 'cpu'", "cpu, overnight, paper"]),
        ({"seed": 2**32}, ["seed", "4294967296"]),
        ({"dataset": "mnist"}, ["mnist has no small settings", "--profile paper", "fashion14"]),
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


def test_a_run_cannot_leave_its_folder(begin, monkeypatch, tmp_path):
    with pytest.raises(CompanionError, match="notebook's name"):
        begin("../20_dm")
    for wish in ("../../elsewhere", "cpu+x=../../../elsewhere"):
        monkeypatch.setenv("COMPANION_RUN", wish)
        with contextlib.suppress(CompanionError):
            assert tmp_path in begin().results.resolve().parents
    monkeypatch.delenv("COMPANION_RUN")
    run = begin()
    run.save_table(pd.DataFrame({"a": [1]}), "../../table of folder:/my/data")
    (kept,) = run.saved["tables"].values()
    assert (tmp_path / kept["file"]).is_file()
    assert re.fullmatch(r"results/[^/]+/20_dm/table-of-folder-my-data-[0-9a-f]{4}\.csv", kept["file"])


def test_overrides_replace_the_cases_of_the_profile():
    cpu = PROFILES["cpu"]
    assert cases_of(cpu) == (("digits", 1), ("fashion14", 1))
    assert cases_of(cpu, dataset="photos16") == (("photos16", 10),)
    assert cases_of(cpu, dataset="photos32") == (("photos32", 1), ("photos32", 10))
    assert cases_of(cpu, ipc=5) == (("digits", 5), ("fashion14", 5))
    assert cases_of(cpu, dataset="digits", ipc=2) == (("digits", 2),)
    assert cases_of(PROFILES["paper"], ipc=3) == (("cifar10", 3),)


def test_a_notebook_may_change_fields_of_a_profile(begin):
    changes = {"cpu": {"cases": (("photos16", 2),), "sets": 4}, "overnight": {"sets": 9}}
    run = begin(changes=changes)
    assert run.cases == (("photos16", 2),) and (run.profile.name, run.profile.sets) == ("cpu", 4)
    assert begin(changes=changes, ipc=3).cases == (("photos16", 3),)
    asked = begin(changes=changes, dataset="digits")  # goes first; the other fields hold
    assert asked.cases == (("digits", 1),) and asked.profile.sets == 4
    assert begin(changes={"overnight": {"sets": 9}}).profile == PROFILES["cpu"]


def test_a_figure_never_takes_the_place_of_another_one(begin, monkeypatch):
    run = begin()
    fig = plots.curves({"a": torch.arange(3.0)})
    run.save_figure(fig, "loss", "Loss on digits IPC 1.", see="It falls.")
    run.save_figure(fig, "loss", "Loss on digits IPC 1.", see="It falls, slowly.")  # the cell was run again
    with pytest.raises(CompanionError, match="figure 'loss' is of 'Loss on digits IPC 1.' already"):
        run.save_figure(fig, "loss", "Loss on digits IPC 10.", see="It falls.")
    monkeypatch.setenv("COMPANION_BARS", "1")  # somebody watches, and edits
    run.save_figure(fig, "loss", "Loss of DM on digits IPC 1.", see="It falls.")


def test_every_profile_but_the_first_look_is_long(begin):
    assert {name: begin(profile=name, device="cpu").long for name in PROFILES} == {"cpu": False, "overnight": True, "paper": True}


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


def _spread(*values):
    return Spread.of(values)


def test_a_claim_about_a_table_is_not_tested_where_an_entry_was_not_made(begin):
    run, table = begin(), {"dm": _spread(86, 87, 85), "random": _spread(60, 64, 68), "": _spread(86, 85, 84)}
    run.better_in(table, "DM beats random", "dm", "random", "Table 1")
    run.better_in(table, "DM beats itself", "dm", "", "Table 1", paired=True, lower=True)
    run.better_in(table, "DM beats DSA", "dm", "dsa", "Table 2")
    run.better_in(table, "DSA beats DM", "dsa", "dm", "Table 2", needs="a night")
    pair = (table["dm"], table["random"]), (table["dm"], table[""])
    run.better("DM beats random", *pair[0], "Table 1")
    run.better("DM beats itself", *pair[1], "Table 1", paired=True, lower=True)
    run.untested("DM beats DSA", "Table 2", needs="the profile overnight")
    run.untested("DSA beats DM", "Table 2", needs="a night")
    assert run.judged[:4] == run.judged[4:]


def test_a_verdict_is_one_line_with_its_numbers_at_the_end(begin, capsys):
    run = begin()
    assert run.better("DM beats random", _spread(86, 87, 85), _spread(60, 64, 68), "Table 1")
    assert not run.better("DSA beats DM", _spread(86, 87, 85), _spread(85, 86, 87), "Table 2")
    assert not run.better("random beats DM", _spread(60, 64, 68), _spread(86, 87, 85), "nobody")
    run.untested("DM is cheap at IPC 1250", "section 4.2", needs="CIFAR-10")
    assert run.close("accuracy of DM (%)", _spread(86, 87, 86.2), 86, tol=1)
    assert run.close("error", 0.25, 0, tol=1)
    assert not run.check("DM is cheapest", False, dm=3.0, dc=2)
    assert run.check("nothing to say", True)
    assert capsys.readouterr().out.splitlines() == [
        "confirmed        DM beats random (Table 1) [86.0 ± 1.0 (n=3) against 64.0 ± 4.0 (n=3): +22.0, 95 % 12.8 to 31.2]",
        "not resolved     DSA beats DM (Table 2) [86.0 ± 1.0 (n=3) against 86.0 ± 1.0 (n=3): +0.0, 95 % -2.3 to 2.3]",
        "contradicted     random beats DM (nobody) [64.0 ± 4.0 (n=3) against 86.0 ± 1.0 (n=3): -22.0, 95 % -31.2 to -12.8]",
        "not tested here  DM is cheap at IPC 1250 (section 4.2) [needs CIFAR-10]",
        "holds            accuracy of DM (%) within 1 of 86 [86.4 ± 0.5 (n=3)]",
        "holds            error within 1 of 0 [0.25]",
        "fails            DM is cheapest [dm = 3, dc = 2]",
        "holds            nothing to say",
    ]
    assert run.judged[0].numbers["difference"] == 22 and run.judged[0].numbers["n_reference"] == 3
    records = [{"outcome": verdict.outcome} for verdict in run.judged]
    assert list(verdicts.tally(records).values()) == [1, 1, 1, 1, 3, 1]


def test_lower_is_better_where_it_is_said(begin, capsys):
    run, gaps, others = begin(), _spread(1.0, 1.2, 0.8), _spread(7.0, 7.1, 6.9)
    assert run.better("DDM has a smaller gap", gaps, others, "section 4", lower=True)
    assert not run.better("DDM has a larger gap", gaps, others, "section 4")
    said = capsys.readouterr().out
    assert (
        "[1.0 ± 0.2 (n=3) against 7.0 ± 0.1 (n=3): -6.0" in said and "contradicted" in said
    )  # no sign is turned
    assert run.judged[0].numbers["difference"] == pytest.approx(-6)
    pairs = _spread(1, 5, 9), _spread(2, 6, 10.1)
    assert run.better("pair by pair", *pairs, "section 4", lower=True, paired=True)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_interval_is_students(seed, paired):
    """Against scipy's tests of the same hypotheses: the outcome, and both ends of the interval."""
    rng = np.random.default_rng(seed)
    a = rng.normal(2.0 * (seed % 3 - 1), 1, 5)
    b = rng.normal(0, 2, 5 if paired else 8)
    found = verdicts.judge_better("a beats b", Spread.of(a), Spread.of(b), "x", paired=paired)
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert (found.numbers["low"], found.numbers["high"]) == pytest.approx((low, high))
    clear = test.pvalue < 0.05
    expected = (
        verdicts.UNRESOLVED
        if not clear
        else verdicts.CONFIRMED
        if test.statistic > 0
        else verdicts.CONTRADICTED
    )
    assert found.outcome == expected
    turned = verdicts.judge_better("b beats a", Spread.of(b), Spread.of(a), "x", paired=paired)
    assert {found.outcome, turned.outcome} in (
        {verdicts.UNRESOLVED},
        {verdicts.CONFIRMED, verdicts.CONTRADICTED},
    )


def test_intervals_of_moments_and_of_no_spread():
    known = verdicts.judge_better("a", Spread.stated(90, 1.0, 3), Spread.stated(60, 1.0, 3), "x")
    assert known.ok and known.numbers["effect"] == pytest.approx(30)  # moments are enough
    equal = verdicts.judge_better("a", _spread(2, 2, 2), _spread(1, 1, 1), "x")
    assert equal.ok and equal.numbers["low"] == 1 and np.isnan(equal.numbers["effect"])
    assert verdicts.judge_better("a", _spread(np.nan, 1), _spread(0, 0), "x").outcome == verdicts.UNRESOLVED


def test_pairs_are_judged_by_their_differences():
    a, b = _spread(10, 20, 30), _spread(9, 18.5, 29)
    assert not verdicts.judge_better("", a, b, "x").ok
    verdict = verdicts.judge_better("", a, b, "x", paired=True)
    assert verdict.ok and verdict.numbers["standard_error"] == pytest.approx(
        np.std([1, 1.5, 1], ddof=1) / 3**0.5
    )
    assert ", paired:" in verdict.shown


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: verdicts.judge_better("a beats b", _spread(1), _spread(0, 1), "x"), "at least 2 repetitions.*not 1 and 2"),
        (lambda: verdicts.judge_better("a beats b", [1, 2], _spread(0, 1), "x"), "Spreads, not list"),
        (lambda: verdicts.judge_better("a beats b", _spread(1, 2), 3.0, "x"), "Spreads, not float"),
        (lambda: verdicts.judge_better("a", _spread(1, 2), _spread(1, 2, 3), "x", paired=True), "2 pairs, not 2 and 3"),
        (lambda: verdicts.judge_better("a", Spread.stated(1, 1, 3), _spread(1, 2, 3), "x", paired=True), "not 0 and 3"),
        (lambda: verdicts.judge_better("a", _spread(1, 2), _spread(1, 2), " "), "needs its source"),
        (lambda: verdicts.judge_close("acc", 1, 1, 0), "tolerance"),
        (lambda: Spread.of([]), "no values"),
    ],
)  # fmt: skip
def test_a_judgement_without_numbers_is_refused(call, says):
    with pytest.raises(CompanionError, match=says):
        call()


def test_close_refuses_nothing_silently():
    assert not verdicts.judge_close("acc", float("nan"), 1, 0.5).ok
    assert verdicts.judge_close("acc", 1.5, 1, 0.5).ok


def test_the_comparison_of_notebooks_drops_the_numbers_of_verdicts_alone():
    (pattern,) = get_sanitize_patterns((ROOT / "tests" / "nbval_sanitize.cfg").read_text())
    lines = [
        verdicts.judge_better("DM beats random [sic]", _spread(value, 86), _spread(60, 64), "Table 1").line
        for value in (85, 87)
    ]
    kept = [re.sub(*pattern, "before [1]\n" + line + "\nafter [2]") for line in lines]
    assert lines[0] != lines[1] and kept[0] == kept[1]
    assert kept[0].splitlines()[0::2] == ["before [1]", "after [2]"] and "DM beats random" in kept[0]
    other = verdicts.judge_better("DM beats random [sic]", _spread(1, 2), _spread(60, 64), "Table 1").line
    assert re.sub(*pattern, other) != re.sub(*pattern, lines[0])  # the judgement is compared


def test_run_json_says_where_everything_comes_from(begin, tmp_path):
    run = begin("20_dm", seed=2, dataset="digits", title="DM", claim="Means are enough.")
    with run.stage("distil"):
        with mmap.mmap(-1, 64 * 2**20) as fresh:  # pages that no earlier test can have left behind
            fresh.write(b"x" * len(fresh))
    with run.stage("distil"):
        pass
    run.record(images=torch.tensor([1, 2]), rate=float("inf"))
    run.headline(ours="86.4", published="26.0")
    run.check("is", True, difference=float("nan"))
    run.save_table(pd.DataFrame({"a": [1.5]}))
    run.save_set(_Set(), "dm-digits-1")
    run.finish()
    record = json.loads((tmp_path / "results/cpu+dataset=digits+seed=2+by-hand/20_dm/run.json").read_text())
    assert (record["title"], record["claim"], record["parameters"]["seed"]) == ("DM", "Means are enough.", 2)
    assert record["cases"] == [["digits", 1]]
    assert record["config"] == {"images": [1, 2], "rate": None}  # JSON knows no infinity
    verdict = {"text": "is", "source": "", "outcome": "holds", "said": "is [difference = nan]"}
    assert record["verdicts"] == [verdict | {"numbers": {"difference": None}}]
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


def test_the_run_folder_follows_the_parameters(begin, tmp_path, monkeypatch):
    """What run_all.sh calls the run, where its parameters are these; else a place of its own, which the parameters name."""
    assert begin(profile="overnight").results == tmp_path / "results/overnight+by-hand/20_dm"
    monkeypatch.setenv("COMPANION_RUN", "cpu+ipc=5+size=16")
    run = begin(ipc=5)
    assert run.results == tmp_path / "results/cpu+ipc=5+size=16/20_dm"
    assert run.figures == tmp_path / "figures/cpu+ipc=5+size=16/20_dm"
    assert begin(ipc=2).name == "cpu+ipc=2+by-hand"
    assert begin(ipc=5, seed=1, profile="overnight").name == "overnight+ipc=5+seed=1+by-hand"
    monkeypatch.setenv("COMPANION_RUN", "cpu")
    assert begin().name == "cpu" and begin(dataset="photos16").name == "cpu+dataset=photos16+by-hand"


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
    heavy = "matplotlib seaborn pandas sklearn torchvision nbformat IPython lib.methods.dm".split()
    code = f"import sys, lib.companion; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def _row(*values, **changes):
    fields = dict(
        notebook="20_dm", method="dm", config="0" * 12, dataset="digits", ipc=1, network="convnet-d2-w32"
    )
    fields |= dict(
        protocol="dc",
        labels="hard",
        seeds="seed 0: 3 sets x 5 networks",
        accuracy=Spread.of(values or [86.4]),
    )
    return tables.Row(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": "firm"}, "label type 'firm'.*hard, soft"),
        ({"accuracy": Spread.of([864])}, "percent"),
        ({"accuracy": 86.4}, "Spread in percent.*86.4"),
        ({"method": "DM"}, "unknown method 'DM'.*did you mean 'dm'"),
        ({"config": "DM()"}, "12 hexadecimal digits.*'DM"),
    ],
)
def test_rows_refuse_what_would_spoil_a_comparison(changes, says):
    with pytest.raises(CompanionError, match=says):
        _row(**changes)


def test_the_table_survives_the_file(begin, tmp_path):
    run = begin()
    rows = [_row(85.15, 86.4, 87.65, networks=5, config="123456789e12"), _row(method="random", variant="x")]
    shown = run.save_table(tables.rows_to_frame(rows))
    back = tables.read_tables(tmp_path / "results")
    assert list(back.columns) == ["run", *tables.COLUMNS]
    assert list(back["method"]) == ["dm", "random"] and list(back["variant"]) == ["", "x"]
    assert back["acc_sd"][0] == 1.25 and np.isnan(back["acc_sd"][1]) and list(back["n"]) == [3, 1]
    assert back["config"][0] == "123456789e12"  # no number
    assert list(shown["method"]) == ["DM", "random real images (x)"]
    assert list(shown["accuracy (%)"]) == ["86.4 ± 1.2", "86.4"] and list(shown["n"]) == ["3 x 5", "1 x 1"]
    assert "published" not in shown.columns  # nothing published, no column
    assert tables.spreads(back)["DM"] == Spread.stated(86.4, 1.25, 3)
    begin("90_leaderboard").save_table(tables.rows_to_frame(rows))
    assert (
        len(tables.read_tables(tmp_path / "results")) == 2
    )  # what another notebook copies does not count twice
    (tmp_path / "results/cpu+by-hand/20_dm/table.csv").write_text("foreign,columns\n1,2\n")
    assert tables.read_tables(tmp_path / "results").empty


def test_one_row_stands_for_a_method():
    rows = [
        _row(80, notebook="12_dc", method="random"),
        _row(84, 88, notebook="00_start_here"),
        _row(85, notebook="20_dm"),  # its own notebook, though fewer repetitions
        _row(99, notebook="20_dm", variant="noise init", config="1" * 12),
        _row(70, notebook="20_dm", protocol="dsa"),
        _row(71, 72, notebook="30_dsa", method="random"),
    ]
    chosen = tables.standing(tables.rows_to_frame(rows))
    assert list(zip(chosen["method"], chosen["acc"], strict=True)) == [
        ("dm", 85),
        ("dm", 70),
        ("random", 71.5),
    ]
    runs = tables.rows_to_frame(rows).assign(run=["a", "a", "b", "b", "b", "b"])
    assert list(tables.standing(runs)["acc"]) == [80, 86, 85, 70, 71.5]  # runs are never mixed
    assert tables.standing(tables.rows_to_frame([])).empty
    with pytest.raises(CompanionError, match="two rows of DM"):
        tables.spreads(chosen)


def test_two_settings_of_one_result_are_an_error_that_names_both_notebooks():
    rows = [_row(86), _row(70, notebook="31_idc", config="1" * 12)]
    with pytest.raises(
        CompanionError, match=r"20_dm and 31_idc.*000000000000, 111111111111.*dm digits 1"
    ) as caught:
        tables.standing(tables.rows_to_frame(rows))
    assert "\n" not in str(caught.value)
    named = [rows[0], _row(70, notebook="31_idc", config="1" * 12, variant="few steps")]
    assert list(tables.standing(tables.rows_to_frame(named))["acc"]) == [86]


def test_how_a_method_is_written():
    assert tables.label("dm") == "DM" and tables.label("ddm", "gram") == "DDM (gram)"
    assert tables.label("full data") == "full data"


def test_readable_frames_show_no_digit_that_is_not_stable():
    frame = pd.DataFrame({"x": [0.123456, None], "steps": [100.0, 200.0], "name": ["a", None], "n": [1, 2]})
    shown = tables.readable(frame, digits=2)
    assert shown.to_dict("list") == {
        "x": ["0.12", ""],
        "steps": ["100", "200"],
        "name": ["a", ""],
        "n": [1, 2],
    }


def test_a_spread_is_written_alike_everywhere():
    spread = Spread.of([85.2, 86.4, 87.6])
    assert (spread.n, spread.mean, spread.sd) == (3, pytest.approx(86.4), pytest.approx(1.2))
    assert spread.se == pytest.approx(1.2 / 3**0.5)
    assert (str(spread), spread.text(count=True), spread.text(2)) == (
        "86.4 ± 1.2",
        "86.4 ± 1.2 (n=3)",
        "86.40 ± 1.20",
    )
    assert Spread.of([86.42]).text(count=True) == "86.4 (n=1)" and np.isnan(Spread.of([86.42]).sd)
    assert Spread.of(torch.tensor([0.25, 0.75]), 100).text() == "50.0 ± 35.4"
    assert Spread.stated(48.9, 0.6).text(count=True) == "48.9 ± 0.6"  # a paper that does not say how many
    shown = tables.readable(pd.DataFrame({"accuracy": [spread, None]}))
    assert list(shown["accuracy"]) == ["86.4 ± 1.2", ""]


def test_the_list_of_notebooks_comes_from_their_table_and_the_registry():
    text = contents.contents()
    assert all(f"]({path.name})" in text for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert "[20_dm](20_dm.ipynb)" in text and "Zhao & Bilen 2023" in text
    assert contents.methods_of("13_lcmat") == ["lcmat_c", "lcmat_s"]
    assert set(contents.FAMILIES) == {str(digit) for digit in range(10)}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of somebody's with a commit, and how to call git there."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(folder, *words) -> str:
        call = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y.z", *words]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()

    def make(folder) -> str:
        folder.mkdir(exist_ok=True)
        git(folder, "init", "-q")
        (folder / "file").write_text(folder.name)  # two of the same second with the same files would be one commit
        git(folder, "add", "file")
        git(folder, "commit", "-qm", "x")
        return git(folder, "rev-parse", "HEAD")

    return tmp_path / "theirs", make, git


def test_the_commit_is_that_of_the_project_or_none(repository, monkeypatch):
    """Not that of a repository around it, nor of one that the environment names, also where the project's files are part of it."""
    theirs, make, git = repository
    other = make(theirs)
    project = theirs / "vendored" / "companion"
    project.mkdir(parents=True)
    (project / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "ROOT", project)
    none = {"commit": None, "dirty": None}
    assert provenance.git_state() == none
    git(theirs, "add", "-A")
    git(theirs, "commit", "-qm", "with the project")
    assert provenance.git_state() == none
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(project))
    assert provenance.git_state() == none
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name)
    own = make(project)
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))
    assert own != other and provenance.git_state() == {"commit": own, "dirty": True}  # a.py is not in it
    monkeypatch.delenv("GIT_DIR")
    git(project, "add", "a.py")
    git(project, "commit", "-qm", "y")
    git(project, "worktree", "add", "-q", str(theirs / "tree"))
    monkeypatch.setattr(provenance, "ROOT", theirs / "tree")
    assert provenance.git_state() == {"commit": git(project, "rev-parse", "HEAD"), "dirty": False}
