"""Generators: images as codes of a network that was trained on the real data."""

from __future__ import annotations

from lib.nets.generators.biggan import BigGAN
from lib.nets.generators.denoiser import LatentDiT, PixelUNet
from lib.nets.generators.gan import ACGAN
from lib.nets.generators.prior import Generator, Prior, the_prior
from lib.nets.generators.vae import LayeredVAE, SpatialVAE

# name in a file -> class; its fields are the recipe
KINDS: dict[str, type[Prior]] = {
    kind.kind: kind for kind in (ACGAN, BigGAN, LatentDiT, LayeredVAE, PixelUNet, SpatialVAE)
}

__all__ = [
    "ACGAN",
    "BigGAN",
    "KINDS",
    "Generator",
    "LatentDiT",
    "LayeredVAE",
    "PixelUNet",
    "Prior",
    "SpatialVAE",
    "the_prior",
]
