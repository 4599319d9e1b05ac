"""Generators as decoders, beside the plain versions: a batch's inversion, steps that move latents, and a step of a GAN.

What a step in latents costs against one in pixels is read off beside the hot spot ``dm``, which has the same images and network.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from benchmarks.harness import REFERENCE, HotSpot, difference
from benchmarks.hot_spots import FLOAT32, STEPS, Setting, distillation
from lib import nets
from lib.methods.dim import DiM
from lib.methods.dm import DM
from lib.methods.glad import GLaD
from lib.methods.itgan import ITGAN
from lib.nets.generators.gan import ACGAN
from lib.nets.generators.inversion import invert
from lib.nets.generators.prior import to_data
from lib.nets.generators.vae import LayeredVAE
from lib.plain import plain
from lib.synset import class_major

INVERSION_STEPS, RATE = 10, 0.1


warnings.filterwarnings(
    "ignore", "the prior .* has collapsed"
)  # random weights: what they make does not matter for the cost


def _prior(setting: Setting) -> LayeredVAE:
    """Of random weights."""
    return LayeredVAE(steps=0, width=2 * setting.width)


def inversion(setting: Setting) -> HotSpot:
    """Latents of real images: all classes in one batch, or one class after the other."""
    train, C = setting.images(setting.ipc, 0), setting.classes
    prior = _prior(setting)
    G = prior.make(train).eval()
    prior.initialise(G, setting.generator(0))
    G.requires_grad_(False)
    psi = nets.make(setting.network, train, setting.generator(1)).eval().requires_grad_(False).embed
    y = class_major(C, setting.ipc, setting.device)
    z = G.draw(y, setting.generator(2))

    def ours() -> Tensor:
        return invert(G, psi, train.images, y, train.transform, z, steps=INVERSION_STEPS, lr=RATE)

    def by_class() -> Tensor:
        found = []
        for x, c, begun in zip(train.images.chunk(C), y.chunk(C), z.chunk(C), strict=True):
            code, f = begun.clone().requires_grad_(), psi(x)
            adam = torch.optim.Adam([code], lr=RATE)
            for _ in range(INVERSION_STEPS):
                made = to_data(G(code, c), train.transform)
                loss = ((psi(made) - f).square().mean() + (made - x).square().mean()) / C
                (code.grad,) = torch.autograd.grad(loss, code)
                adam.step()
            found.append(code.detach())
        return torch.cat(found)

    def check() -> dict[str, float]:
        return {"one batch": difference(ours() - z, by_class() - z)}

    calls = {REFERENCE: by_class, "one batch": ours}
    return HotSpot("inversion of a batch", "step", INVERSION_STEPS, calls, check, {"one batch": FLOAT32})


def itgan(setting: Setting) -> HotSpot:
    """IT-GAN's two terms, from latents that were not inverted."""
    method = ITGAN(
        prior=_prior(setting), iterations=STEPS, batch=None, real_batch=setting.real, network=setting.network,
        inversion="none",
    )  # fmt: skip
    return distillation(setting, "IT-GAN step", "itgan", {"all classes at once": method})


def latents(setting: Setting) -> HotSpot:
    """DM's loss in latents (GLaD), on as many images as ``dm`` has."""
    loss = DM(iterations=STEPS, real_batch=setting.real, network=setting.network, init="noise")
    method = GLaD(prior=_prior(setting), objective=loss, space="z", iterations=STEPS, lr=0.1, chunk=None)
    return distillation(setting, "DM step in latents", "glad", {"all classes at once": method})


def gan(setting: Setting) -> HotSpot:
    """DiM: two steps of a network of the pool, one of the generator, one of the critic."""
    train, loop = setting.images(setting.real, 0), plain("dim")
    prior = ACGAN(
        steps=0, width=2 * setting.width, least=setting.side // 4, convs=(1, 0), critic_width=2 * setting.width, critic_convs=2,
        strided=(1, 2),
    )  # fmt: skip
    method = DiM(
        prior=prior, iterations=2 * STEPS, lr=1e-4, batch=min(64, 2 * setting.real), pool=(setting.network,), network_steps=2
    )  # fmt: skip

    def ours() -> Tensor:
        g = setting.generator(1)
        state = method.begin(train, 1, g)
        return torch.stack([method.step(state, g)["loss"] for _ in range(method.iterations)])

    def reference() -> Tensor:
        return torch.tensor(loop(method, train, 1, setting.generator(1))[1])

    def check() -> dict[str, float]:
        return {"library": difference(ours().cpu(), reference())}

    calls = {REFERENCE: reference, "library": ours}
    return HotSpot("DiM step", "step", method.iterations, calls, check, {"library": FLOAT32})


GENERATOR_SPOTS = {"inversion": inversion, "itgan": itgan, "latents": latents, "gan": gan}
