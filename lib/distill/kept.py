"""The checkpoint of a distillation: one file of plain tensors, numbers and strings, replaced in one step."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib.system.errors import CompanionError
from lib.system.files import atomic

CONTENT = {"key", "configuration", "done", "generator", "state", "seconds", "history", "snapshots"}


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write what :func:`read_checkpoint` returns."""
    buffer = io.BytesIO()  # torch.save on a file hides a full disk behind an error of its own
    torch.save(dict(content), buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; nothing in it can run code."""
    try:
        packed = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(packed, dict) and CONTENT <= packed.keys():
            return packed
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        raise CompanionError(
            f"the checkpoint {path} is damaged ({type(error).__name__}): remove it to start again"
        ) from error
    raise CompanionError(f"{path} is not a checkpoint of ours: remove it or name another file")


def refuse_another(path: Path, packed: Mapping[str, Any], key: str, mine: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another run.

    Raises:
        CompanionError: its key is another; the line names the settings that differ.
    """
    if packed["key"] == key:
        return
    theirs = packed["configuration"]
    names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    what = ", ".join(f"{n}={theirs.get(n)!r} there, {mine.get(n)!r} here" for n in names)
    raise CompanionError(
        f"the checkpoint {path} is of another run ({what or 'other code'}); remove it or name another file"
    )
