"""Names of folders and files, decided by what a run is about."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

BY_HAND = "by-hand"  # part of the name of a run that run_all.sh did not start
CASE_PARAMETERS = ("dataset", "ipc", "seed")  # of every notebook, apart from the profile


def without_usual(parameters: Mapping[str, object]) -> dict[str, object]:
    """The parameters without those of a case that say what holds anyway: none at all, and seed 0."""
    return {
        name: value
        for name, value in parameters.items()
        if name not in CASE_PARAMETERS or value is not None and (name, value) != ("seed", 0)
    }


def run_name(profile: str, changed: Mapping[str, object], *parts: str) -> str:
    """Name of the folder of a run under ``results/`` and ``figures/``, decided by its parameters: ``cpu``, or
    ``cpu+dataset=photos16+ipc=10``.

    Args:
        changed: the parameters that differ from the notebook's defaults; parts: further words.
    """
    return "+".join([profile, *(f"{name}={word(value)}" for name, value in sorted(changed.items())), *parts])


def word(value: object, longest: int = 40) -> str:
    """A value as part of a file name: ``folder:/my/pets@32`` is ``folder-pets-32-`` and four digits that tell it from
    ``folder:/your/pets@32``.

    Letters of other scripts go, too; what needs no change has none.
    """
    text = str(value)
    if len(text) <= longest and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        return text
    own = re.sub(r"^folder:.*/", "folder:", text)
    kept = re.sub(r"[^A-Za-z0-9._]+", "-", own).strip("-.")[:longest]
    return f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:4]}".lstrip("-")
