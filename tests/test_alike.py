"""A set is judged by the data it stands for; anything else is one line, not a number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib import data as datasets
from lib.distill import distill
from lib.evaluate import evaluate, protocol
from lib.evaluate.alike import check_alike, same_space
from lib.evaluate.regression import evaluate_regression, regression
from lib.methods import method
from lib.system.errors import CompanionError


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def picks(digits):
    return distill(method("random")(), digits.train, 1).synset


def brief(data):
    return protocol("cpu-small", data.train, epochs=1, network="mlp")


def test_a_whitened_set_is_not_judged_on_plain_images(digits, picks):
    white = datasets.load("digits", whiten="zca")
    own = distill(method("random")(), white.train, 1).synset
    assert evaluate(own, white, brief(white), networks=1).accuracy.shape == (1, 1)
    with pytest.raises(CompanionError, match="its own 'zca' transform.*another .'standardise'.*whiten='zca'"):
        evaluate(own, digits, brief(digits), networks=1)
    with pytest.raises(CompanionError, match="another"):
        evaluate_regression(picks, white, regression("digits", 1), networks=1)


def test_other_classes_and_sizes_are_named(digits, picks):
    fashion = datasets.load("fashion14")
    with pytest.raises(CompanionError, match="classes 0, 1, 2, ... .10., the data 'fashion14' has"):
        evaluate(picks, fashion, brief(fashion), networks=1)
    renamed = replace(fashion.test, classes=picks.classes)
    with pytest.raises(CompanionError, match="images of 1 x 8 x 8, the data 'fashion14' of 1 x 14 x 14"):
        check_alike([picks], renamed)
    shifted = replace(
        digits.test, transform=replace(digits.test.transform, mean=digits.test.transform.mean + 0.1)
    )
    with pytest.raises(CompanionError, match="the data it was made of"):
        check_alike([picks], shifted)


def test_a_stored_set_is_at_home_again(digits, picks, tmp_path):
    picks.save(tmp_path / "set.safetensors")
    back = type(picks).load(tmp_path / "set.safetensors")
    assert same_space(back.transform, digits.test.transform)
    evaluate(back, digits, brief(digits), networks=1)


@pytest.mark.parametrize("seed", ["3", -1, 1.5, True, 2**63])
def test_seeds_that_are_none(digits, picks, seed):
    with pytest.raises(CompanionError, match="seed"):
        evaluate(picks, digits, brief(digits), seed=seed, networks=1)


def test_another_default_type_is_one_line(digits, picks):
    torch.set_default_dtype(torch.float64)
    try:
        for act in (
            lambda: distill(method("random")(), digits.train, 1),
            lambda: evaluate(picks, digits, brief(digits), networks=1),
        ):
            with pytest.raises(CompanionError, match="set_default_dtype.torch.float32"):
                act()
    finally:
        torch.set_default_dtype(torch.float32)
