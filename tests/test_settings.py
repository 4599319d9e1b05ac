"""The small settings are those of the best trial, and the trials never see a test image."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks import settings
from benchmarks.settings import MOST, TRIALS, Trial
from lib import data as datasets
from lib.evaluate import Spread

TABLE = pd.read_csv(settings.TABLE, keep_default_na=False)


def name(trial: Trial) -> str:
    return " ".join(filter(None, (trial.method, trial.variant, trial.data)))


@pytest.mark.parametrize("trial", TRIALS, ids=name)
def test_a_recipe_has_the_best_value_that_was_tried_or_one_that_is_level_with_it(trial):
    rows = TABLE[trial.rows(TABLE)].set_index("value")
    best = rows.loc[rows["accuracy"].idxmax()]
    assert set(trial.values) <= set(rows.index) and set(rows["field"]) == {trial.field} and set(rows["ipc"]) == {trial.ipc}
    assert len(rows) >= MOST or min(rows.index) < best.name < max(rows.index)
    assert rows.loc[trial.value, "accuracy"] >= best["accuracy"] - best["sd"] / best["n"] ** 0.5


def test_the_table_holds_nothing_else():
    assert sum(trial.rows(TABLE).sum() for trial in TRIALS) == len(TABLE)


def test_values_beyond_the_grid_are_tried_until_the_best_lies_inside():
    optimum = Trial("dm", "digits", (0.1, 0.4, 1.0))
    rows = settings.trials(optimum, lambda lr: Spread.of([-abs(lr - 8.0)]))
    assert [row["value"] for row in rows] == [0.1, 0.4, 1.0, 3.0, 10.0, 30.0]
    down = settings.trials(optimum, lambda lr: Spread.of([-lr]))
    assert [row["value"] for row in down] == [
        0.003,
        0.01,
        0.03,
        0.1,
        0.4,
        1.0,
    ]  # at most MOST, the end is the best
    inside = settings.trials(optimum, lambda lr: Spread.of([-abs(lr - 0.4)]))
    assert [row["value"] for row in inside] == [0.1, 0.4, 1.0]


def test_the_judges_are_training_images_that_no_trial_distils():
    data = datasets.load("fashion14")
    parts = settings.split(data)
    train, judge, test = (
        {row.numpy().tobytes() for row in part.images} for part in (parts.train, parts.test, data.test)
    )
    everything = {row.numpy().tobytes() for row in data.train.images}
    assert train | judge == everything and not train & judge and not judge & test - everything
    assert parts.test.counts.tolist() == [200] * 10 and parts.train.counts.tolist() == [800] * 10
    again = settings.split(data)
    assert torch.equal(parts.test.images, again.test.images)


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["--only", "dmm"], "did you mean 'dm'"), (["--data", "digit"], "did you mean 'digits'")],
)
def test_an_unknown_name_is_one_line(capsys, words, hint):
    assert settings.main(words) == 2
    assert hint in capsys.readouterr().err
