"""LAMB (You et al., ICLR 2020), the optimiser of FRePo's images and labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lib.optim.per_tensor import PerTensor


class Lamb(PerTensor):
    """Adam whose step, for every tensor as a whole, has the length lr |theta|.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),
    theta <- theta - lr |theta| / |u| u      (|theta| / |u| = 1 where either is 0; no weight decay)
    """

    statistics = ("m", "v")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def move(self, theta: Tensor, m: Tensor, v: Tensor, t: int, group: dict) -> None:
        (b1, b2), eps = group["betas"], group["eps"]
        m.lerp_(theta.grad, 1 - b1)
        v.lerp_(theta.grad.square(), 1 - b2)
        update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        length, step = theta.norm(), update.norm()
        trust = torch.where((length > 0) & (step > 0), length / step, 1.0)
        theta.sub_(update * (group["lr"] * trust))
