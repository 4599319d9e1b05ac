"""Menus: what is picked is what is chosen; without a person the parameters stay."""

from __future__ import annotations

import pytest

from lib.companion import menus
from lib.system.errors import CompanionError

PARTS = {"objective": ["DC", "DM"], "sampler": ["random", "representative"]}


def test_picking_changes_the_choice(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    choice = {"objective": "DM", "sampler": "random"}
    menus.choose(choice, PARTS, shown=True)
    first, second = shown[0].children
    assert (first.value, second.value) == ("DM", "random") and first.options == ("DC", "DM")
    second.value = "representative"
    assert choice == {"objective": "DM", "sampler": "representative"}


def test_without_a_person_the_choice_is_printed(capsys):
    choice = {"objective": "DM", "sampler": "random"}
    menus.choose(choice, PARTS, shown=False)
    assert capsys.readouterr().out == "objective: DM, sampler: random\n" and choice["objective"] == "DM"


def test_a_name_that_is_not_allowed():
    with pytest.raises(CompanionError, match="unknown sampler 'best'; allowed: random, representative"):
        menus.choose({"objective": "DM", "sampler": "best"}, PARTS, shown=False)
