r"""KRR - Provable and Efficient Dataset Distillation for Kernel Ridge Regression. Chen, Huang, Weng, NeurIPS 2024.

Ridge regression on features is nothing but its weights, so ask for a set whose own solution is that matrix:

$$W_S=Y_S\,\phi_{\lambda_S}(X_S)^+\ =\ W=\arg\min_W\lVert W\phi(X)-Y\rVert_F^2+\lambda\lVert W\rVert_F^2 .$$

With $m\ge k$ points and labels of rank k the solutions are all known (theorems 4.1, 5.1): $\phi_{\lambda_S}(X_S)^+=D$ for an
$D=Y_S^+W+(I-Y_S^+Y_S)Z$, any Z. One step writes such a set down; nothing is optimised. The algebra:
``lib.kernels.closed_form``.

The labels of the set are targets of a regression: real numbers, stored with the images (``SyntheticSet.labels``, (m, C)). What
the set is for is :func:`predictor`. A network can be trained on the images with ``labels="hard"``; the theory says nothing of it.

Paper and code: columns are data in the paper, rows in the set, here class by class. All in 64 bits (the code's 32 lose up to 0.3
points at IPC 50). One eigendecomposition serves all ridge values (the code solves anew for each). Fourier features must be
divided by their largest entry c to have a preimage, which makes $W_S=cW$; labels are divided by c as well (and $\lambda_S$ by
$c^2$), so that $W_S=W$ here. The code's phases are $U[0,\pi]$ (paper: $[0,2\pi]$), its Fourier variance fits 784 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.formation.start import INITIAL
from lib.kernels import closed_form, feature_maps
from lib.recipes import Recipes, published, small, two_cores
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, unknown

MAPS = ("identity", "fcnn", "fourier")
ROOTS = ("plus", "minus", "alternate")
LAMBDA_S = ("teacher",)


class Teacher(NamedTuple):
    """The model to be reproduced: phi, its description (what draws it again), W (k, p), its ridge, validation accuracy."""

    phi: Any
    about: dict[str, Any]
    w: Tensor
    lam: float
    accuracy: float


@dataclass
class State:
    """The set, (m, c, h, w) and (m, C) in 64 bits, and the ridge with which its solution is W."""

    images: Tensor
    targets: Tensor
    lam: float
    note: str  # says so where lambda_S had to be clipped
    teacher: Teacher = field(metadata={"constant": True})
    train: object = field(metadata={"constant": True})


@dataclass(frozen=True)
class KRR:
    r"""Settings of algorithm 1 and of the published ``config/distill.yaml``.

    Attributes:
        map: $\phi$: "identity", "fcnn" (invertible LeakyReLU net) or "fourier" (random Fourier features); features: p, None: as many as
            pixels (all published runs).
        layers: hidden ones of fcnn, of which the last activation is the feature; slope: of its LeakyReLU; variance: of the Fourier
            frequencies, None: 0.8 / d (published 1/1000 for 784 pixels).
        lam: the teacher's ridge, above 0; None: the best on the validation split; validation: its part of the training images, at random.
        lambda_s: the set's own ridge, 0 or more, or "teacher"; clipped at its bound.
        root: of the singular values where lambda_s > 0: "plus" (published), "minus" or "alternate".
        init: Z from "noise", or from "real" images (corollary 4.1.1); noise: standard deviation of Z relative to $Y_S^+W$.
        labels_only: keep random real images, solve for their labels (theorem 4.2).
    """

    map: str = "identity"
    features: int | None = None
    layers: int = 1
    slope: float = 0.1
    variance: float | None = None
    lam: float | None = None
    validation: float = 0.05
    lambda_s: float | str = 0.0
    root: str = "plus"
    init: str = "noise"
    noise: float = 0.1
    labels_only: bool = False

    def __post_init__(self):
        allowed = {"map": MAPS, "root": ROOTS, "init": INITIAL}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise unknown(name, getattr(self, name), values)
        if isinstance(self.lambda_s, str) and self.lambda_s not in LAMBDA_S:
            raise unknown("lambda_s", self.lambda_s, LAMBDA_S)
        for name, low in (("lambda_s", 0), ("lam", math.ulp(0)), ("layers", 1), ("features", 1)):
            value = getattr(self, name)
            if not isinstance(value, str | None) and not low <= value < math.inf:
                raise CompanionError(f"{name} {value:g}; allowed: {'0 or more' if not low else 'above 0'}")

    def total_steps(self, ipc: int) -> int:
        return 1

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        teacher = self.teacher(train, generator)
        m = train.num_classes * ipc
        if self.labels_only or self.init == "real":
            images = train.sample(ipc, generator).flatten(0, 1).double()
        else:
            images = torch.zeros(m, *train.shape, dtype=torch.float64, device=train.device)
        return State(images, one_hot(train, ipc), self._lambda_s(teacher), "", teacher, train)

    def teacher(self, train, generator: torch.Generator) -> Teacher:
        """The map, and ridge regression on all but the validation split, its lambda chosen there (the first of equals)."""
        d = math.prod(train.shape)
        about = {"name": self.map, "features": self.features or d, "layers": self.layers, "slope": self.slope}
        about |= {"variance": self.variance, "inputs": d, "seed": _draw_seed(generator)}
        if about["features"] > d and not self.labels_only:
            raise CompanionError(
                f"{self.features} features of {d} pixels have no exact preimage; allowed: at most {d}"
            )
        phi = feature_map(about, train.device)
        order = torch.randperm(len(train), generator=generator, device=generator.device).to(train.device)
        held_out = max(1, round(self.validation * len(train)))
        x, y = columns(train.images), F.one_hot(train.labels, train.num_classes).T.double()
        rows, rest = order[:held_out], order[held_out:]
        path = closed_form.ridge_path(phi(x[:, rest]), y[:, rest])
        low = -3.0 if self.map == "identity" else -6.0  # published grids
        lams = 10 ** torch.arange(low, 5.75, 0.5, dtype=torch.float64)
        lams = lams if self.lam is None else torch.tensor([self.lam], dtype=torch.float64)
        best, accuracy = path.best(lams, phi(x[:, rows]), train.labels[rows])
        lam = float(lams[best])
        return Teacher(phi, about, path(lam), lam, float(accuracy[best]))

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """The whole algorithm: labels, a free Z, D, its inverse, and back to pixels."""
        phi, w, asked = state.teacher.phi, state.teacher.w, self._lambda_s(state.teacher)
        y_s, shape = state.targets.T, state.images.shape
        if self.labels_only:
            real = phi(columns(state.images))
            state.targets, state.lam = closed_form.labels_for(real, w, asked).T, asked
            return self._measure(state, asked)
        if self.init == "real":
            real = phi(columns(state.images))
            y_real = closed_form.labels_for(
                real, w, asked
            )  # the labels that let D come nearest to the real images'
            y_s = y_real if int(torch.linalg.matrix_rank(y_real)) == len(w) else y_s
            z = closed_form.nearest(y_s, w, real, asked)
        else:
            z = closed_form.noise(y_s, w, generator, self.noise)
        d = closed_form.admissible(y_s, w, z)
        lam = closed_form.clipped(d, asked)
        phi_s = closed_form.solve_features(d, lam, self._signs(min(d.shape), d.device))
        x_s, scale = preimage(phi, phi_s)
        state.images, state.targets, state.lam = x_s.T.reshape(shape), (y_s / scale).T, lam / scale**2
        if lam < asked:
            state.note = f"lambda_S {asked:.4g} clipped to {lam:.4g} = 1 / (4 s_1^2)"
        return self._measure(state, asked)

    def finish(self, state: State) -> SyntheticSet:
        about = {"map": state.teacher.about, "lambda": state.teacher.lam, "lambda_s": state.lam}
        about |= {"targets": "of a ridge regression"} | ({"note": state.note} if state.note else {})
        kept = state.images.clone(), state.targets.contiguous()
        return SyntheticSet(*kept, state.train.classes, state.train.transform, meta=about)

    def _lambda_s(self, teacher: Teacher) -> float:
        return teacher.lam if self.lambda_s == "teacher" else float(self.lambda_s)

    def _signs(self, rank: int, device) -> Tensor:
        signs = torch.ones(rank, dtype=torch.float64, device=device)
        if self.root == "alternate":
            signs[1::2] = -1
        return -signs if self.root == "minus" else signs

    def _measure(self, state: State, asked: float) -> dict[str, Tensor]:
        """How far the solution of the set, from its pixels, is from W; an exact construction that is not is an error."""
        w, teacher = solution(state.teacher.phi, state.images, state.targets, state.lam), state.teacher
        gap, cosine = (
            (w - teacher.w).norm() / teacher.w.norm(),
            F.cosine_similarity(w.flatten(), teacher.w.flatten(), 0),
        )
        if not self.labels_only and not cosine >= 0.99:  # the published threshold
            raise CompanionError(
                f"the set's weights have cosine {float(cosine):.3g} with the teacher's; allowed: 0.99 or more"
            )
        values = {"lambda": teacher.lam, "validation accuracy": teacher.accuracy, "lambda_s": state.lam}
        values |= {"lambda_s asked": asked}
        return {"gap": gap, "cosine": cosine} | {name: gap.new_tensor(v) for name, v in values.items()}


def predictor(synset: SyntheticSet) -> Callable[[Tensor], Tensor]:
    """The ridge regression of a set, images (n, c, h, w) -> scores (n, C); its map is drawn again from ``synset.meta``."""
    phi = feature_map(synset.meta["map"], synset.codes.device)
    w = solution(phi, synset.images, synset.targets, synset.meta["lambda_s"])
    return lambda images: (w @ phi(columns(images))).T


def solution(phi, images: Tensor, targets: Tensor, lam: float) -> Tensor:
    """W_S (k, p) of images (m, c, h, w) and targets (m, k)."""
    return closed_form.student(phi(columns(images)), targets.double().T, lam)


def feature_map(about: dict[str, Any], device: torch.device | str = "cpu"):
    """phi of a description: the same on every device, because it is drawn on the CPU."""
    generator, d, p = torch.Generator().manual_seed(about["seed"]), about["inputs"], about["features"]
    if about["name"] == "fcnn":
        return feature_maps.LeakyNet.draw((d, *[p] * about["layers"]), generator, about["slope"], device)
    if about["name"] == "fourier":
        return feature_maps.Fourier.draw(d, p, generator, about["variance"], device)
    return feature_maps.Identity()


def preimage(phi, phi_s: Tensor) -> tuple[Tensor, float]:
    """X_S (d, m) and a scale c with phi(X_S) = phi_S / c: 1, except for Fourier features, which are bounded."""
    if not isinstance(phi, feature_maps.Fourier):
        return phi.inverse(phi_s), 1.0
    scale = float(phi_s.abs().max()) * math.sqrt(len(phi_s) / 2)
    return phi.inverse(phi_s / scale, rescale=False), scale


def one_hot(train, ipc: int) -> Tensor:
    """Targets (C * ipc, C) in 64 bits, class by class."""
    return F.one_hot(class_major(train.num_classes, ipc, train.device), train.num_classes).double()


def columns(images: Tensor) -> Tensor:
    """(n, c, h, w) -> (d, n) in 64 bits."""
    return images.flatten(1).double().T


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


_DATA = "mnist cifar10 cifar100"
_VARIANTS = {  # the published run of each map (its Fourier variance is that of 784 pixels), and from real images
    "": (KRR(), KRR(), "Table 3, linear"),
    "fcnn": (KRR(map="fcnn"), KRR(map="fcnn"), "Tables 3 and 4, one LeakyReLU layer"),
    "fourier": (KRR(map="fourier"), KRR(map="fourier", variance=1e-3), "Table 3, random Fourier features"),
    "real": (KRR(init="real"), KRR(init="real"), "corollary 4.1.1 and Figure 2; config/distill.yaml"),
    "real-reg": (KRR(init="real", lambda_s="teacher"), KRR(init="real", lambda_s="teacher"),
                 "reg_s of config/distill.yaml, in no table"),
}  # fmt: skip
RECIPES = Recipes(
    *(
        small(
            "digits fashion14 photos16 photos32",
            ours,
            "own-ridge",
            variant=name,
            source="a closed form needs nothing small",
        )
        for name, (ours, _, _) in _VARIANTS.items()
    ),
    *(
        published(_DATA, (1, 10, 50), paper, "own-ridge", source, variant=name)
        for name, (_, paper, source) in _VARIANTS.items()
    ),
    two_cores(KRR(), protocol="own-ridge", source="a closed form: as published"),
    published("cifar100", 5, KRR(init="real"), "own-ridge", "Figure 2", variant="real"),
)
