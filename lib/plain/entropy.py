"""Entropy, plainly (Coleman et al. 2020)."""

from __future__ import annotations

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def entropy(p, train, ipc, g):
    P = train_proxy(p.proxy, train, g).last.logits.softmax(
        1
    )  # of a network that is trained for a few epochs on all images
    S = []
    for T in class_rows(train):  # positions of the images of one class; those of largest entropy
        S += sorted(T.tolist(), key=lambda i: (P[i] * (P[i] + 1e-6).log()).sum())[:ipc]
    return train.images[S], []
