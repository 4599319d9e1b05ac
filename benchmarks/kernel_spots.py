"""The hot spots of the kernel methods, each beside the straightforward way; all in 64 bits unless a candidate says otherwise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import REFERENCE, HotSpot, difference
from benchmarks.hot_spots import Setting
from lib import data
from lib.kernels import ridge
from lib.kernels.closed_form import RidgePath, cyclic_labels, ridge_path
from lib.kernels.conv import convolutional
from lib.kernels.feature_maps import Blocks, random_blocks
from lib.methods.kip import KIP
from lib.methods.krr import KRR, MAPS, columns, feature_map
from lib.methods.rfad import RFAD

LAMBDAS = 10 ** torch.arange(-6, 5.75, 0.5, dtype=torch.float64)  # the published grid of 24
IPCS = (1, 5, 10, 50)


# -- KRR ----------------------------------------------------------------------------------------------------------------


def plain_search(phi: Tensor, y: Tensor, phi_val: Tensor, labels: Tensor) -> Tensor:
    """The published loop: for every lambda a least-squares solution of (phi phi^T + lambda I) W^T = phi Y^T; W (k, p)."""
    gram, moment = phi @ phi.T, phi @ y.T
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    best, kept = -1.0, None
    for lam in LAMBDAS.tolist():
        w = torch.linalg.lstsq(gram + lam * eye, moment).solution.T
        accuracy = ((w @ phi_val).argmax(0) == labels).double().mean().item()
        if accuracy > best:
            best, kept = accuracy, w
    return kept


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
        return plain_search(phi, y[:, ~held_out], phi_val, labels)

    name = "one eigendecomposition"
    most = 1 if setting.side == 32 and setting.device.type == "cpu" else None  # the loop takes a minute
    return HotSpot(
        "KRR ridge search", "search", 1, {REFERENCE: plain, name: ours},
        lambda: {name: difference(ours(), plain())}, {name: 1e-6}, most,
    )  # fmt: skip


def plain_krr(method: KRR, train, ipc: int, generator: torch.Generator) -> Tensor:
    """Algorithm 1 as published, step by step, with the library's order of draws: images (m, d)."""
    d, k = math.prod(train.shape), train.num_classes
    about = {"name": method.map, "features": d, "layers": 1, "slope": 0.1, "variance": None, "inputs": d}
    about["seed"] = int(torch.randint(2**31, (), generator=generator))
    phi = feature_map(about)
    order = torch.randperm(len(train), generator=generator)
    count = round(0.05 * len(train))
    x, y = columns(train.images), F.one_hot(train.labels, k).T.double()
    w = plain_search(
        phi(x[:, order[count:]]), y[:, order[count:]], phi(x[:, order[:count]]), train.labels[order[:count]]
    )
    y_s = cyclic_labels(k, ipc)[:, torch.arange(k * ipc).view(ipc, k).T.flatten()]  # class by class
    spread = (torch.linalg.pinv(y_s) @ w).std()
    z = 0.1 * spread * torch.randn(k * ipc, d, generator=generator, dtype=torch.float64)
    pinv = torch.linalg.pinv(y_s)
    phi_s = torch.linalg.pinv(pinv @ w + (torch.eye(k * ipc, dtype=z.dtype) - pinv @ y_s) @ z)
    x_s = phi.inverse(phi_s)
    assert F.cosine_similarity((y_s @ torch.linalg.pinv(phi(x_s))).flatten(), w.flatten(), 0) > 0.99
    return x_s.T


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
        return [plain_krr(method, train, ipc, torch.Generator().manual_seed(0)) for method, ipc in jobs]

    def check() -> dict[str, float]:
        worst = 0.0
        for synset, images in zip(ours(), plain(), strict=True):
            worst = max(worst, difference(synset.images.flatten(1), images))
        return {name: worst}

    name = "one eigendecomposition"
    return HotSpot("KRR, 12 sets of digits", "call", 1, {REFERENCE: plain, name: ours}, check, {name: 1e-6})


# -- KIP ----------------------------------------------------------------------------------------------------------------

SUPPORT, TARGETS = 100, 1000


def plain_fc(x: Tensor, z: Tensor) -> Tensor:
    """NTK of one hidden layer, operation by operation; coincident inputs get the value without a gradient."""
    d = x.shape[1]
    k, q, r = (
        2 * x @ z.T / d + 0.01,
        2 * x.square().mean(1)[:, None] + 0.01,
        2 * z.square().mean(1)[None] + 0.01,
    )
    size = torch.sqrt(q * r)
    cosine = k / size
    same = 1 - cosine.square() <= 1e-6 if k.dtype == torch.float32 else 1 - cosine.square() <= 1e-14
    theta = torch.where(same, 0.0, torch.arccos(torch.where(same, 0.0, cosine)))
    value = (
        size
        / (2 * math.pi)
        * (torch.sin(theta) + (math.pi - theta) * torch.where(same, 1.0, torch.cos(theta)))
    )
    return 2 * value + 0.01 + 2 * k * (math.pi - theta) / (2 * math.pi)


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
        flat = pixels.flatten(1)
        loss = plain_regression(plain_fc(flat, flat), plain_fc(wide.flatten(1), flat), y_s, y_t)
        return loss, torch.autograd.grad(loss, pixels)[0]

    methods = {"closed-form derivative": KIP(), "K_ts in 32 bits": KIP(precision="mixed")}
    steps = {name: lambda m=m: step(m) for name, m in methods.items()}
    return HotSpot(
        "KIP step, fully connected", "step", 1, {REFERENCE: plain} | steps,
        lambda: {name: _compared(call(), plain()) for name, call in steps.items()},
        dict(zip(steps, (1e-10, 1e-5), strict=False)),
    )  # fmt: skip


def plain_conv(x: Tensor, z: Tensor) -> Tensor:
    """NTK of ConvNet3 between all pairs of images, everything kept: 4-dimensional pixel pairs, shifted sums, autograd."""
    n, m = len(x), len(z)

    def average(k: Tensor) -> Tensor:
        h = k.shape[-1]
        padded = F.pad(k, (1, 1) * 4)
        return (
            sum(padded[..., i : i + h, j : j + h, i : i + h, j : j + h] for i in range(3) for j in range(3))
            / 9
        )

    def pool(k: Tensor) -> Tensor:
        for axis in (1, 2, 3, 4):
            k = k.unflatten(axis, (-1, 2)).mean(axis + 1)
        return k

    def relu(k: Tensor, q: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        q, r = (v.flatten(1, 2).flatten(2).diagonal(dim1=1, dim2=2).view(v.shape[:3]) for v in (q, r))
        size = torch.sqrt(q[:, :, :, None, None] * r[:, None, None])
        root = torch.sqrt((size.square() - k.square()).clamp_min(1e-30))
        theta = torch.atan2(root, k)
        return (root + (math.pi - theta) * k) / (2 * math.pi), (math.pi - theta) / (2 * math.pi)

    def start(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("nchw,nckl->nhwkl", a, b) / a.shape[1]

    pairs = torch.arange(n * m, device=x.device)
    k, q, r = start(x[pairs // m], z[pairs % m]), start(x, x), start(z, z)
    ntk = torch.zeros_like(k)
    for _ in range(3):
        k, q, r = (2 * average(v) + 0.01 for v in (k, q, r))
        ntk = 2 * average(ntk) + k
        k, active = relu(k, q[pairs // m], r[pairs % m])
        q, r = relu(q, q, q)[0], relu(r, r, r)[0]
        k, q, r, ntk = (pool(v) for v in (k, q, r, ntk * active))
    ntk, k = (v.flatten(1, 2).flatten(2).diagonal(dim1=1, dim2=2).mean(1) for v in (ntk, k))
    return (2 * ntk + 2 * k + 0.01).view(n, m)


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
        return call(plain_conv)

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


def plain_features(x: Tensor, blocks: Blocks) -> Tensor:
    """One network after the other, all images at once."""
    parts = []
    for j in range(len(blocks[0][0])):
        h = x
        for weight, bias in blocks:
            h = F.avg_pool2d(F.relu(F.conv2d(h, weight[j], bias[j], padding=1)), 2)
        parts.append(h.flatten(1))
    phi = torch.cat(parts, 1)
    return phi / math.sqrt(phi.shape[1])


def plain_rfad(method: RFAD, state, blocks: Blocks, generator: torch.Generator) -> Tensor:
    """The published step at given networks, as it is written there: a loop over networks, a general solver in 64 bits."""
    rows = torch.randperm(len(state.train), generator=generator, device=generator.device)[: method.real_batch]
    with torch.no_grad():
        phi_t = plain_features(state.train.images[rows], blocks)
    phi_s = plain_features((state.pixels.flatten(1) @ state.transform).view(state.pixels.shape), blocks)
    k_ss, k_ts = 2 * phi_s @ phi_s.T + 0.01, 2 * phi_t @ phi_s.T + 0.01
    k_ss = k_ss + method.ridge * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss), device=k_ss.device)
    prediction = k_ts.double() @ torch.linalg.solve(k_ss.double(), state.labels.double())
    loss = F.cross_entropy(state.log_scale.exp() * prediction, state.train.labels[rows])
    state.optimiser.zero_grad()
    loss.backward()
    state.optimiser.step()
    return loss.detach()


def rfad_step(setting: Setting) -> HotSpot:
    """One step of RFAD at IPC 10: 8 new networks of the setting's size, 1280 real images, images, labels and T updated."""
    train = setting.images(128, 0)
    method = RFAD(width=setting.width, depth=setting.depth, batches=1, validate_every=0)

    def begin():
        return method.begin(train, 10, setting.generator(1))

    def plain(state, generator: torch.Generator) -> Tensor:
        blocks = random_blocks(8, 3, generator, setting.width, setting.depth, device=setting.device)
        return plain_rfad(method, state, blocks, generator)

    def check() -> dict[str, float]:
        mine, reference = begin(), begin()
        losses = method.step(mine, setting.generator(2))["loss"], plain(reference, setting.generator(2))
        pairs = [losses, (mine.pixels.grad, reference.pixels.grad), (mine.labels.grad, reference.labels.grad)]
        return {name: max(difference(ours, reference) for ours, reference in pairs)}

    name, states, g = "one grouped network", (begin(), begin()), setting.generator(3)
    candidates = {REFERENCE: lambda: plain(states[0], g), name: lambda: method.step(states[1], g)["loss"]}
    most = 3 if setting.side == 32 and setting.device.type == "cpu" else None
    return HotSpot("RFAD step", "step", 1, candidates, check, {name: 1e-2}, most)


KERNEL_SPOTS = {
    "krr-search": krr_search,
    "krr-digits": krr_digits,
    "kip-fc": kip_fc,
    "kip-conv": lambda setting: kip_conv(setting, gradient=False),
    "kip-conv-grad": lambda setting: kip_conv(setting, gradient=True),
    "rfad": rfad_step,
}
