"""Herding, plainly (Welling 2009, as iCaRL has it)."""

from __future__ import annotations

from lib.select.proxy import embeddings
from lib.select.subset import class_rows


def herding(p, train, ipc, g):
    h = embeddings(
        train, p.features, p.proxy, g
    )  # of a proxy network, trained for a few epochs on all images
    S = []
    for T in class_rows(train):  # positions of the images of one class
        mu, s, A = h[T].mean(0), 0, []
        for t in range(ipc):  # whose feature brings the mean of the picks nearest to the mean of the class?
            j = min((j for j in T.tolist() if j not in A), key=lambda j: ((t + 1) * mu - s - h[j]).norm())
            s = s + h[j]
            A.append(j)
        S += A
    return train.images[S], []
