r"""A generator as the decoder of a set: codes of a prior are trained on as the images $G(z,y)$ (``lib.nets.generators``)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.data.whitening import Standardise, Transform
from lib.formation.colours import colours
from lib.nets.generators import KINDS
from lib.nets.generators.prior import Generator, Prior, to_data
from lib.system.errors import CompanionError, choose, unknown


@dataclass(frozen=True, eq=False)
class Generated:
    """A formation (see ``lib.formation``) that is saved with its generator.

    A code is numbers of the generator's space and, as the last one, its class, ``(d + 1,)``; the generator is what makes images of it, in
    the normalised space of the data. Spaces are ``z``, the latents; ``w``, the styles W of all layers; ``f0``, ``f1``, ..: the map
    $h_n$ behind layer n, and what later layers read of W.

    Attributes:
        weights: all numbers of the generator, ``(P,)``; mean, std: of the data, ``(c,)``.
        prior: the generator's recipe; shape: ``(c, h, w)``; num_classes: of the data; where: the space of the codes.
    """

    weights: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prior: dict[str, Any]
    shape: tuple[int, int, int]
    num_classes: int
    where: str = "z"
    name: str = "generated"
    multiplicity: ClassVar[int] = 1
    learned: ClassVar[bool] = True

    @classmethod
    def of(cls, network: Generator, prior: Prior, train, where: str = "z") -> Generated:
        """The decoder that a trained generator of these data is, for codes of one of its spaces."""
        depth(where, network)
        mean, std = colours(train.transform, "generated")
        weights = torch.cat([t.detach().flatten().float() for t in network.generating().values()])
        return cls(weights, mean, std, prior.recipe(), tuple(train.shape), train.num_classes, where)

    @functools.cached_property
    def network(self) -> Generator:
        """The generator, frozen."""
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in self.prior.items()}
        channels, size = self.shape[:2]
        like = SimpleNamespace(
            shape=tuple(self.shape), channels=channels, size=size, num_classes=self.num_classes, device=self.weights.device
        )  # fmt: skip
        network = choose("kind of prior", fields.pop("kind"), KINDS)(**fields).make(like)
        parts = network.generating()
        count = sum(tensor.numel() for tensor in parts.values())
        if count != len(self.weights):
            raise CompanionError(f"{len(self.weights)} weights for a generator of {count}")
        pieces = self.weights.split([tensor.numel() for tensor in parts.values()])
        with torch.no_grad():
            for tensor, piece in zip(parts.values(), pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))
        return network.eval().requires_grad_(False)

    @staticmethod
    def codes(z: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        """Points of the space ``(m, ...)``, in $F_n$ with what is read of W, and classes ``(m,)``, as codes ``(m, d + 1)``."""
        parts = [z.flatten(1), *([] if w is None else [w.flatten(1)]), y[:, None].to(z.dtype)]
        return torch.cat(parts, 1)

    def __call__(self, codes: Tensor) -> Tensor:
        network, n, y = self.network, depth(self.where, self.network), codes[:, -1].long()
        sizes = [math.prod(shape) for shape in self.parts]
        if codes.shape[1] - 1 != sum(sizes):
            raise CompanionError(
                f"codes of {codes.shape[1] - 1} numbers and a class: the generator takes {' and '.join(map(str, self.parts))}"
            )
        z, *rest = (
            part.unflatten(1, shape)
            for part, shape in zip(codes[:, :-1].split(sizes, 1), self.parts, strict=True)
        )
        if n is None:
            return self.space(network(z, y))
        w = z
        if n >= 0:  # rows of W that no later layer reads are not kept
            w = z.new_zeros(len(z), *network.styles)
            w[:, network.read_after(n)] = rest[0]
        return self.space(image_of(network, n, z, w, y))

    @functools.cached_property
    def parts(self) -> list[tuple[int, ...]]:
        """The shapes of what a code holds before its class."""
        network, n = self.network, depth(self.where, self.network)
        if n is None:
            return [tuple(network.latent)]
        if n < 0:
            return [tuple(network.styles)]
        y = torch.zeros(1, dtype=torch.long, device=self.weights.device)
        w = self.weights.new_zeros(1, *network.styles)
        return [tuple(network.to_f(w, y, n).shape[1:]), tuple(w[0, network.read_after(n)].shape)]

    def space(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] in the normalised space of the data."""
        return to_data(
            images, Standardise(*(images.new_tensor(numbers) for numbers in (self.mean, self.std)))
        )

    @torch.no_grad()
    def draw(self, labels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """New images of these classes, those of row k from generator k alone, ``(K, n, c, h, w)``."""
        z = torch.cat([self.network.draw(labels, generator) for generator in generators])
        images = self.space(self.network(z, labels.repeat(len(generators))))
        return images.unflatten(0, (len(generators), len(labels)))

    @property
    def extra_bytes(self) -> int:
        """Of the generator."""
        return self.weights.numel() * self.weights.element_size()

    def labels(self, labels: Tensor) -> Tensor:
        return labels

    def on(self, transform: Transform) -> Generated:
        return self

    def check(self, shape: tuple[int, int, int]) -> None:
        if tuple(shape) != tuple(self.shape):
            raise CompanionError(f"a generator of images {tuple(self.shape)}, not {tuple(shape)}")

    def pack(self, images: Tensor) -> Tensor:
        raise CompanionError("real images are no codes of a generator: they are found by inversion")


def depth(where: str, network: Generator) -> int | None:
    """The number n of a space: None for z, -1 for W, n for $F_n$.

    Raises:
        CompanionError: the generator has no such space.
    """
    if where == "z":
        return None
    inner = {"w": -1} | {f"f{n}": n for n in range(network.layers)} if network.styles else {}
    if where not in inner:
        raise unknown("space", where, ["z", *inner])
    return inner[where]


def image_of(network: Generator, n: int, f: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The image in [-1, 1] of a point of W (n = -1, f is not read) or of $F_n$."""
    return network.from_f(network.start(w, y), w, y, 0) if n < 0 else network.from_f(f, w, y, n)
