"""LCMat-S, plainly (Shin et al. 2023)."""

from __future__ import annotations

import torch

from lib.plain import gradients
from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def lcmat_s(p, train, ipc, g):
    seen = train_proxy(p.proxy, train, g).last  # of a network that is trained for a few epochs on all images
    G = gradients(seen.logits, seen.embeddings, train.labels)
    P, h = seen.logits.softmax(1), seen.embeddings
    q = P * (1 - P)
    H = torch.cat(
        [q, (q[:, :, None] * h[:, None, :].square()).flatten(1)], 1
    )  # diagonal Hessians of the last layer
    S = []
    for T in class_rows(train):  # positions of the images of one class
        K = H[T].double().var(0, correction=0).argsort(descending=True)[: p.coordinates]
        curvature = (H[T][:, None, K] - H[T][None][:, :, K]).abs().sum(2)
        D = (G[T][:, None] - G[T][None]).norm(dim=2).double() + p.eps * curvature
        s, A = D.max() + 1e-3 - D, []
        for _ in range(ipc):  # facility location: every image is served by the most similar pick
            rest = (j for j in range(len(T)) if j not in A)
            A.append(max(rest, key=lambda j: s[:, [*A, j]].amax(1).sum()))
        S += T[A].tolist()
    return train.images[S], []
