"""EL2N, plainly (Paul et al. 2021)."""

from __future__ import annotations

import torch.nn.functional as F

from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def el2n(p, train, ipc, g):
    y, score = F.one_hot(train.labels), 0
    for _ in range(p.repeats):  # proxy networks, trained for a few epochs on all images
        P = train_proxy(p.proxy, train, g).last.logits.softmax(1)
        score = score + (P - y).norm(dim=1)
    S = []
    for T in class_rows(train):  # positions of the images of one class; those of largest error
        S += sorted(T.tolist(), key=lambda i: -score[i])[:ipc]
    return train.images[S], []
