"""Finite networks by squared error on real-valued labels, against plain training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import generator

from lib import augment
from lib.evaluate.networks import network_seed
from lib.evaluate.regression import (
    SMALL,
    TUNED,
    FeatureRegression,
    Regression,
    evaluate_regression,
    gaussian,
    implicit_regression,
    own,
    regression,
    regression_targets,
    train_regression,
)
from lib.nets.ensemble import Ensemble
from lib.nets.widening import FeatureNet
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError

NET = "convnet-d2-w8-none"
QUICK = Regression(network=NET, steps=15, lr=0.05, scale=3.0, weight_decay=0.01, networks=2)


def toy_set(toy, soft=False, seed=1):
    images = toy.train.sample(2, generator(seed)).flatten(0, 1)
    hard = class_major(3, 2, "cpu")
    labels = torch.randn(6, 3, generator=generator(seed)) if soft else hard
    return SyntheticSet(images, labels, toy.train.classes, toy.train.transform)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("centred", [True, False])
def test_training_equals_a_plain_loop_over_networks(toy, centred, optimiser):
    protocol, synset = replace(QUICK, centred=centred, optimiser=optimiser), toy_set(toy, soft=True)
    networks = gaussian(
        Ensemble.make(NET, toy.train, [generator(k) for k in (0, 1)]), [generator(k) for k in (2, 3)]
    )
    plain = [networks.network(k) for k in (0, 1)]
    last = train_regression(
        networks, synset.images.expand(2, -1, -1, -1, -1), synset.labels.expand(2, -1, -1), protocol
    )
    for k, network in enumerate(plain):
        parameters = list(network.parameters())
        start = [p.detach().clone() for p in parameters]
        kinds = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, lr=0.05),
        }
        steps = kinds[optimiser](parameters)
        before = network(synset.images).detach() if centred else 0
        for _ in range(15):
            steps.zero_grad()
            loss = (network(synset.images) - before - 3 * synset.labels).square().mean() / 9
            away = sum((p - p0).square().sum() for p, p0 in zip(parameters, start, strict=True))
            (loss + 0.01 * away).backward()
            steps.step()
        torch.testing.assert_close(last[k], loss.detach(), rtol=1e-3, atol=1e-5)
        for name, p in network.named_parameters():
            torch.testing.assert_close(networks.parameters[name][k], p.detach(), rtol=1e-3, atol=1e-4)


def test_frepos_training_equals_a_plain_loop(toy):
    """Adam, a minibatch of the set, every family of transforms, squared error, and the running mean of the weights."""
    settings = FeatureRegression(
        width=4, depth=2, steps=6, lr=0.01, batch=4, augmentation="crop_flip", ema=0.7
    )
    synset = toy_set(toy, soft=True)
    made = settings.trained(synset.images, synset.labels, toy.train, generator(3))
    g, plain = generator(3), FeatureNet(toy.train, 4, 2, norm=False)
    plain.reset(g)
    adam, mean = (
        torch.optim.Adam(plain.parameters(), lr=0.01),
        [p.detach().clone() for p in plain.parameters()],
    )
    for _ in range(6):
        rows = torch.randperm(6, generator=g)[:4]
        x = augment.apply(synset.images[rows], augment.draw(("crop", "flip"), 4, g, mode="multiple"))
        adam.zero_grad()
        (0.5 * (plain(x) - synset.labels[rows]).square().sum(1).mean()).backward()
        adam.step()
        mean = [0.7 * m + 0.3 * p.detach() for m, p in zip(mean, plain.parameters(), strict=True)]
    for ours, theirs in zip(made.parameters(), mean, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    found = evaluate_regression(synset, toy, settings, seed=4, networks=2)
    assert found.accuracy.shape == (1, 2) and found.protocol.network == "widening-d2-w4-none"


def test_rcigs_training_equals_a_plain_loop(toy):
    """All images and their mirror images, a warm-up and a cosine to a hundredth, the last weights."""
    settings = implicit_regression("cifar10", 1, width=4, depth=2, steps=9, warmup=4, lr=0.01)
    synset, g = toy_set(toy, soft=True), generator(3)
    made = settings.trained(synset.images, synset.labels, toy.train, generator(3))
    plain = FeatureNet(toy.train, 4, 2, norm=False)
    plain.reset(g)
    x, y = torch.cat([synset.images, synset.images.flip(3)]), torch.cat([synset.labels, synset.labels])
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    cosine = [0.0001 + 0.0099 * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    for rate in (0.0, 0.0025, 0.005, 0.0075, *cosine):
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        (0.5 * (plain(x) - y).square().mean()).backward()
        adam.step()
    for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    with pytest.raises(CompanionError, match="warmup 9 of 9 steps; allowed: 0 to 8"):
        replace(settings, warmup=9)


def test_the_evaluation_that_a_recipe_names():
    made = own("own-rcig", "cifar10", 1)
    assert (made.steps, made.warmup, made.lr, made.mirrored, made.ema) == (1000, 500, 1e-4, True, 0.0)
    assert own("own-rcig", "cifar10", 10).steps == own("own-rcig", "cifar100", 1).steps == 2000
    assert not own("own-rcig", "mnist", 1).mirrored and own("own-rcig", "imagenette", 10).depth == 5
    assert own("own-rfad", "cifar10", 10) == regression("cifar10", 10)
    assert own("own-frepo", "cifar100", 50).steps == 5000 and own("own-frepo", "tinyimagenet", 1).depth == 4
    assert (
        "flip" not in own("own-frepo", "mnist", 1).augmentation
        and own("own-frepo", "cifar10", 1).ema == 0.995
    )
    with pytest.raises(
        CompanionError, match="unknown regression protocol 'dc'; allowed: own-frepo, own-rcig, own-rfad"
    ):
        own("dc", "cifar10", 1)
    with pytest.raises(
        CompanionError, match="no finite-network settings of RFAD for cifar100 IPC 50; allowed"
    ):
        regression("cifar100", 50)


def test_accuracy_is_that_of_the_change_of_the_function(toy):
    synset = toy_set(toy)
    found = evaluate_regression(synset, toy, QUICK, seed=4)
    for j in range(2):
        g = [generator(network_seed(4, 0, j))]
        networks = gaussian(Ensemble.make(NET, toy.test, g), g)
        before = networks.network(0)
        train_regression(networks, synset.images[None], regression_targets(synset)[None], QUICK)
        with torch.no_grad():
            scores = networks.network(0)(toy.test.images) - before(toy.test.images)
        correct = (scores.argmax(1) == toy.test.labels).double().mean()
        torch.testing.assert_close(found.accuracy[0, j], correct)


def test_it_learns_and_does_not_depend_on_its_neighbours(toy, monkeypatch):
    from lib.evaluate import regression as module

    sets, protocol = [toy_set(toy, seed=s) for s in (1, 2)], replace(QUICK, steps=60)
    both = evaluate_regression(sets, toy, protocol).accuracy
    assert both.mean() > 0.6  # a third by chance
    alone = evaluate_regression(sets[:1], toy, protocol).accuracy
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=0.04)  # rounding may move one image of 60 or two
    monkeypatch.setattr(module, "MAP_BYTES", 1)
    torch.testing.assert_close(evaluate_regression(sets, toy, protocol).accuracy, both, rtol=0, atol=0.04)


def test_the_scale_of_the_labels_drops_out_of_the_first_step(toy):
    """With alpha in both places the first gradient is -2 f'(y) / alpha: larger alpha, lazier network."""
    synset, moved = toy_set(toy), []
    for scale in (1.0, 10.0):
        networks = gaussian(Ensemble.make(NET, toy.train, [generator()]), [generator(1)])
        start = networks.parameters["features.0.weight"].detach().clone()
        train_regression(
            networks,
            synset.images[None],
            regression_targets(synset)[None],
            replace(QUICK, steps=1, scale=scale),
        )
        moved.append((networks.parameters["features.0.weight"] - start).norm())
    torch.testing.assert_close(moved[0], 10 * moved[1], rtol=1e-4, atol=0)


def test_initial_law(toy):
    networks = gaussian(Ensemble.make("convnet-d2-w64-none", toy.train, [generator()]), [generator(1)])
    weight, bias = networks.parameters["features.4.weight"], networks.parameters["features.4.bias"]
    assert abs(float(weight.detach().std()) * (64 * 9 / 2) ** 0.5 - 1) < 0.02
    assert abs(float(bias.detach().std()) - 0.1) < 0.03


def test_targets(toy):
    soft, hard = toy_set(toy, soft=True), toy_set(toy)
    assert torch.equal(regression_targets(soft), soft.labels)
    arg_max = regression_targets(soft, "hard")
    assert torch.equal(arg_max.argmax(1), soft.labels.argmax(1)) and arg_max.sum(1).abs().max() < 1e-6
    assert torch.equal(regression_targets(hard).argmax(1), hard.labels)
    torch.testing.assert_close(regression_targets(hard).amax(1), torch.full((6,), 2 / 3))


def test_the_cache_knows_labels_and_settings(toy):
    sets = [toy_set(toy, soft=True)]
    first = evaluate_regression(sets, toy, QUICK, cache=True)
    assert torch.equal(evaluate_regression(sets, toy, QUICK, cache=True).accuracy, first.accuracy)
    hard = evaluate_regression(sets, toy, replace(QUICK, labels="hard"), cache=True)
    assert hard.protocol.labels == "hard" and not torch.equal(hard.accuracy, first.accuracy)


def test_settings_by_data_set():
    assert regression("cifar10", 10) == Regression(lr=1e-3, scale=2.0)
    assert regression("mnist", 1).weight_decay == 1e-3 and regression("svhn", 1).scale == 16
    assert (
        regression("digits", 1, scale=2.0).scale == 2
        and regression("digits", 1).network == SMALL["digits"]["network"]
    )
    assert all(len(row) == 3 for table in TUNED.values() for row in table.values())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"network": "convnt"}, "unknown network 'convnt'"),
        ({"labels": "soft"}, "labels 'soft'; allowed: hard, own"),
        ({"optimiser": "lbfgs"}, "unknown optimiser 'lbfgs'.*allowed: adam, sgd"),
        ({"scale": 0.0}, "scale 0.0.*allowed: scale and lr above 0"),
        ({"steps": 0}, "steps 0.*at least 1 step"),
    ],
)
def test_wrong_settings_are_one_line(change, says):
    with pytest.raises(CompanionError, match=says) as caught:
        replace(QUICK, **change)
    assert "\n" not in str(caught.value)
