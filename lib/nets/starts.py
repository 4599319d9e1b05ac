r"""Where an unrolled training starts: $\theta_0\sim p(\theta_0)$ as a value, the same for distillation and test (DD, arXiv 1811.10959).

A start is a frozen dataclass with ``begin`` (the weights that it keeps, or None) and ``draw`` (weights ``(K, P)`` of some networks).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib import data
from lib.nets.experts import Experts
from lib.nets.flat import LAWS, draw, template
from lib.system.errors import CompanionError, choose, whole

HELD_OUT = 1_000_003  # added to the seed of a pool: networks that the distillation never saw


@dataclass(frozen=True)
class Random:
    """New weights every time, by a law of ``lib.nets.flat``.

    Attributes:
        law: "xavier" or "default".
    """

    law: str = "xavier"

    def __post_init__(self) -> None:
        choose("law of initial weights", self.law, LAWS)

    def begin(self, network: str, train, held_out: bool = False) -> Tensor | None:
        return None

    def draw(self, like: nn.Module, kept: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        return draw(like, [generator] * count, self.law)


@dataclass(frozen=True)
class Fixed:
    """One network, drawn once: the set is made for it alone, and tested on it.

    Attributes:
        law: "xavier" or "default"; seed: of the network.
    """

    law: str = "xavier"
    seed: int = 0

    def __post_init__(self) -> None:
        choose("law of initial weights", self.law, LAWS)
        whole(self, seed=0)

    def begin(self, network: str, train, held_out: bool = False) -> Tensor | None:
        generator = torch.Generator(train.device).manual_seed(self.seed)
        return draw(template(network, train), [generator], self.law)

    def draw(self, like: nn.Module, kept: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        return kept


@dataclass(frozen=True)
class Pretrained:
    """Random ones of a pool of trained networks; tested on networks that are not in it.

    Attributes:
        experts: how they are trained; epochs: how long; source: name of the data set they are trained on, "" for the one that is
            distilled (an attack); another one for adaptation.
    """

    experts: Experts = Experts()
    epochs: int = 40
    source: str = ""

    def __post_init__(self) -> None:
        whole(self, epochs=1)

    def begin(self, network: str, train, held_out: bool = False) -> Tensor | None:
        source = data.load(self.source, device=train.device).train if self.source else train
        if (source.shape, source.num_classes) != (train.shape, train.num_classes):
            raise CompanionError(
                f"networks of {source.name} see {source.shape} and {source.num_classes} classes, {train.name} has {train.shape} "
                f"and {train.num_classes}: allowed are data of the same shape"
            )
        experts = replace(self.experts, seed=self.experts.seed + HELD_OUT) if held_out else self.experts
        return experts.last(network, source, self.epochs).to(train.device)

    def draw(self, like: nn.Module, kept: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randperm(len(kept), generator=generator, device=kept.device)[:count]
        return kept[rows]
