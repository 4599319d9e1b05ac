"""The hot spots of the kernel methods, each beside ``lib.plain``; all in 64 bits unless a candidate says otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import REFERENCE, HotSpot, difference
from benchmarks.hot_spots import STEPS, Setting, distillation
from lib import data
from lib.kernels import ridge
from lib.kernels.closed_form import RidgePath, ridge_path
from lib.kernels.conv import convolutional
from lib.kernels.fc import SIGMA_B, SIGMA_W
from lib.methods.kip import KIP
from lib.methods.krr import KRR, MAPS, columns
from lib.methods.rfad import RFAD
from lib.plain.conv_kip import convnet_ntk
from lib.plain.kip import ntk
from lib.plain.krr import krr as plain_krr
from lib.plain.krr import teacher

LAMBDAS = 10 ** torch.arange(-6, 5.75, 0.5, dtype=torch.float64)  # the published grid of 24
IPCS = (1, 5, 10, 50)


# -- KRR ----------------------------------------------------------------------------------------------------------------


def krr_search(setting: Setting) -> HotSpot:
    """The teacher of KRR: ridge regression with lambda chosen on a validation split.

    p = 3 x 8 x 8 features of 1000 images at size S, p = 3 x 32 x 32 of 5000 at L (of 50 000 on a GPU).
    """
    per_class = 100 if setting.side < 32 else 5000 if setting.device.type == "cuda" else 500
    train = setting.images(per_class, 0)
    x, y = columns(train.images), F.one_hot(train.labels, train.num_classes).T.double()
    x[: train.num_classes] += 0.5 * y  # something to learn
    held_out = torch.randperm(x.shape[1], generator=setting.generator(0), device=x.device) < x.shape[1] // 20
    phi, phi_val, labels = x[:, ~held_out], x[:, held_out], train.labels[held_out]

    def path() -> RidgePath:
        return ridge_path(phi, y[:, ~held_out])

    def ours() -> Tensor:
        found = path()
        return found(float(LAMBDAS[found.best(LAMBDAS, phi_val, labels)[0]]))

    def plain() -> Tensor:
        return teacher(phi, y[:, ~held_out], LAMBDAS, phi_val, labels)

    name = "one eigendecomposition"
    most = 1 if setting.side == 32 and setting.device.type == "cpu" else None  # the loop takes a minute
    return HotSpot(
        "KRR ridge search", "search", 1, {REFERENCE: plain, name: ours},
        lambda: {name: difference(ours(), plain())}, {name: 1e-6}, most,
    )  # fmt: skip


def krr_digits(setting: Setting) -> HotSpot:
    """Every map at IPC 1, 5, 10 and 50 on the digits, teacher included: twelve sets."""
    train = data.load("digits").train
    jobs = [(KRR(map=name), ipc) for name in MAPS for ipc in IPCS]

    def ours() -> list:
        sets = []
        for method, ipc in jobs:
            generator = torch.Generator().manual_seed(0)
            state = method.begin(train, ipc, generator)
            method.step(state, generator)
            sets.append(method.finish(state))
        return sets

    def plain() -> list:
        return [plain_krr(method, train, ipc, torch.Generator().manual_seed(0))[0][0] for method, ipc in jobs]

    def check() -> dict[str, float]:
        worst = 0.0
        for synset, images in zip(ours(), plain(), strict=True):
            worst = max(worst, difference(synset.images, images))
        return {name: worst}

    name = "one eigendecomposition"
    return HotSpot("KRR, 12 sets of digits", "call", 1, {REFERENCE: plain, name: ours}, check, {name: 1e-6})


# -- KIP ----------------------------------------------------------------------------------------------------------------

SUPPORT, TARGETS = 100, 1000


def plain_regression(k_ss: Tensor, k_ts: Tensor, y_s: Tensor, y_t: Tensor) -> Tensor:
    ridge_matrix = k_ss + 1e-6 * k_ss.trace() / len(k_ss) * torch.eye(
        len(k_ss), dtype=k_ss.dtype, device=k_ss.device
    )
    return (k_ts @ torch.linalg.solve(ridge_matrix, y_s) - y_t).square().mean() / 2


def kip_fc(setting: Setting) -> HotSpot:
    """Loss and image gradient of a KIP step, 100 support images and 1000 targets: 64 values at size S, 3 x 32 x 32 at L.

    On a GPU at size L 500 support images and 5000 targets, as for CIFAR-10.
    """
    larger = 5 if setting.device.type == "cuda" and setting.side == 32 else 1
    train = setting.images(larger * TARGETS // setting.classes, 0)
    x_t = train.images if setting.side == 32 else train.images[:, :1]
    x_t, labels = x_t[: larger * TARGETS], train.labels[: larger * TARGETS]
    x_s = x_t[:: len(x_t) // (larger * SUPPORT)].double() + 0.1
    y_s = ridge.centred_one_hot(labels[:: len(x_t) // (larger * SUPPORT)], train.num_classes)
    y_t = ridge.centred_one_hot(labels, train.num_classes)
    wide = x_t.double()
    pixels = x_s.clone().requires_grad_()

    def step(method: KIP) -> tuple[Tensor, Tensor]:
        kernel, targets = method.kernel(), wide if method.precision == "float64" else x_t
        prediction = ridge.predict(method.cross(kernel, targets, pixels), kernel(pixels), y_s, method.ridge)
        loss = ridge.mse(prediction, y_t)
        return loss, torch.autograd.grad(loss, pixels)[0]

    def plain() -> tuple[Tensor, Tensor]:
        loss = plain_regression(
            ntk(pixels, pixels, 1, SIGMA_W, SIGMA_B), ntk(wide, pixels, 1, SIGMA_W, SIGMA_B), y_s, y_t
        )
        return loss, torch.autograd.grad(loss, pixels)[0]

    methods = {"closed-form derivative": KIP(), "K_ts in 32 bits": KIP(precision="mixed")}
    steps = {name: lambda m=m: step(m) for name, m in methods.items()}
    return HotSpot(
        "KIP step, fully connected", "step", 1, {REFERENCE: plain} | steps,
        lambda: {name: _compared(call(), plain()) for name, call in steps.items()},
        dict(zip(steps, (1e-10, 1e-5), strict=False)),
    )  # fmt: skip


def kip_conv(setting: Setting, gradient: bool) -> HotSpot:
    """Kernel of ConvNet3 with pooling: 50 x 20 pairs of 8-pixel images with one channel at size S, 6 x 5 of 16-pixel colour
    images at L; with ``gradient`` also that of a weighted sum with respect to the second images."""
    n, m = (50, 20) if setting.side < 32 else (6, 5)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 8) if setting.side < 32 else (3, 16, 16)
    x, z = (
        torch.randn(k, *shape, generator=generator, dtype=torch.float64).to(setting.device) for k in (n, m)
    )
    weight = torch.randn(n, m, generator=generator, dtype=torch.float64).to(setting.device)
    z.requires_grad_(gradient)

    def call(kernel) -> tuple[Tensor, ...]:
        k = kernel(x, z)
        return (k, torch.autograd.grad((k * weight).sum(), z)[0]) if gradient else (k,)

    def plain() -> tuple[Tensor, ...]:
        return call(convnet_ntk)

    def ours() -> tuple[Tensor, ...]:
        return call(lambda a, b: convolutional(a, b, "convnet3").ntk)

    name = "patches, windows, in chunks"
    title = "pooled conv kernel, value and gradient" if gradient else "pooled conv kernel, value"
    return HotSpot(
        title, "1000 pairs", n * m / 1000, {REFERENCE: plain, name: ours},
        lambda: {name: _compared(ours(), plain())}, {name: 1e-7},
    )  # fmt: skip


def _compared(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    return max(difference(a.detach(), b.detach()) for a, b in zip(ours, reference, strict=True))


# -- RFAD ---------------------------------------------------------------------------------------------------------------


def rfad_step(setting: Setting) -> HotSpot:
    """Steps of RFAD at IPC 10: 8 new networks of the setting's size, 1280 real images, images, labels and T updated."""
    method = RFAD(iterations=STEPS, width=setting.width, depth=setting.depth, batches=1, validate_every=0)
    methods = {"one grouped network": method}
    return distillation(setting, "RFAD step", "rfad", methods, setting.images(128, 0), 10)


KERNEL_SPOTS = {
    "krr-search": krr_search,
    "krr-digits": krr_digits,
    "kip-fc": kip_fc,
    "kip-conv": lambda setting: kip_conv(setting, gradient=False),
    "kip-conv-grad": lambda setting: kip_conv(setting, gradient=True),
    "rfad": rfad_step,
}
