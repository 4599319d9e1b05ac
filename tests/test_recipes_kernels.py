"""The settings of the kernel methods, SRe2L and WMDD, against a table typed from the papers and their published code."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from helpers import generator, toy_data

from lib.data import names
from lib.data.whitening import WHITENINGS
from lib.evaluate import relabel
from lib.evaluate.regression import OWN
from lib.methods import recipes
from lib.recover.teacher import Teacher
from lib.system.errors import CompanionError

TABLES = ("krr", "kip", "conv_kip", "rfad", "frepo", "rcig", "sre2l", "wmdd")
ALL = [(name, row) for name in TABLES for row in recipes(name)]
KERNEL = {"own-ridge", "own-kernel"}  # judged by their own regression (lib.evaluate.kernel)


@dataclass(frozen=True)
class Row:
    """What the paper says of (method, data, IPC): fields of the method, protocol, whitening; ``variant`` "" as published."""

    method: str
    data: str
    ipcs: tuple[int, ...]
    protocol: str
    whiten: str | None = None
    variant: str = ""
    fields: tuple = ()


def row(method, data, ipcs, protocol, whiten=None, variant="", **values) -> Row:
    return Row(method, data, ipcs, protocol, whiten, variant, tuple(values.items()))


THREE, TWO = (1, 10, 50), (1, 10)
TYPED = [
    row("krr", "mnist", THREE, "own-ridge", map="identity", features=None, validation=0.05, lambda_s=0.0, init="noise", noise=0.1),
    row("krr", "cifar10", THREE, "own-ridge", variant="fcnn", map="fcnn", layers=1, slope=0.1),
    row("krr", "cifar100", THREE, "own-ridge", variant="fourier", map="fourier", variance=1e-3),
    row("krr", "cifar100", (5,), "own-ridge", variant="real", init="real", lambda_s=0.0),
    row("krr", "mnist", (50,), "own-ridge", variant="real-reg", init="real", lambda_s="teacher"),
    row("kip", "cifar10", (10,), "own-kernel", depth=1, kind="ntk", lr=0.04, target_batch=5000, ridge=1e-6,
        iterations=1000, learn_labels=False),
    row("kip", "cifar10", (10,), "own-kernel", variant="learned labels", learn_labels=True, lr=0.04),
    row("kip", "cifar10", (50,), "own-kernel", variant="label solve", iterations=0, labels="solve-published"),
    row("conv_kip", "mnist", THREE, "own-kernel", nets=("kip",), learn_labels=True, augmentation="data", iterations=50_000),
    row("conv_kip", "fashionmnist", THREE, "own-kernel", nets=("kip",)),
    row("conv_kip", "svhn", THREE, "own-kernel", "zca-kip", ridge=1e-6),
    row("conv_kip", "cifar10", THREE, "own-kernel", "zca-kip", nets=("kip",)),
    row("conv_kip", "cifar100", TWO, "own-kernel", "zca-kip", nets=("kip",)),
    row("conv_kip", "cifar10", THREE, "own-kernel", "zca-kip", "label solve", iterations=0, labels="solve", learn_labels=False),
    row("conv_kip", "cifar10", (50,), "own-kernel", None, "convnet3", nets=("convnet3",), learn_labels=False, augmentation="none"),
    row("conv_kip", "cifar10", THREE, "own-kernel", "zca-kip", "sampled", nets=("convnet3", "convvec3", "convvec8")),
    row("rfad", "mnist", THREE, "own-rfad", networks=8, width=256, depth=3, real_batch=1280, batches=4, ridge=5e-3, lr=1e-3,
        lr_transform=5e-5, lr_scale=1e-2, loss="platt", learn_labels=True, validate_every=40, validation_images=500,
        validation_networks=16, patience=1000, iterations=100_000),
    row("rfad", "fashionmnist", THREE, "own-rfad", validation_images=500),
    row("rfad", "svhn", THREE, "own-rfad", "zca-kip", validation_images=500),
    row("rfad", "cifar10", THREE, "own-rfad", "zca-rfad", validation_images=500),
    row("rfad", "cifar100", TWO, "own-rfad", "zca-rfad", validation_images=100),
    row("rfad", "cifar10", THREE, "own-rfad", "zca-rfad", "mse", loss="mse", learn_labels=False),
    row("frepo", "mnist", THREE, "own-frepo", networks=10, online_updates=100, real_batch=1024, lr=3e-4, lr_network=3e-4,
        iterations=500_000, ridge=1e-6, width=128, depth=3, norm=True, flip=False),
    row("frepo", "fashionmnist", THREE, "own-frepo", flip=False),
    row("frepo", "cifar10", THREE, "own-frepo", "zca", flip=True, depth=3),
    row("frepo", "cifar100", (1,), "own-frepo", "zca", flip=True),
    row("frepo", "cifar100", (10, 50), "own-frepo", "zca", flip=False),
    row("frepo", "tinyimagenet", (1,), "own-frepo", "zca", flip=True, depth=4),
    row("frepo", "tinyimagenet", (10,), "own-frepo", "zca", flip=False, depth=4),
    row("frepo", "imagenet", (1, 2), "own-frepo", "zca", flip=False, depth=4),
    row("rcig", "mnist", THREE, "own-rcig", networks=30, online_updates=100, most_updates=15, lr=3e-3, lr_scale=3e-2, lr_network=5e-5,
        real_batch=1024, ridge=5e-4, width=128, depth=3, softplus=60.0, solver="adam", solver_steps=20, iterations=10_000, flip=False),
    row("rcig", "fashionmnist", THREE, "own-rcig", flip=False, displaced=True, implicit=True, loss="platt"),
    row("rcig", "cifar10", (1,), "own-rcig", "zca", flip=True, iterations=15_000),
    row("rcig", "cifar10", (10, 50), "own-rcig", "zca", flip=True, iterations=10_000),
    row("rcig", "cifar100", TWO, "own-rcig", "zca", flip=True, iterations=10_000),
    row("rcig", "cifar100", (50,), "own-rcig", "zca", flip=False),
    row("rcig", "tinyimagenet", (1,), "own-rcig", "zca", flip=True, depth=4, softplus=0.0, iterations=5000, ridge=5e-4),
    row("rcig", "tinyimagenet", (10,), "own-rcig", "zca", flip=False, depth=4, softplus=0.0),
    row("rcig", "imagenet", (1, 2), "own-rcig", "zca", flip=False, depth=4, softplus=0.0),
    row("rcig", "imagenette", TWO, "own-rcig", flip=True, depth=5, softplus=0.0, ridge=0.05),
    row("rcig", "imagewoof", TWO, "own-rcig", flip=True, depth=5, softplus=0.0, ridge=0.05),
    row("sre2l", "imagenet", (10, 50, 100, 200), "own-fkd-1024", iterations=4000, lr=0.25, bn_weight=0.01, block_images=100,
        crop=0.08, flip=True, roll=(0, 32), first_multiplier=10.0, betas=(0.5, 0.9), milestone=0.0),
    row("sre2l", "imagenet", (10,), "own-fkd-1024", variant="r2000", iterations=2000),
    row("sre2l", "tinyimagenet", (100,), "own-fkd-1024-tiny", iterations=4000, lr=0.1, bn_weight=1.0),
    row("sre2l", "tinyimagenet", (50,), "own-fkd-1024-tiny", iterations=1000, lr=0.1, bn_weight=1.0),
    row("sre2l", "cifar100", (10,), "own-fkd-cifar", iterations=1000, lr=0.25, bn_weight=0.01, crop=None, roll=(0, 4), flip=False),
    row("sre2l", "tinyimagenet", (50, 100), "own-fkd-1024-tiny", variant="CDA", iterations=4000, lr=0.4, bn_weight=0.05, milestone=1.0),
    row("sre2l", "imagenet", (50, 100, 200), "own-fkd-1024", variant="CDA", iterations=4000, lr=0.25, bn_weight=0.01, milestone=1.0),
    row("sre2l", "imagenet21k", (10, 20), "own-fkd-1024", variant="CDA", iterations=2000, lr=0.05, bn_weight=0.25, milestone=1.0),
    row("wmdd", "imagenette", (1, 10, 50, 100), "own-fkd", iterations=2000, lr=0.25, bn_weight=10.0, block_images=100, first_multiplier=1.0,
        mode="uniform", statistics="class", form="code", crop=0.08, roll=(0, 32)),
    row("wmdd", "tinyimagenet", (1, 10, 50, 100), "own-fkd-tiny", iterations=2000, lr=0.1, bn_weight=500.0),
    row("wmdd", "imagenet", (1, 10, 50, 100), "own-fkd", iterations=2000, lr=0.25, bn_weight=100.0),
]  # fmt: skip


@pytest.mark.parametrize("typed", TYPED, ids=lambda r: f"{r.method}-{r.data}-{r.variant}")
def test_the_recipe_is_what_the_paper_says(typed):
    for ipc in typed.ipcs:
        found = recipes(typed.method).named(typed.data, ipc, typed.variant)
        assert (found.protocol, found.whiten, found.small) == (typed.protocol, typed.whiten, False)
        assert {name: getattr(found.method, name) for name, _ in typed.fields} == dict(typed.fields)


def test_the_teachers_are_those_of_the_papers():
    teachers = {
        (name, data): recipes(name).named(data, 50).method.teacher
        for name in ("sre2l", "wmdd")
        for data in ("imagenet", "imagenette", "tinyimagenet", "cifar100")
    }
    assert teachers["sre2l", "imagenet"].weights == "pretrained"
    assert teachers["wmdd", "imagenet"] == teachers["wmdd", "imagenette"] == teachers["sre2l", "imagenette"]
    made = teachers[
        "wmdd", "imagenette"
    ]  # ten classes: trained on them, not read from a thousand-class network
    assert (made.network, made.weights, made.epochs, made.lr, made.batch) == (
        "torchvision-resnet18",
        "",
        50,
        0.025,
        32,
    )
    assert teachers["wmdd", "tinyimagenet"].network == "torchvision-resnet18-tiny"
    assert teachers["sre2l", "tinyimagenet"].network == "resnet18-batch"
    cifar = teachers["sre2l", "cifar100"]
    assert (cifar.epochs, cifar.lr, cifar.weight_decay, cifar.batch) == (200, 0.1, 5e-4, 128)


def test_no_row_is_guessed():
    for name, data, ipc, variant in (
        ("kip", "svhn", 10, ""),
        ("krr", "svhn", 10, ""),
        ("rfad", "cifar100", 50, ""),
        ("frepo", "tinyimagenet", 50, ""),
        ("frepo", "svhn", 1, ""),
        ("rcig", "tinyimagenet", 50, ""),
        ("sre2l", "tinyimagenet", 10, ""),
        ("sre2l", "imagenette", 10, "CDA"),
    ):
        with pytest.raises(CompanionError, match=f"no recipe for {data} IPC {ipc}"):
            recipes(name).named(data, ipc, variant)


@pytest.mark.parametrize(("name", "found"), ALL, ids=lambda value: str(value).replace(" ", "-"))
def test_every_row_names_an_evaluation_and_data_that_there_are(name, found):
    assert found.protocol in {*KERNEL, *OWN, *relabel.PROTOCOLS} and found.source
    assert found.whiten is None or found.whiten in WHITENINGS
    assert found.data in (*names(), "celeba", "imagenet21k")
    assert found.method.total_steps(1) >= 0


SIDE = {"mnist": 28, "fashionmnist": 28, "svhn": 32, "cifar10": 32, "cifar100": 32}
TINY = {
    "target_batch": 6, "networks": 2, "width": 4, "real_batch": 6, "batches": 1, "validation_images": 2, "validation_networks": 1,
    "teacher": Teacher("convnet-d2-w4-batch", epochs=1, batch=8, augmentation="none"), "storage": "float", "augmentation": "none",
    "iterations": 40, "features": None, "lr_inner": 1e-4, "lr_solver": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_first_step_of_every_published_row(name):
    """On random tensors of the right shape, in fewer pixels where every pair of them counts."""
    seen = set()
    for found in recipes(name):
        grey = found.data in ("mnist", "fashionmnist")
        side = (
            8
            if name == "conv_kip"
            else 12
            if name == "krr"
            else SIDE.get(found.data, 32 if name == "rcig" else 16)
        )
        allowed = {one.name for one in fields(found.method)}
        changes = {
            key: value
            for key, value in TINY.items()
            if key in allowed and not (key == "width" and name == "kip")
        }
        if name in ("kip", "conv_kip") and found.method.iterations == 0:
            changes |= {"iterations": 0}
        if found.variant != "sampled" and name == "conv_kip":
            changes |= {"nets": ("cpf",)}
        changes |= {"width": None} if "width" in changes and name in ("kip", "conv_kip") else {}
        tried = replace(found.method, **changes)
        key = (grey, side, repr(tried))
        if found.small or key in seen:
            continue
        seen.add(key)
        train, g = toy_data(2, per_class=6, channels=1 if grey else 3, size=side).train, generator()
        state = tried.begin(train, 1, g)
        if tried.total_steps(1):
            metrics = tried.step(state, g)
            assert all(bool(torch.as_tensor(value).isfinite().all()) for value in metrics.values())
        assert tried.finish(state).codes.isfinite().all()
    assert seen
