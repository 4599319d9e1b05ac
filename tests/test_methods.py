"""DM, DC and DSA: what must hold of them. Their algorithms written out are in ``lib.plain`` (see ``test_plain``)."""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType

import pytest
import torch
from helpers import generator, toy_data

from lib import nets
from lib.distill import distill
from lib.formation.start import initial_pixels
from lib.match.gradient import Cosine, RowCosine, SquaredError
from lib.methods import dc, dm
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.dsa import DSA
from lib.methods.selection import Herding, KCenter, RandomReal
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
DM_SMALL = DM(iterations=5, real_batch=8, network=NET)
DC_SMALL = DC(outer=2, real_batch=8, network=NET)


# -- DM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NET, NET + "-batch"])
def test_dm_of_a_set_that_equals_the_batch_is_at_rest(toy, name):
    """S = T: loss and gradient 0 under any augmentation that both share."""
    start = toy.train.sample(20, generator(1)).flatten(0, 1)
    run = distill(DM(iterations=3, network=name), toy.train, 20, 1)
    assert run.history["loss"].abs().max() < 1e-10
    torch.testing.assert_close(run.synset.codes, start, rtol=0, atol=1e-5)


def test_dm_real_batches_in_parts_are_the_same(toy, monkeypatch):
    whole = distill(DM_SMALL, toy.train, 2, 5)
    monkeypatch.setattr(dm, "REAL_ROWS", 5)
    torch.testing.assert_close(distill(DM_SMALL, toy.train, 2, 5).synset.codes, whole.synset.codes)


def test_dm_lowers_its_loss(toy):
    run = distill(replace(DM_SMALL, iterations=60, real_batch=20, augmentation="none"), toy.train, 1, 0)
    assert run.history["loss"][-10:].mean() < 0.5 * run.history["loss"][:10].mean()


def test_dm_mixed_precision_is_close(toy):
    exact, rough = (distill(replace(DM_SMALL, mixed=m), toy.train, 2, 5) for m in (False, True))
    assert (
        not torch.equal(exact.synset.codes, rough.synset.codes) and rough.synset.codes.dtype == torch.float32
    )
    torch.testing.assert_close(rough.synset.codes, exact.synset.codes, rtol=0, atol=0.05)


# -- DC -----------------------------------------------------------------------------------------------------------------


def test_dsa_of_the_batch_itself_is_at_rest_only_if_siamese(toy):
    method = DSA(outer=6, inner=1, network=NET, distance=SquaredError())
    assert distill(method, toy.train, 20, 1).history["loss"].max() < 1e-9
    assert distill(replace(method, siamese=False), toy.train, 20, 1).history["loss"].max() > 1e-4


def test_dsa_without_augmentation_is_dc_bit_for_bit(toy):
    settings = {"outer": 2, "inner": 2, "epochs": 2, "real_batch": 8, "network": NET, "network_batch": 4}
    a = distill(DC(**settings), toy.train, 2, 3)
    b = distill(DSA(**settings, augmentation="none", init="noise"), toy.train, 2, 3)
    assert torch.equal(a.synset.codes, b.synset.codes) and torch.equal(a.history["loss"], b.history["loss"])
    c = distill(DSA(**settings, init="noise"), toy.train, 2, 3)
    assert not torch.equal(a.synset.codes, c.synset.codes)


def test_dsa_trains_networks_with_augmentation_and_dc_without(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(dc, "sgd_steps", lambda *_, augmentation, **__: seen.append(augmentation))
    for method in (DC, DSA):
        distill(method(outer=1, inner=2, epochs=1, real_batch=8, network=NET), toy.train, 2, 0)
    assert seen == ["none", toy.train.augmentation]


def test_at_ipc_1_no_network_is_ever_trained(toy, monkeypatch):
    monkeypatch.setattr(dc, "sgd_steps", lambda *_, **__: pytest.fail("a network was trained"))
    g, fresh = generator(4), []
    method = replace(DC_SMALL, outer=3)
    state = method.begin(toy.train, 1, g)
    for _ in range(3):
        expected = generator()
        expected.set_state(g.get_state())
        fresh.append(nets.make(NET, toy.train, expected).state_dict())
        method.step(state, g)
        for name, tensor in fresh[-1].items():  # as drawn, before and after the match
            assert torch.equal(state.networks.parameters[name][0], tensor)
    assert not torch.equal(fresh[0]["classifier.weight"], fresh[1]["classifier.weight"])


def test_a_network_lives_for_t_steps(toy, monkeypatch):
    made = []
    original = dc.Ensemble.make
    monkeypatch.setattr(dc.Ensemble, "make", lambda *a: made.append(1) or original(*a))
    trained = []
    monkeypatch.setattr(dc, "sgd_steps", lambda *_, epochs, **__: trained.append(epochs))
    distill(replace(DC_SMALL, outer=3, inner=4, epochs=7), toy.train, 2, 0)
    assert len(made) == 1 + 3 and trained == [7] * 9  # not after the last match of a network


@pytest.mark.parametrize("method", [DC, DSA])
def test_loops_by_ipc(method):
    table = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert all(method().loops(ipc) == loops for ipc, loops in table.items())
    assert method().loops(5) == (5, 100) and method().loops(100) == (100, 5) and method().loops(2000)[1] == 1
    assert method(inner=3, epochs=4).loops(50) == (3, 4)
    assert method().total_steps(10) == 10_000 and method(outer=7, inner=2).total_steps(1) == 14


@pytest.mark.parametrize(
    ("distance", "lr"), [(RowCosine(), 1.0), (SquaredError(), 1.0), (Cosine(), 20.0)], ids=repr
)
def test_dc_lowers_its_loss(toy, distance, lr):
    method = replace(DC_SMALL, outer=120, real_batch=20, distance=distance, lr=lr)
    loss = distill(method, toy.train, 1, 0).history["loss"]
    assert loss[-10:].mean() < 0.9 * loss[:10].mean()


# -- batch norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        DM(iterations=4, real_batch=8, network=NET + "-batch"),
        DC(outer=2, inner=2, epochs=1, real_batch=8, network=NET + "-batch"),
        DSA(outer=2, inner=2, epochs=1, real_batch=8, network=NET + "-batch"),
        DC(outer=2, inner=2, epochs=1, real_batch=8, network="mlp", lr=0.01),
    ],
    ids=lambda m: f"{type(m).__name__} {m.network}",
)
def test_other_networks(toy, method):
    run = distill(method, toy.train, 2, 0)
    assert run.history["loss"].isfinite().all() and (run.history["loss"] > 0).all()
    start = method.finish(method.begin(toy.train, 2, generator(0))).codes
    assert not torch.equal(run.synset.codes, start)


def test_dc_freezes_batch_norm_on_both_sides(toy, monkeypatch):
    """Statistics come from a joint batch of all classes, and neither side of the match moves or bypasses them."""
    method = replace(DC_SMALL, outer=1, network=NET + "-batch")
    g, seen = generator(0), {}
    original = RowCosine.match

    def record(self, networks, *rest):
        norms = [m for m in networks.template.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        mean = networks.buffers["features.1.running_mean"]
        seen.update(training=[m.training for m in norms], mean=mean.clone())
        result = original(self, networks, *rest)
        seen["after"] = mean.clone()
        return result

    monkeypatch.setattr(RowCosine, "match", record)
    state = method.begin(toy.train, 1, g)
    method.step(state, g)
    assert seen["training"] == [False, False] and torch.equal(seen["mean"], seen["after"])
    network = state.networks.network(0)
    g = generator(0)
    method.begin(toy.train, 1, g)
    nets.make(method.network, toy.train, g)
    toy.train.sample(8, g)
    joint = toy.train.sample(16, g).flatten(0, 1)
    maps = network.features[0](joint)
    torch.testing.assert_close(
        seen["mean"][0], 0.1 * maps.mean((0, 2, 3))
    )  # momentum 0.1 from 0, as published


# -- where S starts, and how it ends ------------------------------------------------------------------------------------


def test_initial_pixels(toy):
    start = initial_pixels(toy.train, 4, "real", generator(1)).view(3, 4, -1)
    for c in range(3):
        rows = toy.train.of_class(c).flatten(1)
        found = (start[c][:, None] == rows[None]).all(2)
        assert found.sum() == 4 and found.any(0).sum() == 4  # four different real images of the class
    noise = initial_pixels(toy.train, 20, "noise", generator(1))
    assert noise.shape == (60, 1, 8, 8) and abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise, initial_pixels(toy.train, 20, "noise", generator(2)))


@pytest.mark.parametrize("method", [DM_SMALL, DC_SMALL, RandomReal()], ids=lambda m: type(m).__name__)
def test_the_returned_set(toy, method):
    synset = distill(method, toy.train, 2, 0).synset
    assert synset.codes.shape == (6, 1, 8, 8) and synset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert synset.classes == toy.train.classes and synset.transform is toy.train.transform
    assert not synset.codes.requires_grad and synset.ipc == 2 and synset.codes.dtype == torch.float32


def test_real_batches_shrink_to_the_smallest_class():
    data = toy_data(per_class=5)
    for method in (
        replace(DM_SMALL, real_batch=256),
        replace(DC_SMALL, real_batch=256, network=NET + "-batch"),
    ):
        assert distill(method, data.train, 1, 0).history["loss"].isfinite().all()


def test_data_is_left_alone(toy):
    before = toy.train.images.clone()
    for method in (DM_SMALL, replace(DC_SMALL, inner=2, epochs=1, init="real")):
        distill(method, toy.train, 20, 0)
    assert torch.equal(toy.train.images, before)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, says",
    [
        (replace(DM_SMALL, init="zeros"), "unknown init 'zeros'.*allowed: mix, noise, real"),
        (replace(DC_SMALL, init="zeros"), "unknown init 'zeros'.*allowed: mix, noise, real"),
        (
            lambda: replace(DC_SMALL, distance="l2"),
            "distance 'l2' does not compare gradients: allowed are the values of lib.match.gradient",
        ),
        (replace(DM_SMALL, network="convnt"), "unknown network 'convnt'"),
        (replace(DC_SMALL, network="convnet-d9"), "depth 9 is too deep for 8x8"),
        (replace(DM_SMALL, augmentation="crop_zoom"), "unknown augmentation 'zoom'"),
        (Herding(features="edges"), "unknown features 'edges'.*allowed: pixels, proxy, random"),
        (
            Herding(features="pixels", rule="best"),
            "unknown herding rule 'best'.*allowed: deepcore, icarl, welling",
        ),
    ],
)
def test_wrong_settings_are_one_line(toy, method, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(method() if isinstance(method, FunctionType) else method, toy.train, 1, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method", [DM_SMALL, DC_SMALL, DSA(), RandomReal(), Herding(), KCenter()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("ipc", [0, -1, 1.5, True, 21])
def test_wrong_ipc_is_one_line_for_every_method(toy, method, ipc):
    with pytest.raises(CompanionError, match=f"ipc {ipc}"):
        distill(method, toy.train, ipc, 0)
