"""Recovery of WMDD beside its plain version, and the barycenter: ``python -m benchmarks.recover_spots``.

A recovery iteration: 100 images of 3x32x32 through a frozen BatchNorm ResNet-18, backward to the pixels, Adam, clamp. The plain loop
(``lib.plain.wmdd``) takes the statistics class by class with PyTorch's own mean and variance, and waits for the loss after every
iteration, as the published code does. Both see the same pixels and views, and their values are compared first.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness import REFERENCE, HotSpot, assert_equal
from lib.data.imageset import ImageSet
from lib.data.whitening import Standardise
from lib.match import barycenter as ot
from lib.methods.wmdd import WMDD
from lib.plain import plain
from lib.recover import teacher as teachers
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
    network = teachers.drawn(name, data, generator).train()
    with torch.no_grad():
        for _ in range(3):
            network(data.images[:: len(data) // 20])
    return network.eval()


def recovery(name: str, method: WMDD, data: ImageSet) -> HotSpot:
    """Iterations of one block of 100 images, both ways, from the same teacher; both make the class targets first."""
    folder = tempfile.mkdtemp()  # read by both candidates, as often as they are called
    path = teachers.save_teacher(network_of(name, data), f"{folder}/teacher.safetensors", name, data.classes)
    method = replace(method, teacher=teachers.Teacher(name, weights=str(path)))
    generator = functools.partial(torch.Generator(data.device).manual_seed, 0)

    def loop() -> tuple[Tensor, list[float]]:
        return plain("wmdd")(method, data, IPC, generator())

    def ours() -> tuple[Tensor, list[float]]:
        state = method.begin(data, IPC, generator())
        losses = [method.step(state)["loss"] for _ in range(method.iterations)]
        return method.finish(state).images, torch.stack(losses).tolist()

    def check() -> dict[str, float]:
        (theirs, wanted), (mine, found) = loop(), ours()
        losses = max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))
        # Adam makes full steps of rounding where a gradient is almost 0: the mean distance in steps, not the largest.
        return {"ours": max(losses, (mine - theirs).abs().mean().item() / method.lr)}

    title, candidates = f"WMDD recovery, {name}", {REFERENCE: loop, "ours": ours}
    return HotSpot(title, "iteration", method.iterations, candidates, check, {"ours": 1e-3})


METHOD = WMDD(iterations=3, crop=None, flip=True, roll=(0, 4), storage="float")


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
        found = {name: seconds / hot_spot.units for name, seconds in times(hot_spot, repeats).items()}
        ratio = found[REFERENCE] / found["ours"]
        print(f"| {stem} | {found[REFERENCE]:.3f} | {found['ours']:.3f} | {ratio:.2f} |", flush=True)
    print(f"\n# Barycenter of 1300 points in 512 dimensions (goal {BARYCENTER_GOAL} s for uniform, m = 10)\n")
    print("| case | processor s | moves |\n| --- | --- | --- |")
    for case, seconds, moves in barycenter_times():
        print(f"| {case} | {seconds:.4f} | {moves} |")


if __name__ == "__main__":
    main(sys.argv[1:])
