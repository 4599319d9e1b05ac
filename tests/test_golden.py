"""Our code against reference vectors: every file of ``$GOLDEN_DIR`` (default ``tests/golden``).

A file without a case is reported as *not covered* (a skip with that reason); an output array that a case does not return fails
by name.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
DIRECTORY = Path(os.environ.get("GOLDEN_DIR", HERE / "golden"))
_spec = importlib.util.spec_from_file_location("golden_cases", HERE / "golden" / "cases.py")
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def test_there_are_vectors():
    assert list(DIRECTORY.glob("*.npz")), f"no .npz file in {DIRECTORY}"


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.npz")), ids=lambda path: path.stem)
def test_golden(path: Path):
    if path.stem not in cases.CASES:
        pytest.skip(f"not covered: no case for {path.name} yet")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    got = cases.CASES[path.stem](arrays)
    inputs = {name for pattern in cases.INPUTS[path.stem] for name in fnmatch.filter(arrays, pattern)}
    expected = [name for name in arrays if name not in inputs]
    assert expected, f"{path.name} holds no outputs"
    wrong = [problem for name in expected if (problem := compare(path.stem, name, arrays[name], got))]
    assert not wrong, "; ".join(wrong)


def compare(case: str, name: str, want: np.ndarray, got: dict) -> str | None:
    """None, or what is wrong with one output."""
    if name not in got:
        return f"{name} is not reproduced"
    mine = got[name].detach().numpy() if isinstance(got[name], torch.Tensor) else np.asarray(got[name])
    if mine.shape != want.shape:
        return f"{name} has shape {mine.shape}, want {want.shape}"
    if want.dtype.kind in "USO":
        return None if (mine == want).all() else f"{name} differs"
    rtol, atol = cases.TOLERANCE[case]
    for pattern, own in cases.TOLERANCE.items():
        if fnmatch.fnmatchcase(f"{case}/{name}", pattern):
            rtol, atol = own
    mine, want = mine.astype(np.float64), want.astype(np.float64)
    error = np.where(np.isnan(mine) & np.isnan(want), 0.0, np.abs(mine - want))  # nan stands for "no value"
    bad = ~(error <= atol + rtol * np.nan_to_num(np.abs(want)))
    return f"{name}: {bad.sum()} of {bad.size} entries off, by up to {error.max():.3g}" if bad.any() else None
