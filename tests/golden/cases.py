"""One function per reference-vector file: the file's input arrays in, the arrays that our code computes out.

A case reads every size, depth and tag off the array names, so that other vectors for the same functions can be dropped in. It
returns the outputs under the names that the file gives them; :data:`TOLERANCE` holds ``(rtol, atol)`` per file, or per
output (a pattern ``file/output``; the last match counts). The cases of one part of the library stand in a file of their own
beside this one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # this file may be loaded by its path alone

import cases_dcc
import cases_features
import cases_generative
import cases_idc
import cases_kernels
import cases_samplers
import cases_selection
import cases_unroll
import cases_wmdd
from arrays import Arrays, t

from lib import augment
from lib.match import features
from lib.match.gradient import Cosine, RowCosine, SquaredError
from lib.nets.convnet import ConvNet
from lib.nets.ensemble import Ensemble
from lib.select.greedy import herding, k_center


def convnet_of(arrays: Arrays, size: int, first_padding: int) -> ConvNet:
    """The ConvNet whose weights are the arrays ``w_<state-dict name, dots as underscores>``."""
    convs = [name for name in arrays if name.startswith("w_features_") and arrays[name].ndim == 4]
    width, channels = arrays["w_features_0_weight"].shape[:2]
    net = ConvNet(
        channels,
        arrays["w_classifier_weight"].shape[0],
        size,
        width=width,
        depth=len(convs),
        first_padding=first_padding,
    ).double()
    net.load_state_dict(
        {name: t(arrays["w_" + name.replace(".", "_")]).double() for name in net.state_dict()}
    )
    return net


def published_padding(channels: int) -> int:
    """The published rule: 3 for every one-channel input."""
    return 3 if channels == 1 else 1


def convnet_forward(a: Arrays) -> Arrays:
    net = convnet_of(a, a["x"].shape[2], published_padding(a["x"].shape[1]))
    embedding = net.embed(t(a["x"]))
    logits = net(t(a["x"]))
    loss = F.cross_entropy(logits, t(a["y"]).long())
    names = [name for name, _ in net.named_parameters()]
    gradients = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
    out = {"embedding": embedding, "logits": logits, "loss": loss, "param_order": np.array(names)}
    return out | {"g_" + name.replace(".", "_"): g for name, g in zip(names, gradients, strict=True)}


def dc_gradient_distance(a: Arrays) -> Arrays:
    count = int(a["n_tensors"])
    real = [t(a[f"real_{i:02d}"]).unsqueeze(0) for i in range(count)]
    syn = [t(a[f"syn_{i:02d}"]).unsqueeze(0).requires_grad_() for i in range(count)]
    ours, mse, cos = (gap.between(syn, real).sum() for gap in (RowCosine(), SquaredError(), Cosine()))

    def gradient(value: Tensor) -> list[Tensor]:
        return [g[0] for g in torch.autograd.grad(value, syn, materialize_grads=True)]

    single = [
        RowCosine().between([syn[i].detach()], [real[i]]).sum()
        if syn[i].dim() > 2
        else torch.zeros(()).double()
        for i in range(count)
    ]
    low = RowCosine().between([s.detach().float() for s in syn], [r.float() for r in real]).sum().double()
    out = {"per_tensor_ours": torch.stack(single), "dist_ours": ours, "dist_mse": mse, "dist_cos": cos}
    out |= {f"dours_dsyn_{i:02d}": g for i, g in enumerate(gradient(ours))}
    out |= {f"dmse_dsyn_{i:02d}": g for i, g in enumerate(gradient(mse))}
    out |= {f"dcos_dsyn_{i:02d}": g for i, g in enumerate(gradient(cos))}
    return out | {"dist_ours_float32": low}


def dc_matching_step(a: Arrays) -> Arrays:
    real = t(a["x_real"])  # (C, B, c, h, w)
    net = convnet_of(a, real.shape[-1], published_padding(real.shape[2]))
    syn = t(a["x_syn"]).unflatten(0, (len(real), -1))
    terms, gradient = RowCosine().match(Ensemble.of(net), real, syn)
    losses = terms["gradients"]
    return {"loss_per_class": losses, "loss": losses.sum(), "dloss_dxsyn": gradient.flatten(0, 1)}


def dsa_ops(a: Arrays) -> Arrays:
    x, n = t(a["x"]), len(a["x"])
    size = int(a["cutout_size"])
    p = {name: t(value) for name, value in a.items() if name not in ("x", "cutout_size")}
    u = torch.stack([p["brightness_u"], p["saturation_u"], p["contrast_u"]], 1)
    first = {name: value[:1].expand(n) for name, value in p.items() if value.shape == (n,)}
    return {
        "scale_out": augment.scale(x, p["scale_sx"], p["scale_sy"]),
        "rotate_out": augment.rotate(x, p["rotate_radians"]),
        "crop_out": augment.crop(x, p["crop_drow"], p["crop_dcol"]),
        "cutout_out": augment.cutout(x, p["cutout_row_center"], p["cutout_col_center"], size),
        "flip_out": augment.flip(x, p["flip_u"]),
        "brightness_out": augment.brightness(x, p["brightness_u"]),
        "saturation_out": augment.saturation(x, p["saturation_u"]),
        "contrast_out": augment.contrast(x, p["contrast_u"]),
        "color_out": augment.color(x, u),
        "siamese_scale_out": augment.scale(x, first["scale_sx"], first["scale_sy"]),
        "siamese_crop_out": augment.crop(x, first["crop_drow"], first["crop_dcol"]),
        "siamese_cutout_out": augment.cutout(x, first["cutout_row_center"], first["cutout_col_center"], size),
    }


def _class_means(a: Arrays) -> tuple[Tensor, Tensor, Tensor]:
    syn = t(a["emb_syn"]).requires_grad_()
    losses = features.class_mean(t(a["emb_real"]), syn)
    total = losses.sum()
    return losses, total, torch.autograd.grad(total, syn)[0]


def dm_loss(a: Arrays) -> Arrays:
    losses, total, gradient = _class_means(a)
    return {"per_class": losses, "total": total, "grad_emb_syn": gradient}


def dm_classmean_loss(a: Arrays) -> Arrays:
    losses, total, gradient = _class_means(a)
    return {"loss_per_class": losses, "loss": total, "dloss_demb_syn": gradient}


def dm_convnet(a: Arrays) -> Arrays:
    side = a["x_syn"].shape[-1]
    net = convnet_of(a, side, (int(a["im_size"].flat[0]) - side) // 2 + 1)
    x_syn = t(a["x_syn"]).requires_grad_()
    syn, real = net.embed(x_syn), net.embed(t(a["x_real"])).detach()
    loss = features.class_mean(real.unsqueeze(0), syn.unsqueeze(0)).sum()
    return {
        "emb_syn": syn,
        "emb_real": real,
        "logits_syn": net(x_syn),
        "loss": loss,
        "grad_x_syn": torch.autograd.grad(loss, x_syn)[0],
    }


def selection_herding(a: Arrays) -> Arrays:
    points, budget = t(a["features"]), int(a["budget"])
    rules = {
        "order_icarl_argmin": "icarl",
        "order_welling_inner": "welling",
        "order_deepcore_argmax": "deepcore",
    }
    return {name: herding(points, budget, rule) for name, rule in rules.items()}


def selection_kcenter(a: Arrays) -> Arrays:
    points, budget = t(a["features"]), int(a["budget"])
    return {
        "order": k_center(points, budget, int(a["first"])),
        "order_after_already_selected": k_center(
            points, budget, already_selected=a["already_selected"].tolist()
        ),
    }


CASES = {
    function.__name__: function
    for function in (
        convnet_forward,
        dc_gradient_distance,
        dc_matching_step,
        dsa_ops,
        dm_loss,
        dm_classmean_loss,
        dm_convnet,
        selection_herding,
        selection_kcenter,
    )
}

TOLERANCE: dict[str, tuple[float, float]] = {
    "convnet_forward": (
        1e-9,
        1e-12,
    ),  # the atol: biases before an instance norm have gradient 0 up to rounding
    "dc_gradient_distance": (1e-10, 0.0),
    "dc_gradient_distance/dist_ours_float32": (1e-5, 0.0),
    "dc_matching_step": (1e-8, 1e-12),
    "dsa_ops": (0.0, 1e-5),
    "dsa_ops/crop_out": (0.0, 0.0),
    "dsa_ops/cutout_out": (0.0, 0.0),
    "dsa_ops/flip_out": (0.0, 0.0),
    "dsa_ops/siamese_crop_out": (0.0, 0.0),
    "dsa_ops/siamese_cutout_out": (0.0, 0.0),
    "dm_loss": (0.0, 1e-10),
    "dm_classmean_loss": (1e-12, 1e-14),
    "dm_convnet": (0.0, 1e-8),
    "selection_herding": (0.0, 0.0),
    "selection_kcenter": (0.0, 0.0),
}

# Arrays that describe the inputs and are not computed: never counted as outputs that a case fails to reproduce.
INPUTS = {
    "convnet_forward": ("x", "y", "w_*"),
    "dc_gradient_distance": ("n_tensors", "syn_*", "real_*"),
    "dc_matching_step": ("x_real", "x_syn", "w_*"),
    "dsa_ops": ("x", "*_sx", "*_sy", "*_radians", "*_drow", "*_dcol", "*_center", "cutout_size", "*_u"),
    "dm_loss": ("emb_real", "emb_syn"),
    "dm_classmean_loss": ("emb_real", "emb_syn"),
    "dm_convnet": ("width", "depth", "num_classes", "im_size", "x_syn", "x_real", "w_*"),
    "selection_herding": ("features", "budget"),
    "selection_kcenter": ("features", "budget", "seed", "first", "already_selected"),
}


for part in (
    cases_dcc,
    cases_features,
    cases_generative,
    cases_idc,
    cases_kernels,
    cases_samplers,
    cases_selection,
    cases_unroll,
    cases_wmdd,
):
    CASES |= {function.__name__: function for function in part.CASES}
    TOLERANCE |= part.TOLERANCE
    INPUTS |= part.INPUTS
globals().update(CASES)  # every case by its file's name, wherever it is written
