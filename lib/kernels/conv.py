"""Exact kernels of infinitely wide convolutional ReLU networks (the kernels of KIP with convolutions, RFAD, LS).

A network is a string of layers, read left to right: ``c`` = 3x3 convolution with zero padding + ReLU, ``p`` = 2x2 average
pooling, and last ``f`` = flatten + Dense or ``g`` = global average pooling + Dense. NTK parameterisation.

For a pair of images the recursion of :mod:`lib.kernels.fc` runs on K[p, p'], one value for every pair of pixels, with

    convolution  K <- sw^2 A(K) + sb^2,   Theta <- sw^2 A(Theta) + K,
                 A(K)[p, p'] = 1/9 sum_delta K[p + delta, p' + delta]     (zero outside the images)

A keeps the displacement p' - p: it is one 3x3 box filter per displacement. Without pooling only p = p' matters for ``f``,
and (h w)^2 values per pair shrink to h w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib.kernels.fc import SIGMA_B, SIGMA_W, Kernels, arc_cosine, dense
from lib.system.errors import CompanionError, choose
from lib.system.tensors import guard

NETS = {
    "convnet3": "cpcpcpf",  # the ConvNet of DC, and RFAD's
    "kip": "ccpcpcpf",  # KIP's final version: one convolution in front
    "myrtle5": "ccpcpcg",
    "convvec3": "cccf",
    "convvec8": "ccccccccf",
}


class BoxFilter(torch.autograd.Function):
    """A(K) of the module's docstring for K of shape (n, h, w, h', w'); A is symmetric, so it is its own backward."""

    @staticmethod
    def forward(ctx, k: Tensor) -> Tensor:
        for row, row2 in ((1, 3), (2, 4)):  # separable: first along (h, h'), then along (w, w')
            out, last = k.clone(), k.shape[row] - 1
            head, tail = (
                lambda t, s=s, n=last, r=row, r2=row2: t.narrow(r, s, n).narrow(r2, s, n) for s in (0, 1)
            )
            head(out).add_(tail(k))
            tail(out).add_(head(k))
            k = out
        return k.div_(9)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return BoxFilter.apply(grad)


def box_filter(k: Tensor) -> Tensor:
    """A(K) for K (n, h, w, h', w'), or on the diagonal p = p' alone for K (n, h, w)."""
    return BoxFilter.apply(k) if k.dim() == 5 else F.avg_pool2d(k, 3, 1, 1)


def convolutional(
    x1: Tensor,
    x2: Tensor | None = None,
    net: str = "convnet3",
    sigma_w: float = SIGMA_W,
    sigma_b: float = SIGMA_B,
    chunk: int = 2**18,
    diagonal: bool | None = None,
) -> Kernels:
    """Kernels between images x1 (n1, c, h, w) and x2 (n2, c, h, w; default x1, which computes each pair once).

    Args:
        net: a name of :data:`NETS` or a string of layers.
        chunk: values of K held at a time, so that memory does not grow with n1 n2: about 10 tensors of that many values.
            The backward pass computes every chunk again instead of keeping it.
        diagonal: carry p = p' only; default wherever that is exact (``f`` and no ``p``).

    Raises:
        CompanionError: for an unknown net, unequal image shapes, and images smaller than the pooling needs.
    """
    layers = layers_of(net)
    _check(net, x1, x1 if x2 is None else x2)
    while layers[0] == "p":  # the covariance of averages is the average covariance
        x1, x2 = (x if x is None else F.avg_pool2d(x, 2) for x in (x1, x2))
        layers = layers[1:]
    exact_on_diagonal = not set(layers) & set("pg")
    diagonal = exact_on_diagonal if diagonal is None else diagonal
    if diagonal and not exact_on_diagonal:
        raise CompanionError(f"diagonal path for {layers!r}; allowed: networks without p and g")
    scales = (sigma_w, sigma_b)
    pixels = x1.shape[2] * x1.shape[3]
    count = max(1, chunk // (pixels if diagonal else pixels**2))  # pairs per chunk

    def own(x: Tensor) -> list[Tensor]:
        parts = [_checkpointed(_variances, part, layers, scales, diagonal) for part in x.split(count)]
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]

    q1 = own(x1)
    if x2 is None:
        n1, n2 = len(x1), len(x1)
        i, j = torch.triu_indices(n1, n1, device=x1.device)
        place = torch.empty(n1, n1, dtype=torch.long, device=x1.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=x1.device)
        x2, q2 = x1, q1
    else:
        n1, n2, q2 = len(x1), len(x2), own(x2)
        place = torch.arange(n1 * n2, device=x1.device).view(n1, n2)
        i, j = place.flatten() // n2, place.flatten() % n2
    values = [
        _checkpointed(_pairs, x1[a], x2[b], [q[a] for q in q1], [q[b] for q in q2], layers, scales, diagonal)
        for a, b in zip(i.split(count), j.split(count), strict=True)
    ]
    return Kernels(*(torch.cat(part)[place] for part in zip(*values, strict=True)))


def layers_of(net: str) -> str:
    """The string of layers of a name of :data:`NETS`, or of itself; a one-line error for anything else."""
    layers = net if set(net) <= set("cpfg") else choose("kernel network", net, NETS)
    if layers[-1:] not in ("f", "g") or set(layers[:-1]) & set("fg") or "c" not in layers:
        raise CompanionError(
            f"kernel network {layers!r}; allowed: c and p in any order with a c, then one f or g"
        )
    return layers


def check_size(net: str, size: Sequence[int]) -> None:
    """Refuse images of (h, w) pixels that are smaller than the pooling of the network needs."""
    pools = layers_of(net).count("p")
    if min(size) < 2**pools:
        raise CompanionError(
            f"{min(size)}-pixel images do not survive {pools} poolings; allowed: {2**pools} pixels or more"
        )


def _check(net: str, x1: Tensor, x2: Tensor) -> None:
    if x1.dim() != 4 or x1.shape[1:] != x2.shape[1:]:
        raise CompanionError(
            f"kernel between images {tuple(x1.shape[1:])} and {tuple(x2.shape[1:])}; allowed: equal (c, h, w)"
        )
    check_size(net, x1.shape[2:])


def _checkpointed(function, *args):
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def _first(x1: Tensor, x2: Tensor, scales: tuple[float, float], diagonal: bool) -> Tensor:
    """sw^2 A(K) + sb^2 of n pairs of images, (n, h, w, h, w), or (n, h, w) for p = p'.

    A of K = <x[p], x'[p']> / c is the inner product of 3x3 patches: one product of matrices, and no filter over pairs of pixels.
    """
    if diagonal:
        return dense(box_filter((x1 * x2).mean(1)), *scales)
    n, c, h, w = x1.shape
    patches1, patches2 = (F.unfold(x, 3, padding=1) for x in (x1, x2))
    offset = x1.new_full((1, 1, 1), scales[1] ** 2)
    k = torch.baddbmm(offset, patches1.mT, patches2, alpha=scales[0] ** 2 / (9 * c))
    return k.view(n, h, w, h, w)


def _pool(k: Tensor) -> Tensor:
    """Average over 2x2 windows of both images, dropping an odd last row or column; k (n, h, w, h', w').

    With V the (pooled pixels, pixels) matrix of the windows it is V K V^T, two products of matrices.
    """
    n, h, w = k.shape[:3]
    rows, columns = (
        torch.arange(side, device=k.device) // 2 == torch.arange(side // 2, device=k.device)[:, None]
        for side in (h, w)
    )
    windows = torch.kron(rows.to(k.dtype), columns.to(k.dtype)) / 4
    half = torch.matmul(k.reshape(n * h * w, h * w), windows.T).view(n, h * w, -1)
    return torch.matmul(windows, half).view(n, h // 2, w // 2, h // 2, w // 2)


def _own_diagonal(k: Tensor) -> Tensor:
    """q[p] = K[p, p]: (n, h, w) from (n, h, w, h, w)."""
    n, h, w = k.shape[:3]
    return k.reshape(n, h * w, h * w).diagonal(dim1=1, dim2=2).reshape(n, h, w)


def _variances(x: Tensor, layers: str, scales: tuple[float, float], diagonal: bool) -> list[Tensor]:
    """The variance q[p] that enters every ReLU, (n, h, w) each; pooling mixes pixels, so all of q[p, p'] is carried."""
    k, out = None, []
    for layer in layers[:-1]:
        if layer == "p":
            k = _pool(k)
            continue
        k = _first(x, x, scales, diagonal) if k is None else dense(box_filter(k), *scales)
        q = k if diagonal else _own_diagonal(k)
        out.append(q)
        if len(out) < layers.count("c"):
            k = k / 2 if diagonal else arc_cosine(k, q[:, :, :, None, None], q[:, None, None])[0]
    return out


def _pairs(
    x1: Tensor,
    x2: Tensor,
    q1: list[Tensor],
    q2: list[Tensor],
    layers: str,
    scales: tuple[float, float],
    diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of n pairs of images, (n,) each; q1 and q2 hold :func:`_variances` of the two sides."""
    k = ntk = None
    variances = iter(zip(q1, q2, strict=True))
    for layer in layers[:-1]:
        if layer == "p":
            k, ntk = _pool(k), _pool(ntk)
            continue
        if k is None:
            ntk = k = _first(x1, x2, scales, diagonal)
        else:
            k = dense(box_filter(k), *scales)
            ntk = torch.add(k, box_filter(ntk), alpha=scales[0] ** 2)
        q, q_ = next(variances)
        k, active = arc_cosine(k, *((q, q_) if diagonal else (q[:, :, :, None, None], q_[:, None, None])))
        ntk = ntk * active
    whole = layers[-1] == "g" or diagonal
    k, ntk = (t.flatten(1).mean(1) if whole else _own_diagonal(t).flatten(1).mean(1) for t in (k, ntk))
    k = dense(k, *scales)
    return k, scales[0] ** 2 * ntk + k


guard(globals())
