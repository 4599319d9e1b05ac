"""Composing methods: every point of the grid runs, published methods are points of it, and nonsense is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import toy_data

from lib.compose import AUGMENTATIONS, FORMATIONS, OBJECTIVES, PARTS, SAMPLERS, compose, steps
from lib.distill import distill
from lib.methods import dm, dsa
from lib.select.sampler import Representative
from lib.system.errors import CompanionError

TINY = {"real_batch": 4}


@pytest.fixture(scope="module")
def toy_rgb():
    return toy_data(channels=3)


def tiny(method):
    small = {"network": "convnet-d2-w4" + ("-batch" if "batch" in method.network else "")} | TINY
    if hasattr(method, "n_data"):
        small |= {"n_data": 16, "inner": 1}
    if isinstance(method.sampler, Representative):
        small["sampler"] = replace(method.sampler, clusters=4)
    return steps(replace(method, **small), 1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_combination_makes_a_set_of_equal_bytes(toy_rgb, objective):
    for formation, sampler, augmentation in itertools.product(FORMATIONS, SAMPLERS, AUGMENTATIONS):
        method = tiny(compose(objective, formation, sampler, augmentation, "photos16"))
        synset = distill(method, toy_rgb.train, 1, 0).synset
        assert synset.codes.shape == (3, 3, 8, 8) and synset.bytes_images == 4 * synset.codes.numel()
        assert len(synset.images) == FORMATIONS[formation].multiplicity * len(synset.codes)
        assert synset.codes.isfinite().all()


def test_published_methods_are_points_of_the_grid():
    assert compose("DM", "pixels", "random", "DSA", "photos16") == dm.PRESETS["photos16"]
    got = compose("DC", "pixels", "random", "DSA", "photos16")
    assert vars(got) == vars(dsa.PRESETS["photos16"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_steps_leave_the_initial_images(toy_rgb, objective):
    """They are the same whatever the objective."""
    method = tiny(compose(objective, "multi-formation", "random", "none", "photos16"))
    start = distill(steps(method, 0), toy_rgb.train, 2, 3).synset
    other = distill(
        steps(tiny(compose("DM", "multi-formation", "random", "none", "photos16")), 0), toy_rgb.train, 2, 3
    )
    seen = [toy_rgb.train.transform.inverse(one.codes).clamp(0, 1) for one in (start, other.synset)]
    torch.testing.assert_close(*seen, rtol=0, atol=1e-5)  # IDC clamps
    moved = distill(method, toy_rgb.train, 2, 3).synset
    assert (moved.codes - start.codes).abs().max() > 1e-6


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_part_is_named_with_the_allowed_ones(part):
    names = {"objective": "DM", "formation": "pixels", "sampler": "random", "augmentation": "none"}
    with pytest.raises(CompanionError, match=rf"unknown {part} 'x'; allowed: .*{names[part]}"):
        compose(**names | {part: "x"}, dataset="digits")


def test_channels_need_colour(toy):
    method = tiny(compose("DM", "channels", "random", "none", "digits"))
    with pytest.raises(CompanionError, match="mixes 3 colour channels, these images have 1"):
        distill(method, toy.train, 1, 0)


def test_more_clusters_than_images(toy):
    method = tiny(compose("DM", "pixels", "representative", "none", "digits"))
    method = replace(method, sampler=Representative(clusters=10_000))
    with pytest.raises(CompanionError, match="10000 clusters"):
        distill(method, toy.train, 1, 0)
