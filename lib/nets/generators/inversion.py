r"""Inversion: codes whose images are given real ones. By the encoder that was trained with the generator, in one pass, or by descent,

$$\min_z\ \operatorname{mean}\big(\psi(\tilde G(z,y))-\psi(x)\big)^2+\operatorname{mean}\big(\tilde G(z,y)-x\big)^2$$

with $\tilde G$ in the normalised space of the data and $\psi$ the features of a network; both means run over images and all coordinates
(the first stage of IT-GAN, arXiv 2204.07513).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib.nets.generators.prior import Generator, to_data, to_generator
from lib.system.errors import CompanionError


@torch.no_grad()
def encoded(network: Generator, images: Tensor, y: Tensor, transform) -> Tensor:
    """The mean code of every normalised image, ``(n, *latent)``.

    Raises:
        CompanionError: the generator was trained without an encoder.
    """
    if "encoder" not in network.aside or not hasattr(network, "encoder"):
        raise CompanionError(
            f"the prior {type(network).__name__} has no encoder: allowed is inversion by descent (adam)"
        )
    return network.encoder(to_generator(images, transform), y)[0]


def inversion_errors(f: Tensor, f_real: Tensor, x: Tensor, x_real: Tensor) -> tuple[Tensor, Tensor]:
    """The two means above: of features, and of pixels."""
    return (f - f_real).square().mean(), (x - x_real).square().mean()


def invert(
    network: Generator,
    embed: Callable[[Tensor], Tensor],
    images: Tensor,
    y: Tensor,
    transform,
    z: Tensor,
    *,
    steps: int,
    lr: float = 0.1,
    cosine: bool = False,
) -> Tensor:
    """Descend by Adam from z, ``(n, *latent)``; at a constant rate, or along a cosine to 0."""
    z = z.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([z], lr=lr)
    with torch.no_grad():
        f_real = embed(images)
    for step in range(steps):
        if cosine:
            optimiser.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        x = to_data(network(z, y), transform)
        (gradient,) = torch.autograd.grad(sum(inversion_errors(embed(x), f_real, x, images)), z)
        z.grad = gradient
        optimiser.step()
    return z.detach()
