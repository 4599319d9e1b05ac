"""Experts: networks trained on the real data, whose weights after every epoch are kept (MTT's buffer, arXiv 2203.11932).

One buffer serves all methods that follow trajectories, all distilled sets of a run, and all that start again: it is kept in the
cache under a key of settings, network, data and code. Who reads further than it goes has it continued, who reads less takes its
beginning. A damaged file is recorded anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib.nets.ensemble import Ensemble
from lib.nets.flat import LAWS, draw, flatten, template, unflatten
from lib.nets.training import sgd_steps
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_several, choose, positive, whole

SIDE_BY_SIDE = 8  # experts that are trained as one ensemble


@dataclass(frozen=True)
class Experts:
    """How experts are trained; the defaults are those of the published commands: SGD at a constant rate.

    Attributes:
        count: experts; epochs: None: no more than a method reads (the published buffers have 50).
        lr, momentum, weight_decay, batch: of SGD; halve_every: halve the rate after so many epochs, None: never; adam: Adam with betas
            0.5 and 0.999 instead, as DD's code trains.
        augmentation: "data", "none" or families; one family per batch, own parameters for every image.
        law: of the initial weights (``lib.nets.flat``); seed: one buffer for all distilled sets, as published.
    """

    count: int = 100
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch: int = 256
    augmentation: str = "data"
    law: str = "default"
    adam: bool = False
    halve_every: int | None = None
    epochs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("epochs", "halve_every") if getattr(self, name) is not None]
        whole(self, count=1, batch=1, seed=0, **dict.fromkeys(given, 1))
        positive(self, "lr")
        choose("law of initial weights", self.law, LAWS)

    def record(self, network: str, train, reach: int) -> Tensor:
        """Weights after 0, 1, .., ``reach`` epochs (or as many as ``epochs`` says), ``(count, epochs + 1, P)`` on the CPU.

        Expert k has a generator of its own, so it does not depend on how many others there are.

        Raises:
            CompanionError: fewer epochs than ``reach``; a network with running statistics; an expert that diverged; a full disk.
        """
        if self.epochs is not None and self.epochs < reach:
            raise CompanionError(
                f"experts of {self.epochs} epochs, but epoch {reach} is read: allowed {reach} or more"
            )
        epochs = range((self.epochs or reach) + 1)
        if self.momentum or self.adam:  # weights alone do not say how to go on
            return self._kept(network, train, tuple(epochs))
        found: list[Tensor] = []
        for epoch in epochs:
            found += self._kept(network, train, (epoch,), *found[-1:]).unbind(1)
        return torch.stack(found, 1)

    def last(self, network: str, train, epochs: int) -> Tensor:
        """Weights after so many epochs alone, ``(count, P)``; errors as :meth:`record`."""
        return self._kept(network, train, (epochs,))[:, 0]

    def _kept(self, network: str, train, wanted: tuple[int, ...], before: Tensor | None = None) -> Tensor:
        """``(count, len(wanted), P)``; ``before``: the weights one epoch before the first of those wanted, to go on from."""
        check_several(train.num_classes, "a trajectory of experts")
        law = replace(self, epochs=None)
        key = digest(law, network, wanted, train.fingerprint, train.device.type, code_digest(__name__))
        kept = stored(f"experts-{key}", lambda: {"weights": self._train(network, train, wanted, before)})
        found = kept["weights"]
        if not bool(found.isfinite().all()):
            raise CompanionError(f"an expert {network} diverged on {train.name} at learning rate {self.lr:g}")
        return found

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """One for every expert: of its initial weights, batches and augmentation."""
        seeds = [int(digest("expert", self.seed, k)[:15], 16) for k in range(self.count)]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def rate(self, epoch: float) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr if self.halve_every is None else self.lr * 0.5 ** (int(epoch) // self.halve_every)

    def _train(self, network: str, train, wanted: tuple[int, ...], before: Tensor | None) -> Tensor:
        like, generators = template(network, train), self.generators(train.device)
        groups = [slice(k, k + SIDE_BY_SIDE) for k in range(0, self.count, SIDE_BY_SIDE)]
        starts = [None if before is None else before[group].to(train.device) for group in groups]
        found = [
            self._group(like, train, wanted, generators[group], start)
            for group, start in zip(groups, starts, strict=True)
        ]
        return torch.cat(found)

    def _group(
        self,
        like: nn.Module,
        train,
        wanted: tuple[int, ...],
        generators: list[torch.Generator],
        before: Tensor | None,
    ) -> Tensor:
        drawn = draw(like, generators, self.law)  # also before going on: batches come after it in the stream
        start = unflatten(drawn if before is None else before, like)
        networks = Ensemble(
            like, {name: w.contiguous().clone().requires_grad_() for name, w in start.items()}, {}
        )
        parameters, snapshots = list(networks.parameters.values()), []
        adam = torch.optim.Adam(parameters, betas=(0.5, 0.999), fused=True) if self.adam else None

        def keep(done: int) -> None:
            if done in wanted:  # a copy: the optimiser goes on in place
                snapshots.append(flatten(networks.parameters).detach().cpu().clone())

        if before is None:
            keep(0)
        sgd_steps(
            networks,
            train.images.unsqueeze(0),
            train.labels.unsqueeze(0),
            generators,
            epochs=max(wanted),
            first=0 if before is None else wanted[0] - 1,
            lr=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch=self.batch,
            augmentation=train.augmentation if self.augmentation == "data" else self.augmentation,
            after_epoch=keep,
            optimiser=adam,
        )
        return torch.stack(snapshots, 1)
