"""``evaluate``: sets in, accuracies out; all networks of one call are trained as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib import nets
from lib.evaluate.alike import check_alike
from lib.evaluate.protocol import Protocol
from lib.evaluate.spread import Spread
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict, schedule, sgd_steps
from lib.synset import SyntheticSet
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.device import check_default_type
from lib.system.errors import CompanionError, check_seed
from lib.system.measure import Meter

MAP_BYTES = (
    4 * 2**20
)  # of all networks' feature maps in one training step: beyond the cache of a core, more is slower
MAP_BYTES_CUDA = 2**30


@dataclass(frozen=True)
class Evaluation:
    """Test accuracies of one protocol.

    Attributes:
        accuracy: ``(sets, networks)``, fractions in [0, 1]: the mean of the per-class accuracies where the test classes differ in
            size (``balanced``), else plain accuracy, which is the same thing then.
        seconds: wall time of training and testing; peak_bytes: of memory, above the start.
    """

    accuracy: Tensor
    protocol: Protocol
    balanced: bool
    seconds: float
    peak_bytes: int

    @property
    def spread(self) -> Spread:
        """Of the means of the sets, in percent: the sets are the independent repetitions, their networks are not."""
        return Spread.of(self.accuracy.mean(1), 100)

    def __str__(self) -> str:
        sets, networks = self.accuracy.shape
        return f"{self.spread} % ({sets} sets x {networks} networks)"


def evaluate(
    sets: SyntheticSet | Sequence[SyntheticSet],
    data,
    protocol: Protocol,
    seed: int = 0,
    networks: int | None = None,
    cache: bool = False,
    network: str | Callable[[], nn.Module] | None = None,
) -> Evaluation:
    """Train fresh networks on each set and test them on ``data.test``.

    Network j of set i has its own generator, made of ``seed``, i and j, for initial weights, batch order and augmentation, so
    its accuracy does not depend on what is evaluated beside it.

    Args:
        sets: one set, or several; neighbours of the same shape are trained together.
        data: the real data (``lib.data.Data``); only its test half is used.
        networks: per set; None: as the protocol says.
        cache: return a stored result of the same sets, data, protocol, seed and code.
        network: another one than the protocol's, a name or what makes a module; results of the latter have no name to be kept under.
    Raises:
        CompanionError: nothing to evaluate; a seed that is none; sets of other classes, sizes or another space than the data; learned
            rates that the protocol cannot take; a network that gives no logits of these images, or is to be cached without a name.
    """
    sets = [sets] if isinstance(sets, SyntheticSet) else list(sets)
    if network is not None:
        protocol = replace(protocol, network=network)
    if cache and not isinstance(protocol.network, str):
        raise CompanionError(
            "a network of your own has no name to keep its result under: allowed is cache=False"
        )
    count = protocol.networks if networks is None else networks
    if not sets or isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CompanionError(
            f"{len(sets)} sets and {count!r} networks to evaluate: at least 1 of each is needed"
        )

    seed = check_seed(seed)
    check_default_type()
    check_alike(sets, data.test)

    def compute() -> dict[str, Tensor]:
        with Meter(data.test.device) as meter:
            parts = _together(sets, count, data.test, protocol)
            accuracy = torch.cat([_accuracies(sets, part, data.test, protocol, seed) for part in parts])
        cost = torch.tensor([meter.seconds, meter.peak_bytes], dtype=torch.float64)
        return {"accuracy": accuracy.view(len(sets), count), "cost": cost}

    found = stored(_key(sets, data, protocol, seed, count), compute) if cache else compute()
    seconds, peak = found["cost"].tolist()
    return Evaluation(found["accuracy"].cpu(), protocol, is_balanced(data.test), seconds, int(peak))


def _key(sets: list[SyntheticSet], data, protocol: Protocol, seed: int, count: int) -> str:
    content = [[s.images, s.targets, s.weights if s.weights is not None else 0] for s in sets]
    rates = [s.step_size if s.step_size is not None else 0 for s in sets]
    what = digest(content, rates, data.test.fingerprint, protocol, seed, count, data.test.device.type)
    return f"evaluation-{digest(what, code_digest(__name__))}"


def _accuracies(sets: list[SyntheticSet], pairs, test, protocol: Protocol, seed: int) -> Tensor:
    """One accuracy per pair (set, network), ``(len(pairs),)``."""
    generators = [torch.Generator(test.device).manual_seed(network_seed(seed, i, j)) for i, j in pairs]
    networks = Ensemble.make(protocol.network, test, generators)
    if not isinstance(protocol.network, str):
        _check_logits(networks, test)
    chosen = [sets[i] for i, _ in pairs]
    images = torch.stack([s.images.detach() for s in chosen]).to(test.images)
    labels = torch.stack([(s.hard_labels if protocol.labels == "hard" else s.targets) for s in chosen]).to(
        test.device
    )
    if labels.is_floating_point() and bool((labels < 0).any()):
        raise CompanionError(
            f"labels down to {float(labels.min()):.3g} are targets of a regression, on which cross-entropy has no minimum; "
            'allowed: 0 or more, or a protocol with labels="hard"'
        )
    weights = None
    if chosen[0].weights is not None:
        weights = torch.stack([s.image_weights for s in chosen]).to(test.device)
    train(networks, images, labels, generators, protocol, test, weights, _rate(chosen[0], protocol))
    return accuracy(predict(networks, test.images), test)


def _check_logits(networks: Ensemble, test) -> None:
    """Refuse a network that does not turn these images into a logit per class."""
    wanted = (len(test.images[:2]), test.num_classes)
    try:
        with torch.no_grad():
            shape = tuple(networks.network(0).eval()(test.images[:2]).shape)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CompanionError(
            f"the network cannot take images {'x'.join(map(str, test.shape))}: {str(error).splitlines()[0]}"
        ) from error
    if shape != wanted:
        raise CompanionError(
            f"the network gives {shape} for {wanted[0]} images of {wanted[1]} classes; allowed: {wanted}"
        )


def train(
    networks,
    images,
    labels,
    generators,
    protocol: Protocol,
    data,
    weights=None,
    lr: float | None = None,
    after_epoch=None,
) -> None:
    """Train K networks on ``(K or 1, m, ...)`` images under a protocol, in place; ``after_epoch`` as in ``sgd_steps``."""
    rate, fresh = schedule(protocol.schedule, protocol.lr if lr is None else lr, protocol.epochs)
    sgd_steps(
        networks,
        images,
        labels,
        generators,
        epochs=protocol.trained_epochs,
        lr=rate,
        momentum=protocol.momentum,
        nesterov=protocol.nesterov,
        weight_decay=protocol.weight_decay,
        batch=protocol.batch,
        augmentation=protocol.families(data),
        mode=protocol.mode,
        cutmix=protocol.cutmix,
        weights=weights,
        fresh_at=fresh,
        after_epoch=after_epoch,
    )


def _together(sets: list[SyntheticSet], count: int, test, protocol: Protocol) -> list[list[tuple[int, int]]]:
    """All pairs (set, network) in runs that are trained as one: same shapes and learning rate, and feature maps of all
    networks together within a budget."""
    width = 128 if callable(protocol.network) else nets.parse(protocol.network)[1].get("width", 128)
    budget = MAP_BYTES_CUDA if test.device.type == "cuda" else MAP_BYTES

    def kind(s: SyntheticSet) -> tuple:
        return len(s.targets), s.labels.shape[1:], s.weights is None, _rate(s, protocol)

    runs: list[list[tuple[int, int]]] = []
    for i, synset in enumerate(sets):
        most = max(1, budget // (min(protocol.batch, len(synset.targets)) * width * test.size**2 * 4))
        for j in range(count):
            if not runs or len(runs[-1]) >= most or kind(sets[runs[-1][0][0]]) != kind(synset):
                runs.append([])
            runs[-1].append((i, j))
    return runs


def _rate(synset: SyntheticSet, protocol: Protocol) -> float:
    """The learning rate: the set's own, where it has one and the protocol takes it.

    Raises:
        CompanionError: one rate per step (DD), which no ordinary training can follow; a rate that no training descends with.
    """
    learned = synset.step_size
    if not protocol.learned_lr or learned is None:
        return protocol.lr
    if learned.numel() != 1:
        raise CompanionError(
            f"the set has {learned.numel()} learned rates, protocol {protocol.name!r} takes 1: allowed are "
            "lib.evaluate.schedule.evaluate_schedule, which follows them, or learned_lr=False"
        )
    if not float(learned) > 0:
        raise CompanionError(
            f"learned rate {float(learned):g} of the set under protocol {protocol.name!r}: allowed above 0, or learned_lr=False"
        )
    return float(learned)


def network_seed(seed: int, which_set: int, network: int) -> int:
    """A seed for every (evaluation seed, set, network), spread so that neighbours are unrelated."""
    return int(digest("network", seed, which_set, network)[:15], 16)


def is_balanced(test) -> bool:
    """Whether accuracy is averaged over classes: the test classes differ by more than a tenth."""
    return bool(test.counts.max() > 1.1 * test.counts.min())


def accuracy(logits: Tensor, test) -> Tensor:
    """Accuracy of ``(K, N, C)`` logits, ``(K,)``; class-balanced where :func:`is_balanced`."""
    correct = (logits.argmax(2) == test.labels).double()
    if not is_balanced(test):
        return correct.mean(1)
    present = test.counts.nonzero().flatten().tolist()
    return torch.stack([correct[:, test.labels == c].mean(1) for c in present]).mean(0)


def full_data_accuracy(
    data, protocol: Protocol, seed: int = 0, networks: int = 2, epochs: int = 30, cache: bool = True
) -> Evaluation:
    """The ceiling: the same networks and optimiser on all training data, ``epochs`` passes in batches of at most 64 (the
    protocol's 256 would leave so short a run undertrained)."""
    train_set = data.train
    everything = SyntheticSet(train_set.images, train_set.labels, train_set.classes, train_set.transform)
    changed = replace(protocol, epochs=epochs, batch=min(64, protocol.batch), name=f"{protocol.name}-full")
    return evaluate(everything, data, changed, seed, networks, cache)


def cross_architecture(
    sets, data, protocol: Protocol, networks: Sequence[str], seed: int = 0, count: int = 3, cache: bool = True
) -> dict[str, Evaluation]:
    """The same evaluation with other networks, nothing retuned: network name -> result."""
    return {
        name: evaluate(sets, data, replace(protocol, network=name), seed, count, cache) for name in networks
    }
