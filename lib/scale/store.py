"""The files of units: written in one step, recognised as whole, and refused when they are of another configuration.

A file is one safetensors file. Its header holds the configuration that the unit was computed from and a hash of its tensors.
A file that was cut short counts as absent and is computed again; one of another configuration is never overwritten, and one
whose tensors are not those written is refused when it is read, both by name in one line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from lib.distill import describe
from lib.evaluate.soft_labels import VIEWS
from lib.scale.plan import Run
from lib.scale.units import STAGES, Unit, method, recipe, units
from lib.synset import read_safetensors
from lib.system.cache import digest
from lib.system.checkpoint import Checkpoint
from lib.system.code import code_digest
from lib.system.errors import CompanionError
from lib.system.files import write_tensors, write_text

FORMAT = "distillation-companion-unit/1"
FILES = "files of "

# -- what their files depend on -------------------------------------------------------------------------------------------


def configuration(run: Run, one: Unit) -> dict[str, Any]:
    """Everything that the content of a unit's file depends on, as plain values; files that it reads by their hash, if there."""
    plan, chosen = run.plan, describe(method(run))
    fields = {name: getattr(plan, name) for name in ("data", "seed", "precision", "channels_last")}
    fields |= {"size": run.form.size, "resize": plan.scaled[1]}
    fields |= {"classes": run.form.num_classes, "teacher": chosen.pop("teacher"), "unit": one.about}
    if one.stage != "squeeze":
        fields |= {"method": chosen, "ipc": plan.ipc, "classes_per_unit": plan.classes_per_unit}
        fields |= {"images": plan.images}
        fields |= {} if plan.images and one.stage == "recover" else _contents(run, "squeeze")
    if one.stage in ("relabel", "train", "aggregate"):
        protocol = dataclasses.asdict(recipe(run))
        training = () if one.stage == "relabel" else ("temperature", "lr", "weight_decay")
        fields |= {f"relabel.{name}": protocol[name] for name in (*VIEWS, *training)}
        fields |= {"labels": plan.labels} | _contents(run, "recover")
    if one.stage in ("train", "aggregate"):
        fields |= {"columns": plan.columns, "validate_every": plan.validate_every}
    if one.stage == "relabel":
        fields["epochs_per_unit"] = plan.epochs_per_unit
    if one.stage == "aggregate":
        fields |= _contents(run, "train")
    return json.loads(json.dumps(fields))


def _contents(run: Run, stage: str) -> dict[str, str]:
    """``{"files of <stage>": hash}``; nothing while one of them is missing."""
    paths = [one.path(run) for one in units(run, stage)]
    if any(not path.is_file() or damage(path) for path in paths):
        return {}
    return {FILES + stage: digest([header(path)["content"] for path in paths])}


# -- files ----------------------------------------------------------------------------------------------------------------


def save(run: Run, one: Unit, tensors: Mapping[str, Tensor], **about: Any) -> None:
    """Write a unit's tensors and plain values, with what they were computed from, in one step."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = {
        "format": FORMAT,
        "configuration": configuration(run, one),
        "content": content(tensors),
        "about": about,
    }
    # one entry: the order of several would differ from process to process
    write_tensors(one.path(run), tensors, {"unit": json.dumps(head, sort_keys=True)})


def keeping(run: Run, one: Unit, part: str = "") -> Checkpoint:
    """Where a unit under way is kept, to be taken up by whoever computes it next, with the same code."""
    key = digest(configuration(run, one), code_digest("lib.scale.stages"))
    return Checkpoint(run.folder / "checkpoints" / f"{one.stage}-{one.number:04d}{part}.safetensors", key)


def save_summary(run: Run, one: Unit, table: str, curves: str, **about: Any) -> None:
    """Write the tables and, last, their summary: the unit of the stage ``aggregate``."""
    write_text(run.folder / "table.csv", table)
    write_text(run.folder / "curves.csv", curves)
    head = {
        "format": FORMAT,
        "configuration": configuration(run, one),
        "content": digest(table, curves),
        "about": about,
    }
    write_text(one.path(run), json.dumps(head, indent=1, sort_keys=True) + "\n")


def read(run: Run, one: Unit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save` wrote.

    Raises:
        CompanionError: the file is missing, cut short, of another configuration, or its tensors are not those written.
    """
    path = one.path(run)
    if not done(run, one):
        raise CompanionError(damage(path) or f"{one} is not there yet: no file {path}")
    tensors = read_safetensors(path)[1]
    head = header(path)
    if content(tensors) != head["content"]:
        again = f"python -m lib.scale run --out {run.folder} --stage {one.stage} --unit {one.number} --force"
        raise CompanionError(
            f"{path} is damaged: its content is not what was written; make it again: {again}"
        )
    return tensors, head["about"]


def done(run: Run, one: Unit) -> bool:
    """Whether the unit's file is there and complete (a file that was cut short is not).

    Raises:
        CompanionError: it was computed from another configuration.
    """
    path = one.path(run)
    if not path.is_file() or damage(path):
        return False
    theirs, mine = header(path)["configuration"], configuration(run, one)
    known = mine.keys() | {name for name in theirs if not name.startswith(FILES)}
    other = [name for name in sorted(known) if mine.get(name) != theirs.get(name)]
    if other and one.stage == "aggregate":  # seconds of work over files that are all checked
        return False
    if other:
        what = ", ".join(f"{name}={theirs.get(name)!r} there, {mine.get(name)!r} here" for name in other)
        raise CompanionError(
            f"{path} is of another configuration ({what}); name another folder or remove the file"
        )
    return True


def damage(path: Path) -> str:
    """Why the file is not a whole unit, in one line; empty for a whole one and where there is none."""
    if not path.is_file():
        return ""
    try:
        header(path)
    except CompanionError as error:
        return str(error)
    return ""


def header(path: Path) -> dict[str, Any]:
    """The header of a unit's file; the tensors are not read, but that the file has its whole length is certain.

    Raises:
        CompanionError: no such file; a file cut short or of another kind.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise CompanionError(f"no file {path}") from error
    return _header(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=100_000)
def _header(path: Path, _changed: int, _size: int) -> dict[str, Any]:
    try:
        if path.suffix == ".json":
            head = json.loads(path.read_text(encoding="utf-8"))
        else:
            with safetensors.safe_open(path, framework="pt") as file:
                head = json.loads((file.metadata() or {}).get("unit", "{}"))
        if head.get("format") == FORMAT and {"configuration", "content", "about"} <= head.keys():
            return head
    except (safetensors.SafetensorError, OSError, ValueError, AttributeError) as error:
        raise CompanionError(f"{path} is damaged ({' '.join(str(error).split())})") from error
    raise CompanionError(f"{path} is damaged: it is no unit of ours")


def content(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the tensors of a unit."""
    return digest(dict(sorted(tensors.items())))


def discard_damaged(run: Run) -> list[str]:
    """Remove the files that were cut short, so that a scheduler that looks at names sees what is missing; a line for each."""
    found = [one.path(run) for stage in STAGES for one in units(run, stage)]
    lines = [text for path in found if (text := damage(path))]
    for path in found:
        if damage(path):
            path.unlink()
    return [f"{text}: removed, will be computed again" for text in lines]
