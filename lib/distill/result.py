"""A distilled set and how it came about; kept in the cache as one safetensors file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lib.synset import SyntheticSet, read_safetensors
from lib.system.errors import CompanionError
from lib.system.files import write_tensors


@dataclass(frozen=True)
class Distilled:
    """A distilled set and how it came about.

    Attributes:
        synset: the result.
        history: metric -> values, ``(steps,)``; snapshots: step -> stored images in [0, 1], ``(m, c, h, w)``.
        seconds, peak_bytes: of the whole distillation, ``begin`` included; measured when it was computed, not when it was
            found in the cache.
    """

    synset: SyntheticSet
    history: dict[str, Tensor]
    snapshots: dict[int, Tensor]
    seconds: float
    peak_bytes: int


def write_result(path: Path, result: Distilled) -> None:
    tensors = {f"set.{name}": tensor for name, tensor in result.synset.tensors().items()}
    tensors |= {f"history.{name}": values for name, values in result.history.items()}
    tensors |= {f"snapshot.{step}": images.contiguous() for step, images in result.snapshots.items()}
    header = result.synset.header() | {"seconds": repr(result.seconds), "peak_bytes": str(result.peak_bytes)}
    write_tensors(path, tensors, header)


def read_result(path: Path) -> Distilled | None:
    """The stored result; a damaged file counts as absent."""
    try:
        header, tensors = read_safetensors(path)
        part = {
            kind: {
                name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(kind + ".")
            }
            for kind in ("set", "history", "snapshot")
        }
        synset = SyntheticSet.from_parts(header, part["set"], path)
        snapshots = {int(step): images for step, images in part["snapshot"].items()}
        seconds, peak = float(header["seconds"]), int(header["peak_bytes"])
    except (CompanionError, KeyError, ValueError):
        return None
    return Distilled(synset, part["history"], snapshots, seconds, peak) if math.isfinite(seconds) else None
