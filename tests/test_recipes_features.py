"""What DM and its relatives published: a table typed from the papers and codes, and a first step of every row."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import check_missing, check_published, published_rows, toy_data, typed_and_found

from lib.distill import distill
from lib.evaluate.protocol import PROTOCOLS, protocol
from lib.formation import Mosaic, Pixels
from lib.match.attention import Attention
from lib.match.features import ClassAware, ClassMean, Discrimination, LayerMeans
from lib.match.mmd import MMD
from lib.match.points import Critic, Sinkhorn, Sliced, Wasserstein
from lib.match.style import Diversity, Gram, Moments
from lib.methods import recipes
from lib.nets.supply import Fresh, Queue
from lib.select.sampler import RandomBatches

NAMES = ("dm", "m3d", "cafe", "idm", "datadam", "ddm", "wasserstein")
FIVE = "mnist fashionmnist svhn cifar10 cifar100"
AS_DM = {
    "iterations": 20_000, "lr": 1.0, "momentum": 0.5, "real_batch": 256, "network": "convnet-d3-w128", "init": "real",
    "augmentation": "data", "mode": "single", "distance": ClassMean(), "networks": Fresh(), "formation": Pixels(), "most": None,
    "space": "normalised", "sequential": False, "sampler": RandomBatches(),
}  # fmt: skip
AS_M3D = AS_DM | {
    "iterations": 5000, "lr": 10.0, "real_batch": 128, "init": "mix", "augmentation": "color_crop_cutout", "mode": "idc",
    "distance": MMD("gaussian", "adaptive"), "networks": Fresh(5), "formation": Mosaic(2, "nearest"), "most": 200, "space": "unit",
    "sequential": True,
}  # fmt: skip
AS_CAFE = AS_DM | {
    "iterations": 2000, "lr": 0.1, "init": "noise", "augmentation": "none", "lr_network": 0.01, "network_batch": 256, "query": 128,
    "distance": ClassMean() + LayerMeans((0.1, 0.1, 1.0, 1.0)) + Discrimination(0.01, "sum"), "window": 10, "saturated": 0.04,
    "moved": 0.03, "schedule": "dynamic", "legacy": False,
}  # fmt: skip
AS_IDM = AS_DM | {"lr": 0.2, "init": "mix", "formation": Mosaic(2), "sequential": True}
AS_DATADAM = AS_DM | {
    "iterations": 8000, "real_batch": 64, "distance": ClassMean(100 * 0.01) + Attention(100.0, 4.0)
}  # fmt: skip
FULL = {"distance": ClassMean() + Gram(1e4, legacy=True) + Moments(1e4, legacy=True) + Diversity(10.0)}
LATER = ClassMean() + Gram(1e4, tap="conv") + Moments(180.0, tap="conv", per_image=True)
FOUR, SIX = {"network": "convnet-d4-w128"}, {"network": "convnet-d6-w128"}


def queue(lam: float, interval: int = 30, steps: int = 10, **more) -> dict:
    """Of IDM's commands: ce_weight, net_generate_interval, model_train_steps; 100 networks from 3 on, 2 of them trained."""
    sizes = {"size": 100, "batch": 256} | more
    networks = Queue(
        start=3, interval=interval, fetch=2, steps=steps, lr=0.01, momentum=0.9, decay=5e-4, **sizes
    )
    return {"distance": ClassMean() + ClassAware(lam), "networks": networks}


CODE = {
    "iterations": 20_000, "network": "convnet-d3-w128-batch", "distance": ClassMean(100 * 0.01) + Attention(100.0, 1.0)
}  # fmt: skip
HUNDRED = queue(3.0, 50, size=50, batch=128) | SIX | {"real_batch": 128}

# (method, variant) -> rows (data sets, IPC, protocol, base, changes)
PUBLISHED = {
    ("dm", ""): [
        (FIVE, (1, 10, 50), "dsa", AS_DM, {}),
        ("cifar10", (100, 200, 500, 1000, 1250), "dsa", AS_DM, {"lr": 10.0}),
        ("cifar100", (100, 125), "dsa", AS_DM, {}),
        ("tinyimagenet", (1, 10, 50), "dsa", AS_DM, FOUR),
    ],
    ("m3d", ""): [
        ("cifar10 cifar100", (1, 10, 50), "m3d", AS_M3D, {}),
        ("mnist fashionmnist svhn", (1, 10, 50), "m3d", AS_M3D, {"iterations": 10_000}),
        ("tinyimagenet", (1, 10, 50), "m3d", AS_M3D, FOUR),
    ],
    ("m3d", "released-lr"): [("cifar10", (10,), "m3d", AS_M3D, {"lr": 5e-3})],
    ("cafe", ""): [("fashionmnist cifar10 cifar100", (1, 10, 50), "cafe", AS_CAFE, {})],
    ("cafe", "DSA"): [("fashionmnist cifar10 cifar100", (1, 10, 50), "dsa", AS_CAFE, {"augmentation": "data"})],
    ("idm", ""): [
        ("cifar10 cifar100", (1,), "dsa", AS_IDM, queue(0.5, 5) | {"real_batch": 5000}),
        ("cifar10", (10,), "dsa", AS_IDM, queue(0.5)),
        ("cifar10", (50,), "dsa", AS_IDM, queue(0.1)),
        ("cifar100", (10,), "dsa", AS_IDM, queue(0.1, steps=50)),
        ("cifar100", (50,), "dsa", AS_IDM, queue(0.1)),
        ("tinyimagenet", (1, 10), "dsa", AS_IDM, queue(0.5) | FOUR),
        ("tinyimagenet", (50,), "dsa", AS_IDM, queue(0.8, steps=50) | FOUR),
        ("imagenet100", (1, 10), "dsa", AS_IDM, HUNDRED),
        ("imagenet100", (50,), "dsa", AS_IDM, HUNDRED | queue(3.0, 50, batch=128) | {"formation": Pixels()}),
    ],
    ("datadam", ""): [
        ("cifar10 cifar100", (1, 10, 50), "datadam", AS_DATADAM, {}),
        ("cifar10", (100, 200, 500, 1000), "datadam", AS_DATADAM, {"lr": 10.0}),
        ("tinyimagenet", (1, 10, 50), "datadam", AS_DATADAM, FOUR),
        ("imagenet imagenette imagewoof imagesquawk", (1, 2, 10, 50), "datadam", AS_DATADAM,
         SIX | {"distance": ClassMean(100 * 0.02) + Attention(100.0, 4.0)}),
    ],
    ("datadam", "code"): [
        ("cifar10 cifar100", (1, 10, 50), "datadam", AS_DATADAM, CODE),
        ("cifar10", (100,), "datadam", AS_DATADAM, CODE | {"lr": 10.0}),
    ],
    ("ddm", ""): [
        ("cifar10 cifar100", (1, 10, 50), "ddm", AS_DM, FULL),
        ("tinyimagenet", (1, 10, 50), "ddm", AS_DM, FULL | FOUR),
    ],
    ("ddm", "moments"): [("cifar10", (10,), "ddm", AS_DM, {"distance": ClassMean() + Moments(1e4, legacy=True)})],
    ("ddm", "gram"): [("cifar10", (10,), "ddm", AS_DM, {"distance": ClassMean() + Gram(1e4, legacy=True)})],
    ("ddm", "diversity"): [("cifar10", (10,), "ddm", AS_DM, {"distance": ClassMean() + Diversity(10.0, k=2)})],
    ("ddm", "released"): [
        ("cifar10", (1, 10, 50), "ddm", AS_DM, {"distance": LATER}),
        ("cifar100", (1, 10, 50), "ddm", AS_DM, {"distance": LATER, "iterations": 10_000}),
        ("tinyimagenet", (1, 10, 50), "ddm", AS_DM, {"distance": LATER, "iterations": 3000} | FOUR),
    ],
    ("ddm", "released-diversity"): [
        ("cifar10", (10, 50), "ddm", AS_DM, {"distance": LATER + Diversity(30.0, principal=True)}),
    ],
    # ours, nothing is published: DM's settings; unit gradients ask for a larger rate
    ("wasserstein", ""): [
        (FIVE, (1, 10, 50), "dsa", AS_DM, {"distance": Wasserstein(p=2)}),
        ("tinyimagenet", (1, 10, 50), "dsa", AS_DM, FOUR | {"distance": Wasserstein(p=2), "iterations": 10_000}),
    ],
    ("wasserstein", "w1"): [(FIVE, (1, 10, 50), "dsa", AS_DM, {"distance": Wasserstein(p=1), "lr": 10.0})],
    ("wasserstein", "sinkhorn"): [(FIVE, (1, 10, 50), "dsa", AS_DM, {"distance": Sinkhorn(epsilon=0.05)})],
    ("wasserstein", "sliced"): [(FIVE, (1, 10, 50), "dsa", AS_DM, {"distance": Sliced(projections=128)})],
    ("wasserstein", "critic"): [
        (FIVE, (1, 10, 50), "dsa", AS_DM, {"lr": 10.0, "distance": Critic(lr=1e-4, steps=5, first=(50, 20), penalty=10.0)}),
    ],
}  # fmt: skip
ROWS = published_rows(PUBLISHED)


@pytest.mark.parametrize(("name", "variant", "data", "ipc", "judged", "fields"), ROWS)
def test_the_published_settings(name, variant, data, ipc, judged, fields):
    check_published(name, variant, data, ipc, judged, fields)


def test_the_table_is_complete():
    typed, found = typed_and_found(ROWS, NAMES)
    assert typed == found


@pytest.mark.parametrize(
    ("name", "data", "ipc"), [("dm", "cifar10", 20), ("cafe", "svhn", 10), ("idm", "mnist", 1), ("m3d", "cifar10", 100)]
)  # fmt: skip
def test_what_was_not_published_is_an_error_that_lists_the_rows(name, data, ipc):
    check_missing(name, data, ipc)


def test_protocols_of_single_papers():
    cafe, m3d, datadam, ddm = (PROTOCOLS[name] for name in ("cafe", "m3d", "datadam", "ddm"))
    assert (cafe.epochs, cafe.augmentation, cafe.batch, cafe.networks) == (600, "none", 256, 20)
    assert (m3d.epochs, m3d.batch, m3d.cutmix, m3d.mode) == (1000, 64, 1.0, "idc")
    assert (datadam.epochs, datadam.batch, datadam.schedule, datadam.lr) == (1800, 64, "dc", 0.01)
    assert replace(ddm, name="dsa", networks=20, source="") == replace(PROTOCOLS["dsa"], source="")
    assert "cutout" not in protocol("m3d", toy_data().train).augmentation


# -- every row runs -------------------------------------------------------------------------------------------------------

EVERY = [
    pytest.param(row, id=f"{name}{row.variant and '-' + row.variant}-{row.data}-{row.ipc}")
    for name in NAMES
    for row in recipes(name)
]
TINY = {
    "iterations": 1, "real_batch": 4, "network_batch": 8, "max_outer": 1, "max_inner": 1, "query": 4, "window": 2
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    return {channels: toy_data(channels=channels, per_class=20, size=16) for channels in (1, 3)}


@pytest.mark.parametrize("row", EVERY)
def test_a_first_step(row, pictures):
    """Of every row, on random images of its channels, with a narrow network and small batches."""
    train = pictures[1 if "mnist" in row.data or row.data == "digits" else 3].train
    method = row.method
    network = "convnet-d3-w4" + "-batch" * method.network.endswith("-batch")
    small = replace(method, network=network, **{k: v for k, v in TINY.items() if hasattr(method, k)})
    if isinstance(method.networks, Queue):
        small = replace(small, networks=replace(method.networks, size=3, steps=1, batch=8))
    if isinstance(method.distance, Critic):
        small = replace(small, distance=replace(method.distance, network="mlp", first=(0, 1), steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one image per class has no diversity
        run = distill(small, train, 1 if row.ipc == 1 else 3, 0)
    assert run.history["loss"].shape == (1,) and run.history["loss"].isfinite().all()
    assert torch.isfinite(run.synset.codes).all()
