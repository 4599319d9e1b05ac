"""Cases of SRe2L and WMDD: barycenter, BatchNorm statistics, recovery, relabelling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from arrays import Arrays, t
from torch import Tensor, nn

from lib.augment import views
from lib.data.whitening import Standardise
from lib.evaluate import relabel, soft_labels
from lib.match import barycenter as ot
from lib.match import batchnorm
from lib.methods.sre2l import SRe2L
from lib.methods.wmdd import WMDD
from lib.nets.training import cosine_schedule
from lib.recover.blocks import Prepared

HERE = Path(__file__).parent
IMAGENET = Standardise(
    torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
)


def _uniform(a: Arrays) -> Arrays:
    points, start = t(a["points"]), t(a["X_init"])
    found = ot.barycenter(points, len(start), start=start)
    return {
        "bary_uniform": found.atoms,
        "w_uniform": found.weights,
        "disp": found.moves,
        "w2sq_uniform": found.costs[-1],
    }


def _identities(a: Arrays) -> Arrays:
    """What holds of the official weighted mode on any machine: its rounds amplify rounding until nothing is alike.

    The stored pair costs what is said; its weights sum to 1; ten moves of a fifth left 0.8^10 of the start in its atoms, so that
    the rest lies in the convex hull of the points.
    """
    points, atoms, weights = (t(a[name]) for name in ("points", "bary_weighted", "w_weighted"))
    out = {"w2sq_weighted": np.float64(ot.transport_cost(points, atoms, weights))}
    rest = (atoms - 0.8**10 * t(a["X_init"])) / (1 - 0.8**10)
    inside = _distance_to_hull(rest.numpy(), points.numpy()) < 1e-10
    out["bary_weighted"] = atoms if inside else torch.full_like(atoms, torch.nan)
    out["w_weighted"] = weights if abs(weights.sum() - 1) < 1e-12 else torch.full_like(weights, torch.nan)
    out["w2sq_fix_100"] = np.float64(ot.transport_cost(points, t(a["fix_support"]), t(a["fix_weights_100"])))
    return out


def _distance_to_hull(rows: np.ndarray, points: np.ndarray) -> float:
    from scipy.optimize import nnls

    system = np.vstack([points.T, np.ones(len(points))])
    return max(nnls(system, np.append(row, 1.0), maxiter=10_000)[1] for row in rows)


def wmdd_barycenter(a: Arrays) -> Arrays:
    points, support = t(a["points"]), t(a["fix_support"])
    uniform = torch.full((len(support),), 1 / len(support), dtype=points.dtype)
    out = {"fix_dual_u_uniform": ot.atom_potential(points, support, uniform)}
    for steps in (1, 100):
        out[f"fix_weights_{steps}"] = ot.optimal_weights(points, support, steps, rate=10.0, decay=False)[0]
    return _uniform(a) | _identities(a) | out


def wmdd_barycenter_degenerate(a: Arrays) -> Arrays:
    """Ten atoms for 200 points: potentials are not unique, so neither are the weights learned from them (inputs here)."""
    return _uniform(a) | _identities(a)


class Net(nn.Module):
    """conv - BN - ReLU - conv (stride 2) - BN - ReLU - global average - linear, with the weights of the file."""

    def __init__(self, a: Arrays):
        super().__init__()
        (width, channels), wide = a["p_conv1_weight"].shape[:2], a["p_conv2_weight"].shape[0]
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, wide, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, a["p_fc_weight"].shape[0])
        self.double().eval().requires_grad_(False)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if (key := "p_" + name.replace(".", "_")) in a:
                    tensor.copy_(t(a[key]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def _prepared(a: Arrays) -> tuple[Prepared, list]:
    watch = batchnorm.Watch(Net(a))
    real = [batchnorm.class_statistics(watch, images, int(a["stat_batch"])) for images in t(a["real"])]
    targets = {}
    for c, seen in enumerate(real):
        atoms = t(a["barycenter"])[c]
        targets[c] = {"atoms": atoms, "weights": torch.full((len(atoms),), 1 / len(atoms)).double()}
        for l, (mean, var) in enumerate(seen.layers):
            targets[c] |= {f"mean.{l}": mean, f"var.{l}": var}
    prepared = Prepared(watch, a["syn"].shape[1:], IMAGENET, torch.device("cpu"), targets)
    return prepared, real


def _objective(method: SRe2L, prepared: Prepared, block, a: Arrays) -> dict[str, Tensor]:
    x = t(a["syn"]).requires_grad_()
    target = method.block_target(prepared, block)
    target["labels"] = t(a["targets"])
    inputs, features, logits = prepared.watch(x)
    terms = method.terms(target, inputs, features, logits)
    total = sum(method.weight(name) * term for name, term in terms.items())
    out = {"total": total, "grad": torch.autograd.grad(total, x)[0]} | terms
    with torch.no_grad():
        found = batchnorm.statistics(inputs, method.statistics == "class" and len(block.classes) or 1)
        wanted = target["layers"] if method.statistics == "class" else target["running"]
        out |= {"terms": batchnorm.class_terms(found, wanted), "features": features, "logits": logits}
    return {name: value.detach() for name, value in out.items()}


def wmdd_bn_recover(a: Arrays) -> Arrays:
    prepared, real = _prepared(a)
    classes, ipc = a["barycenter"].shape[:2]
    method = WMDD(bn_weight=float(a["r_bn"]), ce_weight=float(a["r_ce"]), crop=None)
    ours = _objective(method, prepared, method.blocks(classes, ipc)[0], a)
    out = {name: ours[name] for name in ("features", "logits")}
    out |= {"real_features": torch.stack([seen.features for seen in real])}
    for l in range(len(real[0].layers)):
        for k, kind in enumerate(("mean", "var")):
            out[f"pc_{kind}_{l}"] = torch.stack([seen.layers[l][k] for seen in real])
    names = {"ce": "ce", "feature": "feature_loss", "terms": "terms", "total": "total", "grad": "grad"}
    out |= {f"pc_{theirs}": ours[mine] for mine, theirs in names.items()}
    # SRe2L sees the same images as one batch, whatever their classes.
    first = float(a["sre_first_bn_multiplier"])
    plain = WMDD(
        statistics="global", feature_weight=0.0, first_multiplier=first, bn_weight=float(a["sre_r_bn"])
    )
    one = plain.blocks(len(a["syn"]), 1)[0]
    shared = Prepared(
        prepared.watch,
        prepared.shape,
        IMAGENET,
        prepared.device,
        dict.fromkeys(one.classes, prepared.targets[0]),
    )
    theirs = _objective(plain, shared, one, a)
    return out | {f"sre_{name}": theirs[name] for name in ("terms", "ce", "total", "grad")}


def wmdd_recover_steps(a: Arrays) -> Arrays:
    a = a | {name.removeprefix("step_"): value for name, value in a.items() if name.startswith("step_")}
    if "p_conv1_weight" not in a:
        with np.load(HERE / "wmdd_bn_recover.npz") as file:
            a = {name: file[name] for name in file.files} | a
    a["syn"] = a["syn_init"]
    prepared, _ = _prepared(a)
    classes, ipc = a["barycenter"].shape[:2]
    method = WMDD(
        iterations=int(a["total_iters"]), lr=float(a["lr"]), bn_weight=float(a["r_bn"]), ce_weight=float(a["r_ce"]), crop=None
    )  # fmt: skip
    state = method.start(prepared, method.blocks(classes, ipc), seed=0)
    state.pixels[0] = nn.Parameter(t(a["syn_init"]))
    state.optimiser = torch.optim.Adam(state.pixels.parameters(), lr=method.lr, betas=method.betas)
    state.views[0][: len(a["rolls"])] = 0
    state.views[0][: len(a["rolls"]), 0, 5:] = t(a["rolls"])
    state.targets[0]["labels"] = t(a["targets"])
    state.targets[0]["bounds"] = [IMAGENET.forward(torch.full((3, 1, 1), v).double()) for v in (0.0, 1.0)]
    losses, lrs, after = [], [], []
    for _ in range(len(a["losses"])):
        losses.append(method.step(state)["loss"])
        lrs.append(state.optimiser.param_groups[0]["lr"])
        after.append(state.pixels[0].detach().clone())
    return {
        "losses": torch.stack(losses),
        "lrs": torch.tensor(lrs),
        "syn_after_1": after[0],
        "syn_final": after[-1],
        "final_denormalised": IMAGENET.inverse(after[-1]).clamp(0, 1),
    }


def wmdd_fkd(a: Arrays) -> Arrays:
    teacher, weights = t(a["teacher_logits_fp16"]).double(), t(a["weights"]).double()
    out = {name: [] for name in ("kl_per_sample", "kl_mean", "kl_weighted_mean", "kl_grad")}
    for tau in a["temperatures"].tolist():
        student = t(a["student_logits"]).double().requires_grad_()
        each = relabel.divergence(student, teacher, tau)
        out["kl_per_sample"].append(each.detach())
        out["kl_mean"].append(each.mean().detach())
        out["kl_weighted_mean"].append(relabel.weighted_mean(each, weights).detach())
        out["kl_grad"].append(torch.autograd.grad(each.mean(), student)[0])
    out = {name: torch.stack(values) for name, values in out.items()}
    x, partner, size = t(a["cm_in"]), t(a["cm_index"]), tuple(a["bb_size"].tolist())
    boxes = [
        views.cutmix_box(lam, tuple(c), size)
        for lam, c in zip(a["bb_lam"].tolist(), a["bb_center"].tolist(), strict=True)
    ]
    n, batch, epochs = a["order_n_bs_epochs"].astype(int).tolist()
    orders = [soft_labels.published_order(n, epoch, 42) for epoch in range(epochs)]
    cosine = cosine_schedule(1.0, len(a["cosine_factor"]))
    return out | {
        "cm_out": views.paste(x, partner, tuple(a["cm_bbox"].tolist())),
        "mu_out": views.blend(x, partner, float(a["mu_lam"])),
        "bb_box": torch.tensor(boxes),
        "order_first_index": torch.stack([order[::batch] for order in orders]),
        "cosine_factor": torch.tensor(
            [cosine(e) for e in range(len(a["cosine_factor"]))], dtype=torch.float64
        ),
    }


CASES = (wmdd_barycenter, wmdd_barycenter_degenerate, wmdd_bn_recover, wmdd_recover_steps, wmdd_fkd)

TOLERANCE: dict[str, tuple[float, float]] = {
    "wmdd_barycenter": (1e-8, 1e-8),
    "wmdd_barycenter/w2sq_uniform": (1e-10, 1e-10),
    "wmdd_barycenter/w2sq_*_100": (1e-9, 1e-9),
    "wmdd_barycenter/w2sq_weighted": (1e-9, 1e-9),
    "wmdd_barycenter/fix_dual_u_uniform": (1e-9, 1e-9),
    "wmdd_barycenter_degenerate": (1e-8, 1e-8),
    "wmdd_barycenter_degenerate/w2sq_*": (1e-9, 1e-9),
    "wmdd_barycenter_degenerate/w2sq_uniform": (1e-10, 1e-10),
    "wmdd_bn_recover": (1e-9, 1e-9),
    "wmdd_recover_steps": (1e-7, 1e-7),
    "wmdd_fkd": (1e-9, 1e-9),
    "wmdd_fkd/cm_out": (0.0, 0.0),
    "wmdd_fkd/bb_box": (0.0, 0.0),
    "wmdd_fkd/order_first_index": (0.0, 0.0),
    "wmdd_fkd/mu_out": (1e-6, 1e-6),
}

INPUTS = {
    "wmdd_barycenter": ("points", "X_init", "fix_support", "seed"),
    # With 10 dividing 200 the potentials, and what is learned from them, are not unique.
    "wmdd_barycenter_degenerate": ("points", "X_init", "fix_*", "seed"),
    "wmdd_bn_recover": (
        "p_*", "real", "stat_batch", "syn", "targets", "barycenter", "r_bn", "r_ce", "sre_r_bn", "sre_first_bn_multiplier",
    ),
    "wmdd_recover_steps": (
        "syn_init", "lr", "total_iters", "rolls", "step_*", "p_*", "real", "stat_batch", "syn", "targets", "barycenter", "r_*",
        "pc_*",
    ),
    "wmdd_fkd": (
        "student_logits", "teacher_logits_fp16", "weights", "temperatures", "cm_in", "cm_index", "cm_bbox", "bb_lam",
        "bb_center", "bb_size", "mu_lam", "order_n_bs_epochs",
    ),
}  # fmt: skip
