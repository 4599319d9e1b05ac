"""The small settings are those of the best trial, and the trials never see a test image."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks import settings
from lib import data as datasets
from lib.methods import recipes

TRIALS = pd.read_csv(settings.TABLE)


@pytest.mark.parametrize("name", settings.TRIALS)
def test_a_recipe_has_the_best_value_that_was_tried(name):
    rows = TRIALS[TRIALS["method"] == name]
    ((field, values),) = settings.TRIALS[name].items()
    assert list(rows["value"]) == list(values) and set(rows["field"]) == {field}
    best = rows.loc[rows["accuracy"].idxmax(), "value"]
    assert getattr(recipes(name).named(settings.DATA).method, field) == best


def test_the_judges_are_training_images_that_no_trial_distils():
    data = datasets.load(settings.DATA)
    parts = settings.split(data)
    train, judge, test = (
        {row.numpy().tobytes() for row in part.images} for part in (parts.train, parts.test, data.test)
    )
    everything = {row.numpy().tobytes() for row in data.train.images}
    assert train | judge == everything and not train & judge and not judge & test - everything
    assert parts.test.counts.tolist() == [200] * 10 and parts.train.counts.tolist() == [800] * 10
    again = settings.split(data)
    assert torch.equal(parts.test.images, again.test.images)


def test_an_unknown_method_is_one_line(capsys):
    assert settings.main(["--only", "dmm"]) == 2
    assert "did you mean 'dm'" in capsys.readouterr().err
