"""Theta: networks by name. A name is an architecture and its options, joined by dashes, defaults left out: ``convnet-d2-w32``,
``convnet-batch-swish-max``, ``mlp``, ``lenet``, ``alexnet``, ``vgg11-batch``, ``resnet18-batch``, ``resnet10ap``, ``vit``.

The name is what a protocol, a table and a saved set record, so it says everything about the architecture.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from lib.nets.alexnet import AlexNet
from lib.nets.convnet import POOLS, ConvNet
from lib.nets.layers import ACTIVATIONS, NORMS
from lib.nets.lenet import LeNet
from lib.nets.mlp import MLP
from lib.nets.resnet import ResNet10, ResNet10AP, ResNet18, ResNet18AP
from lib.nets.vgg import VGG11
from lib.nets.vit import ViT
from lib.system.errors import CompanionError, unknown

ARCHITECTURES = {
    "convnet": ConvNet,
    "mlp": MLP,
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet10": ResNet10,
    "resnet10ap": ResNet10AP,
    "resnet18": ResNet18,
    "resnet18ap": ResNet18AP,
    "vit": ViT,
}
_WITH_NORM = ("convnet", "alexnet", "vgg11", "resnet10", "resnet10ap", "resnet18", "resnet18ap")
_SIZES = {
    "d": {"convnet": "depth", "vit": "depth"},
    "w": dict.fromkeys(_WITH_NORM, "width") | {"vit": "dim"},
}


def make(name: str, like, generator: torch.Generator | None = None) -> nn.Module:
    """A freshly initialised network for the images of ``like`` (channels, num_classes, size, first_padding, device).

    Args:
        name: ``architecture[-d<depth>][-w<width>][-<norm>][-<act>][-<pool>]`` (depth, act, pool: ConvNet only; the ViT takes
            -d<depth> and -w<dim>; the width of AlexNet, VGG and ResNet is that of the first convolution, and MLP and LeNet have
            none).
        generator: source of the initial weights, on the device of ``like``; without it the weights are PyTorch's own draw.
    Raises:
        CompanionError: unknown architecture or option, or images too small for the depth.
    """
    architecture, options = parse(name)
    network = ARCHITECTURES[architecture](
        like.channels, like.num_classes, like.size, first_padding=like.first_padding, **options
    ).to(like.device)
    return network if generator is None else initialise(network, generator)


def parse(name: str) -> tuple[str, dict[str, object]]:
    """``"convnet-d2-w32"`` -> ``("convnet", {"depth": 2, "width": 32})``."""
    architecture, *words = str(name).split("-")
    if architecture not in ARCHITECTURES:
        raise unknown("network", name, ARCHITECTURES)
    options: dict[str, object] = {}
    for word in words:
        number = re.fullmatch(r"([dw])([1-9]\d*)", word)
        if number and architecture in _SIZES[number[1]]:
            options[_SIZES[number[1]][architecture]] = int(number[2])
        elif word in NORMS and architecture in _WITH_NORM:
            options["norm"] = word
        elif word in ACTIVATIONS and architecture == "convnet":
            options["act"] = word
        elif word in ("max", "nopool") and architecture == "convnet":
            options["pool"] = "none" if word == "nopool" else word
        else:
            allowed = ["d<depth>"] * (architecture in _SIZES["d"]) + ["w<width>"] * (
                architecture in _SIZES["w"]
            )
            allowed += sorted(NORMS) * (architecture in _WITH_NORM)
            allowed += [*ACTIVATIONS, "max", "nopool"] * (architecture == "convnet")
            raise CompanionError(
                f"unknown option {word!r} in network {name!r}; allowed after {architecture}: {', '.join(allowed) or 'none'}"
            )
    return architecture, options


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator) -> nn.Module:
    r"""Draw all weights anew, in place, by PyTorch's default law, from an explicit generator.

    Convolutions and linear layers: weight and bias uniform on $\\pm 1/\\sqrt{fan_{in}}$; norms: 1 and 0, running statistics
    reset; embeddings (class token and positions of the ViT): standard normal.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            module.weight.fill_(1)
            module.bias.zero_()
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        else:
            for parameter in module.parameters(recurse=False):
                parameter.normal_(generator=generator)
    return network


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a forward pass mixes the images of a batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


__all__ = ["ARCHITECTURES", "POOLS", "count_parameters", "has_batch_norm", "initialise", "make", "parse"]
