"""DataDAM: DM with the attention off, the objective against a plain loop, invariances, options, resume, bad input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill
from lib.match import attention
from lib.match.attention import Attention
from lib.match.distance import At, Look
from lib.match.features import ClassMean
from lib.methods import dm
from lib.methods.datadam import DataDAM, attention_and_mean
from lib.methods.dm import DM
from lib.system.errors import CompanionError

FULL = DataDAM(iterations=6, real_batch=8, network="convnet-d3-w4", augmentation="none")
CODE = replace(FULL, network="convnet-d3-w4-batch", distance=attention_and_mean(1.0))  # as released


def network(name: str, toy) -> torch.nn.Module:
    return nets.make(name, toy.train, generator(3)).train()


def looks(method: DataDAM, toy, *images) -> list[Look]:
    return [Look(network(method.network, toy), one, method.distance.taps) for one in images]


def batches(toy, real=8, syn=4):
    return toy.train.sample(real, generator(1)), toy.train.sample(syn, generator(2))


@pytest.mark.parametrize("ipc, augmentation", [(1, "none"), (3, "data")])
def test_without_attention_it_is_dm_bit_for_bit(toy, ipc, augmentation):
    for method in (FULL, CODE):
        method = replace(method, augmentation=augmentation)
        parts = {"iterations": 6, "real_batch": 8, "network": method.network, "augmentation": augmentation}
        plain = distill(DM(**parts), toy.train, ipc, 5)
        off = distill(replace(method, distance=attention_and_mean().parts[0]), toy.train, ipc, 5)
        assert torch.equal(plain.synset.codes, off.synset.codes)
        assert off.history.keys() == {"loss"} and torch.equal(plain.history["loss"], off.history["loss"])
    instance = distill(replace(DM(**parts), network=FULL.network), toy.train, ipc, 5)
    assert not torch.equal(instance.synset.codes, plain.synset.codes)  # batch norm is another network


def test_the_loss_is_the_sum_of_its_terms_and_one_term_alone_has_no_name(toy):
    history = distill(FULL, toy.train, 3).history
    assert history.keys() == {
        "loss",
        "mean",
        "attention1",
        "attention2",
    }  # depth 3: the last ReLU is left out
    torch.testing.assert_close(history["loss"], sum(v for name, v in history.items() if name != "loss"))
    alone = distill(replace(FULL, distance=Attention(layers=(2,))), toy.train, 3).history
    assert alone.keys() == {"loss"} and torch.equal(alone["loss"][0], history["attention2"][0])


def test_equal_sets_have_no_distance_and_order_within_a_class_does_not_matter(toy):
    real, syn = batches(toy)
    same = FULL.distance.between(*looks(FULL, toy, real, real.flip(1)))
    assert all(value.abs().max() < 1e-5 for value in same.values())
    one = FULL.distance.between(*looks(FULL, toy, real, syn))
    two = FULL.distance.between(*looks(FULL, toy, real.flip(1), syn.roll(1, 1)))
    wrong = FULL.distance.between(*looks(FULL, toy, real, syn.roll(1, 0)))  # classes out of step
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        assert (wrong[name] - value).abs().max() > 0.05 * value.max()


def test_the_released_form_against_a_loop_over_classes_images_and_layers(toy):
    """With batch norm, where all classes of a side go through the network together: the plain version is of one class at a time."""
    real, syn = batches(toy)
    terms = CODE.distance.between(*looks(CODE, toy, real, syn))
    sides = [network(CODE.network, toy).look(one.flatten(0, 1), "act") for one in (real, syn)]
    for layer in (0, 1):
        for c in range(3):
            means = []
            for (maps, _), count in zip(sides, (8, 4), strict=True):
                total = 0.0
                for image in maps[layer][c * count : (c + 1) * count]:
                    flat = sum(channel.abs() for channel in image).flatten()
                    total = total + flat / flat.norm()
                means.append(total / count)
            want = 100 * (means[0] - means[1]).square().sum()
            torch.testing.assert_close(terms[f"attention{layer + 1}"][c], want, rtol=1e-4, atol=1e-5)
    for c in range(3):
        gap = sides[0][1][c * 8 : c * 8 + 8].mean(0) - sides[1][1][c * 4 : c * 4 + 4].mean(0)
        torch.testing.assert_close(terms["mean"][c], gap.square().sum(), rtol=1e-4, atol=1e-5)
    assert all(value.max() > 1e-4 for value in terms.values())


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


def test_real_side_in_parts_is_the_whole_and_keeps_no_channels(toy, monkeypatch):
    real, net = batches(toy, real=12)[0], network(FULL.network, toy)
    whole = FULL.observe_real(net, real)
    monkeypatch.setattr(dm, "rows_at_once", lambda *_: 4)
    parts = FULL.observe_real(net, real)
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert shapes == {"0.embedding": (3, 12, 4), "1.1": (3, 3, 64), "1.2": (3, 3, 16)}
    for value in FULL.distance.terms(whole, parts, At()).values():
        assert value.abs().max() < 1e-6


def test_batch_norm_sees_all_classes_at_once(toy):
    net, real = network(CODE.network, toy), batches(toy)[0]
    assert nets.has_batch_norm(net)
    alone = torch.cat([CODE.observe_real(net, real[c : c + 1])["1.1"] for c in range(3)])
    assert not torch.allclose(CODE.observe_real(net, real)["1.1"], alone, atol=1e-3)


def test_half_precision_maps_are_pooled_in_float32(toy):
    exact, rough = looks(FULL, toy, *2 * [20 * batches(toy)[0]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = FULL.distance.observe(rough)
    whole = FULL.distance.observe(exact)
    for name in ("1.1", "1.2"):
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], whole[name], rtol=0, atol=0.02)


@pytest.mark.parametrize("method", [FULL, CODE], ids=["paper", "code"])
def test_resumed_run_ends_with_the_same_bits(toy, tmp_path, method):
    method = replace(method, iterations=30)
    calm = distill(method, toy.train, 3, 7)
    interrupted(method, toy.train, tmp_path / "a", 24, ipc=3)
    same(distill(method, toy.train, 3, 7, checkpoint=tmp_path / "a"), calm)


def test_attention_of_the_images_comes_nearer_to_the_real_one(toy):
    long = replace(FULL, iterations=40, lr=0.3)
    both, real = attention_and_mean(2.0), toy.train.sample(20, generator(8))
    gaps = []
    for distance in (both, ClassMean()):
        codes = distill(replace(long, distance=distance), toy.train, 4, 5).synset.codes.unflatten(0, (3, 4))
        terms = both.between(*looks(long, toy, real, codes))
        gaps.append((terms["attention1"] + terms["attention2"]).sum())
    assert gaps[0] < 0.6 * gaps[1]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Attention(pooling="mean"), "unknown attention pooling 'mean'; allowed: max, sum"),
        (
            lambda: Attention(normalisation="l3"),
            "unknown attention normalisation 'l3'.*allowed: frobenius, l1, l2, none",
        ),
        (
            lambda: Attention(distance="cosine"),
            "unknown attention distance 'cosine'.*allowed: angle, mae, mse",
        ),
        (lambda: Attention(p=0), "exponent p = 0 is not allowed"),
        (lambda: Attention(0.0), "weight 0.0 of Attention is not allowed: it must be positive"),
        (lambda: attention_and_mean(lam=-0.1), "weight -10.0 of ClassMean is not allowed"),
    ],
)
def test_an_attention_that_does_not_exist_is_one_line(make, message):
    with pytest.raises(CompanionError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"distance": Attention(layers=(1, 4))},
            r"attention layers \(1, 4\) at depth 3: allowed are some of 1 to 3",
        ),
        ({"distance": Attention(layers=())}, r"attention layers \(\) at depth 3"),
        ({"network": "convnet-d1-w4"}, r"attention layers \(\) at depth 1: allowed are some of 1 to 1"),
        ({"network": "lenet"}, "Attention looks at maps, LeNet has none to tap: allowed is a convnet-"),
    ],
)
def test_a_network_without_these_maps_is_one_line(toy, options, message):
    with pytest.raises(CompanionError, match=message) as error:
        distill(replace(FULL, **options), toy.train, 2)
    assert "\n" not in str(error.value)
