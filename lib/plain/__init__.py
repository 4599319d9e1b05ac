"""Every algorithm as a reader would write it: one class and one network after the other, the paper's symbols, no options.

Each file holds one function of the method's name, ``f(p, train, ipc, g)``: settings (an instance of the method, of which it reads the
paper's hyper-parameters), training images, stored images per class, random numbers. It returns the images ``(C * ipc, c, h, w)``
(with the labels, where these are learned) and the losses of all steps. One text, three uses: it is shown in the method's notebook, it
is what the tests compare the fast version with, number by number, and what the benchmarks time it against.

Here is what the loops share.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import augment
from lib.system.errors import unknown


def plain(name: str) -> Callable:
    """The plain version of the method of that name in ``lib.methods.METHODS``."""
    try:
        module = importlib.import_module(f"lib.plain.{name}")
    except ModuleNotFoundError:
        from lib.methods import METHODS

        raise unknown("method", name, METHODS) from None
    return getattr(module, name)


def text(name: str) -> str:
    """The source of a plain version, as it is shown."""
    return inspect.getsource(plain(name)).rstrip()


class Momentum:
    r"""SGD with momentum, $v\leftarrow\beta v+g,\ x\leftarrow x-\eta v$."""

    def __init__(self, eta: float, beta: float = 0.5):
        self.eta, self.beta, self.v = eta, beta, 0.0

    def __call__(self, x: Tensor, gradient: Tensor) -> Tensor:
        self.v = self.beta * self.v + gradient
        return (x - self.eta * self.v).detach()


def draw_omega(p, train, g: torch.Generator) -> list[augment.Draw | None]:
    r"""$\omega_c$ for every class: one family of transforms and its parameters (none without augmentation)."""
    names = augment.families(p.augmentation, train)
    if not names:
        return [None] * train.num_classes
    omega = augment.draw(names, train.num_classes, g, mode=p.mode)
    return [
        augment.Draw(omega.names, omega.choice[c : c + 1], omega.u[c : c + 1], omega.mode)
        for c in range(train.num_classes)
    ]


def siamese(images: Tensor, omega: augment.Draw | None) -> Tensor:
    r"""$\mathcal A_\omega$: the same transform for all images."""
    if omega is None:
        return images
    return torch.cat([augment.apply(image[None], omega) for image in images])


def mosaic(images: Tensor, mode: str) -> Tensor:
    """Four images ``(4, m, c, h, w)`` at half their size in the quarters of one, ``(m, c, h, w)``: down, then right."""
    a, b, c, d = (F.interpolate(image, scale_factor=0.5, mode=mode) for image in images)
    return torch.cat([torch.cat([a, b], -2), torch.cat([c, d], -2)], -1)


def expand(images: Tensor) -> Tensor:
    """The quarters of every image, each enlarged to the full size, ``(m, c, h, w) -> (4 m, c, h, w)``."""
    h, w = images.shape[-2] // 2, images.shape[-1] // 2
    quarters = (images[..., :h, :w], images[..., h:, :w], images[..., :h, w:], images[..., h:, w:])
    return torch.cat([F.interpolate(part, scale_factor=2, mode="bilinear") for part in quarters])
