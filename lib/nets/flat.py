r"""Weights as vectors: K networks of one architecture as ``(K, P)``, for methods that compare, project or store whole networks.

The order is that of ``named_parameters()``, each tensor row-major: the order of the published code's experts, and of the
reference vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lib import nets
from lib.nets.ensemble import apply
from lib.system.errors import CompanionError, choose


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """Stacked parameters, name -> ``(K, ...)``, as a copy ``(K, P)``."""
    return torch.cat([tensor.flatten(1) for tensor in parameters.values()], 1)


def unflatten(theta: Tensor, like: nn.Module) -> dict[str, Tensor]:
    """``(K, P)`` as stacked parameters of the architecture ``like``, views that pass gradients on.

    Raises:
        CompanionError: P is not the number of the network's parameters: the vector belongs to another network or data set.
    """
    shapes = {name: parameter.shape for name, parameter in like.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    if theta.shape[1] != sum(sizes):
        raise CompanionError(
            f"weights of {theta.shape[1]} numbers for a network of {sum(sizes)}: another network, or another data set's"
        )
    # one split, whose backward pass is one concatenation
    parts = theta.split(sizes, 1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def logits(like: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    """``(K, n, C)`` of K networks on ``x``: ``(K, n, c, h, w)``, or ``(1, n, c, h, w)`` for all."""
    return apply(like, unflatten(theta, like), x)


def template(name: str, like) -> nn.Module:
    """The architecture whose weights are vectors, for the images of ``like``.

    Raises:
        CompanionError: a network with batch norm, whose running statistics would be left out of the vector.
    """
    network = nets.make(name, like).train()
    if nets.has_batch_norm(network):
        raise CompanionError(
            f"network {name!r} keeps running statistics, which are no part of its weights: "
            "allowed are norms without, such as instance norm"
        )
    return network


# -- laws of the initial weights --------------------------------------------------------------------------------------------


@torch.no_grad()
def xavier(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """DD's law, in place: Xavier normal with gain 1, biases 0, norms 1 and 0."""
    nets.initialise(network, generator)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_normal_(module.weight, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    return network


LAWS = {"default": nets.initialise, "xavier": xavier}


@torch.no_grad()
def draw(like: nn.Module, generators: Sequence[torch.Generator], law: str = "default") -> Tensor:
    """New weights ``(K, P)``, network k from generator k alone; ``law``: of :data:`LAWS`, ``default`` is PyTorch's."""
    initialise = choose("law of initial weights", law, LAWS)
    rows = []
    for generator in generators:
        initialise(like, generator)
        rows.append(flatten({name: tensor.unsqueeze(0) for name, tensor in like.named_parameters()}))
    return torch.cat(rows)
