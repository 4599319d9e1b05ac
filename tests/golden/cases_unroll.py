"""Cases of the methods that differentiate through training: DD, MTT, and HaBa's renderer and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arrays import Arrays, t
from torch import nn

from lib.formation import Hallucinators
from lib.match.supervised_contrast import alike, supcon
from lib.match.trajectory import relative_distance
from lib.match.unroll import MODES, Step, walk
from lib.methods.dd import real_loss
from lib.nets.convnet import ConvNet
from lib.nets.flat import logits


def _network(dims) -> nn.Module:
    """Linear, or a tanh MLP with one hidden layer."""
    d, hidden, classes = dims.tolist()
    layers = (
        [nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(d, classes)]
    )
    return nn.Sequential(nn.Flatten(), *layers).double()


def _dd(a: Arrays) -> Arrays:
    raw, images = t(a["raw_lrs"]).requires_grad_(), t(a["x_syn"])
    attack = (int(a["attack_class"]), int(a["target_class"])) if str(a["mode"]) == "distill_attack" else None
    rates, T = F.softplus(raw), int(a["distill_steps"])
    steps = [Step(images[j % T], t(a["y_syn"])[j % T], rate) for j, rate in enumerate(rates)]
    network, outputs = _network(a["net_dims"]), []
    for mode in ("recompute", "bptt"):
        run = walk(network, t(a["theta0"]).unsqueeze(0), steps, mode)
        loss, u = real_loss(network, run.end, t(a["x_real"]), t(a["y_real"]), attack)
        dx, dr = run.pull(u)
        grad_raw = torch.autograd.grad(rates, raw, dr.view_as(rates), retain_graph=True)[0]
        grad_x = torch.stack(dx).unflatten(0, (-1, T)).sum(0)
        outputs.append(
            {"theta_final": run.end[0], "loss": loss[0], "grad_x_syn": grad_x, "grad_raw_lrs": grad_raw}
        )
    first, second = outputs
    for name, value in first.items():  # both ways stand behind the numbers
        torch.testing.assert_close(second[name], value, rtol=1e-10, atol=1e-12)
    return first | {"step_lrs": rates}


def dd_onestep_linear(a: Arrays) -> Arrays:
    return _dd(a)


def dd_bptt_mlp(a: Arrays) -> Arrays:
    return _dd(a)


def dd_bptt_attack(a: Arrays) -> Arrays:
    return _dd(a)


def mtt_loss(a: Arrays) -> Arrays:
    start, target, student = (t(a[f"theta_{name}"]).unsqueeze(0) for name in ("start", "target", "student"))
    loss, u = relative_distance(student, start, target)
    return {"loss": loss[0], "grad_student": u[0]}


def mtt_unroll(a: Arrays) -> Arrays:
    channels, size, classes, width, depth, *_ = a["arch"].tolist()
    network = ConvNet(channels, classes, size, width=width, depth=depth).double()
    start, target = (t(a[f"theta_{name}"]).unsqueeze(0) for name in ("start", "target"))
    x, y, rate = t(a["x_syn"]), t(a["y_syn"]), t(a["lr"])
    rows = t(a["batch_idx"]).long()
    steps = [Step(x[r], y[r], rate) for r in rows]
    found = {}
    for mode in MODES:
        run = walk(network, start, steps, mode)
        loss, u = relative_distance(run.end, start, target)
        dx, drate = run.pull(u)
        found[mode] = torch.zeros_like(x).index_add(0, rows.flatten(), torch.cat(dx)), drate.sum()
    for mine, other in zip(found["bptt"], found["recompute"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    return {
        "logits_at_start": logits(network, start, x.unsqueeze(0))[0],
        "ce_steps": run.losses[:, 0],
        "theta_student": run.end[0],
        "loss": loss[0],
        "grad_x": found["recompute"][0],
        "grad_lr": found["recompute"][1],
        "tesla_grad_x": found["tesla"][0],
        "tesla_grad_lr": found["tesla"][1],
    }


def haba_hallucinator(a: Arrays) -> Arrays:
    names = ("enc_weight", "enc_bias", "scale", "shift", "dec_weight", "dec_bias")
    stacked = {name: t(a[name]).reshape(1, *a[name].shape) for name in names}
    stacked |= {name: stacked[name][:, 0] for name in ("scale", "shift")}  # theirs have a leading 1
    bases = t(a["bases"]).requires_grad_()
    images = Hallucinators(**stacked)(bases)
    return {"images": images, "grad_bases": torch.autograd.grad(images, bases, t(a["cotangent"]))[0]}


def haba_contrastive(a: Arrays) -> Arrays:
    e = [t(a[f"embed{k}"]).requires_grad_() for k in (0, 1)]
    loss = supcon(*e, t(a["labels"]), float(a["temperature"]))
    g0, g1 = torch.autograd.grad(loss, e)
    likeness = alike(*e)
    return {
        "supcon": loss,
        "grad_embed0": g0,
        "grad_embed1": g1,
        "cos_generator": likeness,
        "cos_adversary": 1 - likeness,
    }


CASES = (
    dd_onestep_linear,
    dd_bptt_mlp,
    dd_bptt_attack,
    mtt_loss,
    mtt_unroll,
    haba_hallucinator,
    haba_contrastive,
)
TOLERANCE = {
    "dd_onestep_linear": (1e-8, 1e-10),
    "dd_bptt_mlp": (1e-8, 1e-10),
    "dd_bptt_attack": (1e-8, 1e-10),
    "mtt_loss": (1e-7, 1e-9),
    "mtt_unroll": (1e-7, 1e-9),
    "haba_hallucinator": (1e-9, 1e-12),
    "haba_contrastive": (1e-9, 1e-12),
}
_DD = ("net_dims", "theta0", "x_*", "y_*", "raw_lrs", "distill_*", "mode", "attack_class", "target_class")
INPUTS = {
    "dd_onestep_linear": _DD,
    "dd_bptt_mlp": _DD,
    "dd_bptt_attack": _DD,
    "mtt_loss": ("theta_*",),
    "mtt_unroll": ("arch", "param_*", "theta_start", "theta_target", "x_syn", "y_syn", "lr", "batch_idx"),
    "haba_hallucinator": ("enc_*", "dec_*", "scale", "shift", "bases", "cotangent"),
    "haba_contrastive": ("embed*", "labels", "temperature"),
}
