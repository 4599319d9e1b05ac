"""What a unit of each stage computes. Every function reads the files of other units and writes one file of its own."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.distill import identity
from lib.evaluate.networks import accuracy, network_seed
from lib.evaluate.relabel import LabelStore, fresh_networks, half_logits, label_bytes, train_by_distillation
from lib.match.batchnorm import Watch
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.recover.blocks import Prepared, class_images
from lib.recover.teacher import frozen, make_teacher
from lib.scale.plan import Run, real, same_data, transform_of
from lib.scale.squeeze import squeeze
from lib.scale.store import read, save, save_summary
from lib.scale.units import Unit, blocks, method, needs, recipe, trainings, units
from lib.synset import SyntheticSet, class_major


def compute(run: Run, one: Unit, device: torch.device) -> None:
    """Compute a unit and write its file."""
    work = {
        "squeeze": _squeeze,
        "statistics": _statistics,
        "recover": _recover,
        "relabel": _relabel,
        "train": _train,
        "aggregate": _aggregate,
    }
    work[one.stage](run, one, device)


def teacher_of(run: Run, device: torch.device) -> nn.Module:
    """The frozen teacher that the squeeze unit wrote."""
    state, _ = read(run, units(run, "squeeze")[0])
    network = make_teacher(method(run).teacher.network, dataclasses.replace(run.form, device=device))
    network.load_state_dict(state)
    return frozen(network)


def _squeeze(run: Run, one: Unit, device: torch.device) -> None:
    save(run, one, squeeze(run, device).state_dict())


# -- class statistics and recovery ----------------------------------------------------------------------------------------


def _statistics(run: Run, one: Unit, device: torch.device) -> None:
    """Per class what the method asks of its real images, ``<class>.<name>``."""
    chosen, train = method(run), real(run.plan, "train", device)
    same_data(run.form, train)
    tensors = {}
    with Watch(teacher_of(run, device)) as watch:
        for c in range(one.first, one.last):
            found = chosen.class_targets(
                watch, class_images(train, c, chosen.chunk), run.plan.ipc, run.plan.seed, c
            )
            tensors |= {f"{c}.{name}": tensor for name, tensor in found.items()}
    save(run, one, tensors)


def prepared(run: Run, parts: list[Unit], watch: Watch, device: torch.device) -> Prepared:
    """What blocks are recovered from, with the classes of these units of the stage ``statistics``."""
    targets: dict[int, dict[str, Tensor]] = {}
    for part in parts:
        for key, tensor in read(run, part)[0].items():
            c, name = key.split(".", 1)
            targets.setdefault(int(c), {})[name] = tensor.to(device)
    form = run.form
    shape = (form.channels, form.size, form.size)
    return Prepared(watch, shape, transform_of(form).to(device), device, targets)


def _recover(run: Run, one: Unit, device: torch.device) -> None:
    """The images of a block: bytes if the method stores images in 8 bits, else normalised pixels."""
    chosen, block = method(run), blocks(run)[one.number]
    parts = [part for part in needs(run, one) if part.stage == "statistics"]
    with Watch(teacher_of(run, device)) as watch:
        ready = prepared(run, parts, watch, device)
        pixels = chosen.recover_block(ready, block, run.plan.seed)
    if chosen.storage != "float":
        pixels = (ready.transform.inverse(pixels) * 255).round().to(torch.uint8)
    save(run, one, {"pixels": pixels})


class Images:
    """The images of all blocks, class by class, as they are stored; ``images[rows]`` are normalised.

    Bytes stay bytes: 50 images of each of 1000 classes at 224 px are 7.5 GB, four times less than as 32-bit numbers.
    """

    def __init__(self, pixels: Tensor, transform):
        self.pixels, self.transform = pixels, transform
        self.device, self.shape = pixels.device, pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows) -> Tensor:
        x = self.pixels[rows]
        return self.transform.forward(x / 255) if x.dtype == torch.uint8 else x

    def detach(self) -> Images:
        return self


@dataclass(frozen=True)
class Shown:
    """What the relabelling asks of a set."""

    images: Images
    weights: Tensor | None = None


def the_images(run: Run, device: torch.device | str) -> Images:
    """The distilled images, from the files of all blocks."""
    form, ipc, pixels = run.form, run.plan.ipc, None
    for one, block in zip(units(run, "recover"), blocks(run), strict=True):
        part = read(run, one)[0]["pixels"]
        if pixels is None:
            pixels = torch.empty(form.num_classes * ipc, *part.shape[1:], dtype=part.dtype)
        pixels[block.rows(ipc)] = part
    return Images(pixels.to(device), transform_of(form).to(device))


def the_weights(run: Run, device: torch.device | str) -> Tensor | None:
    """The weight of every image, class by class, where the method's barycenters have unequal ones."""
    if not method(run).weighted:
        return None
    targets = {}
    for part in units(run, "statistics"):
        for key, tensor in read(run, part)[0].items():
            c, name = key.split(".", 1)
            if name == "weights":
                targets[int(c)] = tensor
    return torch.cat([targets[c] for c in sorted(targets)]).to(device)


def shown(run: Run, device: torch.device | str) -> Shown:
    """The distilled images and their weights."""
    return Shown(the_images(run, device), the_weights(run, device))


def the_set(run: Run) -> SyntheticSet:
    """The distilled set of a run whose blocks are all there."""
    form, chosen, images = run.form, method(run), the_images(run, "cpu")
    meta = identity(chosen) | {"dataset": form.name, "ipc": run.plan.ipc, "seed": run.plan.seed}
    labels = class_major(form.num_classes, run.plan.ipc, "cpu")
    weights = the_weights(run, "cpu")
    return SyntheticSet(images[:], labels, form.classes, images.transform, weights=weights, meta=meta)


# -- labels and training --------------------------------------------------------------------------------------------------


def _relabel(run: Run, one: Unit, device: torch.device) -> None:
    """The teacher's logits for all views of these epochs, 16 bits, ``(epochs, images, classes)``."""
    teacher, protocol = teacher_of(run, device), recipe(run)
    save(run, one, {"logits": half_logits(teacher, shown(run, device), protocol, range(one.first, one.last))})


class Labels(LabelStore):
    """The stored labels of a run, epoch by epoch; a unit's file is read when its first epoch begins."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device, self.parts = run, device, units(run, "relabel")
        self.open: tuple[range, Tensor] = range(0), torch.empty(0)

    def __call__(self, epoch: int) -> Tensor:
        if epoch not in self.open[0]:
            part = self.parts[epoch // self.run.plan.epochs_per_unit]
            self.open = range(part.first, part.last), read(self.run, part)[0]["logits"]
        epochs, logits = self.open
        return logits[epoch - epochs.start].to(self.device, torch.float32)


def _train(run: Run, one: Unit, device: torch.device) -> None:
    """A fresh network on the relabelled set, and its accuracy on the test half."""
    name, seed = trainings(run)[one.number]
    networks = fresh(run, name, seed, device)
    source = Labels(run, device) if run.plan.labels == "store" else teacher_of(run, device)
    loss = train_by_distillation(networks, shown(run, device), source, recipe(run))
    found = tested(networks, real(run.plan, "test", device))
    save(run, one, {"accuracy": found, "loss": loss}, architecture=name, seed=seed)


def fresh(run: Run, name: str, seed: int, device: torch.device) -> Ensemble:
    """An untrained network of ``lib.nets``, or torchvision's (``torchvision-resnet18``), as an ensemble of one."""
    generator = torch.Generator(device).manual_seed(network_seed(seed, 0, 0))
    return fresh_networks(name, dataclasses.replace(run.form, device=device), [generator])


def tested(networks: Ensemble, test) -> Tensor:
    """Accuracy of each network on the test half, ``(K,)``, whether that is in memory or a stream."""
    if not hasattr(test, "in_turn"):
        return accuracy(predict(networks, test.images), test)
    networks.train(False)
    with torch.no_grad():
        logits = [networks(x.unsqueeze(0)).cpu() for x, _ in test.batches(None, 100)]
    return accuracy(torch.cat(logits, 1), test)


def _aggregate(run: Run, one: Unit, device: torch.device) -> None:
    """``table.csv`` with a row per network, and mean and deviation per architecture in ``summary.json``."""
    rows = ["architecture,seed,accuracy"]
    of: dict[str, list[float]] = {}
    for part, (name, seed) in zip(units(run, "train"), trainings(run), strict=True):
        value = read(run, part)[0]["accuracy"].item()
        of.setdefault(name, []).append(value)
        rows.append(f"{name},{seed},{value:.6f}")
    means = {
        name: {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "networks": len(values)}
        for name, values in of.items()
    }
    m = run.form.num_classes * run.plan.ipc
    bytes_of = {"images": sum(p.path(run).stat().st_size for p in units(run, "recover"))}
    bytes_of["labels, if stored"] = label_bytes(recipe(run), m, run.form.num_classes)
    save_summary(run, one, "\n".join(rows) + "\n", accuracy=means, bytes=bytes_of)
