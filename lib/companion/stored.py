"""Distilled sets that other notebooks stored, brought to one form."""

from __future__ import annotations

from pathlib import Path

from lib.companion.study import Case
from lib.methods import METHODS
from lib.synset import SyntheticSet
from lib.system.files import ROOT


def stored_sets(case: Case, folder: Path | None = None) -> dict[str, SyntheticSet]:
    """The sets in ``results/<run>/*/*.safetensors`` of this data set and IPC, by name (``dm``, ``idm``, ...), sorted.

    They are those of the project, also where a run writes elsewhere (``$COMPANION_OUT``): a notebook that is tested alone finds
    the committed ones. Of several files of one name that of the method's own notebook stands, else the first.
    """
    folder = folder or ROOT / "results" / case.run.name
    found: dict[str, SyntheticSet] = {}
    for name, path in sorted(_named(case, folder), key=lambda pair: (_elsewhere(*pair), pair[1])):
        synset = SyntheticSet.load(path)
        if (synset.meta.get("dataset"), synset.meta.get("ipc")) == (case.dataset, case.ipc):
            found.setdefault(name, synset.to(case.run.device))
    return dict(sorted(found.items()))


def _named(case: Case, folder: Path) -> list[tuple[str, Path]]:
    """Name and file of every set that another notebook stored."""
    paths = [path for path in folder.glob("*/*.safetensors") if path.parent.name != case.run.notebook]
    return [(path.stem.removesuffix(f"_{case.dataset}_ipc{case.ipc}"), path) for path in paths]


def _elsewhere(name: str, path: Path) -> bool:
    """Whether a set of that name lies in another notebook's folder than the method's own."""
    return name in METHODS and METHODS[name].notebook != path.parent.name


def plain(synset: SyntheticSet, case: Case) -> SyntheticSet | None:
    """Decoded images in the pixel space of the case's data, sorted by class, with hard labels.

    None where the classes differ in size (soft labels whose largest entries do not fall equally). Sample weights and learned
    step sizes are left out.
    """
    train = case.data.train
    labels, order = synset.hard_labels.sort(stable=True)
    counts = labels.bincount(minlength=train.num_classes)
    if not (counts == counts[0]).all():
        return None
    images = train.transform.forward(synset.transform.inverse(synset.images.detach()))[order]
    return SyntheticSet(images, labels, synset.classes, train.transform)
