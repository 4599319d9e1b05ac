r"""A generator as the decoder of a set: codes of a prior are trained on as the images $G(z,y)$ (``lib.nets.generators``)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib.data.whitening import Standardise, Transform
from lib.formation.colours import colours
from lib.nets.generators import KINDS
from lib.nets.generators.prior import Generator, Prior, to_data
from lib.system.errors import CompanionError, choose


@dataclass(frozen=True, eq=False)
class Generated:
    """A formation (see ``lib.formation``) that is saved with its generator.

    A code is the latent's numbers and, as the last one, its class, ``(d + 1,)``; the generator is what makes images of it, in the
    normalised space of the data.

    Attributes:
        weights: all numbers of the generator, ``(P,)``; mean, std: of the data, ``(c,)``.
        prior: the generator's recipe; shape: ``(c, h, w)``; num_classes: of the data.
    """

    weights: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prior: dict[str, Any]
    shape: tuple[int, int, int]
    num_classes: int
    name: str = "generated"
    multiplicity: ClassVar[int] = 1
    learned: ClassVar[bool] = True

    @classmethod
    def of(cls, network: Generator, prior: Prior, train) -> Generated:
        """The decoder that a trained generator of these data is."""
        mean, std = colours(train.transform, "generated")
        weights = torch.cat([t.detach().flatten().float() for t in network.generating().values()])
        return cls(weights, mean, std, prior.recipe(), tuple(train.shape), train.num_classes)

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
    def codes(z: Tensor, y: Tensor) -> Tensor:
        """Latents ``(m, *latent)`` and classes ``(m,)`` as codes ``(m, d + 1)``."""
        return torch.cat([z.flatten(1), y[:, None].to(z.dtype)], 1)

    def __call__(self, codes: Tensor) -> Tensor:
        network, z = self.network, codes[:, :-1]
        if z.shape[1] != torch.Size(network.latent).numel():
            raise CompanionError(
                f"codes of {z.shape[1]} numbers and a class: the generator takes {tuple(network.latent)}"
            )
        return self.space(network(z.unflatten(1, network.latent), codes[:, -1].long()))

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
