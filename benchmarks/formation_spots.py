"""IDC's matching step beside a plain loop over classes, tiles and tensors, as its published code has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.harness import REFERENCE, HotSpot
from benchmarks.hot_spots import Setting, _compare, _real_of, _tolerances
from lib import augment
from lib.formation import MultiFormation
from lib.methods.idc import IDC

Draw = Callable[[int], dict[str, Tensor]]  # class -> family -> three uniform numbers


def plain_decode(images: Tensor, factor: int) -> Tensor:
    """Crop and enlarge tile after tile."""
    side = images.shape[-1] // factor
    tiles = []
    for i in range(factor):
        for j in range(factor):
            tile = images[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
            tiles.append(F.interpolate(tile, size=images.shape[-2:], mode="bilinear", align_corners=False))
    return torch.cat(tiles)


def plain_step(
    network: nn.Module, pixels: Tensor, optimiser, factor: int, classes: int, real: Callable[[int], Tensor], draw: Draw,
    transform,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One update of ``pixels`` in [0, 1], an optimiser step after each class; the loss and the sum of the gradients."""
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.dim() == 4]
    total, gradient = torch.zeros((), device=pixels.device), torch.zeros_like(pixels)
    ipc = len(pixels) // classes
    for c in range(classes):
        images = real(c)
        syn = transform.forward(plain_decode(pixels[c * ipc : (c + 1) * ipc], factor))
        both, numbers = torch.cat([images, syn]), draw(c)
        for name, u in numbers.items():
            both = reference.FAMILIES[name](both, u.expand(len(both), 3))
        labels = torch.full((len(both),), c, device=pixels.device)
        n = len(images)
        target = torch.autograd.grad(F.cross_entropy(network(both[:n]), labels[:n]), parameters)
        output = F.cross_entropy(network(both[n:]), labels[n:])
        current = torch.autograd.grad(output, parameters, create_graph=True)
        loss = sum(((a - b.detach()) ** 2).sum() for a, b in zip(current, target, strict=True))
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        optimiser.step()
        total, gradient = total + loss.detach(), gradient + pixels.grad
    return total, gradient


def idc(setting: Setting) -> HotSpot:
    """One matching step with its update of the pixels, at a fixed network; factor 2, 40 decoded images per class."""
    train = setting.images(max(setting.real, 4 * setting.ipc), 0)
    common = {"real_batch": setting.real, "network": setting.network, "formation": MultiFormation(2)}
    grouped = setting.side < 32 or setting.device.type == "cuda"
    methods = {"all classes in one graph" if grouped else "class by class": IDC(**common)}
    if setting.mixed:
        methods["real side in bfloat16"] = IDC(**common, mixed=True)
    names, real_of = augment.strategy(IDC().augmentation), _real_of(train, setting.real)

    def begin(method: IDC):
        return method.begin(train, setting.ipc, setting.generator(1))

    states = {name: begin(method) for name, method in methods.items()}
    first = next(iter(states.values()))
    network = setting.plain_network(first.networks.network(0).state_dict())

    def plain(pixels: Tensor, optimiser, real, draw: Draw) -> tuple[Tensor, Tensor]:
        return plain_step(network, pixels, optimiser, 2, setting.classes, real, draw, train.transform)

    def start() -> tuple[Tensor, torch.optim.Optimizer]:
        pixels, method = first.pixels.detach().clone().requires_grad_(), IDC()
        return pixels, torch.optim.SGD([pixels], lr=method.rate(train, setting.ipc), momentum=method.momentum)

    def own_draw(c: int) -> dict[str, Tensor]:
        return {name: torch.rand(1, 3, device=train.device) for name in names}

    def check() -> dict[str, float]:
        g = setting.generator(2)  # the library's order of draws: images, augmentation
        real, omega = train.sample(setting.real, g), augment.draw(names, setting.classes, g, mode="idc")

        def draw(c: int) -> dict[str, Tensor]:
            return {name: omega.u[c, i : i + 1] for i, name in enumerate(names)}

        pixels, optimiser = start()
        loss, pixels.grad = plain(pixels, optimiser, real.__getitem__, draw)
        return {
            name: _compare(method.match, begin(method), setting, loss, pixels)
            for name, method in methods.items()
        }

    g, (own, own_optimiser) = setting.generator(3), start()
    candidates = {name: lambda m=m, s=states[name]: m.match(s, g) for name, m in methods.items()}
    timed = {REFERENCE: lambda: plain(own, own_optimiser, real_of, own_draw)} | candidates
    return HotSpot("IDC matching step", "step", 1, timed, check, _tolerances(methods))


FORMATION_SPOTS = {"idc": idc}
