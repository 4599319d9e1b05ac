r"""DD - Dataset Distillation. Wang, Zhu, Torralba & Efros, 2018, arXiv 1811.10959.

$$\min_{\tilde x,\,\eta}\ \mathbb E_{\theta_0\sim p(\theta_0)}\ \ell\big(\theta_{TE};\ x,y\big),\qquad
\theta_{j+1}=\theta_j-\eta_j\,\nabla_\theta\,\ell\big(\theta_j;\ \tilde x_{j\bmod T},\tilde y\big),\quad j=0..TE-1$$

T steps with images of their own, passed E times; every one of the TE steps has a learned rate (softplus of a raw number), the passes
do not share theirs. All images of a step are one batch, labels are hard and not learned. The initial weights are random, one fixed
network, or those of trained networks (``start``, ``lib.nets.starts``). The set is made for this schedule and is judged by it
(``lib.evaluate.schedule``): an ordinary training on its images ignores rates and order.

``attack``: the real labels of one class are replaced by another's before the loss, so that a few steps on S make trained networks
take the one for the other.

Paper and code: the documented defaults differ from the parser's (rate 0.001 and 0.02; 4 networks and 1); both stand in the recipes.
IPC here is k T, k images of every class in a step. Binary tasks, buffers of batch norms and the code's shift of the schedule by one
epoch are left out. Inner momentum and bases as in RememberThePast (arXiv 2206.02916) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data.imageset import ImageSet
from lib.formation.start import initial_pixels
from lib.match.unroll import MODES, Step, gradient, parts, walk
from lib.nets.experts import Experts
from lib.nets.flat import template
from lib.nets.starts import Fixed, Pretrained, Random
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, choose, positive, whole


@dataclass
class State:
    images: Tensor  # (T, n, c, h, w), n = C k, class-major
    raw: Tensor  # (TE,): eta = softplus(raw), pass-major
    optimiser: torch.optim.Adam
    order: Tensor  # real images not yet seen in this pass
    done: int
    labels: Tensor = field(metadata={"constant": True})  # (n,)
    kept: Any = field(metadata={"constant": True})  # weights of the start
    template: Any = field(metadata={"constant": True})
    train: ImageSet = field(metadata={"constant": True})


@dataclass(frozen=True)
class DD:
    r"""Hyper-parameters of the published code; the defaults are those of MNIST with random initialisation.

    Attributes:
        iterations: updates, 0 or more (default: 400 epochs of 59 batches); steps: T of a pass; epochs: E, passes of a training.
        rate: $\eta$ at the start; lr: of images and raw rates (Adam, betas 0.5 and 0.999); decay: its factor; decay_every: iterations
            between two decays (default: 40 epochs).
        real_batch: real images of all classes in an iteration.
        networks: trained side by side in an iteration; network: a name of ``lib.nets``; start: where they begin (``lib.nets.starts``).
        init: where images start: "noise" or "real".
        gradient: through the training: "bptt"; "recompute": exact, with the memory of one step; "tesla" drops a part.
        attack: (attacked class, what it shall be taken for), None: none.
    """

    iterations: int = 23_600
    steps: int = 10
    epochs: int = 3
    rate: float = 0.02
    lr: float = 0.01
    decay_every: int = 2360
    decay: float = 0.5
    real_batch: int = 1024
    networks: int = 1
    network: str = "lenet"
    start: Any = Random()
    init: str = "noise"
    gradient: str = "bptt"
    attack: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        choose("mode of unrolling", self.gradient, MODES)
        whole(self, iterations=0, steps=1, epochs=1, decay_every=1, real_batch=1, networks=1)
        positive(self, "rate", "lr", "decay")

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> DD:
        """The same method with ``count`` updates of the images."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        if ipc % self.steps:
            raise CompanionError(f"IPC {ipc} in {self.steps} steps: allowed are multiples of {self.steps}")
        if self.attack is not None and not all(0 <= c < train.num_classes for c in self.attack):
            raise CompanionError(
                f"attack {self.attack} on {train.num_classes} classes: allowed 0 to {train.num_classes - 1}"
            )
        pixels = initial_pixels(train, ipc, self.init, generator)  # (C ipc, ...), class-major
        images = pixels.unflatten(0, (train.num_classes, self.steps, -1)).transpose(0, 1).flatten(1, 2)
        raw = torch.full((self.steps * self.epochs,), self.rate, device=train.device).expm1().log()
        learned = [images.contiguous().requires_grad_(), raw.requires_grad_()]
        optimiser = torch.optim.Adam(learned, lr=self.lr, betas=(0.5, 0.999))
        labels = class_major(train.num_classes, ipc // self.steps, train.device)
        kept, order = self.start.begin(self.network, train), torch.arange(0, device=train.device)
        return State(*learned, optimiser, order, 0, labels, kept, template(self.network, train), train)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of all images and rates."""
        theta = self.start.draw(state.template, state.kept, self.networks, generator)  # (K, P)
        eta = F.softplus(state.raw)
        steps = [Step(state.images[j % self.steps], state.labels, rate) for j, rate in enumerate(eta)]
        x, y = self.real(state, generator)

        trained = walk(state.template, theta, steps, self.gradient)
        loss, u = real_loss(state.template, trained.end, x, y, self.attack)
        images, rates = trained.pull(u / len(u))  # of the mean over networks

        state.optimiser.zero_grad()
        state.images.grad = torch.stack(images).unflatten(0, (self.epochs, self.steps)).sum(0)
        eta.backward(rates)
        for group in state.optimiser.param_groups:
            group["lr"] = self.lr * self.decay ** (state.done // self.decay_every)
        state.optimiser.step()
        state.done += 1
        return {"loss": loss.mean(), "rate": eta.detach().mean()}

    def real(self, state: State, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The next real images and labels of a pass over all of them; the last batch of a pass may be short."""
        if not len(state.order):
            state.order = torch.randperm(len(state.train), generator=generator, device=generator.device)
        rows, state.order = state.order[: self.real_batch], state.order[self.real_batch :].clone()
        return state.train.images[rows], state.train.labels[rows]

    @torch.no_grad()
    def finish(self, state: State) -> SyntheticSet:
        """Images step after step, and the rates in the order of their use; ``meta["schedule"]`` says how many steps and passes."""
        labels, rates = state.labels.repeat(self.steps), F.softplus(state.raw)
        meta = {"schedule": {"steps": self.steps, "passes": self.epochs}}
        codes, train = state.images.detach().flatten(0, 1).clone(), state.train
        return SyntheticSet(codes, labels, train.classes, train.transform, step_size=rates, meta=meta)


def real_loss(
    like: nn.Module, theta: Tensor, x: Tensor, y: Tensor, attack: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of real images in K networks, ``(K,)``, and its derivative by the weights, ``(K, P)``.

    Args:
        attack: labels of the first class count as the second's.
    """
    if attack is not None:
        y = torch.where(y == attack[0], attack[1], y)
    theta, losses, u = theta.detach().requires_grad_(), 0, 0
    for x_part, y_part, share in parts(like, x.unsqueeze(0), y.unsqueeze(0), len(theta)):
        loss, g = gradient(like, theta, x_part, y_part)
        losses, u = losses + share * loss, u + share * g
    return losses, u


_PAPER = DD()
_CIFAR = DD(iterations=19_600, decay_every=1960, rate=0.001, network="alexnet")  # 400 epochs of 49 batches
_POOL = Experts(2000, lr=2e-4, batch=1024, augmentation="none", law="xavier", adam=True, halve_every=20)
_ATTACK = DD(steps=1, epochs=1, lr=0.02, networks=4, attack=(0, 1), start=Pretrained(_POOL, 40))
_CIFAR_POOL = replace(_POOL, lr=1e-3, halve_every=7)
_DIGITS = DD(
    iterations=100, steps=1, epochs=10, rate=0.2, lr=0.03, decay_every=40, real_batch=256, network="convnet-d2-w32", init="real"
)  # fmt: skip
_DEEP = replace(_DIGITS, iterations=60, decay_every=24, network="convnet-d3-w32")
_OPTIONS, _PARSER = "documented options of the published code", "defaults of the published code's parser"
_NET = "; their AlexCifarNet has local response norms, which this one lacks"
_UNTRIED = "the settings of digits with a deeper network, not chosen on these data"
_CHOSEN = "rate chosen among three by a fifth of the training images"
RECIPES = Recipes(
    small("digits", _DIGITS, "own-schedule"),
    small("fashion14", replace(_DEEP, lr=0.1), "own-schedule", source=_CHOSEN),
    small("photos16 photos32", _DEEP, "own-schedule", source=_UNTRIED),
    published("mnist", 10, _PAPER, "own-schedule", _PARSER),
    published("mnist", 1, replace(_PAPER, steps=1, start=Fixed()), "own-schedule", _PARSER, variant="fixed"),
    published("cifar10", 10, _CIFAR, "own-schedule", _OPTIONS + _NET),
    published("cifar10", 10, replace(_CIFAR, start=Fixed()), "own-schedule", _OPTIONS + _NET, variant="fixed"),
    published("mnist", 10, _ATTACK, "own-schedule", "project page: one gradient step on 100 images", variant="attack"),
    published(
        "cifar10", 10, replace(_ATTACK, network="alexnet", iterations=19_600, decay_every=1960, start=Pretrained(_CIFAR_POOL, 50)),
        "own-schedule", f"project page: one gradient step on 100 images{_NET}", variant="attack",
    ),
)  # fmt: skip
