r"""Sets that are drawn anew in every epoch: what a stored generator is worth, as DiM judges it (arXiv 2303.04707).

A fixed set shows a learner the same IPC images of a class in every epoch, a generator so many *new* ones: over 300 epochs 300 IPC. The
rest is an ordinary protocol, whose name gets the prefix ``fresh-``; its accuracies do not belong in a column with those of fixed sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lib.evaluate.alike import check_alike
from lib.evaluate.networks import Evaluation, accuracy, is_balanced, network_seed, train
from lib.evaluate.protocol import Protocol
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.synset import SyntheticSet, check_ipc, class_major
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_seed
from lib.system.measure import Meter

PREFIX = "fresh-"
OTHER = 1_000_003  # added to a network's seed: its images do not depend on its batch order


def fresh(protocol: Protocol) -> Protocol:
    """The protocol with new images in every epoch."""
    return replace(protocol, name=PREFIX + protocol.name.removeprefix(PREFIX))


def evaluate_fresh(
    sets: SyntheticSet | Sequence[SyntheticSet],
    data,
    protocol: Protocol,
    per_class: int,
    seed: int = 0,
    networks: int | None = None,
    cache: bool = False,
) -> Evaluation:
    """Train networks on ``per_class`` new images of every class in every epoch, and test them on ``data.test``.

    Args:
        sets: whose decoder draws images (``lib.formation.generated``); their codes do not matter.
        per_class: images of a class in an epoch, not bound to the IPC of the sets.
        networks, cache: as :func:`lib.evaluate.evaluate`.
    Raises:
        CompanionError: a set that cannot draw; a seed or number that is none; sets of other data.
    """
    sets = [sets] if isinstance(sets, SyntheticSet) else list(sets)
    count, protocol = protocol.networks if networks is None else networks, fresh(protocol)
    seed, per_class = check_seed(seed), check_ipc(per_class)
    if not sets or count < 1:
        raise CompanionError(
            f"{len(sets)} sets and {count!r} networks to evaluate: at least 1 of each is needed"
        )
    for synset in sets:
        if not hasattr(synset.decoder, "draw"):
            raise CompanionError(
                f"a set of {synset.decoder.name!r} cannot draw new images: allowed are sets whose decoder is a generator"
            )
    check_alike(sets, data.test)

    def compute() -> dict[str, Tensor]:
        with Meter(data.test.device) as meter:
            found = [_accuracies(s, i, data, protocol, per_class, seed, count) for i, s in enumerate(sets)]
        cost = torch.tensor([meter.seconds, meter.peak_bytes], dtype=torch.float64)
        return {"accuracy": torch.stack(found), "cost": cost}

    content = [s.decoder.weights for s in sets]
    where = (data.test.fingerprint, data.test.device.type)
    key = digest(content, *where, protocol, per_class, seed, count, code_digest(__name__))
    found = stored(f"fresh-{key}", compute) if cache else compute()
    seconds, peak = found["cost"].tolist()
    return Evaluation(found["accuracy"].cpu(), protocol, is_balanced(data.test), seconds, int(peak))


def _accuracies(
    synset: SyntheticSet, which: int, data, protocol: Protocol, per_class: int, seed: int, count: int
) -> Tensor:
    """Of all networks that learn from one generator, side by side, ``(count,)``."""
    test, decoder = data.test, synset.to(data.test.device).decoder
    seeds = [network_seed(seed, which, j) for j in range(count)]
    generators = [torch.Generator(test.device).manual_seed(s) for s in seeds]
    sources = [torch.Generator(test.device).manual_seed(s + OTHER) for s in seeds]
    networks = Ensemble.make(protocol.network, test, generators)
    labels = class_major(len(synset.classes), per_class, test.device)
    images = decoder.draw(labels, sources).contiguous()

    def renew(epoch: int) -> None:
        images.copy_(decoder.draw(labels, sources))

    train(networks, images, labels.unsqueeze(0), generators, protocol, test, after_epoch=renew)
    return accuracy(predict(networks, test.images), test)
