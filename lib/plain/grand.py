"""GraNd, plainly (Paul et al. 2021), by the last layer."""

from __future__ import annotations

from lib.plain import gradients
from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def grand(p, train, ipc, g):
    score = 0
    for _ in range(p.repeats):  # proxy networks, trained for a few epochs on all images
        seen = train_proxy(p.proxy, train, g).last
        score = score + gradients(seen.logits, seen.embeddings, train.labels).norm(dim=1)
    S = []
    for T in class_rows(train):  # positions of the images of one class; those of longest gradient
        S += sorted(T.tolist(), key=lambda i: -score[i])[:ipc]
    return train.images[S], []
