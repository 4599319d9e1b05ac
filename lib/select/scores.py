r"""One number per image, from the proxy network's outputs; and the choice of the best ones.

Every function takes logits ``(n, C)`` and returns ``(n,)``. Uncertainty (confidence, entropy, margin) picks the *smallest*
values; error norms, forgetting and CAL the *largest*.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib.kernels.ridge import lead
from lib.select.greedy import check_budget
from lib.select.last_layer import LastLayer
from lib.system.errors import CompanionError, unknown
from lib.system.tensors import guard

VARIANTS = ("paper", "deepcore")


def confidence(logits: Tensor, variant: str = "paper") -> Tensor:
    """Least confidence (Coleman et al. 2020): the largest probability; ``deepcore`` takes the largest *logit*, as shipped."""
    _check_variant(variant)
    return (logits.softmax(1) if variant == "paper" else logits).amax(1)


def negative_entropy(logits: Tensor) -> Tensor:
    r"""$\sum_c p_c\log(p_c+10^{-6})$."""
    p = logits.softmax(1)
    return (p * (p + 1e-6).log()).sum(1)


def margin(logits: Tensor) -> Tensor:
    r"""$p_{(1)}-p_{(2)}$, the lead of the most probable class."""
    return lead(logits.softmax(1))


def el2n(last: LastLayer) -> Tensor:
    r"""$\lVert p-y\rVert_2$ (Paul et al. 2021), to be averaged over proxy runs."""
    return last.errors.norm(dim=1)


def grand(last: LastLayer) -> Tensor:
    r"""GraNd on the last layer (Paul et al. 2021): $\lVert g_i\rVert_2$, to be averaged over proxy runs."""
    return last.norms()


def forgetting(correct: Tensor, variant: str = "paper") -> Tensor:
    """How often an image went from right to wrong between presentations, ``correct`` (presentations, n) bool -> (n,).

    An image that was never right counts as forgotten at every presentation (Toneva et al. 2019: maximal); ``deepcore`` leaves
    it at 0.
    """
    _check_variant(variant)
    events = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), events, len(correct)) if variant == "paper" else events


def neighbours(features: Tensor, count: int) -> Tensor:
    """The nearest other points by Euclidean distance, nearest first: ``(n, d)`` -> ``(n, count)``."""
    if count:
        check_budget(count, len(features) - 1)
    found = []
    for rows in torch.arange(len(features), device=features.device).split(1024):
        distance = torch.cdist(features[rows], features)
        distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        found.append(distance.topk(count, largest=False).indices)
    return torch.cat(found)


def cal(logits: Tensor, nearest: Tensor) -> Tensor:
    r"""CAL (Margatina et al. 2021): $\frac1m\sum_j\frac12[\mathrm{KL}(p_i\Vert p_j)+\mathrm{KL}(p_j\Vert p_i)]$.

    The sum runs over the neighbours ``nearest`` (n, m), see :func:`neighbours`.
    The paper picks the largest values; DeepCore as shipped the smallest.
    """
    log_p = logits.log_softmax(1)
    p, total = log_p.exp(), torch.zeros_like(logits[:, 0])
    for other in nearest.T:
        total += 0.5 * ((p - p[other]) * (log_p - log_p[other])).sum(1)
    return total / max(nearest.shape[1], 1)  # an image without neighbours differs from none


def deepfool(network: nn.Module, images: Tensor, iterations: int = 50, rows: int = 256) -> Tensor:
    r"""Squared length of DeepFool's perturbation (Ducoffe & Precioso 2018), ``(n, c, h, w)`` -> ``(n,)``; small is uncertain.

    With $w_k=\nabla_xf_k-\nabla_xf_{\hat c}$ and $l_k=|f_k-f_{\hat c}|/\lVert w_k\rVert$ for the classes k other than the
    predicted $\hat c$, every image moves by $l_{\hat k}w_{\hat k}/\lVert w_{\hat k}\rVert$, $\hat k=\arg\min l_k$, until its
    prediction changes. No overshoot.

    Args:
        network: in eval mode; iterations: at most so many steps; rows: images in one pass.
    """
    return torch.cat([_deepfool(network, part, iterations) for part in images.split(rows)])


def _deepfool(network: nn.Module, images: Tensor, iterations: int) -> Tensor:
    moved, active = images.clone(), torch.arange(len(images), device=images.device)
    with torch.no_grad():
        predicted = network(images).argmax(1)
    for _ in range(iterations):
        x = moved[active].requires_grad_()
        logits, own = network(x), predicted[active, None]
        changed = logits.argmax(1) != own[:, 0]
        if changed.all():
            break
        every_class = torch.eye(logits.shape[1], device=x.device).to(x)[:, None].expand(-1, len(x), -1)
        (slopes,) = torch.autograd.grad(logits, x, every_class, is_grads_batched=True)  # (C, n, c, h, w)
        slopes, each = slopes.transpose(0, 1), torch.arange(len(x), device=x.device)
        w = (slopes - slopes[each, own[:, 0]][:, None]).flatten(2)
        tiny = torch.finfo(w.dtype).tiny
        length = (logits - logits.gather(1, own)).detach().abs() / w.norm(dim=2).clamp_min(tiny)
        nearest = length.scatter(1, own, torch.inf).argmin(1)
        w = w[each, nearest]
        step = (length[each, nearest] / w.norm(dim=1).clamp_min(tiny))[:, None] * w
        moved[active] += step.view_as(x) * ~changed[:, None, None, None]
        active = active[~changed]
    return (moved - images).flatten(1).square().sum(1)


def glister(
    train: LastLayer, budget: int, validation: LastLayer | None = None, eta: float = 0.1, refresh: int = 1
) -> Tensor:
    r"""Glister (Killamsetty et al. 2021): greedy on $\langle g_j,\bar v\rangle$, $\bar v$ the mean validation gradient.

    Returns the picks in order, ``(budget,)``; ties go to the lowest index.

    Args:
        validation: where the validation gradient is taken; by default the training samples themselves.
        eta: learning rate of the simulated step of :func:`glister_direction`.
        refresh: picks between two updates of the direction; 0 for never, as DeepCore does because its call misspells a keyword.
    """
    check_budget(budget, len(train))
    validation = validation or train
    gains, picks = train.project(validation.mean()), []
    taken = torch.zeros(len(train), dtype=torch.bool, device=gains.device)
    for count in range(1, budget + 1):
        pick = gains.masked_fill(taken, -torch.inf).argmax()
        taken[pick] = True
        picks.append(pick)
        if refresh and count % refresh == 0:
            gains = train.project(glister_direction(train[torch.stack(picks)], validation, eta))
    return torch.stack(picks)


def glister_direction(selected: LastLayer, validation: LastLayer, eta: float) -> Tensor:
    r"""Mean validation gradient after one step on the selection from the *initial* outputs, ``(C (1 + d),)``.

    $z'=z-\eta(\bar g^b+\bar g^W h)$ with the selection's mean gradient; embeddings and labels stay.
    """
    step = validation.inputs @ selected.rows_of(selected.mean()).T
    return validation.with_logits(validation.logits - eta * step).mean()


def best(scores: Tensor, budget: int, largest: bool = True) -> Tensor:
    """Positions of the ``budget`` best scores, best first; ties go to the lowest index."""
    check_budget(budget, len(scores))
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise CompanionError(f"{bad} of {len(scores)} scores are not finite: did the proxy training diverge?")
    return scores.argsort(descending=largest, stable=True)[:budget]


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)


guard(globals(), finite=True)
