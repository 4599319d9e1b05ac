"""RFAD against its algorithm written out network by network, its limits, and what it does with settings it cannot use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data

from lib.distill import distill, pack, unpack
from lib.kernels import feature_maps, ridge
from lib.kernels.conv import convolutional
from lib.kernels.feature_maps import conjugate_kernel, conv_features, random_blocks
from lib.methods import rfad
from lib.methods.rfad import RFAD
from lib.plain.rfad import features
from lib.system.errors import CompanionError

SMALL = RFAD(
    iterations=6,
    networks=3,
    width=4,
    depth=2,
    real_batch=30,
    batches=2,
    lr=0.05,
    lr_transform=0.01,
    validate_every=0,
)
CHECKED = replace(SMALL, validate_every=2, validation_images=5, validation_networks=2)


def test_features_without_gradient_in_parts_equal_the_whole(monkeypatch):
    x, blocks = torch.randn(7, 2, 8, 8, generator=generator()), random_blocks(3, 2, generator(), 5)
    whole = conv_features(x, blocks)
    torch.testing.assert_close(whole, features(x, blocks))
    monkeypatch.setattr(feature_maps, "MAP_VALUES", 1)  # one image at a time
    with torch.no_grad():
        torch.testing.assert_close(conv_features(x, blocks), whole)


def test_the_networks_are_new_at_every_step_and_never_trained(toy, monkeypatch):
    seen = []
    original = rfad.random_blocks
    monkeypatch.setattr(rfad, "random_blocks", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    distill(SMALL, toy.train, 1, 0)
    assert len(seen) == SMALL.iterations
    assert all(not torch.equal(seen[0][0][0], blocks[0][0]) for blocks in seen[1:])
    assert all(not tensor.requires_grad for blocks in seen for layer in blocks for tensor in layer)


def test_the_step_leaves_the_data_alone_and_targets_carry_no_gradient(toy):
    before = toy.train.images.clone()
    state = SMALL.begin(toy.train, 2, generator())
    blocks = SMALL.draw(toy.train, 3, generator())
    phi_t, labels = SMALL.targets(toy.train, blocks, generator(1))
    assert not phi_t.requires_grad and len(labels) == 2 * 30
    for part in phi_t.split(30):  # without replacement within a batch
        assert len(part.unique(dim=0)) == 30
    SMALL.step(state, generator())
    assert torch.equal(before, toy.train.images)


def test_the_identity_gives_plain_pixels_and_its_gradient_is_the_outer_product(toy):
    method = replace(SMALL, loss="mse")
    state = method.begin(toy.train, 2, generator())
    assert torch.equal(method.images(state), state.pixels)
    blocks = method.draw(toy.train, 3, generator())
    phi_t, y_t = method.targets(toy.train, blocks, generator())
    images = method.images(state).detach().requires_grad_()
    (g,) = torch.autograd.grad(method.objective(state, conv_features(images, blocks), phi_t, y_t), images)
    loss = method.objective(state, conv_features(method.images(state), blocks), phi_t, y_t)
    (got,) = torch.autograd.grad(loss, state.transform)
    torch.testing.assert_close(got, state.pixels.detach().flatten(1).T @ g.flatten(1), rtol=1e-4, atol=1e-7)


def test_a_huge_ridge_predicts_nothing_and_the_scale_leaves_the_argmax(toy):
    state = SMALL.begin(toy.train, 2, generator())
    blocks = SMALL.draw(toy.train, 3, generator())
    with torch.no_grad():
        phi_s, phi_t = conv_features(state.pixels, blocks), conv_features(toy.test.images, blocks)
        k_ss, k_ts = conjugate_kernel(phi_s, phi_s), conjugate_kernel(phi_t, phi_s)
        huge = replace(SMALL, ridge=1e9, loss="mse").objective(state, phi_s, phi_t, toy.test.labels)
        nothing = ridge.mse(torch.zeros(60, 3), ridge.centred_one_hot(toy.test.labels, 3, torch.float32))
        torch.testing.assert_close(huge, nothing)
        prediction = ridge.predict(k_ts, k_ss, state.labels, SMALL.ridge)
        state.log_scale.fill_(2.0)
        value = SMALL.objective(state, phi_s, phi_t, toy.test.labels)
        torch.testing.assert_close(value, F.cross_entropy(7.38905609893065 * prediction, toy.test.labels))


def test_more_networks_approach_the_gradient_of_the_exact_kernel(toy):
    """The MSE path is KIP with the exact NNGP kernel in the limit, gradient included."""
    method = replace(SMALL, loss="mse")
    state = method.begin(toy.train, 1, generator())
    targets, y_t = toy.train.images[:20].double(), toy.train.labels[:20]

    def gradient(k_ss, k_ts):
        prediction = ridge.predict(k_ts, k_ss, state.labels.double(), method.ridge)
        loss = ridge.mse(prediction, ridge.centred_one_hot(y_t, 3))
        return torch.autograd.grad(loss, state.pixels)[0].flatten()

    exact = gradient(
        *(convolutional(x.double(), state.pixels.double(), "convnet3").nngp for x in (state.pixels, targets))
    )

    def error(networks):
        blocks = random_blocks(networks, 1, generator(3), 64, 3, dtype=torch.float64)
        phi_s, phi_t = (conv_features(x.double(), blocks) for x in (state.pixels, targets))
        found = gradient(conjugate_kernel(phi_s, phi_s), conjugate_kernel(phi_t, phi_s))
        return float((found - exact).norm() / exact.norm())

    few, many = error(2), error(256)
    assert many < 0.1 and few > 5 * many  # 1 / sqrt(N) predicts 11


def test_validation_keeps_the_best_and_patience_stops(toy, monkeypatch):
    method = replace(CHECKED, iterations=8, loss="mse")
    values = iter([5.0, 4.0, 3.0, 3.5, 3.6])  # at the start and after steps 2, 4, 6, 8
    original = RFAD.objective

    def scripted(self, state, phi_s, phi_t, y_t):
        if torch.is_grad_enabled():
            return original(self, state, phi_s, phi_t, y_t)
        return torch.tensor(next(values))

    monkeypatch.setattr(RFAD, "objective", scripted)
    run = distill(method, toy.train, 1, 0)
    assert run.history["validation"].tolist() == [5, 4, 4, 3, 3, 3.5, 3.5, pytest.approx(3.6)]
    values = iter([5.0, 4.0, 3.0])
    short = distill(replace(method, iterations=4), toy.train, 1, 0)
    assert torch.equal(run.synset.codes, short.synset.codes)  # what stood after step 4
    values = iter([5.0, 4.0, 4.5, 4.6, 4.7])
    stopped = distill(replace(method, patience=2), toy.train, 1, 0)  # nothing moves after step 4
    assert len(stopped.history["loss"][3:].unique()) == 1 and len(stopped.history["loss"][:4].unique()) == 4


def test_validation_networks_are_the_same_for_every_seed(toy):
    a, b = (CHECKED.begin(toy.train, 1, generator(seed)).validation for seed in (0, 1))
    assert torch.equal(a.blocks[0][0], b.blocks[0][0]) and not torch.equal(a.features, b.features)
    assert a.labels.bincount().tolist() == [5, 5, 5]


def test_corrupted_values_stay_at_their_start(toy):
    method = replace(SMALL, corruption=0.8, init="noise")
    state = method.begin(toy.train, 10, generator())
    share = state.mask.float().mean()
    assert abs(share - 0.8) < 0.05
    start = state.start.clone()
    end = distill(method, toy.train, 10, 0).synset.codes
    assert torch.equal(end[state.mask], start[state.mask]) and not (end == start)[~state.mask].any()


def test_learned_labels_and_fixed_ones(toy):
    fixed = distill(replace(SMALL, learn_labels=False), toy.train, 2, 0).synset
    learned = distill(SMALL, toy.train, 2, 0).synset
    assert not fixed.soft and learned.soft and learned.labels.shape == (6, 3)
    assert fixed.codes.shape == (6, 1, 8, 8) and not learned.codes.requires_grad


@pytest.mark.parametrize("loss", rfad.LOSSES)
def test_it_lowers_its_loss(toy, loss):
    method = replace(SMALL, iterations=60, loss=loss, width=16)
    history = distill(method, toy.train, 1, 0).history["loss"]
    assert history[-10:].mean() < 0.7 * history[:10].mean()


def test_whitened_data_and_mixed_precision(toy):
    from lib import data

    whitened = data.load("digits", whiten="zca-kip")
    small = replace(SMALL, depth=3)
    run = distill(replace(small, iterations=20), whitened.train, 1, 0)
    assert run.synset.transform.kind == "zca-kip" and run.synset.viewable().isfinite().all()
    exact, rough = (distill(replace(SMALL, mixed=m), toy.train, 2, 5).history["loss"] for m in (False, True))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.1, atol=0)


@pytest.mark.parametrize("method", [SMALL, CHECKED, replace(CHECKED, loss="mse", learn_labels=False)])
def test_resume_ends_with_the_same_bits(toy, tmp_path, method):
    calm = distill(method, toy.train, 2, 7)

    class Stop(Exception):
        pass

    def stop(done, state, metrics):
        if done == 5:  # between two looks at the validation loss
            raise Stop

    state, g = method.begin(toy.train, 2, generator(7)), generator(7)
    method.begin(toy.train, 2, g)
    for _ in range(3):
        method.step(state, g)
    packed, stream = pack(state), g.get_state()
    fresh = method.begin(toy.train, 2, generator(7))
    unpack(fresh, packed)
    g = generator()
    g.set_state(stream)
    for _ in range(3):
        method.step(fresh, g)
    again = method.finish(fresh)
    assert torch.equal(again.codes, calm.synset.codes) and torch.equal(again.labels, calm.synset.labels)
    path = tmp_path / "c"
    with pytest.raises(Stop):
        distill(method, toy.train, 2, 7, checkpoint=path, checkpoint_seconds=0.0, callback=stop)
    assert torch.equal(distill(method, toy.train, 2, 7, checkpoint=path).synset.codes, calm.synset.codes)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"loss": "huber"}, "unknown loss 'huber'.*allowed: mse, platt"),
        ({"init": "zeros"}, "unknown init 'zeros'.*allowed: noise, real"),
        ({"ridge": -1.0}, "RFAD: ridge -1.0 is not allowed: it must be finite and at least 0"),
        ({"ridge": float("nan")}, "RFAD: ridge nan is not allowed: it must be finite and at least 0"),
        ({"corruption": 1.0}, "corruption 1.0; allowed: from 0 to below 1"),
        ({"depth": 4}, "8-pixel images do not survive 4 poolings; allowed: 16 or more"),
        ({"networks": 0}, "networks 0; allowed: 1 or more"),
        ({"real_batch": 0}, "real_batch 0; allowed: 1 or more"),
        ({"validate_every": 40}, "validation every 40 of 6 steps; allowed: 0 to 6"),
    ],
)
def test_wrong_settings_are_one_line(toy, change, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **change), toy.train, 1, 0)
    assert "\n" not in str(caught.value)


def test_equal_images_without_ridge_name_the_condition_number():
    data = toy_data(per_class=4)
    data.train.images[:] = data.train.images[:1]
    with pytest.raises(CompanionError, match="not positive definite.*condition number"):
        distill(replace(SMALL, ridge=0.0, loss="mse"), data.train, 2, 0)


def test_batches_shrink_to_the_data():
    data = toy_data(per_class=5)
    assert distill(SMALL, data.train, 1, 0).history["loss"].isfinite().all()
