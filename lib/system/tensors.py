"""Tensors that users pass: one line that says what is wrong with them, instead of an error from deep inside, or of a wrong number.

Modules of functions on tensors end in ``guard(globals())``. Of their public functions it refuses whole numbers where numbers with a
fraction are meant (bytes would wrap around), complex ones and tensors without content; and where a call fails, it looks for the
reason in what was passed: devices or types that differ, values that are not finite. What works is left as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lib.system.errors import CompanionError

# parameters that may hold whole numbers: labels, positions, masks; all others have a fraction
WHOLE = frozenset(
    "scores values labels partner valid correct nearest selected rows cols row_center col_center columns indices".split()
)
MASKED = frozenset({"values", "scores"})  # of these -inf marks what is not to be chosen
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError)


def check_tensor(
    what: str, value: object, *, floating: bool | None = True, finite: bool = True, like: Tensor | None = None
) -> None:
    """Refuse what is no tensor, of another type or device than needed, or not finite.

    Args:
        what: as the error calls it; floating: whether its values must have a fraction, None: either; like: of the same device.
    Raises:
        CompanionError: in one line.
    """
    if not isinstance(value, Tensor):
        raise CompanionError(f"{what} must be a tensor, not {type(value).__name__}")
    if value.device.type == "meta":
        raise CompanionError(f"{what} is on the device 'meta', which holds no values")
    if value.is_complex() or floating is not None and value.is_floating_point() != floating:
        kind = {True: "floating point numbers", False: "whole numbers", None: "real numbers"}[floating]
        raise CompanionError(f"{what} must hold {kind}, not {value.dtype}")
    if like is not None and value.device != like.device:
        raise CompanionError(f"{what} is on {value.device}, the other tensors on {like.device}")
    if finite and value.is_floating_point() and not bool(value.isfinite().all()):
        raise CompanionError(
            f"{int((~value.isfinite()).sum())} of {value.numel()} values of {what} are not finite"
        )


def check_labels(what: str, labels: Tensor, classes: int) -> None:
    """Refuse labels that are not class indices, 64-bit whole numbers from 0 to ``classes`` - 1."""
    if labels.dtype != torch.int64:
        raise CompanionError(f"{what} must be torch.int64, not {labels.dtype}")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise CompanionError(
            f"{what} go from {int(labels.min())} to {int(labels.max())}; allowed: 0 to {classes - 1}"
        )


def guard(namespace: dict[str, Any], finite: bool = False) -> None:
    """Put :func:`guarded` around the public functions of a module that take tensors.

    Args:
        finite: also refuse values that are not finite, where these would choose or decide something without a trace.
    """
    for name, function in list(namespace.items()):
        mine = isinstance(function, FunctionType) and function.__module__ == namespace["__name__"]
        if mine and not name.startswith("_") and _parameters(function):
            namespace[name] = guarded(function, finite)


def guarded(function: Callable, finite: bool = False) -> Callable:
    """The function, with one-line errors about the tensors that it is given."""
    positions = _parameters(function)

    @functools.wraps(function)
    def call(*words, **options):
        given = {name: words[i] for name, i in positions.items() if i < len(words)}
        given |= {name: options[name] for name in positions if name in options}
        for name, value in given.items():
            if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
                raise CompanionError(
                    f"{function.__name__}: {name} must be a tensor, not {type(value).__name__}"
                )
            if isinstance(value, Tensor):
                what, floating = (
                    f"{function.__name__}: {name}",
                    None if name in WHOLE or not value.dim() else True,
                )
                check_tensor(what, value, floating=floating, finite=finite and name not in MASKED)
                if finite and name in MASKED and bool(value.isnan().any()):
                    raise CompanionError(
                        f"{int(value.isnan().sum())} of {value.numel()} {name} are not finite"
                    )
        try:
            return function(*words, **options)
        except FAILURES as error:
            if isinstance(error, CompanionError) or not (reason := _reason(given)):
                raise
            raise CompanionError(f"{function.__name__}: {reason}") from error

    return call


def _parameters(function: FunctionType) -> dict[str, int]:
    """The parameters that are tensors by their annotation, with their positions."""
    names = list(inspect.signature(function).parameters)
    kinds = function.__annotations__
    return {name: i for i, name in enumerate(names) if "Tensor" in str(kinds.get(name, "")).split(" | ")}


def _reason(given: Mapping[str, object]) -> str:
    """What is wrong with the tensors of a call that failed; empty if nothing can be seen."""
    strange = [
        name for name, value in given.items() if not isinstance(value, (Tensor, float, int, type(None)))
    ]
    if strange:
        return f"{strange[0]} must be a tensor, not {type(given[strange[0]]).__name__}"
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    devices = {name: value.device for name, value in tensors.items() if value.dim()}
    types = {
        name: value.dtype for name, value in tensors.items() if value.is_floating_point() and value.dim()
    }
    for what, found in (("device", devices), ("type", types)):
        if len(set(found.values())) > 1:
            return f"one {what} is needed, not " + ", ".join(f"{name} {one}" for name, one in found.items())
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return f"{name} is not finite"
    return next(
        (f"{name} holds {value.dtype}" for name, value in tensors.items() if not value.is_floating_point()),
        "",
    )
