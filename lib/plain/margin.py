"""Margin, plainly (Coleman et al. 2020)."""

from __future__ import annotations

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def margin(p, train, ipc, g):
    P = train_proxy(p.proxy, train, g).last.logits.softmax(
        1
    )  # of a network that is trained for a few epochs on all images
    S = []
    for T in class_rows(train):  # positions of the images of one class
        first, second = (
            P[T].sort(1, descending=True).values[:, :2].unbind(1)
        )  # of the most probable class, and of the next
        S += [int(T[i]) for i in (first - second).argsort(stable=True)[:ipc]]
    return train.images[S], []
