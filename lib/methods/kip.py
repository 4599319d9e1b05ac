r"""KIP and Label Solve. Nguyen, Chen & Lee, *Dataset Meta-Learning from Kernel Ridge-Regression*, ICLR 2021, arXiv 2011.00050
(fully-connected kernels); Nguyen, Novak, Xiao & Lee, NeurIPS 2021, arXiv 2107.13034 (convolutional kernels, :class:`ConvKIP`).

$$\min_{X_s,\,y_s}\ \tfrac12\operatorname{mean}\big(\hat y_t-y_t\big)^2,\qquad
\hat y_t=K_{ts}\big(K_{ss}+\lambda\tfrac{\operatorname{tr}K_{ss}}mI\big)^{-1}y_s$$

with the NTK of an infinitely wide network, so that $\hat y_t$ is what that network says after training on the set to
convergence: no inner loop. Labels are one-hot minus 1/C. They stay (``learn_labels`` false), move with the images, or are
solved for on all training images (Label Solve, the case of 0 iterations):

$$y_s^*=\big(K_{ts}(K_{ss}+\bar\lambda I)^{-1}\big)^+y_t .$$

Labels that were learned or solved for are targets of a regression: real numbers, stored as (m, C) soft labels.

Paper and code: the mean is over all entries, targets and classes, as in the code (the paper writes a squared norm). The
published Label Solve has a ridge of its own, lambda / m, not scaled by the trace; it is ``labels="solve-published"``. The
published augmentation (rotation, shift, flip, change of channels of each target on its own) is replaced by a family of
:mod:`lib.augment` per target. Whitening is a matter of the data: ``lib.data.load(..., whiten="zca-kip")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lib import augment
from lib.augment import families
from lib.formation.start import INITIAL, initial_pixels
from lib.kernels import conv, fc, ridge
from lib.recipes import Recipes, published, small, two_cores
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError, unknown

KINDS = ("ntk", "nngp")
LABELS = ("hard", "solve", "solve-published")
PRECISIONS = ("float64", "mixed")
TARGETS_AT_ONCE = 1000  # of Label Solve, which sees all training images

Kernel = Callable[..., Tensor]  # images (n1, c, h, w) and, unless the same, (n2, c, h, w) -> (n1, n2)


@dataclass
class State:
    """The support set in 64 bits: images (m, c, h, w), class-major, and labels (m, C)."""

    pixels: Tensor
    labels: Tensor
    optimiser: torch.optim.Optimizer
    train: object = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})


@dataclass(frozen=True)
class KIP:
    r"""Hyper-parameters of the published notebook for fully-connected kernels (CIFAR-10, 100 images).

    Attributes:
        iterations: updates, 0 or more; lr: of Adam, for images and labels.
        target_batch: real images per step, as many of every class; all of the smallest class where it has fewer.
        ridge: $\lambda$, times the mean of the diagonal, 0 or more.
        learn_labels: labels are learned, too; labels: at the start, "hard": centred one-hot, or solved for, "solve" or "solve-published".
        init: where images start: "real" or "noise"; augmentation: of the targets, each on its own: a strategy of ``lib.augment``, or
            "data".
        depth: hidden layers, 0 or more; kind: "ntk"; "nngp": only the last layer is trained; width: None: NTK parameterisation; a number:
            standard parameterisation of that width; sigma_w, sigma_b: deviations of weights and biases.
        precision: "float64"; "mixed": $K_{ts}$ in 32 bits, $K_{ss}$ and the solution in 64.
    """

    iterations: int = 1000
    lr: float = 0.04
    target_batch: int = 5000
    ridge: float = 1e-6
    learn_labels: bool = False
    labels: str = "hard"
    init: str = "real"
    augmentation: str = "none"
    depth: int = 1
    kind: str = "ntk"
    width: int | None = None
    sigma_w: float = fc.SIGMA_W
    sigma_b: float = fc.SIGMA_B
    precision: str = "float64"

    def __post_init__(self):
        named = {"labels": LABELS, "init": INITIAL, "kind": KINDS, "precision": PRECISIONS}
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        for name, low in (("iterations", 0), ("target_batch", 1), ("depth", 0), ("ridge", 0), ("lr", 0)):
            if not getattr(self, name) >= low:
                raise CompanionError(f"{name} {getattr(self, name):g}; allowed: {low} or more")

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        if self.target_batch < train.num_classes:
            raise CompanionError(
                f"{self.target_batch} targets of {train.num_classes} classes; allowed: one of each or more"
            )
        pixels = initial_pixels(train, ipc, self.init, generator).double()
        labels = ridge.centred_one_hot(class_major(train.num_classes, ipc, train.device), train.num_classes)
        if self.labels != "hard":
            labels = self.solved(pixels, train)
        pixels.requires_grad_()
        learned = [pixels, labels.requires_grad_()] if self.learn_labels else [pixels]
        return State(pixels, labels, torch.optim.Adam(learned, lr=self.lr), train, ipc)

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        """One update of the images, and of the labels where they are learned."""
        x_s, y_s = state.pixels, state.labels
        x_t, labels_t = self.targets(state.train, generator)
        y_t = ridge.centred_one_hot(labels_t, y_s.shape[1])
        kernel = self.kernel(generator)

        k_ss, k_ts = kernel(x_s), self.cross(kernel, x_t, x_s)
        prediction = ridge.predict(k_ts, k_ss, y_s, self.ridge)
        loss = ridge.mse(prediction, y_t)

        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        correct = (prediction.argmax(1) == labels_t).double().mean()
        return {"loss": loss.detach(), "accuracy": correct}  # before the update, on this batch of targets

    def kernel(self, generator: torch.Generator | None = None) -> Kernel:
        """K(x1, x2), or K(x1) between the same images; ``generator`` is for kernels that are drawn."""

        def of(x1: Tensor, x2: Tensor | None = None) -> Tensor:
            kernels = fc.fully_connected(x1, x2, self.depth, self.sigma_w, self.sigma_b, self.width)
            return getattr(kernels, self.kind)

        return of

    def cross(self, kernel: Kernel, x_t: Tensor, x_s: Tensor) -> Tensor:
        """K_ts in 64 bits, computed in 32 if ``mixed`` (K_ss has to be invertible, K_ts has not)."""
        if self.precision == "mixed":
            return kernel(x_t.float(), x_s.float()).double()
        return kernel(x_t.double(), x_s)

    def targets(self, train, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Real images (n, c, h, w) and classes (n,), as many of every class, augmented one by one."""
        count = min(self.target_batch // train.num_classes, train.smallest_class)
        rows = train.indices(count, generator).flatten()
        images = train.images[rows]
        if names := families(self.augmentation, train):
            images = augment.apply(images, augment.draw(names, len(images), generator))
        return images, train.labels[rows]

    @torch.no_grad()
    def solved(self, pixels: Tensor, train) -> Tensor:
        """Label Solve: the labels (m, C) of fixed images with the least loss on all training images."""
        if len(pixels) > len(train):
            raise CompanionError(
                f"Label Solve of {len(pixels)} images needs as many targets, not {len(train)}"
            )
        kernel, y_t = self.kernel(), ridge.centred_one_hot(train.labels, train.num_classes)
        parts = train.images.split(TARGETS_AT_ONCE)
        k_ss, k_ts = kernel(pixels), torch.cat([self.cross(kernel, part, pixels) for part in parts])
        if self.labels == "solve-published":
            return ridge.label_solve_regularised(k_ts, k_ss, y_t, self.ridge)
        return ridge.label_solve(k_ts, k_ss, y_t, self.ridge)

    def finish(self, state: State) -> SyntheticSet:
        """The set in the type of the data; hard labels, or real-valued ones where they were learned or solved for."""
        train, dtype = state.train, state.train.images.dtype
        labels = class_major(train.num_classes, state.ipc, train.device)
        if self.learn_labels or self.labels != "hard":
            labels = state.labels.detach().to(dtype, copy=True)
        return SyntheticSet(
            state.pixels.detach().to(dtype, copy=True), labels, train.classes, train.transform
        )


@dataclass(frozen=True)
class ConvKIP(KIP):
    """KIP with kernels of infinitely wide convolutional networks; several are drawn from, one at every step.

    The learning rate of the paper is not known to us (its appendix was not available); the notebook's is taken.
    The other fields are KIP's.

    Attributes:
        iterations, learn_labels, augmentation: as KIP's; the headline rows have learned labels and augmentation.
        nets: names or strings of layers of ``lib.kernels.conv``, one or more; neither depth nor width is for them.
        chunk: values of the recursion held at a time, 1 or more: bounds the memory.
    """

    iterations: int = 50_000
    learn_labels: bool = True
    augmentation: str = "data"
    nets: tuple[str, ...] = ("kip",)
    chunk: int = 2**18

    def __post_init__(self):
        super().__post_init__()
        if not self.nets or self.chunk < 1 or self.depth != 1 or self.width is not None:
            raise CompanionError(
                f"nets {self.nets}, chunk {self.chunk}, depth {self.depth}, width {self.width}; allowed: one net or more, "
                "a chunk of 1 or more, and neither depth nor width (the net says it)"
            )
        for net in self.nets:
            conv.layers_of(net)

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        for net in self.nets:
            conv.check_size(net, train.shape[1:])
        return super().begin(train, ipc, generator)

    def kernel(self, generator: torch.Generator | None = None) -> Kernel:
        """The kernel of the first net, or of one drawn from all."""
        which = 0
        if generator is not None and len(self.nets) > 1:
            which = int(torch.randint(len(self.nets), (), generator=generator, device=generator.device))

        def of(x1: Tensor, x2: Tensor | None = None) -> Tensor:
            kernels = conv.convolutional(x1, x2, self.nets[which], self.sigma_w, self.sigma_b, self.chunk)
            return getattr(kernels, self.kind)

        return of


_SMALL, _SOLVED = KIP(iterations=300, target_batch=500), {"iterations": 0, "labels": "solve-published"}
_SMALL_PHOTOS = replace(_SMALL, iterations=200, precision="mixed")
_NOTEBOOK = "published notebook (FC1, Adam 0.04, 5000 targets)"
_ASSUMED = f"accuracies of arXiv 2011.00050; settings of its {_NOTEBOOK}"
RECIPES = Recipes(
    small("digits fashion14", _SMALL, "own-kernel"),
    small("photos16 photos32", _SMALL_PHOTOS, "own-kernel"),
    small("digits fashion14", replace(_SMALL, learn_labels=True), "own-kernel", variant="learned labels"),
    small(
        "photos16 photos32", replace(_SMALL_PHOTOS, learn_labels=True), "own-kernel", variant="learned labels"
    ),
    small(
        "digits fashion14", replace(_SMALL, iterations=0, labels="solve"), "own-kernel", variant="label solve"
    ),
    small(
        "photos16 photos32",
        replace(_SMALL_PHOTOS, iterations=0, labels="solve"),
        "own-kernel",
        variant="label solve",
    ),
    two_cores(
        KIP(target_batch=2000),
        protocol="own-kernel",
        source="the published notebook with 2000 of 5000 targets a step",
    ),
    published("cifar10", 10, KIP(), "own-kernel", _NOTEBOOK),
    published("cifar10", (1, 50), KIP(), "own-kernel", _ASSUMED),
    published("mnist", (1, 10, 50), KIP(), "own-kernel", _ASSUMED),
    published("cifar10", 10, KIP(learn_labels=True), "own-kernel", _NOTEBOOK, variant="learned labels"),
    published("cifar10", 50, KIP(**_SOLVED), "own-kernel", f"{_NOTEBOOK}: 500 images", variant="label solve"),
)
_CONV_SMALL = ConvKIP(
    iterations=40,
    lr=0.1,
    target_batch=30,
    augmentation="none",
    nets=("convnet3",),
    precision="mixed",
    learn_labels=False,
)
_CONV_FASHION = replace(_CONV_SMALL, nets=("convvec3",), target_batch=100)  # pooling costs 200 times as much
_CONV_PHOTOS = replace(_CONV_SMALL, nets=("convvec3",), iterations=60, target_batch=100)
_FIXED = ConvKIP(nets=("convnet3",), learn_labels=False, augmentation="none")
_CONV_SOLVED = {"iterations": 0, "labels": "solve", "learn_labels": False, "augmentation": "none"}
_TABLE_1 = "arXiv 2107.13034, Table 1; rate and targets per step are not stated: the first paper's"


def _colour_and_grey(method: ConvKIP, source: str, variant: str = "") -> list:
    """Every row of Table 1: grey images standardised, coloured ones whitened one by one."""
    return [
        *published("mnist fashionmnist", (1, 10, 50), method, "own-kernel", source, variant=variant),
        *published(
            "svhn cifar10", (1, 10, 50), method, "own-kernel", source, variant=variant, whiten="zca-kip"
        ),
        *published("cifar100", (1, 10), method, "own-kernel", source, variant=variant, whiten="zca-kip"),
    ]


CONV_RECIPES = Recipes(
    small("digits", _CONV_SMALL, "own-kernel"),
    small("fashion14", _CONV_FASHION, "own-kernel"),
    small("photos16 photos32", _CONV_PHOTOS, "own-kernel"),
    small("digits", replace(_CONV_SMALL, **_CONV_SOLVED), "own-kernel", variant="label solve"),
    small("fashion14", replace(_CONV_FASHION, **_CONV_SOLVED), "own-kernel", variant="label solve"),
    small("photos16 photos32", replace(_CONV_PHOTOS, **_CONV_SOLVED), "own-kernel", variant="label solve"),
    _colour_and_grey(ConvKIP(), f"{_TABLE_1}; augmented targets, learned labels"),
    _colour_and_grey(ConvKIP(**_CONV_SOLVED), f"{_TABLE_1}; LS", "label solve"),
    _colour_and_grey(ConvKIP(nets=("convnet3", "convvec3", "convvec8")), "kernels sampled at every step", "sampled"),
    published("cifar10", 50, _FIXED, "own-kernel", "released set: ConvNet3, neither whitening, labels nor augmentation",
              variant="convnet3"),
)  # fmt: skip
