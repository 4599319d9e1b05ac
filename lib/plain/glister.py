"""Glister, plainly (Killamsetty et al. 2021): the training images are the validation."""

from __future__ import annotations

from lib.plain import gradients
from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def glister(p, train, ipc, g):
    seen = train_proxy(p.proxy, train, g).last  # of a network that is trained for a few epochs on all images
    z, h, y = seen.logits, seen.embeddings, train.labels
    G, S = gradients(z, h, y), []
    for T in class_rows(train):  # positions of the images of one class
        v, A = G[T].mean(0), []
        for _ in range(ipc):  # whose gradient lowers the validation loss most?
            A.append(max((j for j in T.tolist() if j not in A), key=lambda j: G[j] @ v))
            step = G[A].mean(0)
            b, W = step[: z.shape[1]], step[z.shape[1] :].view(z.shape[1], -1)
            v = gradients(z[T] - p.eta * (b + h[T] @ W.T), h[T], y[T]).mean(0)  # after a step on the picks
        S += A
    return train.images[S], []
