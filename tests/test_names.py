"""Every name a user can misspell ends in one line that lists what is allowed."""

from __future__ import annotations

import pytest

from lib import data, methods, nets
from lib.companion.profiles import profile_named
from lib.companion.published import published, quoted
from lib.evaluate import protocol
from lib.methods import dm
from lib.system.errors import CompanionError


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: data.load("digit"), "did you mean 'digits'"),
        (lambda: nets.parse("convnt"), "did you mean 'convnet'"),
        (lambda: nets.parse("convnet-d0"), "unknown option 'd0'"),
        (lambda: methods.method("dmm"), "unknown method 'dmm'"),
        (lambda: methods.preset(dm.PRESETS, "paperr"), "unknown preset 'paperr'"),
        (lambda: protocol("cpu-smal"), "unknown protocol 'cpu-smal'"),
        (lambda: protocol("dc", epoch=3), "unknown protocol field 'epoch'"),
        (lambda: profile_named("gpu"), "allowed: cpu, paper, photos"),
    ],
)
def test_a_wrong_name_is_one_line(call, said):
    with pytest.raises(CompanionError) as caught:
        call()
    message = str(caught.value)
    assert said in message and "allowed" in message and "\n" not in message


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_the_three_functions(name):
    made = methods.method(name)()
    assert all(callable(getattr(made, part)) for part in ("total_steps", "begin", "finish"))
    assert made.total_steps(1) == 0 or callable(made.step)


def test_settings_fall_back_to_the_published_ones():
    assert methods.settings(dm.PRESETS, "digits") is dm.PRESETS["digits"]
    assert methods.settings(dm.PRESETS, "svhn") is dm.PRESETS["paper"] == dm.DM()


def test_published_numbers_carry_their_source():
    frame = published()
    assert frame["source"].str.len().gt(10).all() and frame["acc"].between(0, 100).all()
    assert not frame.duplicated(["method", "dataset", "ipc"]).any()
    accuracy, source = quoted("DM", "cifar10", 10)
    assert accuracy == 48.9 and source.startswith("published, cifar10")
    assert quoted("DM", "digits", 1) is None
