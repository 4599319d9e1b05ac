"""Cases of the methods that differentiate through training: DD, MTT, and HaBa's renderer and losses."""

from __future__ import annotations

import torch
from arrays import Arrays, t

from lib.formation import Hallucinators


def haba_hallucinator(a: Arrays) -> Arrays:
    names = ("enc_weight", "enc_bias", "scale", "shift", "dec_weight", "dec_bias")
    stacked = {name: t(a[name]).reshape(1, *a[name].shape) for name in names}
    stacked |= {name: stacked[name][:, 0] for name in ("scale", "shift")}  # theirs have a leading 1
    bases = t(a["bases"]).requires_grad_()
    images = Hallucinators(**stacked)(bases)
    return {"images": images, "grad_bases": torch.autograd.grad(images, bases, t(a["cotangent"]))[0]}


CASES = (haba_hallucinator,)
TOLERANCE = {"haba_hallucinator": (1e-9, 1e-12)}
INPUTS = {
    "haba_hallucinator": ("enc_*", "dec_*", "scale", "shift", "bases", "cotangent"),
}
