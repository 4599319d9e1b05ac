r"""Sets that come with a schedule: their steps are applied as they were learned, in order, each at its rate (DD, arXiv 1811.10959).

$$\theta_{j+1}=\theta_j-\eta_j\nabla_\theta\,\ell(\theta_j;\ \tilde x_{j\bmod T},\tilde y_{j\bmod T}),\qquad \theta_0\sim p(\theta_0)$$

``SyntheticSet.step_size`` holds the rates of all steps, ``meta["schedule"]`` the number of steps and of passes. The law of the initial
weights is a value (``lib.nets.starts``): the one that the set was made for, or another. Ordinary protocols see the images alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib import nets
from lib.evaluate.alike import check_alike
from lib.evaluate.networks import Evaluation, accuracy, is_balanced, network_seed
from lib.match.unroll import Step, gradient
from lib.nets.ensemble import Ensemble
from lib.nets.flat import template, unflatten
from lib.nets.starts import Random
from lib.nets.training import predict
from lib.synset import SyntheticSet
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_seed, whole
from lib.system.measure import Meter


@dataclass(frozen=True)
class Schedule:
    """How a set with a schedule is judged.

    Attributes:
        start: the law of the initial weights; passes: over the steps, None: as many as were learned. Fewer leave out the last
            passes, more repeat the rates of the last one.
        networks: per set; one suffices for a fixed start.
    """

    network: str
    start: Any = Random()
    passes: int | None = None
    networks: int = 20
    name: str = "own-schedule"

    def __post_init__(self) -> None:
        nets.parse(self.network)
        whole(self, networks=1, **({} if self.passes is None else {"passes": 1}))

    def __str__(self) -> str:
        passes = "as learned" if self.passes is None else f"{self.passes} passes"
        return f"{self.name}: {self.network}, {self.start}, learned steps and rates, {passes}"


def steps_of(synset: SyntheticSet, passes: int | None = None) -> list[Step]:
    """The learned steps in their order.

    Raises:
        CompanionError: a set without a schedule, or whose rates or images do not fit it.
    """
    told = synset.meta.get("schedule")
    if synset.step_size is None or told is None:
        raise CompanionError("this set has no schedule: its images are for an ordinary protocol")
    T, E = told["steps"], told["passes"]
    rates = synset.step_size.flatten()
    if len(rates) != T * E or len(synset.targets) % T:
        raise CompanionError(
            f"{len(rates)} rates and {len(synset.targets)} images for {T} steps in {E} passes: "
            f"allowed are {T * E} rates and a multiple of {T} images"
        )
    images, labels = (value.unflatten(0, (T, -1)) for value in (synset.images.detach(), synset.targets))
    order = [(i, min(e, E - 1) * T + i) for e in range(passes or E) for i in range(T)]
    return [Step(images[i], labels[i], rates[j]) for i, j in order]


def follow(
    synset: SyntheticSet, data, schedule: Schedule, seed: int = 0, which: int = 0, every: bool = False
) -> Tensor:
    """Test accuracies ``(networks,)`` of one set; with ``every`` after 0, 1, .. steps, ``(steps + 1, networks)``."""
    like, device = template(schedule.network, data.test), data.test.device
    kept = schedule.start.begin(schedule.network, data.train, held_out=True)
    generator = torch.Generator(device).manual_seed(network_seed(seed, which, 0))
    theta = schedule.start.draw(like, kept, schedule.networks, generator)
    steps = steps_of(synset.to(device), schedule.passes)

    def tested() -> Tensor:
        return accuracy(
            predict(Ensemble(like, unflatten(theta.detach(), like), {}), data.test.images), data.test
        )

    found = [tested()] if every else []
    for step in steps:
        _, g = gradient(like.train(), theta.detach().requires_grad_(), *step.batch)
        theta = theta.detach() - step.rate * g
        found += [tested()] if every else []
    return torch.stack(found) if every else tested()


def evaluate_schedule(
    sets: SyntheticSet | Sequence[SyntheticSet], data, schedule: Schedule, seed: int = 0, cache: bool = False
) -> Evaluation:
    """Accuracies of sets by their own schedules, ``(sets, networks)``; errors as :func:`steps_of` and
    :func:`lib.evaluate.evaluate`.

    Args:
        cache: return a stored result of the same sets, data, schedule, seed and code.
    """
    sets = [sets] if isinstance(sets, SyntheticSet) else list(sets)
    if not sets:
        raise CompanionError("no set to evaluate: at least 1 is needed")
    check_alike(sets, data.test)
    seed = check_seed(seed)

    def compute() -> dict[str, Tensor]:
        with Meter(data.test.device) as meter:
            found = torch.stack([follow(s, data, schedule, seed, i) for i, s in enumerate(sets)])
        cost = torch.tensor([meter.seconds, meter.peak_bytes], dtype=torch.float64)
        return {"accuracy": found, "cost": cost}

    content = [[s.images, s.targets, s.step_size if s.step_size is not None else 0] for s in sets]
    key = digest(
        content, data.train.fingerprint, data.test.fingerprint, schedule, seed, code_digest(__name__)
    )
    found = stored(f"schedule-{key}", compute) if cache else compute()
    seconds, peak = found["cost"].tolist()
    return Evaluation(found["accuracy"].cpu(), schedule, is_balanced(data.test), seconds, int(peak))
