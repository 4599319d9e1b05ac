"""What DC and its relatives published: a table typed from the papers and codes, and a first step of every row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import check_missing, check_published, published_rows, toy_data, typed_and_found, with_fields

from lib.distill import distill
from lib.evaluate.protocol import PROTOCOLS, protocol
from lib.formation import ChannelMix, MultiFormation, Pixels
from lib.match.contrastive import Contrastive
from lib.match.curvature import CurvatureGap
from lib.match.gradient import FeatureMean, LayerSum, RowCosine
from lib.methods import recipes
from lib.methods.dc import LOOPS
from lib.select.sampler import RandomBatches, Representative

NAMES = ("dc", "dsa", "dcc", "idc", "dream", "dream_dc", "dcep", "lcmat_c")
# of the published code of DC, which DSA, DCC and LCMat-C share; K networks
OF_DC = {
    "outer": 1000, "lr": 0.1, "momentum": 0.5, "lr_network": 0.01, "real_batch": 256, "network_batch": 256,
    "network": "convnet-d3-w128", "formation": Pixels(), "sampler": RandomBatches(), "mode": "single", "siamese": True,
    "space": "normalised", "sequential": False, "most": None,
}  # fmt: skip
AS_DC = OF_DC | {"init": "noise", "augmentation": "none", "distance": RowCosine()}
AS_DSA = OF_DC | {"init": "real", "augmentation": "data", "distance": RowCosine()}
AS_DCC = OF_DC | {
    "init": "real", "augmentation": "none", "distance": Contrastive(RowCosine()), "warm": RowCosine(), "warm_outer": 250,
    "warm_inner": 10,
}  # fmt: skip
# of the published code of IDC: niter * 100 / inner networks
AS_IDC = {
    "outer": 2000, "inner": 100, "lr": 5e-3, "base_side": 32, "momentum": 0.5, "real_batch": 64, "network_batch": 64,
    "network": "convnet-d3-w128", "init": "mix", "distance": LayerSum("mse", "conv"), "augmentation": "color_crop_cutout",
    "mode": "idc", "formation": MultiFormation(2), "most": 128, "bound": False, "inner_data": "real", "n_data": 2000,
    "lr_network": 0.01, "momentum_network": 0.9, "decay_network": 5e-4, "augmentation_network": "color_crop", "cutmix": 0.5,
    "early": 0, "space": "unit", "sequential": True, "sampler": RandomBatches(),
}  # fmt: skip
ONE = {"formation": Pixels()}
L1 = {"distance": LayerSum("l1", "conv"), "lr": 1e-4, "n_data": 500}
TEN = {
    "distance": LayerSum("l1", "conv"), "lr": 3e-3, "outer": 500, "base_side": 224, "formation": MultiFormation(3, pad=True),
    "early": 10, "cutmix": 1.0, "n_data": 500, "network": "resnet10ap",
}  # fmt: skip
HUNDRED = TEN | {
    "lr": 1e-3, "lr_network": 0.1, "decay_network": 1e-4, "real_batch": 128, "network_batch": 128, "early": 5
}  # fmt: skip
AS_DREAM = AS_IDC | {
    "real_batch": 128, "network_batch": 128, "init": "k-means", "sampler": Representative(every=10)
}  # fmt: skip
TINY = {"network": "convnet-d4-w128", "n_data": 1000, "real_batch": 64, "network_batch": 64}
PLUS = {"distance": LayerSum("mse", "conv") + FeatureMean(1.0), "early": 1}

# (method, variant) -> rows (data sets, IPC, protocol, base, changes)
PUBLISHED = {
    ("dc", ""): [
        ("mnist", (1, 10, 20, 30, 40, 50), "dc-mnist", AS_DC, {}),
        ("fashionmnist svhn cifar10", (1, 10, 20, 30, 40, 50), "dc", AS_DC, {}),
        ("cifar100", (1, 10), "dc", AS_DC, {}),
    ],
    ("dc", "mlp"): [("mnist", (1,), "dc-mnist", AS_DC, {"network": "mlp", "lr": 0.01})],
    ("dsa", ""): [("mnist fashionmnist svhn cifar10 cifar100", (1, 10, 50), "dsa", AS_DSA, {})],
    ("dcc", ""): [("svhn cifar10 cifar100", (1, 10, 50), "dc", AS_DCC, {})],
    ("dcc", "DSAC"): [("svhn cifar10 cifar100", (1, 10, 50), "dsa", AS_DCC, {"augmentation": "data"})],
    ("idc", ""): [
        ("cifar10 cifar100", (1, 10, 20, 50), "idc", AS_IDC, {}),
        ("svhn", (1, 10, 50), "idc", AS_IDC, {"n_data": 500}),
        ("fashionmnist", (1, 10, 50), "idc", AS_IDC, L1),
        ("mnist", (1, 10, 50), "idc-plain", AS_IDC, L1 | {"base_side": 28, "augmentation": "color_crop", "cutmix": 0.0}),
        ("imageidc", (10,), "idc-imagenet-1000", AS_IDC, TEN),
        ("imageidc", (20,), "idc-imagenet-1000", AS_IDC, TEN | {"bound": True}),
        ("imagenet100", (10,), "idc-imagenet-667", AS_IDC, HUNDRED),
        ("imagenet100", (20,), "idc-imagenet-667", AS_IDC, HUNDRED | {"bound": True}),
    ],
    ("idc", "I"): [
        ("cifar10 cifar100", (1, 10, 20, 50), "idc", AS_IDC, ONE),
        ("svhn", (1,), "idc-cutout", AS_IDC, ONE | {"n_data": 500}),
        ("svhn", (10, 50), "idc", AS_IDC, ONE | {"n_data": 500}),
        ("fashionmnist", (1, 10, 50), "idc", AS_IDC, L1 | ONE),
        ("mnist", (1, 10, 50), "idc", AS_IDC, L1 | ONE | {"base_side": 28}),
        ("imageidc", (10,), "idc-imagenet-2000", AS_IDC, TEN | ONE),
        ("imageidc", (20,), "idc-imagenet-1500", AS_IDC, TEN | ONE),
        ("imagenet100", (10,), "idc-imagenet-1333", AS_IDC, HUNDRED | ONE),
        ("imagenet100", (20,), "idc-imagenet-1000", AS_IDC, HUNDRED | ONE),
    ],
    ("dream", ""): [
        ("cifar10 cifar100", (1, 10, 50), "idc", AS_DREAM, {}),
        ("svhn", (1, 10, 50), "idc", AS_DREAM, {"n_data": 500}),
        ("fashionmnist", (1, 10, 50), "idc", AS_DREAM, L1),
        ("mnist", (1, 10, 50), "idc-plain", AS_DREAM, L1 | {"base_side": 28, "augmentation": "color_crop", "cutmix": 0.0}),
        ("tinyimagenet", (1, 10), "idc", AS_DREAM, TINY),
        ("tinyimagenet", (50,), "idc", AS_DREAM, TINY | {"lr": 1e-6}),
    ],
    ("dream", "plus"): [("cifar10 cifar100", (1, 10, 50), "idc", AS_DREAM, PLUS)],
    ("dream_dc", ""): [
        ("mnist", (1, 10, 50), "dc-mnist", AS_DC, {"init": "k-means", "sampler": Representative(every=10)}),
        ("fashionmnist svhn cifar10", (1, 10, 50), "dc", AS_DC, {"init": "k-means", "sampler": Representative(every=10)}),
    ],
    ("dcep", ""): [("cifar10 cifar100", (1, 10, 50), "idc", AS_IDC, {"formation": ChannelMix(), "lr_maps": 1e-3})],
    ("lcmat_c", ""): [
        ("cifar10 cifar100", (1,), "dsa", AS_DSA, {"distance": RowCosine() + CurvatureGap(0.1, "diag")}),
        ("cifar10 cifar100", (10, 50), "dsa", AS_DSA, {"distance": RowCosine() + CurvatureGap(0.1, "gradvar")}),
    ],
}  # fmt: skip
ROWS = published_rows(PUBLISHED)


@pytest.mark.parametrize(("name", "variant", "data", "ipc", "judged", "fields"), ROWS)
def test_the_published_settings(name, variant, data, ipc, judged, fields):
    check_published(name, variant, data, ipc, judged, fields)


def test_the_table_is_complete():
    """No published row but the ones above and the other formations of DCEP, which are ours."""
    typed, found = typed_and_found(ROWS, NAMES)
    extra = {key for key in found - typed if key[0] != "dcep"}
    assert typed <= found and not extra


def test_loops_are_dcs_table_and_dccs():
    assert LOOPS == {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    for name in ("dc", "dsa", "lcmat_c", "dream_dc"):
        for ipc in (1, 10, 50):
            assert recipes(name).named("cifar10", ipc).method.loops(ipc) == LOOPS[ipc]
    dcc = recipes("dcc").named("cifar10", 1).method
    assert dcc.loops(1) == (10, 5) and dcc.loops(10) == LOOPS[10] and dcc.total_steps(1) == 10_000
    idc = recipes("idc").named("cifar10", 10).method
    assert idc.total_steps(10) == 200_000


def test_the_networks_of_dream_and_imagenet100_take_sixteen_and_four_steps_on_real_images():
    """The loader of the inner data has the batch of the matching."""
    for name, data, steps in (("dream", "cifar10", 16), ("idc", "imagenet100", 4), ("idc", "cifar10", 32)):
        method = recipes(name).named(data, 10).method
        assert -(-method.n_data // method.network_batch) == steps


@pytest.mark.parametrize(
    ("name", "data", "ipc"), [("dc", "cifar100", 50), ("dcc", "mnist", 1), ("idc", "tinyimagenet", 10), ("dcep", "svhn", 10)]
)  # fmt: skip
def test_what_was_not_published_is_an_error_that_lists_the_rows(name, data, ipc):
    check_missing(name, data, ipc)


def test_protocols_of_single_papers():
    mnist = PROTOCOLS["dc-mnist"]
    assert (mnist.epochs, mnist.augmentation, mnist.schedule, mnist.batch) == (
        1000,
        "crop_scale_rotate",
        "dc",
        256,
    )
    for name, strategy in (
        ("idc-plain", "color_crop_scale_rotate"),
        ("idc-cutout", "color_crop_cutout_scale_rotate"),
    ):
        plain = PROTOCOLS[name]
        assert (plain.augmentation, plain.cutmix, plain.epochs, plain.batch) == (strategy, 0, 1000, 64)
        assert plain.mode == "idc" and plain.schedule == "steps"
    for epochs in (667, 1000, 1333, 1500, 2000):
        large = PROTOCOLS[f"idc-imagenet-{epochs}"]
        assert (large.epochs, large.cutmix, large.network) == (epochs, 1.0, "resnet10ap")
    assert protocol("idc").cutmix == 0.5


SMALL = [
    pytest.param(name, row.variant, row, id=f"{name}{row.variant and '-' + row.variant}-{row.data}-{row.ipc}")
    for name in NAMES
    for row in recipes(name)
]


@pytest.fixture(scope="module")
def pictures():
    return {channels: toy_data(channels=channels, per_class=20, size=12) for channels in (1, 3)}


@pytest.mark.parametrize(("name", "variant", "row"), SMALL)
def test_a_first_step(name, variant, row, pictures):
    """Of every row, on random images of its channels, with a tiny network and batch."""
    train = pictures[1 if "mnist" in row.data or row.data == "digits" else 3].train
    method = with_fields(
        row.method, outer=1, inner=1, epochs=1, real_batch=4, network_batch=8, n_data=8, early=0
    )
    method = replace(method, network="mlp" if row.method.network == "mlp" else "convnet-d1-w4")
    run = distill(method, train, 1, 0)
    assert run.history["loss"].isfinite().all() and len(run.history["loss"]) == 1
    assert torch.isfinite(run.synset.codes).all()


@pytest.mark.parametrize("name", ("dc", "dsa", "dream_dc", "lcmat_c"))
def test_ten_images_a_class_take_fewer_networks(toy, name):
    """Ten matching steps a network and fifty epochs between two of them: as many networks as for one image would take hours."""
    table = recipes(name)
    for data in ("digits", "fashion14"):
        one, ten = table.named(data, 1).method, table.named(data, 10).method
        assert one.outer >= 40 and ten == replace(one, outer=12) and ten.total_steps(10) == 120
    # images of another name take the row of the nearest size that is meant for their number
    assert [table.find(toy.train, ipc).method.outer for ipc in (1, 2, 10)] == [table.named("digits").method.outer] * 2 + [12]
