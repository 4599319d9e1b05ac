"""Whether a synthetic set and real data belong together: a set is judged in the space in which it was made, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # statistics of the same images, summed on another machine


def check_alike(sets: Iterable[SyntheticSet], test) -> None:
    """Refuse sets of other classes, of images of another shape, or normalised or whitened otherwise than the test images.

    Raises:
        CompanionError: for the first such set, in one line that names both sides; for a set or data whose tensors are wrong in themselves.
    """
    test.check()
    if not len(test):
        raise CompanionError(f"the data {test.name!r} have no test images")
    for synset in sets:
        synset.check()
        if not len(synset.labels):
            raise CompanionError("the set has no images")
        if tuple(synset.classes) != tuple(test.classes):
            raise CompanionError(
                f"the set has the classes {_few(synset.classes)}, the data {test.name!r} has {_few(test.classes)}: other data"
            )
        shape = tuple(synset.images.shape[1:])
        if shape != test.shape:
            raise CompanionError(
                f"the set has images of {_size(shape)}, the data {test.name!r} of {_size(test.shape)}"
            )
        if not same_space(synset.transform, test.transform):
            ours, theirs = (transform.config()["kind"] for transform in (synset.transform, test.transform))
            hint = (
                f"whiten={ours!r}" if ours != theirs and ours != "standardise" else "the data it was made of"
            )
            raise CompanionError(
                f"the set lives in the space of its own {ours!r} transform, the data {test.name!r} in another ({theirs!r}): "
                f"load them with {hint}"
            )


def same_space(one, other) -> bool:
    """Whether two transforms are the same up to rounding."""
    if one.config() != other.config():
        return False
    ours, theirs = one.tensors(), other.tensors()
    return all(ours[k].shape == theirs[k].shape and _close(ours[k], theirs[k]) for k in ours)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other.to(one.device, one.dtype), **TOLERANCE)


def _few(classes) -> str:
    return f"{', '.join(map(str, classes[:3]))}{', ...' if len(classes) > 3 else ''} ({len(classes)})"


def _size(shape) -> str:
    return " x ".join(map(str, shape))
