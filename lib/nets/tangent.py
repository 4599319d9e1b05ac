"""The network of RCIG and its first-order expansion in the weights, whose products are written out layer by layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.nets.pool import average_pool
from lib.nets.widening import FeatureNet

EXACT = 40.0  # beta z from which log(1 + e^(beta z)) equals beta z in 64 bits; PyTorch's own threshold of 20 costs 1e-9


class TangentNet(FeatureNet):
    r"""FRePo's widening network without normalisation, with softplus $\log(1+e^{\beta z})/\beta$ (beta 0: ReLU), and

    $$o(x)=J(x)\,\delta,\qquad J(x)=\partial f_\theta(x)/\partial\theta .$$

    A displacement delta is one vector: [kernel, bias] of every convolution in PyTorch's layout, then of the last layer, whose
    kernel only counts if ``last_kernel``. Weights are read as they are; freeze them (``requires_grad_(False)``) to expand.
    """

    def __init__(self, train, width: int, depth: int, beta: float, last_kernel: bool = False):
        super().__init__(train, width, depth, norm=False)
        self.beta, self.last_kernel = beta, last_kernel

    @property
    def convolutions(self):
        return self.blocks[1::2]

    @property
    def moved(self) -> list[Tensor]:
        """The weights that a displacement moves, in its order."""
        *convolutions, kernel, bias = self.parameters()
        return [*convolutions, *([kernel] if self.last_kernel else []), bias]

    @property
    def size(self) -> int:
        """Length P of a displacement."""
        return sum(weight.numel() for weight in self.moved)

    def without_kernel(self) -> Tensor:
        """(P,): 1, but 0 for the last kernel."""
        kernel = self.classifier.weight
        return torch.cat([weight.new_full((weight.numel(),), weight is not kernel) for weight in self.moved])

    def activation(self, z: Tensor) -> Tensor:
        return F.softplus(z, self.beta, EXACT) if self.beta else torch.relu(z)

    def slope(self, z: Tensor) -> Tensor:
        """Derivative of the activation; of ReLU 0 at 0."""
        return torch.sigmoid(self.beta * z) if self.beta else (z > 0).to(z.dtype)

    def embed(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = average_pool(self.activation(convolution(x)))
        return x.flatten(1)

    def tangent(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Features phi (n, D) and o = J delta (n, C) of images; differentiable in the images and in ``delta`` (P,)."""
        sizes = [weight.numel() for weight in self.moved]
        moves = [
            part.view_as(weight)
            for part, weight in zip(delta.to(x.dtype).split(sizes), self.moved, strict=True)
        ]
        a, da = x, None
        for i, convolution in enumerate(self.convolutions):
            z = convolution(a)
            dz = F.conv2d(a, moves[2 * i], moves[2 * i + 1], padding=convolution.padding)
            if da is not None:
                dz = dz + F.conv2d(da, convolution.weight, padding=convolution.padding)
            a, da = average_pool(self.activation(z)), average_pool(self.slope(z) * dz)
        phi, last = a.flatten(1), self.classifier
        o = F.linear(da.flatten(1), last.weight, moves[-1])
        return phi, o + F.linear(phi, moves[-2]) if self.last_kernel else o

    @torch.no_grad()
    def jacobian(self, x: Tensor) -> Tensor:
        """J of every image, class by class: (n, C, P)."""
        inputs, slopes, a = [], [], x
        for convolution in self.convolutions:
            z = convolution(a)
            inputs.append(a)
            slopes.append(self.slope(z))
            a = average_pool(self.activation(z))
        n, last = len(x), self.classifier
        classes = last.out_features
        eye = torch.eye(classes, dtype=x.dtype, device=x.device)
        columns = [eye.expand(n, -1, -1)]
        if self.last_kernel:
            columns.insert(0, torch.einsum("cd,nf->ncdf", eye, a.flatten(1)).flatten(2))
        g = last.weight.view(1, classes, *a.shape[1:]).expand(n, -1, -1, -1, -1)  # (n, C, channels, h, w)
        for i, convolution in reversed(list(enumerate(self.convolutions))):
            g = slopes[i][:, None] * _spread(g, slopes[i].shape[-2:])
            patches = F.unfold(inputs[i], convolution.kernel_size, padding=convolution.padding)
            flat = g.flatten(3)  # (n, C, out, positions) against (n, in * 9, positions)
            kernel = torch.bmm(flat.flatten(1, 2), patches.mT).unflatten(1, flat.shape[1:3])
            columns[:0] = [kernel.flatten(2), flat.sum(3)]
            if i:
                g = F.conv_transpose2d(g.flatten(0, 1), convolution.weight, padding=convolution.padding)
                g = g.unflatten(0, (n, classes))
        return torch.cat(columns, 2)


def _spread(g: Tensor, side: tuple[int, int]) -> Tensor:
    """Adjoint of 2x2 average pooling of maps with these sides: a quarter of every value to each pixel of its block."""
    g = (0.25 * g).repeat_interleave(2, -1).repeat_interleave(2, -2)
    return F.pad(g, (0, side[1] - g.shape[-1], 0, side[0] - g.shape[-2]))
