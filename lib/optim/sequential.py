"""Gradient descent on stored images, and a joint step that equals one optimiser step per class in turn."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_sgd(pixels: Tensor, lr: float, momentum: float, classes: int, sequential: bool) -> torch.optim.SGD:
    """SGD with momentum on stored images, which are made leaves; ``sequential``: at the rates of :func:`sequential_rates`."""
    if sequential:
        lr, momentum = sequential_rates(lr, momentum, classes)
    return torch.optim.SGD([pixels.requires_grad_()], lr=lr, momentum=momentum)


def sequential_rates(lr: float, momentum: float, classes: int) -> tuple[float, float]:
    r"""Learning rate and momentum of a joint step that stands for one optimiser step per class in turn.

    Some published codes step the optimiser of *all* images after every class: between two gradients of a class its images
    move C times by their momentum. With $\beta' = \beta^C$ and $\eta' = \eta(1-\beta^C)/(1-\beta)$ one step for all classes
    takes every class to where it is when its own gradient is due next.
    """
    return lr * (1 - momentum**classes) / (1 - momentum), momentum**classes
