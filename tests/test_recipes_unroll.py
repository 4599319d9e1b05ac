"""What MTT, TESLA, HaBa and DD published: tables typed from papers and commands, and a first step of every small row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import toy_data, with_fields

from lib.distill import distill
from lib.evaluate.protocol import PROTOCOLS
from lib.methods import recipes
from lib.nets.experts import Experts
from lib.nets.starts import Fixed, Pretrained, Random
from lib.system.errors import CompanionError

NAMES = ("mtt", "dd", "haba", "esp")
SIX = "imagenette imagewoof imagefruit imagemeow imagesquawk imageyellow"
# data, IPC, (N, M, T+, pixel rate, rate of beta, beta, batch, blocks, whitening)
MTT = [
    ("cifar10", 1, (50, 2, 2, 100, 1e-7, 0.01, None, 3, "zca")),
    ("cifar10", 10, (30, 2, 20, 100, 1e-5, 0.001, None, 3, "zca")),
    ("cifar10", 50, (30, 2, 40, 1000, 1e-5, 0.001, None, 3, None)),
    ("cifar100", 1, (20, 3, 20, 1000, 1e-5, 0.01, None, 3, "zca")),
    ("cifar100", 10, (20, 2, 20, 1000, 1e-5, 0.01, None, 3, None)),
    ("cifar100", 50, (80, 2, 40, 1000, 1e-5, 0.01, 125, 3, "zca")),
    ("tinyimagenet", 1, (10, 2, 10, 1e4, 1e-4, 0.01, None, 4, None)),
    ("tinyimagenet", 10, (20, 2, 40, 1e4, 1e-4, 0.01, 200, 4, None)),
    ("tinyimagenet", 50, (20, 2, 40, 1e4, 1e-4, 0.01, 300, 4, None)),
    *((data, 1, (20, 2, 10, 1e5, 1e-6, 0.01, None, 5, None)) for data in SIX.split()),
    *((data, 10, (20, 2, 10, 1e5, 1e-6, 0.01, 20, 5, None)) for data in SIX.split()),
]
TESLA = [
    ("cifar10", 1, (50, 2, 5, 1000, 1e-7, 0.01, None, 3, None)),
    ("imagenet", 1, (10, 3, 10, 1e4, 1e-4, 0.01, 100, 4, None)),
]
# as above without blocks; momentum of bases and of beta
HABA = [
    ("cifar10", 1, "", (50, 2, 2, 100, 1e-7, 0.01)),
    ("cifar10", 3, "single-channel", (50, 2, 2, 100, 1e-7, 0.01)),
    ("cifar10", 10, "", (30, 2, 20, 100, 1e-5, 0.001)),
    ("cifar10", 50, "", (30, 2, 20, 100, 1e-5, 0.01)),
]


@pytest.mark.parametrize(
    ("data", "ipc", "row", "variant"), [(*r, "") for r in MTT] + [(*r, "TESLA") for r in TESLA]
)
def test_trajectories(data, ipc, row, variant):
    recipe = recipes("mtt").named(data, ipc, variant)
    m = recipe.method
    blocks = int(m.network.split("-")[1][1:])
    found = (
        m.steps,
        m.expert_epochs,
        m.start_epochs,
        m.lr,
        m.lr_rate,
        m.rate,
        m.batch,
        blocks,
        recipe.whiten,
    )
    assert found == row and recipe.protocol == "mtt" and m.network.endswith("w128")
    assert (m.momentum, m.init, m.augmentation) == (0.5, "real", "data")
    assert m.gradient == ("tesla" if variant else "bptt")
    assert m.experts == (Experts(50) if data == "imagenet" else Experts()) and m.soft_labels == (
        data == "imagenet"
    )
    assert m.iterations == (10_000 if data == "imagenet" else 5000)


def test_the_published_experts():
    e = Experts()
    assert (e.count, e.lr, e.momentum, e.weight_decay, e.batch, e.augmentation) == (
        100,
        0.01,
        0,
        0,
        256,
        "data",
    )
    mtt = PROTOCOLS["mtt"]
    assert (mtt.epochs, mtt.learned_lr, mtt.networks, mtt.augmentation) == (1000, True, 5, "data")


@pytest.mark.parametrize(("data", "ipc", "variant", "row"), HABA)
def test_factorization(data, ipc, variant, row):
    recipe = recipes("haba").named(data, ipc, variant)
    m = recipe.method
    o = m.objective
    assert (o.steps, o.expert_epochs, o.start_epochs, m.lr, o.lr_rate, o.rate) == row
    assert (m.hallucinators, m.lr_hallucinators, m.momentum, o.momentum_rate, o.least_rate) == (
        5,
        100,
        0.95,
        0.9,
        1e-3,
    )
    assert (m.club, m.con, m.cls, m.lik, m.temperature) == (0.1, 0.1, 1, 0.1, 0.07)
    assert (m.lr_extractor, m.momentum_extractor, m.identity, m.iterations) == (0.001, 0.9, 0, 15_000)
    assert m.channels == (1 if variant else None) and recipe.whiten == "zca" and o.experts == Experts()


@pytest.mark.parametrize(
    ("data", "ipc", "variant", "row"),
    [
        ("mnist", 10, "", (10, 3, 0.02, 0.01, 23_600, 1, "lenet", Random("xavier"))),
        ("mnist", 1, "fixed", (1, 3, 0.02, 0.01, 23_600, 1, "lenet", Fixed("xavier"))),
        ("cifar10", 10, "", (10, 3, 0.001, 0.01, 19_600, 1, "alexnet", Random("xavier"))),
        ("cifar10", 10, "fixed", (10, 3, 0.001, 0.01, 19_600, 1, "alexnet", Fixed("xavier"))),
    ],
)
def test_unrolling(data, ipc, variant, row):
    m = recipes("dd").named(data, ipc, variant).method
    assert (m.steps, m.epochs, m.rate, m.lr, m.iterations, m.networks, m.network, m.start) == row
    assert (m.real_batch, m.decay, m.decay_every * 10, m.init, m.attack) == (
        1024,
        0.5,
        m.iterations,
        "noise",
        None,
    )


@pytest.mark.parametrize(
    ("data", "rate", "halves", "epochs"), [("mnist", 2e-4, 20, 40), ("cifar10", 1e-3, 7, 50)]
)
def test_attacks(data, rate, halves, epochs):
    m = recipes("dd").named(data, 10, "attack").method
    pool = Experts(
        2000, lr=rate, batch=1024, augmentation="none", law="xavier", adam=True, halve_every=halves
    )
    assert m.start == Pretrained(pool, epochs) and m.attack == (0, 1)
    assert (m.steps, m.epochs, m.lr, m.networks) == (1, 1, 0.02, 4)


def test_the_tables_are_complete():
    typed = {("mtt", "", *r[:2]) for r in MTT} | {("mtt", "TESLA", *r[:2]) for r in TESLA}
    typed |= {("haba", r[2], *r[:2]) for r in HABA}
    typed |= {
        ("dd", v, d, i) for d, i, v in (("mnist", 10, ""), ("mnist", 1, "fixed"), ("mnist", 10, "attack"))
    }
    typed |= {("dd", v, "cifar10", 10) for v in ("", "fixed", "attack")}
    found = {
        (name, row.variant, row.data, row.ipc) for name in NAMES for row in recipes(name) if not row.small
    }
    assert found == typed
    with pytest.raises(CompanionError, match="no recipe for cifar10 IPC 1; there are recipes for digits"):
        recipes("esp").named("cifar10", 1)


SMALL = [(name, row) for name in NAMES for row in recipes(name) if row.small]


@pytest.mark.parametrize(("name", "row"), SMALL, ids=[f"{name}-{row.data}" for name, row in SMALL])
def test_a_first_step(name, row):
    train = toy_data(channels=3 if "photos" in row.data else 1).train
    tiny = {"iterations": 1, "steps": 1, "epochs": 2, "network": "convnet-d1-w4"}
    tiny |= {"extractor": "convnet-d1-w4", "real_batch": 8}
    method = with_fields(row.method, **tiny)
    if name in ("mtt", "esp"):
        method = replace(method, experts=replace(method.experts, count=1))
    if name == "haba" and hasattr(method.objective, "experts"):
        one = replace(method.objective.experts, count=1)
        method = replace(method, objective=replace(method.objective, steps=1, experts=one))
    run = distill(method, train, method.steps if name == "dd" else 1, 0)
    assert run.history["loss"].isfinite().all() and torch.isfinite(run.synset.images).all()
