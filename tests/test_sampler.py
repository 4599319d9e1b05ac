"""Representative sampling: k-means against scikit-learn, what is picked, when, and that every method takes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data
from test_distill import interrupted, same

from lib.distill import distill
from lib.methods.datadam import DataDAM
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.dsa import DSA
from lib.methods.idm import IDM
from lib.methods.m3d import M3D
from lib.nets.supply import Queue
from lib.select.greedy import herding
from lib.select.kmeans import k_means, nearest, starting_points
from lib.select.sampler import RULES, Memory, RandomBatches, Representative
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
SOME = {"real_batch": 8, "network": NET}
METHODS = [
    DC(outer=2, inner=2, epochs=1, **SOME),
    DSA(outer=2, inner=2, epochs=1, **SOME),
    DM(iterations=4, **SOME),
    M3D(iterations=4, lr=0.5, **SOME),
    IDM(iterations=4, networks=Queue(3, interval=1, steps=1, batch=16), **SOME),
    DataDAM(iterations=4, **SOME),
]


def flat(images):
    """The simplest embedding."""
    return images.flatten(1)


def padded(seed=0, sizes=(30, 17, 24), d=5):
    """Random points of classes of different sizes, and which rows exist."""
    points = torch.randn(len(sizes), max(sizes), d, generator=generator(seed))
    valid = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return points.masked_fill(~valid[:, :, None], 1e3), valid  # what does not exist must not matter


def clusters_of(points, valid, centroids):
    return [torch.cdist(p[v], m).argmin(1) for p, v, m in zip(points, valid, centroids, strict=True)]


# -- k-means ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 4, 17])
def test_torch_k_means_is_that_of_scikit_learn(seed, k):
    points, valid = padded(seed)
    start = starting_points(points, valid, k, generator(seed))
    ours, theirs = (k_means(points, valid, start, backend=b) for b in ("torch", "sklearn"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if 1 < k < 17:
        assert not torch.allclose(ours, start)


@pytest.mark.parametrize("seed", range(5))
def test_empty_clusters_get_the_farthest_points(seed):
    """Centroids that nothing is near: after one round as scikit-learn has them, and none is empty in the end."""
    points, valid = padded(seed)
    start = starting_points(points, valid, 6, generator(seed))
    start[:, 3:5] = 50.0 + torch.arange(2)[:, None]  # far from everything
    once = [k_means(points, valid, start, iterations=1, backend=b) for b in ("torch", "sklearn")]
    torch.testing.assert_close(*once, rtol=1e-4, atol=1e-4)
    final = k_means(points, valid, start, backend="torch")
    assert all(len(labels.unique()) == 6 for labels in clusters_of(points, valid, final))
    assert final.abs().max() < 10


def test_k_means_never_raises_its_objective():
    points, valid = padded(3)
    start = starting_points(points, valid, 5, generator())

    def objective(centroids):
        return sum(
            torch.cdist(p[v], m).amin(1).square().sum()
            for p, v, m in zip(points, valid, centroids, strict=True)
        )

    values = [objective(k_means(points, valid, start, iterations=i, backend="torch")) for i in range(1, 8)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip([objective(start), *values[:-1]], values, strict=True))


def test_one_cluster_is_the_mean():
    points, valid = padded()
    got = k_means(points, valid, points[:, :1], backend="torch")
    for c in range(3):
        torch.testing.assert_close(got[c, 0], points[c][valid[c]].mean(0))
        distance = (points[c][valid[c]] - points[c][valid[c]].mean(0)).norm(dim=1)
        assert nearest(points, valid, got)[c] == distance.argmin()


def test_spread_out_starts_find_every_blob():
    """Six blobs far apart: k-means++ starts in each of them, random points usually do not."""
    found = {"random": 0, "k-means++": 0}
    for seed in range(40):
        g = generator(seed)
        centers = 30 * torch.eye(6)
        points = (centers[:, None] + torch.randn(6, 10, 6, generator=g)).flatten(0, 1)[
            torch.randperm(60, generator=g)
        ]
        points = torch.stack([points, points.flip(0)])
        valid = torch.ones(2, 60, dtype=torch.bool)
        for rule in found:
            start = starting_points(points, valid, 6, g, rule)
            picks = nearest(points, valid, k_means(points, valid, start, backend="torch"))
            blobs = torch.cdist(points[0][picks[0]], centers).argmin(1)
            found[rule] += len(blobs.unique()) == 6
    assert found["k-means++"] >= 38 > 30 > found["random"]


def test_starts_are_different_existing_points():
    points, valid = padded()
    for rule in ("random", "k-means++"):
        start = starting_points(points, valid, 17, generator(2), rule)
        for c in range(3):
            assert ((start[c][:, None] == points[c][valid[c]]).all(2).sum(1) == 1).all()
            assert len(start[c].unique(dim=0)) == 17


# -- what is picked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_picks_belong_to_their_class(rule):
    train = toy_data().train.subset(torch.arange(51))  # classes of different sizes
    sampler, memory = Representative(rule=rule), Memory()
    images = sampler.draw(memory, train, 9, generator(), flat)
    assert images.shape == (3, 9, 1, 8, 8)
    assert (train.labels[memory.tensors["indices"]] == torch.arange(3)[:, None]).all()
    again = sampler.draw(Memory(), train, 9, generator(), flat)
    assert torch.equal(images, again)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_as_many_as_there_are_is_the_whole_class(toy, rule):
    memory = Memory()
    Representative(rule=rule).draw(memory, toy.train, 20, generator(), flat)
    assert torch.equal(memory.tensors["indices"].flatten().sort().values, torch.arange(60))


def test_one_representative_is_nearest_to_the_class_mean(toy):
    images = Representative().draw(Memory(), toy.train, 1, generator(), flat)
    for c in range(3):
        rows = toy.train.of_class(c)
        assert torch.equal(images[c, 0], rows[(rows - rows.mean(0)).flatten(1).norm(dim=1).argmin()])


def test_the_other_rules(toy):
    means = torch.stack([toy.train.of_class(c).flatten(1).mean(0) for c in range(3)])
    for c in range(3):
        rows = toy.train.of_class(c).flatten(1)
        distance = torch.cdist(rows, means)
        other = distance[:, [k for k in range(3) if k != c]].amin(1)
        want = {
            "central": distance[:, c].topk(6, largest=False).indices,
            "far": distance[:, c].topk(6).indices,
            "boundary": (other - distance[:, c]).topk(6, largest=False).indices,
            "herding": herding(rows, 6),
        }
        for rule, picks in want.items():
            images = Representative(rule=rule).draw(Memory(), toy.train, 6, generator(), flat)
            assert torch.equal(images[c].flatten(1), rows[picks]), rule


def test_sub_clusters_take_the_nearest_of_each(toy):
    memory = Memory()
    sampler = Representative(per_cluster=4, warm=True)
    images = sampler.draw(memory, toy.train, 8, generator(), flat)
    assert images.shape[1] == 8 and memory.tensors["centroids"].shape == (3, 2, 64)
    for c in range(3):
        rows = toy.train.of_class(c).flatten(1)
        for j, centroid in enumerate(memory.tensors["centroids"][c]):
            want = rows[(rows - centroid).norm(dim=1).topk(4, largest=False).indices]
            torch.testing.assert_close(images[c, 4 * j : 4 * j + 4].flatten(1), want)


def test_a_number_of_clusters_of_its_own(toy):
    assert Representative(clusters=5).draw(Memory(), toy.train, 8, generator(), flat).shape[:2] == (3, 5)


def test_representatives_have_the_class_mean(toy):
    """The mechanism: a batch with one representative of each kind of image is nearer to its class in the mean than a random one
    (50 paired draws)."""
    kinds = (
        3 * torch.randn(5, 1, 8, 8, generator=generator(9))[torch.arange(60) % 5]
    )  # five kinds of images in a class
    train = replace(toy.train, images=toy.train.images + kinds)
    means = torch.stack([train.of_class(c).flatten(1).mean(0) for c in range(3)])
    gain = []
    for seed in range(50):
        samplers = (RandomBatches(), Representative(start="k-means++"))
        pair = [sampler.draw(Memory(), train, 5, generator(seed), flat) for sampler in samplers]
        random, ours = ((x.flatten(2).mean(1) - means).norm(dim=1).mean() for x in pair)
        gain.append(random - ours)
    gain = torch.stack(gain)
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


# -- when, and from which random numbers --------------------------------------------------------------------------------


def test_the_interval(toy):
    seen = []

    def embed(images):
        seen.append(len(images))
        return flat(images) * torch.rand(64, generator=generator(len(seen)))  # the network changes

    memory, g, drawn = Memory(), generator(), []
    for draw in range(11):
        if draw == 8:
            memory.restart()  # a new network
        drawn.append(Representative(every=3).draw(memory, toy.train, 6, g, embed))
    assert seen == [60] * 4  # draws 0, 3, 6 and 8
    changes = [k for k in range(1, 11) if not torch.equal(drawn[k], drawn[k - 1])]
    assert changes == [3, 6, 8]


def test_the_main_stream_is_that_of_random_batches(toy):
    one, two = generator(3), generator(3)
    memory = Memory()
    for _ in range(4):
        RandomBatches().draw(Memory(), toy.train, 6, one)
        Representative(every=2).draw(memory, toy.train, 6, two, flat)
        assert torch.equal(one.get_state(), two.get_state())


def test_clusterings_differ_from_one_another_and_between_seeds(toy):
    memory = Memory()
    sampler = Representative(every=1, rule="random")
    first, second = (sampler.draw(memory, toy.train, 6, generator(), flat) for _ in range(2))
    other = sampler.draw(Memory(), toy.train, 6, generator(1), flat)
    assert not torch.equal(first, second) and not torch.equal(first, other)


def test_a_warm_start_stays_at_its_optimum(toy):
    cold, warm = (Representative(every=1, warm=w, backend="torch") for w in (False, True))
    for sampler, stays in ((cold, False), (warm, True)):
        memory = Memory()
        first, second = (sampler.draw(memory, toy.train, 6, generator(), flat) for _ in range(2))
        assert torch.equal(first, second) == stays
    memory.restart()  # of a new network the old centroids say nothing
    assert not torch.equal(warm.draw(memory, toy.train, 6, generator(), flat), second)


# -- under every method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_takes_it(toy, method):
    random, ours = (
        distill(replace(method, sampler=s), toy.train, 1, 3)
        for s in (RandomBatches(), Representative(every=2))
    )
    assert ours.history["loss"].isfinite().all() and not torch.equal(random.synset.codes, ours.synset.codes)
    whole = [
        distill(replace(method, sampler=s, real_batch=20), toy.train, 1, 3)
        for s in (RandomBatches(), Representative())
    ]
    torch.testing.assert_close(whole[0].history["loss"], whole[1].history["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[0].synset.codes, whole[1].synset.codes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        DC(outer=5, inner=5, epochs=1, **SOME, sampler=Representative(every=3, warm=True)),
        DM(iterations=25, **SOME, sampler=Representative(every=7, start="k-means++")),
        M3D(iterations=25, **SOME, sampler=Representative(every=4, rule="random")),
    ],
    ids=lambda m: type(m).__name__,
)
def test_resume(toy, tmp_path, method):
    calm = distill(method, toy.train, 1, 7, snapshots=(0, 25))
    for at in (11, 22):
        interrupted(method, toy.train, tmp_path / f"{at}", at, ipc=1, snapshots=(0, 25))
        same(distill(method, toy.train, 1, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 25)), calm)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"clusters": 21}, "21 clusters.*1 to 20"),
        ({"clusters": 0}, "0 clusters.*1 to 20"),
        ({"clusters": 6, "per_cluster": 4}, "6 clusters with 4.*1 to 5"),
        ({"per_cluster": 9}, "0 clusters with 9"),
        ({"rule": "kmean"}, "unknown sampling rule 'kmean' .*kmeans.*boundary, central, far"),
        ({"start": "smart"}, "smart.*k-means\\+\\+, random"),
        ({"every": 0}, "every 0 "),
        ({"backend": "faiss"}, "faiss.*sklearn, torch"),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(DC(outer=1, **SOME, sampler=Representative(**wrong)), toy.train, 1, 0)
    assert "\n" not in str(caught.value)
