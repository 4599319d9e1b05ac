r"""Finite networks on sets made for kernel regression: squared error on real-valued labels, as RFAD and KIP train them.

$$\min_\theta\ \tfrac1{\alpha^2}\operatorname{mean}\big(f_\theta(X_s)-f_{\theta_0}(X_s)-\alpha\,y_s\big)^2
 +\beta\lVert\theta-\theta_0\rVert^2,\qquad \hat y(x)=f_\theta(x)-f_{\theta_0}(x)$$

by full-batch SGD with momentum. $\theta_0$: weights N(0, 2 / fan-in), biases N(0, 0.1^2), so that the wide limit is the kernel of
:mod:`lib.kernels`. Without ``centred`` the initial function is not subtracted. The published runs stop early on a validation
split; here the last step counts. (:class:`Regression`, the recipes' ``own-rfad``.)

FRePo trains its widening networks without normalisation by Adam on augmented minibatches (:class:`FeatureRegression`, ``own-frepo``);
RCIG the same ones without a mean of weights, with a warm-up, on mirror images, too (``own-rcig``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib import augment, nets
from lib.evaluate.alike import check_alike
from lib.evaluate.networks import MAP_BYTES, MAP_BYTES_CUDA, Evaluation, accuracy, is_balanced, network_seed
from lib.kernels.fc import SIGMA_B, SIGMA_W
from lib.kernels.ridge import centred_one_hot
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.nets.widening import FeatureNet
from lib.synset import SyntheticSet
from lib.system.cache import digest, stored
from lib.system.code import code_digest
from lib.system.errors import CompanionError, check_seed, choose, whole
from lib.system.measure import Meter


@dataclass(frozen=True)
class Regression:
    """Settings of RFAD's finite networks; lr, scale and weight decay as tuned for CIFAR-10 at IPC 1 (see :func:`regression`).

    Attributes:
        name: of the evaluation; network: a name of ``lib.nets``; networks: per set.
        steps, lr: of the training on the whole set at once; momentum: of sgd.
        optimiser: ``sgd`` as RFAD, or ``adam`` as FRePo (which needs fewer steps, and one rate for labels of any length).
        scale: alpha; weight_decay: beta; centred: subtract the initial function.
        labels: ``own`` (hard ones become one-hot minus 1/C), or ``hard`` (arg-max of learned ones first).
    """

    name: str = "own-rfad"
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

    def accuracies(self, images: Tensor, labels: Tensor, pairs: list, test, seed: int) -> Tensor:
        """One accuracy per pair (set, network), as many networks side by side as their maps allow."""
        budget = MAP_BYTES_CUDA if images.is_cuda else MAP_BYTES
        width = nets.parse(self.network)[1].get("width", 128)
        most = max(1, budget // (images.shape[1] * width * test.size**2 * 4))
        parts = [pairs[at : at + most] for at in range(0, len(pairs), most)]
        return torch.cat([_accuracies(images, labels, part, test, self, seed) for part in parts])

    def __str__(self) -> str:
        steps = f"{self.steps} steps of {self.optimiser} at {self.lr:g}"
        return f"{self.name}: {self.network}, {steps}, squared error, labels {self.labels} times {self.scale:g}, last step"


@dataclass(frozen=True)
class FeatureRegression:
    """FRePo's and RCIG's evaluation: Adam on (augmented) minibatches, squared error on the set's labels, a mean of the weights.

    Attributes:
        name: of the evaluation; networks: per set; steps, lr: of Adam.
        width, depth: of ``lib.nets.widening.FeatureNet`` without normalisation (128, 256, 512 channels).
        batch: at most so many synthetic images; augmentation: families of ``lib.augment``. The published
            strategy is flip_color_crop_rotate_translate_cutout; here crop is the shift, and every family is applied to every
            image (the published mode is not known to us).
        ema: weight of the past in the mean of the weights that is tested.
        warmup: steps of a linear warm-up, after which a cosine leads to a hundredth of ``lr``; 0: a constant rate.
        mirrored: append the mirror images to the set; labels: ``own`` or ``hard``, as above.
    """

    name: str = "own-frepo"
    width: int = 128
    depth: int = 3
    steps: int = 1000
    lr: float = 3e-4
    batch: int = 500
    augmentation: str = "color_crop_cutout_flip_rotate"
    ema: float = 0.995
    warmup: int = 0
    mirrored: bool = False
    labels: str = "own"
    networks: int = 5

    def __post_init__(self):
        augment.strategy(self.augmentation)
        whole(self, width=1, depth=1, steps=1, batch=1, networks=1)
        if self.labels not in ("own", "hard"):
            raise CompanionError(f"labels {self.labels!r}; allowed: hard, own")
        if not (self.lr > 0 and 0 <= self.ema < 1):
            raise CompanionError(f"lr {self.lr}, ema {self.ema}; allowed: lr above 0, ema from 0 to below 1")
        if not 0 <= self.warmup < self.steps:
            raise CompanionError(
                f"warmup {self.warmup} of {self.steps} steps; allowed: 0 to {self.steps - 1}"
            )

    @property
    def network(self) -> str:
        """As tables name it."""
        return f"widening-d{self.depth}-w{self.width}-none"

    def __str__(self) -> str:
        return f"{self.name}: {self.network}, {self.steps} steps of Adam at {self.lr:g}, batch {self.batch}, EMA {self.ema:g}"

    def accuracies(self, images: Tensor, labels: Tensor, pairs: list, test, seed: int) -> Tensor:
        """One accuracy per pair (set, network), one network after the other."""
        found = []
        for i, j in pairs:
            generator = torch.Generator(test.device).manual_seed(network_seed(seed, i, j))
            network = self.trained(images[i], labels[i], test, generator)
            with torch.no_grad():
                logits = torch.cat([network(part) for part in test.images.split(1000)])
            found.append(accuracy(logits[None], test))
        return torch.cat(found)

    def rate(self, step: int) -> float:
        """Of the step with that number, from 0."""
        if not self.warmup:
            return self.lr
        if step < self.warmup:
            return self.lr * step / self.warmup
        part = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))

    def trained(self, images: Tensor, labels: Tensor, like, generator: torch.Generator) -> nn.Module:
        """A network trained on ``(m, c, h, w)`` images and ``(m, C)`` labels, with the mean of its weights."""
        network = FeatureNet(like, self.width, self.depth, norm=False).to(images.device)
        network.reset(generator)
        optimiser, names = (
            torch.optim.Adam(network.parameters(), lr=self.lr),
            augment.strategy(self.augmentation),
        )
        if self.mirrored:
            images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2, 1)
        mean = [p.detach().clone() for p in network.parameters()]
        for step in range(self.steps):
            rows = torch.randperm(len(images), generator=generator, device=images.device)[: self.batch]
            x = augment.apply(images[rows], augment.draw(names, len(rows), generator, mode="multiple"))
            loss = (network(x) - labels[rows]).square().sum(1).mean() / 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = self.rate(step)
            optimiser.step()
            torch._foreach_lerp_(mean, [p.detach() for p in network.parameters()], 1 - self.ema)
        with torch.no_grad():
            for p, m in zip(network.parameters(), mean, strict=True):
                p.copy_(m)
        return network


# data set -> IPC -> lr, alpha, beta: what RFAD's authors chose on a validation split
TUNED = {
    "mnist": {1: (1e-3, 8.0, 1e-3), 10: (1e-2, 8.0, 1e-3), 50: (1e-2, 8.0, 0.0)},
    "fashionmnist": {1: (1e-3, 8.0, 0.0), 10: (1e-2, 8.0, 1e-3), 50: (1e-3, 2.0, 0.0)},
    "svhn": {1: (1e-3, 16.0, 0.0), 10: (1e-2, 8.0, 0.0), 50: (1e-2, 2.0, 0.0)},
    "cifar10": {1: (1e-3, 8.0, 0.0), 10: (1e-3, 2.0, 0.0), 50: (1e-2, 2.0, 0.0)},
    "cifar100": {1: (1e-1, 8.0, 0.0), 10: (1e-1, 2.0, 0.0)},
}
_SMALL = {"name": "own-rfad-small", "networks": 2, "network": "convnet-d3-w32-none", "optimiser": "adam"}
SMALL = {
    "digits": _SMALL | {"steps": 100, "lr": 3e-3},
    "fashion14": _SMALL | {"steps": 100, "lr": 3e-3},
    "photos16": _SMALL | {"steps": 50, "lr": 1e-2},
    "photos32": _SMALL | {"steps": 50, "lr": 1e-2},
}


def regression(dataset: str, ipc: int, **changes) -> Regression:
    """The settings for a data set and IPC: RFAD's tuned ones, or what two cores do in seconds on the embedded data.

    Raises:
        CompanionError: the authors tuned none for these.
    """
    if dataset in SMALL:
        return Regression(**SMALL[dataset] | changes)
    if ipc not in TUNED.get(dataset, {}):
        tuned = ", ".join(f"{name} {'/'.join(map(str, row))}" for name, row in TUNED.items())
        raise CompanionError(f"no finite-network settings of RFAD for {dataset} IPC {ipc}; allowed: {tuned}")
    lr, scale, weight_decay = TUNED[dataset][ipc]
    return Regression(**{"lr": lr, "scale": scale, "weight_decay": weight_decay} | changes)


# data set -> IPC -> steps where FRePo's authors took more than 1000
LONGER = {"cifar100": {10: 2000, 50: 5000}, "tinyimagenet": {10: 5000}, "imagenet": {1: 2500, 2: 5000}}
GREY = ("mnist", "fashionmnist", "digits", "fashion14")  # not mirrored


def feature_regression(dataset: str, ipc: int, **changes) -> FeatureRegression:
    """FRePo's evaluation on a data set: its steps, a fourth block at 64 pixels, no flips of grey images."""
    own = {
        "steps": LONGER.get(dataset, {}).get(ipc, 1000),
        "depth": 4 if dataset in ("tinyimagenet", "imagenet") else 3,
    }
    if dataset in GREY:
        own["augmentation"] = "color_crop_cutout_rotate"
    return FeatureRegression(**own | changes)


TENS = (
    "mnist",
    "fashionmnist",
    "cifar10",
    "imagenette",
    "imagewoof",
    "digits",
    "fashion14",
)  # of ten classes
DEPTHS = {"tinyimagenet": 4, "imagenet": 4, "imagenette": 5, "imagewoof": 5}


def implicit_regression(dataset: str, ipc: int, **changes) -> FeatureRegression:
    """RCIG's evaluation without augmentation: raw outputs, 1000 steps for ten images and 2000 for more, no mirror images of grey ones.

    Its published loop without augmentation takes 1.5 times as many steps again, at a hundredth of the rate: left out.
    """
    own = {"name": "own-rcig", "lr": 1e-4, "batch": 256, "augmentation": "none", "ema": 0.0, "warmup": 500}
    own |= {"steps": 1000 if dataset in TENS and ipc == 1 else 2000, "depth": DEPTHS.get(dataset, 3)}
    return FeatureRegression(**own | {"mirrored": dataset not in GREY} | changes)


OWN = {"own-rfad": regression, "own-frepo": feature_regression, "own-rcig": implicit_regression}


def own(name: str, dataset: str, ipc: int, **changes) -> Regression | FeatureRegression:
    """The evaluation that a recipe names ``own-rfad``, ``own-frepo`` or ``own-rcig``."""
    return choose("regression protocol", name, OWN)(dataset, ipc, **changes)


def evaluate_regression(
    sets: SyntheticSet | Sequence[SyntheticSet],
    data,
    protocol: Regression | FeatureRegression,
    seed: int = 0,
    networks: int | None = None,
    cache: bool = False,
) -> Evaluation:
    """Test accuracies as of :func:`lib.evaluate.evaluate`; all sets must have equal shapes."""
    sets = [sets] if isinstance(sets, SyntheticSet) else list(sets)
    count, seed = networks or protocol.networks, check_seed(seed)
    check_alike(sets, data.test)
    images = torch.stack([s.images.detach() for s in sets])
    labels = torch.stack([regression_targets(s, protocol.labels) for s in sets])

    def compute() -> dict[str, Tensor]:
        with Meter(data.test.device) as meter:
            pairs = [(i, j) for i in range(len(sets)) for j in range(count)]
            found = protocol.accuracies(images, labels, pairs, data.test, seed)
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
