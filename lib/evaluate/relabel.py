r"""Relabel and train: networks learn a distilled set by a teacher's logits for every view of every image (FKD, arXiv 2112.01528).

The last stages of SRe2L and WMDD:

$$\min_\theta\ \tfrac1b\sum_i\hat w_i\,\mathrm{KL}\big(\mathrm{softmax}(t_i/\tau)\,\|\,\mathrm{softmax}(s_i/\tau)\big),\qquad
 \hat w=w/\bar w,$$

without the factor $\tau^2$. Labels are computed where they are needed or read from files (``lib.evaluate.soft_labels``), with the same
training, but for the rounding to 16 bits.

Such labels say much more than the images: always beside these numbers stand hard-label accuracies, random real images with the
same teacher, and the bytes of the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.evaluate.alike import check_alike
from lib.evaluate.networks import Evaluation, accuracy, is_balanced, network_seed
from lib.evaluate.soft_labels import FKD, LabelStore, View, apply_view, epoch_views
from lib.nets.ensemble import Ensemble
from lib.nets.training import cosine_schedule, predict, update
from lib.recover.teacher import TORCHVISION, drawn
from lib.synset import SyntheticSet
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.cache import digest, stored
from lib.system.checkpoint import Checkpoint, Training, Unkept, of_device
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_seed, choose
from lib.system.measure import Meter


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
