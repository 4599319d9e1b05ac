"""A method's state as plain values and back: a dataclass of tensors, optimisers, ensembles and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lib.nets.ensemble import Ensemble


def pack(state: Any) -> dict[str, Any]:
    """A copy of the state's fields as plain values. Fields marked ``metadata={"constant": True}`` are left to ``begin``."""
    return {name: _copy(value) for name, value in _fields(state)}


def unpack(state: Any, packed: Mapping[str, Any]) -> None:
    """Put packed values back, in place where there is a place (leaf tensors stay the ones their optimiser knows)."""
    for name, value in _fields(state):
        new = packed[name]
        if isinstance(value, Tensor) and isinstance(new, Tensor) and value.shape == new.shape:
            with torch.no_grad():
                value.copy_(new)
        elif isinstance(value, Ensemble):
            for mine, saved in ((value.parameters, new["parameters"]), (value.buffers, new["buffers"])):
                for key, tensor in mine.items():
                    with torch.no_grad():
                        tensor.copy_(saved[key])
        elif hasattr(value, "load_state_dict"):
            value.load_state_dict(new)
        elif dataclasses.is_dataclass(value):
            unpack(value, new)
        else:
            setattr(state, name, new)


def learned(state: Any) -> list[Tensor]:
    """The tensors of the state that carry gradients, those of networks and of states within it included."""
    found = []
    for _, value in _fields(state):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, torch.nn.Module):
            found += value.parameters()
        elif dataclasses.is_dataclass(value) and not hasattr(value, "state_dict"):
            found += learned(value)
    return [tensor for tensor in found if tensor.requires_grad]


def _fields(state: Any) -> list[tuple[str, Any]]:
    return [
        (field.name, getattr(state, field.name))
        for field in dataclasses.fields(state)
        if not field.metadata.get("constant")
    ]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Ensemble):
        return {"parameters": _copy(value.parameters), "buffers": _copy(value.buffers)}
    if hasattr(value, "state_dict"):
        return _copy(value.state_dict())
    if dataclasses.is_dataclass(value):
        return pack(value)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a state may hold tensors, optimisers, ensembles and plain values, not {type(value).__name__}"
    )
