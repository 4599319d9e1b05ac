r"""IDM - Improved Distribution Matching for Dataset Condensation. Zhao, Li, Qin & Yu, CVPR 2023, arXiv 2307.09742.

$$\min_{\mathcal S}\ \mathbb E_{\theta\sim\mathcal Q,\omega}\ \sum_c \Big\lVert \overline{\psi_\theta(\mathcal A_\omega(T_c))}
 - \overline{\psi_\theta(\mathcal A_\omega(D(S_c)))}\Big\rVert_2^2
 + \lambda\,a_\theta\,\overline{\mathrm{CE}}\big(g_\theta(\mathcal A_\omega(D(S_c))), c\big)$$

DM with three additions. *Partition and expansion*: a stored image is a mosaic of f x f cells, each enlarged to a training
image ($D$). *Model queue* $\mathcal Q$: networks of different age, a new one every ``interval`` steps, the oldest dropped; at
every step one is looked at and some are trained a little on real images. *Class-aware regularisation*: cross-entropy of the
synthetic images under that network, weighted by its training accuracy $a_\theta$.

Facts of the published code that the paper does not state: $a_\theta$ is in **percent** (0 to 100), so $\lambda$ = 0.5 weighs the
cross-entropy up to 50 times; it is 0 for a network that was not trained yet; and it is cleared at every evaluation, so that how
often one evaluates changes the result (``meter="reset"``). Here it is by default a running mean that is never cleared.
Differs besides: all classes take one joint step, with the rate and the momentum that make it equal to that code's step per
class (``sequential``); the queue's training batches are drawn with replacement; the special rules for IPC 1 without mosaics are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib import nets
from lib.formation import mosaic_or
from lib.formation.start import initial_codes
from lib.match import features
from lib.methods import dm
from lib.methods.dm import DM
from lib.nets.ensemble import Ensemble
from lib.optim.sequential import sequential_rates
from lib.system.errors import CompanionError, unknown
from lib.train import batch_loss

METERS = {"running": 0.9, "reset": 1.0}  # what earlier counts still weigh after a training step


@dataclass
class State(dm.State):
    """DM's and the queue: slot i holds a network, its momentum and its accuracy; the next new network goes to slot
    ``pushed % queue``, which is the oldest one's when all are taken."""

    networks: Ensemble
    velocity: Ensemble  # SGD momentum of every weight, stacked like the networks
    correct: Tensor  # (queue,) and seen: training images classified rightly, and all, earlier ones discounted
    seen: Tensor
    accuracy: Tensor  # of the network looked at in this step, percent
    pushed: int = 0
    done: int = 0

    @property
    def size(self) -> int:
        """Networks in the queue."""
        return min(self.pushed, self.networks.size)

    @property
    def percent(self) -> Tensor:
        """Training accuracy of every network in the queue, ``(size,)``; 0 for an untrained one."""
        return (100 * self.correct / self.seen.clamp(min=1))[: self.size]


@dataclass(frozen=True)
class IDM(DM):
    """Hyper-parameters of the published commands (CIFAR-10, IPC 10)."""

    lr: float = 0.2
    init: str = "mix"  # every cell a real image; "real": whole real images; "noise"
    factor: int = 2  # a stored image is factor x factor training images
    ce_weight: float = 0.5  # lambda, per percent of accuracy
    queue: int = (
        100  # networks kept; with 1, start 0, interval 1 and train_steps 0 a new one at every step, as DM
    )
    start: int = 3  # networks at the beginning
    interval: int = 30  # a new network every so many steps
    fetch: int = 2  # networks trained after every step
    train_steps: int = 10  # so many SGD steps each
    train_batch: int = 256  # real images of all classes, not augmented
    train_lr: float = 0.01
    train_momentum: float = 0.9
    train_decay: float = 5e-4
    meter: str = "running"  # "reset": cleared every reset_every steps, as published
    reset_every: int = 100
    sequential: bool = True  # the joint step that equals one step per class

    def __post_init__(self):
        if self.meter not in METERS:
            raise unknown("meter", self.meter, METERS)
        for name in ("factor", "queue", "interval", "reset_every", "train_batch"):
            if getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)} is not allowed: at least 1")
        mosaic_or(self.factor, self.formation)

    @property
    def decoder(self):
        return mosaic_or(self.factor, self.formation)

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        pixels = initial_codes(self.decoder, train, ipc, self.init, generator)
        lr, momentum = self.lr, self.momentum
        if self.sequential:
            lr, momentum = sequential_rates(lr, momentum, train.num_classes)
        optimiser = torch.optim.SGD([pixels.requires_grad_()], lr=lr, momentum=momentum)
        network = nets.make(self.network, train)
        networks, velocity = empty(network, self.queue), empty(network, self.queue)
        correct, seen = torch.zeros(2, self.queue, device=train.device).unbind()
        accuracy = torch.zeros((), device=train.device)
        state = State(pixels, optimiser, train, network, ipc, networks, velocity, correct, seen, accuracy)
        for _ in range(self.start):
            self.push(state, generator)
        return state

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """Look at one network of the queue, update the images, train some of the queue."""
        if self.meter == "reset" and state.done % self.reset_every == 0:
            state.correct.zero_()
            state.seen.zero_()
        if state.done % self.interval == 0:
            self.push(state, generator)
        metrics = super().step(state, generator)
        self.train_queue(state, generator)
        state.done += 1
        return metrics | ({"accuracy": state.accuracy.clone()} if self.ce_weight else {})

    def terms(self, state: State, real: list[Tensor], syn: list[Tensor]) -> dict[str, Tensor]:
        distance = super().terms(state, real, syn)
        if not self.ce_weight:
            return distance
        logits = state.network.classifier(syn[0])
        labels = torch.arange(len(logits), device=logits.device).unsqueeze(1)
        entropy = features.class_aware(logits, labels)
        return distance | {"cross-entropy": self.ce_weight * state.accuracy * entropy}

    def encoder(self, state: State, generator: torch.Generator) -> torch.nn.Module:
        """One network of the queue, any with the same probability."""
        k = torch.zeros(1, dtype=torch.long, device=state.pixels.device)
        if state.size > 1:
            k = torch.randint(state.size, (1,), generator=generator, device=k.device)
        with torch.no_grad():
            stored = state.networks.parameters | state.networks.buffers
            for name, tensor in state.network.state_dict().items():
                tensor.copy_(stored[name].index_select(0, k)[0])
            state.accuracy.copy_(state.percent.index_select(0, k)[0])
        return state.network.eval().requires_grad_(False)

    @torch.no_grad()
    def push(self, state: State, generator: torch.Generator) -> None:
        """Put a new network into the queue, in the place of the oldest one if it is full."""
        slot = state.pushed % self.queue
        new = nets.initialise(state.network, generator).state_dict()
        for name, tensor in (state.networks.parameters | state.networks.buffers).items():
            tensor[slot] = new[name]
        for tensor in (*state.velocity.parameters.values(), state.correct, state.seen):
            tensor[slot] = 0
        state.pushed += 1

    def train_queue(self, state: State, generator: torch.Generator) -> None:
        """``train_steps`` SGD steps of ``fetch`` random networks of the queue, side by side as one ensemble."""
        if not (self.fetch and self.train_steps):
            return
        train, device = state.train, state.pixels.device
        members = torch.randperm(state.size, generator=generator, device=device)[: self.fetch]
        networks, velocity = chosen(state.networks, members), chosen(state.velocity, members)
        correct, seen = state.correct[members], state.seen[members]
        shape = (self.train_steps, len(members), min(self.train_batch, len(train)))
        for rows in torch.randint(len(train), shape, generator=generator, device=device):
            labels = train.labels[rows]
            right = self.train_step(networks.train(), velocity, train.images[rows], labels)
            correct = METERS[self.meter] * correct + right
            seen = METERS[self.meter] * seen + rows.shape[1]
        put_back(state.networks, members, networks)
        put_back(state.velocity, members, velocity)
        state.correct[members], state.seen[members] = correct, seen

    def train_step(self, networks: Ensemble, velocity: Ensemble, images: Tensor, labels: Tensor) -> Tensor:
        """One SGD step of K networks on ``(K, n, ...)`` images, in place; how many each had right before it, ``(K,)``."""
        logits = networks(images)
        parameters = list(networks.parameters.values())
        gradients = torch.autograd.grad(batch_loss(logits, labels).sum(), parameters, materialize_grads=True)
        with torch.no_grad():
            for weight, v, gradient in zip(parameters, velocity.parameters.values(), gradients, strict=True):
                v.mul_(self.train_momentum).add_(gradient).add_(weight, alpha=self.train_decay)
                weight.sub_(v, alpha=self.train_lr)
        return (logits.argmax(2) == labels).sum(1)


def empty(template: torch.nn.Module, slots: int) -> Ensemble:
    """Room for so many networks, all zero."""
    parts = (dict(template.named_parameters()), dict(template.named_buffers()))
    zeros = [{name: t.new_zeros(slots, *t.shape) for name, t in part.items()} for part in parts]
    return Ensemble(template, *zeros)


def chosen(networks: Ensemble, members: Tensor) -> Ensemble:
    """A copy of some networks."""
    parameters = {name: t[members].requires_grad_() for name, t in networks.parameters.items()}
    buffers = {name: t[members] for name, t in networks.buffers.items()}
    return Ensemble(networks.template, parameters, buffers)


@torch.no_grad()
def put_back(networks: Ensemble, members: Tensor, changed: Ensemble) -> None:
    """The inverse of :func:`chosen`."""
    for mine, theirs in ((networks.parameters, changed.parameters), (networks.buffers, changed.buffers)):
        for name, tensor in mine.items():
            tensor[members] = theirs[name]


_CIFAR = IDM()
_SMALL = IDM(iterations=100, lr=0.4, real_batch=64, network="convnet-d2-w32", augmentation="none", factor=1, ce_weight=0.1,
             queue=5, interval=10, train_steps=3, train_batch=32, sequential=False)  # fmt: skip
_PHOTOS = replace(
    _SMALL, iterations=30, network="convnet-d3-w32", augmentation="data", factor=2, ce_weight=0.01
)
_IPC1 = replace(_CIFAR, real_batch=5000, interval=5)  # every image of a class of CIFAR-10
_IMAGENET = replace(
    _CIFAR, network="convnet-d6-w128", ce_weight=3.0, real_batch=128, interval=50, queue=50, train_batch=128
)
# The published commands, by data set and IPC.
PRESETS = {
    "digits": _SMALL,
    "photos16": _PHOTOS,
    "photos32": _PHOTOS,
    "paper": _CIFAR,
    "paper-ipc1": _IPC1,
    "paper-ipc50": replace(_CIFAR, ce_weight=0.1),
    "paper-cifar100-ipc1": _IPC1,
    "paper-cifar100-ipc10": replace(_CIFAR, ce_weight=0.1, train_steps=50),
    "paper-cifar100-ipc50": replace(_CIFAR, ce_weight=0.1),  # the author advises 40 training steps
    "paper-tinyimagenet": replace(_CIFAR, network="convnet-d4-w128"),  # IPC 1 and 10
    "paper-tinyimagenet-ipc50": replace(_CIFAR, network="convnet-d4-w128", ce_weight=0.8, train_steps=50),
    "paper-imagenet100": _IMAGENET,  # 224 px, IPC 1 and 10
    "paper-imagenet100-ipc50": replace(_IMAGENET, factor=1, queue=100),  # there from pretrained networks
}
