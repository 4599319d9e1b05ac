"""Every name a user can misspell ends in one line that lists what is allowed."""

from __future__ import annotations

from collections import Counter

import pytest

from lib import data, methods, nets
from lib.companion.profiles import profile_named
from lib.companion.published import OTHERS, numbers, published, quoted
from lib.evaluate import Spread, protocol
from lib.system.errors import CompanionError
from lib.system.files import ROOT


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: data.load("digit"), "did you mean 'digits'"),
        (lambda: nets.parse("convnt"), "did you mean 'convnet'"),
        (lambda: nets.parse("convnet-d0"), "unknown option 'd0'"),
        (lambda: methods.method("dmm"), "unknown method 'dmm'"),
        (lambda: methods.recipes("dmm"), "unknown method 'dmm'"),
        (lambda: methods.recipes("dm").named("digits", 1, "papr"), "unknown variant 'papr'"),
        (lambda: protocol("cpu-smal"), "unknown protocol 'cpu-smal'"),
        (lambda: protocol("dc", epoch=3), "unknown protocol field 'epoch'"),
        (lambda: profile_named("gpu"), "allowed: cpu, overnight, paper"),
        (lambda: published(["DM"]), "unknown published method 'DM'"),
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


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_is_known_by_its_name(name):
    entry = methods.METHODS[name]
    made = methods.method(name)(**entry.fields)
    assert methods.name_of(made) == name and methods.title_of(name) == entry.title


def test_two_modules_have_two_names():
    """A reader who is told `lib/select/rules.py` has one file to look for; plain versions are named as their methods."""
    files = [path for room in ("lib", "workflow") for path in (ROOT / room).rglob("*.py")]
    counted = Counter(path.name for path in files if path.parent != ROOT / "lib" / "plain")
    twice = {name for name, count in counted.items() if count > 1} - {"__init__.py", "__main__.py"}
    assert not twice, f"two modules are called {', '.join(sorted(twice))}"


def test_the_rules_of_coresets_share_a_table():
    for name in ("craig", "log_det"):
        rows = list(methods.recipes(name))
        assert {row.method.rule for row in rows} == {name} and {"digits", "cifar10"} <= {
            row.data for row in rows
        }


def test_published_numbers_carry_their_source():
    frame = numbers()
    assert frame["source"].str.len().gt(10).all() and frame["acc"].between(0, 100).all()
    assert not frame.duplicated(["method", "variant", "dataset", "ipc"]).any()
    assert set(frame["method"]) <= {*methods.METHODS, *OTHERS}
    accuracy, source = quoted("dm", "cifar10", 10)
    assert accuracy == Spread.stated(48.9, accuracy.sd) and source.startswith("published, cifar10")
    assert quoted("dm", "digits", 1) is None and quoted("dm", "cifar10", 10, "noise init") is None


def test_published_numbers_are_shown_as_ours_are():
    shown = published(["dm", "full data"], ["cifar10"], [10])
    assert list(shown["method"]) == ["DM", "DM (DDM authors' rerun)"] and set(shown["IPC"]) == {"10"}
    assert shown["accuracy (%)"].str.fullmatch(r"\d+\.\d( ± \d+\.\d)?").all()
    assert set(published(["full data"], ["cifar10"])["IPC"]) == {"all"}
