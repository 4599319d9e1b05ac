r"""ESP - Dataset Condensation via Expert Subspace Projection. Ma et al., Sensors 23(19):8148, 2023. A reconstruction: neither code nor
the body of the paper were at hand.

$$\theta'=\mathcal P_{\mathbb S}\big(\theta-\eta\,g_{\mathcal S}(\theta)\big),\qquad
\nabla_{\mathcal S}\,\ell_{\mathcal T}(\theta')
=-\eta\,\nabla_{\mathcal S}\big\langle g_{\mathcal S}(\theta),\ UU^\top g_{\mathcal T}(\theta')\big\rangle,\qquad g=\nabla_\theta\,\ell$$

The student takes one step on all of S and is projected on the subspace $\mathbb S=\theta^*_t+\mathrm{span}(U)$ of an expert's next K epochs
(``lib.match.subspace``); S moves so that the real loss at the projected weights falls. No unrolling: memory does not depend on how
long a way is followed.

From the abstract: the two stages, the projection on the subspace of an expert's trajectory, all of S at every step. It follows: the
gradient above. Ours: experts as in MTT, the affine span through the start, its truncation, a new expert every ``reset`` steps,
Adam, and all numbers. ``projection`` and ``objective`` are for ablations: "cos" and "l2" compare the projected gradients of S and T
at the student itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib.augment import augmented, families
from lib.data.imageset import ImageSet
from lib.formation.start import initial_pixels, pixel_set
from lib.match.subspace import CUT, Subspace
from lib.match.unroll import gradient
from lib.nets.experts import Experts
from lib.nets.flat import template
from lib.recipes import Recipes, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import choose, positive, whole

PROJECTIONS = ("global", "layer", "none")


@dataclass
class State:
    pixels: Tensor
    optimiser: torch.optim.Adam
    theta: Tensor  # the student, (1, P)
    basis: Tensor  # U, (P, r)
    reference: Tensor  # (P,)
    done: int
    experts: Tensor = field(metadata={"constant": True})
    template: Any = field(metadata={"constant": True})
    train: ImageSet = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})


@dataclass(frozen=True)
class ESP:
    """Ours; the paper's hyper-parameters are not known to us. The defaults are proposed for CIFAR-10.

    Attributes:
        iterations: updates of the images, 0 or more; window: K, epochs that span the subspace; start_epochs: $T^+$, of which the
            student's first is drawn; reset: steps with one expert; the last three 1 or more.
        eta: of the student's step; lr: of the pixels (Adam); both above 0.
        real_batch: real images of all classes in a step.
        network, init, augmentation: as DM's.
        projection: "global"; "layer": a span for every tensor of weights; "none"; objective: "inner", "cos" or "l2".
        cut: directions with less than this part of the largest eigenvalue are left out.
        experts: how they are trained (``lib.nets.experts``).
    """

    iterations: int = 10_000
    window: int = 10
    start_epochs: int = 20
    reset: int = 10
    eta: float = 0.01
    lr: float = 0.005
    real_batch: int = 256
    network: str = "convnet-d3-w128"
    init: str = "real"
    augmentation: str = "data"
    projection: str = "global"
    objective: str = "inner"
    cut: float = CUT
    experts: Experts = Experts()

    def __post_init__(self) -> None:
        choose("projection", self.projection, dict.fromkeys(PROJECTIONS))
        choose("objective", self.objective, OBJECTIVES)
        whole(self, iterations=0, window=1, start_epochs=1, reset=1, real_batch=1)
        positive(self, "eta", "lr")

    @property
    def reach(self) -> int:
        """The last epoch of an expert that is read."""
        return self.start_epochs - 1 + self.window

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def with_steps(self, count: int, ipc: int = 1) -> ESP:
        """The same method with ``count`` updates of the images."""
        return replace(self, iterations=count)

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        pixels = initial_pixels(train, ipc, self.init, generator).requires_grad_()
        optimiser = torch.optim.Adam([pixels], lr=self.lr)
        experts, like = self.experts.record(self.network, train, self.reach), template(self.network, train)
        theta, basis = (
            torch.zeros(shape, device=train.device)
            for shape in ((1, experts.shape[2]), (experts.shape[2], 0))
        )
        return State(pixels, optimiser, theta, basis, theta[0].clone(), 0, experts, like, train, ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of the student, one of the images."""
        if state.done % self.reset == 0:
            self.new_expert(state, generator)
        P, like = Subspace(state.basis, state.reference), state.template
        names, train = families(self.augmentation, state.train), state.train
        S = augmented(state.pixels, names, generator)
        labels = class_major(train.num_classes, state.ipc, S.device)
        rows = torch.randint(len(train), (self.real_batch,), generator=generator, device=S.device)
        x, y = augmented(train.images[rows], names, generator).unsqueeze(0), train.labels[rows].unsqueeze(0)

        theta = state.theta.requires_grad_()
        entropy, g_S = gradient(like, theta, S.unsqueeze(0), labels.unsqueeze(0), graph=True)  # (1, P)
        moved = (theta - self.eta * g_S).detach()
        projected = moved if self.projection == "none" else P.project_point(moved)
        loss, g_T = gradient(like, projected.requires_grad_(), x, y)
        inside = g_S if self.projection == "none" else P.project_vector(g_S)
        aim = OBJECTIVES[self.objective](
            inside, g_T if self.objective == "inner" else self.at(state, P, x, y), self.eta
        )

        state.optimiser.zero_grad()
        aim.backward(inputs=[state.pixels])
        state.optimiser.step()
        state.theta = projected.detach()
        state.done += 1
        share = P.project_vector(g_S.detach()).square().sum() / g_S.detach().square().sum()
        return {"loss": loss[0], "synthetic": entropy[0], "inside": share}

    def at(self, state: State, P: Subspace, x: Tensor, y: Tensor) -> Tensor:
        """The real gradient at the student before its step, in the span."""
        g = gradient(state.template, state.theta, x, y)[1]
        return g if self.projection == "none" else P.project_vector(g)

    def new_expert(self, state: State, generator: torch.Generator) -> None:
        """A student at a random epoch t < T+ of a random expert, and the span of the next K epochs."""
        k, t = (
            int(torch.randint(n, (), generator=generator, device=generator.device))
            for n in (len(state.experts), self.start_epochs)
        )
        way = state.experts[k, t : t + self.window + 1].to(state.pixels.device)
        layers = [parameter.numel() for parameter in state.template.parameters()]
        span = Subspace.through(way, self.cut, layers if self.projection == "layer" else None)
        state.theta, state.basis, state.reference = way[:1].clone(), span.basis, span.reference.clone()

    def finish(self, state: State) -> SyntheticSet:
        return pixel_set(state.pixels, state.train, state.ipc)


def _inner(a: Tensor, c: Tensor, eta: float) -> Tensor:
    return -eta * (a * c).sum()


def _cosine(a: Tensor, c: Tensor, eta: float) -> Tensor:
    return 1 - (a * c).sum() / (a.norm() * c.norm())


def _relative(a: Tensor, c: Tensor, eta: float) -> Tensor:
    return (a - c).square().sum() / c.square().sum()


OBJECTIVES = {"inner": _inner, "cos": _cosine, "l2": _relative}
_SMALL = ESP(
    iterations=200, window=3, start_epochs=3, eta=0.05, lr=0.03, network="convnet-d2-w32", augmentation="none",
    experts=Experts(6, lr=0.05, batch=64, augmentation="none"),
)  # fmt: skip
_DEEP = replace(
    _SMALL, network="convnet-d3-w32", experts=replace(_SMALL.experts, count=3, lr=0.02), real_batch=128
)
_UNTRIED = "the settings of digits with a deeper network, not chosen on these data"
_CHOSEN = "pixel rate chosen among three by a fifth of the training images"
RECIPES = Recipes(
    small("digits", replace(_SMALL, lr=0.01), source=_CHOSEN),
    small("fashion14", _DEEP, source=_CHOSEN),
    small("photos16 photos32", _DEEP, source=_UNTRIED),
)
