"""DM, DC and DSA against their algorithms written out class by class, with plain modules and autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data

from lib import augment, nets
from lib.distill import distill
from lib.formation.start import INITIAL, initial_pixels
from lib.match.gradient import EPS
from lib.methods import dc, dm, dsa
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.dsa import DSA
from lib.methods.selection import Herding, KCenter, RandomReal
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
DM_SMALL = DM(iterations=5, real_batch=8, network=NET)
DC_SMALL = DC(outer=2, real_batch=8, network=NET)


class Pixels:
    """Images under SGD with momentum 0.5, written out."""

    def __init__(self, start, lr):
        self.x, self.velocity, self.lr = start.clone(), torch.zeros_like(start), lr

    def step(self, gradient):
        self.velocity = 0.5 * self.velocity + gradient
        self.x = self.x - self.lr * self.velocity


def augmented(images, omega, c):
    """All images of class c, each with the parameters of row c."""
    if omega is None:
        return images
    row = augment.Draw(omega.names, omega.choice[c : c + 1], omega.u[c : c + 1], omega.mode)
    return torch.cat([augment.apply(image[None], row) for image in images])


# -- DM -----------------------------------------------------------------------------------------------------------------


def slow_dm(train, ipc, seed, steps, names, lr, real_batch):
    g = generator(seed)
    s, losses = Pixels(train.sample(ipc, g), lr), []  # (C, ipc, c, h, w)
    for _ in range(steps):
        network = nets.make(NET, train, g)
        real = train.sample(real_batch, g)
        omega = augment.draw(names, 3, g) if names else None
        x, loss = s.x.clone().requires_grad_(), 0
        for c in range(3):
            target = network.embed(augmented(real[c], omega, c)).detach().mean(0)
            loss = loss + (target - network.embed(augmented(x[c], omega, c)).mean(0)).square().sum()
        s.step(torch.autograd.grad(loss, x)[0])
        losses.append(loss.detach())
    return s.x.flatten(0, 1), torch.stack(losses)


@pytest.mark.parametrize("augmentation", ["none", "data", "flip_crop"])
def test_dm_equals_a_loop_over_classes(toy, augmentation):
    method = replace(DM_SMALL, augmentation=augmentation)
    got = distill(method, toy.train, 2, 5)
    names = augment.families(augmentation, toy.train)
    codes, losses = slow_dm(toy.train, 2, 5, 5, names, 1.0, 8)
    torch.testing.assert_close(got.history["loss"], losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.synset.codes, codes, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got.synset.codes, toy.train.sample(2, generator(5)).flatten(0, 1))


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


def slow_distance(syn, real):
    total = 0
    for a, b in zip(syn, real, strict=True):
        if a.dim() > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPS)).sum()
    return total


def class_gradient(network, images, c, create_graph=False):
    loss = F.cross_entropy(network(images), torch.full((len(images),), c))
    parameters = list(network.parameters())
    return torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)


def slow_dc(train, ipc, seed, method, names=(), siamese=True):
    g = generator(seed)
    inner, epochs = method.loops(ipc)
    start = train.sample(ipc, g) if method.init == "real" else torch.randn(3, ipc, *train.shape, generator=g)
    s, losses = Pixels(start, method.lr), []
    nets.make(method.network, train, g)  # drawn before the first step, and replaced
    for _ in range(method.outer):
        network = nets.make(method.network, train, g)
        for t in range(inner):
            real = train.sample(method.real_batch, g)
            omega = augment.draw(names, 3, g) if names else None
            other = omega if siamese or not names else augment.draw(names, 3, g)
            x, loss = s.x.clone().requires_grad_(), 0
            for c in range(3):
                target = class_gradient(network, augmented(real[c], omega, c), c)
                mine = class_gradient(network, augmented(x[c], other, c), c, create_graph=True)
                loss = loss + slow_distance(mine, target)
            s.step(torch.autograd.grad(loss, x)[0])
            losses.append(loss.detach())
            if t + 1 < inner:
                train_slowly(network, s.x.flatten(0, 1), ipc, epochs, method, g)
    return s.x.flatten(0, 1), torch.stack(losses)


def train_slowly(network, images, ipc, epochs, method, g):
    labels = torch.arange(3).repeat_interleave(ipc)
    m, optimiser = len(images), torch.optim.SGD(network.parameters(), lr=method.lr_network)
    order = torch.arange(m).expand(32, m)
    if method.network_batch < m:
        order = torch.rand(32, m, generator=g).argsort(1)
    for epoch in range(epochs):
        for rows in order[epoch].split(method.network_batch):
            optimiser.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()


@pytest.mark.parametrize("network_batch", [256, 4], ids=["one batch", "batches of 4"])
@pytest.mark.parametrize("init", ["noise", "real"])
def test_dc_equals_a_loop_over_classes(toy, init, network_batch):
    method = replace(
        DC_SMALL, inner=3, epochs=4, init=init, network_batch=network_batch, lr=0.5, lr_network=0.1
    )
    got = distill(method, toy.train, 2, 5)
    codes, losses = slow_dc(toy.train, 2, 5, method)
    torch.testing.assert_close(got.history["loss"], losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.synset.codes, codes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("siamese", [True, False])
def test_dsa_matching_equals_a_loop_over_classes(toy, siamese):
    """Augmented matching steps; the networks are not trained in between (their augmentation is tested with the trainer)."""
    method = DSA(outer=4, inner=1, real_batch=8, network=NET, lr=0.5, siamese=siamese)
    got = distill(method, toy.train, 2, 5)
    codes, losses = slow_dc(toy.train, 2, 5, method, augment.strategy(toy.train.augmentation), siamese)
    torch.testing.assert_close(got.history["loss"], losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.synset.codes, codes, rtol=1e-3, atol=1e-4)


def test_dsa_of_the_batch_itself_is_at_rest_only_if_siamese(toy):
    method = DSA(outer=6, inner=1, network=NET, distance="mse")
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


@pytest.mark.parametrize("distance", ["ours", "mse", "cos"])
def test_dc_lowers_its_loss(toy, distance):
    lr = {"ours": 1.0, "mse": 1.0, "cos": 20.0}[distance]
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
    original = dc.matching_step

    def record(template, tensors, *rest):
        norms = [m for m in template.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        seen.update(training=[m.training for m in norms], mean=tensors["features.1.running_mean"].clone())
        result = original(template, tensors, *rest)
        seen["after"] = tensors["features.1.running_mean"].clone()
        return result

    monkeypatch.setattr(dc, "matching_step", record)
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


# -- presets and mistakes -----------------------------------------------------------------------------------------------


def test_paper_presets_are_the_cards():
    assert dm.PRESETS["paper"] == DM(20_000, 1.0, 0.5, 256, "convnet-d3-w128", "real", "data")
    assert (
        dm.PRESETS["paper-ipc100"].lr == 10 and dm.PRESETS["paper-tinyimagenet"].network == "convnet-d4-w128"
    )
    p = dc.PRESETS["paper"]
    assert (p.outer, p.lr, p.momentum, p.lr_network, p.real_batch, p.network_batch) == (
        1000,
        0.1,
        0.5,
        0.01,
        256,
        256,
    )
    assert (p.init, p.augmentation, p.distance, p.network) == ("noise", "none", "ours", "convnet-d3-w128")
    q = dsa.PRESETS["paper"]
    assert isinstance(q, DSA) and q == DSA(**(vars(p) | {"init": "real", "augmentation": "data"}))


@pytest.mark.parametrize("table", [dm.PRESETS, dc.PRESETS, dsa.PRESETS], ids=["dm", "dc", "dsa"])
def test_every_preset_is_valid(table):
    for settings in table.values():
        nets.parse(settings.network)
        assert settings.total_steps(1) > 0 and settings.init in INITIAL
        if settings.augmentation != "data":
            augment.strategy(settings.augmentation)


@pytest.mark.parametrize(
    "method, says",
    [
        (replace(DM_SMALL, init="zeros"), "unknown init 'zeros'.*allowed: mix, noise, real"),
        (replace(DC_SMALL, init="zeros"), "unknown init 'zeros'.*allowed: mix, noise, real"),
        (
            replace(DC_SMALL, distance="l2"),
            "unknown distance 'l2'.*allowed: all-cos.*conv-mse, cos, mse, ours",
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
        distill(method, toy.train, 1, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method", [DM_SMALL, DC_SMALL, DSA(), RandomReal(), Herding(), KCenter()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("ipc", [0, -1, 1.5, True, 21])
def test_wrong_ipc_is_one_line_for_every_method(toy, method, ipc):
    with pytest.raises(CompanionError, match=f"ipc {ipc}"):
        distill(method, toy.train, ipc, 0)
