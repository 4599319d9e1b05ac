"""Published settings of the methods that learn codes of a generator, typed off their codes once more."""

from __future__ import annotations

import pytest
from helpers import check_missing, check_published, published_rows, typed_and_found

from lib.evaluate.protocol import PROTOCOLS
from lib.methods import recipes
from lib.nets.bank import Bank
from lib.nets.experts import Experts
from lib.nets.generators.prior import Brought
from lib.nets.training import schedule

ITGAN = {
    "iterations": 5000, "lr": 1e-3, "regulariser": 1e-3, "batch": 1250, "real_batch": 500, "network": "convnet-d3-w128",
    "augmentation": "data", "inversion": "adam", "inversion_steps": 5000, "inversion_lr": 0.1, "inversion_batch": 100,
    "cosine": False, "classifier_epochs": 200,
}  # fmt: skip
BANK = Experts(100, lr=0.01, momentum=0.9, weight_decay=5e-4, batch=256, epochs=50)
SUBSETS = "imagenet-a imagenet-b imagenet-c imagenet-d imagenet-e"
GLAD = {"space": "f20", "iterations": 1000, "lr": 10.0, "lr_w": 0.01, "momentum": 0.5, "chunk": 10, "init": "noise",
        "average": False, "random_map": False, "learn_generator": False, "lr_generator": 1e-4}  # fmt: skip
BY_LOSS = {"DM": {}, "DC": {"space": "f16", "lr": 1.0, "lr_w": 0.001},
           "MTT": {"space": "f12", "iterations": 5000, "lr": 1e4, "lr_w": 10.0, "lr_generator": 0.1}}  # fmt: skip
PUBLISHED = {
    ("itgan", ""): [
        ("cifar10", (5000,), "itgan", ITGAN, {}),
        ("cifar100", (500,), "itgan", ITGAN, {"batch": 500}),
    ],
    ("itgan", "bank"): [
        ("cifar10", (5000,), "itgan", ITGAN, {"networks": Bank(BANK)}),
        ("cifar100", (500,), "itgan", ITGAN, {"batch": 500, "networks": Bank(BANK, least=40.0)}),
    ],
} | {
    ("glad", f"{loss} {size}" if size != 128 else loss.replace("DM", "")): [
        (SUBSETS, (1,) if size == 512 else (1, 10), "glad", GLAD, BY_LOSS[loss])
    ]
    for loss in BY_LOSS
    for size in (128, 256, 512)
}
ROWS = published_rows(PUBLISHED)


@pytest.mark.parametrize(("name", "variant", "data", "ipc", "judged", "fields"), ROWS)
def test_a_row_has_the_published_settings(name, variant, data, ipc, judged, fields):
    check_published(name, variant, data, ipc, judged, fields)
    assert isinstance(recipes(name).named(data, ipc, variant).method.prior, Brought)


def test_every_published_row_was_typed():
    typed, found = typed_and_found(ROWS, ("itgan", "glad"))
    assert typed == found


def test_the_losses_that_glad_is_published_with():
    find = recipes("glad").named
    for size, depth in ((128, 5), (256, 6), (512, 7)):
        of = {
            loss: find("imagenet-c", 1, loss if size == 128 else f"{loss or 'DM'} {size}").method
            for loss in ("", "DC", "MTT")
        }
        assert all(one.objective.network == f"convnet-d{depth}-w128" for one in of.values())
        dm, dc, mtt = (one.objective for one in of.values())
        assert (dm.real_batch, dm.augmentation) == (256, "data")
        assert (dc.real_batch, dc.loops(10), dc.lr_network, dc.augmentation) == (256, (1, 1), 0.01, "data")
        assert (mtt.steps, mtt.expert_epochs, mtt.start_epochs, mtt.rate, mtt.lr_rate) == (
            20,
            3,
            5,
            0.01,
            1e-6,
        )
        assert (mtt.momentum, mtt.experts.count, mtt.experts.lr) == (0.5, 100, 0.01)


def test_a_reconstruction_says_so():
    rows = [row for row in recipes("dcgm") if not row.small]
    assert rows and all(row.variant == "reconstruction" and "our choices" in row.source for row in rows)


def test_the_protocols_are_those_of_the_codes():
    itgan, glad = PROTOCOLS["itgan"], PROTOCOLS["glad"]
    assert (itgan.trained_epochs, itgan.lr, itgan.batch, itgan.network) == (201, 0.01, 256, "resnet18-batch")
    assert (glad.trained_epochs, glad.lr, glad.batch, glad.weight_decay) == (1000, 0.001, 256, 5e-4)
    rate, fresh = schedule(glad.schedule, glad.lr, glad.epochs)
    assert rate(0) == pytest.approx(1e-10) and rate(500) == rate(501) == pytest.approx(1e-3) and fresh == ()
    assert 0 < rate(999) < 1e-7


@pytest.mark.parametrize("name", ["itgan", "glad"])
def test_what_was_not_published_is_an_error(name):
    check_missing(name, "svhn", 10)
