"""What all tests share: one thread, a cache of their own, and tiny data."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # its assertions, too, show what they compared

from helpers import toy_data  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing that a test stores is found by another test, or by the user."""
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def toy():
    """3 classes, 20 training and 20 test images each, 8x8, one channel."""
    return toy_data()
