r"""Training as a function of its images: plain gradient steps, and the way back through them.

$$\theta_{n+1}=\theta_n-\eta_n g_n,\qquad g_n=\nabla_\theta\,\ell(\theta_n;\,x_n,y_n),\qquad n=0..N-1 .$$

What comes in from behind is $u=\partial\mathcal L/\partial\theta_N$, whatever $\mathcal L$ is (DD: cross-entropy of real images;
MTT: the distance to an expert). What comes out are the cotangents of every step's images *as used* and of its rate; the caller takes
them through its augmentation or renderer in one backward pass. Three ways (``mode``):

``bptt``       automatic differentiation through all steps; keeps N graphs.
``recompute``  the reverse sweep: for n = N-1 .. 0 build the graph of one step again and pull $-\eta_n u$ through $g_n$, which
               gives the images' cotangent and what is added to u; $\partial\mathcal L/\partial\eta_n=-\langle g_n,u\rangle$.
               Exact, with the memory of one step, or of a part of its images where these are large.
``tesla``      the same sweep with u held fixed (TESLA, arXiv 2211.10586): later gradients no longer depend on earlier images. Exact
               for N = 1 and to first order in the rate.

K networks are trained side by side; the cotangents of images and rates that they share are sums over networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.nets.flat import logits
from lib.nets.training import batch_loss, rows_at_once
from lib.system.errors import CompanionError, choose


@dataclass(frozen=True)
class Step:
    """One step of gradient descent.

    Attributes:
        images: ``(n, c, h, w)``, or ``(K, n, c, h, w)`` for images of their own; labels: ``(n,)`` classes or ``(n, C)``
            probabilities (with a leading K where the images have one).
        rate: the learning rate, a tensor of one number.
    """

    images: Tensor
    labels: Tensor
    rate: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels with the axis of the networks, detached."""
        if self.images.dim() == 5:
            return self.images.detach(), self.labels
        return self.images.detach().unsqueeze(0), self.labels.unsqueeze(0)


@dataclass(frozen=True)
class Walk:
    """Networks after their steps.

    Attributes:
        end: $\\theta_N$, ``(K, P)``, detached; losses: of every step before its update, ``(N, K)``.
        pull: u ``(K, P)`` -> cotangents of the images of every step, shaped as they are, and of the rates ``(N,)``. To be called
            once.
    """

    end: Tensor
    losses: Tensor
    pull: Callable[[Tensor], tuple[list[Tensor], Tensor]]


def walk(template: nn.Module, theta: Tensor, steps: Sequence[Step], mode: str = "bptt") -> Walk:
    """Take the steps from ``theta`` ``(K, P)``; modes as above. Without a step the end is the start."""
    way = choose("mode of unrolling", mode, MODES)
    for n, step in enumerate(steps):
        if step.rate.numel() != 1:
            raise CompanionError(f"step {n} of {len(steps)} has {step.rate.numel()} rates: one is needed")
    if not steps:
        return Walk(theta.detach(), theta.new_zeros(0, len(theta)), lambda u: ([], u.new_zeros(0)))
    return way(template, theta, steps)


def gradient(
    template: nn.Module, theta: Tensor, x: Tensor, y: Tensor, graph: bool = False
) -> tuple[Tensor, Tensor]:
    r"""$\ell(\theta_k;x,y)$, ``(K,)``, mean cross-entropy, and its gradient by theta, ``(K, P)``."""
    losses = batch_loss(logits(template, theta, x), y)
    (g,) = torch.autograd.grad(losses.sum(), theta, create_graph=graph)
    return losses.detach(), g


def parts(
    template: nn.Module, x: Tensor, y: Tensor, networks: int
) -> list[tuple[Tensor, Tensor, float]]:
    """A batch ``(K or 1, n, ...)`` in parts, each with its share of the mean over n: the gradient is linear in the images'
    losses, as no network here mixes images, so the graph of one part at a time suffices. One part on a GPU, and where maps are small."""
    n, rows = x.shape[1], rows_at_once(template, x[0], networks)
    return [(a, b, a.shape[1] / n) for a, b in zip(x.split(rows, 1), y.split(rows, 1), strict=True)]


def _bptt(template: nn.Module, theta: Tensor, steps: Sequence[Step]) -> Walk:
    images = [step.batch[0].requires_grad_() for step in steps]
    rates = [step.rate.detach().clone().requires_grad_() for step in steps]
    theta, losses = theta.detach().requires_grad_(), []
    for step, x, eta in zip(steps, images, rates, strict=True):
        loss, g = gradient(template, theta, x, step.batch[1], graph=True)
        theta = theta - eta * g
        losses.append(loss)

    def pull(u: Tensor) -> tuple[list[Tensor], Tensor]:
        found = torch.autograd.grad(theta, [*images, *rates], u, materialize_grads=True)
        return _shaped(found[: len(steps)], steps), torch.stack(found[len(steps) :]).flatten()

    return Walk(theta.detach(), torch.stack(losses), pull)


def _sweep(template: nn.Module, theta: Tensor, steps: Sequence[Step], exact: bool) -> Walk:
    thetas, losses = [theta.detach()], []
    for step in steps:
        begin, seen, move = thetas[-1].requires_grad_(), 0, 0
        for x, y, share in parts(template, *step.batch, len(theta)):
            loss, g = gradient(template, begin, x, y)
            seen, move = seen + share * loss, move + share * g
        thetas.append((begin - step.rate * move).detach())
        losses.append(seen)

    def pull(u: Tensor) -> tuple[list[Tensor], Tensor]:
        images, rates = [], []
        for step, theta_n in zip(reversed(steps), reversed(thetas[:-1]), strict=True):
            eta, pieces, rate, back = step.rate.detach(), [], 0, 0
            for x, y, share in parts(template, *step.batch, len(theta)):
                x.requires_grad_()
                _, g = gradient(template, theta_n, x, y, graph=True)
                rate = rate - share * (g.detach() * u).sum()
                wanted = (x, theta_n) if exact else (x,)
                dx, *dtheta = torch.autograd.grad(g, wanted, -eta * share * u, materialize_grads=True)
                pieces.append(dx)
                back = back + dtheta[0] if exact else back
            images.append(torch.cat(pieces, 1))
            rates.append(rate)
            u = u + back
        return _shaped(images[::-1], steps), torch.stack(rates[::-1])

    return Walk(thetas[-1], torch.stack(losses), pull)


def _recompute(template: nn.Module, theta: Tensor, steps: Sequence[Step]) -> Walk:
    return _sweep(template, theta, steps, exact=True)


def _tesla(template: nn.Module, theta: Tensor, steps: Sequence[Step]) -> Walk:
    return _sweep(template, theta, steps, exact=False)


def _shaped(cotangents: Sequence[Tensor], steps: Sequence[Step]) -> list[Tensor]:
    return [dx.view(step.images.shape) for dx, step in zip(cotangents, steps, strict=True)]


MODES = {"bptt": _bptt, "recompute": _recompute, "tesla": _tesla}
