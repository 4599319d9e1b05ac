"""CAL, plainly (Margatina et al. 2021)."""

from __future__ import annotations

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def cal(p, train, ipc, g):
    seen = train_proxy(p.proxy, train, g).last  # of a network that is trained for a few epochs on all images
    h, log_P = seen.embeddings, seen.logits.log_softmax(1)

    def divergence(i, j):  # (KL(P_i, P_j) + KL(P_j, P_i)) / 2
        return ((log_P[i].exp() - log_P[j].exp()) * (log_P[i] - log_P[j])).sum() / 2

    S = []
    for T in class_rows(train):  # positions of the images of one class
        score = {}
        for i in T.tolist():  # by how much the prediction differs from those of the nearest neighbours
            near = sorted((j for j in T.tolist() if j != i), key=lambda j: (h[i] - h[j]).norm())[
                : p.neighbours
            ]
            score[i] = sum(divergence(i, j) for j in near)
        S += sorted(T.tolist(), key=lambda i: -score[i])[:ipc]
    return train.images[S], []
