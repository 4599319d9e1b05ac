"""Distilled sets that other notebooks stored, brought to one form."""

from __future__ import annotations

from pathlib import Path

from lib.companion.study import Case
from lib.synset import SyntheticSet
from lib.system.files import ROOT


def stored_sets(case: Case, folder: Path | None = None) -> dict[str, SyntheticSet]:
    """The sets in ``results/<run>/*/*.safetensors`` of this data set and IPC, by name (``dm``, ``idm``, ...), sorted by file.

    They are those of the project, also where a run writes elsewhere (``$COMPANION_OUT``): a notebook that is tested alone finds
    the committed ones. Of several files of one name the first is taken.
    """
    folder = folder or ROOT / "results" / case.run.name
    found: dict[str, SyntheticSet] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        if path.parent.name != case.run.notebook:
            one, name = SyntheticSet.load(path), path.stem.removesuffix(f"_{case.dataset}_ipc{case.ipc}")
            if (one.meta.get("dataset"), one.meta.get("ipc")) == (case.dataset, case.ipc):
                found.setdefault(name, one.to(case.run.device))
    return found


def plain(one: SyntheticSet, case: Case) -> SyntheticSet | None:
    """Decoded images in the pixel space of the case's data, sorted by class, with hard labels.

    None where the classes differ in size (soft labels whose largest entries do not fall equally). Sample weights and learned
    step sizes are left out.
    """
    train = case.data.train
    labels, order = one.hard_labels.sort(stable=True)
    counts = labels.bincount(minlength=train.num_classes)
    if not (counts == counts[0]).all():
        return None
    images = train.transform.forward(one.transform.inverse(one.images.detach()))[order]
    return SyntheticSet(images, labels, one.classes, train.transform)
