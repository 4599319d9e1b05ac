"""The hot spots of methods that train networks inside: unrolled students, experts, and RCIG's implicit gradient; each beside
``lib.plain``, one network after the other."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import REFERENCE, HotSpot, difference
from benchmarks.hot_spots import FLOAT32, STEPS, Setting, distillation
from lib.match.trajectory import relative_distance
from lib.match.unroll import Step, walk
from lib.methods.dd import DD
from lib.methods.rcig import RCIG
from lib.nets.experts import Experts
from lib.nets.flat import draw, template
from lib.plain import at, experts, parts, squared

STUDENT_STEPS, DD_STEPS, EXPERTS, EPOCHS = 20, 10, 8, 2
WAYS = {"bptt": "weights as one vector", "recompute": "reverse sweep, one step at a time"}


def student(setting: Setting, mode: str) -> HotSpot:
    """MTT: a student's 20 steps on all images, and the gradient of images and rate by where it ends."""
    train, rate = setting.images(setting.ipc, 0), torch.tensor(0.01, device=setting.device)
    like = template(setting.network, train).to(setting.device)
    start, target = draw(like, [setting.generator(1), setting.generator(2)]).split(1)

    def ours() -> tuple[Tensor, Tensor]:
        steps = [Step(train.images, train.labels, rate)] * STUDENT_STEPS
        end = walk(like, start, steps, mode)
        images, rates = end.pull(relative_distance(end.end, start, target)[1])
        return sum(images), rates.sum()

    def loop() -> tuple[Tensor, Tensor]:
        x, beta = train.images.clone().requires_grad_(), rate.clone().requires_grad_()
        begin, goal = parts(like, start[0]), parts(like, target[0])
        theta = [w.clone().requires_grad_() for w in begin]
        for _ in range(STUDENT_STEPS):
            entropy = F.cross_entropy(at(like, theta, x), train.labels)
            moves = torch.autograd.grad(entropy, theta, create_graph=True, materialize_grads=True)
            theta = [w - beta * move for w, move in zip(theta, moves, strict=True)]
        return torch.autograd.grad(squared(theta, goal) / squared(begin, goal), (x, beta))

    def check() -> dict[str, float]:
        return {name: max(map(difference, ours(), loop()))}

    name, title = WAYS[mode], f"MTT, {STUDENT_STEPS} steps, {mode}"
    most = 1 if setting.side == 32 and setting.device.type == "cpu" else None  # a call takes a minute
    return HotSpot(title, "iteration", 1, {REFERENCE: loop, name: ours}, check, {name: FLOAT32}, most)


def dd(setting: Setting, mode: str) -> HotSpot:
    """Updates of DD: ten steps with images of their own, as many as there are images a class, and a real batch."""
    passes = max(1, DD_STEPS // setting.ipc)
    method = DD(
        iterations=STEPS, steps=setting.ipc, epochs=passes, real_batch=10 * setting.real, network=setting.network,
        gradient=mode,
    )  # fmt: skip
    methods = {WAYS[mode]: method}
    return distillation(setting, f"DD, {setting.ipc * passes} steps, {mode}", "dd", methods)


def rcig(setting: Setting) -> HotSpot:
    """Iterations of RCIG with exact solutions, of a network a quarter as wide: the plain version writes out the Hessian."""
    method = RCIG(
        iterations=STEPS, networks=1, width=setting.width // 4, depth=setting.depth, real_batch=2 * setting.real,
        solver="exact",
    )  # fmt: skip
    return distillation(
        setting, "RCIG iteration, one image a class", "rcig", {"dual system, one factor": method}, ipc=1
    )


def recorder(setting: Setting) -> HotSpot:
    """Experts that are trained on 64 real images a class, and their weights after every epoch."""
    train = setting.images(setting.real, 0)
    chosen = Experts(EXPERTS, batch=setting.real, augmentation="none")
    wanted = SimpleNamespace(experts=chosen, network=setting.network, reach=EPOCHS)

    def ours() -> Tensor:
        return chosen._train(setting.network, train, tuple(range(EPOCHS + 1)), None)

    def loop() -> Tensor:
        ways = experts(wanted, train)
        return torch.stack(
            [torch.stack([torch.cat([w.flatten() for w in theta]) for theta in way]) for way in ways]
        )

    name = f"{EXPERTS} experts side by side"
    candidates = {REFERENCE: loop, name: ours}
    return HotSpot(
        "recording experts", "expert-epoch", EXPERTS * EPOCHS, candidates,
        lambda: {name: difference(ours(), loop().cpu())}, {name: FLOAT32},
    )  # fmt: skip


UNROLL_SPOTS = {
    "mtt": lambda setting: student(setting, "bptt"),
    "mtt-recompute": lambda setting: student(setting, "recompute"),
    "dd": lambda setting: dd(setting, "bptt"),
    "dd-recompute": lambda setting: dd(setting, "recompute"),
    "rcig": rcig,
    "experts": recorder,
}
