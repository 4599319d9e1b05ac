"""Where a result comes from: code, versions, machine, memory."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from lib.evaluate.spread import Spread
from lib.system.files import ROOT
from lib.system.measure import process_peak

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "scikit-image", "pandas", "matplotlib", "safetensors")
# A run rewrites its own outputs, so these never count as a change of the code.
OUTPUTS = (":!results", ":!figures", ":!notebooks", ":!benchmarks/results.md")


def git_state() -> dict:
    """``{"commit": sha or None, "dirty": bool or None}``; None without git, and where the project is no repository of its own:
    one that it merely lies in, or that ``$GIT_DIR`` names, says nothing about it."""
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "HEAD") if top and Path(top).resolve() == ROOT.resolve() else None
    changes = _git("status", "--porcelain", "--", ".", *OUTPUTS) if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    # as set in hooks and by some editors, for another repository
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, env=own, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict:
    """Python's and the installed packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """What the computation ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_mb(device: torch.device) -> float:
    """Highest memory in MB (10^6 bytes): of the process on a CPU, since the last reset of the mark of the
    tensors on CUDA.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return process_peak() / 1e6


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: object) -> object:
    """``value`` as JSON can hold it: arrays and tensors as lists, NaN and infinity as None, anything else as
    text; a Spread as its moments and values.
    """
    if isinstance(value, Spread):
        value = dataclasses.asdict(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
