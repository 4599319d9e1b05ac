"""What a run computes, and the folder that remembers it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.data import Stream, load, stream
from lib.data.folders import NAMES as FOLDERS
from lib.data.folders import PREFIX
from lib.data.imageset import SMALL_COUNT, SMALL_SIDE
from lib.data.subsets import SUBSETS
from lib.data.whitening import from_saved
from lib.synset import check_ipc
from lib.system.arithmetic import Arithmetic
from lib.system.errors import CompanionError, unknown
from lib.system.files import write_text

PLAN = "plan.json"
LABELS = ("recompute", "store")
COLUMNS = ("soft", "hard")
IMAGENETS = ("imagenet", *SUBSETS)
SIDE, RESIZE = 224, 256  # of what classifiers of ImageNet are trained and tested on
# Fields that may change in a folder that has results: they add units, or say where things lie, and alter no unit.
FREE = ("root", "architectures", "seeds")


@dataclass(frozen=True)
class Form:
    """What is known of the data without opening them: plain values, written once into the folder of the run."""

    name: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]  # training images per class
    channels: int
    size: int
    transform: Mapping[str, Any]  # its configuration and its tensors as lists
    first_padding: int = 1
    device: str = "cpu"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def small(self) -> bool:
        """As ``ImageSet.small``."""
        return self.size <= SMALL_SIDE and sum(self.counts) <= SMALL_COUNT


@dataclass(frozen=True)
class Plan:
    """One row of a table: a method on a data set, and the networks that are trained on the result.

    Attributes:
        method, variant, options: ``lib.methods`` name, variant of its published settings, and fields that differ from them.
        recipe: data set whose settings are taken where these data have none, such as a folder of images ("": their own).
        data, root, size: data set, where data sets lie, side in pixels (None: 224 for ImageNet-1K and its named subsets, else as
            stored).
        resize: for statistics and tests of folders of images, what the shorter side is scaled to before the centre square of
            ``size`` is cut out (None: 256 / 224 of ``size`` with the settings of an ImageNet set, else ``size``). The teacher
            is trained on random parts of the whole files.
        images: somebody else's set (a folder or a file, as ``lib.synset.imported`` reads them) to be judged instead of recovering one.
        ipc: images per class; seed: of barycenters and recovery (teacher and views have seeds of their own).
        teacher: fields of the teacher's recipe (``network``, ``weights``, ``epochs``, ...) that differ from the method's.
        labels: soft labels ``recompute``d while training, or ``store``d in a file per range of epochs.
        relabel: fields of the recipe of relabelling and training (epochs, batch, ...) that differ from the published ones.
        architectures, seeds: a network is trained for every pair; no architecture: that of the teacher.
        columns: labels to train it on: ``soft``, the teacher's of every view; ``hard``, the classes, with everything else equal.
        validate_every: epochs between two looks at the test half, which are recorded; the last epoch is reported.
        precision, channels_last: of networks in all stages (``lib.system.arithmetic``); tests are always in 32 bits.
        classes_per_unit, epochs_per_unit: how the class statistics and the stored labels are cut. Blocks of classes that are
            recovered together are the method's affair, since they are part of its objective.
    """

    data: str
    ipc: int
    method: str = "wmdd"
    variant: str = ""
    recipe: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None
    size: int | None = None
    seed: int = 0
    teacher: Mapping[str, Any] = field(default_factory=dict)
    labels: str = "recompute"
    relabel: Mapping[str, Any] = field(default_factory=dict)
    architectures: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    classes_per_unit: int = 10
    epochs_per_unit: int = 10
    resize: int | None = None
    images: str = ""
    columns: tuple[str, ...] = COLUMNS
    validate_every: int = 10
    precision: str = "float32"
    channels_last: bool = False

    def __post_init__(self):
        for name in ("classes_per_unit", "epochs_per_unit", "validate_every"):
            whole(name, getattr(self, name), 1)
        whole("seed", self.seed, 0)
        check_ipc(self.ipc)
        if self.size is not None:
            whole("size", self.size, 1)
        if self.labels not in LABELS:
            raise unknown("labels", self.labels, LABELS)
        for name in ("architectures", "seeds", "columns"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise CompanionError(f"{name} must be a list, not {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for seed in self.seeds:
            whole("seeds", seed, 0)
        for column in self.columns or ("none",):
            if column not in COLUMNS:
                raise unknown("column of labels", column, COLUMNS)
        size, resize = self.scaled
        if self.resize is not None and (
            not size or whole("resize", resize, 1) < size or not in_files(self.data)
        ):
            raise CompanionError(
                f"resize {resize} is not allowed: of folders of images only, and at least their size ({size})"
            )
        self.arithmetic  # noqa: B018  (refuses an unknown precision)

    @property
    def scaled(self) -> tuple[int | None, int | None]:
        """Side of an image, and length of the shorter side before the square is cut out; None: as stored, as the side."""
        size = self.size or (SIDE if self.data in IMAGENETS else None)
        as_imagenet = in_files(self.data) and (self.recipe or self.data) in IMAGENETS and size
        return size, self.resize or (round(size * RESIZE / SIDE) if as_imagenet else None)

    @property
    def arithmetic(self) -> Arithmetic:
        """How networks are applied."""
        return Arithmetic(self.precision, self.channels_last)

    def plain(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Run:
    """A plan in its folder, with what its data are."""

    folder: Path
    plan: Plan
    form: Form


def in_files(data: str) -> bool:
    """Whether the data are folders of images, which are read batch by batch."""
    return data in FOLDERS or data.startswith(PREFIX)


def whole(name: str, value: object, least: int) -> int:
    """A whole number of at least ``least``, or the one-line error."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CompanionError(f"{name} must be a whole number >= {least}, not {value!r}")
    return value


# -- the folder -----------------------------------------------------------------------------------------------------------


def open_run(folder: Path | str, given: Mapping[str, Any] | None = None) -> Run:
    """The run in ``folder``, or a new one as ``given`` (field -> value) says; :func:`keep` writes it.

    In an existing folder the given fields must agree with what is there, but for :data:`FREE` ones.

    Raises:
        CompanionError: nothing is planned there and nothing given; a field is unknown or disagrees; the data are not there.
    """
    folder, given = Path(folder), _absolute(given or {})
    known = [item.name for item in dataclasses.fields(Plan)]
    for name in given:
        if name not in known:
            raise unknown("field of a plan", name, known)
    path = folder / PLAN
    if not path.is_file():
        missing = [name for name in ("data", "ipc") if name not in given]
        if missing:
            needed = " and ".join(missing)
            raise CompanionError(f"nothing is planned in {folder}; a new plan needs at least {needed}")
        plan = Plan(**given)
        return Run(folder, plan, form_of(plan))
    stored = _read(path)
    run = dataclasses.replace(stored, plan=dataclasses.replace(stored.plan, **given))
    mine, theirs = run.plan.plain(), stored.plan.plain()
    other = [name for name in mine if mine[name] != theirs[name] and name not in FREE]
    if other:
        what = ", ".join(f"{name}={theirs[name]!r} there, {mine[name]!r} here" for name in other)
        raise CompanionError(f"{folder} holds another run ({what}); name another folder or remove it")
    return run


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with paths that hold wherever the run is taken up: root, a folder of images, a file of weights."""
    fields = dict(given)
    if fields.get("root") is not None:
        fields["root"] = os.path.abspath(Path(fields["root"]).expanduser())
    if str(fields.get("data")).startswith(PREFIX):
        fields["data"] = PREFIX + os.path.abspath(Path(fields["data"].removeprefix(PREFIX)).expanduser())
    if fields.get("images"):
        fields["images"] = os.path.abspath(Path(fields["images"]).expanduser())
    weights = (fields.get("teacher") or {}).get("weights")
    if isinstance(weights, str) and Path(weights).expanduser().is_file():
        fields["teacher"] = {**fields["teacher"], "weights": os.path.abspath(Path(weights).expanduser())}
    return fields


def keep(run: Run) -> None:
    """Write the plan into its folder."""
    content = {"plan": run.plan.plain(), "form": dataclasses.asdict(run.form)}
    text = json.dumps(content, indent=1) + "\n"
    path = run.folder / PLAN
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _read(path: Path) -> Run:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        form = content["form"] | {name: tuple(content["form"][name]) for name in ("classes", "counts")}
        return Run(path.parent, Plan(**content["plan"]), Form(**form))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CompanionError):
            raise
        raise CompanionError(
            f"{path} is damaged ({type(error).__name__}): plan again with the same options"
        ) from error


def read_file(path: Path | str) -> dict[str, Any]:
    """The fields in a plan file, YAML or JSON."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CompanionError(f"cannot read the plan {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise CompanionError(f"{path} is no YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CompanionError(f"{path} must hold fields such as `ipc: 10`")
    return content


# -- the data -------------------------------------------------------------------------------------------------------------


def real(plan: Plan, split: str, device):
    """The ``train`` or ``test`` half of the data: in memory for small sets, read batch by batch for folders of images."""
    return _opened(plan.data, plan.root, *plan.scaled, split, str(device))


@functools.lru_cache(maxsize=2)  # a worker opens them once, not once per unit
def _opened(data: str, root: str | None, size: int | None, resize: int | None, split: str, device: str):
    if in_files(data):
        return stream(data, root, split, size, device, resize=resize)
    both = load(data, root, device, size)
    return both.train if split == "train" else both.test


def form_of(plan: Plan) -> Form:
    """Open the data once and say what they are; a class with fewer images than ``ipc`` is refused here."""
    train = real(plan, "train", "cpu")
    check_ipc(plan.ipc, train.smallest_class)
    transform = {name: tensor.tolist() for name, tensor in train.transform.tensors().items()}
    about = {"config": train.transform.config(), "tensors": transform}
    counts = tuple(train.counts.tolist())
    return Form(train.name, train.classes, counts, train.channels, train.size, about, train.first_padding)


def transform_of(form: Form):
    """The preprocessing of the data."""
    import torch

    tensors = {name: torch.tensor(values) for name, values in form.transform["tensors"].items()}
    return from_saved(form.transform["config"], tensors)


def same_data(form: Form, train: Stream) -> None:
    """Refuse data whose classes or numbers of images changed since the plan was made."""
    if train.classes != form.classes:
        raise CompanionError(
            f"{form.name} had {len(form.classes)} classes when it was planned, now other ones ({len(train.classes)})"
        )
    if train.size != form.size:
        raise CompanionError(
            f"{form.name} was planned at {form.size} pixels, now it is read at {train.size}: plan anew"
        )
    for name, before, now in zip(form.classes, form.counts, train.counts.tolist(), strict=True):
        if before != now:
            raise CompanionError(
                f"{form.name}: class {name!r} had {before} images when it was planned, now {now}"
            )
