"""Solutions by dense matrices, for small problems: what the library finds by iterations is compared with them."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.select.last_layer import LastLayer


def quadratic_gap(gradient: Tensor, hessian: Tensor, rho: float) -> Tensor:
    r"""$\max_{\lVert e\rVert=\rho}g^\top e+\frac12e^\top He$ for a dense Hessian.

    Solved by $e=(\mu I-H)^{-1}g$, with $\mu>\lambda_{\max}$ found by bisection so that $\lVert e\rVert=\rho$.
    Needs a gradient that is not orthogonal to the top eigenvectors (the generic case).
    """
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient
    low, high = values[-1], values[-1] + gradient.norm() / rho  # there the norm is at most rho
    for _ in range(200):
        middle = 0.5 * (low + high)
        if (g / (middle - values)).norm() > rho:
            low = middle
        else:
            high = middle
    e = g / (high - values)
    return g @ e + 0.5 * (values * e.square()).sum()


def full_hessian(last: LastLayer) -> Tensor:
    r"""$\frac1n\sum_i(\mathrm{diag}(p_i)-p_ip_i^\top)\otimes\tilde h_i\tilde h_i^\top$ with $\tilde h=[1;h]$.

    Square with $C(1+d)$ rows. Rows and columns run over classes and, within a class, over bias and weights. Small layers only.
    """
    p = last.log_p.exp()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (n, C, C)
    rows = [
        torch.cat([last.inputs.T @ (weight[:, None] * last.inputs) for weight in block.T], 1)
        for block in blocks.unbind(1)
    ]
    return torch.cat(rows) / len(last)
