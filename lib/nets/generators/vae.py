r"""Two small conditional variational autoencoders (Kingma & Welling, arXiv 1312.6114), whose decoders are the priors of small data.

$$\min_{G,E}\ \lVert G(z,y)-x\rVert_2^2+\beta\,\mathrm{KL}\big(\mathcal N(\mu,\sigma^2)\,\Vert\,\mathcal N(0,I)\big),\qquad
\mu,\log\sigma^2=E(x,y),\quad z=\mu+\sigma\odot\varepsilon$$

the squared error summed over pixels in [-1, 1]. ``layered`` has a vector as its code and generates as StyleGANs do, a style for every
layer: for digits and clothes. ``spatial`` has a small map as its code, from which photographs keep their
layout; a vector gives blobs there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.generators.prior import Generator, Prior, to_generator
from lib.system.errors import CompanionError, positive, whole

SLOPE = 0.2  # of leaky ReLUs
LABEL, ENCODED = 32, 48  # numbers of a class, and maps of an encoder


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


# -- a vector as the code --------------------------------------------------------------------------------------------------


class Layered(Generator):
    r"""Codes ``(d,)``; W = ``(L, width)``, the style of $g_0$ .. $g_{L-1}$, equal in all layers unless it is learned.

    $g_0$: linear, to a quarter of the side; $g_1..g_4$: 3x3 convolution, instance norm (left out at 2x2), $(1+s(w_k))h+b(w_k)$, leaky
    ReLU, the second and the fourth upsampled; $g_5$: 3x3 convolution, tanh.
    """

    layers, aside = 5, ("encoder",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, latent: int = 32, width: int = 64):
        super().__init__()
        self.shape, self.num_classes, self.latent, self.width = shape, num_classes, (latent,), width
        self.styles = (self.layers, width)
        channels, size = shape[0], shape[1]
        self.first = -(-size // 4)
        self.label = nn.Embedding(num_classes, LABEL)
        self.to_style = nn.ModuleList([nn.Linear(latent + LABEL, width), nn.Linear(width, width)])
        self.begin = nn.Linear(width, width * self.first**2)
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(4)])
        self.modulations = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(4)])
        self.end = nn.Conv2d(width, channels, 3, padding=1)
        self.encoder = VectorEncoder(channels, size, num_classes, latent)

    def mapping(self, z: Tensor, y: Tensor) -> Tensor:
        w = torch.cat([z, self.label(y)], 1)
        for linear in self.to_style:
            w = leaky(linear(w))
        return w.unsqueeze(1).expand(-1, self.layers, -1)  # (n, L, width)

    def start(self, w: Tensor, y: Tensor) -> Tensor:
        return self.begin(w[:, 0]).view(len(w), self.width, self.first, self.first)

    def layer(self, k: int, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        if k == self.layers:
            left = (h.shape[-1] - self.shape[1]) // 2
            return torch.tanh(self.end(h))[..., left : left + self.shape[1], left : left + self.shape[2]]
        h = self.convolutions[k - 1](upsampled(h) if k in (2, 4) else h)
        if h.shape[-1] > 2:
            h = F.group_norm(h, self.width)  # an instance norm, fast on a CPU
        s, b = self.modulations[k - 1](w[:, k])[:, :, None, None].chunk(2, 1)
        return leaky((1 + s) * h + b)

    def read_after(self, n: int) -> slice:
        return slice(n + 1, None)


class VectorEncoder(nn.Module):
    """Images and classes to means and log-variances of vectors."""

    def __init__(self, channels: int, size: int, num_classes: int, latent: int):
        super().__init__()
        self.label = nn.Embedding(num_classes, LABEL)
        widths = (channels, ENCODED, ENCODED)
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(w, ENCODED, 3, stride=s, padding=1) for w, s in zip(widths, (1, 2, 2), strict=True)]
        )
        side = math.ceil(math.ceil(size / 2) / 2)
        self.out = nn.Linear(ENCODED * side**2 + LABEL, 2 * latent)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for convolution in self.convolutions:
            x = leaky(convolution(x))
        return self.out(torch.cat([x.flatten(1), self.label(y)], 1)).chunk(2, 1)


# -- a map as the code -----------------------------------------------------------------------------------------------------


class Spatial(Generator):
    r"""Codes ``(8, side / 4, side / 4)``, which are W too; images are blocks of 2x2 pixels (pixel shuffle).

    $g_0$: 3x3 convolution; $g_1..g_4$: $h+\mathrm{lrelu}((1+s_y)\,\mathrm{conv}(h)+b_y)$, upsampled before the last;
    $g_5$: 3x3 convolution, tanh, shuffle.
    """

    layers, aside = 5, ("encoder",)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, latent: int = 8, width: int = 64):
        super().__init__()
        channels, size = shape[0], shape[1]
        self.shape, self.num_classes = shape, num_classes
        self.latent = self.styles = (latent, size // 4, size // 4)
        self.label = nn.Embedding(num_classes, width)
        self.begin = nn.Conv2d(latent, width, 3, padding=1)
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(4)])
        self.modulations = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(4)])
        self.end = nn.Conv2d(width, 4 * channels, 3, padding=1)
        self.encoder = MapEncoder(channels, num_classes, latent)

    def start(self, w: Tensor, y: Tensor) -> Tensor:
        return self.begin(w)

    def layer(self, k: int, h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        if k == self.layers:
            return F.pixel_shuffle(torch.tanh(self.end(h)), 2)
        h = upsampled(h) if k == 4 else h
        s, b = self.modulations[k - 1](self.label(y))[:, :, None, None].chunk(2, 1)
        return h + leaky((1 + s) * self.convolutions[k - 1](h) + b)

    def read_after(self, n: int) -> slice:
        return slice(0, 0)  # the class alone


class MapEncoder(nn.Module):
    """Images and classes to means and log-variances of maps."""

    def __init__(self, channels: int, num_classes: int, latent: int, planes: int = 16):
        super().__init__()
        self.label = nn.Embedding(num_classes, planes)
        self.first = nn.Conv2d(4 * channels, ENCODED, 3, padding=1)
        self.second = nn.Conv2d(ENCODED + planes, ENCODED, 4, stride=2, padding=1)
        self.out = nn.Conv2d(ENCODED, 2 * latent, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = leaky(self.first(F.pixel_unshuffle(x, 2)))
        planes = self.label(y)[:, :, None, None].expand(-1, -1, *h.shape[-2:])
        h = leaky(self.second(torch.cat([h, planes], 1)))
        return self.out(h).chunk(2, 1)


# -- how both are trained --------------------------------------------------------------------------------------------------


def elbo(recon: Tensor, x: Tensor, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\lVert\hat x-x\rVert_2^2$ and $\frac12\sum(\mu^2+\sigma^2-1-\log\sigma^2)$, means over the images."""
    error = (recon - x).square().flatten(1).sum(1).mean()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1).mean()
    return error, kl


@dataclass(frozen=True)
class VAE(Prior):
    """Adam along a line to 0. The other fields are Prior's.

    Attributes:
        beta: of the KL divergence, above 0; width: of the networks.
        warm_up: steps in which the rate grows from 0; clip: of the gradient's norm, None: none.
    """

    beta: float = 0.3
    warm_up: int = 0
    clip: float | None = None
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, warm_up=0, width=1)
        positive(self, "beta", *(["clip"] if self.clip is not None else []))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = 1.0 if step >= self.warm_up else (step + 1) / self.warm_up
        return self.lr * rising * (1 - step / self.steps)

    def fit(self, network: nn.Module, train, generator: torch.Generator) -> None:
        images = to_generator(train.images, train.transform)
        optimiser = torch.optim.Adam(network.parameters(), lr=self.lr, fused=True)
        for step in range(self.steps):
            optimiser.param_groups[0]["lr"] = self.rate(step)
            rows = torch.randint(len(train), (self.batch,), generator=generator, device=train.device)
            x, y = images[rows], train.labels[rows]
            mean, log_var = network.encoder(x, y)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            error, kl = elbo(network(mean + (0.5 * log_var).exp() * noise, y), x, mean, log_var)
            optimiser.zero_grad()
            (error + self.beta * kl).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), self.clip)
            optimiser.step()


@dataclass(frozen=True)
class LayeredVAE(VAE):
    """About 200,000 numbers; 500 steps on digits take a core 17 seconds. The other fields are VAE's.

    Attributes:
        latent: numbers of a code.
    """

    kind: ClassVar[str] = "layered"
    latent: int = 32

    def make(self, like) -> Layered:
        return Layered(like.shape, like.num_classes, self.latent, self.width).to(like.device)


@dataclass(frozen=True)
class SpatialVAE(VAE):
    """About 190,000 numbers; 600 steps on photographs of 16 pixels take a core 27 seconds. The other fields are VAE's.

    Attributes:
        latent: channels of a code.
    """

    kind: ClassVar[str] = "spatial"
    steps: int = 600
    warm_up: int = 30
    clip: float | None = 50.0
    latent: int = 8

    def make(self, like) -> Spatial:
        if like.size % 4:
            raise CompanionError(
                f"the prior spatial for {like.size}x{like.size} images: allowed is a side that 4 divides; LayeredVAE takes any"
            )
        return Spatial(like.shape, like.num_classes, self.latent, self.width).to(like.device)
