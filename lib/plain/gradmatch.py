"""GradMatch, plainly (Killamsetty et al. 2021): orthogonal matching pursuit."""

from __future__ import annotations

import torch
from scipy.optimize import nnls

from lib.plain import gradients
from lib.select.proxy import train_proxy
from lib.select.subset import class_rows


def gradmatch(p, train, ipc, g):
    seen = train_proxy(p.proxy, train, g).last  # of a network that is trained for a few epochs on all images
    G = gradients(seen.logits, seen.embeddings, train.labels)
    S, weights = [], []
    for T in class_rows(train):  # positions of the images of one class
        b = r = G[T].mean(0)  # the gradient to be matched, and what is left of it
        A = []
        for _ in range(ipc):
            A.append(max((j for j in T.tolist() if j not in A), key=lambda j: G[j] @ r))
            K = G[A] @ G[A].T + (p.ridge if len(A) > 1 else 0) * torch.eye(len(A))
            r = b - torch.linalg.solve(K, G[A] @ b) @ G[A]
        x = torch.as_tensor(nnls(K.double().numpy(), (G[A] @ b).double().numpy())[0]).float()
        x = x if ipc > 1 else torch.ones(1)
        S += [j for j, weight in zip(A, x, strict=True) if weight > 0]
        weights.append(x[x > 0])
    return (train.images[S], torch.cat(weights)), []
