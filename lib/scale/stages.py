"""What a unit of each stage computes. Every function reads the files of other units and writes one file of its own."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.distill import identity
from lib.evaluate.networks import accuracy, network_seed
from lib.evaluate.relabel import fresh_networks, train_by_distillation
from lib.evaluate.soft_labels import LabelStore, half_logits, label_bytes
from lib.match.batchnorm import Watch
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.recover.blocks import Prepared, class_images, stored_pixels
from lib.recover.teacher import frozen, make_teacher
from lib.scale.plan import Run, real, same_data, transform_of
from lib.scale.squeeze import squeeze
from lib.scale.store import keeping, read, save, save_summary
from lib.scale.units import Unit, blocks, method, needs, recipe, trainings, units
from lib.synset import SyntheticSet, class_major, imported
from lib.system.checkpoint import Checkpoint, Training
from lib.system.errors import CompanionError


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
    return frozen(run.plan.arithmetic.laid_out(network))


def _squeeze(run: Run, one: Unit, device: torch.device) -> None:
    checkpoint = keeping(run, one)
    save(run, one, squeeze(run, device, checkpoint=checkpoint).state_dict())
    checkpoint.done()


# -- class statistics and recovery ----------------------------------------------------------------------------------------


def _statistics(run: Run, one: Unit, device: torch.device) -> None:
    """Per class what the method asks of its real images, ``<class>.<name>``."""
    chosen, train = method(run), real(run.plan, "train", device)
    same_data(run.form, train)
    tensors = {}
    with Watch(teacher_of(run, device), run.plan.arithmetic) as watch:
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
    """The images of a block: bytes if the method stores images in 8 bits, else normalised pixels; or somebody else's set."""
    if run.plan.images:
        save(run, one, {"pixels": released(run)})
        return
    chosen, block = method(run), blocks(run)[one.number]
    parts = [part for part in needs(run, one) if part.stage == "statistics"]
    with Watch(teacher_of(run, device), run.plan.arithmetic) as watch:
        ready, checkpoint = prepared(run, parts, watch, device), keeping(run, one)
        state = chosen.start(ready, [block], run.plan.seed)
        at = Training({"pixels": state.pixels[0]}, state.optimiser)
        checkpoint.begin(at)
        at.new_epoch(0)
        state.done = at.goes_on()
        while state.done < chosen.iterations:
            chosen.step(state)
            checkpoint.after(at)
        pixels = stored_pixels(chosen.ordered(state, 0), ready.transform, chosen.storage)
    if chosen.storage != "float":
        pixels = (ready.transform.inverse(pixels) * 255).round().to(torch.uint8)
    save(run, one, {"pixels": pixels})
    checkpoint.done()


def released(run: Run) -> Tensor:
    """The images of somebody else's set, class by class, ``ipc`` of each; bytes if they come from image files.

    Raises:
        CompanionError: they are not of these classes, or not ``ipc`` of each.
    """
    form, ipc = run.form, run.plan.ipc
    found = imported.read(run.plan.images, form.name, form.classes, (form.channels, form.size, form.size))
    for name, count in zip(
        form.classes, torch.bincount(found.labels, minlength=form.num_classes).tolist(), strict=True
    ):
        if count != ipc:
            raise CompanionError(f"{run.plan.images} has {count} images of class {name!r}, the plan {ipc}")
    return found.images[found.labels.argsort(stable=True)]


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
    hard_labels: Tensor
    image_weights: Tensor | None = None


def the_images(run: Run, device: torch.device | str) -> Images:
    """The distilled images, from the files of all blocks."""
    form, ipc, pixels = run.form, run.plan.ipc, None
    there = units(run, "recover")
    if run.plan.images:
        return Images(read(run, there[0])[0]["pixels"].to(device), transform_of(form).to(device))
    for one, block in zip(there, blocks(run), strict=True):
        part = read(run, one)[0]["pixels"]
        if pixels is None:
            pixels = torch.empty(form.num_classes * ipc, *part.shape[1:], dtype=part.dtype)
        pixels[block.rows(ipc)] = part
    return Images(pixels.to(device), transform_of(form).to(device))


def the_weights(run: Run, device: torch.device | str) -> Tensor | None:
    """The weight of every image, class by class, where the method's barycenters have unequal ones."""
    if run.plan.images or not method(run).weighted:
        return None
    targets = {}
    for part in units(run, "statistics"):
        for key, tensor in read(run, part)[0].items():
            c, name = key.split(".", 1)
            if name == "weights":
                targets[int(c)] = tensor
    return torch.cat([targets[c] for c in sorted(targets)]).to(device)


def shown(run: Run, device: torch.device | str) -> Shown:
    """The distilled images, their classes and their weights."""
    labels = class_major(run.form.num_classes, run.plan.ipc, device)
    return Shown(the_images(run, device), labels, the_weights(run, device))


def the_set(run: Run) -> SyntheticSet:
    """The distilled set of a run whose blocks are all there."""
    form, chosen, images = run.form, method(run), the_images(run, "cpu")
    made = {"method": f"images of {run.plan.images}"} if run.plan.images else identity(chosen)
    meta = made | {"dataset": form.name, "ipc": run.plan.ipc, "seed": run.plan.seed}
    labels = class_major(form.num_classes, run.plan.ipc, "cpu")
    weights = the_weights(run, "cpu")
    return SyntheticSet(images[:], labels, form.classes, images.transform, weights=weights, meta=meta)


# -- labels and training --------------------------------------------------------------------------------------------------


def _relabel(run: Run, one: Unit, device: torch.device) -> None:
    """The teacher's logits for all views of these epochs, 16 bits, ``(epochs, images, classes)``."""
    teacher, protocol = teacher_of(run, device), recipe(run)
    epochs, arithmetic = range(one.first, one.last), run.plan.arithmetic
    save(run, one, {"logits": half_logits(teacher, shown(run, device), protocol, epochs, arithmetic)})


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
    """Fresh networks on the set, one with every kind of label; per kind the accuracy on the test half by epoch, and the last."""
    name, seed = trainings(run)[one.number]
    tensors, kept = {}, []
    for column in run.plan.columns:
        checkpoint = keeping(run, one, f"-{column}")
        epochs, curve, loss = trained(run, name, seed, column, device, checkpoint)
        found = {"accuracy": curve[-1].clone(), "loss": loss, "epochs": epochs, "curve": curve}
        tensors |= {f"{column}.{key}": tensor for key, tensor in found.items()}
        kept.append(checkpoint)
    save(run, one, tensors, architecture=name, seed=seed)
    for checkpoint in kept:
        checkpoint.done()


def trained(
    run: Run, name: str, seed: int, column: str, device: torch.device, checkpoint: Checkpoint
) -> tuple[Tensor, Tensor, Tensor]:
    """Train one network with ``soft`` or ``hard`` labels: validated epochs ``(e,)``, accuracies ``(e, 1)``, loss ``(1,)``.

    What PyTorch's own generators give to dropout follows from the seed.
    """
    networks, protocol, test = fresh(run, name, seed, device), recipe(run), real(run.plan, "test", device)
    source = None
    if column == "soft":
        source = Labels(run, device) if run.plan.labels == "store" else teacher_of(run, device)

    def look(done: int) -> None:
        wanted = done == protocol.epochs or done % run.plan.validate_every == 0
        if wanted and f"epoch.{done}" not in checkpoint.kept:
            checkpoint.kept[f"epoch.{done}"] = tested(networks, test)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(network_seed(seed, 0, 1))
        loss = train_by_distillation(
            networks, shown(run, device), source, protocol, checkpoint, run.plan.arithmetic, look
        )
    curve = {int(key[6:]): value.cpu() for key, value in checkpoint.kept.items() if key.startswith("epoch.")}
    return torch.tensor(sorted(curve)), torch.stack([curve[epoch] for epoch in sorted(curve)]), loss


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
    """``table.csv`` with a row per network and a column per kind of labels, ``curves.csv`` with every look at the test half, and
    mean and deviation per architecture in ``summary.json``. All accuracies but those of the curves are of the last epoch."""
    columns = run.plan.columns
    rows, curves = [",".join(["architecture", "seed", *columns])], ["architecture,seed,labels,epoch,accuracy"]
    of: dict[str, dict[str, list[float]]] = {}
    for part, (name, seed) in zip(units(run, "train"), trainings(run), strict=True):
        found, values = read(run, part)[0], of.setdefault(name, {})
        last = {column: found[f"{column}.accuracy"].item() for column in columns}
        rows.append(",".join([name, str(seed), *(f"{last[column]:.6f}" for column in columns)]))
        for column in columns:
            values.setdefault(column, []).append(last[column])
            pairs = zip(
                found[f"{column}.epochs"].tolist(), found[f"{column}.curve"][:, 0].tolist(), strict=True
            )
            curves += [f"{name},{seed},{column},{epoch},{value:.6f}" for epoch, value in pairs]
    means = {
        name: {
            column: {"mean": statistics.fmean(all_), "std": statistics.pstdev(all_), "networks": len(all_)}
            for column, all_ in values.items()
        }
        for name, values in of.items()
    }
    m = run.form.num_classes * run.plan.ipc
    bytes_of = {"images": sum(p.path(run).stat().st_size for p in units(run, "recover"))}
    bytes_of["labels, if stored"] = label_bytes(recipe(run), m, run.form.num_classes)
    table, looks = ("\n".join(lines) + "\n" for lines in (rows, curves))
    save_summary(run, one, table, looks, accuracy=means, bytes=bytes_of)
