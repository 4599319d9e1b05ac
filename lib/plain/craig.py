"""CRAIG, plainly (Mirzasoleiman et al. 2020)."""

from __future__ import annotations

import torch

from lib.plain import gradients
from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def craig(p, train, ipc, g):
    seen = train_proxy(p.proxy, train, g).last  # of a network that is trained for a few epochs on all images
    G = gradients(seen.logits, seen.embeddings, train.labels)
    S, weights = [], []
    for T in class_rows(train):  # positions of the images of one class
        D = (G[T][:, None] - G[T][None]).norm(dim=2).double()
        s, A = D.max() + 1e-3 - D, []
        for _ in range(ipc):  # facility location: every image is served by the most similar pick
            rest = (j for j in range(len(T)) if j not in A)
            A.append(max(rest, key=lambda j: s[:, [*A, j]].amax(1).sum()))
        S += T[A].tolist()
        weights.append(torch.bincount(s[:, A].argmax(1), minlength=ipc))  # how many each pick serves
    return (train.images[S], torch.cat(weights)), []
