r"""How the images of a set lie to each other: diversity within a class, distance between classes (our reconstruction of DCGM's terms,
arXiv 2309.07698).

$$\mathcal R_{intra}=\frac1{C'}\sum_{c:\,n_c\ge2}\frac1{n_c(n_c-1)}\sum_{i\ne j}\max\big(0,\ u_{c,i}^\top u_{c,j}-m\big),\qquad
\mathcal R_{inter}=\frac1{C(C-1)}\sum_{c\ne c'}\max\big(0,\ v_c^\top v_{c'}-m\big)$$

with directions $u_{c,i}$ of $f_{c,i}-\mu$ and $v_c$ of their class mean. $\mu$ is the mean of the real features: features behind a ReLU
all have a cosine near 0.9, which would saturate the terms. Both lie in [0, 1] at m = 0 and do not change with the scale of the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.match.distance import At, Distance, check_weight
from lib.synset import class_major


def intra(f: Tensor, y: Tensor, mu: Tensor | float = 0.0, margin: float = 0.0) -> Tensor:
    r"""$\mathcal R_{intra}$ of features ``(N, d)`` with classes ``(N,)``; 0 where no class has two images."""
    u = F.normalize(f - mu, dim=1)
    counts = torch.bincount(y)
    pairs = (y[:, None] == y) & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    share = pairs.to(f.dtype) / (counts * (counts - 1)).clamp(min=1)[y, None]  # of each pair within its class
    return ((u @ u.T - margin).relu() * share).sum() / (counts > 1).sum().clamp(min=1)


def inter(f: Tensor, y: Tensor, mu: Tensor | float = 0.0, margin: float = 0.0) -> Tensor:
    r"""$\mathcal R_{inter}$ of features ``(N, d)`` with classes ``(N,)``; 0 for one class."""
    member = F.one_hot(y).to(f.dtype)
    member = member[:, member.sum(0) > 0]  # (N, C)
    v = F.normalize(member.T @ (f - mu) / member.sum(0)[:, None], dim=1)
    C = len(v)
    return (v @ v.T - margin).relu().triu(1).sum() * 2 / max(C * (C - 1), 1)


@dataclass(frozen=True)
class _Relation(Distance):
    """A term of the synthetic images alone, around the mean of the real ones; every class bears an equal part of it."""

    weight: float = 1.0
    margin: float = 0.0

    def __post_init__(self):
        check_weight(self)

    def shared(self, relation, real: Tensor, syn: Tensor) -> Tensor:
        y = class_major(*syn.shape[:2], syn.device)
        mu = real.mean((0, 1)).detach()
        return self.weight * relation(syn.flatten(0, 1), y, mu, self.margin).expand(len(syn)) / len(syn)


@dataclass(frozen=True)
class Intra(_Relation):
    r"""$w\,\mathcal R_{intra}$, to be added to another distance, as ``ClassMean() + Intra()``; term ``intra``.

    Attributes:
        weight: w, 0 or more; margin: cosines up to this count for nothing.
    """

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        return {"intra": self.shared(intra, real["embedding"], syn["embedding"])}


@dataclass(frozen=True)
class Inter(_Relation):
    r"""$w\,\mathcal R_{inter}$; term ``inter``.

    Attributes:
        weight: w, 0 or more; margin: cosines up to this count for nothing.
    """

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        return {"inter": self.shared(inter, real["embedding"], syn["embedding"])}
