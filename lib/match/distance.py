r"""d as a value: what is looked at in a network, and how the looks at real and synthetic images are compared.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c d\big(\mathcal A_\omega(S_c), \mathcal A_\omega(T_c);\ \theta\big),
\qquad d = d_1 + d_2 + \dots$$

A distance is a frozen dataclass: its fields are its weights. It says what it keeps of a look (:meth:`Distance.observe`, the only
thing that sees the images) and what two of these make (:meth:`Distance.terms`: named summands, ``(C,)`` each, which the history
shows one by one). Distances add up: ``ClassMean() + Gram(1e4)``; one pass through the network serves the whole sum.

The distances themselves stand beside their mathematics: means in ``features``, maps in ``attention`` and ``style``, kernels in
``mmd``, plans and critics in ``points``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lib.formation import by_class
from lib.nets.convnet import ConvNet
from lib.system.errors import CompanionError


class Look:
    """What a network shows of ``(C, n, c, h, w)`` images, computed when it is asked for and once.

    Args:
        taps: where in the blocks of a ConvNet maps are wanted (``lib.nets.convnet.TAPS``).
    """

    def __init__(self, network: nn.Module | None, images: Tensor, taps: Iterable[str] = ()):
        self.network, self.pixels = network, images
        self._taps, self._maps, self._embedding = tuple(taps), {}, None

    @classmethod
    def of(cls, embedding: Tensor | None = None, maps: dict[str, list[Tensor]] | None = None) -> Look:
        """A look whose content is known: an embedding ``(C, n, d)``, and maps ``(C, n, k, h, w)`` of every block by tap."""
        look = cls(None, None)
        look._embedding, look._maps = embedding, dict(maps or {})
        return look

    @property
    def embedding(self) -> Tensor:
        """Flattened output of the convolutional body, ``(C, n, d)``."""
        if self._embedding is None and self._taps:
            self.maps(self._taps[0])
        if self._embedding is None:
            self._embedding = by_class(self.network.embed(self.pixels.flatten(0, 1)), len(self.pixels))
        return self._embedding

    def maps(self, tap: str) -> list[Tensor]:
        """The map of every block, ``(C, n, k, h, w)`` each."""
        if tap not in self._maps:
            maps, embedding = self.network.look(self.pixels.flatten(0, 1), tap)
            self._maps[tap] = [by_class(one, len(self.pixels)) for one in maps]
            if self._embedding is None:
                self._embedding = by_class(embedding, len(self.pixels))
        return self._maps[tap]


@dataclass
class At:
    """The step at which a distance is asked, beside the two looks.

    Attributes:
        network: the one looked at, whose last layer (``classifier``) some distances apply.
        percent: its accuracy on the real images it was trained on, 0 to 100; 0 for a network that was never trained.
        generator: for distances that draw random numbers.
        memory: what the distance keeps from step to step, made by its ``begin``.
        measured: metrics for the history that are no summands, left here by the distance.
    """

    network: nn.Module | None = None
    percent: Tensor | float = 0.0
    generator: torch.Generator | None = None
    memory: Any = None
    measured: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Distance(ABC):
    """The base of all: looks at the embedding, keeps nothing."""

    looks: ClassVar[bool] = True  # whether a network is needed at all

    @property
    def taps(self) -> tuple[str, ...]:
        """Where maps are taken."""
        return ()

    def check(self, network: nn.Module, ipc: int) -> None:
        """Refuse a network or an IPC on which the distance does not exist, in one line."""
        if self.taps and not isinstance(network, ConvNet):
            raise CompanionError(
                f"{type(self).__name__} looks at maps, {type(network).__name__} has none to tap: allowed is a convnet-..."
            )

    def begin(self, train, generator: torch.Generator) -> Any:
        """What is kept from step to step: None, or an object with ``state_dict`` and ``load_state_dict``."""
        return None

    def observe(self, look: Look) -> dict[str, Tensor]:
        """What is compared, tensors ``(C, n, ...)``.

        A mean over the images of a class is written ``(C, 1, ...)``: real batches come in parts of equal size, so the mean of the
        parts' means is the mean of the batch, and no map of a whole batch need be kept.
        """
        return {"embedding": look.embedding}

    @abstractmethod
    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        """The weighted summands by name, ``(C,)`` each."""

    def between(self, real: Look, syn: Look, at: At | None = None) -> dict[str, Tensor]:
        """:meth:`terms` of two looks, outside of any method: nothing is remembered."""
        return self.terms(self.observe(real), self.observe(syn), at or At())

    def __add__(self, other: Distance) -> Sum:
        return Sum((*_parts(self), *_parts(other)))


def check_weight(distance: Distance) -> None:
    """Refuse a weight that is not positive and finite: what should not count is left out of the sum."""
    if not 0 < distance.weight < float("inf"):
        raise CompanionError(
            f"weight {distance.weight} of {type(distance).__name__} is not allowed: it must be positive"
        )


@dataclass(frozen=True)
class Sum(Distance):
    """Several distances of one look. What a part observes is prefixed with its number; terms of one name are added.

    Attributes:
        parts: the distances.
    """

    parts: tuple[Distance, ...]

    def __post_init__(self):
        for part in self.parts:
            if not isinstance(part, Distance):
                raise CompanionError(f"{part!r} is no distance: allowed are sums of those in lib.match")

    @property
    def looks(self) -> bool:
        return any(part.looks for part in self.parts)

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tap for part in self.parts for tap in part.taps))

    def check(self, network: nn.Module, ipc: int) -> None:
        for part in self.parts:
            part.check(network, ipc)

    def begin(self, train, generator: torch.Generator) -> Memories:
        return Memories([part.begin(train, generator) for part in self.parts])

    def observe(self, look: Look) -> dict[str, Tensor]:
        seen = {}
        for i, part in enumerate(self.parts):
            seen |= {f"{i}.{name}": tensor for name, tensor in part.observe(look).items()}
        return seen

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        memories = at.memory.parts if at.memory is not None else [None] * len(self.parts)
        for i, (part, memory) in enumerate(zip(self.parts, memories, strict=True)):
            for name, value in part.terms(_of(i, real), _of(i, syn), replace(at, memory=memory)).items():
                found[name] = found[name] + value if name in found else value
        return found


def _parts(distance: Distance) -> tuple[Distance, ...]:
    return distance.parts if isinstance(distance, Sum) else (distance,)


def _of(i: int, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """What part i of a sum observed."""
    prefix = f"{i}."
    return {name.removeprefix(prefix): tensor for name, tensor in seen.items() if name.startswith(prefix)}


class Memories:
    """What the parts of a sum keep."""

    def __init__(self, parts: list[Any]):
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts) if part is not None}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for i, content in saved.items():
            self.parts[int(i)].load_state_dict(content)
