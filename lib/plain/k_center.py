"""K-center greedy, plainly (Sener & Savarese 2018)."""

from __future__ import annotations

import torch

from lib.select.proxy import embeddings
from lib.select.subset import class_rows


def k_center(p, train, ipc, g):
    h = embeddings(
        train, p.features, p.proxy, g
    )  # of a proxy network, trained for a few epochs on all images
    S = []
    for T in class_rows(train):  # positions of the images of one class
        A = [int(T[torch.randint(len(T), (), generator=g)])]
        while len(A) < ipc:  # the image that is farthest from the nearest pick
            rest = (j for j in T.tolist() if j not in A)
            A.append(max(rest, key=lambda j: min((h[j] - h[a]).norm() for a in A)))
        S += A
    return train.images[S], []
