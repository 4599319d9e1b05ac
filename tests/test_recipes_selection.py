"""Recipes of selections: typed off the papers' tables and published commands, and a first step of each small one."""

from __future__ import annotations

import pytest
import torch
from helpers import generator, toy_data

from lib.data import load
from lib.distill import distill
from lib.evaluate import PROTOCOLS, evaluate, protocol
from lib.methods import method, recipes
from lib.methods.selection import Herding, KCenter, RandomReal
from lib.nets.training import schedule
from lib.select.proxy import Proxy, train_proxy
from lib.select.rules import RULES
from lib.system.errors import CompanionError

ALL = ("random", "herding", "k_center", "lcmat_s", *RULES)
# proxy of DeepCore's and LCMat's commands: network, epochs, rate, momentum, weight decay, batch
COMMAND = Proxy("resnet18-batch", 10, 0.1, 0.9, 5e-4, 128, None)
EPSILON_AND_K = {"": (0.01, 100), "defaults": (0.05, 100)}


def test_the_published_commands():
    craig = recipes("craig").named("cifar10", 5).method
    assert craig.proxy == COMMAND == Proxy() and craig.fraction is None and craig.balanced
    assert (craig.repeats, craig.neighbours, craig.iterations, craig.ridge, craig.eta) == (
        10,
        10,
        50,
        1.0,
        0.1,
    )
    for data in ("cifar10", "cifar100"):
        for variant, (eps, k) in EPSILON_AND_K.items():
            found = recipes("lcmat_s").named(data, 5, variant)
            assert (found.method.eps, found.method.coordinates) == (eps, k) and found.protocol == "deepcore"
        assert recipes("lcmat_s").named(data, 5).method.proxy == COMMAND
        assert recipes("lcmat_s").named(data, 5, "defaults").method.proxy == Proxy(epochs=40, batch=256)
    for name, kind in (("herding", Herding), ("k_center", KCenter)):
        for data in ("cifar10", "cifar100", "mnist"):
            for ipc in (1, 10, 50):
                found = recipes(name).named(data, ipc)
                assert found.method == kind(proxy=Proxy("convnet-d3-w128")) and found.protocol == "dc"
        assert recipes(name).named("tinyimagenet", 10).method.proxy.network == "convnet-d4-w128"
    assert recipes("random").named("cifar10", 50).method == RandomReal()


@pytest.mark.parametrize("name", ALL)
def test_no_row_stands_for_another(name):
    for data, ipc in (("imagenet", 10), ("cifar100", 7)):
        with pytest.raises(
            CompanionError, match=f"no recipe for {data} IPC {ipc}; there are recipes for digits"
        ):
            recipes(name).named(data, ipc)


@pytest.mark.parametrize("name", ALL)
def test_small_data_of_another_name_takes_the_nearest_row(toy, name):
    found = recipes(name).find(toy.train, 2)
    assert found.method == recipes(name).named("digits").method and "digits" in found.source
    assert (
        recipes(name).find(toy_data(size=16, channels=3).train, 2).method
        == recipes(name).named("photos16").method
    )
    s = distill(found.method, toy.train, 2, 0).synset
    assert torch.equal(s.codes, toy.train.images[s.indices])


def test_the_rules_are_methods_of_their_name():
    for name in RULES:
        assert recipes(name).named("digits").method.rule == name and isinstance(
            recipes(name).named("digits").method, method(name)
        )


def test_small_proxies_stop_before_they_are_certain():
    """At 10 epochs the median |p - y| of an image is 2e-4: there is no gradient to choose by."""
    train = load("digits").train
    small = recipes("craig").named("digits").method.proxy
    assert small.until == 0.65
    trained = train_proxy(small, train, generator(0))
    assert 0.65 <= trained.accuracy < 0.9 and trained.updates < 24  # two epochs
    certain = train_proxy(Proxy("mlp"), train, generator(0))
    assert certain.accuracy > 0.99
    assert trained.last.errors.norm(dim=1).median() > 100 * certain.last.errors.norm(dim=1).median()


def test_the_protocol_of_deepcore(toy):
    p = PROTOCOLS["deepcore"]
    assert (p.network, p.epochs, p.lr, p.momentum, p.nesterov) == ("resnet18-batch", 200, 0.1, 0.9, True)
    assert (p.weight_decay, p.batch, p.augmentation, p.mode) == (5e-4, 128, "crop_flip", "multiple")
    rate, fresh = schedule(p.schedule, p.lr, p.epochs)
    assert rate(0) == 0.1 and rate(200) == pytest.approx(1e-4) and not fresh
    assert rate(100) == pytest.approx((0.1 + 1e-4) / 2) and rate(100) > rate(100.5) > rate(101)
    everything = distill(RandomReal(), toy.train, 20, 0).synset
    few = protocol("deepcore", toy, network="convnet-d2-w4", epochs=10, augmentation="none", batch=16)
    assert evaluate(everything, toy, few, 0).accuracy.mean() > 0.8
