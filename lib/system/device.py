"""Which device a run uses, told by name."""

from __future__ import annotations

import re

import torch

from lib.system.errors import CompanionError, unknown


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """``auto`` (the first GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N`` as a ``torch.device``.

    Raises:
        CompanionError: for another name, for CUDA on a machine without it, and for a GPU number that does not exist.
    """
    text = str(name)
    if text != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise unknown("device", text, ("auto", "cpu", "cuda", "cuda:N"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(text)
    if device.type == "cuda" and count == 0:
        raise CompanionError(
            f"device {text!r}: CUDA is not available on this machine; allowed here: auto, cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise CompanionError(f"device {text!r}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return device


def check_default_type() -> None:
    """Refuse another default type of new tensors than 32 bits, which a program may have set for itself: networks and data would not fit.

    Raises:
        CompanionError: naming the call that sets it back.
    """
    if torch.get_default_dtype() != torch.float32:
        raise CompanionError(
            f"torch's default type is {torch.get_default_dtype()}; here it must be torch.float32: torch.set_default_dtype(torch.float32)"
        )
