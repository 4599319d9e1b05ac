"""A content-keyed cache of tensors: a stored result is found again only by the inputs and the code that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from lib.system.files import cache_dir, write_tensors


def digest(*parts: object) -> str:
    """SHA-256 of plain values, frozen dataclasses, tensors and containers of these, independent of process and machine.

    Raises:
        TypeError: for an object whose content has no canonical form.
    """
    return hashlib.sha256(json.dumps([_plain(part) for part in parts], sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous()
        return [
            "tensor",
            str(content.dtype),
            list(content.shape),
            hashlib.sha256(content.view(-1).view(torch.uint8).numpy()).hexdigest(),
        ]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"no canonical form for {type(value).__name__}")


def stored(
    key: str, compute: Callable[[], dict[str, torch.Tensor]], folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """``compute()``, or what it returned when it was last asked for under this key (CPU tensors either way).

    A damaged file counts as absent. ``key`` must hold everything that the result depends on, the code included:
    ``digest(config, data.fingerprint, code_digest("lib.methods.dm"))``.
    """
    path = (folder or cache_dir()) / f"{key}.safetensors"
    if path.is_file():
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError):
            path.unlink(missing_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    write_tensors(path, tensors)
    return tensors
