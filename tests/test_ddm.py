"""DDM: DM with options off, the objective against a plain loop, taps, memory of the real side, resume, bad input."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import generator
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill
from lib.match import features, style
from lib.match.distance import At, Distance, Look
from lib.match.features import ClassMean
from lib.match.style import Diversity, Gram, Moments, StyleSpread
from lib.methods import dm
from lib.methods.ddm import DDM
from lib.methods.dm import DM
from lib.system.errors import CompanionError

BASE = DDM(iterations=6, real_batch=8, network="convnet-d2-w4", augmentation="none", distance=ClassMean())
FULL = replace(BASE, distance=ClassMean() + Gram(1e3) + Moments(1e3) + Diversity(1.0), lr=0.1)
RELEASED = replace(
    BASE,
    distance=ClassMean() + Gram(1e4, tap="conv") + Moments(180.0, tap="conv", per_image=True)
    + StyleSpread(5.0, tap="conv") + Diversity(30.0, principal=True),
    lr=0.01,
)  # fmt: skip


def batches(toy, real=8, syn=4):
    return toy.train.sample(real, generator(1)), toy.train.sample(syn, generator(2))


def network(toy) -> torch.nn.Module:
    return nets.make(BASE.network, toy.train, generator(3)).train()


def terms(distance: Distance, toy, real, syn) -> dict[str, torch.Tensor]:
    return distance.between(*(Look(network(toy), one, distance.taps) for one in (real, syn)))


@pytest.mark.parametrize("ipc", [1, 3])
@pytest.mark.parametrize("augmentation", ["none", "data"])
def test_without_its_terms_it_is_dm_bit_for_bit(toy, ipc, augmentation):
    plain = DM(iterations=6, real_batch=8, network="convnet-d2-w4", augmentation=augmentation)
    plain, off = (distill(m, toy.train, ipc, 5) for m in (plain, replace(BASE, augmentation=augmentation)))
    assert torch.equal(plain.synset.codes, off.synset.codes)
    assert off.history.keys() == {"loss"} and torch.equal(plain.history["loss"], off.history["loss"])


def test_a_term_that_is_left_out_leaves_the_others_and_the_loss_is_their_sum(toy):
    mean, *others = FULL.distance.parts
    for gone in others:
        kept = [part for part in others if part is not gone]
        history = distill(replace(FULL, distance=mean + kept[0] + kept[1]), toy.train, 3).history
        assert history.keys() == {"loss", "mean"} | {type(part).__name__.lower() for part in kept}
        parts = sum(values for name, values in history.items() if name != "loss")
        torch.testing.assert_close(history["loss"], parts)
    named = {"loss", "mean", "gram", "moments", "spread", "diversity"}
    assert distill(RELEASED, toy.train, 3).history.keys() == named


@pytest.mark.parametrize("method", [FULL, RELEASED], ids=["paper", "released"])
def test_equal_sets_have_no_distance(toy, method):
    images = batches(toy)[0]
    found = terms(method.distance, toy, images, images.flip(1))
    diversity = found.pop("diversity")
    assert all(value.abs().max() < 1e-5 for value in found.values())
    assert diversity.abs().max() < 1e-5 if method is RELEASED else (diversity < 0).all()


@pytest.mark.parametrize("method", [FULL, RELEASED], ids=["paper", "released"])
def test_order_within_a_class_does_not_matter_and_classes_do_not_mix(toy, method):
    real, syn = batches(toy)
    found = terms(method.distance, toy, real, syn)
    shuffled = terms(method.distance, toy, real.flip(1), syn.roll(1, 1))
    for name, value in found.items():
        torch.testing.assert_close(shuffled[name], value, rtol=1e-4, atol=1e-5)
    other = torch.cat([real[:2], -real[2:]])
    changed = terms(method.distance, toy, other, syn)
    for name, value in found.items():
        torch.testing.assert_close(changed[name][:2], value[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed["gram"][2], found["gram"][2], rtol=1e-2)


def test_spatial_permutations_tell_gram_from_moments():
    """The same positions exchanged in all images change nothing; different ones in each image change the mean map alone."""
    maps = torch.rand(3, 8, 4, 6, 6, generator=generator(4))
    mixed = torch.cat([maps[:, :4].flip(-1), maps[:, 4:]], 1)
    distance, syn = Gram(1e3) + Moments(1e3), Look.of(maps={"act": [0.5 * maps]})
    plain, together, apart = (
        distance.between(Look.of(maps={"act": [one]}), syn) for one in (maps, maps.flip(-1), mixed)
    )
    for name in ("gram", "moments"):
        torch.testing.assert_close(together[name], plain[name])
    torch.testing.assert_close(apart["gram"], plain["gram"])
    assert not torch.allclose(apart["moments"], plain["moments"], rtol=1e-3)


def test_legacy_weights_are_those_of_the_published_loop(toy):
    images = batches(toy)
    clean, legacy = (terms(Gram(1e3, legacy=on), toy, *images)["gram"] for on in (False, True))
    accumulator = total = 0.0
    for summed in 2 * clean:  # the class's sum over its 2 layers
        accumulator = (accumulator + summed) / 2
        total += accumulator
    torch.testing.assert_close(legacy.sum(), total)
    assert not torch.allclose(legacy, clean)


def test_default_tap_is_the_relu_of_the_norm_and_every_tap_differs(toy):
    """Published: the list holds the norm's output, which the ReLU after it overwrites in place."""
    images, net = batches(toy)[0], network(toy)
    norm, act = (net.look(images.flatten(0, 1), where)[0] for where in ("norm", "act"))
    for before, after in zip(norm, act, strict=True):
        assert torch.equal(before.relu(), after) and 0.3 < (after == 0).float().mean() < 0.7
    grams = [Gram(tap=tap).observe(Look(net, images))["0"] for tap in ("conv", "norm", "act", "pool")]
    assert all(not torch.allclose(a, b, rtol=1e-2) for i, a in enumerate(grams) for b in grams[:i])
    assert torch.equal(Gram().observe(Look(net, images))["0"], grams[2])


def test_real_side_in_parts_is_the_whole_and_keeps_no_map_of_the_batch(toy, monkeypatch):
    real, net = batches(toy, real=12)[0], network(toy)
    rows = []
    look = type(net).look
    monkeypatch.setattr(type(net), "look", lambda self, x, where: rows.append(len(x)) or look(self, x, where))
    for method in (FULL, RELEASED):
        rows.clear()
        whole = method.observe_real(net, real)
        with monkeypatch.context() as few:
            few.setattr(dm, "rows_at_once", lambda *_: 4)
            parts = method.observe_real(net, real)
        assert rows == [36] + 9 * [4]
        for name, value in method.distance.terms(whole, parts, At()).items():
            assert name == "diversity" or value.abs().max() < 1e-5
        maps = {name: tuple(part.shape[1:]) for name, part in parts.items() if "embedding" not in name}
        moments = [(12, 2, 4)] * 2 if method is RELEASED else [(3, 4, 8, 8), (3, 4, 4, 4)]
        assert [maps[f"{part}.{layer}"] for part in (1, 2) for layer in (0, 1)] == 2 * [(3, 4, 4)] + moments


def test_real_side_in_bfloat16_is_close_and_statistics_are_float32(toy):
    real, net = batches(toy)[0], network(toy)
    distance = Gram(1e3) + Moments(1e3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = distance.observe(Look(net, real, distance.taps))
    for name, one in distance.observe(Look(net, real, distance.taps)).items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], one, rtol=0, atol=0.05)


def test_one_image_per_class_has_no_diversity_and_says_so_once(toy):
    with pytest.warns(UserWarning, match="one image per class has no diversity") as caught:
        alone = distill(FULL, toy.train, 1, 5)
    assert len(caught) == 1
    mean, gram, moments, _ = FULL.distance.parts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = distill(replace(FULL, distance=mean + gram + moments), toy.train, 1, 5)
    assert "diversity" not in alone.history and torch.equal(alone.synset.codes, without.synset.codes)
    with pytest.warns(UserWarning):
        assert {"spread", "diversity"}.isdisjoint(distill(RELEASED, toy.train, 1).history)
    with pytest.warns(UserWarning), pytest.raises(CompanionError, match="has no term at IPC 1: add another"):
        distill(replace(FULL, distance=Diversity()), toy.train, 1)


def test_style_and_diversity_do_what_they_are_for(toy):
    """Of the same start: the style gap to the real data shrinks, the embeddings of a class lie farther apart."""
    long = replace(BASE, iterations=30, lr=0.3)
    plain, styled, apart = (
        distill(replace(long, distance=distance), toy.train, 4, 5).synset.codes.unflatten(0, (3, 4))
        for distance in (
            ClassMean(),
            ClassMean() + Gram(300.0) + Moments(300.0),
            ClassMean() + Diversity(30.0),
        )
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


@pytest.mark.parametrize("method", [FULL, RELEASED], ids=["paper", "released"])
def test_resumed_run_ends_with_the_same_bits(toy, tmp_path, method):
    method = replace(method, iterations=30)
    calm = distill(method, toy.train, 3, 7)
    interrupted(method, toy.train, tmp_path / "a", 24, ipc=3)
    same(distill(method, toy.train, 3, 7, checkpoint=tmp_path / "a"), calm)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gram(tap="relu"), "unknown tap 'relu'; allowed: act, conv, norm, pool"),
        (lambda: Gram(-1.0), "weight -1.0 of Gram is not allowed: it must be positive"),
        (lambda: Diversity(float("nan")), "weight nan of Diversity is not allowed"),
        (lambda: StyleSpread(float("inf")), "weight inf of StyleSpread is not allowed"),
    ],
)
def test_a_term_that_does_not_exist_is_one_line(make, message):
    with pytest.raises(CompanionError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distance": Diversity(k=3)}, "k = 3 nearest neighbours with 3 images per class: allowed 1 to 2"),
        ({"distance": ClassMean() + Diversity(k=0)}, "k = 0 .*allowed 1 to 2"),
        ({"network": "mlp"}, "Gram looks at maps, MLP has none to tap: allowed is a convnet-"),
    ],
)
def test_bad_input_is_one_line(toy, options, message):
    with pytest.raises(CompanionError, match=message) as error:
        distill(replace(FULL, **options), toy.train, 3)
    assert "\n" not in str(error.value)


def test_a_network_without_maps_serves_the_content_terms(toy):
    method = replace(BASE, network="mlp", distance=ClassMean() + Diversity())
    assert distill(method, toy.train, 3).history.keys() == {"loss", "mean", "diversity"}


def test_gram_distance_of_the_method_is_that_of_the_library():
    real, syn = (
        torch.rand(2, 6, 4, 3, 3, generator=generator()),
        torch.rand(2, 3, 4, 3, 3, generator=generator(1)),
    )
    grams = [style.mean_gram(maps).unsqueeze(1).flatten(2) for maps in (real, syn)]
    torch.testing.assert_close(features.class_mean(*grams), style.gram_distance(real, syn))
