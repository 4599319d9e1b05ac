r"""What tells classes apart in gradients: how well S agrees with T in it, and how fast a network's kernel moves.

With $g_c$ the gradient of class c (its mean cross-entropy, all weights as one vector) and $\bar g$ the mean over classes, the
*class-difference gradient* is $g_c-\bar g$. What all classes share is in $\bar g$ alone (DCC, arXiv 2202.02916).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match.gradient import class_gradients
from lib.nets.ensemble import Ensemble, apply
from lib.nets.training import sgd_steps


def gradient_vectors(networks: Ensemble, images: Tensor) -> Tensor:
    """Gradients of every class in one network as vectors, ``(C, n, c, h, w) -> (C, P)``; biases and norms left out."""
    labels = torch.arange(len(images), device=images.device)
    found = class_gradients(networks.template, networks.parameters | networks.buffers, images, labels)
    return torch.cat([g.flatten(1) for g in found if g.dim() > 2], 1)


def class_shares(syn: Tensor, real: Tensor) -> Tensor:
    r"""$|\langle g^S_a,g^T_b\rangle|/\sum_{b'}|\langle g^S_a,g^T_{b'}\rangle|$, ``(C, C)``: rows sum to 1.

    A set whose class-a gradient is about class a has its weight on the diagonal; 1 / C everywhere says nothing of classes.
    """
    products = (syn @ real.T).abs()
    return products / products.sum(1, keepdim=True)


def agreement(syn: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Cosines between gradient vectors ``(C, P)`` of S and T, in [-1, 1]: ``class`` (mean over classes), ``mean`` (of the means
    over classes) and ``difference`` (mean over classes, each without the mean); ``own`` is the mean share of the own class."""
    mean_syn, mean_real = syn.mean(0, keepdim=True), real.mean(0, keepdim=True)
    return {
        "class": F.cosine_similarity(syn, real).mean(),
        "mean": F.cosine_similarity(mean_syn, mean_real)[0],
        "difference": F.cosine_similarity(syn - mean_syn, real - mean_real).mean(),
        "own": class_shares(syn, real).diagonal().mean(),
    }


def agreement_in_training(
    synset, train, network: str, epochs: Sequence[int], generator: torch.Generator, lr: float = 0.01
) -> dict[str, Tensor]:
    """:func:`agreement` after so many epochs of SGD on S, from a fresh network; one value per entry of ``epochs``, ascending.

    At most 64 real images per class give the gradients of T.
    """
    networks = Ensemble.make(network, train, [generator])
    real = train.sample(min(64, train.smallest_class), generator)
    syn = synset.images.unflatten(0, (train.num_classes, -1))
    images, labels = synset.images.unsqueeze(0), synset.targets.unsqueeze(0)
    found = [
        agreement(gradient_vectors(networks, syn), gradient_vectors(networks, real))
        for _ in marks(networks, images, labels, epochs, generator, lr)
    ]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def marks(
    networks: Ensemble,
    images: Tensor,
    labels: Tensor,
    epochs: Sequence[int],
    generator: torch.Generator,
    lr: float,
) -> Iterator[int]:
    """Train by plain SGD, in place, and stop at each of these epochs (ascending) to let somebody look."""
    done = 0
    for until in epochs:
        sgd_steps(networks, images, labels, [generator], epochs=until - done, lr=lr)
        done = until
        yield until


def tangent_kernel(networks: Ensemble, images: Tensor) -> Tensor:
    r"""The empirical neural tangent kernel of one network, $\sum_k\langle\nabla_\theta f_k(x_i),\nabla_\theta f_k(x_j)\rangle$,
    ``(n, n)`` for ``(n, c, h, w)``. One copy of the weights per image makes it C backward passes, not n C."""
    names = [name for name, _ in networks.template.named_parameters()]
    tensors = networks.parameters | networks.buffers
    copies = {
        name: tensor.detach().expand(len(images), *tensor.shape[1:]).clone()
        for name, tensor in tensors.items()
    }
    weights = [copies[name].requires_grad_() for name in names]
    logits = apply(networks.template, copies, images.unsqueeze(1))[:, 0]  # (n, classes)
    kernel = images.new_zeros(len(images), len(images))
    for k in range(logits.shape[1]):
        gradients = torch.autograd.grad(
            logits[:, k].sum(), weights, retain_graph=True, materialize_grads=True
        )
        rows = torch.cat([g.flatten(1) for g in gradients], 1)
        kernel += rows @ rows.T
    return kernel


def kernel_velocity(
    images: Tensor,
    labels: Tensor,
    like,
    network: str,
    probe: Tensor,
    epochs: Sequence[int],
    generator: torch.Generator,
    lr: float = 0.01,
) -> Tensor:
    r"""$(1-\cos(K_t,K_{t+\delta}))/\delta$ of the tangent kernel K on ``probe`` while a network trains on images, per epoch.

    Args:
        images: ``(m, c, h, w)`` with ``labels`` ``(m,)``, learned by plain SGD; like: the data set whose network it is.
        epochs: ascending; one value for every two neighbours, all at least 0.
    """
    networks = Ensemble.make(network, like, [generator])
    stops = marks(networks, images[None], labels[None], epochs, generator, lr)
    kernels = [tangent_kernel(networks, probe).flatten() for _ in stops]
    pairs = zip(kernels[:-1], kernels[1:], epochs[:-1], epochs[1:], strict=True)
    return torch.stack(
        [(1 - F.cosine_similarity(a, b, dim=0)).clamp(min=0) / (t - s) for a, b, s, t in pairs]
    )
