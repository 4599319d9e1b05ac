r"""RCIG - Dataset Distillation with Convexified Implicit Gradients. Loo, Hasani, Lechner & Rus, ICML 2023, arXiv 2302.06755.

$$\frac{dL_T}{d\psi}=\frac{\partial L_T(\delta,\psi)}{\partial\psi}
-\frac{\partial}{\partial\psi}\Big\langle v,\frac{\partial L_S(\delta,\psi)}{\partial\delta}\Big\rangle,\qquad
v=\Big(\frac{\partial^2L_S}{\partial\delta^2}\Big)^{-1}\frac{\partial L_T}{\partial\delta},\qquad
\delta=\arg\min L_S(\cdot,\psi),\quad\psi=(X_s,Y_s,\tau)$$

The network of a pool (FRePo's) is replaced by its first-order expansion in the weights; the last layer given the displacement
$\delta$ of the others is a ridge regression, and the inner loss $L_S$ is quadratic in $\delta$ (``lib.kernels.linearised``). Then

$$P=o_t+\phi_t\phi_s^\top(K+\lambda I)^{-1}(Y_s-o_s),\qquad
L_T=\mathrm{CE}(e^\tau P)-\mathrm{mean}_j\min\big(y_{s,j}^{(1)}-y_{s,j}^{(2)},\tfrac1{2C}\big),\qquad o=J\delta .$$

Without displacement this is FRePo with another loss; without the implicit term, the gradient at a fixed $\delta$.

Paper and code: the minus sign is the theorem's and the code's. ``solver="adam"`` is the published one, 20 steps for $\delta$ and 20 for
$v$; ``exact`` solves both with one Cholesky factor and has no rates to tune. Of the code's Adam three small accidents are left out: a
step count and a momentum inherited from the pool's training, and a displacement of the last kernel by the raw gradient. Its $v$, but
not its $\delta$, ranges over the last kernel too, which ``adam`` keeps. Left out: gradients of random parts of large sets and batches
only, and whitening of high resolutions in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lib.formation.start import initial_pixels
from lib.kernels import ridge
from lib.kernels.adam_rates import adapted, falls, tuned
from lib.kernels.linearised import SOLVERS, Inner, adam, conjugate_gradient, gradient_along, predict
from lib.nets.tangent import TangentNet
from lib.optim.adabelief import AdaBelief
from lib.recipes import Recipes, published, small
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, check_several, choose, positive, whole

LOSSES = ("platt", "mse")
MEMORY = 0.99  # of the running mean that is the result
LOOK_EVERY = 50  # steps between two looks at the rate of the inner Adam
TUNING_SEED = 0  # of the network of all trials


@dataclass
class State:
    pixels: Tensor  # X_s, (m, c, h, w)
    labels: Tensor  # Y_s, (m, C)
    log_scale: Tensor  # tau
    optimiser: AdaBelief
    mean_pixels: Tensor  # running means, without their bias correction
    mean_labels: Tensor
    pool: nn.ModuleList  # M networks
    trainer: torch.optim.Adam  # of all of them; a step moves those with a gradient
    ages: list[int]  # training steps since a network was drawn
    rates: list[float]  # of the inner Adam and of Adam for v
    looks: list[int]  # since the last look: runs, those that ended above their start, those that always fell
    done: int
    train: object = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})


@dataclass(frozen=True)
class RCIG:
    r"""Hyper-parameters of the published configurations.

    Attributes:
        iterations: updates, 0 or more; networks: M, the pool; online_updates: training steps after which a network is drawn anew;
            most_updates: a used one is trained 1 to so many steps.
        lr: of images and labels; lr_scale: of $\tau$; lr_network: of the pool; above 0.
        real_batch: real images of all classes in a step; ridge: $\lambda$, times the number of stored images, above 0.
        width, depth: channels of the first block, and blocks; softplus: $\beta$, 0: ReLU; flip: add mirror images to the support.
        displaced: False: $\delta=0$; implicit: the second term, of which there is none without displacement.
        solver: "adam", "exact" or "cg"; solver_steps: of adam and cg; lr_inner: of Adam for $\delta$, None: tuned, as published;
            lr_solver: of Adam for v, None: alike.
        loss: "platt", or "mse", without $e^\tau$; init: where images start: "real" or "noise".
    """

    iterations: int = 10_000
    networks: int = 30
    online_updates: int = 100
    most_updates: int = 15
    lr: float = 3e-3
    lr_scale: float = 3e-2
    lr_network: float = 5e-5
    real_batch: int = 1024
    ridge: float = 5e-4
    width: int = 128
    depth: int = 3
    softplus: float = 60.0
    flip: bool = True
    displaced: bool = True
    implicit: bool = True
    solver: str = "adam"
    solver_steps: int = 20
    lr_inner: float | None = None
    lr_solver: float | None = None
    loss: str = "platt"
    init: str = "real"

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        self.check()
        check_several(train.num_classes, "RCIG")
        pixels = initial_pixels(train, ipc, self.init, generator).requires_grad_()
        hard = class_major(train.num_classes, ipc, pixels.device)
        labels = ridge.centred_one_hot(hard, train.num_classes, pixels.dtype).requires_grad_()
        log_scale = pixels.new_zeros(()).requires_grad_()
        groups = [{"params": [pixels, labels]}, {"params": [log_scale], "lr": self.lr_scale}]
        pool = nn.ModuleList(self.network(train, generator) for _ in range(self.networks))
        trainer = torch.optim.Adam(pool.parameters(), lr=self.lr_network, fused=True)
        means = (torch.zeros_like(pixels), torch.zeros_like(labels))
        state = State(pixels, labels, log_scale, AdaBelief(groups, lr=self.lr), *means, pool, trainer,
                      [0] * self.networks, [0.0, 0.0], [0, 0, 0], 0, train, ipc)  # fmt: skip
        if self.displaced and self.solver == "adam":
            self.tune(state)
        return state

    def network(self, train, generator: torch.Generator) -> TangentNet:
        """A new network; published Adam for v ranges over the last kernel, too."""
        network = TangentNet(train, self.width, self.depth, self.softplus, self.solver == "adam")
        network = network.to(train.images)
        network.reset(generator)
        return network.requires_grad_(False)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of images, labels and tau in the expansion of one network of the pool, and some training of that network."""
        k = int(torch.randint(self.networks, (), generator=generator, device=generator.device))
        network, batch = state.pool[k].requires_grad_(False), self.batch(state.train, generator)
        learned = (state.pixels, state.labels, state.log_scale)
        loss, direct, implicit, metrics, seen = self.gradients(network, learned, batch, state.rates)

        for psi, d, i in zip(learned, direct, implicit, strict=True):
            psi.grad = d + clipped(i, d)
        state.optimiser.step()
        state.mean_pixels.lerp_(state.pixels.detach(), 1 - MEMORY)
        state.mean_labels.lerp_(state.labels.detach(), 1 - MEMORY)

        self.advance(state, k, generator)
        if seen is not None:
            self.adapt(state, seen)
        state.done += 1
        return {"loss": loss.float(), "scale": state.log_scale.detach().exp()} | metrics

    def gradients(self, network: TangentNet, learned, batch, rates=(0.0, 0.0)):
        """Of L_T with respect to ``learned`` = (X_s, Y_s, tau): loss, direct and implicit parts, metrics, Adam's objectives for delta."""
        lam, seen = self.ridge * len(learned[0]), None  # mirror images do not count
        if not self.displaced:
            loss = self.objective(network, *learned, None, *batch)
            direct = torch.autograd.grad(loss, learned, materialize_grads=True)
            return loss.detach(), direct, [torch.zeros_like(d) for d in direct], {}, seen

        inner = Inner.at(network, *self.support(*learned[:2]), lam)
        delta, seen = self.minimiser(inner, rates[0])
        loss = self.objective(network, *learned, delta.requires_grad_(), *batch)
        *direct, g = torch.autograd.grad(loss, (*learned, delta), materialize_grads=True)
        if not self.implicit:
            return loss.detach(), direct, [torch.zeros_like(d) for d in direct], {}, seen

        v, _ = self.solve(inner, g, rates[1])
        along = gradient_along(v, network, *self.support(*learned[:2]), lam, delta.detach())
        implicit = torch.autograd.grad(-along, learned, materialize_grads=True)
        ratio = implicit[0].norm() / direct[0].norm()
        metrics = {"ratio": ratio, "residual": (inner.hessian(v) - g).norm() / g.norm()}
        return loss.detach(), direct, implicit, metrics, seen

    def batch(self, train, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Real images and classes, drawn without replacement."""
        rows = torch.randperm(len(train), generator=generator, device=train.device)[: self.real_batch]
        return train.images[rows], train.labels[rows]

    def support(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """X_s and Y_s as they are used: with the mirror images."""
        return (torch.cat([pixels, pixels.flip(3)]), labels.repeat(2, 1)) if self.flip else (pixels, labels)

    def minimiser(self, inner: Inner, lr: float) -> tuple[Tensor, Tensor | None]:
        """delta (P,), and what Adam's objective was before each of its steps."""
        if self.solver == "exact":
            return inner.minimiser(), None
        return self.solve(inner, inner.b, lr, kernel=False)

    def solve(self, inner: Inner, g: Tensor, lr: float, kernel: bool = True) -> tuple[Tensor, Tensor | None]:
        """H^-1 g (P,) by the solver of that name; without ``kernel`` Adam leaves the last kernel where it is."""
        if self.solver == "exact":
            return inner.inverse(g), None
        if self.solver == "cg":
            return conjugate_gradient(inner.hessian, g, self.solver_steps), None
        moving = 1.0 if kernel else inner.network.without_kernel()
        return adam(inner.hessian, g, self.solver_steps, lr, moving)

    def objective(self, network, pixels, labels, log_scale, delta, x_t: Tensor, y_t: Tensor) -> Tensor:
        """L_T on real images (n, c, h, w) of classes ``y_t`` (n,), as a function of set and displacement."""
        prediction = predict(network, *self.support(pixels, labels), self.ridge * len(pixels), delta, x_t)
        if self.loss == "platt":
            return ridge.platt(prediction, y_t, log_scale) + ridge.margin(labels, 0.5)
        return ridge.mse(prediction, ridge.centred_one_hot(y_t, labels.shape[1])) + ridge.margin(labels, 0.5)

    def advance(self, state: State, k: int, generator: torch.Generator) -> None:
        """Train the used network on the set as it is now, 1 to 15 full steps; draw it anew when it is old."""
        network = state.pool[k].requires_grad_(True)
        x, y = self.support(state.pixels.detach(), state.labels.detach())
        steps = 1 + int(torch.randint(self.most_updates, (), generator=generator, device=generator.device))
        for _ in range(steps):
            ridge.mse(network(x), y).backward()
            state.trainer.step()
            state.trainer.zero_grad()
        state.ages[k] += steps
        if state.ages[k] >= self.online_updates:
            network.reset(generator)
            for parameter in network.parameters():
                state.trainer.state.pop(parameter, None)
            state.ages[k] = 0

    def tune(self, state: State) -> None:
        """Adam's two rates: grow each by a fifth until a run from 0 on the initial set does not fall at every step, then go back."""
        own = torch.Generator(state.train.device).manual_seed(TUNING_SEED)
        network, batch = self.network(state.train, own), self.batch(state.train, own)
        learned = (state.pixels, state.labels, state.log_scale)
        inner = Inner.at(network, *self.support(*learned[:2]), self.ridge * len(state.pixels))
        state.rates[0] = self.lr_inner or tuned(lambda lr: self.minimiser(inner, lr)[1], 1e-5)
        delta = self.minimiser(inner, state.rates[0])[0].requires_grad_()
        (g,) = torch.autograd.grad(self.objective(network, *learned, delta, *batch), delta)
        state.rates[1] = self.lr_solver or tuned(lambda lr: self.solve(inner, g, lr)[1], 5e-5)

    def adapt(self, state: State, seen: Tensor) -> None:
        """Every 50 steps, lower the inner rate if 29 % of the runs ended above their start, raise it if 70 % fell at every step."""
        state.looks[0] += 1
        state.looks[1] += int(seen[-1] > seen[0])
        state.looks[2] += int(falls(seen))
        runs, above, fell = state.looks
        if runs == LOOK_EVERY:
            state.rates[0] *= adapted(above / runs, fell / runs)
            state.looks = [0, 0, 0]

    def finish(self, state: State) -> SyntheticSet:
        """The running means of images and labels (of the start: itself)."""
        share, train = 1 - MEMORY**state.done, state.train
        means = (
            (state.mean_pixels / share, state.mean_labels / share)
            if state.done
            else (state.pixels, state.labels)
        )
        images, labels = (tensor.detach().clone() for tensor in means)
        return SyntheticSet(images, labels, train.classes, train.transform)

    def check(self) -> None:
        choose("solver", self.solver, dict.fromkeys(SOLVERS))
        choose("loss", self.loss, dict.fromkeys(LOSSES))
        ones = ("networks", "online_updates", "most_updates", "real_batch", "width", "depth", "solver_steps")
        whole(self, **dict.fromkeys(ones, 1))
        positive(self, "ridge", "lr", "lr_scale", "lr_network")
        if not self.softplus >= 0:
            raise CompanionError(f"softplus {self.softplus:g}; allowed: 0 (ReLU) or more")
        for name in ("lr_inner", "lr_solver"):
            if getattr(self, name) is not None:
                positive(self, name)


def clipped(gradient: Tensor, other: Tensor) -> Tensor:
    """``gradient``, shortened to the length of ``other`` if it is longer; 0 where it is no number."""
    return gradient.nan_to_num(0) * (other.norm() / gradient.norm()).nan_to_num(0).clamp_max(1)


_SMALL = RCIG(
    iterations=150, networks=4, lr=3e-2, real_batch=128, width=16, depth=2, solver="exact", flip=False
)
_FASHION = replace(_SMALL, iterations=80)
_DEEP = RCIG(depth=4, softplus=0.0)
_HIGH = RCIG(depth=5, softplus=0.0, ridge=0.05)
_CONFIG, _BLOCKS = "published configurations", "theirs are whitened in blocks"
_NO_FLIP = RCIG(flip=False)
RECIPES = Recipes(
    small("digits", _SMALL, "own-rfad"),
    small("fashion14", _FASHION, "own-rfad"),
    published("mnist fashionmnist", (1, 10, 50), _NO_FLIP, "own-rcig", _CONFIG),
    published("cifar10", 1, RCIG(iterations=15_000), "own-rcig", _CONFIG, whiten="zca"),
    published("cifar10 cifar100", (10,), RCIG(), "own-rcig", _CONFIG, whiten="zca"),
    published("cifar10", 50, RCIG(), "own-rcig", _CONFIG, whiten="zca"),
    published("cifar100", 1, RCIG(), "own-rcig", _CONFIG, whiten="zca"),
    published("cifar100", 50, _NO_FLIP, "own-rcig", f"{_CONFIG}: no flips", whiten="zca"),
    published("tinyimagenet", 1, replace(_DEEP, iterations=5000), "own-rcig", _CONFIG, whiten="zca"),
    published("tinyimagenet", 10, replace(_DEEP, flip=False), "own-rcig", f"{_CONFIG}: no flips", whiten="zca"),
    published("imagenet", (1, 2), replace(_DEEP, flip=False), "own-rcig", f"{_CONFIG}: 64 pixels, no flips; {_BLOCKS}", whiten="zca"),
    published("imagenette imagewoof", (1, 10), _HIGH, "own-rcig", f"{_CONFIG}: 128 pixels; {_BLOCKS}"),
)  # fmt: skip
