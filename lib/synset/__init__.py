"""The synthetic set S: what every method returns, what is trained on, saved, and given to others."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from lib.data.whitening import from_saved
from lib.formation import DECODERS, Pixels
from lib.system.cards import card, rows_of, sheet
from lib.system.errors import CompanionError, choose, integer
from lib.system.files import read_safetensors, write_tensors
from lib.system.tensors import check_labels, check_tensor

FORMAT = "distillation-companion/1"


@dataclass(repr=False)
class SyntheticSet:
    """A small labelled set, in the normalised pixel space of the data it stands for.

    Attributes:
        codes: what is stored (and was learned), ``(m, ...)``; pixels ``(m, c, h, w)`` unless ``decoder`` says otherwise.
        labels: ``(m,)`` class indices, or ``(m, C)`` soft labels.
        classes: class names.
        transform: the data's normalisation or whitening, with its inverse.
        decoder: codes -> images to train on; IPC counts stored codes, :attr:`bytes_images` their storage.
        weights: ``(m,)`` sample weights of a weighted selection, or None.
        indices: ``(m,)`` positions in the training set when the images are real ones, or None.
        step_size: learned learning rate(s) for training on the set, or None.
        meta: who made it: method, its configuration, data set and its hash, seed, commit. Plain JSON values.
    """

    codes: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    transform: Any
    decoder: Any = field(default_factory=Pixels)
    weights: Tensor | None = None
    indices: Tensor | None = None
    step_size: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse parts that are wrong in themselves or do not fit together; every use by others begins with this.

        Raises:
            CompanionError: no tensor, another type, another device than the codes, values that are not finite, other numbers of
                labels, weights or indices than of codes, labels beyond the classes, negative weights.
        """
        check_tensor("codes", self.codes)
        check_tensor("labels", self.labels, floating=None, like=self.codes)
        count, classes = len(self.codes), len(self.classes)
        if tuple(self.labels.shape) != ((count, classes) if self.soft else (count,)):
            raise CompanionError(
                f"labels are {tuple(self.labels.shape)} for {count} codes and {classes} classes; "
                f"allowed: ({count},) class indices or ({count}, {classes})"
            )
        if not self.soft:
            check_labels("labels", self.labels, classes)
        for name, floating in (("weights", True), ("indices", False)):
            if (value := getattr(self, name)) is not None:
                check_tensor(name, value, floating=floating, like=self.codes)
                if tuple(value.shape) != (count,):
                    raise CompanionError(
                        f"{name} are {tuple(value.shape)} for {count} codes; allowed: ({count},)"
                    )
        if self.weights is not None and bool((self.weights < 0).any()):
            raise CompanionError(f"weights must not be negative; the least is {float(self.weights.min()):g}")
        if self.step_size is not None:
            check_tensor("step_size", self.step_size)

    # -- as torch's data sets: the images to train on, with their labels ------------------------------------------------

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        """Image and label at a position, or images and labels of a slice; normalised."""
        return self.images[index], self.targets[index]

    def as_dataset(self) -> TensorDataset:
        """The set for a ``DataLoader``: pairs (image, label), decoded and normalised; triples where it has sample weights."""
        weights = [] if self.weights is None else [self.image_weights]
        return TensorDataset(*(tensor.detach() for tensor in (self.images, self.targets, *weights)))

    def __repr__(self) -> str:
        made = " on ".join(str(self.meta[key]) for key in ("method", "dataset") if key in self.meta)
        shape = "x".join(map(str, self.images.shape[1:]))
        stored = "" if len(self.codes) == len(self) else f" from {len(self.codes)} stored"
        return (
            f"SyntheticSet({made}{': ' if made else ''}{len(self)} images {shape}{stored}, {len(self.classes)} classes, "
            f"{'soft' if self.soft else 'hard'} labels, {self.bytes_images + self.bytes_labels:,} bytes)"
        )

    def show(self, per_class: int = 8) -> Image.Image:
        """What is trained on, one row per class, as a picture (JupyterLab displays it; ``.save`` writes it)."""
        every = len(self.classes)
        return sheet(self.viewable(), rows_of(self.hard_labels, every, per_class, every))

    def _repr_html_(self) -> str:
        return card(repr(self), sheet(self.viewable(), rows_of(self.hard_labels, len(self.classes))))

    # -- what others ask ---------------------------------------------------------------------------------------------

    @property
    def images(self) -> Tensor:
        """The images to train on, ``(decoded m, c, h, w)``, normalised."""
        return self.decoder(self.codes)

    @property
    def targets(self) -> Tensor:
        """Labels of :attr:`images`."""
        return self.decoder.labels(self.labels)

    @property
    def image_weights(self) -> Tensor | None:
        """Weights of :attr:`images`."""
        return None if self.weights is None else self.decoder.labels(self.weights)

    @property
    def soft(self) -> bool:
        return self.labels.is_floating_point()

    @property
    def ipc(self) -> float:
        """Stored codes per class."""
        return len(self.codes) / len(self.classes)

    @property
    def hard_labels(self) -> Tensor:
        return self.targets.argmax(1) if self.soft else self.targets

    @property
    def bytes_images(self) -> int:
        """Bytes of what is stored for the images, as saved: the codes, and numbers of the decoder that were learned."""
        return self.bytes_codes + self.decoder.extra_bytes

    @property
    def bytes_codes(self) -> int:
        """Bytes of the codes alone: :attr:`bytes_images` without a decoder (a generator, say) that several sets may share."""
        return self.codes.numel() * self.codes.element_size()

    @property
    def bytes_labels(self) -> int:
        """Bytes of the labels: a class index needs the whole bytes that hold C values, a soft label C floats."""
        if self.soft:
            return self.labels.numel() * self.labels.element_size()
        return len(self.labels) * max(1, math.ceil(math.log2(len(self.classes)) / 8))

    def viewable(self) -> Tensor:
        """The images in [0, 1]: normalisation or whitening undone, clipped."""
        return self.transform.inverse(self.images.detach()).clamp(0, 1)

    def stored(self) -> tuple[Tensor, Tensor]:
        """What is stored, to be looked at, in [0, 1], and its hard labels; the decoded images where codes are no images of
        that size (a latent code, say)."""
        if self.codes.shape[1:] != self.decoder(self.codes[:1]).shape[1:]:
            return self.viewable(), self.hard_labels
        images = self.transform.inverse(self.codes.detach()).clamp(0, 1)
        return images, self.labels.argmax(1) if self.soft else self.labels

    def to(self, device: torch.device | str) -> SyntheticSet:
        moved = {
            name: value.to(device)
            for name in ("codes", "labels", "weights", "indices", "step_size")
            if (value := getattr(self, name)) is not None
        }
        numbers = {name: tensor.to(device) for name, tensor in _parts(self.decoder)[1].items()}
        decoder = dataclasses.replace(self.decoder, **numbers) if numbers else self.decoder
        return dataclasses.replace(self, **moved, decoder=decoder, transform=self.transform.to(device))

    # -- keeping ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, detached, on the CPU."""
        named = {name: getattr(self, name) for name in ("codes", "labels", "weights", "indices", "step_size")}
        named |= {f"transform.{name}": tensor for name, tensor in self.transform.tensors().items()}
        named |= {f"decoder.{name}": tensor for name, tensor in _parts(self.decoder)[1].items()}
        return {
            name: tensor.detach().cpu().contiguous() for name, tensor in named.items() if tensor is not None
        }

    def header(self) -> dict[str, str]:
        """Everything that is not a tensor, as the strings of a safetensors header."""
        about = {
            "classes": list(self.classes),
            "transform": self.transform.config(),
            "decoder": _parts(self.decoder)[0],
            "value_range": "normalised"
            if "zca" not in self.transform.config().get("kind", "")
            else "whitened",
            "meta": self.meta,
        }
        from lib.synset.export import as_plain

        return {"format": FORMAT, "about": json.dumps(about, sort_keys=True, default=as_plain)}

    def save(self, path: Path | str) -> Path:
        """Write the exact tensors and all metadata to one safetensors file, atomically; errors as :meth:`check`."""
        self.check()
        write_tensors(path, self.tensors(), self.header())
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> SyntheticSet:
        """Read what :meth:`save` wrote.

        Raises:
            CompanionError: the file is missing, damaged, or not a synthetic set of ours.
        """
        header, tensors = read_safetensors(path)
        return cls.from_parts(header, tensors, path)

    @classmethod
    def from_parts(
        cls, header: dict[str, str], tensors: dict[str, Tensor], path: Path | str = "memory"
    ) -> SyntheticSet:
        """The inverse of :meth:`header` and :meth:`tensors`."""
        if header.get("format") != FORMAT:
            found = header.get("format", "no format mark")
            raise CompanionError(
                f"{path} is not a synthetic set: its header says {found!r}; allowed: {FORMAT!r}"
            )
        try:
            about = json.loads(header["about"])
            stored = dict(about["decoder"])
            parts: dict[str, dict[str, Tensor]] = {"": {}, "transform": {}, "decoder": {}}
            for name, value in tensors.items():
                owner, _, own = name.rpartition(".")
                parts[owner][own] = value
            decoder = choose("decoder", stored.pop("name"), DECODERS)(**stored, **parts["decoder"])
            transform = from_saved(about["transform"], parts["transform"])
            return cls(
                classes=tuple(about["classes"]),
                transform=transform,
                decoder=decoder,
                meta=about["meta"],
                **parts[""],
            )
        except CompanionError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CompanionError(
                f"{path} is damaged: its header or tensors are incomplete ({error})"
            ) from error

    def export(self, folder: Path | str, allow_empty: bool = False) -> Path:
        """Write the set so that others open it without us: ``train/<class>/<id>.png`` (hard labels), ``train.parquet``
        (soft labels and weights; readable by Hugging Face ``datasets``), the same as tables, the exact set, and a data card
        ``README.md`` with the preprocessing and the 8-bit loss.

        Args:
            allow_empty: a class without an image gets an empty folder; torchvision's ``ImageFolder`` must be told so, too.
        Raises:
            CompanionError: the folder exists and is not empty, or cannot be written; a class without an image; as :meth:`check`.
        """
        self.check()
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CompanionError(f"cannot export to {folder}: it is not an empty folder")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                from lib.synset.export import write

                write(self, Path(temporary) / "set", allow_empty)
                os.rename(Path(temporary) / "set", folder)  # over an empty folder, too, and over no other
        except OSError as error:
            raise CompanionError(f"cannot export to {folder}: {error.strerror or error}") from error
        return folder


def _parts(decoder: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a decoder: plain values, and tensors."""
    values = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return {name: value for name, value in values.items() if name not in tensors}, tensors


def class_major(classes: int, ipc: int, device: torch.device | str) -> Tensor:
    """Hard labels ``0, ..., 0, 1, ..., 1, ...``: the order in which methods keep their images."""
    return torch.arange(classes, device=device).repeat_interleave(ipc)


def check_ipc(ipc: int, smallest_class: int | None = None) -> int:
    """``ipc`` if it is a whole number from 1 to the smallest class, else the one-line error."""
    number = integer(ipc)
    if number is None or number < 1:
        raise CompanionError(
            f"ipc {ipc!r} is not allowed: images per class must be a whole number of at least 1"
        )
    if smallest_class == 0:
        raise CompanionError(f"ipc {ipc} is not allowed: one of the classes has no image")
    if smallest_class is not None and number > smallest_class:
        raise CompanionError(f"ipc {ipc} is larger than the smallest class: allowed 1 to {smallest_class}")
    return number
