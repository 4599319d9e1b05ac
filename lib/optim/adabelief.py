"""AdaBelief (Zhuang et al., NeurIPS 2020), the optimiser of RFAD and RCIG."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lib.optim.per_tensor import PerTensor


class AdaBelief(PerTensor):
    """Adam with the variance of the gradient around its running mean instead of its second moment.

    m <- b1 m + (1 - b1) g,  s <- b2 s + (1 - b2) (g - m)^2 + eps,
    theta <- theta - lr / (1 - b1^t) m / (sqrt(s / (1 - b2^t)) + eps)
    """

    statistics = ("m", "s")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def move(self, theta: Tensor, m: Tensor, s: Tensor, t: int, group: dict) -> None:
        (b1, b2), eps = group["betas"], group["eps"]
        m.lerp_(theta.grad, 1 - b1)
        s.mul_(b2).add_((theta.grad - m).square(), alpha=1 - b2).add_(eps)
        theta.addcdiv_(m, (s / (1 - b2**t)).sqrt() + eps, value=-group["lr"] / (1 - b1**t))
