"""Contextual diversity, plainly (Agarwal et al. 2020)."""

from __future__ import annotations

import torch

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def contextual_diversity(p, train, ipc, g):
    log_P = train_proxy(p.proxy, train, g).last.logits.log_softmax(
        1
    )  # of a network that is trained on all images

    def divergence(i, j):  # (KL(P_i, P_j) + KL(P_j, P_i)) / 2
        return ((log_P[i].exp() - log_P[j].exp()) * (log_P[i] - log_P[j])).sum() / 2

    S = []
    for T in class_rows(train):  # positions of the images of one class
        A = [int(T[torch.randint(len(T), (), generator=g)])]
        while len(A) < ipc:  # whose prediction is farthest from those of all picks
            rest = (j for j in T.tolist() if j not in A)
            A.append(max(rest, key=lambda j: min(divergence(j, a) for a in A)))
        S += A
    return train.images[S], []
