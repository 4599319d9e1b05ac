"""The plainest formation: an image is itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lib.data.whitening import Transform


@dataclass(frozen=True)
class Pixels:
    """The plainest parameterisation: what is stored is what is trained on.

    Attributes:
        name: as stored sets have it.
    """

    name: str = "pixels"
    multiplicity: ClassVar[int] = 1
    extra_bytes: ClassVar[int] = 0
    learned: ClassVar[bool] = False

    def __call__(self, codes: Tensor) -> Tensor:
        return codes

    def on(self, transform: Transform) -> Pixels:
        return self

    def labels(self, labels: Tensor) -> Tensor:
        """Labels of the decoded images."""
        return labels

    def check(self, shape: tuple[int, int, int]) -> None:
        """Every shape will do."""

    def pack(self, images: Tensor) -> Tensor:
        """``(1, m, c, h, w) -> (m, c, h, w)``."""
        return images[0]
