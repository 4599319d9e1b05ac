"""Cases of the distribution-matching discrepancies: the very distances that the methods run, on looks whose content is known."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch
from arrays import Arrays, t
from torch import Tensor

from lib.formation import mosaic
from lib.match import attention, features, mmd, style, transport
from lib.match.distance import At, Distance, Look
from lib.match.features import ClassAware, ClassMean, Discrimination, LayerMeans
from lib.match.mmd import MMD
from lib.match.style import Diversity, Gram, Moments, StyleSpread
from lib.methods.datadam import attention_and_mean


def one(array: np.ndarray) -> Tensor:
    """An array of one class, with the class axis."""
    return t(array).unsqueeze(0)


def numbered(a: Arrays, pattern: str) -> list[str]:
    """Names that match ``pattern`` with a number in its group, by that number."""
    found = {int(match[1]): name for name in a if (match := re.fullmatch(pattern, name))}
    return [found[number] for number in sorted(found)]


def total(distance: Distance, real: Look, syn: Look) -> Tensor:
    """What a method minimises: the sum over terms and classes."""
    return sum(distance.between(real, syn).values()).sum()


# The reference kept the widths in float32 (relative error 6e-8): the gradients and the
# Gram matrix use the same numbers, the losses our own.
STORED_GAMMAS = tuple(float(np.float32(gamma)) for gamma in (0.1, 1.0, 5.0))


def _as_stored(kernel: str, real: Tensor, syn: Tensor) -> Tensor:
    if kernel == "laplace_code":
        return mmd.mmd(real, syn, partial(mmd.laplace_code, gammas=STORED_GAMMAS)).sum()
    width = float(mmd.mean_squared_distance(real, syn).float()) if kernel == "gaussian" else "adaptive"
    return total(MMD(kernel, width), Look.of(real), Look.of(syn))


def m3d_mmd(a: Arrays) -> Arrays:
    real, syn = one(a["emb_real"]), one(a["emb_syn"])
    out = {"bandwidth": mmd.mean_squared_distance(real, syn)[0]}
    for name in a:
        if match := re.fullmatch(r"(loss|grad)(01)?_(\w+)", name):
            kernel = "laplace_code" if match[3] == "laplace" else match[3]
            factor = 0.1 if match[2] else 1.0
            x, y = factor * real, (factor * syn).requires_grad_()
            if match[1] == "loss":
                out[name] = total(MMD(kernel), Look.of(x), Look.of(y))
            else:
                out[name] = torch.autograd.grad(_as_stored(kernel, x, y), y)[0][0]
        elif match := re.fullmatch(r"fixed_bw([\d.]+)_(\w+)", name):
            out[name] = total(MMD(match[2], float(match[1])), Look.of(real), Look.of(syn))
        elif match := re.fullmatch(r"gram_(\w+)", name):
            union = torch.cat([syn, real], 1)
            width = mmd.mean_squared_distance(real, syn).float().double()
            out[name] = mmd.KERNELS[match[1]](union, union, width)[0]
    return out


def cafe_loss(a: Arrays) -> Arrays:
    classes = int(a["num_classes"])
    tags = [name.removesuffix("_real") for name in numbered(a, r"f(\d+)_real")]
    leaves = [t(a[f"{tag}_syn"]).requires_grad_() for tag in tags]

    def look(maps: list[Tensor]) -> Look:
        """The last one is that of the pooling."""
        *relus, pool = (one.unflatten(0, (classes, -1)) for one in maps)
        return Look.of(pool.flatten(2), {"act": relus})

    real, syn = look([t(a[f"{tag}_real"]) for tag in tags]), look(leaves)
    names = numbered(a, r"w_relu(\d+)") + numbered(a, r"w_pool(\d+)")
    weights, discrimination = tuple(float(a[name]) for name in names), Discrimination(float(a["w_disc"]))
    terms = (ClassMean() + LayerMeans(weights) + discrimination).between(real, syn)
    embedded, weighted, disc = (
        total(part, real, syn) for part in (ClassMean(), LayerMeans(weights), discrimination)
    )
    sum_of_all = sum(terms.values()).sum()
    gradients = torch.autograd.grad(sum_of_all, leaves, retain_graph=True)
    layers = LayerMeans((1.0,) * len(tags)).between(real, syn).values()
    return (
        {f"align_{tag}": value.sum() for tag, value in zip(tags, layers, strict=True)}
        | {f"grad_{tag}": g for tag, g in zip(tags, gradients, strict=True)}
        | {
            "align_embed": embedded,
            "disc_logits": features.discrimination_logits(real.embedding, syn.embedding).flatten(0, 1),
            "disc_ce_sum": total(Discrimination(1.0), real, syn),
            "loss_middle": weighted,
            "loss_output": embedded + disc,
            "total": sum_of_all,
        }
    )


def idm_loss(a: Arrays) -> Arrays:
    image = t(a["img"]).requires_grad_()
    factor = round((len(a["decoded"]) / len(a["img"])) ** 0.5)
    decoded, labels = mosaic.expand(image, factor), mosaic.expand_labels(t(a["label"]), factor)
    (grad_img,) = torch.autograd.grad(decoded, image, t(a["cotangent"]))
    sources = t(a["init_src"])
    syn, logits = t(a["emb_syn"]).requires_grad_(), t(a["logits_syn"]).requires_grad_()

    (c,) = labels.unique().tolist()  # the class of the file, among as many as come before it

    def among(x: Tensor) -> Tensor:
        return x.expand(c + 1, *x.shape)

    class _Network:
        @staticmethod
        def classifier(embedding: Tensor) -> Tensor:
            return among(logits)

    looks = Look.of(among(t(a["emb_real"]))), Look.of(among(syn))
    at = At(_Network, float(a["net_acc_percent"]))
    terms = (ClassMean() + ClassAware(float(a["ce_weight"]))).between(*looks, at)
    once = ClassAware(1.0).between(*looks, At(_Network, 1.0))["cross-entropy"]
    whole = sum(terms.values())[c]
    grad_emb, grad_logits = torch.autograd.grad(whole, [syn, logits])
    return {
        "decoded": decoded,
        "decoded_label": labels,
        "grad_img": grad_img,
        "init_down": torch.stack([mosaic.shrink(part, factor) for part in sources]),
        "init_composed": mosaic.mosaics(sources),
        "loss_dm": terms["mean"][c],
        "loss_ce": once[c],
        "total": whole,
        "grad_emb_syn": grad_emb,
        "grad_logits": grad_logits,
    }


def datadam_loss(a: Arrays) -> Arrays:
    classes, balance = int(a["num_classes"]), float(a["task_balance"])
    layers = range(len(numbered(a, r"feat_real_(\d+)")))
    leaves = [t(a[f"feat_syn_{l}"]).requires_grad_() for l in layers]
    z = t(a["out_syn"]).requires_grad_()

    def look(maps: list[Tensor], outputs: Tensor) -> Look:
        """The file leaves the last ReLU out: any map stands for it."""
        by_class = [one.unflatten(0, (classes, -1)) for one in maps]
        return Look.of(outputs.unflatten(0, (classes, -1)), {"act": [*by_class, by_class[-1].detach()]})

    real, syn = look([t(a[f"feat_real_{l}"]) for l in layers], t(a["out_real"])), look(leaves, z)
    out = {}
    for p in (int(name.removeprefix("total_p")) for name in numbered(a, r"total_p(\d+)")):
        terms = attention_and_mean(p, balance).between(real, syn)
        out["mmd_term"] = terms["mean"].sum()
        for l in layers:
            out[f"att_real_l{l}_p{p}"] = attention.attention_map(real.maps("act")[l], p).flatten(0, 1)
            out[f"att_syn_l{l}_p{p}"] = attention.attention_map(syn.maps("act")[l], p).flatten(0, 1)
            out[f"sam_l{l}_p{p}"] = terms[f"attention{l + 1}"].sum()
        whole = sum(terms.values()).sum()
        *gradients, grad_z = torch.autograd.grad(whole, [*leaves, z], retain_graph=True)
        out |= {f"total_p{p}": whole, f"grad_z_p{p}": grad_z}
        out |= {f"grad_f{l}_p{p}": g for l, g in enumerate(gradients)}
    return out


def ddm_style_icd(a: Arrays) -> Arrays:
    layers = range(len(numbered(a, r"feat_real_(\d+)")))
    real = [one(a[f"feat_real_{l}"]) for l in layers]
    syn = [one(a[f"feat_syn_{l}"]).requires_grad_() for l in layers]
    out = {}
    for l in layers:
        mean, std = style.moments(real[l][0])
        out |= {f"gram_real_{l}": style.mean_gram(real[l][0].unsqueeze(1))}
        out |= {f"mean_real_{l}": mean[..., None, None], f"std_real_{l}": std[..., None, None]}

    def of(distance: Distance, chosen: slice = slice(None)) -> Tensor:
        """On the maps of some layers."""
        return total(distance, *(Look.of(maps={"act": maps[chosen]}) for maps in (real, syn)))

    for tag, distance in (("gram", Gram(1.0)), ("moment", Moments(1.0))):
        mean = of(distance)
        out |= {f"{tag}_loss_layers": torch.stack([of(distance, slice(l, l + 1)) for l in layers])}
        out |= {f"{tag}_loss": mean}
        out |= {f"grad_{tag}_{l}": g[0] for l, g in enumerate(torch.autograd.grad(mean, syn))}
    embedding = one(a["emb_syn"]).requires_grad_()
    looks = Look.of(one(a["emb_real"])), Look.of(embedding)
    for name in numbered(a, r"icd_kl_k(\d+)"):
        value = total(Diversity(1.0, k=int(name.removeprefix("icd_kl_k"))), *looks)
        out |= {name: value, f"grad_{name}": torch.autograd.grad(value, embedding)[0][0]}
    out["icd_k_default"] = np.array(style.default_neighbours(embedding.shape[1]))
    out["icd_kl_default"] = total(Diversity(1.0), *looks)
    for name in numbered(
        a, r"content_div_rank(\d+)_exact"
    ):  # the method takes as many axes as the set allows
        rank = int(re.findall(r"\d+", name)[0])
        out[name] = style.principal_spread_distance(one(a["emb_real"]), embedding, rank)[0]
    out["moments_persample_rel"] = of(Moments(1.0, per_image=True), slice(1))
    out["style_div_rel"] = of(StyleSpread(1.0), slice(1))
    out["moments_persample_abs"] = style.image_moment_distance(real[0], syn[0], False)[0]
    out["style_div_abs"] = style.style_spread_distance(real[0], syn[0], False)[0]
    return out


def ipm_metrics(a: Arrays) -> Arrays:
    x, y = one(a["x"]), one(a["y"])
    uniform = [torch.full(z.shape[:2], 1 / z.shape[1], dtype=torch.float64) for z in (x, y)]
    cost = transport.cost_matrix(x, y, p=1)
    out = {
        "mean_dist": features.class_mean(x, y).sqrt()[0],
        "w1_primal": transport.wasserstein(x, y, p=1)[0],
        "w1_dual": transport.wasserstein_dual(x, y, p=1)[0][0],
        "w1_plan": transport.exact_plan(cost, *uniform)[0][0],
        "w2_squared": transport.wasserstein(x, y, p=2)[0],
        "energy_distance": mmd.mmd(x, y, "energy")[0],
    }
    for name in a:
        if name == "mmd2_linear":
            out[name] = mmd.mmd(x, y, "linear")[0]
        elif match := re.fullmatch(r"mmd2_poly2_c(\d+)", name):
            shift = int(match[1])
            out[name] = mmd.mmd(x, y, lambda u, v, _, c=shift: (mmd.linear(u, v) + c).square())[0]
            if shift == 1:
                out[name] = mmd.mmd(x, y, "poly")[0]
        elif match := re.fullmatch(r"mmd2_gauss_sigma(\d)(\d+)", name):  # sigma15 = 1.5
            out[name] = mmd.mmd(x, y, "rbf", bandwidth=float(f"{match[1]}.{match[2]}"))[0]
        elif match := re.fullmatch(r"sinkhorn_eps(\d)(\d+)_plan_cost", name):  # eps01 = 0.1
            eps = float(f"{match[1]}.{match[2]}")
            solved = transport.sinkhorn(cost, *uniform, eps, tolerance=1e-12, sweeps=20_000)
            out |= {name: solved.transport[0], name.replace("plan_cost", "dual"): solved.objective[0]}
    return out


def _exact(x: Tensor, y: Tensor, a: Tensor, b: Tensor, tag: str) -> Arrays:
    """Outputs of the exact distances; x is the synthetic set, so the plan is transposed."""
    out = {}
    for p, name in ((1, "w1"), (2, "w2sq")):
        leaf = x.clone().requires_grad_()
        value = transport.wasserstein(y, leaf, p, b, a)[0]
        out |= {f"{name}{tag}": value, f"{name}_gradX{tag}": torch.autograd.grad(value, leaf)[0][0]}
    plan = transport.exact_plan(transport.cost_matrix(y, x), b, a)[0][0]
    return out | {f"plan2{tag}": plan.transpose(0, 1)}


def _entropic(x: Tensor, y: Tensor, a: Tensor, b: Tensor, regs: Tensor, tag: str) -> Arrays:
    """Outputs of Sinkhorn: every regularisation as one problem of a batch."""
    count = len(regs)
    x, y, a, b = (v.expand(count, *v.shape[1:]) for v in (x, y, a, b))
    options = {"tolerance": 1e-12, "sweeps": 5000}
    solved = transport.sinkhorn(transport.cost_matrix(y, x), b, a, regs, **options)
    return {
        f"sinkhorn_transport{tag}": solved.transport,
        f"sinkhorn_objective_kl{tag}": solved.objective,
        f"sinkhorn_divergence{tag}": transport.sinkhorn_divergence(y, x, regs, a=b, b=a, **options),
    }


def wasserstein_distances(a: Arrays) -> Arrays:
    x, y, columns = one(a["X"]), one(a["Y"]), t(a["projections"])
    n = x.shape[1]
    uniform = [torch.full(z.shape[:2], 1 / z.shape[1], dtype=torch.float64) for z in (x, y)]
    out = {"bures_w2sq": transport.bures(y, x)[0]}
    potential = one(a["kr_potential"])
    out["kr_value"] = transport.witness_gap(potential[:, :n], potential[:, n:])[0]
    for tag, weights, sliced in (
        ("_u", uniform, [None, None]),
        ("_w", [one(a["a"]), one(a["b"])], [one(a["a"]), one(a["b"])]),
    ):
        out |= _exact(x, y, *weights, tag) | _entropic(x, y, *weights, t(a["sinkhorn_reg"]), tag)
        for p in (1, 2):
            powers = transport.sliced(y, x, columns, p, sliced[1], sliced[0])[0]
            out[f"sliced_w{p}_pow_per_proj{tag}"] = powers
            out[f"sliced_w{p}{tag}"] = powers.mean() ** (1 / p)
    return out


def wasserstein_distances_unequal(a: Arrays) -> Arrays:
    return wasserstein_distances(a)


CASES = [
    m3d_mmd,
    cafe_loss,
    idm_loss,
    datadam_loss,
    ddm_style_icd,
    ipm_metrics,
    wasserstein_distances,
    wasserstein_distances_unequal,
]

_TRANSPORT: dict[str, tuple[float, float]] = {"": (0.0, 1e-9), "/kr_value": (0.0, 1e-12)} | {
    f"/{name}_{tag}": (0.0, 1e-7)
    for name in (
        "w2sq_gradX",
        "w1_gradX",
        "sinkhorn_transport",
        "sinkhorn_objective_kl",
        "sinkhorn_divergence",
    )
    for tag in "uw"
}

TOLERANCE: dict[str, tuple[float, float]] = {
    "m3d_mmd": (1e-7, 1e-10),  # the atol: gradient entries near 0
    "cafe_loss": (0.0, 1e-9),
    "idm_loss": (0.0, 1e-10),
    "idm_loss/decoded_label": (0.0, 0.0),
    "datadam_loss": (0.0, 1e-9),
    "ddm_style_icd": (0.0, 1e-9),
    "ipm_metrics": (0.0, 1e-8),
    "ipm_metrics/sinkhorn_eps01_plan_cost": (0.0, 1e-6),
    "ipm_metrics/sinkhorn_eps01_dual": (0.0, 1e-6),
} | {
    file + output: tolerance
    for file in ("wasserstein_distances", "wasserstein_distances_unequal")
    for output, tolerance in _TRANSPORT.items()
}

INPUTS = {
    "m3d_mmd": ("emb_syn", "emb_real"),
    "cafe_loss": ("num_classes", "batch_real", "ipc", "w_*", "f[0-9]*_real", "f[0-9]*_syn", "labels_real"),
    "idm_loss": (
        "img",
        "label",
        "cotangent",
        "init_src",
        "emb_real",
        "emb_syn",
        "logits_syn",
        "net_acc_percent",
        "ce_weight",
    ),
    "datadam_loss": ("num_classes", "batch_real", "ipc", "task_balance", "feat_*", "out_real", "out_syn"),
    "ddm_style_icd": ("feat_*", "emb_syn", "emb_real"),
    "ipm_metrics": ("x", "y"),
    "wasserstein_distances": ("X", "Y", "a", "b", "sinkhorn_reg", "projections", "kr_potential"),
    "wasserstein_distances_unequal": ("X", "Y", "a", "b", "sinkhorn_reg", "projections", "kr_potential"),
}
