"""AdaBelief (Zhuang et al., NeurIPS 2020), the optimiser of RFAD and RCIG."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class AdaBelief(torch.optim.Optimizer):
    """Adam with the variance of the gradient around its running mean instead of its second moment.

    m <- b1 m + (1 - b1) g,  s <- b2 s + (1 - b2) (g - m)^2 + eps,
    theta <- theta - lr / (1 - b1^t) m / (sqrt(s / (1 - b2^t)) + eps)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                state = self.state[theta]
                if not state:
                    state.update(step=0, m=torch.zeros_like(theta), s=torch.zeros_like(theta))
                state["step"] += 1
                m, s, t = state["m"], state["s"], state["step"]
                m.lerp_(theta.grad, 1 - b1)
                s.mul_(b2).add_((theta.grad - m).square(), alpha=1 - b2).add_(eps)
                theta.addcdiv_(m, (s / (1 - b2**t)).sqrt() + eps, value=-group["lr"] / (1 - b1**t))
