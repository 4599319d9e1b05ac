r"""Training networks on a small labelled set: the second half of the field's formula, and the inner loop of several methods.

K networks are trained as one :class:`~lib.nets.ensemble.Ensemble`. Each network has its own generator for batch order and
augmentation, so its result does not depend on how many others are trained beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import augment
from lib.nets.ensemble import Ensemble
from lib.system.errors import unknown

EPOCHS_PER_DRAW = (
    32  # random numbers are drawn for this many epochs at a time; part of the stream's definition
)


def sgd_steps(
    networks: Ensemble,
    images: Tensor,
    labels: Tensor,
    generators: Sequence[torch.Generator],
    *,
    epochs: int,
    first: int = 0,
    lr: float | Callable[[float], float] = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    batch: int = 256,
    augmentation: str = "none",
    mode: str = "single",
    cutmix: float = 0.0,
    weights: Tensor | None = None,
    fresh_at: Sequence[int] = (),
    after_epoch: Callable[[int], None] | None = None,
    enough: Callable[[], bool] | None = None,
    optimiser: torch.optim.Optimizer | None = None,
) -> Tensor:
    r"""Minimise $\sum_i w_{ki}\,\ell(f_{\theta_k}(\mathcal A(x_{ki})), y_{ki}) / \sum_i w_{ki}$ for every k by SGD, in place.

    Args:
        images: ``(K, m, c, h, w)``, or ``(1, m, c, h, w)`` when all networks learn the same set.
        labels: ``(K or 1, m)`` class indices, or ``(K or 1, m, C)`` probabilities.
        epochs: passes over the set; first: so many were done earlier, whose random numbers are passed over.
        lr: a number, or a function of the epoch and the part of it that is done, such as 2.5.
        batch: mini-batch size; the last batch of an epoch may be shorter. A set that fits one batch is not shuffled.
        augmentation: DSA strategy: one family per batch, own parameters per image; ``none`` for none.
        mode: how families combine (``lib.augment.Draw``); cutmix: probability of CutMix per batch.
        weights: ``(K or 1, m)`` sample weights, or None for equal ones.
        fresh_at: epochs before which the optimiser is rebuilt, momentum lost (as the published DC code does).
        after_epoch: called with the number of finished epochs.
        enough: asked after every update; training ends where it says so.
        optimiser: one of these networks' parameters (:func:`sgd`) that remembers earlier calls; its momentum and weight decay
            hold.
    Returns:
        mean training loss of the last epoch per network, ``(K,)``, as a tensor on the device.
    """
    networks.train()
    parameters = list(networks.parameters.values())
    optimiser = optimiser or sgd(parameters, momentum, weight_decay, nesterov)
    m, size = images.shape[1], min(batch, images.shape[1])
    chance = _Chance(generators, m, size, augment.strategy(augmentation), mode, cutmix)
    total = torch.zeros(networks.size, device=images.device)
    for epoch in range(first, epochs):
        if epoch in fresh_at:
            optimiser = sgd(parameters, momentum, weight_decay, nesterov)
        total = torch.zeros_like(total)
        for b in range(chance.batches):
            for group in optimiser.param_groups:
                group["lr"] = lr(epoch + b / chance.batches) if callable(lr) else lr
            rows, omega = chance.rows(epoch, b), chance.omega(epoch, b)
            x, y, w = (
                _take(images, rows),
                _take(labels, rows),
                None if weights is None else _take(weights, rows),
            )
            if omega is not None:
                x = x.expand(networks.size, *x.shape[1:])
                x = augment.apply(x.flatten(0, 1), omega).view(x.shape)
            if cutmix:
                loss = _cutmix_loss(networks, x, y, w, *chance.mix(epoch, b))
            else:
                loss = batch_loss(networks(x), y, w)
            update(optimiser, parameters, loss.sum())
            total += loss.detach() * (x.shape[1] / m)
            if done := enough is not None and enough():
                break
        if done:
            break
        if after_epoch is not None:
            after_epoch(epoch + 1)
    for parameter in parameters:
        parameter.grad = None
    return total


def update(optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], loss: Tensor) -> None:
    """One step of a fused optimiser down the gradient of a loss."""
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # Fused optimisers read gradients as if they lay in memory like their parameters; the classifier's does not.
        parameter.grad = gradient.contiguous()
    optimiser.step()


def batch_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of ``(K, n, C)`` logits with class indices or probabilities, (weighted) mean over n: ``(K,)``."""
    networks, n = logits.shape[:2]
    soft = labels.dim() == 3
    target = labels.expand(networks, *labels.shape[1:]).flatten(0, 1)
    losses = F.cross_entropy(
        logits.flatten(0, 1), target.to(logits.dtype) if soft else target, reduction="none"
    )
    losses = losses.view(networks, n)
    if weights is None:
        return losses.mean(1)
    return (losses * weights).sum(1) / weights.sum(1)


def halving_schedule(lr: float, epochs: int, factor: float = 0.1) -> tuple[Callable[[float], float], int]:
    """The published DC schedule over epochs 0..E: the rate falls to a tenth after epoch E // 2 + 1, with a new optimiser.

    Returns:
        the rate as a function of the epoch, and the epoch before which the optimiser is rebuilt.
    """
    drop = epochs // 2 + 2
    return (lambda epoch: lr if epoch < drop else lr * factor), drop


def cosine_schedule(lr: float, epochs: int, lowest: float = 0.0) -> Callable[[float], float]:
    """Cosine decay from ``lr`` to ``lowest`` over the epochs."""
    return lambda epoch: lowest + 0.5 * (lr - lowest) * (1 + math.cos(math.pi * epoch / epochs))


@torch.no_grad()
def predict(networks: Ensemble, images: Tensor, rows: int | None = None) -> Tensor:
    """Logits ``(K, N, C)`` of all networks on ``images`` ``(N, c, h, w)``, in eval mode, ``rows`` images at a time."""
    return torch.cat([networks(part) for part in _chunks(networks, images, rows)], 1)


@torch.no_grad()
def predict_embeddings(networks: Ensemble, images: Tensor, rows: int | None = None) -> Tensor:
    """Embeddings ``(K, N, d)``, as :func:`predict`."""
    return torch.cat([networks.embed(part) for part in _chunks(networks, images, rows)], 1)


def rows_at_once(template: torch.nn.Module, images: Tensor, networks: int = 1) -> int:
    """Images ``(n, c, h, w)`` in one pass without gradients: on a CPU as many as keep a feature map near 8 MiB, which is fast
    with any memory allocator."""
    if images.is_cuda:
        return 4096
    return max(16, 2**21 // (getattr(template, "width", 64) * networks * images[0, 0].numel()))


def _chunks(networks: Ensemble, images: Tensor, rows: int | None):
    networks.train(False)
    return (
        part.unsqueeze(0)
        for part in images.split(rows or rows_at_once(networks.template, images, networks.size))
    )


def sgd(
    parameters: list[Tensor], momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False
) -> torch.optim.SGD:
    """The optimiser of :func:`sgd_steps`, which sets its rate."""
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """``tensor[k, rows[k]]``; all of it when the set is one batch."""
    if rows is None:
        return tensor
    k = torch.arange(len(rows), device=rows.device)[:, None]
    return tensor[k if len(tensor) > 1 else torch.zeros_like(k), rows]


def _cutmix_loss(
    networks: Ensemble, x: Tensor, y: Tensor, w: Tensor | None, partner: Tensor, u: Tensor
) -> Tensor:
    """r CE(y) + (1 - r) CE(y of the partner), where a network's batch is mixed (``u[:, 0] < u[:, 4]``, the probability)."""
    x = x.expand(networks.size, *x.shape[1:])
    mixed, share = augment.cutmix(x, partner, u[:, 1:4])
    on = u[:, 0] < u[:, 4]
    logits = networks(torch.where(on[:, None, None, None, None], mixed, x))
    share = torch.where(on, share, 1.0)
    y = y.expand(networks.size, *y.shape[1:])
    return share * batch_loss(logits, y, w) + (1 - share) * batch_loss(logits, _take(y, partner), w)


class _Chance:
    """Batch orders and augmentation parameters of all networks, network k's from generator k alone."""

    def __init__(
        self, generators: Sequence[torch.Generator], m: int, size: int, names, mode: str, cutmix: float
    ):
        self.generators, self.m, self.size, self.names, self.mode = generators, m, size, names, mode
        self.options, self.cutmix = len(augment.alternatives(names, mode)), cutmix
        self.batches, self.drawn = math.ceil(m / size), -1

    def rows(self, epoch: int, b: int) -> Tensor | None:
        """Positions of the batch, ``(K, n)``; None: the whole set."""
        self._draw(epoch)
        return None if self.batches == 1 else self.order[:, epoch % EPOCHS_PER_DRAW, self._span(b)]

    def omega(self, epoch: int, b: int) -> augment.Draw | None:
        """The augmentation of the batch, network-major, ``K n`` rows."""
        if not self.names:
            return None
        self._draw(epoch)
        at, u = epoch % EPOCHS_PER_DRAW, self.u[:, epoch % EPOCHS_PER_DRAW, self._span(b)]
        choice = self.choice[:, at, b].repeat_interleave(u.shape[1]) if self.options else None
        return augment.Draw(self.names, choice, u.flatten(0, 1), self.mode)

    def mix(self, epoch: int, b: int) -> tuple[Tensor, Tensor]:
        """CutMix partners ``(K, n)``, and per network four uniform numbers and the probability, ``(K, 5)``."""
        self._draw(epoch)
        at = epoch % EPOCHS_PER_DRAW
        chance = torch.full_like(self.mixing[:, at, b, :1], self.cutmix)
        return self.partners[:, at, self._span(b)].argsort(1), torch.cat([self.mixing[:, at, b], chance], 1)

    def _span(self, b: int) -> slice:
        return slice(b * self.size, min(self.m, (b + 1) * self.size))

    def _draw(self, epoch: int) -> None:
        """Draw the numbers of the next :data:`EPOCHS_PER_DRAW` epochs when the first of them begins."""
        while self.drawn < epoch // EPOCHS_PER_DRAW:
            self.drawn += 1
            self._draw_next()

    def _draw_next(self) -> None:
        span = EPOCHS_PER_DRAW
        families = 1 if self.mode == "single" else len(self.names)

        def each(shape: tuple[int, ...]) -> Tensor:
            return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.generators])

        if self.batches > 1:
            self.order = each((span, self.m)).argsort(2)
        if self.options:
            self.choice = (each((span, self.batches)) * self.options).long().clamp_(max=self.options - 1)
        if self.names:
            self.u = each((span, self.m, families, 3))
        if self.cutmix:
            self.mixing, self.partners = each((span, self.batches, 4)), each((span, self.m))


def warm_cosine_schedule(lr: float, epochs: int) -> Callable[[int], float]:
    """GLaD's rate by epoch, h being half of the epochs: up a line from a ten-millionth until epoch h, then from epoch h + 1 on down a
    cosine, whose last epoch stops two steps short of 0."""
    half, least = max(epochs // 2, 1), 1e-7

    def rate(epoch: int) -> float:
        if epoch <= half:
            return lr * (least + (1 - least) * epoch / half)
        return lr * (1 + math.cos(math.pi * (epoch - half - 1) / half)) / 2

    return rate


SCHEDULES = ("constant", "dc", "steps", "cosine", "cosine-steps", "warm-cosine")


def schedule(kind: str, lr: float, epochs: int) -> tuple[Callable[[float], float], tuple[int, ...]]:
    """A named learning-rate schedule: the rate by epoch, and the epochs before which the optimiser is rebuilt.

    ``constant``; ``dc`` (a tenth after half, momentum reset); ``steps`` (a fifth at 2/3 and again at 5/6, IDC); ``cosine``;
    ``warm-cosine`` (up a line for half of the epochs, then down a cosine, GLaD).
    """
    if kind == "constant":
        return (lambda epoch: lr), ()
    if kind == "dc":
        rate, drop = halving_schedule(lr, epochs)
        return rate, (drop,)
    if kind == "steps":
        return (lambda epoch: lr * 0.2 ** ((epoch >= epochs * 2 // 3) + (epoch >= epochs * 5 // 6))), ()
    if kind == "cosine":
        rate = cosine_schedule(lr, epochs)
        return (lambda epoch: rate(int(epoch))), ()
    if kind == "cosine-steps":
        return cosine_schedule(lr, epochs, lr / 1000), ()
    if kind == "warm-cosine":
        rate = warm_cosine_schedule(lr, epochs)
        return (lambda epoch: rate(int(epoch))), ()
    raise unknown("schedule", kind, SCHEDULES)
