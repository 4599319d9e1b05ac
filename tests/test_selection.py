"""Selections: exact budgets, herding and k-center by their definitions, and the selection methods."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import generator

from lib.distill import distill
from lib.methods.selection import Herding, KCenter, RandomReal
from lib.select import proxy
from lib.select.greedy import HERDING_RULES, herding, k_center
from lib.select.proxy import Proxy, embeddings
from lib.system.errors import CompanionError


def points(n=30, d=4, seed=0):
    return torch.randn(n, d, generator=generator(seed)).double()


def slow_herding(features, budget, rule):
    mean, picked = features.mean(0), []
    for t in range(budget):
        total = sum((features[i] for i in picked), torch.zeros_like(mean))
        rest = [i for i in range(len(features)) if i not in picked]
        if rule == "icarl":
            picked.append(min(rest, key=lambda i: ((t + 1) * mean - total - features[i]).norm()))
        elif rule == "deepcore":
            picked.append(max(rest, key=lambda i: ((t + 1) * mean - total - features[i]).norm()))
        else:
            picked.append(max(rest, key=lambda i: features[i] @ ((t + 1) * mean - total)))
    return picked


@pytest.mark.parametrize("rule", HERDING_RULES)
def test_herding_by_its_definition(rule):
    for seed in range(3):
        assert herding(points(12, seed=seed), 8, rule).tolist() == slow_herding(
            points(12, seed=seed), 8, rule
        )


@pytest.mark.parametrize(
    "pick", [lambda f, k: herding(f, k), lambda f, k: k_center(f, k, 3)], ids=["herding", "k_center"]
)
def test_budgets_prefixes_and_duplicates(pick):
    features = points()
    everything = pick(features, 30)
    assert sorted(everything.tolist()) == list(range(30))
    for k in (1, 4, 29):
        assert torch.equal(pick(features, k), everything[:k])
    twins = points(5).repeat(4, 1)  # equal points are different images
    assert sorted(pick(twins, 20).tolist()) == list(range(20))


def test_herding_follows_the_mean():
    features = points(200, 8)
    order, mean = herding(features, 200), features.mean(0)
    errors = (features[order].cumsum(0) / torch.arange(1, 201)[:, None] - mean).norm(dim=1)
    assert errors[-1] < 1e-12
    steps = torch.arange(1, 101)
    assert (errors[:100] * steps).max() < 2 * features.norm(dim=1).max()  # O(1 / t)
    random = torch.stack(
        [
            (features[torch.randperm(200, generator=generator(s))[:20]].mean(0) - mean).norm()
            for s in range(50)
        ]
    )
    assert errors[19] < 0.25 * random.mean()
    outliers = herding(features, 20, "deepcore")
    assert (features[outliers] - mean).norm(dim=1).mean() > (features - mean).norm(dim=1).mean()


def test_selections_do_not_depend_on_the_order_of_the_images():
    features, order = points(), torch.randperm(30, generator=generator(5))
    for rule in HERDING_RULES:
        assert torch.equal(order[herding(features[order], 10, rule)], herding(features, 10, rule))
    first = int((order == 7).nonzero())
    assert torch.equal(order[k_center(features[order], 10, first)], k_center(features, 10, 7))


def radius(features, centers):
    return torch.cdist(features, features[list(centers)]).amin(1).max()


def test_k_center_covers_within_twice_the_optimum():
    for seed in range(6):
        features = points(10, 2, seed)
        for k in (1, 2, 3, 4):
            best = min(radius(features, c) for c in itertools.combinations(range(10), k))
            for first in (0, 4):
                assert radius(features, k_center(features, k, first).tolist()) <= 2 * best + 1e-12


def test_k_center_takes_the_farthest_point():
    features = points()
    order = k_center(features, 10, 2).tolist()
    assert order[0] == 2
    for k in range(1, 10):
        nearest = torch.cdist(features, features[order[:k]]).amin(1)
        assert order[k] == int(nearest.argmax())
    radii = [radius(features, order[:k]) for k in range(1, 11)]
    assert all(a >= b for a, b in itertools.pairwise(radii))


def test_k_center_goes_on_from_given_centers():
    features = points()
    whole = k_center(features, 10, 2)
    assert torch.equal(k_center(features, 10, already_selected=whole[:4].tolist()), whole)
    given = k_center(features, 6, already_selected=[5, 9])
    assert given[:2].tolist() == [5, 9] and len(set(given.tolist())) == 6


@pytest.mark.parametrize("budget", [0, -1, 31])
def test_wrong_budgets(budget):
    for pick in (herding, k_center):
        with pytest.raises(
            CompanionError, match=f"a selection of {budget} is not allowed: there are 1 to 30 images"
        ):
            pick(points(), budget)


def test_unknown_rule():
    with pytest.raises(CompanionError, match="herding rule 'argmax'.*allowed: deepcore, icarl, welling"):
        herding(points(), 2, "argmax")


# -- as methods ---------------------------------------------------------------------------------------------------------

SMALL = Proxy("convnet-d2-w4", epochs=2)
METHODS = [
    RandomReal(), Herding(proxy=SMALL), KCenter(proxy=SMALL), Herding(features="pixels"),
    KCenter(features="random", proxy=Proxy("mlp")),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__} {getattr(m, 'features', '')}")
def test_the_set_holds_the_images_it_points_at(toy, method):
    run = distill(method, toy.train, 5, 3)
    s = run.synset
    assert s.indices.shape == (15,) and s.indices.unique().numel() == 15
    assert torch.equal(s.codes, toy.train.images[s.indices]) and torch.equal(
        s.labels, toy.train.labels[s.indices]
    )
    assert s.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.equal(distill(method, toy.train, 5, 3).synset.indices, s.indices)
    assert sorted(distill(method, toy.train, 20, 3).synset.indices.tolist()) == list(range(60))


def test_random_draws_are_uniform_and_differ(toy):
    counts = torch.zeros(60)
    for seed in range(200):
        counts[distill(RandomReal(), toy.train, 5, seed).synset.indices] += 1
    assert counts.sum() == 3000 and (counts - 50).abs().max() < 4.5 * (200 * 0.25 * 0.75) ** 0.5


def test_class_by_class_equals_each_class_alone(toy):
    s = distill(Herding(features="pixels"), toy.train, 4, 0).synset
    for c in range(3):
        rows = (toy.train.labels == c).nonzero().flatten()
        want = rows[herding(toy.train.images[rows].flatten(1), 4)]
        assert torch.equal(s.indices.view(3, 4)[c], want)


def test_k_center_starts_depend_on_the_seed(toy):
    starts = {
        distill(KCenter(features="pixels"), toy.train, 1, seed).synset.indices[0].item() for seed in range(8)
    }
    assert len(starts) > 2


@pytest.mark.parametrize("method", [Herding(proxy=SMALL), KCenter(proxy=SMALL)], ids=["herding", "k_center"])
def test_a_warm_cache_changes_nothing(toy, method, monkeypatch):
    cold = distill(method, toy.train, 3, 1).synset.indices
    monkeypatch.setattr(proxy, "sgd_steps", lambda *_, **__: pytest.fail("the proxy was trained again"))
    assert torch.equal(distill(method, toy.train, 3, 1).synset.indices, cold)
    for other in ({"epochs": 3}, {"network": "convnet-d2-w8"}):
        with pytest.raises(pytest.fail.Exception, match="again"):
            distill(type(method)(proxy=replace(SMALL, **other)), toy.train, 3, 1)


def test_proxy_features_separate_the_classes_better_than_random_ones(toy):
    def between_over_within(kind, epochs):
        e = embeddings(toy.train, kind, Proxy("convnet-d2-w8", epochs), generator(0))
        means = torch.stack([e[toy.train.labels == c].mean(0) for c in range(3)])
        return means.var(0).sum() / sum(e[toy.train.labels == c].var(0).sum() for c in range(3))

    assert between_over_within("proxy", 10) > 2 * between_over_within("random", 0)


def test_random_images_of_a_part_of_the_data(toy):
    quarter = distill(RandomReal(fraction=0.25), toy.train, 1, 0).synset
    assert torch.bincount(quarter.labels).tolist() == [5, 5, 5] and quarter.indices.unique().numel() == 15
    free = distill(RandomReal(balanced=False), toy.train, 4, 0).synset
    assert len(free.indices.unique()) == 12 and torch.bincount(free.labels).tolist() != [4, 4, 4]
    whole = distill(RandomReal(fraction=1.0), toy.train, 1, 0).synset
    assert sorted(whole.indices.tolist()) == list(range(60))


def test_unknown_features(toy):
    with pytest.raises(CompanionError, match="unknown features 'pixel' .did you mean 'pixels'"):
        distill(Herding(features="pixel"), toy.train, 2, 0)
