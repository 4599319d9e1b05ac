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
