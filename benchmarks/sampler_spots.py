"""Drawing images from a diffusion model, and Minimax's steps, beside the plain versions: one image after the other, lists as memories."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import REFERENCE, HotSpot, difference
from benchmarks.hot_spots import FLOAT32, STEPS, Setting, distillation
from lib import nets
from lib.methods.minimax import Minimax
from lib.nets.generators.denoiser import PixelUNet
from lib.nets.generators.diffusion import Diffusion
from lib.nets.generators.unet import UNet
from lib.plain import ancestral

DRAWN, KEPT, SCALE = 100, 50, 4.0  # images, steps of the chain, guidance


def sampling(setting: Setting) -> HotSpot:
    """The published code draws images one by one; together they share every forward pass."""
    shape, chain = (3, setting.side, setting.side), Diffusion()
    network = nets.initialise(UNet(3, setting.classes, max(8, setting.width // 2)), setting.generator(0))
    network = network.to(setting.device).eval().requires_grad_(False)
    count = DRAWN if setting.width > 8 else 4  # the tests' size
    labels = torch.arange(count, device=setting.device) % setting.classes
    table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def plain(y: Tensor, generator: torch.Generator) -> Tensor:
        return ancestral(network, y, setting.classes, shape, table, KEPT, SCALE, generator)

    def ours() -> Tensor:
        return chain.respaced(KEPT).sample(network, labels, shape, setting.generator(1), SCALE, clip=True)

    def one_by_one() -> Tensor:
        generator = setting.generator(1)
        return torch.cat([plain(y, generator) for y in labels.split(1)])

    def check() -> dict[str, float]:
        return {"together": difference(ours(), plain(labels, setting.generator(1)))}

    calls = {REFERENCE: one_by_one, "together": ours}
    return HotSpot("sampling, 50 steps", "image", count, calls, check, {"together": FLOAT32}, most=3)


def minimax(setting: Setting) -> HotSpot:
    """Fine-tuning steps with their criteria, and one image of every class drawn at the end."""
    method = Minimax(
        prior=PixelUNet(steps=0, width=max(8, setting.width // 2)), iterations=3 * STEPS, batch=min(64, setting.real),
        trainable="all", average=0.9, sampling_steps=2, guidance=2.0,
    )  # fmt: skip
    return distillation(setting, "Minimax step", "minimax", {"tensors as memories": method}, ipc=1)


SAMPLER_SPOTS = {"sampling": sampling, "minimax": minimax}
