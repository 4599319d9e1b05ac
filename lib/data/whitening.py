"""Invertible preprocessing: channel standardisation and three kinds of ZCA whitening.

Every transform maps images in [0, 1] of shape (..., c, h, w) to the space in which networks are trained
(``forward``) and back (``inverse``), and can be written beside a synthetic set: ``tensors()`` holds its numbers,
``config()`` its name and hyper-parameters, :func:`from_saved` rebuilds it.

ZCA multiplies flattened images by a symmetric matrix W = U (Lambda + eps I)^(-1/2) U^T, where Sigma = U Lambda U^T
is the second moment of the training images. Test images use the training statistics. The kinds differ in what
Sigma is taken of and in how eps is scaled, so sets made in one space must not be read in the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from lib.system.errors import CompanionError, choose

# A (d, d) matrix of 64-bit floats takes 1.2 GB at this d (64 px, three channels), and its eigenvectors cost O(d^3).
LARGEST_ZCA = 64 * 64 * 3
CHUNK = 2048


class Transform:
    """What the transforms share: their tensors by name, and moving between devices."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """The fitted numbers by name, for saving."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.type == "Tensor"}

    def config(self) -> dict[str, object]:
        """Name and hyper-parameters as plain values, for saving and printing."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.type != "Tensor"}
        return {"kind": self.kind, **plain}

    def to(self, device: torch.device | str) -> Transform:
        """The same transform on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, eq=False)
class Standardise(Transform):
    """(x - mean) / std per channel; ``mean`` and ``std`` have shape (c,)."""

    kind: ClassVar[str] = "standardise"
    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, images: Tensor) -> Standardise:
        """Mean and standard deviation over all images and pixels, summed in 64 bits; images (N, c, h, w) in [0, 1].

        A channel without variation keeps its scale (std 1), so that blank images stay finite.
        """
        count = images.shape[0] * images.shape[2] * images.shape[3]
        mean = sum(chunk.double().sum((0, 2, 3)) for chunk in images.split(CHUNK)) / count
        centred = (chunk.double() - mean[:, None, None] for chunk in images.split(CHUNK))
        std = (sum(chunk.square().sum((0, 2, 3)) for chunk in centred) / count).sqrt()
        std = torch.where(std < 1e-8, 1.0, std)
        return cls(mean.to(images.dtype), std.to(images.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.sub(self.mean[:, None, None]).div_(self.std[:, None, None])

    def inverse(self, x: Tensor) -> Tensor:
        return x.mul(self.std[:, None, None]).add_(self.mean[:, None, None])


@dataclass(frozen=True, eq=False)
class ZCA(Transform):
    """ZCA as in the trajectory-matching family: z = (x - mean) W on flattened [0, 1] pixels.

    Sigma = (X - mean)^T (X - mean) / (N - 1) and eps is added to its eigenvalues as it is (0.1 in MTT). ``mean``
    has shape (d,), ``matrix`` (d, d), d = c h w.
    """

    kind: ClassVar[str] = "zca"
    mean: Tensor
    matrix: Tensor
    eps: float = 0.1

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> ZCA:
        """Fit on training images (N, c, h, w) in [0, 1]; 64-bit sums and eigenvectors."""
        flat = _flatten_checked(images)
        mean = sum(chunk.double().sum(0) for chunk in flat.split(CHUNK)) / len(flat)
        moment = second_moment((chunk.double() - mean for chunk in flat.split(CHUNK)), max(len(flat) - 1, 1))
        return cls(mean.to(images.dtype), zca_matrix(moment, eps).to(images.dtype), eps)

    @functools.cached_property
    def inverse_matrix(self) -> Tensor:
        return torch.linalg.inv(self.matrix.double()).to(self.matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ((x.flatten(-3) - self.mean) @ self.matrix).view(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        return (x.flatten(-3) @ self.inverse_matrix + self.mean).view(x.shape)


@dataclass(frozen=True, eq=False)
class PerImageZCA(Transform):
    """ZCA as in the kernel family (KIP): each image first loses its own mean and length.

    u = (x - mean(x)) / |x - mean(x)|, the mean over all pixels and channels of that image, then z = u W with
    Sigma = U^T U / N (no fitted mean) and eps = 0.1 tr(Sigma) / d, so that 0.1 is relative to the mean eigenvalue.

    The map loses two numbers per image. ``inverse`` is therefore exact only when it is given them
    (:meth:`statistics`); without, it uses the training averages ``image_mean`` and ``image_norm`` (both shape ()),
    which is right for looking at an image, not for measuring on it. Multiply-adding is all it does: an image
    learned in the whitened space need not have unit length, and its length is kept.
    """

    kind: ClassVar[str] = "zca-kip"
    matrix: Tensor
    image_mean: Tensor
    image_norm: Tensor
    eps: float = 0.1

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1, rank_control: bool = False) -> PerImageZCA:
        """Fit on training images (N, c, h, w).

        ``rank_control`` gives the d - N directions that fewer images than pixels leave empty scale 1 instead of
        eps^(-1/2); KIP's code does so, RFAD's does not.
        """
        flat = _flatten_checked(images)
        mean, norm = cls.statistics(images)
        unit = (
            (chunk.double() - m) / n
            for chunk, m, n in zip(
                flat.split(CHUNK), mean.double().split(CHUNK), norm.double().split(CHUNK), strict=True
            )
        )
        moment = second_moment(unit, len(flat))
        ridge = eps * float(moment.trace()) / len(moment)
        matrix = zca_matrix(moment, ridge, rank=len(flat) if rank_control else None)
        return cls(matrix.to(images.dtype), mean.mean(), norm.mean(), eps)

    @staticmethod
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and L2 norm after removing it of each image: two tensors of shape (..., 1)."""
        flat = x.flatten(-3)
        mean = flat.mean(-1, keepdim=True)
        # The least contrast an 8-bit image can have is longer than this; a blank one stays near 0 instead of becoming
        # NaN or its own rounding noise at full length.
        return mean, torch.linalg.vector_norm(flat - mean, dim=-1, keepdim=True).clamp_min(1e-4)

    @functools.cached_property
    def inverse_matrix(self) -> Tensor:
        return torch.linalg.inv(self.matrix.double()).to(self.matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        mean, norm = self.statistics(x)
        return ((x.flatten(-3) - mean) / norm @ self.matrix).view(x.shape)

    def inverse(self, x: Tensor, mean: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
        mean = self.image_mean if mean is None else mean
        norm = self.image_norm if norm is None else norm
        return (x.flatten(-3) @ self.inverse_matrix * norm + mean).view(x.shape)


@dataclass(frozen=True, eq=False)
class StandardisedZCA(Transform):
    """ZCA as in RFAD (CIFAR): channels are standardised first, then z = u W with Sigma = U^T U / N and eps = 0.1 tr(Sigma) / d.

    ``mean`` and ``std`` have shape (c,), ``matrix`` (d, d). No mean of the vectors is taken away, and directions that fewer images
    than pixels leave empty are scaled like the others.
    """

    kind: ClassVar[str] = "zca-rfad"
    mean: Tensor
    std: Tensor
    matrix: Tensor
    eps: float = 0.1

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> StandardisedZCA:
        """Fit on training images (N, c, h, w) in [0, 1]; 64-bit sums and eigenvectors."""
        first = Standardise.fit(images)
        flat = _flatten_checked(images)
        chunks = (first.forward(chunk).flatten(1).double() for chunk in images.split(CHUNK))
        moment = second_moment(chunks, len(flat))
        matrix = zca_matrix(moment, eps * float(moment.trace()) / len(moment))
        return cls(first.mean, first.std, matrix.to(images.dtype), eps)

    @functools.cached_property
    def inverse_matrix(self) -> Tensor:
        return torch.linalg.inv(self.matrix.double()).to(self.matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        unit = Standardise(self.mean, self.std).forward(x)
        return (unit.flatten(-3) @ self.matrix).view(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        unit = (x.flatten(-3) @ self.inverse_matrix).view(x.shape)
        return Standardise(self.mean, self.std).inverse(unit)


KINDS = {cls.kind: cls for cls in (Standardise, ZCA, PerImageZCA, StandardisedZCA)}
WHITENINGS = {cls.kind: cls for cls in (ZCA, PerImageZCA, StandardisedZCA)}


def from_saved(saved: str | dict, tensors: dict[str, Tensor]) -> Transform:
    """The transform whose ``config()`` (or only its kind) and ``tensors()`` were saved.

    Raises:
        CompanionError: for an unknown kind, and when a tensor is missing.
    """
    config = {"kind": saved} if isinstance(saved, str) else dict(saved)
    kind = config.pop("kind", None)
    cls = choose("transform", kind, KINDS)
    names = {field.name: field.type == "Tensor" for field in fields(cls)}
    needed = [name for name, is_tensor in names.items() if is_tensor]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CompanionError(
            f"the saved transform {kind!r} lacks {', '.join(missing)}; it needs {', '.join(needed)}"
        )
    plain = {name: value for name, value in config.items() if names.get(name) is False}
    return cls(**{name: tensors[name] for name in needed}, **plain)


def second_moment(chunks, divisor: int) -> Tensor:
    """sum_i x_i x_i^T / divisor over the rows of all chunks, each (n, d); shape (d, d)."""
    return sum(chunk.T @ chunk for chunk in chunks) / divisor


def zca_matrix(moment: Tensor, ridge: float, rank: int | None = None) -> Tensor:
    """W = U (Lambda + ridge I)^(-1/2) U^T of the symmetric matrix ``moment`` = U Lambda U^T, shape (d, d), 64 bits.

    With ``rank`` = n only the n largest eigen-directions are scaled; the others keep scale 1.
    """
    eigenvalues, basis = torch.linalg.eigh(moment.double())  # ascending
    scale = (eigenvalues.clamp_min(0) + ridge).rsqrt()
    if rank is not None:
        scale[: max(len(scale) - rank, 0)] = 1
    return basis * scale @ basis.T


def _flatten_checked(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    if flat.shape[1] > LARGEST_ZCA:
        shape = "x".join(map(str, images.shape[1:]))
        raise CompanionError(
            f"ZCA of {shape} images needs a {flat.shape[1]}-square matrix; allowed: at most "
            f"{LARGEST_ZCA} values per image (64 px, 3 channels), pass a smaller size="
        )
    return flat
