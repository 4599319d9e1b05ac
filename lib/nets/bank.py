r"""A bank of partly trained networks as the supply $\mathcal Q$ of a method (``lib.nets.supply``), as for IT-GAN's released latents.

Its members are snapshots of training on the real images, after every epoch of a few runs (``lib.nets.experts``: kept in the cache, the
same for all sets), as far as their accuracy lies between two bounds. A step looks at any of them with the same probability. They are
never trained on.

Paper and code: IT-GAN's authors chose snapshots by *test* accuracy, from 70 % on CIFAR-10 and 40 % on CIFAR-100 upwards, up to 5000 of
them. Here training images judge, so that no test image has a say in a set.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lib.nets.experts import Experts
from lib.nets.flat import logits, template, unflatten
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, whole

AT_ONCE = 8  # snapshots that are judged as one ensemble


@dataclass
class Snapshots:
    """The networks whose accuracy lies within the bounds. A checkpoint needs none of it: the next draw depends on the generator alone."""

    network: nn.Module = field(metadata={"constant": True})  # the one that is looked at
    weights: Tensor = field(metadata={"constant": True})  # (size, P), on the CPU
    percents: Tensor = field(metadata={"constant": True})  # (size,) training accuracy, 0 to 100
    percent: Tensor | float = 0.0  # of the network of this step


@dataclass(frozen=True)
class Bank:
    """Which snapshots are kept; the defaults are IT-GAN's of CIFAR-10.

    Attributes:
        experts: the runs whose snapshots are taken, ``epochs`` given; also their first one, of random weights, if ``least`` is low enough.
        least, most: bounds of the training accuracy, in percent, 0 to 100.
        judges: random training images that tell it, 1 or more.
    """

    experts: Experts = Experts(100, momentum=0.9, weight_decay=5e-4, epochs=50)
    least: float = 70.0
    most: float = 100.0
    judges: int = 1000

    def __post_init__(self) -> None:
        whole(self, judges=1)
        if not 0 <= self.least <= self.most <= 100:
            raise CompanionError(
                f"least {self.least!r} and most {self.most!r} are not allowed: 0 <= least <= most <= 100"
            )
        if self.experts.epochs is None:
            raise CompanionError("experts without a number of epochs: a bank needs Experts(epochs=1) or more")

    def begin(self, name: str, train, generator: torch.Generator) -> Snapshots:
        """All snapshots within the bounds, the same for every generator.

        Raises:
            CompanionError: there is none; a network with running statistics.
        """
        like = template(name, train)
        weights = self.experts.record(name, train, self.experts.epochs).flatten(0, 1)
        about = (self.experts, self.judges, name, train.fingerprint, train.device.type)
        key = digest(*about, code_digest(__name__))  # all sets of a run ask for the same numbers
        judged = stored(f"bank-{key}", lambda: {"percents": self.accuracies(like, weights, train)})
        percents = judged["percents"]
        kept = (percents >= self.least) & (percents <= self.most)
        if not kept.any():
            raise CompanionError(
                f"no snapshot of {name} has {self.least:g} to {self.most:g} % of the training images of {train.name} right: "
                f"allowed are bounds around {percents.min():.0f} to {percents.max():.0f}, or more epochs"
            )
        return Snapshots(like, weights[kept], percents[kept])

    @torch.no_grad()
    def accuracies(self, like: nn.Module, weights: Tensor, train) -> Tensor:
        """Training accuracy of every snapshot, in percent, ``(size,)`` on the CPU."""
        own = torch.Generator(train.device).manual_seed(self.experts.seed)
        rows = torch.randperm(len(train), generator=own, device=train.device)[: self.judges]
        x, y = train.images[rows].unsqueeze(0), train.labels[rows]
        found = [
            (logits(like, part.to(train.device), x).argmax(2) == y).float().mean(1)
            for part in weights.split(AT_ONCE)
        ]
        return 100 * torch.cat(found).cpu()

    @torch.no_grad()
    def draw(self, memory: Snapshots, generator: torch.Generator) -> nn.Module:
        """One network of the bank, any with the same probability."""
        k = torch.randint(len(memory.weights), (1,), generator=generator, device=generator.device).cpu()
        values = unflatten(memory.weights[k], memory.network)
        for name, parameter in memory.network.named_parameters():
            parameter.copy_(values[name][0])
        memory.percent = memory.percents[k][0]
        return memory.network.train().requires_grad_(False)

    def after(self, memory: Snapshots, train, generator: torch.Generator) -> None:
        pass
