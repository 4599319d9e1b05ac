"""Cases of the methods that learn codes of a generator."""

from __future__ import annotations

import torch
from arrays import Arrays, t
from torch import Tensor

from lib.match import relations
from lib.match.features import class_mean, paired
from lib.nets.generators.inversion import inversion_errors
from lib.nets.training import schedule


def leaf(array) -> Tensor:
    return t(array).requires_grad_()


def itgan_losses(a: Arrays) -> Arrays:
    f, lam = leaf(a["feat_syn"]), float(a["lam"])
    con = class_mean(t(a["feat_real_batch"])[None], f[None])[0]
    reg = paired(t(a["feat_paired_real"])[None], f[None])[0]
    loss = (1 - lam) * con + lam * reg
    g, x = leaf(a["inv_feat_syn"]), leaf(a["inv_img_syn"])
    feature, pixel = inversion_errors(g, t(a["feat_paired_real"]), x, t(a["inv_img_real"]))
    by_feature, by_image = torch.autograd.grad(feature + pixel, (g, x))
    return {
        "loss_cond": con, "loss_reg": reg, "loss": loss, "grad_feat_syn": torch.autograd.grad(loss, f)[0],
        "inv_loss_feat": feature, "inv_loss_pixel": pixel, "inv_loss": feature + pixel,
        "inv_grad_feat": by_feature, "inv_grad_img": by_image,
    }  # fmt: skip


def dcgm_reconstruction_losses(a: Arrays) -> Arrays:
    y, found = t(a["labels"]).long(), {}
    for suffix, mu in (("centered", t(a["center"])), ("raw", 0.0)):
        for name in ("intra", "inter"):
            f = leaf(a["feat"])
            loss = getattr(relations, name)(f, y, mu, float(a[f"margin_{name}"]))
            found |= {f"{name}_{suffix}": loss, f"grad_{name}_{suffix}": torch.autograd.grad(loss, f)[0]}
    return found


def glad_eval_lr(a: Arrays) -> Arrays:
    epochs = int(a["epochs"])
    rate, _ = schedule("warm-cosine", float(a["base_lr"]), epochs)
    return {"lr": torch.tensor([rate(epoch) for epoch in range(epochs)], dtype=torch.float64)}


CASES = (itgan_losses, dcgm_reconstruction_losses, glad_eval_lr)
TOLERANCE = {
    "itgan_losses": (1e-10, 1e-12),
    "dcgm_reconstruction_losses": (1e-10, 1e-12),
    "glad_eval_lr": (1e-9, 1e-15),
}
INPUTS = {
    "itgan_losses": ("feat_*", "lam", "inv_feat_syn", "inv_img_*"),
    "dcgm_reconstruction_losses": ("feat", "labels", "center", "margin_*"),
    "glad_eval_lr": ("epochs", "base_lr"),
}
