"""Channel-wise formations: images whose colour channels are mixtures of a stored image's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.data.whitening import Transform
from lib.formation.colours import as_tuples, colours
from lib.system.errors import CompanionError

Maps = tuple[tuple[tuple[float, ...], ...], ...]
LUMINANCE = (0.299, 0.587, 0.114)
_COLOUR = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# every plane as a grey image, then the colour image
PLANES = (*(tuple(row for _ in range(3)) for row in _COLOUR), _COLOUR)
# the image, its channels moved on by one and by two, and the mean of the channels
CYCLES = (*(tuple(_COLOUR[(k + s) % 3] for k in range(3)) for s in range(3)), ((1 / 3,) * 3,) * 3)


@dataclass(frozen=True)
class ChannelMix:
    r"""Every stored image as k images whose channels are mixtures of its own, $y_j = A_j x$ at every pixel x in [0, 1]^3.

    Attributes:
        maps: A, ``(k, 3, 3)``; learned: they count as stored.
        mean, std: of the normalised space in which codes and images live; name: as stored sets have it.
    """

    maps: Maps = PLANES
    learned: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    name: str = "channel-mix"

    def __post_init__(self):
        as_tuples(self, "maps", "mean", "std")

    @property
    def multiplicity(self) -> int:
        return len(self.maps)

    @property
    def extra_bytes(self) -> int:
        return 4 * 9 * len(self.maps) * self.learned

    def __call__(self, codes: Tensor, maps: Tensor | None = None) -> Tensor:
        """The images, by other maps (k, 3, 3) if given; these may carry gradients."""
        maps = codes.new_tensor(self.maps) if maps is None else maps
        mean, std = codes.new_tensor(self.mean), codes.new_tensor(self.std)
        gain = maps * std / std[:, None]
        offset = (maps @ mean - mean) / std  # (k, 3)
        formed = torch.einsum("koi,mihw->kmohw", gain, codes) + offset[:, None, :, None, None]
        return formed.flatten(0, 1)

    def labels(self, labels: Tensor) -> Tensor:
        return labels.repeat(self.multiplicity, *[1] * (labels.dim() - 1))

    def on(self, transform: Transform) -> ChannelMix:
        mean, std = colours(transform, self.name)
        return replace(self, mean=mean, std=std)

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 3:
            raise CompanionError(
                f"formation {self.name!r} mixes 3 colour channels, these images have {shape[0]}: "
                "allowed is MultiFormation, for any number of channels"
            )

    def pack(self, images: Tensor) -> Tensor:
        """Three images per code: channel c is the luminance of the c-th."""
        mean, std, weights = (images.new_tensor(x) for x in (self.mean, self.std, LUMINANCE))
        three = images[[c % len(images) for c in range(3)]]  # (3, m, 3, h, w)
        grey = torch.einsum("kmchw,c->mkhw", three, weights * std) + (weights * mean).sum()
        return (grey - mean[:, None, None]) / std[:, None, None]
