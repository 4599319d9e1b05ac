"""The lines of the overnight runs: one for every verdict, renewed notebook by notebook."""

from __future__ import annotations

import json

import pytest

from lib.companion import verdicts
from lib.evaluate.spread import Spread
from lib.system.files import ROOT
from workflow.pages import evidence, readme


@pytest.fixture
def ran(tmp_path):
    def record(notebook: str, *judged: verdicts.Verdict) -> None:
        lines = [{"text": v.text, "source": v.source, "outcome": v.outcome, "said": v.said} for v in judged]
        folder = tmp_path / "results" / "overnight" / notebook
        folder.mkdir(parents=True, exist_ok=True)
        found = {"notebook": notebook, "verdicts": lines, "git": {"commit": "0" * 40}}
        (folder / "run.json").write_text(json.dumps(found))

    record.root = tmp_path
    return record


CLAIM = verdicts.judge_better(
    "DM [at IPC 1] beats random (8 draws)",
    Spread.of([86.0, 87, 85]),
    Spread.of([60.0, 64, 68]),
    "Table 1 (left)",
)
CHECK = verdicts.judge_check("the loss falls in every run", True)
LATER = verdicts.judge_untested("DM scales", "section 4.2", "CIFAR-10")


def test_a_line_has_claim_source_and_numbers_apart(ran):
    ran("20_dm", CLAIM, CHECK, LATER)
    evidence.write(ran.root)
    first, second, third = evidence.stored(ran.root).to_dict("records")
    assert (first["claim"], first["source"], first["outcome"]) == (CLAIM.text, CLAIM.source, "confirmed")
    assert first["numbers"] == CLAIM.shown and first["numbers"].startswith("86.0 ± 1.0 (n=3) against 64.0")
    assert (second["outcome"], second["source"], second["numbers"]) == ("holds", "", "")
    assert (third["outcome"], third["numbers"]) == ("not tested here", "needs CIFAR-10")


def test_a_run_renews_its_own_rows_and_leaves_the_others(ran):
    ran("20_dm", CLAIM, CHECK)
    ran("30_dsa", CHECK)
    before = evidence.write(ran.root)
    (ran.root / "results/overnight/30_dsa/run.json").unlink()
    ran("20_dm", CHECK)
    ran("12_dc", LATER)
    after = evidence.write(ran.root)
    assert list(before["notebook"]) == ["20_dm", "20_dm", "30_dsa"]
    assert list(zip(after["notebook"], after["outcome"], strict=True)) == [
        ("12_dc", "not tested here"),
        ("20_dm", "holds"),
        ("30_dsa", "holds"),
    ]


def test_the_counts_say_what_the_longer_profile_found(ran):
    record = {"20_dm": {"verdicts": [{"outcome": "confirmed"}]}}
    assert "overnight" not in readme.counts(record, evidence.stored(ran.root))
    ran("20_dm", CLAIM, CHECK, LATER)
    told = readme.counts(record, evidence.write(ran.root)).split("\n\n")[1]
    assert "run for 1 of the notebooks: of 2 claims" in told
    assert "1 are confirmed, 1 are not tested here; of 1 checks (identities, costs, sanity), 1 hold." in told


def test_the_committed_lines_are_those_of_the_committed_runs():
    table = evidence.stored(ROOT)
    assert evidence.renewed(ROOT).equals(table)
    assert set(table["outcome"]) <= set(verdicts.CLAIMS + verdicts.CHECKS)
