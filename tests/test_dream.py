"""DREAM: when it is IDC, where it starts, and the additions of DREAM+."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import generator, toy_data
from test_distill import interrupted, same

from lib.analysis.iterations import first_reached, speedups
from lib.distill import distill
from lib.formation import MultiFormation, Pixels
from lib.methods import dream
from lib.methods.dc import DC
from lib.methods.dream import DREAM, DreamDC
from lib.methods.idc import IDC
from lib.nets.training import predict_embeddings
from lib.select.sampler import Memory, RandomBatches, Representative
from lib.system.errors import CompanionError

SOME = {
    "outer": 3,
    "inner": 4,
    "real_batch": 8,
    "network": "convnet-d2-w4",
    "network_batch": 16,
    "n_data": 32,
    "lr": 5.0,
}
SMALL = DREAM(**SOME, sampler=Representative(every=3))
ON_DC = {"outer": 3, "inner": 4, "epochs": 1, "real_batch": 8, "network": "convnet-d2-w4"}


# -- when it is IDC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formation", [MultiFormation(2), Pixels()], ids=lambda f: f.name)
def test_random_batches_from_random_images_is_idc_bit_for_bit(toy, formation):
    ours = distill(replace(SMALL, sampler=RandomBatches(), init="mix", formation=formation), toy.train, 2, 3)
    theirs = distill(IDC(**SOME, formation=formation), toy.train, 2, 3)
    assert torch.equal(ours.synset.codes, theirs.synset.codes)
    assert ours.history.keys() == theirs.history.keys()
    assert all(torch.equal(ours.history[name], theirs.history[name]) for name in ours.history)
    for change in ({"sampler": Representative()}, {"init": "k-means"}):
        settings = {"sampler": RandomBatches(), "init": "mix", "formation": formation} | change
        other = distill(replace(SMALL, **settings), toy.train, 2, 3)
        assert not torch.equal(other.synset.codes, theirs.synset.codes)


def test_random_batches_on_dc_is_dc_bit_for_bit(toy):
    ours = distill(DreamDC(**ON_DC, sampler=RandomBatches(), init="real"), toy.train, 2, 3)
    assert torch.equal(ours.synset.codes, distill(DC(**ON_DC, init="real"), toy.train, 2, 3).synset.codes)


@pytest.mark.parametrize(
    ("method", "host"), [(SMALL, IDC(**SOME)), (DreamDC(**ON_DC), DC(**ON_DC, init="mix"))]
)
def test_the_networks_are_those_of_the_host(toy, method, host):
    """Sampler and start leave no trace in the main stream of random numbers: comparisons are paired."""
    seen = []
    for one in (method, host):
        g, weights = generator(4), []
        state = one.begin(toy.train, 2, g)
        for _ in range(9):
            one.step(state, g)
            weights.append(
                state.networks.parameters["classifier.weight"].detach().clone() if state.t == 1 else None
            )
        seen.append((g.get_state(), weights[0::4]))
    assert torch.equal(seen[0][0], seen[1][0])
    if isinstance(method, IDC):  # DC trains them on S, which differs
        assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


# -- where it starts ----------------------------------------------------------------------------------------------------


def initial(method, data, ipc, seed=3):
    """The decoded initial images of every class, ``(C, n, ...)``, and the network that chose them."""
    g = generator(seed)
    state = method.begin(data.train, ipc, g)
    return method.finish(state), state.networks


@pytest.mark.parametrize(
    "method", [DreamDC(**ON_DC), replace(SMALL, formation=Pixels())], ids=lambda m: type(m).__name__
)
def test_plain_images_start_from_the_representatives(toy, method):
    synset, networks = initial(method, toy, 4)
    sampler, memory = Representative(), Memory()
    rows = sampler.pick(memory, toy.train, 4, 3, lambda x: predict_embeddings(networks, x)[0])
    images = toy.train.images[rows.flatten()]
    if isinstance(method, IDC):
        images = images.clamp(-2, 2)  # pixels in [0, 1]
    torch.testing.assert_close(synset.codes, images, rtol=0, atol=1e-5)
    assert (toy.train.labels[rows.flatten()] == synset.labels).all() and len(rows.unique()) == 12


def test_mosaics_start_from_four_times_as_many(toy):
    """Every tile is a subsampled representative, and no two are the same."""
    synset, networks = initial(SMALL, toy, 2)
    rows = Representative().pick(Memory(), toy.train, 8, 3, lambda x: predict_embeddings(networks, x)[0])
    tiles = synset.codes.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).reshape(3, 8, -1)
    for c in range(3):
        every_other = toy.train.images[rows[c]].clamp(-2, 2)[:, :, ::2, ::2].flatten(1)
        distance = torch.cdist(tiles[c], every_other)
        assert (distance.amin(1) < 1e-4).all() and len(distance.argmin(1).unique()) == len(rows[c].unique())


def test_small_classes_give_what_they_have():
    data = toy_data(per_class=5)
    synset, _ = initial(replace(SMALL, real_batch=4), data, 3)  # 12 tiles, 5 images
    assert synset.codes.shape == (9, 1, 8, 8) and synset.codes.isfinite().all()


def test_a_network_trained_for_an_epoch_chooses_otherwise(toy):
    plain, early = (initial(replace(SMALL, early=early, lr_network=0.1), toy, 2)[0].codes for early in (0, 3))
    assert not torch.equal(plain, early)


# -- DREAM+ -------------------------------------------------------------------------------------------------------------


def test_dream_plus_runs(toy):
    """Its second term is another summand."""
    method = replace(dream.plus(SMALL), sampler=Representative(every=2, per_cluster=2))
    history = distill(method, toy.train, 2, 0).history
    assert history["loss"].isfinite().all() and (history["features"] > 0).all()
    torch.testing.assert_close(history["gradients"] + history["features"], history["loss"])


# -- the rest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [replace(SMALL, outer=5, inner=5), DreamDC(**ON_DC | {"outer": 5, "inner": 5})]
)
def test_resume(toy, tmp_path, method):
    calm = distill(method, toy.train, 2, 7, snapshots=(0, 25))
    for at in (11, 22):
        interrupted(method, toy.train, tmp_path / f"{at}", at, snapshots=(0, 25))
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 25)), calm)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"init": "kmeans"}, "unknown init 'kmeans'"),
        ({"sampler": Representative(clusters=30)}, "30 clusters"),
        ({"formation": MultiFormation(3)}, "factor 3 for 8x8"),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **wrong), toy.train, 1, 0)
    assert "\n" not in str(caught.value)


# -- iterations to an accuracy ------------------------------------------------------------------------------------------


def test_where_an_accuracy_is_first_reached():
    x, accuracy = [1, 10, 20, 40], [50.0, 60.0, 55.0, 80.0]
    assert first_reached(x, accuracy, 50) == 1 and first_reached(x, accuracy, 30) == 1
    assert first_reached(x, accuracy, 55) == 5.5  # half way up to the second point
    assert first_reached(x, accuracy, 70) == 30  # the dip does not count
    assert first_reached(x, accuracy, 81) == np.inf


def test_speedups():
    marks = np.tile([1.0, 10, 20, 40, 80], (5, 1))
    slow = np.tile([50.0, 60, 70, 80, 90], (5, 1))
    fast = np.tile([50.0, 70, 90, 90, 90], (5, 1))
    curves = {
        "slow": (marks, slow),
        "fast": (marks, fast),
        "never": (marks, slow - 5),
        "again": (marks, slow),
    }
    found = speedups(curves, "slow", resamplings=20)
    assert (found["fast"] == 4).all() and (found["never"] == 0).all() and (found["again"] == 1).all()
    noisy = {
        name: (x, a + np.random.default_rng(k).normal(0, 3, a.shape))
        for k, (name, (x, a)) in enumerate(curves.items())
    }
    spread = speedups(noisy, "slow", resamplings=200)["fast"]
    assert spread.std() > 0.05 and 2 < np.median(spread) < 6
    assert np.array_equal(spread, speedups(noisy, "slow", resamplings=200)["fast"])
