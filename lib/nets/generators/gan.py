r"""A conditional Wasserstein GAN with an auxiliary classifier (arXiv 1610.09585, 1704.00028), as DiM trains it.

$$\mathcal L_G=-\operatorname{mean}D_s(G(z_y))+\mathrm{CE}(D_c(G(z_y)),y)$$
$$\mathcal L_D=\operatorname{mean}D_s(\hat x)-\operatorname{mean}D_s(x)+\mathrm{CE}(D_c(\hat x),y')+\mathrm{CE}(D_c(x),y)
 +10\operatorname{mean}\big(\lVert\nabla_{\bar x}D_s(\bar x)\rVert_2-1\big)^2,\quad\bar x=\alpha x+(1-\alpha)\hat x$$

The critic D has two heads, of the source and of the class. z is normal noise whose first C numbers are the one-hot label. The default
sizes are those of DiM (arXiv 2303.04707) on 32 pixels: 3.56 and 3.14 million parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.generators.loops import follow, rows_of_epoch
from lib.nets.generators.prior import Generator, Prior, to_generator
from lib.system.errors import CompanionError, positive, whole

BETAS = (0.0, 0.9)  # of Adam
LEAK = 0.01  # of the critic


class Critic(nn.Module):
    """Images to a source number ``(n,)`` and class logits ``(n, C)``: 3x3 convolutions, each with a layer norm over the whole map."""

    def __init__(
        self, channels: int, num_classes: int, size: int, width: int, convs: int, strided: tuple[int, ...]
    ):
        super().__init__()
        layers, before = [], channels
        for i in range(1, convs + 1):
            stride = 2 if i in strided else 1
            size = -(-size // stride)
            layers += [
                nn.Conv2d(before, width, 3, stride, padding=1),
                nn.LayerNorm([width, size, size]),
                nn.LeakyReLU(LEAK),
            ]
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.source, self.classes = nn.Linear(width, 1), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.source(h)[:, 0], self.classes(h)


class GAN(Generator):
    """Generator and critic, with the moments of their Adam optimisers, so that training goes on where it stopped.

    Layer k doubles the side: a transposed convolution and ``convs[k]`` convolutions, batch norm and ReLU behind each; the last
    one ends in an image. An odd side (7 from 4) takes a smaller kernel.
    """

    aside: ClassVar[tuple[str, ...]] = ("critic", "moments")

    def __init__(self, like, noise: int, width: int, least: int, convs: tuple[int, ...], critic: Critic):
        super().__init__()
        sides = [like.size]
        while sides[0] > least:
            sides.insert(0, -(-sides[0] // 2))
        if like.num_classes > noise:
            raise CompanionError(
                f"{like.num_classes} classes and {noise} numbers of noise: allowed are as many numbers as classes, or more"
            )
        if len(convs) != len(sides) - 1:
            raise CompanionError(
                f"convs {convs!r} for images of {like.size} pixels from {least} on: allowed are {len(sides) - 1} numbers"
            )
        self.latent, self.shape, self.num_classes = (noise,), like.shape, like.num_classes
        self.layers, self.start_shape = len(convs), (width, sides[0], sides[0])
        numbers = width * sides[0] ** 2
        self.enter = nn.Sequential(nn.Linear(noise, numbers), nn.BatchNorm1d(numbers), nn.ReLU())
        self.stages = nn.ModuleList()
        for before, side, count in zip(sides[:-1], sides[1:], convs, strict=True):
            kernel = 4 if side == 2 * before else 3
            layers = [nn.ConvTranspose2d(width, width, kernel, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
            for _ in range(count):
                layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))
        self.leave = nn.Sequential(nn.Conv2d(width, like.channels, 3, padding=1), nn.Tanh())
        self.critic, self.moments = critic, nn.Module()
        for name, parameter in self.parts():
            for kind in ("exp_avg", "exp_avg_sq"):
                self.moments.register_buffer(f"{kind}_{name.replace('.', '_')}", torch.zeros_like(parameter))
        self.moments.register_buffer("step", torch.zeros(()))

    def mapping(self, z: Tensor, y: Tensor) -> Tensor:
        """z with the label in the place of its first C numbers."""
        return torch.cat([F.one_hot(y, self.num_classes).to(z.dtype), z[:, self.num_classes :]], 1)

    def start(self, w: Tensor, y: Tensor) -> Tensor:
        return self.enter(w).unflatten(1, self.start_shape)

    def layer(self, k: int, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        h = self.stages[k - 1](h)
        return self.leave(h) if k == self.layers else h

    # -- training -------------------------------------------------------------------------------------------------------

    def parts(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters of both networks."""
        return list(self.named_parameters())

    def own(self) -> list[nn.Parameter]:
        """The generator's parameters."""
        return [parameter for name, parameter in self.parts() if not name.startswith("critic.")]

    def optimisers(
        self, lr: float, lr_critic: float | None = None
    ) -> tuple[torch.optim.Adam, torch.optim.Adam]:
        """Adam of the generator and of the critic, with the kept moments."""
        names = {parameter: name.replace(".", "_") for name, parameter in self.parts()}
        made = []
        for parameters, rate in ((self.own(), lr), (list(self.critic.parameters()), lr_critic or lr)):
            adam = torch.optim.Adam(parameters, lr=rate, betas=BETAS, fused=True)
            for parameter in parameters:
                kept = {
                    kind: getattr(self.moments, f"{kind}_{names[parameter]}").clone()
                    for kind in ("exp_avg", "exp_avg_sq")
                }
                adam.state[parameter] = {"step": self.moments.step.clone()} | kept
            made.append(adam)
        return tuple(made)

    def keep(self, optimisers: Iterable[torch.optim.Adam]) -> None:
        """Put the optimisers' moments where the state dict finds them."""
        names = {parameter: name.replace(".", "_") for name, parameter in self.parts()}
        for adam in optimisers:
            for parameter, state in adam.state.items():
                for kind in ("exp_avg", "exp_avg_sq"):
                    getattr(self.moments, f"{kind}_{names[parameter]}").copy_(state[kind])
                self.moments.step.copy_(state["step"])


def generator_loss(network: GAN, fake: Tensor, y: Tensor) -> Tensor:
    r"""$\mathcal L_G$."""
    source, classes = network.critic(fake)
    return F.cross_entropy(classes, y) - source.mean()


def critic_loss(network: GAN, real: Tensor, y: Tensor, fake: Tensor, fake_y: Tensor) -> Tensor:
    r"""$\mathcal L_D$ without the penalty."""
    source, classes = network.critic(real)
    fake_source, fake_classes = network.critic(fake)
    told = F.cross_entropy(fake_classes, fake_y) + F.cross_entropy(classes, y)
    return fake_source.mean() - source.mean() + told


def gradient_penalty(source, real: Tensor, fake: Tensor, alpha: Tensor, weight: float = 10.0) -> Tensor:
    r"""$w\operatorname{mean}(\lVert\nabla_{\bar x}D_s(\bar x)\rVert_2-1)^2$.

    Args:
        source: images to ``(n,)``; alpha: ``(n,)``, the share of the real image.
    """
    share = alpha[:, None, None, None]
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(source(between).sum(), between, create_graph=True)
    return weight * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_step(
    network: GAN,
    optimiser: torch.optim.Optimizer,
    real: Tensor,
    y: Tensor,
    generator: torch.Generator,
    penalty: float,
) -> Tensor:
    """One step of the critic against new images of uniform labels; ``penalty``: the weight in this step, 0 leaves it out."""
    fake_y = torch.randint(network.num_classes, y.shape, generator=generator, device=y.device)
    with torch.no_grad():
        fake = network(network.draw(fake_y, generator), fake_y)
    loss = critic_loss(network, real, y, fake, fake_y)
    if penalty:
        alpha = torch.rand(len(y), generator=generator, device=y.device)
        loss = loss + gradient_penalty(lambda x: network.critic(x)[0], real, fake, alpha, penalty)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.detach()


@dataclass(frozen=True)
class ACGAN(Prior):
    """DiM's first stage: one step of the generator and one of the critic on every real batch. The other fields are Prior's.

    Attributes:
        steps: default: 150 epochs of CIFAR-10; lr, batch: of both networks; noise: numbers of a latent.
        width: of the generator; least: side of its smallest map; convs: after each doubling.
        critic_width, critic_convs: of the critic, strided: which of its convolutions halve the side.
        penalty: weight of the gradient penalty, above 0; penalty_every: taken in every so many steps, at as many times the weight.
        average: decay of a running mean of the generator's weights, which is then the generator; 0: none.
    """

    kind: ClassVar[str] = "acgan"
    steps: int = 150 * (50_000 // 128)
    lr: float = 1e-4
    batch: int = 128
    noise: int = 100
    width: int = 196
    least: int = 4
    convs: tuple[int, ...] = (3, 1, 0)
    critic_width: int = 196
    critic_convs: int = 8
    strided: tuple[int, ...] = (2, 4, 8)
    penalty: float = 10.0
    penalty_every: int = 1
    average: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, noise=1, width=1, least=1, critic_width=1, critic_convs=1, penalty_every=1)
        positive(self, "penalty")
        if not 0 <= self.average < 1:
            raise CompanionError(f"average {self.average!r} is not allowed: 0 or more, below 1")

    def make(self, like) -> GAN:
        critic = Critic(
            like.channels, like.num_classes, like.size, self.critic_width, self.critic_convs, self.strided
        )
        return GAN(like, self.noise, self.width, self.least, self.convs, critic).to(like.device)

    def initialise(self, network: GAN, generator: torch.Generator) -> None:
        """PyTorch's default law, as a function of the generator."""
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        cuda = [generator.device] if generator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            for module in network.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()

    def fit(self, network: GAN, train, generator: torch.Generator) -> None:
        optimisers = network.optimisers(self.lr)
        mean = {name: tensor.clone() for name, tensor in network.generating().items()}
        rows: list[Tensor] = []
        for step in range(self.steps):
            rows = rows or rows_of_epoch(len(train), self.batch, generator)
            chosen = rows.pop()
            real, y = to_generator(train.images[chosen], train.transform), train.labels[chosen]
            fake = network(network.draw(y, generator), y)
            optimisers[0].zero_grad()
            generator_loss(network, fake, y).backward()
            optimisers[0].step()
            critic_step(network, optimisers[1], real, y, generator, self.penalty_at(step))
            follow(mean, network.generating(), self.average)
        network.keep(optimisers)
        network.load_state_dict(mean, strict=False)

    def penalty_at(self, step: int) -> float:
        """The penalty's weight in a step, counted from 0."""
        return 0.0 if step % self.penalty_every else self.penalty * self.penalty_every
