"""Cases of the kernel methods."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from arrays import Arrays, t
from torch import Tensor

from lib.data.whitening import PerImageZCA, second_moment, zca_matrix
from lib.kernels import closed_form, ridge
from lib.kernels.conv import convolutional
from lib.kernels.fc import fully_connected
from lib.kernels.feature_maps import Fourier, Identity, LeakyNet, conjugate_kernel, conv_features
from lib.kernels.linearised import Inner, adam, gradient_along, predict
from lib.methods.rcig import RCIG
from lib.nets.tangent import TangentNet
from lib.optim.adabelief import AdaBelief


def chw(images: np.ndarray) -> Tensor:
    """Channel-last images as (n, c, h, w)."""
    return t(images).permute(0, 3, 1, 2)


def kip_fc_kernels(a: Arrays) -> Arrays:
    out = {}
    for name in a:
        found = re.fullmatch(r"(nngp|ntk)_d(\d+)_b([\d.e-]+)(?:_std(\d+))?_1([12])", name)
        if not found:
            continue
        which, depth, sigma_b, width, second = found.groups()
        kernels = fully_connected(
            t(a["x1"]),
            t(a["x2"]) if second == "2" else None,
            depth=int(depth),
            sigma_w=float(a["sigma_w"]),
            sigma_b=float(sigma_b),
            width=int(width) if width else None,
        )
        out[name] = getattr(kernels, which)
    return out


TAGS = {
    "flat": "cccf",
    "gap": "cccg",
    "poolflat": "cpcpcpf",
    "conv1flat": "cf",
    "conv1poolflat": "cpf",
    "myrtle5": "ccpcpcg",
    "kipnet4": "ccpcpcpf",
}


def kip_conv_kernels(a: Arrays) -> Arrays:
    out = {}
    for name in a:
        found = re.fullmatch(r"nngp_(rgb_)?(\w+?)(_b0)?_1([12])", name)
        if not found:
            continue
        colour, tag, no_bias, second = found.groups()
        x = "rgb" if colour else "x"
        kernels = convolutional(
            chw(a[x + "1"]),
            chw(a[x + "2"]) if second == "2" else None,
            net=TAGS[tag],
            sigma_w=float(a["sigma_w"]),
            sigma_b=0.0 if no_bias else float(a["sigma_b"]),
        )
        out |= {name: kernels.nngp, "ntk" + name.removeprefix("nngp"): kernels.ntk}
    return out


def _krr(a: Arrays, ntk) -> Arrays:
    """Kernel ridge regression of NTK ``ntk(x1, x2)``; every ridge is read off an output name."""
    x = t(a["x_support"]).requires_grad_()
    y = t(a["y_support"]).requires_grad_()
    y_t = t(a["y_target"])
    k_ss, k_ts = ntk(x, None), ntk(t(a["x_target"]), x)
    out = {"k_ss": k_ss, "k_ts": k_ts}
    for tag in (name.removeprefix("loss_reg") for name in a if name.startswith("loss_reg")):
        lam = float(tag)
        prediction = ridge.predict(k_ts, k_ss, y, lam)
        loss = ridge.mse(prediction, y_t)
        grad_x, grad_y = torch.autograd.grad(loss, (x, y), retain_graph=True)
        solved = ridge.label_solve(k_ts, k_ss, y_t, lam)
        values = {
            "pred": prediction,
            "loss": loss,
            "grad_x": grad_x,
            "grad_y": grad_y,
            "cond": ridge.condition(ridge.regularised(k_ss, lam)),
            "label_solve": solved,
            "label_solve_pred": ridge.predict(k_ts, k_ss, solved, lam),
            "label_solve_code": ridge.label_solve_regularised(k_ts, k_ss, y_t, lam),
        }
        out |= {f"{name}_reg{tag}": value for name, value in values.items()}
    return out


def kip_krr_fc1(a: Arrays) -> Arrays:
    depth, sigma_w, sigma_b = int(a["depth"]), float(a["sigma_w"]), float(a["sigma_b"])
    return _krr(a, lambda x1, x2: fully_connected(x1, x2, depth, sigma_w, sigma_b).ntk)


def kip_krr_convpool(a: Arrays) -> Arrays:
    net, sigma_w, sigma_b = "cp" * int(a["depth"]) + "f", float(a["sigma_w"]), float(a["sigma_b"])

    def ntk(x1: Tensor, x2: Tensor | None) -> Tensor:
        x1, x2 = (x if x is None else x.permute(0, 3, 1, 2) for x in (x1, x2))
        return convolutional(x1, x2, net, sigma_w, sigma_b).ntk

    return _krr(a, ntk)


def krr_distill(a: Arrays) -> Arrays:
    out = {}
    for tag in (name.removesuffix("__lambda_") for name in a if name.endswith("__lambda_")):
        own = {name.removeprefix(f"{tag}__"): t(a[name]) for name in a if name.startswith(f"{tag}__")}
        x = t(a.get(f"X_{tag}", a["X"])).T
        labels = t(a.get(f"y_{tag}", a["y"])).long()
        out |= {f"{tag}__{name}": value for name, value in _krr_case(own, x, labels, "reg" in tag).items()}
    return out


def _krr_case(a: dict[str, Tensor], x: Tensor, labels: Tensor, regularised: bool) -> Arrays:
    """Every output from the stored previous ones; columns are data."""
    if "net_W1" in a:
        phi = LeakyNet((a["net_W1"],))
    else:
        phi = Fourier(a["rff_A"], a["rff_b"]) if "rff_A" in a else Identity()
    w, y_s, lam, d = a["W"], a["Ys"], float(a["lambda_"]), a["D"]
    y = F.one_hot(labels, len(w)).T.to(w.dtype)
    lambda_s = float(a["lambda_s"])
    out = {"W": closed_form.ridge_path(phi(x), y)(lam)}
    if "Xs_init" in a:
        real, real_lam = phi(a["Xs_init"].T), lam if regularised else 0.0
        out["Ys"] = closed_form.labels_for(real, w, real_lam)
        out["Z"] = closed_form.nearest(y_s, w, real, real_lam)
    else:
        out["Ys"] = closed_form.cyclic_labels(len(w), y_s.shape[1] // len(w))
        out["Z"] = a["Z"]  # random in this mode, and an input
    x_s = phi.inverse(a["phi_s"])
    out |= {
        "D": closed_form.admissible(y_s, w, a["Z"]),
        "lambda_s": closed_form.clipped(d, lam) if regularised else 0.0,
        "phi_s": closed_form.solve_features(d, lambda_s),
        "Ws": closed_form.student(a["phi_s"], y_s, lambda_s),
        "Xs": x_s.T,
        "phi_s_recover": phi(a["Xs"].T),
    }
    if "phi_s_recover" in a:
        out["Ws_recover"] = closed_form.student(a["phi_s_recover"], y_s)
    return out


def krr_kip_step(a: Arrays) -> Arrays:
    phi = LeakyNet((t(a["W1"]),))
    labels, batch = t(a["y"]).long(), t(a["batch_ids"]).long()
    y = F.one_hot(labels).T.double()
    real = phi(t(a["X"]).T)
    x_s = t(a["X_s"]).requires_grad_()
    phi_s = phi(x_s.T)
    lambda_s = 1e-6 * phi_s.square().sum() / phi_s.shape[1]
    y_s, w_s = closed_form.kip_labels(phi_s, real @ real.T, real @ y.T, lambda_s)
    loss = (w_s @ real[:, batch] - y[:, batch]).square().mean()
    gradient = torch.autograd.grad(loss, x_s)[0]
    return {"phi_s": phi_s, "lambda_s": lambda_s, "Y_s": y_s, "W_s": w_s, "loss": loss, "grad_Xs": gradient}


def rfad_zca_adabelief(a: Arrays) -> Arrays:
    x = t(a["X"])
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    x = (x - mean) / std

    def whitening(flat: Tensor) -> Tensor:
        moment = second_moment([flat], len(flat))
        return zca_matrix(moment, 0.1 * float(moment.trace()) / len(moment))

    plain = x.flatten(1)
    centre, length = PerImageZCA.statistics(x)
    unit = (plain - centre) / length
    theta = t(a["ab_traj"][0]).requires_grad_()
    optimiser = AdaBelief([theta], lr=float(a["ab_lr"]), eps=float(a["ab_eps"]))
    trajectory = [theta.detach().clone()]
    for theta.grad in t(a["ab_grads"]):
        optimiser.step()
        trajectory.append(theta.detach().clone())
    return {
        "X_norm": x,
        "W_zca": whitening(plain),
        "X_zca": (plain @ whitening(plain)).view(x.shape),
        "X_ln": unit.view(x.shape),
        "X_ln_zca": (unit @ whitening(unit)).view(x.shape),
        "ab_traj": torch.stack(trajectory),
    }


def rfad_step(a: Arrays) -> Arrays:
    nets = sorted({int(name[1:].split("__")[0]) for name in a if re.match(r"m\d+__", name)})
    layers = sorted({int(name.split(".")[1]) for name in a if name.endswith(".weight")})
    blocks = [
        tuple(torch.stack([t(a[f"m{j}__features.{i}.{part}"]) for j in nets]) for part in ("weight", "bias"))
        for i in layers
    ]
    x, y, transform, k = (t(a[name]).requires_grad_() for name in ("X_s", "y_s", "T", "k_platt"))
    labels = t(a["labels_t"]).long()
    f_s = conv_features((x.flatten(1) @ transform).view(x.shape), blocks)
    f_t = conv_features(t(a["X_t"]), blocks)
    k_raw, k_ts, jitter = conjugate_kernel(f_s, f_s), conjugate_kernel(f_t, f_s), float(a["jitter"])
    prediction = ridge.predict(k_ts, k_raw, y, jitter)
    mse = ridge.mse(prediction, ridge.centred_one_hot(labels, y.shape[1]))
    platt = ridge.platt(prediction, labels, k)
    out = {"F_s": f_s, "F_t": f_t, "K_raw": k_raw, "K_reg": ridge.regularised(k_raw, jitter), "K_ts": k_ts}
    out |= {"preds": prediction, "loss_mse": mse, "loss_platt": platt}
    gradients = zip("XyT", torch.autograd.grad(mse, (x, y, transform), retain_graph=True), strict=True)
    out |= {f"gmse_{name}": g for name, g in gradients}
    gradients = zip("XyTk", torch.autograd.grad(platt, (x, y, transform, k)), strict=True)
    return out | {f"gplatt_{name}": g for name, g in gradients}


def frepo_step(a: Arrays) -> Arrays:
    def phi(images: Tensor) -> Tensor:
        return F.relu(images.flatten(1) @ t(a["W"]) + t(a["b"]))

    x, y = t(a["x_proto"]).requires_grad_(), t(a["y_proto"]).requires_grad_()
    support, labels = x, y
    if bool(a["use_flip"]):
        support, labels = torch.cat([x, x.flip(2)]), torch.cat([y, y])
    f_s, f_t, y_t = phi(support), phi(t(a["x_target"])), t(a["y_target"])
    prediction = ridge.predict(f_t @ f_s.T, f_s @ f_s.T, labels, float(a["reg"]))
    kernel_loss, label_loss = ridge.mse(prediction, y_t) * y_t.shape[1], ridge.margin(y)
    loss = kernel_loss + label_loss
    grad_x, grad_y = torch.autograd.grad(loss, (x, y))
    out = {"feat_target": f_t, "pred": prediction, "kernel_loss": kernel_loss, "label_loss": label_loss}
    return out | {"loss": loss, "grad_x": grad_x, "grad_y": grad_y}


def _tangent_net(a: Arrays, last_kernel: bool) -> TangentNet:
    side, channels, classes, width, depth = a["dims"].tolist()
    like = SimpleNamespace(size=side, channels=channels, num_classes=classes, first_padding=1)
    net = TangentNet(like, width, depth, float(a["softplus_beta"]), last_kernel).double()
    torch.nn.utils.vector_to_parameters(t(a["theta0"]), net.parameters())
    return net.requires_grad_(False)


def rcig_implicit(a: Arrays) -> Arrays:
    net, lam, x_t = _tangent_net(a, last_kernel=True), float(a["l2"]), t(a["x_real"])
    x, y, tau, delta = (t(a[name]).requires_grad_() for name in ("x_syn", "y_syn", "log_temp", "delta"))
    inner = Inner.at(net, x, y, lam)
    method = RCIG(ridge=lam / len(x), flip=False)  # its lambda is times the number of images
    loss = method.objective(net, x, y, tau, delta, x_t, t(a["y_real"]).argmax(1))
    *direct, g = torch.autograd.grad(loss, (x, y, tau, delta))
    at = delta.detach()
    v = inner.inverse(g)
    implicit = torch.autograd.grad(-gradient_along(v, net, x, y, lam, at), (x, y))
    v_adam, seen = adam(inner.hessian, g, 20, float(a["hinv_lr"]))
    bare = _tangent_net(a, last_kernel=False)
    minimiser = Inner.at(bare, x, y, lam).minimiser()
    return {
        "inner_loss": inner.loss(at),
        "inner_grad_delta": inner.hessian(at) - inner.b,
        "outer_preds": predict(net, x, y, lam, delta, x_t),
        "outer_loss": loss,
        "g_T": g,
        "direct_grad_x": direct[0],
        "direct_grad_y": direct[1],
        "direct_grad_log_temp": direct[2],
        "v_exact": v,
        "implicit_grad_x": implicit[0],
        "implicit_grad_y": implicit[1],
        "v_adam20": v_adam,
        "hinv_objective20": seen,
        "ntk_krr_preds": predict(bare, x, y, lam, minimiser, x_t),
        "features_syn_gram": inner.gram - lam * torch.eye(len(x), dtype=x.dtype),
    }


CASES = [
    kip_fc_kernels,
    kip_conv_kernels,
    kip_krr_fc1,
    kip_krr_convpool,
    krr_distill,
    krr_kip_step,
    rfad_zca_adabelief,
    rfad_step,
    frepo_step,
    rcig_implicit,
]

INPUTS = {
    "kip_fc_kernels": ("x1", "x2", "sigma_w"),
    "kip_conv_kernels": ("x1", "x2", "rgb1", "rgb2", "sigma_w", "sigma_b"),
    "kip_krr_fc1": ("x_*", "y_*", "reg", "sigma_w", "sigma_b", "depth"),
    "kip_krr_convpool": ("x_*", "y_*", "reg", "sigma_w", "sigma_b", "depth"),
    "krr_distill": (
        "X",
        "y",
        "X_*",
        "y_*",
        "*__lambda_",
        "*__Xs_init",
        "*__net_*",
        "*__rff_*",
        "*__max_acc_val",
    ),
    "krr_kip_step": ("X", "y", "X_s", "W1", "batch_ids"),
    "rfad_zca_adabelief": ("X", "ab_grads", "ab_lr", "ab_eps"),
    "rfad_step": ("X_s", "X_t", "T", "y_s", "labels_t", "k_platt", "jitter", "m*__*"),
    "rcig_implicit": ("dims", "softplus_beta", "l2", "log_temp", "x_*", "y_*", "theta0", "delta", "hinv_lr"),
    "frepo_step": ("W", "b", "x_proto", "y_proto", "x_target", "y_target", "use_flip", "reg"),
}

# (rtol, atol): keys with * need a look-up by pattern, the last match counting; without it the file's own holds.
TOLERANCE = {
    "kip_fc_kernels": (
        3e-8,
        1e-12,
    ),  # NTK at equal or opposite inputs: the arc cosine is only good to 1e-8 there
    "kip_fc_kernels/nngp_*": (1e-12, 1e-13),
    "kip_conv_kernels": (3e-8, 1e-12),
    "kip_conv_kernels/nngp_*": (1e-12, 1e-13),
    "kip_conv_kernels/ntk_*_12": (1e-12, 1e-13),
    "kip_krr_fc1": (1e-7, 1e-8),
    "kip_krr_fc1/k_ss": (3e-8, 0.0),
    "kip_krr_fc1/k_ts": (1e-12, 0.0),
    "kip_krr_fc1/loss_*": (1e-8, 0.0),
    "kip_krr_fc1/grad_*": (1e-6, 1e-10),
    "kip_krr_fc1/label_solve_pred_*": (0.0, 1e-10),
    "kip_krr_convpool": (1e-7, 1e-8),
    "kip_krr_convpool/k_ss": (3e-8, 0.0),
    "kip_krr_convpool/k_ts": (1e-12, 0.0),
    "kip_krr_convpool/loss_*": (1e-8, 0.0),
    "kip_krr_convpool/grad_*": (1e-6, 1e-10),
    "kip_krr_convpool/label_solve_pred_*": (0.0, 1e-10),
    "krr_distill": (1e-8, 1e-9),
    "krr_distill/*__W": (1e-9, 1e-10),
    "krr_distill/rff*__W": (1e-8, 1e-9),
    "krr_distill/*__Ys": (1e-10, 1e-11),
    "krr_distill/*__Z": (1e-10, 1e-11),
    "krr_distill/*__D": (1e-12, 1e-13),
    "krr_distill/*__lambda_s": (1e-12, 0.0),
    "krr_distill/*__phi_s": (1e-10, 1e-10),
    "krr_distill/*__Ws": (1e-10, 1e-11),
    "krr_kip_step": (1e-8, 1e-10),
    "rfad_zca_adabelief": (1e-8, 1e-10),
    "rfad_step": (1e-9, 1e-12),
    "rcig_implicit": (1e-8, 1e-10),
    "frepo_step": (1e-8, 1e-12),
}
