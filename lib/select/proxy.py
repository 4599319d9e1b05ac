r"""The proxy network of a selection: trained once on all data, then asked what it makes of every image.

Training as in DeepCore (Guo et al. 2022, arXiv 2204.08499): SGD at a constant rate, without augmentation, a fresh permutation in
every epoch; then eval mode. All selectors read one :class:`Trained`: embeddings h, logits $z=Wh+b$ and, through
:class:`~lib.select.last_layer.LastLayer`, gradients and curvatures of the last linear layer; Forgetting also reads which images
were right when they were presented.

On small data a network is soon certain of every training image, $p\approx y$: its gradients $p-y$ are gone, and what is chosen by
them is noise. There a proxy is fixed by its accuracy on the training images (``until``), not by its epochs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lib import nets
from lib.data.imageset import ImageSet
from lib.nets.ensemble import Ensemble
from lib.nets.training import _Chance, predict, predict_embeddings, sgd_steps
from lib.select.last_layer import LastLayer
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, unknown

FEATURES = ("proxy", "random", "pixels")
LOOKS = 8  # at the train accuracy in an epoch, where it decides when to stop


@dataclass(frozen=True)
class Proxy:
    """How the proxy is trained; the defaults are those of DeepCore's and LCMat's published commands.

    Attributes:
        network: a name of ``lib.nets``; epochs, lr, weight_decay, batch: of SGD at a constant rate; momentum: Nesterov's.
        until: ours: stop where so much of the training images is right, looked at LOOKS times per epoch; None: never.
    """

    network: str = "resnet18-batch"
    epochs: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 128
    until: float | None = None


@dataclass(frozen=True)
class Trained:
    """A proxy after its training.

    Attributes:
        ensemble: the network, as an ensemble of one, in eval mode.
        train: the data it was trained on, in whose order everything here is.
        correct: whether an image was classified correctly in the training pass that presented it, before the update,
            ``(epochs, N)`` bool; False where training stopped before.
        updates: steps of SGD that it took.
    """

    ensemble: Ensemble
    train: ImageSet
    correct: Tensor
    updates: int

    @functools.cached_property
    def network(self) -> nn.Module:
        """The network by itself, in eval mode."""
        return self.ensemble.network(0).eval()

    @functools.cached_property
    def last(self) -> LastLayer:
        """Logits, embeddings and labels of all training images, from the last linear layer."""
        return last_layer(self.network, self.train)

    @property
    def accuracy(self) -> float:
        """The part of the training images that it classifies correctly."""
        return (self.last.logits.argmax(1) == self.last.labels).double().mean().item()


def embeddings(train: ImageSet, kind: str, proxy: Proxy, generator: torch.Generator) -> Tensor:
    """Features ``(N, d)`` of all training images: of a trained proxy, of its network untrained ("random"), or the "pixels"."""
    if kind == "proxy":
        return train_proxy(proxy, train, generator).last.embeddings
    if kind == "random":
        return predict_embeddings(Ensemble.make(proxy.network, train, [generator]), train.images)[0]
    if kind == "pixels":
        return train.images.flatten(1)
    raise unknown("features", kind, FEATURES)


def train_proxy(proxy: Proxy, train: ImageSet, generator: torch.Generator) -> Trained:
    """Train a proxy on all of ``train``, or take the one that the same call made before from the cache.

    The generator is left in the same state either way. A second call with the same generator gives an independent proxy.

    Raises:
        CompanionError: a setting out of range, or training that diverged.
    """
    for name, value in (("epochs", proxy.epochs), ("batch", proxy.batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CompanionError(f"{name} {value!r} of a proxy: must be a whole number of at least 1")
    if proxy.until is not None and not 0 < proxy.until <= 1:
        raise CompanionError(f"until {proxy.until!r} of a proxy: an accuracy lies in (0, 1], or None")
    ensemble = _Watched.of(Ensemble.make(proxy.network, train, [generator]))
    key = digest(
        asdict(proxy),
        train.fingerprint,
        train.device.type,
        generator.get_state().cpu(),
        code_digest(__name__),
    )

    def compute() -> dict[str, Tensor]:
        correct = _fit(ensemble, proxy, train, generator)
        tensors = {f"network.{name}": tensor for name, tensor in ensemble.tensors.items()}
        updates = torch.tensor(len(ensemble.predicted))
        return tensors | {"correct": correct, "updates": updates, "generator": generator.get_state()}

    found = stored(f"proxy-{key}", compute)
    with torch.no_grad():
        for name, tensor in ensemble.tensors.items():
            tensor.copy_(found[f"network.{name}"])
    generator.set_state(found["generator"])
    if not all(bool(tensor.isfinite().all()) for tensor in ensemble.parameters.values()):
        raise CompanionError(
            f"the proxy {proxy.network} diverged on {train.name} at learning rate {proxy.lr:g}"
        )
    return Trained(ensemble.train(False), train, found["correct"].to(train.device), int(found["updates"]))


def last_layer(network: nn.Module, data: ImageSet) -> LastLayer:
    """What the last linear layer of a network (eval mode) sees and says for all images of an ``ImageSet``.

    Raises:
        CompanionError: the network has no ``embed`` followed by a linear ``classifier``, or does not fit the images or classes.
    """
    classifier = getattr(network, "classifier", None)
    if not isinstance(classifier, nn.Linear) or not hasattr(network, "embed"):
        raise CompanionError(
            f"{type(network).__name__} has no linear last layer: last-layer gradients need a network with "
            f"`embed` and a linear `classifier`, such as {', '.join(nets.ARCHITECTURES)}"
        )
    if classifier.out_features != data.num_classes:
        raise CompanionError(
            f"the network does not fit {data.name}: it has {classifier.out_features} outputs, "
            f"the data {data.num_classes} classes"
        )
    tensors = {name: tensor.detach().unsqueeze(0) for name, tensor in network.state_dict().items()}
    try:
        embeddings = predict_embeddings(Ensemble(network, tensors, {}), data.images)[0]
    except RuntimeError as error:  # of a convolution or a product whose sizes disagree
        what = str(error).splitlines()[0]
        raise CompanionError(f"the network does not fit {data.name} images {data.shape}: {what}") from error
    with torch.no_grad():
        return LastLayer(classifier(embeddings), embeddings, data.labels)


class _Watched(Ensemble):
    """An ensemble that keeps the classes it predicts in training passes."""

    @classmethod
    def of(cls, ensemble: Ensemble) -> _Watched:
        watched = cls(ensemble.template, ensemble.parameters, ensemble.buffers)
        watched.predicted = []
        return watched

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers

    def __call__(self, x: Tensor) -> Tensor:
        logits = super().__call__(x)
        self.predicted.append(logits[0].detach().argmax(1))
        return logits


def _fit(ensemble: _Watched, proxy: Proxy, train: ImageSet, generator: torch.Generator) -> Tensor:
    """Train in place; which images were right when presented, ``(epochs, N)`` bool."""
    replay = torch.Generator(generator.device)
    replay.set_state(generator.get_state())
    order = _Chance([replay], len(train), min(proxy.batch, len(train)), (), "single", 0.0)  # the same again
    sgd_steps(
        ensemble,
        train.images.unsqueeze(0),
        train.labels.unsqueeze(0),
        [generator],
        epochs=proxy.epochs,
        lr=proxy.lr,
        momentum=proxy.momentum,
        weight_decay=proxy.weight_decay,
        nesterov=True,
        batch=proxy.batch,
        enough=None if proxy.until is None else _reached(ensemble, proxy.until, train, order.batches),
    )
    correct = torch.zeros(proxy.epochs, len(train), dtype=torch.bool, device=train.device)
    for step, predicted in enumerate(ensemble.predicted):
        epoch, b = divmod(step, order.batches)
        rows = order.rows(epoch, b)
        rows = torch.arange(len(train), device=train.device) if rows is None else rows[0]
        correct[epoch, rows] = predicted == train.labels[rows]
    return correct


def _reached(ensemble: _Watched, until: float, train: ImageSet, batches: int) -> Callable[[], bool]:
    """Whether so much of the training images is right by now; looks :data:`LOOKS` times per epoch, in eval mode."""
    every = max(1, batches // LOOKS)
    unwatched = Ensemble(ensemble.template, ensemble.parameters, ensemble.buffers)

    def enough() -> bool:
        if len(ensemble.predicted) % every:
            return False
        right = predict(unwatched, train.images)[0].argmax(1) == train.labels
        ensemble.train()
        return right.double().mean().item() >= until

    return enough
