"""Cases of contrastive gradient matching."""

from __future__ import annotations

import torch
from arrays import Arrays, t

from lib.match.contrastive import Contrastive
from lib.nets.convnet import ConvNet
from lib.nets.ensemble import Ensemble


def dcc_matching_step(a: Arrays) -> Arrays:
    real = t(a["x_real"])  # (C, B, c, h, w)
    syn = t(a["x_syn"]).unflatten(0, (len(real), -1))
    width, channels = a["w_features_0_weight"].shape[:2]
    depth = sum(name.startswith("w_features_") and a[name].ndim == 4 for name in a)
    padding = 3 if channels == 1 else 1
    net = ConvNet(
        channels, len(real), real.shape[-1], width=width, depth=depth, first_padding=padding
    ).double()
    net.load_state_dict({name: t(a["w_" + name.replace(".", "_")]).double() for name in net.state_dict()})
    assert torch.equal(t(a["y_syn"]).long(), torch.arange(len(real)).repeat_interleave(syn.shape[1]))
    terms, gradient = Contrastive().match(Ensemble.of(net), real, syn)
    return {"loss": terms["gradients"].sum(), "dloss_dxsyn": gradient.flatten(0, 1)}


CASES = (dcc_matching_step,)
TOLERANCE = {"dcc_matching_step": (1e-8, 1e-12)}
INPUTS = {"dcc_matching_step": ("w_*", "x_real", "x_syn", "y_syn")}
