"""What the loop asks of a method, and what tells one run from another: its settings, and all that a result depends on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lib.synset import SyntheticSet
from lib.system.cache import digest
from lib.system.code import code_digest
from lib.system.errors import CompanionError


class Method(Protocol):
    """What :func:`lib.distill.distill` asks of a method: a frozen dataclass whose fields are the paper's hyper-parameters."""

    def total_steps(self, ipc: int) -> int: ...
    def begin(self, train, ipc: int, generator: torch.Generator) -> Any: ...
    def step(self, state: Any, generator: torch.Generator) -> dict[str, Tensor]: ...
    def finish(self, state: Any) -> SyntheticSet: ...


def no_negative(method: Any) -> None:
    """Refuse numbers among a method's fields that are negative, unless their default is, or not finite."""
    for field in dataclasses.fields(method):
        value, default = getattr(method, field.name), field.default
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least = min(0, default) if isinstance(default, (int, float)) else 0
        if number and value != default and not least <= value < math.inf:
            raise CompanionError(
                f"{type(method).__name__}: {field.name} {value!r} is not allowed: it must be finite and at least {least}"
            )


def describe(method: Method) -> dict[str, Any]:
    """Name and fields of a method, as plain values; parts that are values themselves say their kind."""
    fields = {field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)}
    return {"method": type(method).__name__} | fields


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def settings_digest(method: Method) -> str:
    """Twelve hexadecimal digits that tell the settings of a method: its class and the values of all its fields."""
    return digest(method)[:12]


def identity(method: Method) -> dict[str, Any]:
    """What tells one method and its settings from another: registry name, digest and the settings themselves."""
    from lib.methods import name_of  # the registry; it imports no method

    return {"method": name_of(method), "config": settings_digest(method), "settings": describe(method)}


def provenance(method: Method, train, ipc: int, seed: int) -> dict[str, Any]:
    about = {"dataset": train.name, "data_sha256": train.fingerprint, "ipc": ipc, "seed": seed}
    return identity(method) | about


def configuration_key(method: Method, train, ipc: int, seed: int) -> str:
    """Hash of everything that the result depends on, the code of the method included."""
    return digest(
        method,
        train.fingerprint,
        ipc,
        seed,
        train.device.type,
        code_digest(*sorted(_modules(method)), "lib.distill"),
    )


def _modules(value: Any) -> set[str]:
    """The modules of a method and of the values in its fields: a distance is written elsewhere than the method it is given to."""
    if isinstance(value, (tuple, list)):
        return set().union(*map(_modules, value))
    if not dataclasses.is_dataclass(value):
        return set()
    parts = (_modules(getattr(value, field.name)) for field in dataclasses.fields(value))
    return {type(value).__module__}.union(*parts)
