"""DeepFool, plainly (Ducoffe & Precioso 2018)."""

from __future__ import annotations

import torch

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def deepfool(p, train, ipc, g):
    f = train_proxy(p.proxy, train, g).network  # trained for a few epochs on all images

    def reach(x):  # squared length of a path to the next class
        start, own = x, f(x[None])[0].argmax()
        for _ in range(p.iterations):
            x = x.detach().requires_grad_()
            z = f(x[None])[0]
            if z.argmax() != own:
                break
            slopes = [torch.autograd.grad(z[k], x, retain_graph=True)[0] for k in range(len(z))]
            w = [
                slope - slopes[own] for slope in slopes
            ]  # boundaries: linearised, of the own class with every other
            length = {k: (z[own] - z[k]) / w[k].norm() for k in range(len(z)) if k != own}
            k = min(length, key=length.get)
            x = x + length[k] * w[k] / w[k].norm()
        return (x - start).square().sum().item()

    S = []
    for T in class_rows(train):  # positions of the images of one class; those nearest to a boundary
        S += sorted(T.tolist(), key=lambda i: reach(train.images[i]))[:ipc]
    return train.images[S], []
