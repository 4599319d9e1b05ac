"""DDM: DM with options off, the objective against a plain loop, taps, memory of the real side, resume, bad input."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data

from lib import nets
from lib.distill import distill
from lib.match import features, style
from lib.methods import ddm, dm
from lib.methods.ddm import DDM
from lib.methods.dm import DM
from lib.system.errors import CompanionError

BASE = DM(iterations=6, real_batch=8, network="convnet-d2-w4", augmentation="none")
OFF = {"moments": 0.0, "gram": 0.0, "diversity": 0.0}
FULL = DDM(**vars(BASE) | {"moments": 1e3, "gram": 1e3, "diversity": 1.0, "lr": 0.1})
RELEASED = replace(
    FULL, variant="released", tap="conv", moments=180.0, gram=1e4, diversity=30.0, spread=5.0, lr=0.01
)


@pytest.fixture(scope="module")
def toy():
    return toy_data()


@pytest.fixture
def state(toy):
    return FULL.begin(toy.train, 4, generator())


def batches(toy, real=8, syn=4):
    return toy.train.sample(real, generator(1)), toy.train.sample(syn, generator(2))


def observed(method, state, *images):
    network = nets.initialise(state.network, generator(3)).train()
    return [method.observe(network, one) for one in images]


@pytest.mark.parametrize("ipc", [1, 3])
@pytest.mark.parametrize("augmentation", ["none", "data"])
def test_without_its_terms_it_is_dm_bit_for_bit(toy, ipc, augmentation):
    base = replace(BASE, augmentation=augmentation)
    plain = distill(base, toy.train, ipc, 5)
    for tap, variant in (("act", "paper"), ("conv", "released")):
        off = distill(DDM(**vars(base) | OFF, tap=tap, variant=variant), toy.train, ipc, 5)
        assert torch.equal(plain.synset.codes, off.synset.codes)
        assert off.history.keys() == {"loss"} and torch.equal(plain.history["loss"], off.history["loss"])


def test_a_weight_of_zero_leaves_its_term_out_and_the_loss_is_the_sum_of_the_others(toy):
    whole = {"mean", "gram", "moments", "diversity"}
    for gone in ("gram", "moments", "diversity"):
        history = distill(replace(FULL, **{gone: 0.0}), toy.train, 3).history
        assert history.keys() == {"loss"} | whole - {gone}
        parts = sum(values for name, values in history.items() if name != "loss")
        torch.testing.assert_close(history["loss"], parts)
    assert distill(RELEASED, toy.train, 3).history.keys() == {"loss", "spread"} | whole


def test_objective_against_a_loop_over_classes_images_and_layers(toy, state):
    images = batches(toy)
    terms = FULL.terms(state, *observed(FULL, state, *images))
    network = state.network
    want = {name: torch.zeros(3) for name in terms}
    for c in range(3):
        (real_maps, real), (syn_maps, syn) = (network.look(one[c], "act") for one in images)
        want["mean"][c] = (real.mean(0) - syn.mean(0)).square().sum()
        want["diversity"][c] = style.neighbour_diversity(syn.unsqueeze(0), 1)
        for r, s in zip(real_maps, syn_maps, strict=True):
            grams = []
            for maps in (r, s):
                flat = maps.flatten(2)
                grams.append(sum(f @ f.T for f in flat) / len(flat) / flat[0].numel())
            want["gram"][c] += 1e3 * (grams[0] - grams[1]).square().sum() / 2
            r, s = r.mean(0).flatten(1), s.mean(0).flatten(1)  # the batch's mean map first
            gaps = [r.mean(1) - s.mean(1), (r.var(1) + 1e-5).sqrt() - (s.var(1) + 1e-5).sqrt()]
            want["moments"][c] += 1e3 * sum(0.5 * gap.square().mean() for gap in gaps) / 2
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    assert all(value.abs().min() > 1e-4 for value in want.values())


@pytest.mark.parametrize("method", [FULL, RELEASED], ids=["paper", "released"])
def test_equal_sets_have_no_distance(toy, state, method):
    images = batches(toy)[0]
    terms = method.terms(state, *observed(method, state, images, images.flip(1)))
    diversity = terms.pop("diversity")
    assert all(value.abs().max() < 1e-5 for value in terms.values())
    assert diversity.abs().max() < 1e-5 if method is RELEASED else (diversity < 0).all()


@pytest.mark.parametrize("method", [FULL, RELEASED], ids=["paper", "released"])
def test_order_within_a_class_does_not_matter_and_classes_do_not_mix(toy, state, method):
    real, syn = batches(toy)
    terms = method.terms(state, *observed(method, state, real, syn))
    shuffled = method.terms(state, *observed(method, state, real.flip(1), syn.roll(1, 1)))
    for name, value in terms.items():
        torch.testing.assert_close(shuffled[name], value, rtol=1e-4, atol=1e-5)
    other = torch.cat([real[:2], -real[2:]])
    changed = method.terms(state, *observed(method, state, other, syn))
    for name, value in terms.items():
        torch.testing.assert_close(changed[name][:2], value[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed["gram"][2], terms["gram"][2], rtol=1e-2)


def test_spatial_permutations_tell_gram_from_moments_in_the_observation(toy, state):
    """The same positions exchanged in all images change nothing; different ones in each image change the mean map alone."""
    maps = torch.rand(3, 8, 4, 6, 6, generator=generator(4))

    class Still(torch.nn.Module):
        def look(self, images, where):
            return [images], images.flatten(1)

    network = Still()
    flipped = maps.flip(-1)
    mixed = torch.cat([maps[:, :4].flip(-1), maps[:, 4:]], 1)
    method = replace(FULL, diversity=0.0)
    state.network.depth = 1
    try:
        syn = method.observe(network, 0.5 * maps)
        plain, together, apart = (
            method.terms(state, method.observe(network, one), syn) for one in (maps, flipped, mixed)
        )
    finally:
        state.network.depth = 2
    for name in ("gram", "moments"):
        torch.testing.assert_close(together[name], plain[name])
    torch.testing.assert_close(apart["gram"], plain["gram"])
    assert not torch.allclose(apart["moments"], plain["moments"], rtol=1e-3)


def test_legacy_weights_are_those_of_the_published_loop(toy, state):
    seen = observed(FULL, state, *batches(toy))
    clean, legacy = (replace(FULL, legacy=on).terms(state, *seen) for on in (False, True))
    accumulator = total = 0.0
    for summed in 2 * clean["gram"]:  # the class's sum over its 2 layers
        accumulator = (accumulator + summed) / 2
        total += accumulator
    torch.testing.assert_close(legacy["gram"].sum(), total)
    assert not torch.allclose(legacy["gram"], clean["gram"])
    for name in ("mean", "diversity"):
        assert torch.equal(legacy[name], clean[name])


def test_default_tap_is_the_relu_of_the_norm_and_every_tap_differs(toy, state):
    """Published: the list holds the norm's output, which the ReLU after it overwrites in place."""
    images = batches(toy)[0]
    network = nets.initialise(state.network, generator(3)).train()
    norm, act = (network.look(images.flatten(0, 1), where)[0] for where in ("norm", "act"))
    for before, after in zip(norm, act, strict=True):
        assert torch.equal(before.relu(), after) and 0.3 < (after == 0).float().mean() < 0.7
    grams = [replace(FULL, tap=tap).observe(network, images)[1] for tap in ("conv", "norm", "act", "pool")]
    assert all(not torch.allclose(a, b, rtol=1e-2) for i, a in enumerate(grams) for b in grams[:i])
    assert torch.equal(DDM(**vars(FULL)).observe(network, images)[1], grams[2])


def test_real_side_in_parts_is_the_whole_and_keeps_no_map_of_the_batch(toy, state, monkeypatch):
    real = batches(toy, real=12)[0]
    network = nets.initialise(state.network, generator(3)).train()
    rows = []
    look = type(network).look
    monkeypatch.setattr(
        type(network), "look", lambda self, x, where: rows.append(len(x)) or look(self, x, where)
    )
    for method in (FULL, RELEASED):
        rows.clear()
        whole = method.observe_real(network, real)
        with monkeypatch.context() as few:
            few.setattr(dm, "rows_at_once", lambda *_: 4)
            parts = method.observe_real(network, real)
        assert rows == [36] + 9 * [4]
        for name, value in method.terms(state, whole, parts).items():
            assert name == "diversity" or value.abs().max() < 1e-5
        shapes = [part.shape[1:] for part in parts[1:]]
        grams = 2 * [(3, 4, 4)]
        assert shapes == grams + (2 * [(12, 2, 4)] if method is RELEASED else [(3, 4, 8, 8), (3, 4, 4, 4)])


def test_real_side_in_bfloat16_is_close_and_statistics_are_float32(toy, state):
    real = batches(toy)[0]
    network = nets.initialise(state.network, generator(3)).train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = FULL.observe(network, real)
    assert all(tensor.dtype == torch.float32 for tensor in half[1:])
    for one, other in zip(FULL.observe(network, real), half, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0, atol=0.05)


def test_one_image_per_class_has_no_diversity_and_says_so_once(toy):
    with pytest.warns(UserWarning, match="one image per class has no diversity") as caught:
        alone = distill(FULL, toy.train, 1, 5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = distill(replace(FULL, diversity=0.0), toy.train, 1, 5)
    assert "diversity" not in alone.history and torch.equal(alone.synset.codes, without.synset.codes)
    with pytest.warns(UserWarning):
        assert {"spread", "diversity"}.isdisjoint(distill(RELEASED, toy.train, 1).history)


def test_style_and_diversity_do_what_they_are_for(toy):
    """Of the same start: the style gap to the real data shrinks, the embeddings of a class lie farther apart."""
    long = replace(BASE, iterations=30, lr=0.3)
    plain, styled, apart = (
        distill(DDM(**vars(long) | OFF | on), toy.train, 4, 5).synset.codes.unflatten(0, (3, 4))
        for on in ({}, {"gram": 300.0, "moments": 300.0}, {"diversity": 30.0})
    )
    real = toy.train.sample(20, generator(8))
    gap, distance = {}, {}
    for name, codes in (("plain", plain), ("styled", styled), ("apart", apart)):
        gap[name], distance[name] = 0.0, 0.0
        for seed in range(5):
            network = nets.make(BASE.network, toy.train, generator(100 + seed))
            with torch.no_grad():
                (r, _), (s, z) = (network.look(one.flatten(0, 1), "act") for one in (real, codes))
            for one, other in zip(r, s, strict=True):
                gap[name] += style.gram_distance(one.unflatten(0, (3, 20)), other.unflatten(0, (3, 4))).sum()
            distance[name] += torch.cdist(z.unflatten(0, (3, 4)), z.unflatten(0, (3, 4))).mean()
    assert gap["styled"] < 0.8 * gap["plain"] and distance["apart"] > 1.1 * distance["plain"]


@pytest.mark.parametrize("method", [replace(FULL, iterations=30), replace(RELEASED, iterations=30)])
def test_resumed_run_ends_with_the_same_bits(toy, tmp_path, method):
    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 24:
            raise Killed

    calm = distill(method, toy.train, 3, 7)
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        distill(method, toy.train, 3, 7, checkpoint=path, checkpoint_seconds=0.0, callback=kill)
    steps = []
    again = distill(method, toy.train, 3, 7, checkpoint=path, callback=lambda step, *_: steps.append(step))
    assert steps[0] == 21 and torch.equal(calm.synset.codes, again.synset.codes)
    assert all(torch.equal(calm.history[name], again.history[name]) for name in calm.history)


@pytest.mark.parametrize(
    "options, ipc, message",
    [
        ({"tap": "relu"}, 3, "unknown tap 'relu'; allowed: act, conv, norm, pool"),
        ({"variant": "releasd"}, 3, r"unknown variant of DDM 'releasd' \(did you mean 'released'"),
        ({"k": 3}, 3, "k = 3 nearest neighbours with 3 images per class: allowed 1 to 2"),
        ({"k": 0}, 3, "k = 0 .*allowed 1 to 2"),
        ({"network": "mlp"}, 3, "network 'mlp' has no maps to tap.*convnet"),
        ({"spread": 1.0}, 3, "spread 1.0 is a term of variant 'released'"),
        ({"gram": -1.0}, 3, "gram -1.0 of DDM is not allowed: at least 0"),
        ({"diversity": float("nan")}, 3, "diversity nan of DDM is not allowed"),
    ],
)
def test_bad_input_is_one_line(toy, options, ipc, message):
    with pytest.raises(CompanionError, match=message) as error:
        distill(replace(FULL, **options), toy.train, ipc)
    assert "\n" not in str(error.value)


def test_a_network_without_maps_serves_the_content_terms(toy):
    history = distill(
        DDM(**vars(BASE) | {"network": "mlp", "gram": 0.0, "moments": 0.0}), toy.train, 3
    ).history
    assert history.keys() == {"loss", "mean", "diversity"}


def test_presets_are_the_published_settings():
    paper = ddm.PRESETS["paper"]
    assert (paper.moments, paper.gram, paper.diversity, paper.tap, paper.legacy) == (1e4, 0, 10, "act", True)
    assert (paper.iterations, paper.real_batch, paper.lr, paper.network) == (
        20_000,
        256,
        1.0,
        "convnet-d3-w128",
    )
    assert ddm.PRESETS["paper-gram"].gram == 1e4 and ddm.PRESETS["paper-diversity"].k == 2
    released = ddm.PRESETS["paper-released"]
    assert (released.moments, released.gram, released.diversity, released.tap) == (180, 1e4, 0, "conv")


def test_gram_distance_of_the_method_is_that_of_the_library():
    real, syn = (
        torch.rand(2, 6, 4, 3, 3, generator=generator()),
        torch.rand(2, 3, 4, 3, 3, generator=generator(1)),
    )
    grams = [style.mean_gram(maps).unsqueeze(1).flatten(2) for maps in (real, syn)]
    torch.testing.assert_close(features.class_mean(*grams), style.gram_distance(real, syn))
