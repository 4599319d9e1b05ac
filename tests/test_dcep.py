"""DCEP, a reconstruction: IDC with formations of channels, and learned mixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data
from test_distill import interrupted, same

from lib.distill import distill
from lib.formation import CYCLES, PLANES, ChannelMix, MultiFormation, Pixels
from lib.methods.dcep import DCEP, FORMATIONS
from lib.methods.idc import IDC
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

SHARED = {"outer": 3, "inner": 4, "lr": 0.2, "base_side": 8, "real_batch": 8, "network": "convnet-d2-w4", "n_data": 24,
          "network_batch": 8}  # fmt: skip
SMALL = DCEP(**SHARED)
LEARNED = replace(SMALL, formation=FORMATIONS["learned"], init="real", lr_maps=0.05)


@pytest.fixture(scope="module")
def colour():
    return toy_data(channels=3)


@pytest.mark.parametrize("name", FORMATIONS)
def test_four_images_from_one(name, colour):
    synset = distill(replace(SMALL, formation=FORMATIONS[name]), colour.train, 2, 0).synset
    assert synset.codes.shape == (6, 3, 8, 8) and synset.images.shape == (24, 3, 8, 8) and synset.ipc == 2
    assert synset.targets.tolist() == [0, 0, 1, 1, 2, 2] * 4
    assert synset.bytes_images == 6 * 3 * 64 * 4 + (144 if name == "learned" else 0)


@pytest.mark.parametrize(
    ("formation", "of_idc"),
    [
        (MultiFormation(2, shifts=(0, 0, 0)), MultiFormation(2)),  # tiles without shifts are IDC's
        (ChannelMix(PLANES[3:]), Pixels()),  # the image alone is IDC-I
        (ChannelMix(CYCLES[:1]), Pixels()),
    ],
)
def test_reduces_to_idc(formation, of_idc, colour):
    options = {"init": "real"} if of_idc == Pixels() else {}
    ours = distill(DCEP(**SHARED | options, formation=formation), colour.train, 2, 0)
    theirs = distill(IDC(**SHARED | options, formation=of_idc), colour.train, 2, 0)
    torch.testing.assert_close(ours.history["loss"], theirs.history["loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.synset.codes, theirs.synset.codes, rtol=0, atol=1e-3)


def test_tiles_of_grey_images_are_idcs(toy):
    ours = distill(replace(SMALL, formation=FORMATIONS["tiles"]), toy.train, 2, 0).synset
    theirs = distill(IDC(**SHARED), toy.train, 2, 0).synset
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.images, theirs.images)


def test_learned_maps_that_do_not_learn_are_the_fixed_ones(colour):
    still = distill(replace(LEARNED, lr_maps=0.0), colour.train, 2, 0)
    fixed = distill(replace(LEARNED, formation=FORMATIONS["permute"]), colour.train, 2, 0)
    assert torch.equal(still.synset.codes, fixed.synset.codes)
    assert torch.equal(still.history["loss"], fixed.history["loss"])
    torch.testing.assert_close(torch.tensor(still.synset.decoder.maps), torch.tensor(CYCLES))


def test_maps_are_learned_with_the_images(colour):
    """One step by hand: images and maps follow the gradient of one loss, through the same formation."""
    method = replace(LEARNED, outer=1, inner=1)
    state = method.begin(colour.train, 2, generator(5))
    before = state.maps.detach().clone()
    method.step(state, generator(6))
    moved = state.maps.detach() - before
    torch.testing.assert_close(moved, -0.05 * state.maps.grad)
    assert state.maps.grad.abs().min() > 0 and state.pixels.grad.abs().max() > 0
    synset = distill(method, colour.train, 2, 5).synset
    assert synset.decoder.learned and synset.decoder.maps != CYCLES


def test_learned_maps_travel_with_the_set(colour, tmp_path):
    synset = distill(LEARNED, colour.train, 2, 0).synset
    back = SyntheticSet.load(synset.save(tmp_path / "set"))
    assert back.decoder == synset.decoder and torch.equal(back.images, synset.images)
    assert (torch.tensor(back.decoder.maps) - torch.tensor(CYCLES)).abs().max() > 1e-3


def test_a_set_decodes_as_it_was_learned(colour):
    state = LEARNED.begin(colour.train, 2, generator(5))
    for seed in range(4):
        LEARNED.step(state, generator(seed))
    with torch.no_grad():
        state.pixels.clamp_(0, 1)
    images = LEARNED.images(state, generator()).detach()  # (C, 8, ...), formation-major in a class
    synset = LEARNED.finish(state)
    got = synset.images.unflatten(0, (4, 3, 2)).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(got, images)


@pytest.mark.parametrize("name", FORMATIONS)
def test_resume(name, colour, tmp_path):
    method = replace(SMALL, formation=FORMATIONS[name], outer=5, inner=3, lr_maps=0.05)
    calm = distill(method, colour.train, 2, 7)
    for at in (11, 14):
        interrupted(method, colour.train, tmp_path / f"{at}", at)
        assert (tmp_path / f"{at}").is_file()
        resumed = distill(method, colour.train, 2, 7, checkpoint=tmp_path / f"{at}")
        same(resumed, calm)
        assert resumed.synset.decoder == calm.synset.decoder


def test_grey_images_are_refused_in_one_line(toy):
    for name in ("pack", "permute", "learned"):
        with pytest.raises(CompanionError, match="3 colour channels, these images have 1") as caught:
            distill(replace(SMALL, formation=FORMATIONS[name]), toy.train, 1, 0)
        assert "\n" not in str(caught.value)
