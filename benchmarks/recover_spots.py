"""Recovery of WMDD beside the loop that is published, and the barycenter: ``python -m benchmarks.recover_spots``.

A recovery iteration: 100 images of 3x32x32 through a BatchNorm ResNet-18, backward to the pixels, Adam, clamp. The plain loop
hooks every BatchNorm layer, takes the variance of a transposed copy of its input, lets the parameters require gradients, and
waits for the loss after every iteration (``.item()``), as the published code does. Both see the same pixels and views, and their
values are compared first.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import REFERENCE, HotSpot, assert_equal
from lib import nets
from lib.data.imageset import ImageSet
from lib.data.whitening import Standardise
from lib.match import barycenter as ot
from lib.match.batchnorm import batch_norms
from lib.methods.wmdd import WMDD
from lib.recover import teacher as teachers
from lib.recover.blocks import Prepared, State
from lib.synset import class_major

STEMS = {"tiny stem": "torchvision-resnet18-tiny", "CIFAR stem": "resnet18-batch"}
GOAL, BARYCENTER_GOAL = 1.5, 0.04  # ratio to the plain loop; seconds at n = 1300, d = 512, m = 10
CLASSES, IPC, SIDE = 10, 10, 32


def random_data(device: torch.device | str = "cpu", side: int = SIDE) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(CLASSES * 2 * IPC, 3, side, side, generator=generator)
    names = tuple(f"class {c}" for c in range(CLASSES))
    transform = Standardise(torch.full((3,), 0.5), torch.full((3,), 0.25))
    return ImageSet("random", pixels, class_major(CLASSES, 2 * IPC, "cpu"), names, transform).to(device)


def network_of(name: str, data: ImageSet) -> nn.Module:
    """A ResNet whose running statistics are those of the data."""
    generator = torch.Generator(data.device).manual_seed(1)
    network = nets.initialise(teachers.make_teacher(name, data), generator).train()
    with torch.no_grad():
        for _ in range(3):
            network(data.images[:: len(data) // 20])
    return network.eval()


# -- the published way ---------------------------------------------------------------------------------------------------


class Hook:
    """Distance of a layer's input statistics to the targets, class by class."""

    def __init__(self, layer: nn.BatchNorm2d, targets: list):
        self.targets = targets
        self.handle = layer.register_forward_hook(self.see)

    def see(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        terms, channels = [], inputs[0].shape[1]
        for c, x in enumerate(inputs[0].chunk(len(self.targets))):
            mean = x.mean([0, 2, 3])
            var = x.permute(1, 0, 2, 3).contiguous().view([channels, -1]).var(1, unbiased=False)
            wanted = self.targets[c]
            terms.append(torch.norm(wanted[1] - var, 2) + torch.norm(wanted[0] - mean, 2))
        self.distance = torch.stack(terms).mean()


def plain_step(method, network, hooks, target, x: Tensor, optimiser, views: list, done: int) -> float:
    """One iteration of the published loop."""
    for group in optimiser.param_groups:
        group["lr"] = method.rate(done)
    *_, mirrored, down, right = views
    seen = torch.flip(x, (3,)) if mirrored else x
    seen = torch.roll(seen, shifts=(down, right), dims=(2, 3))
    optimiser.zero_grad()
    network.zero_grad()
    features = []
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    handle = linear.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    logits = network(seen)
    handle.remove()
    loss = F.cross_entropy(logits, target["labels"]) + torch.norm(features[0] - target["atoms"])
    loss = loss + method.bn_weight * sum(hook.distance for hook in hooks)
    loss.backward()
    optimiser.step()
    low, high = target["bounds"]
    with torch.no_grad():
        for channel in range(x.shape[1]):
            x.data[:, channel] = torch.clamp(x[:, channel], low[channel].item(), high[channel].item())
    return loss.item()


def recovery(name: str, method: WMDD, data: ImageSet) -> HotSpot:
    """Iterations of one block of 100 images, both ways."""
    network = network_of(name, data)
    plain = network_of(name, data)
    prepared: Prepared = method.prepare(data, IPC, 0, teachers.frozen(network))
    block = method.blocks(CLASSES, IPC)[0]

    def begin() -> tuple[State, Tensor, torch.optim.Adam]:
        state = method.start(prepared, [block], 0)
        x = state.pixels[0].detach().clone().requires_grad_()
        return state, x, torch.optim.Adam([x], lr=method.lr, betas=method.betas, eps=1e-8)

    target = method.block_target(prepared, block)
    hooks = []
    for layers, layer in zip(target["layers"], batch_norms(plain), strict=True):
        hooks.append(Hook(layer, [tuple(part[c] for part in layers) for c in range(CLASSES)]))
    state, x, optimiser = begin()

    def loop() -> float:
        done = state.done % 3
        return plain_step(method, plain, hooks, target, x, optimiser, state.views[0][done, 0].tolist(), done)

    def ours() -> dict[str, Tensor]:
        state.done %= 3
        return method.step(state)

    def check() -> dict[str, float]:
        one, own, adam = begin()
        losses = []
        for done in range(2):
            theirs = plain_step(method, plain, hooks, target, own, adam, one.views[0][done, 0].tolist(), done)
            losses.append(abs(method.step(one)["loss"].item() / theirs - 1))
        # Adam makes full steps of rounding where a gradient is almost 0: the mean distance in steps, not the largest.
        moved = (one.pixels[0] - own).abs().mean() / method.lr
        return {"ours": max(*losses, moved.item())}

    return HotSpot(
        f"WMDD recovery, {name}", "iteration", 1, {REFERENCE: loop, "ours": ours}, check, {"ours": 1e-3}
    )


METHOD = WMDD(iterations=2000, crop=None, flip=True, roll=(0, 4), storage="float")
RECOVER_SPOTS = {
    f"recover-{stem.split()[0].lower()}": lambda setting, stem=stem: recovery(
        stem, METHOD, random_data(setting.device)
    )
    for stem in STEMS
}


def times(hot_spot: HotSpot, repeats: int) -> dict[str, float]:
    """Processor seconds of one call of every candidate, medians, in turns."""
    found: dict[str, list[float]] = {name: [] for name in hot_spot.candidates}
    for _ in range(repeats):
        for name, call in hot_spot.candidates.items():
            start = time.process_time()
            call()
            found[name].append(time.process_time() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


def barycenter_times() -> list[tuple[str, float, int]]:
    """Case, best processor seconds and moves of a barycenter of rectified normal features, n = 1300 and d = 512."""
    points = torch.randn(1300, 512, generator=torch.Generator().manual_seed(0)).relu()
    rows = []
    for mode, m in (("uniform", 10), ("uniform", 50), ("alternating", 10), ("alternating", 50)):
        seconds = []
        for _ in range(5):
            start = time.process_time()
            found = ot.barycenter(points, m, mode, generator=torch.Generator().manual_seed(1))
            seconds.append(time.process_time() - start)
        rows.append((f"{mode}, m = {m}", min(seconds), len(found.moves)))
    return rows


def main(words: list[str]) -> None:
    repeats = int(words[0]) if words else 3
    print(
        "# Recovery of 100 images of 3x32x32 through a BatchNorm ResNet-18, processor seconds per iteration\n"
    )
    print(f"| stem | plain loop | ours | ratio (goal {GOAL}) |\n| --- | --- | --- | --- |")
    for stem in STEMS:
        hot_spot = recovery(STEMS[stem], METHOD, random_data())
        assert_equal(hot_spot)
        found = times(hot_spot, repeats)
        ratio = found[REFERENCE] / found["ours"]
        print(f"| {stem} | {found[REFERENCE]:.3f} | {found['ours']:.3f} | {ratio:.2f} |", flush=True)
    print(f"\n# Barycenter of 1300 points in 512 dimensions (goal {BARYCENTER_GOAL} s for uniform, m = 10)\n")
    print("| case | processor s | moves |\n| --- | --- | --- |")
    for case, seconds, moves in barycenter_times():
        print(f"| {case} | {seconds:.4f} | {moves} |")


if __name__ == "__main__":
    main(sys.argv[1:])
