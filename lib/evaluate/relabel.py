r"""Relabel and train: networks learn a distilled set by a teacher's logits for every view of every image (FKD, arXiv 2112.01528).

The last stages of SRe2L and WMDD:

$$\min_\theta\ \tfrac1b\sum_i\hat w_i\,\mathrm{KL}\big(\mathrm{softmax}(t_i/\tau)\,\|\,\mathrm{softmax}(s_i/\tau)\big),\qquad
 \hat w=w/\bar w,$$

without the factor $\tau^2$. Order, crop, mirror image and CutMix of a batch are drawn by a generator keyed by (seed, epoch,
batch), so the labels of any epoch can be computed where they are needed (:func:`soft_labels`) or stored by ranges of epochs
(:func:`store_labels`) and give the same training, but for the rounding to 16 bits. The published codes store the views too, and
patch PyTorch to read them back.

Such labels say much more than the images: always beside these numbers stand hard-label accuracies, random real images with the
same teacher, and the bytes of the labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import nets
from lib.augment import views
from lib.evaluate.alike import check_alike
from lib.evaluate.networks import Evaluation, accuracy, is_balanced, network_seed
from lib.nets.ensemble import Ensemble
from lib.nets.training import cosine_schedule, predict, update
from lib.recover.teacher import TORCHVISION, drawn
from lib.synset import SyntheticSet, read_safetensors
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.cache import digest, stored
from lib.system.checkpoint import Checkpoint, Training, Unkept, of_device
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_seed, choose, unknown
from lib.system.files import write_tensors
from lib.system.measure import Meter

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


# -- training ------------------------------------------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""$\mathrm{KL}(\mathrm{softmax}(t/\tau)\,\|\,\mathrm{softmax}(s/\tau))$ over the last dimension, ``(...)``; no $\tau^2$."""
    target = F.log_softmax(teacher / temperature, -1)
    return (target.exp() * (target - F.log_softmax(student / temperature, -1))).sum(-1)


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    r"""Mean of $\hat w_i\ell_i$ over the last dimension, $\hat w=w/\bar w$ of this batch."""
    return losses.mean(-1) if weights is None else (losses * (weights / weights.mean())).mean(-1)


def hard_targets(labels: Tensor, classes: int, view: View, mix: str, side: int) -> Tensor:
    r"""What the mixed images of a view are by their own classes, ``(n,)`` labels -> ``(b, C)`` probabilities.

    $\lambda y_i+(1-\lambda)y_{\pi(i)}$, with CutMix's $\lambda$ the share of the pixels that stay, after the box is clipped.
    """
    y = F.one_hot(labels[view.rows.to(labels.device)], classes).float()
    x1, y1, x2, y2 = view.box
    share = {"none": 1.0, "mixup": view.share, "cutmix": 1 - (x2 - x1) * (y2 - y1) / side**2}[mix]
    return share * y + (1 - share) * y[view.partner.to(y.device)]


def train_by_distillation(
    networks: Ensemble,
    synset: SyntheticSet,
    teacher: nn.Module | LabelStore | None,
    protocol: FKD,
    checkpoint: Checkpoint | None = None,
    arithmetic: Arithmetic = PLAIN,
    after_epoch: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Train K networks on the same views of a set, in place.

    Args:
        teacher: the frozen network, whose labels are computed as they are needed, or a :class:`LabelStore`; None: the hard labels
            of the set, with everything else the same: views, optimiser, epochs. The loss is then the cross-entropy.
        checkpoint: where the training is kept and from where it goes on.
        after_epoch: called with the number of finished epochs, for a look on the way.
    Returns:
        loss of the last batch per network, ``(K,)``.
    """
    networks.train()
    optimiser, parameters = _optimiser(networks, protocol), list(networks.parameters.values())
    rate, images = cosine_schedule(protocol.lr, protocol.epochs), synset.images.detach()
    checkpoint = checkpoint or Unkept()
    at = Training(networks.parameters | networks.buffers, optimiser, of_device(images.device))
    checkpoint.begin(at)
    for epoch in range(at.epoch, protocol.epochs):
        at.new_epoch(epoch)
        networks.train()
        known = teacher(epoch).to(images.device) if isinstance(teacher, LabelStore) else None
        for group in optimiser.param_groups:
            group["lr"] = rate(epoch)
        first = at.goes_on()
        for b, view in enumerate(epoch_views(protocol, len(images), images.shape[-1], epoch)):
            if b < first:
                continue
            x = apply_view(images, view, protocol.mix)
            outputs = arithmetic(networks, x.unsqueeze(0))
            if teacher is None:
                labels, side = synset.hard_labels, images.shape[-1]
                target = hard_targets(labels, outputs.shape[-1], view, protocol.mix, side)
                losses = -(target * outputs.log_softmax(-1)).sum(-1)
            else:
                if known is None:
                    with torch.no_grad():
                        target = arithmetic(teacher, x)
                else:
                    target = known[b * protocol.batch :][: len(x)]
                losses = divergence(outputs, target, protocol.temperature)
            weights = synset.image_weights
            weights = None if weights is None else weights[view.rows.to(images.device)]
            loss = weighted_mean(losses, weights)
            update(optimiser, parameters, loss.sum())
            checkpoint.kept["loss"] = loss.detach()
            checkpoint.after(at)
        after_epoch(epoch + 1)
    checkpoint.end(at)
    return checkpoint.kept["loss"]


def fresh_networks(name: str, like, generators: Sequence[torch.Generator]) -> Ensemble:
    """One untrained network per generator, of ``lib.nets`` or torchvision's (``torchvision-resnet18``)."""
    if not name.startswith(TORCHVISION):
        return Ensemble.make(name, like, generators)
    made = [drawn(name, like, generator) for generator in generators]
    parameters, buffers = (
        [dict(part) for part in parts]
        for parts in ((one.named_parameters() for one in made), (one.named_buffers() for one in made))
    )
    learned = {
        key: torch.stack([one[key].detach() for one in parameters]).requires_grad_() for key in parameters[0]
    }
    return Ensemble(made[0], learned, {key: torch.stack([one[key] for one in buffers]) for key in buffers[0]})


def _optimiser(networks: Ensemble, protocol: FKD) -> torch.optim.AdamW:
    """AdamW that lets only the matrices and kernels decay."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in networks.parameters.items():
        groups["weight" in name and parameter.dim() > 2].append(
            parameter
        )  # one dimension counts the networks
    decay = {True: protocol.weight_decay, False: 0.0}
    used = [{"params": group, "weight_decay": decay[kind]} for kind, group in groups.items() if group]
    return torch.optim.AdamW(used, lr=protocol.lr, fused=True)


def evaluate_by_distillation(
    sets: SyntheticSet | Sequence[SyntheticSet],
    data,
    protocol: FKD,
    teacher: nn.Module,
    seed: int = 0,
    networks: int | None = None,
    cache: bool = False,
    labels: Iterable[Path] | None = None,
) -> Evaluation:
    """Train fresh networks on each set by the teacher's labels and test them on ``data.test``; as ``lib.evaluate.evaluate``.

    Args:
        labels: per set a folder of stored labels to use instead of the teacher (not cached).
    Raises:
        CompanionError: nothing to evaluate; the teacher's outputs are not the classes of the data.
    """
    sets = [sets] if isinstance(sets, SyntheticSet) else list(sets)
    count = protocol.networks if networks is None else networks
    if not sets or isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CompanionError(
            f"{len(sets)} sets and {count!r} networks to evaluate: at least 1 of each is needed"
        )
    seed = check_seed(seed)
    check_alike(sets, data.test)
    with torch.no_grad():
        outputs = teacher(sets[0].images[:1]).shape[1]
    if outputs != data.test.num_classes:
        raise CompanionError(
            f"the teacher has {outputs} classes, the data {data.test.num_classes}; allowed: the same number"
        )
    folders = list(labels) if labels is not None else [None] * len(sets)

    def compute() -> dict[str, Tensor]:
        rows = []
        with Meter(data.test.device) as meter:
            for i, (synset, folder) in enumerate(zip(sets, folders, strict=True)):
                seeds = [network_seed(seed, i, j) for j in range(count)]
                generators = [torch.Generator(data.test.device).manual_seed(one) for one in seeds]
                fresh = fresh_networks(protocol.network, data.test, generators)
                source = teacher if folder is None else LabelStore(folder, synset, protocol)
                train_by_distillation(fresh, synset.to(data.test.device), source, protocol)
                rows.append(accuracy(predict(fresh, data.test.images), data.test))
        cost = torch.tensor([meter.seconds, meter.peak_bytes], dtype=torch.float64)
        return {"accuracy": torch.stack(rows), "cost": cost}

    found = (
        stored(_key(sets, data, protocol, teacher, seed, count), compute)
        if cache and labels is None
        else compute()
    )
    seconds, peak = found["cost"].tolist()
    return Evaluation(found["accuracy"].cpu(), protocol, is_balanced(data.test), seconds, int(peak))


def _key(sets, data, protocol: FKD, teacher: nn.Module, seed: int, count: int) -> str:
    content = [[s.images, s.weights if s.weights is not None else 0] for s in sets]
    what = digest(
        content, teacher.state_dict(), data.test.fingerprint, protocol, seed, count, data.test.device.type
    )
    return f"relabelled-{digest(what, code_digest(__name__))}"


_SMALL = FKD(network="convnet-d2-w32", lr=5e-3, crop=None, flip=False, networks=1)
_NETTE = FKD(network="torchvision-resnet18")
_SRE2L = replace(_NETTE, batch=1024, source="SRe2L, CDA: FKD with CutMix")
_CIFAR = FKD(epochs=400, batch=128, temperature=30.0, crop=None, flip=False, mix="mixup", mix_alpha=0.8)
# name, as recipes say it -> protocol
PROTOCOLS = {
    name: replace(one, name=name)
    for name, one in {
        "own-fkd-digits": _SMALL,  # no crop below 64 pixels; five times the rate for a small network
        "own-fkd-photos": replace(_SMALL, network="convnet-d3-w32", epochs=60, batch=50, flip=True),
        "own-fkd": _NETTE,  # WMDD on ImageNette and ImageNet-1K
        "own-fkd-tiny": replace(_NETTE, network="torchvision-resnet18-tiny"),  # WMDD's stem at 64 pixels
        "own-fkd-1024": _SRE2L,  # SRe2L on ImageNet-1K
        "own-fkd-1024-mixup": replace(_SRE2L, mix="mixup", mix_alpha=0.8),
        "own-fkd-1024-tiny": replace(
            _SRE2L, network="resnet18-batch"
        ),  # SRe2L's stem at 64 pixels; the batch is assumed
        "own-fkd-cifar": _CIFAR,  # SRe2L on CIFAR-100
    }.items()
}


def distillation(name: str, **changes) -> FKD:
    """A protocol by its name in a recipe, with single fields replaced."""
    return replace(choose("relabelling protocol", name, PROTOCOLS), **changes)
