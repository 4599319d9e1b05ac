"""FRePo against its algorithm written out, the life of its pool, LAMB, and what it does with settings it cannot use."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data
from torch import nn

from lib.distill import distill
from lib.kernels import ridge
from lib.kernels.feature_maps import conjugate_kernel, conv_features
from lib.methods import frepo
from lib.methods.frepo import FRePo
from lib.methods.rfad import RFAD
from lib.nets.widening import FeatureNet
from lib.optim.lamb import Lamb
from lib.system.errors import CompanionError

SMALL = FRePo(
    iterations=6,
    networks=2,
    online_updates=3,
    lr=0.05,
    lr_network=0.01,
    real_batch=20,
    width=4,
    depth=2,
    flip=False,
)


def test_the_network_is_its_plain_layers(toy):
    """Batch norm before a convolution, widths that double, LeCun's normal law."""
    network = FeatureNet(toy.train, 4, 2, norm=True)
    network.reset(generator())
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(4)]
    layers += [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)]
    plain = nn.Sequential(*layers)
    with torch.no_grad():
        for theirs, mine in zip(plain.parameters(), network.parameters(), strict=True):
            theirs.copy_(mine)
    x = toy.train.images[:7]
    for made in (network.train(), plain.train(), network.eval(), plain.eval()):
        made(x)
    torch.testing.assert_close(network(x), plain(x))
    torch.testing.assert_close(network.embed(x), plain[:-1](x))


def test_a_network_is_trained_m_plus_one_times_then_drawn_anew(toy):
    method, g = replace(SMALL, networks=1, online_updates=3), generator()
    state = method.begin(toy.train, 1, g)
    ages, weights = [], []
    for _ in range(12):
        method.step(state, g)
        ages.append(state.ages[0])
        weights.append(state.pool[0].blocks[1].weight.detach().clone())
    assert ages == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    jumps = [float((b - a).norm()) for a, b in zip(weights, weights[1:], strict=False)]
    assert min(jumps[3], jumps[8]) > 5 * max(jumps[:3] + jumps[4:8])  # a new draw, not a training step


def test_ages_start_staggered_and_only_the_used_network_moves(toy):
    method, g = replace(SMALL, networks=4, online_updates=20), generator()
    state = method.begin(toy.train, 1, g)
    assert state.ages == [0, 5, 10, 15]
    before = [network.blocks[1].weight.clone() for network in state.pool]
    used = state.current
    method.step(state, g)
    moved = [not torch.equal(a, n.blocks[1].weight) for a, n in zip(before, state.pool, strict=True)]
    assert moved == [k == used for k in range(4)]
    used = set()
    for _ in range(40):
        method.step(state, g)
        used.add(state.current)
    assert used == {0, 1, 2, 3}


def test_the_features_carry_no_gradient_to_the_networks(toy):
    state = SMALL.begin(toy.train, 2, generator())
    network = state.pool[0].eval().requires_grad_(False)
    phi_t = network.embed(toy.train.images[:10])
    loss = SMALL.objective(network.embed, state.pixels, state.labels, phi_t, toy.train.labels[:10])
    loss.backward()
    assert state.pixels.grad.abs().max() > 0 and state.labels.grad.abs().max() > 0
    assert all(p.grad is None for p in network.parameters()) and not phi_t.requires_grad


def test_mirror_images_of_symmetric_ones_change_no_prediction(toy):
    """Doubled rows: the same regression as lambda goes to 0."""
    state = SMALL.begin(toy.train, 2, generator())
    half = state.pixels.detach()
    symmetric = half + half.flip(3)
    network = state.pool[0].eval()
    losses = []
    for flip in (False, True):
        method = replace(SMALL, flip=flip, ridge=1e-9)
        with torch.no_grad():
            losses.append(
                method.objective(
                    _symmetric(network),
                    symmetric,
                    state.labels,
                    network.embed(toy.train.images),
                    toy.train.labels,
                )
            )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def _symmetric(network):
    """Features that do not see a mirror image."""
    return lambda x: network.embed(x) + network.embed(x.flip(3))


def test_label_term_of_one_hot_labels_is_at_rest():
    labels = ridge.centred_one_hot(torch.arange(4), 4).requires_grad_()
    value = ridge.margin(labels)
    assert math.isclose(value.detach(), -1 / 4) and torch.autograd.grad(value, labels)[0].abs().max() == 0
    small = (0.1 * labels.detach()).requires_grad_()
    gradient = torch.autograd.grad(ridge.margin(small), small)[0]
    assert torch.allclose(gradient.diagonal(), torch.full((4,), -1 / 4, dtype=torch.float64))


def test_fresh_networks_without_bias_make_the_loss_of_rfad(toy):
    """Up to the kernel's factor 2 and constant 0.01, the scale of the ridge, and FRePo's sum over classes."""
    method = replace(SMALL, norm=False, ridge=5e-3)
    network = FeatureNet(toy.train, 4, 2, norm=False)
    network.reset(generator())
    blocks = [(c.weight[None].detach(), c.bias[None].detach()) for c in network.blocks[1::2]]
    state = RFAD(validate_every=0).begin(toy.train, 2, generator())
    images, y_t = toy.train.images, toy.train.labels
    with torch.no_grad():
        mine = method.objective(network.embed, state.pixels, state.labels, network.embed(images), y_t)
        phi_s, phi_t = conv_features(state.pixels, blocks).double(), conv_features(images, blocks).double()
        k_ss, k_ts = (conjugate_kernel(phi, phi_s, sigma_b=0) for phi in (phi_s, phi_t))
        other = ridge.mse(
            ridge.predict(k_ts, k_ss, state.labels.double(), 5e-3), ridge.centred_one_hot(y_t, 3)
        )
    torch.testing.assert_close(mine, 3 * other + ridge.margin(state.labels), rtol=1e-5, atol=1e-6)


def test_lamb_moves_every_tensor_by_the_rate_times_its_length():
    theta = [torch.randn(5, 3, generator=generator()), torch.randn(7, generator=generator(1)), torch.zeros(2)]
    theta = [t.requires_grad_() for t in theta]
    before = [t.detach().clone() for t in theta]
    optimiser = Lamb(theta, lr=0.1)
    for scale in (1.0, 1e3):  # the length does not depend on the gradient's
        for t, b in zip(theta, before, strict=True):
            t.data.copy_(b)
            t.grad = scale * torch.ones_like(t)
        optimiser.state.clear()
        optimiser.step()
        for t, b in zip(theta[:2], before[:2], strict=True):
            assert torch.isclose((t - b).norm(), 0.1 * b.norm(), rtol=1e-4)
        assert torch.allclose(theta[2], torch.tensor(-0.1), rtol=1e-4)  # no length: the plain Adam step
    theta[0].grad = None
    kept = theta[0].detach().clone()
    optimiser.step()
    assert torch.equal(theta[0], kept)


def test_the_initial_law_of_the_networks(toy):
    network = FeatureNet(toy.train, 64, 2, norm=True)
    network.reset(generator())
    weight = network.blocks[3].weight.detach()
    std = (9 * 64) ** -0.5
    assert abs(float(weight.std() / std) - 1) < 0.02 and float(weight.abs().max()) < 2.3 * std
    assert network.blocks[3].bias.abs().max() == 0 and weight.shape == (128, 64, 3, 3)
    assert isinstance(network.blocks[0], nn.Identity) and network.classifier.in_features == 128 * 2 * 2


def test_learned_labels_start_scaled_and_come_back(toy):
    start = SMALL.begin(toy.train, 2, generator()).labels.detach()
    torch.testing.assert_close(
        start, ridge.centred_one_hot(torch.arange(3).repeat_interleave(2), 3).float() / 0.3**0.5
    )
    synset = distill(SMALL, toy.train, 2, 0).synset
    assert synset.soft and not torch.equal(synset.labels, start) and synset.codes.shape == (6, 1, 8, 8)
    fixed = distill(replace(SMALL, learn_labels=False), toy.train, 2, 0).synset
    assert fixed.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_it_lowers_its_loss(toy):
    method = replace(SMALL, iterations=80, width=16, online_updates=10)
    above = distill(method, toy.train, 1, 0).history["loss"] + 1 / 3  # the label term is at least -1/C
    assert above.min() > 0 and above[-10:].mean() < 0.7 * above[:10].mean()


@pytest.mark.parametrize("method", [SMALL, replace(SMALL, networks=1, iterations=12)], ids=["pool", "resets"])
@pytest.mark.parametrize("at", [1, 5])
def test_resume_ends_with_the_same_bits(toy, tmp_path, method, at):
    class Stop(Exception):
        pass

    def stop(done, state, metrics):
        if done == at + 5:
            raise Stop

    calm, path = distill(method, toy.train, 2, 7), tmp_path / "c"
    if at + 5 < method.iterations:
        with pytest.raises(Stop):
            distill(method, toy.train, 2, 7, checkpoint=path, checkpoint_seconds=0.0, callback=stop)
    again = distill(method, toy.train, 2, 7, checkpoint=path)
    assert torch.equal(again.synset.codes, calm.synset.codes)
    assert torch.equal(again.synset.labels, calm.synset.labels)
    assert torch.equal(again.history["loss"], calm.history["loss"])


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_state_can_be_put_back_at_any_step(toy, at):
    from lib.distill import pack, unpack

    method = replace(SMALL, networks=2, iterations=12, online_updates=2)
    calm, g = distill(method, toy.train, 2, 7), generator(7)
    state = method.begin(toy.train, 2, g)
    for _ in range(at):
        method.step(state, g)
    packed, stream, fresh, g = (
        pack(state),
        g.get_state(),
        method.begin(toy.train, 2, generator(7)),
        generator(),
    )
    unpack(fresh, packed)
    g.set_state(stream)
    for _ in range(12 - at):
        method.step(fresh, g)
    assert torch.equal(method.finish(fresh).codes, calm.synset.codes)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"networks": 0}, "networks 0; allowed: 1 or more"),
        ({"online_updates": -1}, "FRePo: online_updates -1 is not allowed: it must be finite and at least 0"),
        ({"ridge": -1.0}, "FRePo: ridge -1.0 is not allowed: it must be finite and at least 0"),
        ({"init": "zeros"}, "unknown init 'zeros'.*allowed: noise, real"),
        ({"depth": 4}, "8-pixel images do not survive 4 poolings; allowed: 16 or more"),
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
        distill(replace(SMALL, ridge=0.0), data.train, 2, 0)


def test_every_minibatch_of_many_synthetic_images_is_drawn(toy, monkeypatch):
    monkeypatch.setattr(frepo, "NETWORK_BATCH", 4)
    state, g, seen = SMALL.begin(toy.train, 3, generator()), generator(), []
    monkeypatch.setattr(F, "mse_loss", lambda p, y: seen.append(len(y)) or (p - y).square().mean())
    SMALL.advance(state, g)
    assert seen == [4]
