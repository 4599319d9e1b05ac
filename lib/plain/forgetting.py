"""Forgetting events, plainly (Toneva et al. 2019)."""

from __future__ import annotations

from dataclasses import replace

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def forgetting(p, train, ipc, g):
    proxy = replace(p.proxy, until=None)  # trained on all images, and watched for all its epochs
    right = train_proxy(proxy, train, g).correct.tolist()  # in epoch t, when image i was presented

    def forgotten(i):
        events = [epoch[i] and not after[i] for epoch, after in zip(right, right[1:], strict=False)]
        return sum(events) if any(epoch[i] for epoch in right) else len(right)  # never learned: the most

    S = []
    for T in class_rows(train):  # positions of the images of one class
        S += sorted(T.tolist(), key=forgotten, reverse=True)[:ipc]
    return train.images[S], []
