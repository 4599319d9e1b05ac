r"""Statistics of what enters the BatchNorm layers of a frozen network: the prior on images of DeepInversion, SRe2L and WMDD.

For layer l with input $a^{(l)}$ of shape ``(n, channels, h, w)`` the statistics are the mean and the *biased* variance per
channel over images and pixels: of the whole batch, or of every class of a class-major block (:func:`statistics` with
``groups``). They are compared with the network's running statistics (:func:`running_terms`, SRe2L) or with those of the real
images of each class (:func:`class_terms`, WMDD).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.nets.convnet import ConvNet
from lib.system.arithmetic import PLAIN, Arithmetic, widened
from lib.system.errors import CompanionError, unknown

FORMS = ("code", "paper")


class Watch:
    """A network in eval mode that also shows its BatchNorm inputs and its features.

    ``watch(x)`` returns ``(inputs, features, logits)``: a list of the inputs of all BatchNorm layers in module order, the input
    of the last linear layer ``(n, d)`` and the logits ``(n, C)``, all of one forward pass. As a context manager it takes its
    hooks away at the end; the network itself is not changed.

    Raises:
        CompanionError: the network has no BatchNorm layer, or no linear layer.
    """

    def __init__(self, network: nn.Module, arithmetic: Arithmetic = PLAIN):
        self.arithmetic = arithmetic
        self.network, self.inputs, self.features = network, {}, None
        self.layers = batch_norms(network)
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise CompanionError(
                f"{type(network).__name__} has no linear layer, whose input would be the feature"
            )
        self.by_taps = isinstance(network, ConvNet)  # it normalises by functions that hooks do not see
        self.hooks = []
        if not self.by_taps:
            self.hooks = [layer.register_forward_pre_hook(self._norm) for layer in self.layers]
            self.hooks.append(linear[-1].register_forward_pre_hook(self._linear))

    def __call__(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        logits = self.arithmetic(self._looked if self.by_taps else self.network, x)
        seen = [widened(self.inputs[layer]) for layer in self.layers], widened(self.features), logits
        self.inputs, self.features = {}, None  # nothing of the graph outlives the call
        return seen

    def _looked(self, x: Tensor) -> Tensor:
        inputs, self.features = self.network.look(x, "conv")
        self.inputs = dict(zip(self.layers, inputs, strict=True))
        return self.network.classifier(self.features)

    def _norm(self, module: nn.Module, arguments: tuple) -> None:
        self.inputs[module] = arguments[0]

    def _linear(self, module: nn.Module, arguments: tuple) -> None:
        self.features = arguments[0]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """The BatchNorm2d layers in module order.

    Raises:
        CompanionError: there is none.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        raise CompanionError(
            f"the teacher ({type(network).__name__}) has no BatchNorm layer, whose statistics are matched; "
            "allowed: a network with batch norm, such as resnet18-batch or convnet-batch"
        )
    return layers


# -- mean and variance ---------------------------------------------------------------------------------------------------


class _Moments(torch.autograd.Function):
    """Mean and biased variance of ``(groups, m, channels, pixels)`` over m and pixels.

    Written out because autograd keeps the centred copy of every map; here the backward pass is one multiply-add.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.is_cuda:
            var, mean = torch.var_mean(x, (1, 3), correction=0)
        else:  # two passes: a tenth of the time, since var_mean of two dimensions is not vectorised
            mean = x.mean(3).mean(1)
            var = (x - mean[:, None, :, None]).square_().mean(3).mean(1)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, d_mean: Tensor, d_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        scale = d_var * (2 / (x.shape[1] * x.shape[3]))
        shift = d_mean / (x.shape[1] * x.shape[3]) - scale * mean
        return torch.addcmul(shift[:, None, :, None], scale[:, None, :, None], x)


def moments(x: Tensor, groups: int = 1, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance per channel of ``(groups * m, channels, h, w)``, each ``(groups, channels)``.

    Args:
        weights: ``(groups, m)`` with rows that sum to 1: image j of a group counts $w_j$ instead of 1 / m.
    """
    if len(x) % groups:
        raise CompanionError(f"{len(x)} images do not make {groups} classes of one size")
    grouped = x.unflatten(0, (groups, -1)).flatten(3)
    if weights is None:
        return _Moments.apply(grouped)
    w = weights.to(x).unsqueeze(2)
    mean = (w * grouped.mean(3)).sum(1)
    centred = (grouped - mean[:, None, :, None]).square().mean(3)
    return mean, (w * centred).sum(1)


def statistics(
    inputs: Iterable[Tensor], groups: int = 1, weights: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """:func:`moments` of every layer's input: of the whole batch, or per class of a class-major block of ``groups`` classes."""
    return [moments(x, groups, weights) for x in inputs]


def running_statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running mean and variance of every BatchNorm layer, ``(1, channels)`` each."""
    return [
        (layer.running_mean.unsqueeze(0), layer.running_var.unsqueeze(0)) for layer in batch_norms(network)
    ]


@dataclass(frozen=True)
class ClassStatistics:
    """What the frozen network sees in the real images of one class.

    Attributes:
        features: ``(n, d)``, in the order of the images.
        layers: mean and variance of every BatchNorm input, ``(channels,)`` each.
    """

    features: Tensor
    layers: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def class_statistics(watch: Watch, images: Tensor | Iterable[Tensor], chunk: int = 100) -> ClassStatistics:
    """Features and statistics of one class in one pass.

    The variance is, as published, the mean of the variances *within* chunks of consecutive images, weighted by their sizes, so
    it depends on ``chunk``.

    Args:
        images: all images of a class ``(n, c, h, w)``, or an iterable of such chunks (then these are the chunks).
    """
    features, sums, count = [], None, 0
    for part in images.split(chunk) if isinstance(images, Tensor) else images:
        inputs, seen, _ = watch(part)
        found = [torch.cat(pair) * len(part) for pair in statistics(inputs)]  # (2, channels) per layer
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        features.append(seen)
        count += len(part)
    if not count:
        raise CompanionError("a class without images has no statistics")
    return ClassStatistics(torch.cat(features), [(total / count).unbind(0) for total in sums])


# -- how far a block is from them ----------------------------------------------------------------------------------------


def running_terms(found: list[tuple[Tensor, Tensor]], running: list[tuple[Tensor, Tensor]]) -> Tensor:
    r"""SRe2L: $\lVert\hat\mu_l-\mu_l\rVert_2+\lVert\hat\sigma^2_l-\sigma^2_l\rVert_2$ per layer, ``(L,)``; norms, not squares."""
    return class_terms(found, running, "code")


def class_terms(
    found: list[tuple[Tensor, Tensor]], wanted: list[tuple[Tensor, Tensor]], form: str = "code"
) -> Tensor:
    r"""WMDD: distance of a block's statistics to those of its classes, per layer, ``(L,)``.

    ``code``: $\frac1C\sum_c\lVert u_{c,l}-\mu_{c,l}\rVert_2+\frac1C\sum_c\lVert v_{c,l}-\sigma^2_{c,l}\rVert_2$, as published
    in code; ``paper``: the sum over classes of the squared norms.

    Args:
        found, wanted: per layer mean and variance, ``(C, channels)``.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    rows = []
    for ours, theirs in zip(found, wanted, strict=True):
        gap = torch.stack(ours) - torch.stack(theirs)  # (2, C, channels)
        rows.append(gap.square().sum() if form == "paper" else gap.norm(dim=2).mean(1).sum())
    return torch.stack(rows)


def weigh(terms: Tensor, first: float = 1.0) -> Tensor:
    """Sum over layers, the first one multiplied by ``first`` (SRe2L: 10)."""
    return terms.sum() + (first - 1) * terms[0] if first != 1 else terms.sum()
