"""The straightforward way: one class, one network, one image at a time, with framework modules and loaders.

This is the structure of the published programs of DC, DSA and DM around their algorithms (which ``lib.plain`` has): networks,
augmentation, training and testing, restated from their papers. The library's fast paths are timed and checked against it.
Randomness comes in through arguments, so that a check can hand both sides the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class ConvNet(nn.Module):
    """depth x [conv3x3, instance norm, ReLU, 2x2 average pool], linear; parameter names as ``lib.nets.convnet``."""

    def __init__(self, channels: int, classes: int, side: int, width: int, depth: int):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [
                nn.Conv2d(width if i else channels, width, 3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (side // 2**depth) ** 2, classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


# -- augmentation: one family for a batch, parameters from uniform numbers u (n, 3) -------------------------------------


def color(x: Tensor, u: Tensor) -> Tensor:
    u = u[:, :, None, None, None]
    x = x + (u[:, 0] - 0.5)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (2 * u[:, 1]) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u[:, 2] + 0.5) + mean


def crop(x: Tensor, u: Tensor) -> Tensor:
    n, _, side, _ = x.shape
    reach = int(side * 0.125 + 0.5)
    shift = (u[:, :2] * (2 * reach + 1)).long().clamp(max=2 * reach)
    image, row, column = _grid(n, side, side, x.device)
    padded = F.pad(x, [reach] * 4).permute(0, 2, 3, 1)
    return padded[image, row + shift[:, 0, None, None], column + shift[:, 1, None, None]].permute(0, 3, 1, 2)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    n, _, side, _ = x.shape
    size = int(side * 0.5 + 0.5)
    places = side + 1 - size % 2
    low = (u[:, :2] * places).long().clamp(max=places - 1) - size // 2
    image, row, column = _grid(n, size, size, x.device)
    mask = torch.ones(n, side, side, device=x.device)
    rows = (row + low[:, 0, None, None]).clamp(0, side - 1)
    mask[image, rows, (column + low[:, 1, None, None]).clamp(0, side - 1)] = 0
    return x * mask.unsqueeze(1)


def flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(u[:, 0, None, None, None] < 0.5, x.flip(3), x)


def scale(x: Tensor, u: Tensor) -> Tensor:
    sx, sy = (1 / 1.2 + u[:, i] * (1.2 - 1 / 1.2) for i in range(2))
    return _warp(x, [[[sx[i], 0, 0], [0, sy[i], 0]] for i in range(len(x))])


def rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (2 * u[:, 0] - 1) * math.radians(15)
    theta = []
    for i in range(len(x)):
        cos, sin = torch.cos(angle[i]), torch.sin(angle[i])
        theta.append([[cos, -sin, 0], [sin, cos, 0]])
    return _warp(x, theta)


def _warp(x: Tensor, theta: list) -> Tensor:
    """One matrix per image, collected in a list, as the published code does: most of the cost of a small warp."""
    grid = F.affine_grid(torch.tensor(theta, device=x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _grid(*sizes_and_device) -> tuple[Tensor, ...]:
    *sizes, device = sizes_and_device
    return torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")


FAMILIES = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}

DRAWS = {"color": 3, "crop": 2, "cutout": 2, "flip": 1, "scale": 2, "rotate": 1}

# (class, images of the class) -> images; siamese: the same for the real and the synthetic ones
Augment = Callable[[int, Tensor], Tensor]


def siamese(names: tuple[str, ...], seed: int, x: Tensor) -> Tensor:
    """A family for the batch, and parameters that all its images share.

    As published, the global generator is seeded anew before every draw, so that a second call with the same seed repeats them.
    """
    torch.manual_seed(seed)
    family = names[int(torch.randint(len(names), (1,)))]
    u = torch.zeros(len(x), 3)
    for i in range(DRAWS[family]):
        torch.manual_seed(seed + 1 + i)
        u[:, i] = torch.rand(1)
    return FAMILIES[family](x, u.to(x.device))


def per_image(names: tuple[str, ...], x: Tensor) -> Tensor:
    """A family for the batch, a triple for every image."""
    family = names[int(torch.randint(len(names), (1,)))]
    return FAMILIES[family](x, torch.rand(len(x), 3, device=x.device))


# -- evaluation ---------------------------------------------------------------------------------------------------------


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    augment: Callable[[int, int, Tensor], Tensor],
    order: Callable[[int], Iterable[list[int]]] | None = None,
) -> nn.Module:
    """SGD of one network on batches that a loader collates image by image, with running loss and accuracy.

    Args:
        augment: ``(epoch, batch number, images) -> images``.
        order: epoch -> positions of every batch, in place of the loader's own shuffling.
    """
    data = TensorDataset(images, labels)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    shuffled = DataLoader(data, batch_size=256, shuffle=True)
    network.train()
    for epoch in range(epochs):
        loader = shuffled if order is None else DataLoader(data, batch_sampler=order(epoch))
        correct, total = 0, 0.0
        for b, (x, y) in enumerate(loader):
            logits = network(augment(epoch, b, x))
            loss = F.cross_entropy(logits, y)
            correct += (logits.argmax(1) == y).sum().item()
            total += loss.item() * len(y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network


@torch.no_grad()
def test(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy of one network, from the same kind of loader."""
    network.eval()
    correct = 0
    for x, y in DataLoader(TensorDataset(images, labels), batch_size=256):
        correct += (network(x).argmax(1) == y).sum().item()
    return correct / len(labels)
