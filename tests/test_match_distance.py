"""Distances as values: what a sum of them adds up to, how often it looks, what its parts remember; supplies of networks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import generator
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill
from lib.match.attention import Attention
from lib.match.distance import At, Distance, Look, Sum
from lib.match.features import ClassAware, ClassMean, Discrimination, LayerMeans
from lib.match.mmd import MMD
from lib.match.points import Critic, Sinkhorn, Sliced, Wasserstein
from lib.match.style import Diversity, Gram, Moments
from lib.methods.dm import DM
from lib.nets.supply import Fresh, Queue
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
SMALL = DM(iterations=6, real_batch=8, network=NET, augmentation="none")


@pytest.fixture
def looks(toy):
    """Of real and synthetic images, made anew for every distance."""
    network = nets.make(NET, toy.train, generator(3)).train()
    images = toy.train.sample(8, generator(1)), toy.train.sample(4, generator(2))
    return lambda distance: [Look(network, one, distance.taps) for one in images]


def counted(monkeypatch, network_type) -> list[str]:
    """The passes through networks of that type, by tap; one for the embedding alone taps the pooling."""
    passes = []
    look = network_type.look
    monkeypatch.setattr(network_type, "look", lambda self, x, tap: passes.append(tap) or look(self, x, tap))
    return passes


# -- sums ---------------------------------------------------------------------------------------------------------------


def test_a_sum_has_the_terms_of_its_parts(looks):
    parts = (
        ClassMean(0.5),
        LayerMeans(),
        Discrimination(),
        Gram(10.0),
        Moments(10.0),
        Diversity(),
        Wasserstein(1),
    )
    whole = parts[0] + parts[1] + parts[2] + (parts[3] + parts[4]) + parts[5] + parts[6]
    assert whole.parts == parts and whole == Sum(parts)
    at = At(generator=generator())
    found = whole.between(*looks(whole), at)
    alone = {}
    for part in parts:
        alone |= part.between(*looks(part), at)
    assert found.keys() == alone.keys() and all(value.shape == (3,) for value in found.values())
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value)


def test_terms_of_one_name_are_added(looks):
    once, more = ClassMean(), ClassMean() + MMD("linear", weight=2.0) + ClassMean(0.5)
    (found,) = more.between(*looks(more)).values()
    torch.testing.assert_close(found, 3.5 * once.between(*looks(once))["mean"])


def test_one_pass_per_tap_serves_a_whole_sum(looks, toy, monkeypatch):
    passes = counted(monkeypatch, type(nets.make(NET, toy.train)))
    for distance, want in {
        ClassMean() + MMD() + Diversity(): ["pool"],
        ClassMean() + LayerMeans() + Gram() + Moments() + Attention(): ["act"],
        ClassMean() + Gram(tap="conv") + Moments(tap="conv"): ["conv"],
        ClassMean() + Gram(tap="conv") + Attention() + Wasserstein(pool=1): ["conv", "act", "pool"],
    }.items():
        passes.clear()
        distance.observe(looks(distance)[0])
        assert passes == want


def test_a_method_with_a_sum_names_its_terms_and_moves_as_their_total(toy):
    sum_of_two = replace(SMALL, distance=ClassMean(0.25) + ClassMean(0.75))
    ours, dm = distill(sum_of_two, toy.train, 2, 5), distill(SMALL, toy.train, 2, 5)
    torch.testing.assert_close(ours.synset.codes, dm.synset.codes, rtol=1e-4, atol=1e-5)
    assert ours.history.keys() == {"loss"}  # one name, one term: it is the loss
    two = distill(replace(SMALL, distance=ClassMean() + Gram(10.0)), toy.train, 2, 5).history
    assert two.keys() == {"loss", "mean", "gram"}
    torch.testing.assert_close(two["loss"], two["mean"] + two["gram"])


@dataclass(frozen=True)
class Counting(Distance):
    """ClassMean times the number of the step."""

    name: str = "first"

    def begin(self, train, generator):
        return Counter()

    def terms(self, real, syn, at):
        at.memory.count += 1
        (mean,) = ClassMean().terms(real, syn, at).values()
        return {self.name: at.memory.count * mean}


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, saved):
        self.count = saved["count"]


def test_every_part_of_a_sum_has_a_memory_of_its_own(toy, tmp_path):
    distance = Counting() + ClassMean() + Counting("second")
    memories = distance.begin(toy.train, generator())
    real, syn = (
        {f"{i}.embedding": x for i in range(3)} for x in torch.rand(2, 3, 4, 5, generator=generator())
    )
    for _ in range(2):
        terms = distance.terms(real, syn, At(memory=memories))
    torch.testing.assert_close(terms["first"], 2 * terms["mean"])
    assert memories.state_dict() == {"0": {"count": 2}, "2": {"count": 2}}
    fresh = distance.begin(toy.train, generator())
    fresh.load_state_dict(memories.state_dict())
    assert fresh.state_dict() == memories.state_dict()
    method = replace(SMALL, iterations=25, distance=distance, lr=0.01)
    calm = distill(method, toy.train, 2, 7)
    interrupted(method, toy.train, tmp_path / "a", 13)
    same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / "a"), calm)


def test_a_sum_asks_all_its_parts_before_it_begins(toy):
    for distance, says in (
        (ClassMean() + Attention(layers=(3,)), "attention layers"),
        (Critic() + Wasserstein(pool=3), "pool 3 is larger"),
        (ClassMean() + Diversity(k=2), "k = 2 nearest neighbours with 2 images"),
    ):
        with pytest.raises(CompanionError, match=says):
            distill(replace(SMALL, distance=distance), toy.train, 2)
    with pytest.raises(CompanionError, match="'mean' is no distance"):
        Sum((ClassMean(), "mean"))
    assert not Critic().looks and (ClassMean() + Critic()).looks and not (Critic() + Critic()).looks


# -- supplies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "distance"),
    [
        (Fresh(), ClassMean() + Sliced(projections=4)),
        (Fresh(every=7), ClassMean() + Critic("mlp", steps=1, first=(2, 3))),
        (Queue(4, start=2, interval=3, steps=2, batch=16), ClassMean() + ClassAware(0.1)),
        (
            Queue(3, start=0, interval=4, steps=1, batch=8, meter="reset", reset_every=5),
            Sinkhorn(epsilon=1.0) + ClassAware(),
        ),
    ],
    ids=["fresh", "fresh critic", "queue", "queue reset"],
)
def test_a_run_that_is_cut_in_the_middle_of_a_supply_ends_with_the_same_bits(
    toy, tmp_path, networks, distance
):
    method = replace(SMALL, iterations=25, networks=networks, distance=distance, network=NET + "-batch")
    calm = distill(method, toy.train, 2, 7)
    for at in (5, 12):
        interrupted(method, toy.train, tmp_path / f"{at}", at)
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}"), calm)


def test_networks_of_a_supply_are_frozen_and_differ_by_its_clock(toy):
    for networks in (Fresh(), Fresh(3), Queue(2, start=0, interval=3, steps=0)):
        memory, g, seen = networks.begin(NET, toy.train, generator()), generator(5), []
        for _ in range(6):
            network = networks.draw(memory, g)
            assert not any(weight.requires_grad for weight in network.parameters())
            seen.append(network.classifier.weight.sum().item())
            networks.after(memory, toy.train, g)
        assert len(set(seen)) == (6 if networks == Fresh() else 2)


# -- embeddings alone ----------------------------------------------------------------------------------------------------


def test_a_look_whose_content_is_known_needs_no_network():
    real, syn = torch.rand(2, 3, 4, 5, generator=generator())
    (value,) = ClassMean().between(Look.of(real), Look.of(syn)).values()
    torch.testing.assert_close(value, (real.mean(1) - syn.mean(1)).square().sum(-1))
