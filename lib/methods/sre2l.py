r"""SRe2L - Squeeze, Recover and Relabel. Yin, Xing & Shen, NeurIPS 2023, arXiv 2306.13092; CDA, Yin & Shen, TMLR 2024.

A teacher is trained on all real data (squeeze, ``lib.recover.teacher``). Images are noise that is optimised until the frozen
teacher classifies them right and their BatchNorm statistics are those that it saw in training (recover, here):

$$\min_x\ \mathrm{CE}(f(\mathcal A(x)),y)
 +\alpha\sum_l\rho_l\big(\lVert\hat\mu_l-\mu_l\rVert_2+\lVert\hat\sigma^2_l-\sigma^2_l\rVert_2\big)$$

with $\rho_1=10$ for the first layer. The teacher's logits for every training view are the labels (``lib.evaluate.relabel``).

The statistics are those of one image of each of up to 100 classes: the composition of this *group* is part of the objective.
CDA is the same with crops that begin large and become smaller (``crop_from``, ``milestone``).

Paper and code: the paper squares the norms, the code does not; its image priors have weight 0 in every script and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.augment import views
from lib.formation import by_class
from lib.formation.start import pixel_set
from lib.match import batchnorm
from lib.match.batchnorm import Watch
from lib.recipes import Recipes, published, small
from lib.recover import teacher as teachers
from lib.recover.blocks import STORAGE, Block, Prepared, State, bounds, class_images, stored_pixels
from lib.recover.teacher import Teacher
from lib.synset import SyntheticSet, check_ipc
from lib.system.errors import CompanionError, unknown

CURRICULA = ("cosine", "linear", "step")


@dataclass(frozen=True)
class SRe2L:
    r"""Hyper-parameters of the published commands.

    Attributes:
        iterations: R, 1 or more; lr: of the pixels, along a cosine to 0; betas: of Adam.
        ce_weight: of the cross-entropy; bn_weight: $\alpha$, of the statistics; first_multiplier: $\rho_1$, of the first layer's.
        block_images: images recovered at once, at most.
        crop: smallest share of the area, None: no crop (below 64 pixels).
        crop_from: where that share begins, up to 1; milestone: the part of the iterations after which it has fallen to ``crop`` (CDA: 1);
            curriculum: how it falls, "cosine", "linear" or "step".
        flip: random mirror images; roll: least and largest shift in pixels, down and right.
        storage: what the saved pixels went through: "jpeg"; "png": 8 bits; "float": nothing.
        teacher: how the teacher is trained (``lib.recover.teacher``).
    """

    iterations: int = 4000
    lr: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)
    ce_weight: float = 1.0
    bn_weight: float = 0.01
    first_multiplier: float = 10.0
    block_images: int = 100
    crop: float | None = 0.08
    crop_from: float = 1.0
    milestone: float = 0.0
    curriculum: str = "cosine"
    flip: bool = True
    roll: tuple[int, int] = (0, 32)
    storage: str = "jpeg"
    teacher: Teacher = Teacher()

    def __post_init__(self):
        if self.curriculum not in CURRICULA:
            raise unknown("curriculum", self.curriculum, CURRICULA)
        if self.storage not in STORAGE:
            raise unknown("storage", self.storage, STORAGE)
        if self.crop is not None and not 0 < self.crop <= self.crop_from <= 1:
            raise CompanionError(
                f"crop {self.crop!r} is not allowed: None, or above 0 and at most crop_from ({self.crop_from})"
            )
        for name in ("iterations", "block_images"):
            if getattr(self, name) < 1:
                raise CompanionError(f"{name} {getattr(self, name)} is not allowed: at least 1")

    def total_steps(self, ipc: int) -> int:
        return self.iterations

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        seed = generator.initial_seed()
        prepared = self.prepare(train, ipc, seed)
        state = self.start(prepared, self.blocks(train.num_classes, ipc), seed)
        state.train, state.ipc = train, ipc
        return state

    def step(self, state: State, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One iteration of every block; the random numbers were drawn at the start. The metrics are means over groups."""
        metrics = []
        for k, x in enumerate(state.pixels):
            inputs, features, logits = state.prepared.watch(self.view(x, state.views[k][state.done]))
            terms = self.terms(state.targets[k], inputs, features, logits)
            loss = sum(self.weight(name) * term for name, term in terms.items())
            (x.grad,) = torch.autograd.grad(loss, x)
            metrics.append(torch.stack([loss.detach(), *(term.detach() for term in terms.values())]))
            metrics[-1] /= state.targets[k]["groups"]
        for group in state.optimiser.param_groups:
            group["lr"] = self.rate(state.done)
        state.optimiser.step()
        with torch.no_grad():
            for x in state.pixels:
                x.clamp_(*state.targets[0]["bounds"])  # to what pixels in [0, 1] become
        state.done += 1
        return dict(zip(("loss", *terms), torch.stack(metrics).mean(0), strict=True))

    def terms(
        self, target: dict, inputs: list[Tensor], features: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """The summands of the objective by name, without their weights: a sum over the groups of the block."""
        groups = target["groups"]
        bn = self.global_term(target, inputs, groups)
        return {"ce": groups * F.cross_entropy(logits, target["labels"]), "bn": bn}

    def global_term(self, target: dict, inputs: list[Tensor], groups: int) -> Tensor:
        """Distance of every group's statistics to the running ones of the teacher."""
        found = batchnorm.statistics(inputs, groups)
        layers = groups * batchnorm.running_terms(found, target["running"])
        return batchnorm.weigh(layers, self.first_multiplier)

    def weight(self, name: str) -> float:
        """Of a summand."""
        return {"ce": self.ce_weight, "bn": self.bn_weight}[name]

    def rate(self, iteration: int) -> float:
        """Learning rate of an iteration."""
        return 0.5 * self.lr * (1 + math.cos(math.pi * iteration / self.iterations))

    def view(self, x: Tensor, numbers: Tensor) -> Tensor:
        r"""$\mathcal A$ on a block: one crop, flip and roll per group, then resized to what it was."""
        parts = x.chunk(len(numbers))
        if self.crop is not None:
            boxes, flips, shifts = numbers[:, :4], numbers[:, 4] > 0, numbers[:, 5:]
            rows, columns = views.crop_matrices(boxes, flips, x.shape[-1], shifts, x.dtype)
            seen = [views.resample(part, rows[g : g + 1], columns[g : g + 1]) for g, part in enumerate(parts)]
        else:  # whole numbers on the host: exact, and nothing to wait for
            seen = []
            for part, (*_, mirrored, down, right) in zip(parts, numbers.tolist(), strict=True):
                seen.append((part.flip(3) if mirrored else part).roll((down, right), (2, 3)))
        return torch.cat(seen) if len(seen) > 1 else seen[0]

    def finish(self, state: State) -> SyntheticSet:
        images = torch.zeros(
            state.train.num_classes * state.ipc, *state.train.shape, device=state.prepared.device
        )
        for k, block in enumerate(state.blocks):
            images[block.rows(state.ipc)] = self.ordered(state, k)
        return pixel_set(stored_pixels(images, state.train.transform, self.storage), state.train, state.ipc)

    # -- blocks, alone or side by side -----------------------------------------------------------------------------------

    def blocks(self, classes: int, ipc: int) -> list[Block]:
        """Groups of one image of each of at most ``block_images`` classes, as many groups as fit a block and divide ipc.

        Raises:
            CompanionError: the classes do not divide into equal groups.
        """
        size = min(self.block_images, classes)
        if classes % size:
            raise CompanionError(
                f"{classes} classes do not divide into groups of {size}: "
                f"allowed block_images: a divisor of {classes}, or {classes} and more"
            )
        groups = max(
            g for g in range(1, ipc + 1) if ipc % g == 0 and (g == 1 or g * size <= self.block_images)
        )
        starts = [(j, c) for j in range(0, ipc, groups) for c in range(0, classes, size)]
        return [Block(k, range(c, c + size), range(j, j + groups)) for k, (j, c) in enumerate(starts)]

    def prepare(self, train, ipc: int, seed: int, network: nn.Module | None = None) -> Prepared:
        """The teacher (trained, if none is given) and the targets of all classes."""
        check_ipc(ipc, train.smallest_class)
        watch = Watch(network or teachers.the_teacher(self.teacher, train))
        prepared = Prepared(watch, tuple(train.shape), train.transform, torch.device(train.device))
        prepared.targets = {
            c: self.class_targets(watch, class_images(train, c, self.chunk), ipc, seed, c)
            for c in range(train.num_classes)
        }
        return prepared

    @property
    def chunk(self) -> int:
        """Real images in one pass."""
        return 100

    def class_targets(
        self, watch: Watch, images: Iterable[Tensor], ipc: int, seed: int, c: int
    ) -> dict[str, Tensor]:
        """What is to be known of the real images of class c: nothing."""
        return {}

    @property
    def weighted(self) -> bool:
        """Whether the images of a class count unequally in training."""
        return False

    def block_target(self, prepared: Prepared, block: Block) -> dict:
        """Everything that the objective of a block reads."""
        labels = torch.tensor(list(block.classes), device=prepared.device).repeat(len(block.images))
        running = batchnorm.running_statistics(prepared.watch.network)
        return {"labels": labels, "running": running, "groups": len(block.images), "bounds": bounds(prepared)}

    def start(self, prepared: Prepared, blocks: list[Block], seed: int) -> State:
        """Noise for these blocks, and all their random numbers."""
        begun = [self.numbers(prepared, block, seed) for block in blocks]
        pixels = nn.ParameterList([nn.Parameter(noise) for noise, _ in begun])
        optimiser = torch.optim.Adam(pixels.parameters(), lr=self.lr, betas=self.betas, eps=1e-8)
        targets = [self.block_target(prepared, block) for block in blocks]
        return State(pixels, optimiser, 0, prepared, blocks, [drawn for _, drawn in begun], targets)

    def numbers(self, prepared: Prepared, block: Block, seed: int) -> tuple[Tensor, Tensor]:
        """Initial pixels of a block and the numbers of its views, a function of (seed, block) alone."""
        generator = views.keyed("recover", seed, block.index)
        noise = torch.randn(len(block), *prepared.shape, generator=generator).to(prepared.device)
        count, side = self.iterations * self.groups_of_views(block), prepared.shape[-1]
        part = torch.arange(self.iterations, dtype=torch.float64) / self.iterations
        lowest = self.lowest_share(part).repeat_interleave(self.groups_of_views(block))
        boxes = views.crop_boxes(lowest, side, generator)
        flips = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        rolls = torch.randint(self.roll[0], self.roll[1] + 1, (count, 2), generator=generator)
        drawn = torch.cat([boxes, flips, rolls], 1).unflatten(0, (self.iterations, -1))
        return noise, drawn.to(prepared.device) if self.crop is not None else drawn

    def groups_of_views(self, block: Block) -> int:
        """Parts of a block that are cropped alike: here one per image index."""
        return len(block.images)

    def lowest_share(self, part: Tensor) -> Tensor:
        """Smallest area of a crop after this part of the iterations: ``crop``, and before the milestone CDA's curriculum."""
        crop = 1.0 if self.crop is None else self.crop
        t = (part / self.milestone).clamp(max=1) if self.milestone else torch.ones_like(part)
        falls = {"cosine": (1 + torch.cos(math.pi * t)) / 2, "linear": 1 - t, "step": (t < 1).double()}
        return crop + (self.crop_from - crop) * falls[self.curriculum]

    def recover_block(self, prepared: Prepared, block: Block, seed: int) -> Tensor:
        """One block by itself: its pixels ``(len(block), c, h, w)`` in the order of :meth:`Block.rows`."""
        state = self.start(prepared, [block], seed)
        for _ in range(self.iterations):
            self.step(state)
        return stored_pixels(self.ordered(state, 0), prepared.transform, self.storage)

    def ordered(self, state: State, k: int) -> Tensor:
        """The pixels of a block, class by class (they are kept group by group)."""
        return by_class(state.pixels[k].detach(), len(state.blocks[k].images)).transpose(0, 1).flatten(0, 1)


_IMAGENET = SRe2L(teacher=teachers.TEACHERS["imagenet"])
_TINY = SRe2L(lr=0.1, bn_weight=1.0, roll=(-4, 4), teacher=teachers.TEACHERS["sre2l-tinyimagenet"])
_CIFAR = replace(
    _IMAGENET, iterations=1000, crop=None, flip=False, roll=(0, 4), teacher=teachers.TEACHERS["cifar"]
)
_SMALL = SRe2L(iterations=300, lr=0.5, bn_weight=1.0, crop=None, flip=False, roll=(-1, 1), storage="float",
               teacher=teachers.TEACHERS["digits"])  # fmt: skip
_PHOTOS = replace(
    _SMALL, iterations=60, lr=0.2, flip=True, roll=(-2, 2), teacher=teachers.TEACHERS["photos16"]
)
_SCRIPT = "published script (settings by data set, not by IPC)"
RECIPES = Recipes(
    small("digits", _SMALL, "own-fkd-digits"),
    small("photos16 photos32", _PHOTOS, "own-fkd-photos"),
    small("digits", replace(_SMALL, milestone=1.0, crop=0.5), "own-fkd-digits", variant="CDA"),
    small("photos16 photos32", replace(_PHOTOS, milestone=1.0, crop=0.5), "own-fkd-photos", variant="CDA"),
    published("imagenet", None, _IMAGENET, "own-fkd-1024", _SCRIPT),
    published("imagenet", None, replace(_IMAGENET, iterations=2000), "own-fkd-1024", "also released", variant="r2000"),
    published("tinyimagenet", 50, replace(_TINY, iterations=1000), "own-fkd-1024-tiny", "released set; the range of the roll is assumed"),
    published("tinyimagenet", 100, _TINY, "own-fkd-1024-tiny", f"{_SCRIPT}; the range of the roll is assumed"),
    published("cifar100", None, _CIFAR, "own-fkd-cifar", _SCRIPT),
    published("cifar10", None, _CIFAR, "own-fkd-cifar", "not published: as CIFAR-100"),
    published("imagenette", None, replace(_IMAGENET, iterations=2000, teacher=teachers.TEACHERS["wmdd"]), "own-fkd",
              "WMDD's script with its defaults and WMDD's teacher and iterations; how its authors ran SRe2L is not stated"),
    published("tinyimagenet", (50, 100), replace(_TINY, lr=0.4, bn_weight=0.05, milestone=1.0), "own-fkd-1024-tiny",
              "CDA, published script; the range of the roll is assumed", variant="CDA"),
    published("imagenet", None, replace(_IMAGENET, milestone=1.0), "own-fkd-1024", "CDA, published script", variant="CDA"),
    published("imagenet21k", (10, 20), replace(_IMAGENET, iterations=2000, lr=0.05, bn_weight=0.25, milestone=1.0), "own-fkd-1024",
              "CDA, published script", variant="CDA"),
)  # fmt: skip
