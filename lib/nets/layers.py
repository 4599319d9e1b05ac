"""What the networks share: norms, activations, pooling that knows the map's size, and the chain of blocks.

The evaluation networks take ``(channels, num_classes, size)`` and offer ``forward``, ``embed``, ``taps`` and
``classifier`` (:class:`BlockNetwork`).  Two conventions keep one definition valid from 8x8 digits to 128x128
photographs:

* ``first_padding`` is the padding of a 3x3 first convolution.  The literature uses 3 for 28x28 grey images,
  which makes them 32x32, and 1 otherwise; a 5x5 first convolution is widened by the same number of pixels.
* A pooling layer (or a stride of 2) is left out where its result would be smaller than 2x2 and a further
  convolution follows: an instance norm of a 1x1 map is a constant.  Nothing is left out at 32 pixels or more.
"""

from __future__ import annotations

from torch import Tensor, nn

from lib.system.errors import CompanionError, choose

GROUPS = 4  # of the "group" norm, in the ablation tables of the DC, DSA and DM papers


NORMS = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
    "group": lambda channels: nn.GroupNorm(GROUPS, channels),
}

ACTIVATIONS = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "leaky": lambda: nn.LeakyReLU(0.01),
    "swish": nn.SiLU,
}


def norm_layer(kind: str, channels: int) -> nn.Module:
    """The normalisation ``kind`` of maps (n, channels, h, w), affine per channel, eps 1e-5.

    ``none``; ``batch``; ``layer``: over (c, h, w) of a sample (DC's code has one affine pair per pixel,
    here one per channel, so that the norm does not depend on the map's size); ``instance``: over (h, w);
    ``group``: over (h, w) and a quarter of the channels.  Raises CompanionError for another kind, or for
    ``group`` where 4 does not divide the channels.
    """
    if kind == "group" and channels % GROUPS:
        raise CompanionError(f"norm 'group' needs a multiple of {GROUPS} channels, not {channels}")
    return choose("norm", kind, NORMS)(channels)


def activation(kind: str) -> nn.Module:
    """The activation ``kind``: relu, sigmoid, leaky (slope 0.01) or swish, x sigmoid(x).  Never in place."""
    return choose("activation", kind, ACTIVATIONS)()


def resolve_padding(first_padding: int | None, channels: int, size: int) -> int:
    """``first_padding`` if given, else 3 for one channel of 28x28 pixels and 1 for everything else.

    Raises CompanionError if it is below 1.
    """
    if first_padding is None:
        return 3 if channels == 1 and size == 28 else 1
    if first_padding < 1:
        raise CompanionError(f"first_padding must be at least 1, not {first_padding}")
    return first_padding


def max_pool(size: int, smallest: int = 2) -> tuple[nn.Module, int]:
    """A 2x2 max pool for a map of side ``size``, and the side after it.

    Where that side would be below ``smallest``, the identity and ``size``.
    """
    return (nn.MaxPool2d(2), size // 2) if size // 2 >= smallest else (nn.Identity(), size)


class BlockNetwork(nn.Module):
    """blocks -> neck -> classifier.

    A subclass sets ``blocks``, ``neck`` (last map -> (n, d)) and ``classifier``, the last linear layer.
    """

    blocks: nn.Sequential
    neck: nn.Module
    classifier: nn.Linear

    def taps(self, x: Tensor) -> list[Tensor]:
        """The output of every block, in order; the last one is what the neck reads."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """(n, d): the input of the classifier."""
        return self.neck(self.blocks(x))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, size, size) -> logits (n, num_classes)."""
        return self.classifier(self.embed(x))
