"""The evaluation protocol as an object, printed beside every number: different protocols are not comparable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import nn

from lib import augment, nets
from lib.nets.training import SCHEDULES
from lib.system.errors import CompanionError, choose, unknown


@dataclass(frozen=True)
class Protocol:
    """How a network is trained on S. The accuracy is that of the *last* epoch, never the best one.

    Attributes:
        name: of the protocol.
        network: architecture (``lib.nets``), or what makes a ``torch.nn.Module`` from images to logits, such as its class or
            ``lambda: Mine(10)``: then its own initialisation holds, from a seed per network.
        epochs: E as published; ``dc`` schedules train epochs 0..E, that is E + 1 of them.
        lr, momentum, nesterov, weight_decay, batch: SGD; learned_lr: the set's learned step size, where it has one, replaces lr.
        schedule: ``constant``, ``dc`` (a tenth after half, momentum reset), ``steps`` (IDC), ``cosine`` by epochs,
            ``cosine-steps`` by updates (DeepCore), ``warm-cosine`` (GLaD).
        augmentation: ``none``, a DSA strategy, or ``data``: the strategy that suits the data set; mode, cutmix: as in
            ``lib.nets.training``.
        labels: ``own`` (as stored: hard or soft), or ``hard`` (argmax of soft ones).
        networks: evaluation networks per set; sets: distilled sets, in the paper.
        source: where the protocol is from.
    """

    name: str
    network: str | Callable[[], nn.Module] = "convnet-d3-w128"
    epochs: int = 300
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 256
    schedule: str = "dc"
    augmentation: str = "none"
    mode: str = "single"
    cutmix: float = 0.0
    nesterov: bool = False
    labels: str = "own"
    learned_lr: bool = False
    networks: int = 20
    sets: int = 5
    source: str = ""

    def __post_init__(self):
        if isinstance(self.network, nn.Module) or not callable(self.network):
            nets.parse(self.network)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.labels not in ("own", "hard"):
            raise unknown("label type", self.labels, ("own", "hard"))
        if self.augmentation != "data":
            augment.strategy(self.augmentation)
        augment.alternatives((), self.mode)
        for name in ("epochs", "batch", "networks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompanionError(
                    f"{name} {value!r} in protocol {self.name!r}: must be a whole number of at least 1"
                )

    @property
    def trained_epochs(self) -> int:
        return self.epochs + 1 if self.schedule == "dc" else self.epochs

    def families(self, data) -> str:
        """The augmentation strategy on this data set."""
        return data.augmentation if self.augmentation == "data" else self.augmentation

    def __str__(self) -> str:
        network = getattr(self.network, "__name__", self.network)
        parts = [f"{self.name}: {network}", f"{self.trained_epochs} epochs", f"SGD lr {self.lr:g}"]
        parts += [
            f"{'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}",
            f"wd {self.weight_decay:g}",
            f"batch {self.batch}",
            f"{self.schedule} schedule",
        ]
        parts += [f"augmentation {self.augmentation}" + (f" ({self.mode})" if self.mode != "single" else "")]
        parts += [f"cutmix {self.cutmix:g}"] if self.cutmix else []
        return ", ".join([*parts, f"labels {self.labels}", "last epoch"])


def _small(data) -> dict:
    """The small protocols on small data: a network and a schedule that two cores train in a second.

    Grey images keep the published schedule; colour has ten times the arithmetic and gets a fifth of the epochs, at five times the
    rate, which falls along a cosine. Below 14 pixels a side there is no room for a third block.
    """
    network = {"network": "convnet-d2-w32" if data.size < 14 else "convnet-d3-w32"}
    colour = {"epochs": 60, "lr": 0.05, "schedule": "cosine"}
    return network | (colour if data.small and data.channels == 3 else {})


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("dc", source="DC, arXiv 2006.05929: 300 epochs without augmentation"),
        Protocol("dsa", epochs=1000, augmentation="data", source="DSA and DM: 1000 epochs, DSA, not siamese"),
        Protocol("mtt", epochs=1000, augmentation="data", learned_lr=True, networks=5, source="MTT: learned step size"),
        Protocol(
            "idc", epochs=1000, batch=64, schedule="steps", augmentation="data", mode="idc", cutmix=0.5, networks=3,
            source="IDC, arXiv 2205.14959: CutMix; its strategy has no cutout",
        ),
        Protocol(
            "dc-mnist", epochs=1000, augmentation="crop_scale_rotate",
            source="DC's code on MNIST: 1000 epochs with crops, scales and rotations, there one per image and stronger than DSA's",
        ),
        Protocol(
            "idc-plain", epochs=1000, batch=64, schedule="steps", augmentation="color_crop_scale_rotate", mode="idc", networks=3,
            source="IDC's code on MNIST with multi-formation: no CutMix",
        ),
        Protocol(
            "idc-cutout", epochs=1000, batch=64, schedule="steps", augmentation="color_crop_cutout_scale_rotate", mode="idc",
            networks=3, source="IDC's code for IDC-I on SVHN at IPC 1: cutout, no CutMix",
        ),
        *(
            Protocol(
                f"idc-imagenet-{epochs}", network="resnet10ap", epochs=epochs, batch=64, schedule="steps", cutmix=1.0, networks=3,
                augmentation="color_crop_flip", mode="idc",
                source="IDC on ImageNet subsets, there random resized crops, jitter and lighting; epochs by the "
                "number of decoded images",
            )
            for epochs in (667, 1000, 1333, 1500, 2000)
        ),
        Protocol("cafe", epochs=600, source="CAFE's code without augmentation: 600 epochs"),
        Protocol(
            "m3d", epochs=1000, batch=64, schedule="steps", augmentation="data", mode="idc", cutmix=1.0, networks=3,
            source="M3D's code: IDC's evaluation with CutMix in every batch",
        ),
        Protocol(
            "datadam", epochs=1800, batch=64, augmentation="data",
            source="DataDAM's code; the paper's table halves the rate every 15 epochs and names no number of epochs",
        ),
        Protocol(
            "dim", epochs=1000, batch=128, schedule="constant", augmentation="color_crop", mode="idc", networks=1,
            source="DiM's code, there with new images in every epoch (lib.evaluate.fresh) and the best of five tests",
        ),
        Protocol("ddm", epochs=1000, augmentation="data", networks=5, source="DDM's code: DM's evaluation, 5 networks"),
        Protocol("dcbench", epochs=1000, augmentation="data", networks=5, source="DC-BENCH with DSA; 300 epochs without"),
        Protocol("ddranking", epochs=1000, augmentation="data", labels="hard", networks=1, source="DD-Ranking, hard labels"),
        Protocol(
            "deepcore", "resnet18-batch", epochs=200, lr=0.1, nesterov=True, batch=128, schedule="cosine-steps",
            augmentation="crop_flip", mode="multiple", networks=1,
            source="DeepCore, arXiv 2204.08499, and LCMat; there crops are padded by reflection, and the best epoch counts",
        ),
        Protocol(
            "itgan", "resnet18-batch", epochs=200, augmentation="data", networks=3, sets=3,
            source="IT-GAN's code: ResNet18, 201 epochs; there the last partial batch of an epoch is dropped",
        ),
        Protocol(
            "glad", "convnet-d5-w128", epochs=1000, lr=0.001, schedule="warm-cosine", augmentation="data", networks=5, sets=1,
            source="GLaD's code; there an average of the weights is tested, the best of tests every 100 iterations counts, and "
            "VGG11 has a tenth of the rate",
        ),
        Protocol("cpu-small", networks=5, sets=3, source="dc, scaled to two cores on the embedded data sets"),
        Protocol("cpu-small-dsa", augmentation="data", networks=5, sets=3, source="cpu-small with DSA augmentation"),
    )
}  # fmt: skip


def protocol(name: str, data=None, **changes) -> Protocol:
    """A named protocol, adapted to a data set and with single fields replaced.

    Args:
        name: one of :data:`PROTOCOLS`.
        data: an ``ImageSet``; ``cpu-small`` takes a network and schedule of its size, ``idc`` and ``m3d`` drop cutout from the strategy.
        changes: fields to replace, by name.
    Raises:
        CompanionError: unknown protocol or field.
    """
    chosen = choose("protocol", name, PROTOCOLS)
    allowed = [field.name for field in fields(Protocol)]
    for key in changes:
        if key not in allowed:
            raise unknown("protocol field", key, allowed)
    if data is not None:
        if name.startswith("cpu-small"):
            chosen = replace(chosen, **_small(data))
        if name in ("idc", "m3d"):
            kept = [family for family in data.augmentation.split("_") if family != "cutout"]
            chosen = replace(chosen, augmentation="_".join(kept))
    return replace(chosen, **changes)
