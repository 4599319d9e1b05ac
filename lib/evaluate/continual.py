r"""Continual learning with a memory: classes arrive in stages, and only what was distilled of them is kept.

The class-incremental protocol of GDumb (ECCV 2020) as the DM paper uses it (arXiv 2110.04181, section 4.2): at stage $k$ the
real images of the new classes are reduced to a few each and added to the memory; then a network is trained *from scratch* on the
memory of all classes seen so far and tested on these classes. Its head has an output for every class there will be.

A method sees the data of its own stage only, and what is in the memory is never touched again. Where the classes of a method do
not meet (random picks; DM, M3D or DDM with a network without batch norm: a sum over classes, each with its own images and
augmentation), distilling all classes at once and handing them out by :func:`of_classes` has the same law as stage by stage, and
costs once instead of once per class order. It is *not* the same where classes meet in a loss or in a network that is trained
(DC, DSA, CAFE, IDM, herding with a trained proxy): these would know the future.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.data.imageset import Data, ImageSet
from lib.evaluate.networks import evaluate
from lib.evaluate.protocol import Protocol
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

ORDER_STEP = 1000  # evaluation seeds: stages of one class order never meet those of another


@dataclass(frozen=True)
class Memory:
    """What is kept of the classes seen so far.

    Attributes:
        classes: names of all classes, seen or not.
        stages: the classes of every stage so far; sets: their synthetic sets, labelled 0, 1, ... in the order of the stage.
    """

    classes: tuple[str, ...]
    stages: tuple[tuple[int, ...], ...] = ()
    sets: tuple[SyntheticSet, ...] = ()

    @property
    def seen(self) -> list[int]:
        return [c for stage in self.stages for c in stage]

    def add(self, stage: Sequence[int], synset: SyntheticSet) -> Memory:
        """The memory with one stage more.

        Raises:
            CompanionError: a class that does not exist or is there already, or a set of another number of classes.
        """
        stage = tuple(int(c) for c in stage)
        for i, c in enumerate(stage):
            if not 0 <= c < len(self.classes):
                raise CompanionError(f"class {c} does not exist: allowed 0 to {len(self.classes) - 1}")
            if c in self.seen or c in stage[:i]:
                raise CompanionError(f"class {c} ({self.classes[c]!r}) is in the memory already")
        if len(synset.classes) != len(stage):
            raise CompanionError(f"a set of {len(synset.classes)} classes for a stage of {len(stage)}")
        if self.sets and (self.sets[0].weights is None) != (synset.weights is None):
            raise CompanionError("a memory holds sets with sample weights or sets without, not both")
        return replace(self, stages=(*self.stages, stage), sets=(*self.sets, synset))

    @property
    def synset(self) -> SyntheticSet:
        """All kept images, decoded, with labels among all classes; soft labels get zeros for the classes of other stages."""
        labels = [self._labels(stage, one) for stage, one in zip(self.stages, self.sets, strict=True)]
        images = torch.cat([one.images.detach() for one in self.sets])
        weights = [one.image_weights for one in self.sets]
        weights = None if weights[0] is None else torch.cat(weights)
        return SyntheticSet(images, torch.cat(labels), self.classes, self.sets[0].transform, weights=weights)

    def _labels(self, stage: tuple[int, ...], synset: SyntheticSet) -> Tensor:
        targets, numbers = synset.targets, torch.tensor(stage, device=synset.labels.device)
        if not synset.soft:
            return numbers[targets]
        wide = targets.new_zeros(len(targets), len(self.classes))
        return wide.index_copy(1, numbers, targets)


def class_orders(classes: int, stages: int, orders: int, generator: torch.Generator) -> Tensor:
    """Random class orders cut into stages, ``(orders, stages, classes / stages)``.

    Raises:
        CompanionError: if the stages do not divide the classes.
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1 or classes % stages:
        allowed = ", ".join(str(n) for n in range(1, classes + 1) if classes % n == 0)
        raise CompanionError(f"{stages!r} stages for {classes} classes: allowed {allowed}")
    if orders < 1:
        raise CompanionError(f"{orders!r} class orders: at least 1 is needed")
    draws = [torch.randperm(classes, generator=generator, device=generator.device) for _ in range(orders)]
    return torch.stack(draws).view(orders, stages, -1).cpu()


def arriving(images: ImageSet, stage: Sequence[int]) -> ImageSet:
    """The data of a stage and nothing else: its images in their order, labelled 0, 1, ... in the order of the stage."""
    stage = [int(c) for c in stage]
    number = images.labels.new_full((images.num_classes,), -1)
    number[stage] = torch.arange(len(stage), device=images.device)
    part = images.subset((number[images.labels] >= 0).nonzero().flatten())
    return replace(part, labels=number[part.labels], classes=tuple(images.classes[c] for c in stage))


def of_classes(synset: SyntheticSet, stage: Sequence[int]) -> SyntheticSet:
    """What a set with hard labels holds of these classes, labelled 0, 1, ... in the order of the stage."""
    if synset.soft:
        raise CompanionError("a set with soft labels cannot be handed out by class: its labels mix classes")
    labels = synset.labels
    rows = torch.cat([(labels == int(c)).nonzero().flatten() for c in stage])
    number = torch.full((len(synset.classes),), -1, dtype=labels.dtype, device=labels.device)
    number[[int(c) for c in stage]] = torch.arange(len(stage), device=labels.device)
    kept = {
        name: value[rows] for name in ("weights", "indices") if (value := getattr(synset, name)) is not None
    }
    names = tuple(synset.classes[int(c)] for c in stage)
    return replace(synset, codes=synset.codes[rows], labels=number[labels[rows]], classes=names, **kept)


def memories(
    remember: Callable[[ImageSet, int], SyntheticSet],
    train: ImageSet,
    order: Tensor | Sequence[Sequence[int]],
) -> list[Memory]:
    """The memory after every stage of one class order, ``(stages, k)``; ``remember(images, stage number)`` distils a stage."""
    kept, found = Memory(train.classes), []
    for number, stage in enumerate(torch.as_tensor(order).tolist()):
        kept = kept.add(stage, remember(arriving(train, stage), number))
        found.append(kept)
    return found


def incremental_accuracy(
    kept: Mapping[str, Sequence[Memory]], data: Data, protocol: Protocol, seed: int = 0,
    networks: int = 1, cache: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Accuracy on the classes seen so far after every stage of one class order, name -> ``(stages, networks)``.

    The networks of a stage, of all methods, are trained as one ensemble (:func:`lib.evaluate.evaluate`).

    Args:
        kept: name -> memories after every stage; all of the same class order.
        networks: trained from scratch at every stage.
    Raises:
        CompanionError: memories of different class orders.
    """
    runs = list(kept.values())
    if not runs or any([m.stages for m in run] != [m.stages for m in runs[0]] for run in runs):
        raise CompanionError("memories to compare must hold the same classes at the same stages")
    accuracy = []
    for number, stage in enumerate(zip(*runs, strict=True)):
        seen = torch.tensor(stage[0].seen, device=data.test.device)
        test = data.test.subset(torch.isin(data.test.labels, seen).nonzero().flatten())
        sets = [memory.synset for memory in stage]
        found = evaluate(sets, Data(data.train, test), protocol, seed * ORDER_STEP + number, networks, cache)
        accuracy.append(found.accuracy)
    table = torch.stack(accuracy, 1)  # (methods, stages, networks)
    return dict(zip(kept, table, strict=True))
