r"""Denoising diffusion: the chain of DDPM (arXiv 2006.11239) with the learned variance, the respacing and the guidance of its successors.

$$x_t=\sqrt{\bar\alpha_t}\,x+\sqrt{1-\bar\alpha_t}\,\epsilon,\qquad \bar\alpha_t=\prod_{s\le t}(1-\beta_s),\qquad
\hat x=\frac{x_t-\sqrt{1-\bar\alpha_t}\,\epsilon_\theta(x_t,t,y)}{\sqrt{\bar\alpha_t}}$$

A network maps $(x_t, t, y)$ to $\epsilon_\theta$, or to $\epsilon_\theta$ and as many channels $v$ that say where between its bounds
the variance lies (Improved DDPM, arXiv 2102.09672). Its attribute ``null`` is the label that means "no label", None if it has none.
Tables are 64-bit, networks are not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.system.errors import CompanionError, integer, whole

PUBLISHED_STEPS = 1000  # for which the end points of beta are stated
LEAST = 1e-12  # of a probability before its logarithm


class Terms(NamedTuple):
    """Of a batch: squared error and variational bound (0 without a learned variance) of every image, ``(n,)``, and $\\hat x$."""

    mse: Tensor
    bound: Tensor
    clean: Tensor

    @property
    def loss(self) -> Tensor:
        return self.mse + self.bound


class Posterior(NamedTuple):
    r"""$p_\theta(x_{t-1}|x_t)$: mean and logarithm of the variance, and the $\hat x$ that they follow from."""

    mean: Tensor
    log_variance: Tensor
    clean: Tensor


@dataclass(frozen=True)
class Diffusion:
    r"""A chain with linear $\beta$.

    Attributes:
        steps: T of the chain that a network knows; first, last: $\beta$ at its ends for T = 1000, scaled by 1000 / T.
        kept: original times of the steps that are taken, ascending; None: all. Every ``t`` below counts these.
    """

    steps: int = PUBLISHED_STEPS
    first: float = 1e-4
    last: float = 0.02
    kept: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        whole(self, steps=2)
        scale = PUBLISHED_STEPS / self.steps
        if not 0 < self.first <= self.last or self.last * scale >= 1:
            raise CompanionError(
                f"beta from {self.first!r} to {self.last!r}, times {scale:g} for {self.steps} steps: allowed are 0 < first <= last < 1"
            )

    def __len__(self) -> int:
        return self.steps if self.kept is None else len(self.kept)

    def respaced(self, count: int) -> Diffusion:
        """The chain over ``count`` of its steps, evenly spaced, first and last among them."""
        number = integer(count)
        if number is None or not 2 <= number <= self.steps:
            raise CompanionError(
                f"{count!r} sampling steps of a chain of {self.steps}: allowed 2 to {self.steps}"
            )
        return replace(self, kept=tuple(round(k * (self.steps - 1) / (count - 1)) for k in range(count)))

    # -- tables, (len,) float64 -------------------------------------------------------------------------------------------

    @functools.cached_property
    def times(self) -> Tensor:
        """What the network is told at every step."""
        return torch.tensor(range(self.steps) if self.kept is None else self.kept)

    @functools.cached_property
    def alphas_bar(self) -> Tensor:
        scale = PUBLISHED_STEPS / self.steps
        ends = (scale * self.first, scale * self.last)
        return (1 - torch.linspace(*ends, self.steps, dtype=torch.float64)).cumprod(0)[self.times]

    @functools.cached_property
    def before(self) -> Tensor:
        r"""$\bar\alpha_{t-1}$."""
        return torch.cat([self.alphas_bar.new_ones(1), self.alphas_bar[:-1]])

    @functools.cached_property
    def betas(self) -> Tensor:
        return 1 - self.alphas_bar / self.before

    @functools.cached_property
    def posterior_variance(self) -> Tensor:
        r"""$\tilde\beta_t=\beta_t\,(1-\bar\alpha_{t-1})/(1-\bar\alpha_t)$; at t = 0, where that is 0, the value of t = 1."""
        variance = self.betas * (1 - self.before) / (1 - self.alphas_bar)
        return torch.cat([variance[1:2], variance[1:]])

    # -- the chain --------------------------------------------------------------------------------------------------------

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        r"""$x_t$."""
        return at(self.alphas_bar.sqrt(), t, x) * x + at((1 - self.alphas_bar).sqrt(), t, x) * noise

    def clean(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        r"""$\hat x$, not clipped."""
        scale = self.alphas_bar.rsqrt()
        return at(scale, t, x_t) * x_t - at((1 - self.alphas_bar).sqrt() * scale, t, x_t) * epsilon

    def posterior_mean(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        r"""$\frac{\sqrt{\bar\alpha_{t-1}}\beta_t}{1-\bar\alpha_t}x+\frac{\sqrt{\alpha_t}(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}x_t$."""
        of_x = self.before.sqrt() * self.betas / (1 - self.alphas_bar)
        of_x_t = (1 - self.betas).sqrt() * (1 - self.before) / (1 - self.alphas_bar)
        return at(of_x, t, x) * x + at(of_x_t, t, x_t) * x_t

    def posterior(self, output: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> Posterior:
        r"""What a network's output says of the step before.

        $\log\sigma^2=v'\log\beta_t+(1-v')\log\tilde\beta_t$ with $v'=(v+1)/2$ where the output has $v$, else $\log\tilde\beta_t$.

        Args:
            output: ``(n, c or 2 c, h, w)`` for ``x_t`` of ``(n, c, h, w)``; clip: clamp $\hat x$ to [-1, 1].
        """
        epsilon, v = halves(output, x_t)
        clean = self.clean(x_t, t, epsilon)
        clean = clean.clamp(-1, 1) if clip else clean
        low = at(self.posterior_variance.log(), t, x_t).expand_as(x_t)
        if v is not None:
            share = (v + 1) / 2
            low = share * at(self.betas.log(), t, x_t) + (1 - share) * low
        return Posterior(self.posterior_mean(clean, x_t, t), low, clean)

    def terms(self, output: Tensor, x: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Terms:
        r"""$\operatorname{mean}(\epsilon-\epsilon_\theta)^2$ and the variational bound of every image, in bits, over its numbers.

        The bound is the divergence of the true posterior from the network's, at t = 0 the likelihood of the image in steps of
        1/255; it teaches the variance alone, since the mean in it is detached.
        """
        epsilon, v = halves(output, x_t)
        mse = (noise - epsilon).square().flatten(1).mean(1)
        clean = self.clean(x_t, t, epsilon)
        if v is None:
            return Terms(mse, torch.zeros_like(mse), clean)
        told = self.posterior(torch.cat([epsilon.detach(), v], 1), x_t, t)
        true_mean, true_log = self.posterior_mean(x, x_t, t), at(self.posterior_variance.log(), t, x)
        apart = divergence(true_mean, true_log, told.mean, told.log_variance)
        bits = torch.where(over_images(t == 0), -log_likelihood(x, told.mean, told.log_variance / 2), apart)
        return Terms(mse, bits.flatten(1).mean(1) / math.log(2), clean)

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        labels: Tensor,
        shape: tuple[int, ...],
        generator: torch.Generator,
        guidance: float = 1.0,
        guided: int | None = None,
        clip: bool = False,
    ) -> Tensor:
        """Images or latents ``(n, *shape)`` of these labels: from noise backwards through all steps, no noise in the last one.

        Args:
            guidance, guided: as :func:`guided_output`; clip: clamp the predicted clean image at every step.
        """
        drawn = functools.partial(torch.randn, generator=generator, device=labels.device)
        x = drawn(len(labels), *shape)
        for k in reversed(range(len(self))):
            t = torch.full_like(labels, k)
            told = torch.full_like(labels, int(self.times[k]))
            output = guided_output(network, x, told, labels, guidance, guided)
            step = self.posterior(output, x, t, clip)
            x = step.mean + (step.log_variance / 2).exp() * drawn(x.shape) if k else step.mean
        return x


def guided_output(
    network: nn.Module,
    x: Tensor,
    time: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    channels: int | None = None,
) -> Tensor:
    r"""Classifier-free guidance (arXiv 2207.12598): $\epsilon_\varnothing+s\,(\epsilon_y-\epsilon_\varnothing)$, both from one batch.

    Args:
        channels: the first so many channels are guided, the others are those of $y$; None: all that are in ``x``. DiT guides
            three of its four latent channels.
    Raises:
        CompanionError: a scale other than 1 for a network without a null label.
    """
    if scale == 1:
        return network(x, time, labels)
    if network.null is None:
        raise CompanionError(f"guidance {scale:g} needs a network with a null class; allowed for this one: 1")
    null = torch.full_like(labels, network.null)
    with_label, without = network(
        *(torch.cat(pair) for pair in ((x, x), (time, time), (labels, null)))
    ).chunk(2)
    count = x.shape[1] if channels is None else channels
    epsilon, kept = with_label[:, :count], with_label[:, count:]
    return torch.cat([without[:, :count] + scale * (epsilon - without[:, :count]), kept], 1)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``table[t]`` in the type and on the device of ``like``, ``(n, 1, 1, 1)``."""
    return over_images(table.to(like.dtype).to(like.device)[t])


def over_images(values: Tensor) -> Tensor:
    """``(n,)`` numbers to be multiplied with ``(n, c, h, w)``."""
    return values[:, None, None, None]


def halves(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Noise, and the variance's channels if there are any.

    Raises:
        CompanionError: an output that fits neither.
    """
    channels = x_t.shape[1]
    if output.shape == x_t.shape:
        return output, None
    if output.shape[1] != 2 * channels or output.shape[2:] != x_t.shape[2:]:
        raise CompanionError(
            f"the network makes {tuple(output.shape[1:])} of {tuple(x_t.shape[1:])}: allowed are {channels} or {2 * channels} channels "
            "of the same size"
        )
    return output.split(channels, 1)


def divergence(mean: Tensor, log: Tensor, other_mean: Tensor, other_log: Tensor) -> Tensor:
    r"""$\mathrm{KL}(\mathcal N\,\|\,\mathcal N')$ of single numbers, in nats; ``log``: logarithms of the variances."""
    gap = (mean - other_mean).square() * (-other_log).exp()
    return 0.5 * (other_log - log + (log - other_log).exp() + gap - 1)


def log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of the probability of the step of 2/255 around x under a Gaussian; beyond the ends of [-1, 1] all that is left."""
    inverse = (-log_scale).exp()
    above, below = (cumulative(inverse * (x - mean + d)) for d in (1 / 255, -1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=LEAST).log()


def cumulative(u: Tensor) -> Tensor:
    """The published approximation of the normal distribution function by a hyperbolic tangent."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
