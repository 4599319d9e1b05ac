"""The short form of ``kill_run.py``: a few processes of a run are killed at random moments, and nothing is lost or half-written."""

from __future__ import annotations

from kill_run import make, torment


def test_random_kills_lose_nothing_and_leave_nothing_half_written(tmp_path):
    hit = torment(make(tmp_path / "a project"), kills=2)
    assert hit.total() >= 2
