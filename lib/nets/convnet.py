"""ConvNet-D-W, the network of the field: depth x [3x3 convolution, norm, activation, 2x2 pooling], flatten, linear.

The forward pass is written once, for G networks side by side (`grouped convolution <https://pytorch.org/docs/stable/generated/
torch.nn.functional.conv2d.html>`_ with G groups): G = 1 is the module itself, G = K an ensemble, G = C one copy of the weights
per class, which gives all per-class gradients in a single backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.nets.layers import activation, norm_layer
from lib.nets.pool import average_pool
from lib.system.errors import CompanionError, choose

TAPS = ("conv", "norm", "act", "pool")  # where a block's map can be taken
POOLS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "none": None}


class ConvNet(nn.Module):
    """ConvNet of the DC, DSA and DM papers (320 010 parameters at 32x32x3, 10 classes, depth 3, width 128, instance norm).

    Args:
        channels, num_classes, size: input channels, classes, input side in pixels.
        width, depth: channels of every convolution, number of blocks.
        norm: ``instance`` (a GroupNorm with one group per channel, affine), ``batch``, ``layer``, ``group`` (4) or ``none``.
        act, pool: ``relu | sigmoid | leaky | swish`` and ``avg | max | none``.
        first_padding: padding of the first convolution; the published rule (3 for one-channel input, 28 -> 32) serves
            MNIST-sized images only, so the data set says it (``ImageSet.first_padding``).

    State-dict names: block i has ``features.{4i}`` (convolution) and ``features.{4i+1}`` (norm), then ``classifier``.
    Raises:
        CompanionError: if the map is smaller than 2x2 before the last norm (an instance norm of one value is constant).
    """

    def __init__(self, channels: int, num_classes: int, size: int, *, width: int = 128, depth: int = 3,
                 norm: str = "instance", act: str = "relu", pool: str = "avg", first_padding: int = 1):  # fmt: skip
        super().__init__()
        self.norm, self.pool, self.depth, self.width = norm, pool, depth, width
        choose("pooling", pool, POOLS)
        side, layers = size + 2 * first_padding - 2, []
        for i in range(depth):
            if side < 2 and norm != "none":
                raise CompanionError(f"depth {depth} is too deep for {size}x{size} images: allowed 1 to {i}")
            layers += [
                nn.Conv2d(width if i else channels, width, 3, padding=1 if i else first_padding),
                norm_layer(norm, width),
                activation(act),
                nn.Identity() if pool == "none" else POOLS[pool](2),
            ]
            side = side if pool == "none" else side // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Flattened output of the last pooling, ``(n, width * side * side)``."""
        return self.taps(x)[-1].flatten(1)

    def taps(self, x: Tensor, where: str = "pool") -> list[Tensor]:
        """A map of every block, ``(n, width, h_i, w_i)``: the output of its ``conv``, ``norm``, ``act`` or ``pool``."""
        return self.look(x, where)[0]

    def look(self, x: Tensor, where: str) -> tuple[list[Tensor], Tensor]:
        """:meth:`taps` and the embedding ``(n, d)`` from one pass; both carry gradients."""
        choose("tap", where, dict.fromkeys(TAPS))
        tensors = {
            name: tensor.unsqueeze(0) for name, tensor in [*self.named_parameters(), *self.named_buffers()]
        }
        maps, last = self._blocks(tensors, x, 1, where)
        return maps, last.flatten(1)

    def grouped_taps(self, tensors: Mapping[str, Tensor], x: Tensor, groups: int) -> list[Tensor]:
        """Block outputs of G networks at once: ``tensors[name]`` is ``(G, ...)``, ``x`` is ``(n, G * c, h, w)``."""
        return self._blocks(tensors, x, groups, "pool")[0]

    def _blocks(
        self, tensors: Mapping[str, Tensor], x: Tensor, groups: int, where: str
    ) -> tuple[list[Tensor], Tensor]:
        maps = []
        for i in range(self.depth):
            conv, norm, act, _ = self.features[4 * i : 4 * i + 4]
            weight, bias = (tensors[f"features.{4 * i}.{kind}"].flatten(0, 1) for kind in ("weight", "bias"))
            # A per-channel mean is removed right after: the bias has neither effect nor gradient there.
            bias = None if self.norm == "instance" and where != "conv" else bias
            conved = F.conv2d(x, weight, bias, padding=conv.padding, groups=groups)
            normed = self._normalise(conved, norm, tensors, f"features.{4 * i + 1}", groups)
            # Nothing before it keeps its output for the backward pass, so a ReLU may overwrite it: half the time.
            kept = where == "norm" or where == "conv" and self.norm == "none"
            acted = torch.relu_(normed) if isinstance(act, nn.ReLU) and not kept else act(normed)
            x = self._downsample(acted)
            maps.append({"conv": conved, "norm": normed, "act": acted, "pool": x}[where])
        return maps, x

    def grouped_embed(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Embeddings of G networks, ``(G, n, c, h, w) -> (G, n, d)``; one input for all is ``(1, n, c, h, w)``."""
        groups = tensors["classifier.weight"].shape[0]
        x = x.expand(groups, *x.shape[1:]).transpose(0, 1).flatten(1, 2)  # (n, G c, h, w)
        last = self.grouped_taps(tensors, x, groups)[-1]  # (n, G width, h', w')
        return last.unflatten(1, (groups, self.width)).transpose(0, 1).flatten(2)

    def grouped_logits(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Logits of G networks, ``(G, n, c, h, w) -> (G, n, classes)``."""
        weight, bias = tensors["classifier.weight"], tensors["classifier.bias"]
        return torch.baddbmm(bias.unsqueeze(1), self.grouped_embed(tensors, x), weight.transpose(1, 2))

    def _normalise(
        self, x: Tensor, norm: nn.Module, tensors: Mapping[str, Tensor], name: str, groups: int
    ) -> Tensor:
        if self.norm == "none":
            return x
        weight, bias = tensors[f"{name}.weight"].flatten(), tensors[f"{name}.bias"].flatten()
        if self.norm == "batch":
            mean, var = (tensors[f"{name}.{kind}"] for kind in ("running_mean", "running_var"))
            return F.batch_norm(
                x, mean.flatten(), var.flatten(), weight, bias, norm.training, norm.momentum, norm.eps
            )
        return F.group_norm(x, norm.num_groups * groups, weight, bias, norm.eps)

    def _downsample(self, x: Tensor) -> Tensor:
        if self.pool == "none":
            return x
        if self.pool == "max":
            return F.max_pool2d(x, 2)
        return average_pool(x)
