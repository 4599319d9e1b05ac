r"""WassersteinDM - distribution matching by optimal transport. A reconstruction: no paper or code of it is published.

"Dataset Condensation by Minimizing Wasserstein Distance" (Chen et al. 2024) is known by name and by its definition alone,

$$W_1(\mu,\nu)=\max_{\lVert\theta\rVert_{Lip}\le1}|\mathbb E_\mu\theta-\mathbb E_\nu\theta|
 =\min_{\gamma\in\Gamma(\mu,\nu)}\mathbb E_\gamma\lVert X-Y\rVert .$$

Here every step is DM's, with the distance of the class means replaced by a distance D of the two sets of embeddings,

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c D\big(\{\psi_\theta(\mathcal A_\omega(x_{c,i}))\}_{i\le n},
 \{\psi_\theta(\mathcal A_\omega(s_{c,j}))\}_{j\le m}\big),$$

which matches the whole cloud and not only its mean; with one image per class $W_2^2$ has DM's gradient exactly. No numbers are
published, so none are quoted. Plans and potentials are constants of the gradient (envelope theorem). The critics see pixels,
because a new $\psi$ at every step changes the space; learned weights of the synthetic images are left out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from lib.formation import by_class
from lib.match import features, transport
from lib.methods import dm
from lib.methods.dm import DM
from lib.nets.convnet import ConvNet
from lib.nets.ensemble import Ensemble, apply
from lib.system.errors import CompanionError, unknown

DISTANCES = ("mean", "w1", "w2", "sinkhorn", "sliced", "critic")


@dataclass
class State(dm.State):
    """DM's, and what the distance keeps from step to step."""

    critics: Ensemble | None  # theta_c, one network per class
    critic_optimiser: torch.optim.Optimizer | None
    done: int = 0
    told: bool = False  # that Sinkhorn did not converge
    measured: dict[str, Tensor] = field(default_factory=dict, metadata={"constant": True})  # at this step
    generator: torch.Generator | None = field(default=None, metadata={"constant": True})  # of this step


@dataclass(frozen=True)
class WassersteinDM(DM):
    """DM's hyper-parameters (nothing is published), and those of the distances.

    A plan needs many more real than synthetic images: ``real_batch`` should be at least five times the IPC.
    """

    distance: str = (
        "w2"  # W_2^2 | w1 | sinkhorn (S_eps) | sliced (d SW_2^2) | critic (dual of W_1) | mean (DM)
    )
    pool: int = 0  # average the last map to pool x pool positions first (far fewer dimensions); 0: as it is
    project: int = (
        0  # random directions that the embeddings are projected on first, new at every step; 0: none
    )
    epsilon: float = 0.05  # sinkhorn: times the median cost of the class's batch
    sweeps: int = 500  # sinkhorn: at most; it stops once the marginals agree
    projections: int = 128  # sliced: directions, shared by the classes, new at every step
    critic: str = "convnet-d2-w32-none-leaky"  # on pixels; no batch norm, which would mix the samples
    critic_lr: float = 1e-4  # Adam, betas 0 and 0.9 (Gulrajani et al. 2017)
    critic_steps: int = 5  # per step of the images, on that step's real batch
    critic_first: tuple[int, int] = (50, 20)  # in the first 50 steps of the images: 20
    penalty: float = 10.0  # of the critic's gradient norm

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise unknown("distance", self.distance, DISTANCES)
        for name in ("epsilon", "critic_lr", "penalty"):
            if not getattr(self, name) > 0:
                raise CompanionError(f"{name} {getattr(self, name)!r} is not allowed: it must be positive")
        for name, least in (
            ("sweeps", 1),
            ("projections", 1),
            ("critic_steps", 1),
            ("pool", 0),
            ("project", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise CompanionError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.distance == "critic" and (self.pool or self.project):
            raise CompanionError("the critic looks at pixels: pool and project must be 0 with it")

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        base, critics, optimiser = super().begin(train, ipc, generator), None, None
        if self.distance == "critic":
            single = replace(train, classes=("theta",))  # one output
            critics = Ensemble.make(self.critic, single, [generator] * train.num_classes)
            optimiser = torch.optim.Adam(critics.parameters.values(), lr=self.critic_lr, betas=(0.0, 0.9))
        if self.pool:
            self._check_pool(base.network, train.images[:1])
        return State(**vars(base), critics=critics, critic_optimiser=optimiser)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        state.generator = generator
        metrics = super().step(state, generator)
        state.done += 1
        return metrics | state.measured

    def encoder(self, state: State, generator: torch.Generator) -> torch.nn.Module:
        return state.network if self.distance == "critic" else super().encoder(state, generator)

    def observe(self, network: torch.nn.Module, images: Tensor) -> list[Tensor]:
        if self.distance == "critic":
            return [images]
        if not self.pool:
            return super().observe(network, images)
        maps = network.taps(images.flatten(0, 1))[-1]
        return [by_class(F.adaptive_avg_pool2d(maps, self.pool).flatten(1), len(images))]

    def terms(self, state: State, real: list[Tensor], syn: list[Tensor]) -> dict[str, Tensor]:
        if self.distance == "critic":
            return {"critic": self.dual(state, real[0], syn[0])}
        return {self.distance: self.primal(state, *self.projected(state, real[0], syn[0]))}

    def projected(self, state: State, real: Tensor, syn: Tensor) -> tuple[Tensor, Tensor]:
        """Both sets on the same random directions, scaled so that squared lengths are kept on average."""
        if not self.project:
            return real, syn
        d = real.shape[-1]
        columns = transport.directions(d, self.project, state.generator, real) * (d / self.project) ** 0.5
        return real @ columns, syn @ columns

    def primal(self, state: State, real: Tensor, syn: Tensor) -> Tensor:
        """The distance of embeddings ``(C, n, d)`` and ``(C, m, d)``, ``(C,)``."""
        if self.distance == "mean":
            return features.class_mean(real, syn)
        if self.distance in ("w1", "w2"):
            return transport.wasserstein(real, syn, int(self.distance[1]))
        if self.distance == "sinkhorn":
            return self.sinkhorn(state, real, syn)
        # The factor d lets a shift of the mean count as much as in DM: E_u <u, v>^2 = |v|^2 / d.
        columns = transport.directions(real.shape[-1], self.projections, state.generator, real)
        return real.shape[-1] * transport.sliced(real, syn, columns).mean(-1)

    def sinkhorn(self, state: State, real: Tensor, syn: Tensor) -> Tensor:
        r"""$S_\varepsilon$; the largest marginal error is a metric of every step, and is told once if it is too large."""
        value, error = transport.divergence_and_error(real, syn, sweeps=self.sweeps, relative=self.epsilon)
        state.measured = {"marginal_error": error.max()}
        tolerance = transport.default_tolerance(value)
        if not state.told and error.max() > tolerance:
            state.told = True
            warnings.warn(
                f"Sinkhorn does not converge in {self.sweeps} sweeps: marginal error {error.max().item():.2g} at step "
                f"{state.done + 1} (tolerance {tolerance:g}), said once; every step's is in history['marginal_error']",
                stacklevel=2,
            )
        return value

    def dual(self, state: State, real: Tensor, syn: Tensor) -> Tensor:
        r"""$\mathbb E_T\theta_c-\mathbb E_S\theta_c$ after some steps of the critics; gradient for the images alone."""
        first, many = self.critic_first
        for _ in range(many if state.done < first else self.critic_steps):
            penalty = self.improve(state, real, syn.detach())
        state.measured = {"gradient_penalty": penalty}
        return transport.witness_gap(*(values(state.critics, x, fixed=True) for x in (real, syn)))

    def improve(self, state: State, real: Tensor, syn: Tensor) -> Tensor:
        r"""One step of all classes' critics: $\max\ \mathbb E_T\theta-\mathbb E_S\theta
        -\lambda\,\mathbb E(\lVert\nabla\theta(\hat x)\rVert-1)^2$, $\hat x$ on segments between random pairs."""
        critics, generator = state.critics, state.generator
        classes, n = real.shape[:2]
        pairs = torch.randint(syn.shape[1], (classes, n), generator=generator, device=generator.device)
        t = torch.rand(classes, n, 1, 1, 1, generator=generator, device=generator.device)
        partner = syn[torch.arange(classes, device=syn.device).unsqueeze(1), pairs]
        between = torch.lerp(real, partner, t).requires_grad_()
        (slope,) = torch.autograd.grad(values(critics, between).sum(), between, create_graph=True)
        penalty = (slope.flatten(2).norm(dim=-1) - 1).square().mean(-1).sum()
        gap = transport.witness_gap(values(critics, real), values(critics, syn)).sum()

        state.critic_optimiser.zero_grad()
        (self.penalty * penalty - gap).backward()
        state.critic_optimiser.step()
        return penalty.detach()

    def _check_pool(self, network: torch.nn.Module, image: Tensor) -> None:
        if not isinstance(network, ConvNet):
            raise CompanionError(f"pool {self.pool} needs a ConvNet, not {self.network!r}: allowed is 0")
        side = network.taps(image)[-1].shape[-1]
        if self.pool > side:
            raise CompanionError(
                f"pool {self.pool} is larger than the last map of {self.network!r}: allowed 0 to {side}"
            )


def values(critics: Ensemble, images: Tensor, fixed: bool = False) -> Tensor:
    r"""$\theta_c$ of the images ``(C, n, c, h, w)`` of class c, ``(C, n)``, all classes at once; ``fixed``: constant weights."""
    tensors = critics.parameters | critics.buffers
    tensors = {name: tensor.detach() for name, tensor in tensors.items()} if fixed else tensors
    if isinstance(critics.template, ConvNet):
        return apply(critics.template, tensors, images).squeeze(-1)

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(critics.template, weights, (x,))

    return vmap(one)(tensors, images).squeeze(-1)


_W2 = WassersteinDM()
# As DM's, for nothing is published; on the small photographs the noise of small batches' plans asks for a lower rate.
# W_1 has unit vectors for gradients: its rate is multiplied by a typical displacement.
PRESETS = {
    "digits": WassersteinDM(iterations=200, real_batch=64, network="convnet-d2-w32", augmentation="none"),
    "photos16": WassersteinDM(iterations=200, lr=0.3, real_batch=64, network="convnet-d3-w32"),
    "photos32": WassersteinDM(iterations=200, lr=0.3, real_batch=64, network="convnet-d3-w32"),
    "paper": _W2,
    "paper-tinyimagenet": replace(_W2, iterations=10_000, network="convnet-d4-w128"),
    "paper-w1": replace(_W2, distance="w1", lr=10.0),
    "paper-sinkhorn": replace(_W2, distance="sinkhorn"),
    "paper-sliced": replace(_W2, distance="sliced"),
    "paper-critic": replace(_W2, distance="critic", lr=10.0),
}
