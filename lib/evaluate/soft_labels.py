"""What a teacher says of every view of every distilled image (FKD, arXiv 2112.01528): the protocol, the views, and labels as files.

Order, crop, mirror image and CutMix of a batch are drawn by a generator keyed by (seed, epoch, batch), so the labels of any epoch can
be computed where they are needed (:func:`soft_labels`) or stored by ranges of epochs (:func:`store_labels`). The published codes
store the views too, and patch PyTorch to read them back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import nets
from lib.augment import views
from lib.recover.teacher import TORCHVISION
from lib.synset import SyntheticSet, read_safetensors
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.cache import digest
from lib.system.errors import CompanionError, unknown
from lib.system.files import write_tensors

FORMAT = "distillation-companion/soft-labels-1"
ORDERS = ("keyed", "published")
VIEWS = (
    "epochs",
    "batch",
    "crop",
    "flip",
    "mix",
    "mix_alpha",
    "order",
    "seed",
)  # the fields that decide what the teacher sees


@dataclass(frozen=True)
class FKD:
    """The protocol ``fkd``: views, optimiser and temperature as published for ImageNet-1K and ImageNette.

    Attributes:
        name: of the protocol; source: where it is from; network: architecture (``lib.nets``); networks: per set.
        epochs, batch: of the training; temperature: of the teacher's labels, above 0.
        crop: smallest share of the area of a random resized crop; None: no crop (below 64 pixels); flip: random mirror images.
        mix: ``cutmix``, ``mixup`` or ``none``; mix_alpha: of its Beta law (MixUp: 0.8).
        order: ``keyed``, or ``published``: that of PyTorch's RandomSampler, whose generator runs on from epoch to epoch.
        seed: of order and views, which are the same for every network.
        lr, weight_decay: AdamW along a cosine to 0 by epochs; only weights of more than one dimension decay.
    """

    name: str = "fkd"
    network: str = "resnet18-batch"
    epochs: int = 300
    batch: int = 100
    temperature: float = 20.0
    lr: float = 1e-3
    weight_decay: float = 0.01
    crop: float | None = 0.08
    flip: bool = True
    mix: str = "cutmix"
    mix_alpha: float = 1.0
    order: str = "keyed"
    seed: int = 42
    networks: int = 3
    source: str = "SRe2L, WMDD: FKD with CutMix"

    def __post_init__(self):
        if not self.network.startswith(TORCHVISION):
            nets.parse(self.network)
        views.check_mix(self.mix)
        if self.order not in ORDERS:
            raise unknown("order", self.order, ORDERS)
        for name in ("epochs", "batch", "networks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompanionError(
                    f"{name} {value!r} in protocol {self.name!r}: must be a whole number of at least 1"
                )
        if not self.temperature > 0 or (self.crop is not None and not 0 < self.crop <= 1):
            raise CompanionError(
                f"temperature {self.temperature!r} and crop {self.crop!r} in protocol {self.name!r}: "
                "allowed: above 0; None, or above 0 and at most 1"
            )

    @property
    def trained_epochs(self) -> int:
        return self.epochs

    def __str__(self) -> str:
        crop = "no crop" if self.crop is None else f"crop {self.crop:g} to 1"
        return (
            f"{self.name}: {self.network}, {self.epochs} epochs, AdamW lr {self.lr:g}, wd {self.weight_decay:g}, batch "
            f"{self.batch}, KL at temperature {self.temperature:g}, {crop}, {self.mix}, labels of the teacher, last epoch"
        )


# -- views ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What is done to one batch: which images, and how they are cropped, mirrored and mixed."""

    rows: Tensor  # (b,) positions in the set
    boxes: Tensor | None  # (b, 4)
    flips: Tensor  # (b,) bool
    partner: Tensor  # (b,)
    share: float  # of an image's own pixels, before a box is clipped
    box: tuple[int, int, int, int]  # of CutMix


def published_order(n: int, epoch: int, seed: int) -> Tensor:
    """The order of n images that PyTorch's RandomSampler gives in this epoch: it draws two permutations and drops the second."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2 * epoch):
        torch.randperm(n, generator=generator)
    return torch.randperm(n, generator=generator)


def epoch_views(protocol: FKD, n: int, side: int, epoch: int) -> Iterator[View]:
    """The views of one pass over n images of ``side`` pixels, batch by batch; the last one may be short."""
    if protocol.order == "published":
        order = published_order(n, epoch, protocol.seed)
    else:
        order = torch.randperm(n, generator=views.keyed("order", protocol.seed, epoch))
    for b, rows in enumerate(order.split(protocol.batch)):
        generator, count = views.keyed("view", protocol.seed, epoch, b), len(rows)
        boxes = None
        if protocol.crop is not None:
            boxes = views.crop_boxes(torch.full((count,), protocol.crop), side, generator)
        flips = (torch.rand(count, generator=generator) < 0.5) & protocol.flip
        partner = torch.randperm(count, generator=generator)
        share = views.beta(protocol.mix_alpha, generator)
        centre = tuple(torch.randint(side, (2,), generator=generator).tolist())
        yield View(rows, boxes, flips, partner, share, views.cutmix_box(share, centre, (side, side)))


def apply_view(images: Tensor, view: View, mix: str) -> Tensor:
    """The batch ``(b, c, h, w)`` of a view of ``(n, c, h, w)`` images; the teacher sees it mixed, so labels need no mixing."""
    x, device = images[view.rows.to(images.device)], images.device
    flips = view.flips.to(device)
    if view.boxes is not None:
        x = views.resample(x, *views.crop_matrices(view.boxes.to(device), flips, x.shape[-1], dtype=x.dtype))
    else:
        x = torch.where(flips[:, None, None, None], x.flip(3), x)
    partner = view.partner.to(device)
    if mix == "cutmix":
        return views.paste(x, partner, view.box)
    return views.blend(x, partner, view.share) if mix == "mixup" else x


# -- labels --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def soft_labels(
    teacher: nn.Module, synset: SyntheticSet, protocol: FKD, epoch: int, arithmetic: Arithmetic = PLAIN
) -> Tensor:
    """The teacher's logits for all views of an epoch, ``(n, C)``, batch after batch."""
    images = synset.images
    return torch.cat(
        [
            arithmetic(teacher, apply_view(images, view, protocol.mix))
            for view in epoch_views(protocol, len(images), images.shape[-1], epoch)
        ]
    )


def label_bytes(protocol: FKD, images: int, classes: int) -> int:
    """Bytes of all labels in 16 bits: images x epochs x classes x 2."""
    return 2 * images * protocol.epochs * classes


def set_hash(synset: SyntheticSet) -> str:
    """Of the images that a label store belongs to."""
    return digest(synset.images)


def label_file(folder: Path | str, epochs: range) -> Path:
    """Where the labels of these epochs are stored."""
    return Path(folder) / f"labels-{epochs.start:05d}-{epochs.stop:05d}.safetensors"


def half_logits(
    teacher: nn.Module, synset: SyntheticSet, protocol: FKD, epochs: range, arithmetic: Arithmetic = PLAIN
) -> Tensor:
    """:func:`soft_labels` of a range of epochs in 16 bits, on the CPU, ``(epochs, n, C)``.

    Raises:
        CompanionError: a logit is beyond 16 bits.
    """
    logits = torch.stack(
        [soft_labels(teacher, synset, protocol, epoch, arithmetic).half().cpu() for epoch in epochs]
    )
    if not logits.isfinite().all():
        raise CompanionError("the teacher's logits do not fit 16 bits: labels='recompute' keeps 32")
    return logits


def store_labels(
    folder: Path | str, teacher: nn.Module, synset: SyntheticSet, protocol: FKD, epochs: range
) -> Path:
    """Write the logits of a range of epochs as one file of 16-bit numbers; a unit of work of its own."""
    logits = half_logits(teacher, synset, protocol, epochs)
    about = {"format": FORMAT, "views": json.dumps(_about(protocol)), "set": set_hash(synset)}
    path = label_file(folder, epochs)
    write_tensors(path, {"logits": logits.contiguous()}, about | {"epochs": f"{epochs.start} {epochs.stop}"})
    return path


def read_labels(path: Path | str, synset: SyntheticSet, protocol: FKD) -> tuple[range, Tensor]:
    """Epochs and logits ``(epochs, n, C)`` of a file that :func:`store_labels` wrote.

    Raises:
        CompanionError: a damaged or other file; labels of another batch size, seed or view, or of another set.
    """
    header, tensors = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise CompanionError(
            f"{path} holds no soft labels: its header says {header.get('format')!r}; allowed: {FORMAT!r}"
        )
    theirs, mine = json.loads(header["views"]), _about(protocol)
    for name in VIEWS:
        if theirs[name] != mine[name]:
            raise CompanionError(
                f"the labels in {path} are for {name}={theirs[name]!r}, not {mine[name]!r}: "
                "relabel, or train with what they were made for"
            )
    if header["set"] != set_hash(synset):
        raise CompanionError(f"the labels in {path} are of another set of images: relabel this one")
    return range(*map(int, header["epochs"].split())), tensors["logits"]


def _about(protocol: FKD) -> dict:
    return {name: value for name, value in asdict(protocol).items() if name in VIEWS}


class LabelStore:
    """The stored labels of a folder, read file by file as epochs ask for them.

    Raises:
        CompanionError: a file does not match set and protocol; an epoch is missing.
    """

    def __init__(self, folder: Path | str, synset: SyntheticSet, protocol: FKD):
        self.folder, self.synset, self.protocol, self.open = Path(folder), synset, protocol, None
        self.paths = sorted(self.folder.glob("labels-*.safetensors"))
        self.bytes = sum(path.stat().st_size for path in self.paths)

    def __call__(self, epoch: int) -> Tensor:
        """Logits ``(n, C)`` of an epoch, float32."""
        if self.open is None or epoch not in self.open[0]:
            wanted = (path for path in self.paths if epoch in range(*map(int, path.stem.split("-")[1:])))
            path = next(wanted, None)
            if path is None:
                raise CompanionError(
                    f"no labels of epoch {epoch} in {self.folder}: relabel 0 to {self.protocol.epochs - 1}"
                )
            self.open = read_labels(path, self.synset, self.protocol)
        epochs, logits = self.open
        return logits[epoch - epochs.start].float()
