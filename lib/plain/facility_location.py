"""Facility location, plainly (Iyer et al. 2021), by cosines of gradients."""

from __future__ import annotations

from lib.plain import gradients
from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def facility_location(p, train, ipc, g):
    seen = train_proxy(p.proxy, train, g).last  # of a network that is trained for a few epochs on all images
    G = gradients(seen.logits, seen.embeddings, train.labels)
    S = []
    for T in class_rows(train):  # positions of the images of one class
        U = G[T].double() / G[T].double().norm(dim=1, keepdim=True)
        s, A = 0.5 + 0.5 * U @ U.T, []
        for _ in range(ipc):  # every image is served by the most similar pick
            rest = (j for j in range(len(T)) if j not in A)
            A.append(max(rest, key=lambda j: s[:, [*A, j]].amax(1).sum()))
        S += T[A].tolist()
    return train.images[S], []
