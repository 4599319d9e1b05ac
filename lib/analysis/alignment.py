"""Do the gradients on S keep pointing where those on T point, while a network is trained on S?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match.gradient import class_gradients
from lib.nets.ensemble import Ensemble
from lib.nets.training import sgd_steps
from lib.synset import SyntheticSet


def gradient_alignment(
    synset: SyntheticSet,
    train,
    network: str,
    epochs: Sequence[int],
    generator: torch.Generator,
    lr: float = 0.01,
) -> Tensor:
    """Mean cosine between the class gradients on S and on T, over rows (output channels), layers and classes.

    Args:
        synset: hard labels, class-major, as many images of every class.
        train: the real data; 64 images per class (fewer where a class has fewer) give its gradients.
        epochs: ascending numbers of epochs of SGD on S after which to look.
    Returns:
        one value in [-1, 1] per entry of ``epochs``.
    """
    networks = Ensemble.make(network, train, [generator])
    real = train.sample(min(64, train.smallest_class), generator)
    syn = synset.images.unflatten(0, (train.num_classes, -1))
    classes = torch.arange(train.num_classes, device=real.device)
    found, done = [], 0
    for until in epochs:
        images, labels = synset.images.unsqueeze(0), synset.labels.unsqueeze(0)
        sgd_steps(networks, images, labels, [generator], epochs=until - done, lr=lr)
        done = until
        tensors = networks.parameters | networks.buffers
        ours, theirs = (class_gradients(networks.template, tensors, x, classes) for x in (syn, real))
        rows = [
            F.cosine_similarity(a.flatten(2), b.flatten(2), dim=2).mean()
            for a, b in zip(ours, theirs, strict=True)
            if a.dim() > 2
        ]
        found.append(torch.stack(rows).mean())
    return torch.stack(found)
