r"""Distances of two clouds of points: optimal transport between the embeddings of a class (reconstructions, nothing is published).

$$\sum_c D\big(\{\psi_\theta(x_{c,i})\}_{i\le n},\ \{\psi_\theta(s_{c,j})\}_{j\le m}\big)$$

They match the whole cloud and not only its mean; with one image per class $W_2^2$ has the gradient of DM's distance exactly. Plans
and potentials are constants of the gradient (envelope theorem). A plan needs many more real than synthetic images: real batches
of at least five times the IPC. The mathematics is in ``lib.match.transport``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lib.match import transport
from lib.match.distance import At, Distance, Look
from lib.nets.convnet import ConvNet
from lib.nets.ensemble import Ensemble, apply
from lib.system.errors import CompanionError, positive, whole


@dataclass(frozen=True)
class Points(Distance):
    """The base: which points are compared.

    Attributes:
        pool: average the last map to pool x pool positions first (far fewer dimensions); 0: as it is.
        project: random directions that the embeddings are projected on, new at every step; 0: none.
    """

    pool: int = 0
    project: int = 0

    def __post_init__(self):
        whole(self, pool=0, project=0)

    @property
    def taps(self) -> tuple[str, ...]:
        return ("pool",) if self.pool else ()

    def check(self, network: nn.Module, ipc: int) -> None:
        super().check(network, ipc)
        if not self.pool:
            return
        side = (network.classifier.in_features // network.width) ** 0.5
        if self.pool > side:
            raise CompanionError(f"pool {self.pool} is larger than the last map: allowed 0 to {side:.0f}")

    def observe(self, look: Look) -> dict[str, Tensor]:
        if not self.pool:
            return {"points": look.embedding}
        maps = look.maps("pool")[-1]
        small = F.adaptive_avg_pool2d(maps.flatten(0, 1), self.pool).flatten(1)
        return {"points": small.unflatten(0, maps.shape[:2])}

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        x, y = real["points"], syn["points"]
        if self.project:  # scaled so that squared lengths are kept on average
            d = x.shape[-1]
            columns = transport.directions(d, self.project, at.generator, x) * (d / self.project) ** 0.5
            x, y = x @ columns, y @ columns
        return self.compare(x, y, at)

    @abstractmethod
    def compare(self, x: Tensor, y: Tensor, at: At) -> dict[str, Tensor]:
        """The term of points ``(C, n, d)`` and ``(C, m, d)``."""


@dataclass(frozen=True)
class Wasserstein(Points):
    r"""$W_p^p=\min_\gamma\mathbb E_\gamma\lVert X-Y\rVert^p$, exact; terms ``w1``, ``w2``. The other fields are Points'.

    Attributes:
        p: 1 or 2.
    """

    p: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.p not in (1, 2):
            raise CompanionError(f"order {self.p!r} of a Wasserstein distance is not allowed: 1 or 2")

    def compare(self, x: Tensor, y: Tensor, at: At) -> dict[str, Tensor]:
        return {f"w{self.p}": transport.wasserstein(x, y, self.p)}


@dataclass(frozen=True)
class Sinkhorn(Points):
    r"""$S_\varepsilon$; term ``sinkhorn``. The largest marginal error is in the history at every step, and told once if it is large.

    The other fields are Points'.

    Attributes:
        epsilon: times the median cost of the class's batch, above 0; sweeps: at most so many; it stops once the marginals agree.
    """

    epsilon: float = 0.05
    sweeps: int = 500

    def __post_init__(self):
        super().__post_init__()
        positive(self, "epsilon")
        whole(self, sweeps=1)

    def begin(self, train, generator: torch.Generator) -> Told:
        return Told()

    def compare(self, x: Tensor, y: Tensor, at: At) -> dict[str, Tensor]:
        value, error = transport.divergence_and_error(x, y, sweeps=self.sweeps, relative=self.epsilon)
        at.measured["marginal_error"] = error.max()
        tolerance = transport.default_tolerance(value)
        if at.memory is not None:
            at.memory.done += 1
            if not at.memory.told and error.max() > tolerance:
                at.memory.told = True
                warnings.warn(
                    f"Sinkhorn does not converge in {self.sweeps} sweeps: marginal error {error.max().item():.2g} at step "
                    f"{at.memory.done} (tolerance {tolerance:g}), said once; every step's is in history['marginal_error']",
                    stacklevel=2,
                )
        return {"sinkhorn": value}


@dataclass
class Told:
    """How many steps were done, and whether a failure was told."""

    done: int = 0
    told: bool = False

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.done, self.told = saved["done"], saved["told"]


@dataclass(frozen=True)
class Sliced(Points):
    r"""$d\,SW_2^2$; term ``sliced``. The factor d lets a shift of the mean count as in DM: $\mathbb E_u\langle u,v\rangle^2=|v|^2/d$.

    The other fields are Points'.

    Attributes:
        projections: directions, shared by the classes, new at every step; 1 or more.
    """

    projections: int = 128

    def __post_init__(self):
        super().__post_init__()
        whole(self, projections=1)

    def compare(self, x: Tensor, y: Tensor, at: At) -> dict[str, Tensor]:
        columns = transport.directions(x.shape[-1], self.projections, at.generator, x)
        return {"sliced": x.shape[-1] * transport.sliced(x, y, columns).mean(-1)}


# -- the dual, by learned critics -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Critic(Distance):
    r"""$W_1=\max_{\lVert\theta\rVert_{Lip}\le1}\mathbb E_T\theta-\mathbb E_S\theta$ with one learned $\theta_c$ per class (Gulrajani et al.
    2017); term ``critic``, and ``gradient_penalty`` in the history. The critics see pixels, because a new $\psi$ at every step
    changes the space of embeddings.

    Attributes:
        network: a name of ``lib.nets``, without batch norm, which would mix the samples; lr: of Adam, betas 0 and 0.9.
        steps: per step of the images, on that step's real batch; first: (50, 20): 20 in the first 50 steps of the images.
        penalty: of the critic's gradient norm, above 0.
    """

    looks: ClassVar[bool] = False

    network: str = "convnet-d2-w32-none-leaky"
    lr: float = 1e-4
    steps: int = 5
    first: tuple[int, int] = (50, 20)
    penalty: float = 10.0

    def __post_init__(self):
        positive(self, "lr", "penalty")
        whole(self, steps=1)

    def begin(self, train, generator: torch.Generator) -> Critics:
        single = replace(train, classes=("theta",))  # one output
        critics = Ensemble.make(self.network, single, [generator] * train.num_classes)
        return Critics(critics, torch.optim.Adam(critics.parameters.values(), lr=self.lr, betas=(0.0, 0.9)))

    def observe(self, look: Look) -> dict[str, Tensor]:
        return {"pixels": look.pixels}

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        """After some steps of the critics; gradient for the images alone."""
        x, y = real["pixels"], syn["pixels"]
        until, many = self.first
        for _ in range(many if at.memory.done < until else self.steps):
            penalty = self.improve(at.memory, x, y.detach(), at.generator)
        at.memory.done += 1
        at.measured["gradient_penalty"] = penalty
        return {"critic": transport.witness_gap(*(values(at.memory.critics, z, fixed=True) for z in (x, y)))}

    def improve(self, memory: Critics, real: Tensor, syn: Tensor, generator: torch.Generator) -> Tensor:
        r"""One step of all classes' critics: $\max\ \mathbb E_T\theta-\mathbb E_S\theta
        -\lambda\,\mathbb E(\lVert\nabla\theta(\hat x)\rVert-1)^2$, $\hat x$ on segments between random pairs."""
        critics, (classes, n) = memory.critics, real.shape[:2]
        pairs = torch.randint(syn.shape[1], (classes, n), generator=generator, device=generator.device)
        t = torch.rand(classes, n, 1, 1, 1, generator=generator, device=generator.device)
        partner = syn[torch.arange(classes, device=syn.device).unsqueeze(1), pairs]
        between = torch.lerp(real, partner, t).requires_grad_()
        (slope,) = torch.autograd.grad(values(critics, between).sum(), between, create_graph=True)
        penalty = (slope.flatten(2).norm(dim=-1) - 1).square().mean(-1).sum()
        gap = transport.witness_gap(values(critics, real), values(critics, syn)).sum()

        memory.optimiser.zero_grad()
        (self.penalty * penalty - gap).backward()
        memory.optimiser.step()
        return penalty.detach()


@dataclass
class Critics:
    """theta_c, one network per class, and their optimiser."""

    critics: Ensemble
    optimiser: torch.optim.Optimizer
    done: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": dict(self.critics.parameters),
            "optimiser": self.optimiser.state_dict(),
            "done": self.done,
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, tensor in self.critics.parameters.items():
            tensor.copy_(saved["weights"][name])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.done = saved["done"]


def values(critics: Ensemble, images: Tensor, fixed: bool = False) -> Tensor:
    r"""$\theta_c$ of the images ``(C, n, c, h, w)`` of class c, ``(C, n)``, all classes at once; ``fixed``: constant weights."""
    tensors = critics.parameters | critics.buffers
    tensors = {name: tensor.detach() for name, tensor in tensors.items()} if fixed else tensors
    if isinstance(critics.template, ConvNet):
        return apply(critics.template, tensors, images).squeeze(-1)

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(critics.template, weights, (x,))

    return vmap(one)(tensors, images).squeeze(-1)
