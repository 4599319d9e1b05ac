"""Composing methods: every point of the grid runs, published methods are points of it, and nonsense is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import toy_data, with_fields

from lib.compose import AUGMENTATIONS, FORMATIONS, OBJECTIVES, PARTS, SAMPLERS, compose, initial
from lib.distill import distill
from lib.formation import Pixels
from lib.match.contrastive import Contrastive
from lib.match.curvature import CurvatureGap
from lib.match.features import ClassMean
from lib.match.gradient import Cosine, RowCosine
from lib.match.mmd import MMD
from lib.methods import dc, dm, dsa
from lib.methods.idc import IDC
from lib.select.sampler import RandomBatches, Representative
from lib.system.errors import CompanionError


@pytest.fixture(scope="module")
def toy_rgb():
    return toy_data(channels=3)


def tiny(method, ipc=1):
    """A few steps at small size."""
    method = replace(method, real_batch=4, network="convnet-d2-w4" + "-batch" * ("batch" in method.network))
    method = with_fields(method, n_data=16, inner=1)
    if isinstance(method.sampler, Representative):
        method = replace(method, sampler=replace(method.sampler, clusters=4))
    return method.with_steps(1, ipc)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_combination_makes_a_set_of_equal_bytes(toy_rgb, objective):
    for formation, sampler, augmentation in itertools.product(FORMATIONS, SAMPLERS, AUGMENTATIONS):
        method = tiny(compose(objective, formation, sampler, augmentation, toy_rgb.train, 1))
        synset = distill(method, toy_rgb.train, 1, 0).synset
        assert synset.codes.shape == (3, 3, 8, 8) and synset.bytes_images == 4 * synset.codes.numel()
        assert len(synset.images) == FORMATIONS[formation].multiplicity * len(synset.codes)
        assert synset.codes.isfinite().all()


def test_published_methods_are_points_of_the_grid(toy):
    def recipe(module):
        return module.RECIPES.find(toy.train, 1).method

    got = compose("DM", "pixels", "random", "none", toy.train, 1)
    assert got == recipe(dm)
    composed = replace(compose("DC", "pixels", "random", "DSA", toy.train, 1), lr=recipe(dsa).lr)  # each has a rate of its own
    assert vars(composed) == vars(recipe(dsa))


@pytest.mark.parametrize(
    ("distance", "loop"),
    [
        (RowCosine() + CurvatureGap(1.0, "diag"), dc.DC),
        (Contrastive(Cosine()), dc.DC),
        (ClassMean() + MMD(), dm.DM),
    ],
    ids=repr,
)
def test_any_distance_is_lowered_in_the_loop_of_its_family(toy, distance, loop):
    values = (Pixels(), RandomBatches(), ("color_crop", "single"))
    method = compose(distance, *values, toy.train, 1, real_batch=6)
    assert type(method) is loop and method.distance == distance and method.real_batch == 6
    assert (method.formation, method.sampler, (method.augmentation, method.mode)) == values
    run = distill(tiny(method).with_steps(2), toy.train, 1, 0)
    assert run.history["loss"].isfinite().all() and len(run.history["loss"]) == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_steps_leave_the_initial_images(toy_rgb, objective):
    """They are the same whatever the objective."""
    train = toy_rgb.train
    method = tiny(compose(objective, "multi-formation", "random", "none", train, 2), 2)
    start = distill(method.with_steps(0, 2), train, 2, 3).synset
    other = distill(initial("multi-formation", train, 2), train, 2, 3).synset
    seen = [train.transform.inverse(one.codes).clamp(0, 1) for one in (start, other)]
    torch.testing.assert_close(*seen, rtol=0, atol=1e-5)  # IDC clamps
    moved = distill(method, train, 2, 3).synset
    assert (moved.codes - start.codes).abs().max() > 1e-6


def test_steps_are_those_asked_for_in_whole_networks():
    assert dm.DM().with_steps(7).total_steps(1) == 7
    assert dc.DC().with_steps(7).total_steps(1) == 7 and dc.DC().with_steps(0).total_steps(1) == 0
    assert (
        dc.DC().with_steps(25, ipc=10).total_steps(10) == 30
        and IDC(inner=5).with_steps(7).total_steps(1) == 10
    )


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_part_is_named_with_the_allowed_ones(toy, part):
    names = {"objective": "DM", "formation": "pixels", "sampler": "random", "augmentation": "none"}
    with pytest.raises(CompanionError, match=rf"unknown {part} 'x'; allowed: .*{names[part]}"):
        compose(**names | {part: "x"}, train=toy.train, ipc=1)
    with pytest.raises(CompanionError, match="unknown objective 3"):
        compose(3, "pixels", "random", "none", toy.train, 1)


def test_channels_need_colour(toy):
    method = tiny(compose("DM", "channels", "random", "none", toy.train, 1))
    with pytest.raises(CompanionError, match="mixes 3 colour channels, these images have 1"):
        distill(method, toy.train, 1, 0)


def test_more_clusters_than_images(toy):
    method = tiny(compose("DM", "pixels", Representative(clusters=10_000), "none", toy.train, 1))
    method = replace(method, sampler=Representative(clusters=10_000))
    with pytest.raises(CompanionError, match="10000 clusters"):
        distill(method, toy.train, 1, 0)
