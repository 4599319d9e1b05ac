r"""Integral probability metrics of one set of features to another, side by side, and how well each predicts something.

$$d_{\mathcal F}(P,Q)=\sup_{f\in\mathcal F}|\mathbb E_Pf-\mathbb E_Qf|$$

Linear functions of norm 1 give the distance of the means (DM), the unit ball of a kernel's space the MMD (M3D), 1-Lipschitz
functions $W_1$ (Müller 1997; Sriperumbudur et al. 2012). Features are ``(C, n, d)`` for the real and ``(C, m, d)`` for the
synthetic images of the C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lib.match import features, mmd, transport
from lib.system.tensors import guard

MARGINAL_ROWS = (
    30  # real images per class in the metric that ignores classes: its plan is of all classes at once
)


def metrics(real: Tensor, syn: Tensor, columns: Tensor, sweeps: int = 3000) -> dict[str, float]:
    r"""Every metric by name, per class and averaged over the classes; smaller is closer.

    Bandwidth (median distance) and $\varepsilon$ (half the median squared distance) are set by the real features alone, so
    that different sets are measured with one rule. MMDs are squared and biased; ``W2`` and ``sliced W2`` are rooted; ``Sinkhorn``
    is the debiased divergence.

    Args:
        columns: directions ``(d, L)`` of the sliced distance.
        sweeps: of Sinkhorn, at most.
    Warns:
        UserWarning: if Sinkhorn does not converge.
    """
    sigma = mmd.median_distance(real, real[:, :0])
    eps = 0.5 * mmd.squared_distances(real, real).flatten(1).median(1).values
    together = (points.flatten(0, 1).unsqueeze(0) for points in (real[:, :MARGINAL_ROWS], syn))
    per_class = {
        "mean": features.class_mean(real, syn).sqrt(),
        "MMD Gauss": mmd.mmd(real, syn, "rbf", sigma),
        "MMD Gauss / 4": mmd.mmd(real, syn, "rbf", sigma / 4),
        "MMD Laplace": mmd.mmd(real, syn, "laplace", sigma),
        "MMD poly": mmd.mmd(real, syn, "poly"),
        "MMD energy": mmd.mmd(real, syn, "energy"),
        "W1": transport.wasserstein(real, syn, 1),
        "W2": transport.wasserstein(real, syn, 2).sqrt(),
        "sliced W2": transport.sliced(real, syn, columns).mean(-1).sqrt(),
        "Sinkhorn": transport.sinkhorn_divergence(real, syn, eps, sweeps=sweeps),
        "W1, classes ignored": transport.wasserstein(*together, 1),
    }
    return {name: value.mean().item() for name, value in per_class.items()}


def gaussian_forms(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, sigma: float
) -> dict[str, Tensor]:
    r"""Closed forms of two Gaussians: distance of the means, squared MMD of the kernel ``rbf``, squared $W_2$.

    $\mathbb E k(x,y)=|\Sigma/\sigma^2+I|^{-1/2}\exp(-\frac12\delta^\top(\Sigma+\sigma^2I)^{-1}\delta)$, $\Sigma$ the sum of both
    covariances.
    """
    eye, delta = torch.eye(len(mean_x), dtype=mean_x.dtype, device=mean_x.device), mean_x - mean_y

    def expected(cov: Tensor, shift: Tensor) -> Tensor:
        exponent = -0.5 * shift @ torch.linalg.solve(cov + sigma**2 * eye, shift)
        return torch.linalg.det(cov / sigma**2 + eye).rsqrt() * exponent.exp()

    within = expected(2 * cov_x, 0 * delta) + expected(2 * cov_y, 0 * delta)
    return {
        "mean": delta.norm(),
        "MMD²": within - 2 * expected(cov_x + cov_y, delta),
        "W2²": transport.gaussian_w2(mean_x, cov_x, mean_y, cov_y),
    }


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's of the rows of two ``(..., n)`` arrays, ``(...)``; ties share their rank, a constant row gives 0."""
    from scipy.stats import rankdata

    x, y = (rankdata(part, axis=-1) for part in (x, y))
    x, y = (part - part.mean(-1, keepdims=True) for part in (x, y))
    norm = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), norm, out=np.zeros_like(norm), where=norm > 0)


def bootstrap(x: np.ndarray, y: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """:func:`rank_correlation` of ``draws`` resamples of the n pairs, ``(draws,)``; equal seeds resample alike."""
    rows = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    return rank_correlation(x[rows], y[rows])


guard(globals(), finite=True)
