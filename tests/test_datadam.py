"""DataDAM: DM with the attention off, the objective against a plain loop, invariances, options, resume, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data

from lib import nets
from lib.distill import distill
from lib.match import attention
from lib.methods import datadam, dm
from lib.methods.datadam import DataDAM
from lib.methods.dm import DM
from lib.system.errors import CompanionError

BASE = DM(iterations=6, real_batch=8, network="convnet-d3-w4", augmentation="none")
FULL = DataDAM(**vars(BASE))


@pytest.fixture(scope="module")
def toy():
    return toy_data()


@pytest.fixture
def state(toy):
    return FULL.begin(toy.train, 4, generator())


def observed(method, state, *images):
    network = nets.initialise(state.network, generator(3)).train()
    return [method.observe(network, one) for one in images]


def batches(toy, real=8, syn=4):
    return toy.train.sample(real, generator(1)), toy.train.sample(syn, generator(2))


@pytest.mark.parametrize("ipc, augmentation", [(1, "none"), (3, "data")])
def test_without_attention_it_is_dm_bit_for_bit(toy, ipc, augmentation):
    for variant, norm in (("paper", "instance"), ("code", "batch")):
        base = replace(BASE, augmentation=augmentation)
        plain = distill(replace(base, network=f"{base.network}-{norm}"), toy.train, ipc, 5)
        off = distill(DataDAM(**vars(base), variant=variant, attention=0.0), toy.train, ipc, 5)
        assert torch.equal(plain.synset.codes, off.synset.codes)
        assert off.history.keys() == {"loss"} and torch.equal(plain.history["loss"], off.history["loss"])
    instance = distill(replace(BASE, augmentation=augmentation), toy.train, ipc, 5)
    assert not torch.equal(instance.synset.codes, plain.synset.codes)  # batch norm is another network


def test_a_weight_of_zero_leaves_its_term_out_and_the_loss_is_the_sum_of_the_others(toy):
    history = distill(FULL, toy.train, 3).history
    assert history.keys() == {
        "loss",
        "mean",
        "attention1",
        "attention2",
    }  # depth 3: the last ReLU is left out
    torch.testing.assert_close(history["loss"], sum(v for name, v in history.items() if name != "loss"))
    alone = distill(replace(FULL, task_balance=0.0, layers=(2,)), toy.train, 3).history
    assert alone.keys() == {"loss"} and torch.equal(alone["loss"][0], history["attention2"][0])


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_objective_against_a_loop_over_classes_images_and_layers(toy, variant):
    method = replace(FULL, variant=variant)
    state = method.begin(toy.train, 4, generator())
    real, syn = batches(toy)
    terms = method.terms(state, *observed(method, state, real, syn))
    p = {"paper": 4, "code": 1}[variant]
    network = nets.initialise(state.network, generator(3)).train()
    sides = [
        network.look(one.flatten(0, 1), "act") for one in (real, syn)
    ]  # batch norm: all classes in one pass
    for layer in (0, 1):
        for c in range(3):
            means = []
            for (maps, _), count in zip(sides, (8, 4), strict=True):
                total = 0.0
                for image in maps[layer][c * count : (c + 1) * count]:
                    flat = sum(channel.abs() ** p for channel in image).flatten()
                    total = total + flat / flat.norm()
                means.append(total / count)
            want = 100 * (means[0] - means[1]).square().sum()
            torch.testing.assert_close(terms[f"attention{layer + 1}"][c], want, rtol=1e-4, atol=1e-5)
    for c in range(3):
        gap = sides[0][1][c * 8 : c * 8 + 8].mean(0) - sides[1][1][c * 4 : c * 4 + 4].mean(0)
        torch.testing.assert_close(terms["mean"][c], gap.square().sum(), rtol=1e-4, atol=1e-5)
    assert all(value.max() > 1e-4 for value in terms.values())


def test_equal_sets_have_no_distance_and_order_within_a_class_does_not_matter(toy, state):
    real, syn = batches(toy)
    same = FULL.terms(state, *observed(FULL, state, real, real.flip(1)))
    assert all(value.abs().max() < 1e-5 for value in same.values())
    one = FULL.terms(state, *observed(FULL, state, real, syn))
    two = FULL.terms(state, *observed(FULL, state, real.flip(1), syn.roll(1, 1)))
    wrong = FULL.terms(state, *observed(FULL, state, real, syn.roll(1, 0)))  # classes out of step
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        assert (wrong[name] - value).abs().max() > 0.05 * value.max()


def test_more_channels_of_the_same_kind_or_brighter_ones_change_no_attention():
    """Where it responds, not how strongly: doubled channels, and per image a factor, leave the map alone."""
    maps = torch.rand(2, 5, 4, 3, 3, generator=generator())
    factors = 0.1 + torch.rand(2, 5, 1, 1, 1, generator=generator(1))
    for p in (1, 2, 4):
        once = attention.attention_map(maps, p)
        for changed in (factors * maps, torch.cat([maps, maps], 2), maps.flip(2)):
            torch.testing.assert_close(attention.attention_map(changed, p), once)
    doubled = attention.attention_map(2 * maps, 1, normalisation="none")
    torch.testing.assert_close(doubled, 2 * attention.attention_map(maps, 1, normalisation="none"))


def test_exponents_squared_norm_and_the_maximum_as_their_limit():
    maps = torch.rand(2, 5, 4, 3, 3, generator=generator(), dtype=torch.float64)
    square = attention.attention_map(maps, 2, normalisation="none")
    torch.testing.assert_close(square, maps.norm(dim=2).square().flatten(2))
    largest = attention.attention_map(maps, 1, "max", "none")
    torch.testing.assert_close(largest, maps.amax(2).flatten(2))
    gaps = [
        (attention.attention_map(maps, p, "sum", "none").pow(1 / p) - largest).abs().max()
        for p in (4, 16, 64, 256)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] and gaps[3] < 0.01


def test_normalisations_have_unit_norms_and_the_released_frobenius_divides_by_the_square():
    maps = torch.rand(2, 5, 4, 3, 3, generator=generator(), dtype=torch.float64)
    raw = attention.attention_map(maps, 2, normalisation="none")
    ones = torch.ones(2, 5, dtype=torch.float64)
    torch.testing.assert_close(attention.attention_map(maps, 2).norm(dim=-1), ones)
    torch.testing.assert_close(attention.attention_map(maps, 2, normalisation="l1").sum(-1), ones)
    frobenius = attention.attention_map(maps, 2, normalisation="frobenius")
    torch.testing.assert_close(frobenius * raw.norm(dim=-1, keepdim=True).square(), raw)


def test_distances_of_mean_maps():
    real, syn = (torch.rand(2, n, 9, generator=generator(n), dtype=torch.float64) for n in (6, 3))
    mse, mae, angle = (attention.mean_distance(real, syn, name) for name in ("mse", "mae", "angle"))
    gap = real.mean(1) - syn.mean(1)
    torch.testing.assert_close(mse, gap.square().sum(1))
    torch.testing.assert_close(mae, gap.abs().sum(1))
    torch.testing.assert_close(angle.cos(), F.cosine_similarity(real.mean(1), syn.mean(1)))
    for name in ("mse", "mae", "angle"):
        equal = real.clone().requires_grad_()
        value = attention.mean_distance(real, equal, name)
        assert value.abs().max() < 1e-7  # an arc cosine has no gradient here
        assert torch.autograd.grad(value.sum(), equal)[0].isfinite().all()


def test_real_side_in_parts_is_the_whole_and_keeps_no_channels(toy, state, monkeypatch):
    real = batches(toy, real=12)[0]
    network = nets.initialise(state.network, generator(3)).train()
    whole = FULL.observe_real(network, real)
    monkeypatch.setattr(dm, "rows_at_once", lambda *_: 4)
    parts = FULL.observe_real(network, real)
    assert [tuple(part.shape) for part in parts] == [(3, 12, 4), (3, 3, 64), (3, 3, 16)]
    for value in FULL.terms(state, whole, parts).values():
        assert value.abs().max() < 1e-6


def test_batch_norm_sees_all_classes_at_once(toy):
    method = replace(FULL, variant="code")
    state = method.begin(toy.train, 4, generator())
    network = nets.initialise(state.network, generator(3)).train()
    assert nets.has_batch_norm(network) and method.exponent == 1
    real = batches(toy)[0]
    alone = torch.cat([method.observe(network, real[c : c + 1])[1] for c in range(3)])
    assert not torch.allclose(method.observe_real(network, real)[1], alone, atol=1e-3)


def test_half_precision_maps_are_pooled_in_float32(toy, state):
    real = 20 * batches(toy)[0]
    network = nets.initialise(state.network, generator(3)).train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = FULL.observe(network, real)
    for one, other in zip(FULL.observe(network, real)[1:], half[1:], strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, one, rtol=0, atol=0.02)


def test_variants_and_another_norm_or_exponent(toy):
    for options, norm, p in (
        ({}, "instance", 4),
        ({"variant": "code"}, "batch", 1),
        ({"variant": "code", "p": 2}, "batch", 2),
        ({"network": "convnet-d2-w4-batch"}, "batch", 4),
    ):
        method = replace(FULL, **options)
        state = method.begin(toy.train, 2, generator())
        assert state.network.norm == norm and method.exponent == p


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_resumed_run_ends_with_the_same_bits(toy, tmp_path, variant):
    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 24:
            raise Killed

    method = replace(FULL, iterations=30, variant=variant)
    calm = distill(method, toy.train, 3, 7)
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        distill(method, toy.train, 3, 7, checkpoint=path, checkpoint_seconds=0.0, callback=kill)
    steps = []
    again = distill(method, toy.train, 3, 7, checkpoint=path, callback=lambda step, *_: steps.append(step))
    assert steps[0] == 21 and torch.equal(calm.synset.codes, again.synset.codes)
    assert all(torch.equal(calm.history[name], again.history[name]) for name in calm.history)


def test_attention_of_the_images_comes_nearer_to_the_real_one(toy):
    long = DataDAM(**vars(replace(BASE, iterations=40, lr=0.3)), p=2)
    codes = {
        name: distill(replace(long, **options), toy.train, 4, 5).synset.codes.unflatten(0, (3, 4))
        for name, options in (("both", {}), ("mean alone", {"attention": 0.0}))
    }
    real, state = toy.train.sample(20, generator(8)), long.begin(toy.train, 4, generator())
    gaps = {}
    for name, images in codes.items():
        terms = long.terms(state, *observed(long, state, real, images))
        gaps[name] = (terms["attention1"] + terms["attention2"]).sum()
    assert gaps["both"] < 0.6 * gaps["mean alone"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"variant": "papers"},
            r"unknown variant of DataDAM 'papers' \(did you mean 'paper'\?\); allowed: code, paper",
        ),
        ({"pooling": "mean"}, "unknown attention pooling 'mean'; allowed: max, sum"),
        ({"normalisation": "l3"}, "unknown attention normalisation 'l3'.*allowed: frobenius, l1, l2, none"),
        ({"distance": "cosine"}, "unknown attention distance 'cosine'.*allowed: angle, mae, mse"),
        ({"p": 0}, "exponent p = 0 is not allowed"),
        ({"layers": (1, 4)}, r"attention layers \(1, 4\) of 'convnet-d3-w4': allowed are some of 1 to 3"),
        ({"layers": ()}, r"attention layers \(\)"),
        (
            {"network": "convnet-d1-w4"},
            r"attention layers \(\) of 'convnet-d1-w4': allowed are some of 1 to 1",
        ),
        ({"network": "lenet"}, "network 'lenet' has no maps to tap.*convnet"),
        ({"attention": 0.0, "task_balance": 0.0}, "leave no objective"),
        ({"task_balance": -0.1}, "task_balance -0.1 of DataDAM is not allowed: at least 0"),
    ],
)
def test_bad_input_is_one_line(toy, options, message):
    with pytest.raises(CompanionError, match=message) as error:
        distill(replace(FULL, **options), toy.train, 2)
    assert "\n" not in str(error.value)


def test_presets_are_the_published_settings():
    table, code = datadam.PRESETS["paper"], datadam.PRESETS["paper-code"]
    assert (table.iterations, table.lr, table.task_balance, table.exponent, table.scale) == (
        8000,
        1.0,
        0.01,
        4,
        100,
    )
    assert (code.iterations, code.real_batch, code.exponent) == (20_000, 64, 1)
    assert datadam.PRESETS["paper-imagenet128"].task_balance == 0.02
    assert datadam.PRESETS["paper-ipc100"].lr == 10.0
