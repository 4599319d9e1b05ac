"""Two looks at a support set: which eigen-directions of its kernel carry the prediction, and how many dimensions it fills.

The spectral bands are those of Nguyen et al. (KIP, arXiv 2107.13034), the dimension is the two-nearest-neighbour estimate of
Facco et al. (Scientific Reports 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.system.errors import CompanionError
from lib.system.tensors import guard


@torch.no_grad()
def spectral_bands(k_ss: Tensor, k_ts: Tensor, y_s: Tensor, bands: int = 5) -> Tensor:
    r"""Predictions with the inverse kernel cut down to one band of eigenvalues each: ``(bands, n, C)``.

    With $K_{ss}=V\Lambda V^\top$ and B the next m / bands of the eigenvalues, largest first, the prediction of a band is
    $K_{ts}V_B\Lambda_B^{-1}V_B^\top y_s$. The predictions of all bands add up to the one of the regression.

    Args:
        k_ss: ``(m, m)``, ridge included; k_ts: ``(n, m)``; y_s: ``(m, C)``.
    """
    if not 1 <= bands <= len(k_ss):
        raise CompanionError(f"{bands} bands of {len(k_ss)} eigenvalues; allowed: 1 to {len(k_ss)}")
    values, vectors = torch.linalg.eigh(k_ss.double())  # ascending
    parts = zip(values.flip(0).tensor_split(bands), vectors.flip(1).tensor_split(bands, 1), strict=True)
    return torch.stack([k_ts.double() @ (v / size) @ (v.T @ y_s.double()) for size, v in parts])


@torch.no_grad()
def intrinsic_dimension(points: Tensor) -> float:
    r"""Two-nearest-neighbour estimate of the dimension that ``(n, ...)`` points fill.

    In d dimensions the ratio $\mu=r_2/r_1$ of the distances to the second and the first neighbour has the density
    $d\mu^{-d-1}$ whatever the density of the points, so that $d=(n-1)/\sum_i\ln\mu_i$, made unbiased by n - 1 instead of n.
    Points that coincide with another are left out.

    Raises:
        CompanionError: for fewer than 3 distinct points.
    """
    flat = points.detach().flatten(1).double()
    if len(flat) >= 3:
        distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance.fill_diagonal_(torch.inf).topk(2, largest=False).values
        nearest = nearest[nearest[:, 0] > 0]
        if len(nearest) >= 3:
            return (len(nearest) - 1) / float((nearest[:, 1] / nearest[:, 0]).log().sum())
    raise CompanionError(f"the dimension of {len(flat)} points; allowed: 3 or more that differ")


@torch.no_grad()
def high_frequencies(images: Tensor, beyond: float = 0.25) -> Tensor:
    """Share of the energy of every image ``(n, c, h, w)`` around its mean that lies beyond a frequency (1 is one period a pixel, the
    sampling rate; the highest along an axis is 1/2), ``(n,)``; 0 for a blank image."""
    if not 0 < beyond < 0.5**0.5:
        raise CompanionError(f"frequency {beyond!r}: allowed are those above 0 and below 0.71")
    energy = torch.fft.fft2(images.double()).abs().square().sum(1)  # (n, h, w)
    energy[:, 0, 0] = 0
    along = (torch.fft.fftfreq(size, device=images.device) for size in images.shape[-2:])
    radius = torch.cartesian_prod(*along).norm(dim=1).view(images.shape[-2:])
    total = energy.sum((1, 2))
    return torch.where(total > 0, energy[:, radius > beyond].sum(1) / total, 0.0)


guard(globals(), finite=True)
