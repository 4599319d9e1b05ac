"""Cases of IDC: multi-formation and the distance of gradients."""

from __future__ import annotations

import re

import torch
from arrays import Arrays, t
from torch import Tensor

from lib.formation import MultiFormation
from lib.match.gradient import METRICS, LayerSum
from lib.nets.convnet import ConvNet
from lib.nets.ensemble import Ensemble


def idc_multiformation(a: Arrays) -> Arrays:
    out = {}
    for name in a:
        if match := re.fullmatch(r"decoded_(\d+)_f(\d+)", name):
            side, factor = match.groups()
            x = t(a[f"x_{side}"]).requires_grad_()
            decoded = MultiFormation(int(factor), pad=True)(x)
            weights = torch.arange(decoded.numel(), dtype=torch.float64).cos().view(decoded.shape)
            out |= {name: decoded, f"vjp_{side}_f{factor}": torch.autograd.grad(decoded, x, weights)[0]}
        elif match := re.fullmatch(r"decoded_multi_(\d+)_f(\d+)", name):
            out[name] = MultiFormation(int(match[2]), kind="multi", pad=True)(t(a[f"x_{match[1]}"]))
        elif match := re.fullmatch(r"mixinit_out_(\d+)_f(\d+)", name):
            sources, factor = t(a[name.replace("out", "src")]), int(match[2])
            out[name] = MultiFormation(factor).pack(sources.unflatten(0, (factor**2, -1)))
    return out


def idc_matching_loss(a: Arrays) -> Arrays:
    numbers = sorted(name.removeprefix("real_") for name in a if name.startswith("real_"))
    real = [t(a[f"real_{i}"]).unsqueeze(0) for i in numbers]
    syn = [t(a[f"syn_{i}"]).unsqueeze(0).requires_grad_() for i in numbers]
    out = {}
    for metric in METRICS:
        loss = LayerSum(metric).between(syn, real).sum()
        out |= {f"loss_{metric}": loss, f"grad0_{metric}": torch.autograd.grad(loss, syn[0])[0][0]}
        out[f"loss_allparams_{metric}"] = LayerSum(metric, "all").between(syn, real).sum()
    net = _network(a)
    label = int(a["e2e_label"])  # the same images for the classes before it: classes do not touch each other
    real, syn = (t(a[f"e2e_x{side}"]).expand(label + 1, *[-1] * 4) for side in ("real", "syn"))
    for metric in ("mse", "l1"):
        terms, gradient = LayerSum(metric).match(Ensemble.of(net), real, syn)
        out |= {f"e2e_loss_{metric}": terms["gradients"][label], f"e2e_grad_{metric}": gradient[label]}
    return out


def _network(a: Arrays) -> ConvNet:
    """The ConvNet whose weights are ``w_layers_conv_{i}_*``, ``w_layers_norm_{i}_*``, ``w_classifier_*``."""
    depth = sum(bool(re.fullmatch(r"w_layers_conv_\d+_weight", name)) for name in a)
    (width, channels), classes = a["w_layers_conv_0_weight"].shape[:2], len(a["w_classifier_weight"])
    net = ConvNet(
        channels, classes, a["e2e_xsyn"].shape[-1], width=width, depth=depth, first_padding=1
    ).double()

    def stored(name: str) -> Tensor:
        if match := re.fullmatch(r"features\.(\d+)\.(\w+)", name):
            kind = ("conv", "norm")[int(match[1]) % 4]
            return t(a[f"w_layers_{kind}_{int(match[1]) // 4}_{match[2]}"])
        return t(a["w_" + name.replace(".", "_")])

    net.load_state_dict({name: stored(name) for name in net.state_dict()})
    return net


CASES = (idc_multiformation, idc_matching_loss)
TOLERANCE = {
    "idc_multiformation": (0.0, 1e-12),
    "idc_multiformation/mixinit_out_*": (0.0, 0.0),
    "idc_matching_loss": (1e-8, 1e-12),
}
INPUTS = {
    "idc_multiformation": ("x_*", "mixinit_src_*"),
    "idc_matching_loss": ("real_*", "syn_*", "w_*", "e2e_xreal", "e2e_xsyn", "e2e_label"),
}
