"""Cases of dataset selection and of the loss landscape."""

from __future__ import annotations

import torch
from arrays import Arrays, t
from dense import full_hessian, quadratic_gap
from torch import Tensor, nn

from lib.analysis import landscape
from lib.select import gradmatch, pair_cost, scores, similarity, submodular
from lib.select.last_layer import LastLayer, batch_scale


def selection_submodular(a: Arrays) -> Arrays:
    kernel = similarity.cosine(similarity.linear(t(a["gradients"])))
    budget, out = int(a["budget"]), {"similarity": kernel.matrix()}
    for prefix, function in (("fl", submodular.FacilityLocation), ("gc", submodular.GraphCut)):
        naive = submodular.naive(function(kernel), budget)
        out[f"{prefix}_naive_order"], out[f"{prefix}_naive_gains"] = naive.order, naive.gains
        out[f"{prefix}_lazy_order"] = submodular.lazy(function(kernel), budget).order
        out[f"{prefix}_approxlazy_order"] = submodular.lazy(function(kernel), budget, accept=0.9).order
        rows = t(a[f"{prefix}_stochastic_candidates"])
        out[f"{prefix}_stochastic_order"] = submodular.stochastic(
            function(kernel), budget, candidates=rows
        ).order
    true = submodular.naive(submodular.LogDet(kernel), len(a["logdet_true_order"]))
    shipped = submodular.naive(
        submodular.LogDet(kernel, variant="deepcore"), len(a["logdet_asshipped_naive_order"])
    )
    out |= {"logdet_true_order": true.order, "logdet_true_schur": true.gains}
    return out | {"logdet_asshipped_naive_order": shipped.order}


def selection_craig(a: Arrays) -> Arrays:
    distance = similarity.euclidean(similarity.linear(t(a["gradients"])), floor=1e-6)
    kernel, budget = similarity.flipped(distance), int(a["budget"])
    naive = submodular.naive(submodular.FacilityLocation(kernel), budget).order
    ascending = naive.sort().values
    return {
        "distance": distance.matrix(),
        "similarity": kernel.matrix(),
        "naive_order": naive,
        "lazy_order": submodular.lazy(submodular.FacilityLocation(kernel), budget).order,
        "selected_sorted": ascending,
        "weights_paper": submodular.cluster_sizes(kernel, ascending),
        "weights_deepcore": submodular.cluster_sizes(kernel, ascending, variant="deepcore"),
    }


def selection_gradmatch(a: Arrays) -> Arrays:
    columns, target = t(a["A"]), t(a["A"]).T @ t(a["b"])
    gram, out = similarity.linear(columns.T), {}

    def scattered(match: gradmatch.Match) -> Tensor:
        return torch.zeros_like(target).index_put((match.order,), match.weights)

    for suffix, ridge in (("lam1", 1.0), ("lam2", float(a["lam2"]))):
        match = gradmatch.orthogonal_matching(gram, target, int(a["budget"]), ridge)
        out[f"support_order_{suffix}"], out[f"ridge_solution_{suffix}"] = match.order, match.ridge
        out[f"weights_{suffix}"] = scattered(match)
    return out | {"weights_budget1": scattered(gradmatch.orthogonal_matching(gram, target, 1))}


def selection_scores(a: Arrays) -> Arrays:
    h = t(a["embeddings"])
    logits = h @ t(a["W"]).T + t(a["b"])
    last = LastLayer(logits, h, t(a["labels"]).long())
    after = scores.glister_direction(last[t(a["glister_selected"])], last, float(a["glister_eta"]))
    count = a["cal_knn"].shape[1]
    return {
        "logits": logits,
        "score_leastconfidence": scores.confidence(logits, variant="deepcore"),
        "score_entropy": scores.negative_entropy(logits),
        "score_margin": scores.margin(logits),
        "cd_pairwise": similarity.symmetric_kl(last.log_p).matrix(),
        "cal_knn": scores.neighbours(h, count),
        "cal_score": scores.cal(logits, t(a["cal_knn"])),
        "el2n": scores.el2n(last),
        "lastlayer_grads": last.gradients(),
        "grand_lastlayer": scores.grand(last),
        "glister_val_grad_initial": last.mean(),
        "glister_val_grad_after": after,
        "glister_gain_initial": last.project(last.mean()),
        "glister_gain_after": last.project(after),
    }


def lcmat_selection(a: Arrays) -> Arrays:
    h, labels = t(a["features"]), t(a["labels"]).long()
    logits, budget = h @ t(a["W"]).T + t(a["b"]), int(a["budget"])
    out = {}

    def order(cost: similarity.Pairwise, offset: float | None) -> Tensor:
        kernel = similarity.flipped(cost, offset)
        return submodular.naive(submodular.FacilityLocation(kernel), budget).order

    variants = (
        ("official", batch_scale(len(h), int(a["batch"])), 10.0),
        ("persample", 1.0, None),
    )
    for name, scale, offset in variants:
        last = LastLayer(logits, h, labels, scale)
        dims = pair_cost.curvature_coordinates(last, int(a["K"]))
        cost = pair_cost.pair_cost(last, float(a["eps"]), dims)
        out[f"grads_{name}"], out[f"diag_hessians_{name}"] = last.gradients(), last.diagonal_hessians()
        out[f"picked_dims_{name}"] = dims
        out[f"similarity_{name}"] = similarity.flipped(cost, offset).matrix()
        out[f"order_{name}"] = order(cost, offset)
        out[f"order_{name}_eps2"] = order(pair_cost.pair_cost(last, float(a["eps2"]), dims), offset)
    out["order_eps0_persample"] = order(pair_cost.pair_cost(last, 0.0, dims), None)
    subset = last[out["order_persample"]]
    names = {
        "loss": "loss_abs",
        "gradient": "grad_l2",
        "hessian_l1": "hess_l1",
        "hessian_max": "hess_max",
        "gradient_variance": "gradvar_l1",
    }
    out |= {f"stat_{names[name]}": value for name, value in pair_cost.gaps(last, subset).items()}
    eigenvalues = torch.linalg.eigvalsh(full_hessian(last) - full_hessian(subset))
    return out | {"stat_full_hess_diff_eigs_minmax": eigenvalues[[0, -1]]}


def lcmat_landscape(a: Arrays) -> Arrays:
    out = {}
    for i in range(sum(name.endswith("_raw") for name in a)):
        for mode in landscape.MODES:
            out[f"d{i}_{mode}"] = landscape.normalise(t(a[f"d{i}_raw"]), t(a[f"w{i}"]), mode)
    x, y, theta, rho = t(a["net_X"]), t(a["net_y"]), t(a["net_theta"]), float(a["rho"])
    classes, width = int(y.max()) + 1, x.shape[1]
    hidden = (len(theta) - classes) // (width + 1 + classes)
    net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()
    loss = landscape.NetworkLoss(net, x, y)
    gradient, value = landscape.slope(loss, theta)
    product = landscape.hessian_product(loss, theta)
    hessian = torch.stack([product(v) for v in torch.eye(len(theta)).double()])
    line = landscape.slice_losses(loss, theta, t(a["net_dir"])[None], t(a["slice_alpha"])[:, None])
    none = theta.new_zeros(0, len(theta))
    return out | {
        "net_loss": value,
        "net_grad": gradient,
        "net_hessian_eigs": torch.linalg.eigvalsh(hessian),
        "slice_loss": line,
        "sam_one_step_gap": landscape.worst_gap(loss, theta, rho, none, steps=0),
        "quadratic_worst_gap": quadratic_gap(gradient, hessian, rho),
        "worst_gap": landscape.worst_gap(loss, theta, rho, none),
    }


CASES = [
    selection_submodular,
    selection_craig,
    selection_gradmatch,
    selection_scores,
    lcmat_selection,
    lcmat_landscape,
]

TOLERANCE: dict[str, tuple[float, float]] = {
    "selection_submodular": (1e-6, 1e-9),
    "selection_craig": (1e-6, 1e-9),
    "selection_gradmatch": (1e-6, 1e-9),
    "selection_gradmatch/weights_lam1": (0.0, 1e-5),
    "selection_gradmatch/weights_lam2": (0.0, 1e-5),
    "selection_gradmatch/weights_budget1": (0.0, 1e-5),
    "selection_scores": (1e-6, 1e-9),
    "lcmat_selection": (1e-8, 1e-13),  # the atol: gradients of a saturated class are near 0
    # the stored diagonals carry rounding noise up to 2e-7
    "lcmat_selection/similarity_official": (1e-8, 2e-7),
    "lcmat_selection/similarity_persample": (1e-8, 2e-7),
    "lcmat_landscape": (1e-8, 1e-10),  # the atol: several eigenvalues are 0
    **{f"lcmat_landscape/d{i}_{mode}": (1e-6, 1e-6) for i in range(16) for mode in landscape.MODES},
    "lcmat_landscape/worst_gap": (1e-6, 0.0),
}

INPUTS = {
    "selection_submodular": ("gradients", "budget", "*_candidates"),
    "selection_craig": ("gradients", "budget"),
    "selection_gradmatch": ("A", "b", "budget", "lam2"),
    "selection_scores": ("embeddings", "W", "b", "labels", "cal_knn", "glister_selected", "glister_eta"),
    "lcmat_selection": ("features", "W", "b", "labels", "batch", "budget", "K", "eps", "eps2"),
    "lcmat_landscape": ("w[0-9]*", "d*_raw", "net_X", "net_y", "net_theta", "net_dir", "slice_alpha", "rho"),
}
