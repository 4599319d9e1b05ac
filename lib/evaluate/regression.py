r"""Finite networks on sets made for kernel regression: squared error on real-valued labels, as RFAD and KIP train them.

$$\min_\theta\ \tfrac1{\alpha^2}\operatorname{mean}\big(f_\theta(X_s)-f_{\theta_0}(X_s)-\alpha\,y_s\big)^2
 +\beta\lVert\theta-\theta_0\rVert^2,\qquad \hat y(x)=f_\theta(x)-f_{\theta_0}(x)$$

by full-batch SGD with momentum. $\theta_0$: weights N(0, 2 / fan-in), biases N(0, 0.1^2), so that the wide limit is the kernel of
:mod:`lib.kernels`. Without ``centred`` the initial function is not subtracted. The published runs stop early on a validation
split; here the last step counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib import nets
from lib.evaluate.networks import MAP_BYTES, MAP_BYTES_CUDA, Evaluation, accuracy, is_balanced, network_seed
from lib.kernels.fc import SIGMA_B, SIGMA_W
from lib.kernels.ridge import centred_one_hot
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.synset import SyntheticSet
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, choose
from lib.system.measure import Meter


@dataclass(frozen=True)
class Regression:
    """Settings of RFAD's finite networks; lr, scale and weight decay as tuned for CIFAR-10 at IPC 1 (see :func:`regression`).

    Attributes:
        optimiser: ``sgd`` as RFAD, or ``adam`` as FRePo (which needs fewer steps, and one rate for labels of any length).
        scale: alpha; weight_decay: beta; centred: subtract the initial function.
        labels: ``own`` (hard ones become one-hot minus 1/C), or ``hard`` (arg-max of learned ones first).
    """

    name: str = "regression"
    network: str = "convnet-d3-w1024-none"
    steps: int = 20_000
    lr: float = 1e-3
    momentum: float = 0.9
    optimiser: str = "sgd"
    scale: float = 8.0
    weight_decay: float = 0.0
    centred: bool = True
    labels: str = "own"
    networks: int = 5

    def __post_init__(self):
        nets.parse(self.network)
        choose("optimiser", self.optimiser, dict.fromkeys(("sgd", "adam")))
        if self.labels not in ("own", "hard"):
            raise CompanionError(f"labels {self.labels!r}; allowed: hard, own")
        if not (self.scale > 0 and self.lr > 0 and self.weight_decay >= 0 and self.steps >= 1):
            raise CompanionError(
                f"scale {self.scale}, lr {self.lr}, weight decay {self.weight_decay}, steps {self.steps}; "
                "allowed: scale and lr above 0, weight decay from 0, at least 1 step"
            )


# data set -> IPC -> lr, alpha, beta: what RFAD's authors chose on a validation split
TUNED = {
    "mnist": {1: (1e-3, 8.0, 1e-3), 10: (1e-2, 8.0, 1e-3), 50: (1e-2, 8.0, 0.0)},
    "fashionmnist": {1: (1e-3, 8.0, 0.0), 10: (1e-2, 8.0, 1e-3), 50: (1e-3, 2.0, 0.0)},
    "svhn": {1: (1e-3, 16.0, 0.0), 10: (1e-2, 8.0, 0.0), 50: (1e-2, 2.0, 0.0)},
    "cifar10": {1: (1e-3, 8.0, 0.0), 10: (1e-3, 2.0, 0.0), 50: (1e-2, 2.0, 0.0)},
    "cifar100": {1: (1e-1, 8.0, 0.0), 10: (1e-1, 2.0, 0.0)},
}
_SMALL = {"name": "regression-small", "networks": 2, "network": "convnet-d3-w32-none", "optimiser": "adam"}
SMALL = {
    "digits": _SMALL | {"steps": 100, "lr": 3e-3},
    "photos16": _SMALL | {"steps": 50, "lr": 1e-2},
    "photos32": _SMALL | {"steps": 50, "lr": 1e-2},
}


def regression(dataset: str, ipc: int, **changes) -> Regression:
    """The settings for a data set and IPC: RFAD's tuned ones, or what two cores do in seconds on the embedded data."""
    if dataset in SMALL:
        return Regression(**SMALL[dataset] | changes)
    lr, scale, weight_decay = TUNED.get(dataset, TUNED["cifar10"]).get(ipc, (1e-2, 2.0, 0.0))
    return Regression(**{"lr": lr, "scale": scale, "weight_decay": weight_decay} | changes)


def evaluate_regression(
    sets: SyntheticSet | Sequence[SyntheticSet],
    data,
    protocol: Regression,
    seed: int = 0,
    networks: int | None = None,
    cache: bool = False,
) -> Evaluation:
    """Test accuracies as of :func:`lib.evaluate.evaluate`; all sets must have equal shapes."""
    sets = [sets] if isinstance(sets, SyntheticSet) else list(sets)
    count = networks or protocol.networks
    images = torch.stack([s.images.detach() for s in sets])
    labels = torch.stack([regression_targets(s, protocol.labels) for s in sets])

    def compute() -> dict[str, Tensor]:
        with Meter(data.test.device) as meter:
            pairs = [(i, j) for i in range(len(sets)) for j in range(count)]
            budget = MAP_BYTES_CUDA if images.is_cuda else MAP_BYTES
            width = nets.parse(protocol.network)[1].get("width", 128)
            most = max(1, budget // (images.shape[1] * width * data.test.size**2 * 4))
            parts = [pairs[at : at + most] for at in range(0, len(pairs), most)]
            found = torch.cat(
                [_accuracies(images, labels, part, data.test, protocol, seed) for part in parts]
            )
        cost = torch.tensor([meter.seconds, meter.peak_bytes], dtype=torch.float64)
        return {"accuracy": found.view(len(sets), count), "cost": cost}

    what = digest(images, labels, data.test.fingerprint, protocol, seed, count, data.test.device.type)
    key = f"regression-{digest(what, code_digest(__name__))}"
    found = stored(key, compute) if cache else compute()
    seconds, peak = found["cost"].tolist()
    return Evaluation(found["accuracy"].cpu(), protocol, is_balanced(data.test), seconds, int(peak))


def regression_targets(synset: SyntheticSet, labels: str = "own", dtype: torch.dtype | None = None) -> Tensor:
    """Labels (m, C) for squared error: learned ones as they are, hard ones as one-hot minus 1/C."""
    dtype = dtype or synset.codes.dtype
    if synset.soft and labels == "own":
        return synset.targets.detach().to(dtype)
    return centred_one_hot(synset.hard_labels, len(synset.classes), dtype)


@torch.no_grad()
def gaussian(networks: Ensemble, generators: Sequence[torch.Generator]) -> Ensemble:
    """Draw all weights anew: N(0, 2 / fan-in), biases N(0, 0.1^2), network k from generator k."""
    kinds = (nn.Conv2d, nn.Linear)
    layers = [name for name, module in networks.template.named_modules() if isinstance(module, kinds)]
    for k, generator in enumerate(generators):
        for layer in layers:
            weight, bias = (networks.parameters[f"{layer}.{part}"][k] for part in ("weight", "bias"))
            weight.normal_(0, SIGMA_W / weight[0].numel() ** 0.5, generator=generator)
            bias.normal_(0, SIGMA_B, generator=generator)
    return networks


def train_regression(networks: Ensemble, images: Tensor, labels: Tensor, protocol: Regression) -> Tensor:
    """Train K networks on (K, m, c, h, w) images and (K, m, C) labels in place; the last loss of each, (K,)."""
    networks.train()
    parameters = list(networks.parameters.values())
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        target = protocol.scale * labels + (networks(images) if protocol.centred else 0)
    if protocol.optimiser == "sgd":
        optimiser = torch.optim.SGD(parameters, lr=protocol.lr, momentum=protocol.momentum)
    else:
        optimiser = torch.optim.Adam(parameters, lr=protocol.lr)
    loss = torch.zeros(networks.size)
    for _ in range(protocol.steps):
        loss = (networks(images) - target).square().mean((1, 2)) / protocol.scale**2
        gradients = torch.autograd.grad(loss.sum(), parameters)
        for p, p0, gradient in zip(parameters, start, gradients, strict=True):
            p.grad = torch.add(gradient, p.detach() - p0, alpha=2 * protocol.weight_decay)
        optimiser.step()
    return loss.detach()


def _accuracies(images, labels, pairs, test, protocol: Regression, seed: int) -> Tensor:
    """One accuracy per pair (set, network)."""
    generators = [torch.Generator(test.device).manual_seed(network_seed(seed, i, j)) for i, j in pairs]
    networks = gaussian(Ensemble.make(protocol.network, test, generators), generators)
    before = predict(networks, test.images) if protocol.centred else 0
    chosen = torch.tensor([i for i, _ in pairs], device=images.device)
    train_regression(networks, images[chosen], labels[chosen], protocol)
    return accuracy(predict(networks, test.images) - before, test)
