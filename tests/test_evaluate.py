"""Evaluation: the same numbers for the same seed whatever stands beside it, and chance where there is nothing to learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import toy_data

from lib import evaluate as package
from lib.data.imageset import Data
from lib.evaluate import (
    PROTOCOLS,
    Protocol,
    cross_architecture,
    evaluate,
    full_data_accuracy,
    networks,
    protocol,
)
from lib.evaluate.networks import accuracy, is_balanced, network_seed
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

QUICK = Protocol("quick", network="convnet-d2-w8", epochs=20, lr=0.05, schedule="dc", networks=3)


def real(toy, ipc=2, seed=0, soft=False, **more) -> SyntheticSet:
    indices = toy.train.indices(ipc, torch.Generator().manual_seed(seed)).flatten()
    labels = toy.train.labels[indices]
    labels = 0.8 * F.one_hot(labels, 3).float() + 0.2 / 3 if soft else labels
    return SyntheticSet(toy.train.images[indices], labels, toy.train.classes, toy.train.transform, **more)


# -- independence -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_accuracies(toy):
    one, two = (evaluate([real(toy), real(toy, seed=1)], toy, QUICK, seed=4) for _ in range(2))
    assert one.accuracy.shape == (2, 3) and torch.equal(one.accuracy, two.accuracy)
    assert not torch.equal(
        one.accuracy, evaluate([real(toy), real(toy, seed=1)], toy, QUICK, seed=5).accuracy
    )
    torch.manual_seed(99)
    assert torch.equal(one.accuracy, evaluate([real(toy), real(toy, seed=1)], toy, QUICK, seed=4).accuracy)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 4},
        {"augmentation": "data"},
        {"augmentation": "data", "mode": "idc", "cutmix": 0.5, "batch": 4},
    ],
    ids=str,
)
def test_a_set_alone_equals_the_same_set_among_others(toy, options, monkeypatch):
    how, sets = replace(QUICK, **options), [real(toy, seed=s) for s in range(3)]
    together = evaluate(sets, toy, how)
    assert torch.equal(evaluate(sets[:1], toy, how).accuracy, together.accuracy[:1])
    assert torch.equal(evaluate(sets, toy, how, networks=2).accuracy, together.accuracy[:, :2])
    monkeypatch.setattr(networks, "MAP_BYTES", 0)  # one network after the other
    assert len(networks._together(sets, 3, toy.test, how)) == 9
    assert torch.equal(evaluate(sets, toy, how).accuracy, together.accuracy)


def test_every_set_and_network_has_numbers_of_its_own(toy):
    assert len({network_seed(s, i, j) for s in range(3) for i in range(4) for j in range(5)}) == 60
    weak = real(toy, 1)  # the same set four times: the networks differ
    accuracies = evaluate([weak] * 4, toy, replace(QUICK, epochs=4), networks=3).accuracy
    assert len(accuracies.unique(dim=0)) == 4 and len(accuracies.unique(dim=1).T) == 3


def test_networks_of_a_set_are_trained_as_each_alone(toy):
    """Written out with one network at a time."""
    synset, got = real(toy, soft=True), evaluate([real(toy, soft=True)], toy, QUICK, seed=2).accuracy
    for j in range(3):
        g = torch.Generator().manual_seed(network_seed(2, 0, j))
        network = Ensemble.make(QUICK.network, toy.test, [g])
        networks.train(network, synset.images[None], synset.targets[None], [g], QUICK, toy.test)
        right = predict(network, toy.test.images)[0].argmax(1) == toy.test.labels
        assert got[0, j] == right.double().mean()


def test_sets_that_do_not_fit_together_are_still_independent(toy):
    """Other sizes, label kinds, weights and learned learning rates beside each other."""
    learned = replace(QUICK, learned_lr=True)
    sets = [
        real(toy, 1, step_size=torch.tensor(0.1)),
        real(toy, 1, step_size=torch.tensor([0.001])),
        real(toy, 1),
        real(toy, 3),
        real(toy, 3, soft=True),
        real(toy, 3, weights=torch.rand(9, generator=torch.Generator().manual_seed(0)) + 0.1),
    ]
    together = evaluate(sets, toy, learned)
    for i in range(len(sets)):
        alone = evaluate(sets[: i + 1], toy, learned).accuracy[i]
        assert torch.equal(together.accuracy[i], alone)
    assert together.accuracy[1].mean() < together.accuracy[0].mean()  # a hundredth of the rate learns less


def test_learned_rates_are_used_where_the_protocol_says_so(toy):
    frozen = real(toy, step_size=torch.tensor(1e-12))
    assert torch.equal(evaluate(frozen, toy, QUICK).accuracy, evaluate(real(toy), toy, QUICK).accuracy)
    learned = evaluate(frozen, toy, replace(QUICK, learned_lr=True)).accuracy
    assert learned.mean() < 0.7 < evaluate(real(toy, 5), toy, QUICK).accuracy.mean()


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ([0.1, 0.2], "2 learned rates, protocol 'quick' takes 1: allowed are .*evaluate_schedule"),
        (0.0, "learned rate 0 of the set under protocol 'quick': allowed above 0"),
        (-0.01, "learned rate -0.01 of the set"),
    ],
)
def test_learned_rates_that_no_training_can_take_are_one_line(toy, rates, said):
    """They used to fall back to the protocol's rate, silently."""
    synset = real(toy, step_size=torch.tensor(rates))
    with pytest.raises(CompanionError, match=said) as caught:
        evaluate(synset, toy, replace(QUICK, name="quick", learned_lr=True))
    assert "\n" not in str(caught.value)
    assert torch.equal(evaluate(synset, toy, QUICK).accuracy, evaluate(real(toy), toy, QUICK).accuracy)


def test_weights_and_label_kinds_matter(toy):
    images = real(toy, 2)
    off = images.labels.clone()
    off[::2] = (off[::2] + 1) % 3  # every other label is wrong, but weighs next to nothing
    weighted = replace(images, labels=off, weights=torch.tensor([1e-6, 1] * 3))
    half = replace(images, codes=images.codes[1::2], labels=images.labels[1::2])
    found = [evaluate(one, toy, QUICK).spread.mean for one in (weighted, half)]
    assert found[0] == pytest.approx(found[1], abs=2)
    soft = real(toy, soft=True)
    hard = evaluate(soft, toy, replace(QUICK, labels="hard")).accuracy
    assert torch.equal(hard, evaluate(real(toy), toy, QUICK).accuracy)


# -- values -------------------------------------------------------------------------------------------------------------


def test_constant_labels_are_chance(toy):
    blank = replace(real(toy, 4), labels=torch.full((12,), 1))
    result = evaluate(blank, toy, replace(QUICK, epochs=60))
    assert (result.accuracy == pytest.approx(1 / 3, abs=0.02)) and result.accuracy.std() < 0.02


def test_random_sets_do_not_beat_themselves(toy):
    sets = [real(toy, 1, seed=s) for s in range(10)]
    a, b = evaluate(sets[:5], toy, QUICK, seed=0), evaluate(sets[5:], toy, QUICK, seed=1)
    a, b = a.spread, b.spread
    assert abs(a.mean - b.mean) < 4 * (a.se**2 + b.se**2) ** 0.5


def test_all_data_as_the_set_is_whole_set_training(toy):
    everything = SyntheticSet(toy.train.images, toy.train.labels, toy.train.classes, toy.train.transform)
    how = replace(QUICK, batch=64)
    ceiling = full_data_accuracy(toy, how, seed=3, networks=2, epochs=15)
    assert torch.equal(ceiling.accuracy, evaluate(everything, toy, replace(how, epochs=15), 3, 2).accuracy)
    assert ceiling.spread.mean > evaluate(real(toy, 1), toy, QUICK).spread.mean
    assert ceiling.protocol.name == "quick-full"


def test_the_spread_of_an_evaluation_is_that_of_its_sets():
    values = torch.tensor([[0.5, 0.7], [0.6, 0.9]]).double()
    result = package.Evaluation(values, QUICK, False, 1.0, 0)
    assert result.spread.values == pytest.approx([60, 75])  # percent; networks of one set are no repetitions
    assert result.spread.sd == pytest.approx(torch.tensor([60.0, 75.0]).std().item())  # n - 1
    assert str(result) == "67.5 ± 10.6 % (2 sets x 2 networks)"
    alone = package.Evaluation(values[:1], QUICK, False, 1.0, 0)
    assert str(alone) == "60.0 % (1 sets x 2 networks)"


def test_balanced_accuracy():
    data = toy_data(per_class=10)
    few = torch.cat([(data.test.labels == c).nonzero().flatten()[:n] for c, n in enumerate((10, 10, 2))])
    test = data.test.subset(few)
    assert is_balanced(test) and not is_balanced(data.test)
    always_first = F.one_hot(torch.zeros(22).long(), 3).float()[None]
    right = F.one_hot(test.labels, 3).float()[None]
    half = torch.where((torch.arange(22) < 15)[:, None], right, always_first)  # 10 of 10, 5 of 10, 0 of 2
    assert accuracy(always_first, test).item() == pytest.approx(1 / 3)
    assert accuracy(right, test).item() == 1 and accuracy(half, test).item() == pytest.approx(
        (1 + 0.5 + 0) / 3
    )
    # a class without test images does not count
    assert accuracy(right[:, :20], test.subset(range(20))).item() == 1
    assert evaluate(real(data), Data(data.train, test), QUICK).balanced


def test_cross_architecture(toy):
    found = cross_architecture(real(toy), toy, QUICK, ["mlp", "convnet-d2-w8"], count=2, cache=False)
    assert list(found) == ["mlp", "convnet-d2-w8"] and found["mlp"].protocol.network == "mlp"
    assert torch.equal(found["convnet-d2-w8"].accuracy, evaluate(real(toy), toy, QUICK, networks=2).accuracy)


def test_networks_see_only_the_test_half_at_the_end(toy):
    """The training half is not touched by an evaluation: only S teaches."""
    blind = Data(None, toy.test)
    assert torch.equal(evaluate(real(toy), blind, QUICK).accuracy, evaluate(real(toy), toy, QUICK).accuracy)


# -- cache --------------------------------------------------------------------------------------------------------------


def test_cached_evaluations(toy, monkeypatch):
    first = evaluate(real(toy), toy, QUICK, cache=True)
    monkeypatch.setattr(networks, "_accuracies", lambda *_: pytest.fail("computed again"))
    found = evaluate(real(toy), toy, QUICK, cache=True)
    assert torch.equal(found.accuracy, first.accuracy) and found.seconds == first.seconds
    for other in (
        lambda: evaluate(real(toy, seed=1), toy, QUICK, cache=True),
        lambda: evaluate(real(toy, soft=True), toy, QUICK, cache=True),
        lambda: evaluate(real(toy, weights=torch.ones(6)), toy, QUICK, cache=True),
        lambda: evaluate(real(toy, step_size=torch.ones(1)), toy, QUICK, cache=True),
        lambda: evaluate(real(toy), toy_data(seed=1), QUICK, cache=True),
        lambda: evaluate(real(toy), toy, replace(QUICK, lr=0.1), cache=True),
        lambda: evaluate(real(toy), toy, QUICK, seed=1, cache=True),
        lambda: evaluate(real(toy), toy, QUICK, networks=2, cache=True),
        lambda: evaluate(real(toy), toy, QUICK),
    ):
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            other()


# -- protocols ----------------------------------------------------------------------------------------------------------


def test_named_protocols_are_the_cards():
    dc = protocol("dc")
    assert (dc.epochs, dc.trained_epochs, dc.lr, dc.momentum, dc.weight_decay, dc.batch) == (
        300,
        301,
        0.01,
        0.9,
        5e-4,
        256,
    )
    assert dc.network == "convnet-d3-w128" and dc.augmentation == "none" and (dc.sets, dc.networks) == (5, 20)
    assert protocol("dsa").epochs == 1000 and protocol("dsa").augmentation == "data"
    assert protocol("mtt").learned_lr and protocol("ddranking").labels == "hard"
    idc = protocol("idc")
    assert (idc.batch, idc.schedule, idc.cutmix, idc.trained_epochs) == (64, "steps", 0.5, 1000)
    assert set(PROTOCOLS) >= {"dc", "dsa", "mtt", "idc", "dcbench", "ddranking", "cpu-small"}
    assert all(p.name == name and p.source for name, p in PROTOCOLS.items())


def test_protocols_adapt_to_the_data(toy):
    assert (
        "cutout" not in protocol("idc", toy.train).augmentation
        and "crop" in protocol("idc", toy.train).augmentation
    )
    assert protocol("dc", toy.train).network == "convnet-d3-w128"
    digits = toy.train
    small = protocol("cpu-small", digits)
    assert small.network == "convnet-d2-w32" and (small.epochs, small.lr, small.schedule) == (300, 0.01, "dc")
    photos = toy_data(channels=3, size=16).train
    small = protocol("cpu-small", photos)
    assert small.network == "convnet-d3-w32" and (small.epochs, small.lr, small.schedule) == (
        60,
        0.05,
        "cosine",
    )
    assert protocol("dc", digits).network == "convnet-d3-w128"  # the published protocols stay as published
    assert protocol("cpu-small", digits, network="mlp", epochs=7).network == "mlp"
    assert (
        protocol("dsa").families(toy.train) == toy.train.augmentation
        and protocol("dc").families(toy.train) == "none"
    )
    assert "301 epochs" in str(protocol("dc")) and "last epoch" in str(protocol("dc"))


@pytest.mark.parametrize(
    "call, says",
    [
        (
            lambda: protocol("dca"),
            "unknown protocol 'dca'.*did you mean 'dc.*allowed: .*cpu-small.*, dc, .*dcbench",
        ),
        (lambda: protocol("dc", epoch=3), "unknown protocol field 'epoch' .did you mean 'epochs'"),
        (lambda: protocol("dc", network="convnt"), "unknown network 'convnt'"),
        (lambda: protocol("dc", schedule="step"), "unknown schedule 'step'"),
        (lambda: protocol("dc", labels="both"), "unknown label type 'both'.*allowed: hard, own"),
        (lambda: protocol("dc", augmentation="zoom"), "unknown augmentation 'zoom'"),
        (lambda: protocol("dc", mode="many"), "unknown augmentation mode 'many'"),
        (lambda: protocol("dc", epochs=0), "epochs 0 in protocol 'dc'"),
        (lambda: protocol("dc", batch=1.5), "batch 1.5 in protocol 'dc'.*whole number"),
        (lambda: protocol("dc", networks=True), "networks True in protocol 'dc'"),
        (lambda: evaluate([], toy_data(), QUICK), "0 sets and 3 networks"),
        (lambda: evaluate(real(toy_data()), toy_data(), QUICK, networks=0), "1 sets and 0 networks"),
        (lambda: evaluate(real(toy_data()), toy_data(), QUICK, networks=-1), "1 sets and -1 networks"),
    ],
)
def test_mistakes_are_one_line(call, says):
    with pytest.raises(CompanionError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
