"""CAFE: its objective against the pure functions, its loops on scripted accuracies, and what is left when it is switched off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator

from lib import nets
from lib.distill import distill
from lib.formation import by_class
from lib.match import features
from lib.match.distance import At, Look
from lib.match.features import ClassMean, Discrimination, LayerMeans
from lib.methods.cafe import CAFE, shared, spread
from lib.methods.dm import DM
from lib.synset import class_major
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
SMALL = CAFE(iterations=3, real_batch=8, network=NET, window=3, max_outer=4, max_inner=4, query=5)
OFF = replace(SMALL, distance=ClassMean(), schedule="fixed", max_outer=1)


def begun(toy, method=SMALL, ipc=2, seed=0):
    g = generator(seed)
    return method.begin(toy.train, ipc, g), g


# -- the objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "data"])
@pytest.mark.parametrize("network", [NET, NET + "-batch", "mlp"])
def test_switched_off_it_is_dm_bit_for_bit(toy, augmentation, network):
    off = replace(OFF, iterations=5, augmentation=augmentation, network=network)
    plain = DM(5, 0.1, 0.5, 8, network, "noise", augmentation)
    # the one difference left is the schedule of the pixels' rate: losses are compared up to its first drop
    ours, theirs = distill(off, toy.train, 2, 5), distill(plain, toy.train, 2, 5)
    assert torch.equal(ours.history["loss"][:3], theirs.history["loss"][:3])
    assert not {"mean", "relu1", "pool", "discrimination"} & ours.history.keys()
    short = distill(replace(off, iterations=1), toy.train, 2, 5)
    assert torch.equal(
        short.synset.codes, distill(replace(plain, iterations=1), toy.train, 2, 5).synset.codes
    )


def test_the_rate_is_halved_at_the_published_parts_of_the_run(toy):
    state, g = begun(toy, replace(OFF, iterations=2000))
    rates = {}
    for done in (0, 1199, 1200, 1599, 1600, 1799, 1800, 1999):
        state.done = done
        replace(OFF, iterations=2000).step(state, g)
        rates[done] = state.optimiser.param_groups[0]["lr"]
        assert state.done == done + 1
    assert rates == {
        0: 0.1,
        1199: 0.1,
        1200: 0.05,
        1599: 0.05,
        1600: 0.025,
        1799: 0.025,
        1800: 0.0125,
        1999: 0.0125,
    }


def looks(method, state, generator, *images):
    """What a new network shows of class batches."""
    network = method.networks.draw(state.supply, generator)
    return [Look(network, one, method.distance.taps) for one in images]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_terms_are_the_published_loss(toy, depth):
    method = replace(SMALL, network=f"convnet-d{depth}-w4")
    state, g = begun(toy, method)
    real, syn = looks(method, state, g, toy.train.sample(6, generator(1)), by_class(state.pixels, 3))
    found = method.distance.between(real, syn)
    assert list(found) == ["mean", *(f"relu{i}" for i in range(1, depth + 1)), "pool", "discrimination"]
    weights = (0.1, 0.1, 1.0)[3 - depth :]
    for i, weight in enumerate(weights):
        a, b = (one.maps("act")[i].flatten(2) for one in (real, syn))
        torch.testing.assert_close(found[f"relu{i + 1}"], weight * features.class_mean(a, b))
    assert torch.equal(found["pool"], found["mean"])  # A_4 = A_5: the embedding is the last map
    disc = features.discrimination(real.embedding, syn.embedding)
    torch.testing.assert_close(found["discrimination"], 0.01 * disc)
    mean = Discrimination(reduction="mean").between(real, syn)["discrimination"]
    torch.testing.assert_close(mean * 18, found["discrimination"])


def test_layer_weights_at_every_depth():
    for depth, want in {
        1: (1.0, 1.0), 2: (0.1, 1.0, 1.0), 3: (0.1, 0.1, 1.0, 1.0), 4: (0.1, 0.1, 0.1, 1.0, 1.0),
    }.items():  # fmt: skip
        assert LayerMeans().at_depth(depth) == want


def test_of_equal_sets_only_the_discrimination_is_left(toy):
    method = replace(SMALL, real_batch=20, init="real")
    state, g = begun(toy, method, ipc=20)
    (same,) = looks(method, state, g, by_class(state.pixels, 3))
    found = method.distance.between(same, same)
    assert found["discrimination"].min() > 1e-3
    assert all(term.abs().max() == 0 for name, term in found.items() if name != "discrimination")


def test_the_networks_own_cross_entropy_would_not_move_the_images(toy):
    state, g = begun(toy)
    network = SMALL.networks.draw(state.supply, g).requires_grad_()
    real = state.train.sample(6, g)
    syn = state.pixels.detach().clone().requires_grad_()
    with torch.no_grad():
        target = SMALL.distance.observe(Look(network, real))
    current = SMALL.distance.observe(Look(network, by_class(syn, 3)))
    loss = sum(term.sum() for term in SMALL.distance.terms(target, current, At()).values())
    entropy = F.cross_entropy(network(real.flatten(0, 1)), class_major(3, 6, "cpu"))
    (alone,) = torch.autograd.grad(loss, syn, retain_graph=True)
    (both,) = torch.autograd.grad(loss + entropy, syn)
    assert entropy > 0 and torch.equal(alone, both)


def test_real_batches_in_parts_are_the_same(toy, monkeypatch):
    from lib.methods import dm

    whole = distill(SMALL, toy.train, 2, 5)
    monkeypatch.setattr(dm, "REAL_ROWS", 4)
    torch.testing.assert_close(distill(SMALL, toy.train, 2, 5).synset.codes, whole.synset.codes)


# -- the loops ----------------------------------------------------------------------------------------------------------


def test_spread_of_a_window():
    assert math.isnan(spread([0.1, 0.9], 3))
    assert spread([0.5, 0.1, 0.2, 0.4], 3) == pytest.approx(0.3)
    assert spread([0.25] * 7, 3) == 0


class Scripted(CAFE):
    """Accuracies come from a script, epochs are counted."""

    def accuracy(self, network, state, before, generator):
        return SCRIPT.pop(0)


SCRIPT: list[float] = []


def scripted(toy, accuracies, **changes) -> dict:
    SCRIPT[:] = accuracies
    method = Scripted(**(vars(SMALL) | {"window": 10, "max_outer": 30, "max_inner": 30} | changes))
    state, g = begun(toy, method)
    return method.step(state, g)


RAMP = [0.01 * i for i in range(10)]


def test_a_constant_accuracy_ends_the_outer_loop_at_step_ten_and_a_ramp_the_inner_loop(toy):
    script = []
    for _ in range(9):
        script += [0.5, *RAMP]
    found = scripted(toy, [*script, 0.5])
    assert SCRIPT == [] and found["outer"] == 10 and found["inner"] == 90
    assert found["outer_bound"] == 0 == found["inner_bound"]
    assert found["outer_trace"].tolist() == [0.5] * 10 + [-1.0] * 20
    torch.testing.assert_close(found["inner_trace"][8, :10], torch.tensor(RAMP))
    assert (found["inner_trace"][9:] == -1).all() and (found["inner_trace"][:, 10:] == -1).all()


def test_windows_slide(toy):
    # outer: the window is quiet only when the first value has left it; inner: the jump comes at epoch 13
    outer, inner = [0.1] + [0.5] * 10, [0.2] * 12 + [0.24]
    script = [outer[0]]
    for value in outer[1:]:
        script += [*inner, value]
    found = scripted(toy, script)
    assert SCRIPT == [] and found["outer"] == 11 and found["inner"] == 130


def test_the_bounds_hold_and_are_logged(toy):
    restless = [0.1, *[0.5] * 4, 0.9, *[0.5] * 4, 0.1]
    found = scripted(toy, restless, max_outer=3, max_inner=4, window=2)
    assert found["outer"] == 3 and found["inner"] == 8
    assert found["outer_bound"] == 1 and found["inner_bound"] == 2 and SCRIPT == []


def test_thresholds_are_strict(toy):
    """At exactly lambda the network is neither used up nor moved."""
    quarter = [0.25, 0.5]
    found = scripted(
        toy,
        [0.25, *quarter, 0.0, 0.5, *quarter, 0.0, 0.5],
        window=2,
        saturated=0.25,
        moved=0.25,
        max_outer=4,
        max_inner=3,
    )
    assert found["inner_bound"] == 0 and found["outer"] == 3 and SCRIPT == []


def test_the_fixed_schedule_asks_nothing(toy):
    method = replace(SMALL, schedule="fixed", max_outer=3, max_inner=2)
    found = distill(method, toy.train, 1, 0).history
    assert found["outer"].tolist() == [3.0] * 3 and found["inner"].tolist() == [4.0] * 3
    assert (found["outer_trace"] == -1).all() and (found["inner_trace"] == -1).all()
    assert found["outer_bound"].sum() == 0 == found["inner_bound"].sum()


def test_the_network_that_is_trained_is_the_one_that_is_looked_at(toy):
    state, g = begun(toy)
    network = SMALL.networks.draw(state.supply, g)
    before = network.classifier.weight.clone()
    SMALL.train_network(network, state, g)
    assert not torch.equal(network.classifier.weight, before)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(shared(network)(toy.test.images[None])[0], network(toy.test.images))


def test_query_accuracy(toy):
    state, g = begun(toy, replace(SMALL, query=20))
    method = replace(SMALL, query=20)  # all there are: any order gives the same accuracy
    network = nets.make(NET, toy.train, g)
    want = (network(toy.train.images).argmax(1) == toy.train.labels).double().mean().item()
    assert method.accuracy(network, state, [], g) == pytest.approx(want)
    legacy = replace(method, legacy=True)
    assert legacy.accuracy(network, state, [], g) == pytest.approx(want)
    assert legacy.accuracy(network, state, [0.6], g) == pytest.approx(want + 0.2)
    assert method.accuracy(network, state, [0.6], g) == pytest.approx(want)
    assert math.isnan(replace(method, schedule="fixed").accuracy(network, state, [], g))


# -- the whole ----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "changes", [{}, {"network": NET + "-batch"}, {"augmentation": "data", "network_batch": 4}]
)
def test_resume_is_bit_identical(toy, tmp_path, changes):
    method = replace(SMALL, iterations=14, max_outer=2, max_inner=2, window=2, **changes)
    calm = distill(method, toy.train, 2, 7)

    def stop(step, *_):
        if step == 12:
            raise Stop

    path = tmp_path / "c"
    with pytest.raises(Stop):
        distill(method, toy.train, 2, 7, checkpoint=path, checkpoint_seconds=0.0, callback=stop)
    first = []
    again = distill(method, toy.train, 2, 7, checkpoint=path, callback=lambda step, *_: first.append(step))
    assert first[0] == 12 and torch.equal(again.synset.codes, calm.synset.codes)
    assert again.history.keys() == calm.history.keys()
    assert all(torch.equal(again.history[k], calm.history[k]) for k in calm.history)


def test_the_loss_falls_and_the_history_is_whole(toy):
    method = replace(SMALL, iterations=10, real_batch=20)
    untrained = replace(method, schedule="fixed", max_outer=1, iterations=60)
    losses = distill(untrained, toy.train, 8, 0).history["loss"]
    assert losses[-10:].mean() < 0.5 * losses[0]
    found = distill(method, toy.train, 1, 0).history
    assert found["outer_trace"].shape == (10, 4) and found["inner_trace"].shape == (10, 4, 4)
    assert all(values.isfinite().all() for values in found.values())
    counts = (found["inner_trace"] >= 0).sum((1, 2)).float()
    assert torch.equal(counts, found["inner"]) and (found["outer"] <= 4).all()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"schedule": "dynamics"}, "unknown schedule 'dynamics' .*'dynamic'.*allowed: dynamic, fixed"),
        ({"max_inner": 0}, "max_inner must be a whole number of at least 1, not 0"),
        ({"window": -1}, "window must be a whole number .*not -1"),
        ({"query": 0}, "query must be a whole number .*not 0"),
        ({"network": "mlp"}, "LayerMeans looks at maps, MLP has none to tap: allowed is a convnet-"),
        ({"init": "reel"}, "unknown init 'reel'"),
    ],
)
def test_bad_settings_are_one_line(toy, changes, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **changes), toy.train, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Discrimination(reduction="total"), "unknown discrimination 'total'; allowed: mean, sum"),
        (lambda: Discrimination(-1.0), "weight -1.0 of Discrimination is not allowed: it must be positive"),
        (lambda: LayerMeans((1.0,)), r"weights \(1.0,\) of LayerMeans .*two or more"),
        (lambda: LayerMeans((1.0, -0.1)), r"weights \(1.0, -0.1\) of LayerMeans .*none of them negative"),
    ],
)
def test_a_distance_that_does_not_exist_is_one_line(make, says):
    with pytest.raises(CompanionError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)
