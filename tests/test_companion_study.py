"""Results by case, rows with an identity, and what a notebook shows of settings and algorithms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib import plain
from lib.companion import shown, start, tables
from lib.companion.study import Case
from lib.distill import settings_digest
from lib.match.features import ClassMean
from lib.match.style import Gram
from lib.methods.about import value_text
from lib.methods.dm import DM
from lib.system.errors import CompanionError


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_OUT", str(tmp_path))
    monkeypatch.delenv("COMPANION_RUN", raising=False)
    strict = torch.are_deterministic_algorithms_enabled()
    run = start("20_dm")
    torch.use_deterministic_algorithms(strict)
    return Case(run, "digits", 1)


@pytest.fixture
def quick(case):
    """A result of few steps and epochs."""
    method = replace(case.recipe("dm").method, iterations=2, real_batch=4)
    brief = replace(case.plain, epochs=1, name="brief")
    return case.study(method, "two steps", brief, sets=2, networks=1)


@pytest.mark.filterwarnings("ignore:the prior")  # trained for a step
def test_new_images_in_every_epoch_are_a_row_of_their_own(case):
    method = case.recipe("dim").method
    method = replace(method, iterations=1, prior=replace(method.prior, steps=1), pool=("convnet-d1-w4",))
    brief = replace(case.plain, epochs=1, name="brief")
    fixed = case.study(method, "one step", brief, sets=2, networks=1)
    fresh = case.fresh(fixed, 3, brief, networks=1)
    assert fresh.distilled is fixed.distilled and fresh.evaluation.accuracy.shape == (2, 1)
    rows = tables.rows_to_frame([case.row(fixed), case.row(fresh)])
    assert rows["protocol"].tolist() == ["brief", "fresh-brief"] and rows["config"].nunique() == 1


def test_cases_of_the_same_data_and_ipc_are_one_key(case):
    same, other = Case(case.run, "digits", 1), Case(case.run, "digits", 2)
    assert case == same and {case: 1}[same] == 1 and case != other and case != "digits IPC 1"
    assert case.small and case.plain.network == "convnet-d2-w32"


def test_recipes_are_found_by_name(case):
    assert case.recipe("dm").method.iterations == 200
    with pytest.raises(CompanionError, match="unknown variant 'noise'"):
        case.study("dm", "noise")


def test_a_result_knows_its_name(case, quick):
    assert (quick.name, quick.variant, quick.label) == ("dm", "two steps", "DM (two steps)")
    assert quick.spread.n == 2 and quick.spread == quick.evaluation.spread
    assert case.stem(quick) == "dm_two-steps_digits_ipc1"
    assert case.stem(replace(quick, variant="")) == "dm_digits_ipc1"
    again = case.under(quick, replace(case.plain, epochs=1, name="other"), networks=2)
    assert again.evaluation.accuracy.shape == (2, 2) and again.sets[0] is quick.sets[0]


def test_a_row_says_what_a_result_is(case, quick, monkeypatch):
    monkeypatch.setattr(Case, "full", quick.evaluation)
    row = case.row(quick, random=quick)
    assert (row.method, row.variant, row.config) == ("dm", "two steps", settings_digest(quick.method))
    assert (row.accuracy, row.networks, row.seeds) == (quick.spread, 1, "seed 0: 2 sets x 1 networks")
    assert quick.sets[0].meta["method"] == "dm" and quick.sets[0].meta["config"] == row.config
    assert [one.method for one in case.rows({"random": quick, "dm": quick})] == ["dm", "dm"]
    assert tables.rows_to_frame([row])["acc"][0] == quick.spread.mean


def test_a_row_refuses_a_name_that_is_not_true(case, quick, monkeypatch):
    monkeypatch.setattr(Case, "full", quick.evaluation)
    with pytest.raises(CompanionError, match="settings of DM on digits IPC 1 are not those of its recipe"):
        case.row(replace(quick, variant=""))
    changed = replace(case.plain, epochs=1)
    with pytest.raises(CompanionError, match="called 'cpu-small' but differs"):
        case.row(case.under(quick, changed, networks=1))


def test_settings_here_and_in_the_paper(case):
    table = case.run.settings(case, "dm")
    assert list(table.columns) == ["setting", "here: digits IPC 1", "paper: cifar10 IPC 1"]
    rows = dict(zip(table["setting"], zip(table.iloc[:, 1], table.iloc[:, 2], strict=True), strict=True))
    assert rows["iterations"] == ("200", "2e4") or rows["iterations"] == ("200", "20000")
    assert rows["evaluation"] == ("cpu-small", "dsa") and rows["evaluation: epochs"] == ("300", "1000")
    assert "lr" not in rows  # equal
    with pytest.raises(CompanionError, match="no published settings"):
        shown.paper_recipe("dm", "digits", 1, "none such")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (ClassMean() + Gram(1e4), "ClassMean + Gram(1e4)"),
        (ClassMean(), "ClassMean"),
        (1e4, "1e4"),
        (0.01, "0.01"),
        (20_000, "20000"),
        (12_345.0, "12345"),
        (None, "none"),
        (True, "yes"),
        ((1, "a"), "1, a"),
        (DM(iterations=3, lr=0.5), "DM(3, lr=0.5)"),
    ],
)
def test_settings_are_written_for_a_reader(value, text):
    assert value_text(value) == text


def test_the_algorithm_is_the_plain_version(case, capsys):
    case.run.algorithm("dm")
    assert capsys.readouterr().out.strip() == plain.text("dm")
    with pytest.raises(CompanionError, match="unknown method 'dmm'"):
        case.run.algorithm("dmm")
