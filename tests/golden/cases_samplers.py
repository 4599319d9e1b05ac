"""Cases of the methods that sample: DiM and Minimax diffusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from arrays import Arrays, t

from lib.match.latent_memory import Memory, diversity, mean_over_classes, representativeness
from lib.match.seen import GAPS, feature_gap, logit_gap
from lib.nets.generators.diffusion import Diffusion
from lib.nets.generators.gan import gradient_penalty

LOGITS, FEATURES = 0.01, 0.001  # the published weights


def dim_losses(a: Arrays) -> Arrays:
    syn = t(a["logits_syn"]).requires_grad_()
    loss = LOGITS * logit_gap(t(a["logits_real"]), syn)
    layers = sum(name.startswith("feat_real_") for name in a)
    real, fake = ([t(a[f"feat_{kind}_{i}"]) for i in range(layers)] for kind in ("real", "syn"))

    def source(x: torch.Tensor) -> torch.Tensor:
        h = F.conv2d(x, t(a["gp_conv_w"]), t(a["gp_conv_b"]), padding=1)
        return F.linear(h.tanh().mean((2, 3)), t(a["gp_fc_w"]), t(a["gp_fc_b"]))[:, 0]

    images = (t(a[f"gp_img_{kind}"]) for kind in ("real", "syn"))
    out = {"logit_match_loss": loss, "logit_match_grad_syn": torch.autograd.grad(loss, syn)[0]}
    out |= {f"feat_match_{gap}": FEATURES * feature_gap(real, fake, gap) for gap in GAPS}
    return out | {"gp_value": gradient_penalty(source, *images, t(a["gp_alpha"])[:, 0])}


def minimax_diffusion(a: Arrays) -> Arrays:
    chain = Diffusion()
    x, noise, times, output = (t(a[name]) for name in ("x_start", "noise", "t", "model_output"))
    x_t = chain.noised(x, times, noise)
    terms = chain.terms(output, x, x_t, times, noise)
    short = chain.respaced(len(a["respaced_steps"]))
    index = t(a["resp_index"])
    step = short.posterior(output, x_t, index)
    return {
        "x_t": x_t,
        "pred_x0": terms.clean,
        "mse": terms.mse,
        "vb": terms.bound,
        "loss": terms.loss,
        "betas_first3": chain.betas[:3],
        "betas_last3": chain.betas[-3:],
        "alphas_cumprod_at": chain.alphas_bar[[0, 1, 499, 998, 999]],
        "respaced_steps": short.times,
        "respaced_betas": short.betas,
        "resp_model_t": short.times[index],
        "resp_mean": step.mean,
        "resp_variance": step.log_variance.exp(),
        "resp_pred_x0": step.clean,
    }


def minimax_losses(a: Arrays) -> Arrays:
    x, labels = t(a["real_latents"]), t(a["labels"]).long()
    z = t(a["pseudo_latents"]).requires_grad_()
    classes = sum(name.startswith("real_memory_before_") for name in a)
    memories = {kind: Memory(classes, int(a["memory_size"]), x) for kind in ("real", "pseudo")}
    for kind, memory in memories.items():
        for c in range(classes):
            before = t(a[f"{kind}_memory_before_{c}"])
            memory.write(before, torch.full((len(before),), c))

    real, own = (
        representativeness(z, labels, memories["real"]),
        diversity(z, labels, memories["pseudo"]),
    )
    towards = float(a["lambda_pos"]) * mean_over_classes(real, labels)
    apart = float(a["lambda_neg"]) * mean_over_classes(own, labels)
    memories["real"].write(x, labels)
    memories["pseudo"].write(z, labels)
    (gradient,) = torch.autograd.grad(towards + apart, z)
    out = {"per_class_pos": real, "per_class_neg": own, "pos_match_loss": towards, "neg_match_loss": apart}
    after = {
        f"{kind}_memory_after_{c}": memory.of(c) for kind, memory in memories.items() for c in range(classes)
    }
    return out | after | {"grad_pseudo": gradient}


CASES = (dim_losses, minimax_diffusion, minimax_losses)
TOLERANCE = {
    "dim_losses": (0.0, 1e-10),
    "dim_losses/gp_value": (0.0, 1e-8),
    "minimax_diffusion": (2e-4, 1e-7),
    "minimax_losses": (1e-5, 1e-12),  # the file's sums are of 32 bits
    "minimax_losses/per_class_*": (1e-6, 0.0),
    "minimax_losses/*_memory_after_*": (0.0, 0.0),
}
INPUTS = {
    "dim_losses": ("logits_*", "feat_real_*", "feat_syn_*", "gp_img_*", "gp_alpha", "gp_conv_*", "gp_fc_*"),
    "minimax_diffusion": ("x_start", "noise", "t", "model_output", "resp_index"),
    "minimax_losses": ("*_memory_before_*", "*_latents", "labels", "memory_size", "lambda_*"),
}
