"""Real images, drawn at random: plainly."""

from __future__ import annotations

import torch

from lib.select.subset import class_rows


def random(p, train, ipc, g):
    keys = torch.rand(train.num_classes, int(train.counts.max()), generator=g)
    S = []
    for c, T in enumerate(class_rows(train)):  # positions of the images of class c
        S.append(T[keys[c, : len(T)].topk(ipc).indices])
    return train.images[torch.cat(S)], []
