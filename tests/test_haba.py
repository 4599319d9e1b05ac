"""HaBa: its two sides, and that it is MTT where its hallucinators do nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib.distill import distill, learned
from lib.evaluate import evaluate, protocol
from lib.formation import Hallucinators
from lib.match.rendered import Features, Trajectories
from lib.match.supervised_contrast import alike, supcon
from lib.methods.dm import DM
from lib.methods.haba import HaBa
from lib.methods.mtt import MTT
from lib.nets.experts import Experts
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

NET, EXPERTS = "convnet-d2-w4", Experts(2, lr=0.05, batch=16, augmentation="none")
STUDENTS = Trajectories(steps=4, rate=0.05, lr_rate=1e-3, experts=EXPERTS)
QUICK = HaBa(
    iterations=4, hallucinators=3, identity=0.8, objective=STUDENTS, lr=5.0, lr_hallucinators=0.05, lr_extractor=0.05,
    extractor=NET, network=NET, augmentation="none",
)  # fmt: skip


def embeddings(n=6, d=5):
    return [torch.randn(n, d, generator=generator(k), dtype=torch.float64) for k in (0, 1)]


def test_supcon_does_not_care_for_order_and_is_nt_xent_where_all_labels_differ():
    e0, e1 = embeddings()
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(supcon(e0[order], e1[order], y[order]), supcon(e0, e1, y))
    torch.testing.assert_close(supcon(3 * e0, e1 / 2, y), supcon(e0, e1, y))
    s = F.normalize(torch.cat([e0, e1]), dim=1)
    s = (s @ s.T / 0.5).masked_fill(torch.eye(12, dtype=torch.bool), float("-inf"))
    wanted = F.cross_entropy(s, torch.arange(12).roll(6))
    torch.testing.assert_close(supcon(e0, e1, torch.arange(6), 0.5), wanted)


def test_equal_renderings_are_alike_and_both_sides_share_one():
    e0, e1 = embeddings()
    assert alike(e0, e0).item() == pytest.approx(1) and alike(e0, -e0).item() == pytest.approx(0)
    cosine = F.cosine_similarity(e0, e1)
    assert alike(e0, e1).item() + ((1 - cosine) / 2).mean().item() == pytest.approx(1)


def with_equal_losses(plain, haba, train, steps):
    """The states of both after steps of equal loss; the numbers of hallucinators and extractor are drawn when they begin."""
    states = [method.begin(train, 2, generator(0)) for method in (plain, haba)]
    streams = [generator(9), generator(9)]
    for _ in range(steps):
        losses = [m.step(s, g)["loss"] for m, s, g in zip((plain, haba), states, streams, strict=True)]
        torch.testing.assert_close(*losses)
    return states


@pytest.mark.parametrize("gradient", ["bptt", "tesla"])
def test_with_one_hallucinator_that_does_nothing_it_is_mtt(toy, monkeypatch, gradient):
    monkeypatch.setattr(Hallucinators, "render", lambda self, z: z.unsqueeze(0) + 0 * self.scale.sum())
    shared = {"iterations": 5, "lr": 5.0, "network": NET, "augmentation": "none", "batch": 4, "momentum": 0.5}
    student = {
        "steps": 4,
        "rate": 0.05,
        "lr_rate": 1e-3,
        "gradient": gradient,
        "least_rate": 1e-3,
        "experts": EXPERTS,
    }
    plain, driven = MTT(**shared, **student), Trajectories(**student, momentum_rate=0.5)
    haba = HaBa(**shared, objective=driven, hallucinators=1, adversary=False, extractor=NET, identity=1.0)
    states = with_equal_losses(plain, haba, toy.train, 5)
    torch.testing.assert_close(states[0].pixels, states[1].bases)
    torch.testing.assert_close(states[0].rate, states[1].memory.rate)


@pytest.mark.parametrize("m", [1, 3])
def test_with_hallucinators_that_do_nothing_it_is_dm(toy, monkeypatch, m):
    monkeypatch.setattr(Hallucinators, "render", lambda self, z: z.expand(m, *z.shape) + 0 * self.scale.sum())
    shared = {"iterations": 3, "lr": 0.3, "network": NET, "augmentation": "color_crop", "momentum": 0.5}
    plain = DM(**shared, real_batch=8)
    haba = HaBa(**shared, objective=Features(8), hallucinators=m, adversary=False, extractor=NET)
    states = with_equal_losses(plain, haba, toy.train, 3)
    torch.testing.assert_close(states[0].pixels, states[1].bases)


def test_each_side_moves_its_own_numbers(toy, monkeypatch):
    state, g = QUICK.begin(toy.train, 2, generator(0)), generator(1)
    E = [w.detach().clone() for w in state.extractor.parameters.values()]
    monkeypatch.setattr(HaBa, "train_extractor", lambda self, state, generator: torch.zeros(()))
    rate = state.memory.rate
    before = [w.detach().clone() for w in (*learned(state), rate)]
    QUICK.step(state, g)
    assert all(not torch.equal(a, b) for a, b in zip(before, (*learned(state), rate), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(E, state.extractor.parameters.values(), strict=True))
    monkeypatch.undo()
    before = [w.detach().clone() for w in learned(state)]
    QUICK.train_extractor(state, g)
    assert all(torch.equal(a, b) for a, b in zip(before, learned(state), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(E, state.extractor.parameters.values(), strict=True)]
    assert sum(moved) >= len(moved) - 2  # biases before an instance norm have no gradient


def test_the_set_is_bases_with_their_decoder(toy, tmp_path):
    synset = distill(QUICK, toy.train, 2, 0).synset
    assert synset.codes.shape == (6, 1, 8, 8) and synset.images.shape == (18, 1, 8, 8)
    assert synset.bytes_images == 4 * (6 * 64 + 3 * 92)
    assert synset.targets.tolist() == [0, 0, 1, 1, 2, 2] * 3 and synset.step_size.numel() == 1
    found = SyntheticSet.load(synset.save(tmp_path / "set.safetensors"))
    assert torch.equal(found.images, synset.images)
    judged = evaluate(
        [synset, found], toy, protocol("cpu-small", toy.train, network=NET, epochs=2), networks=1
    )
    assert judged.accuracy.shape == (2, 1)


def test_bases_may_have_one_channel():
    from helpers import toy_data

    colour = toy_data(channels=3).train
    synset = distill(replace(QUICK, iterations=1, channels=1), colour, 2, 0).synset
    assert synset.codes.shape == (6, 1, 8, 8) and synset.images.shape == (18, 3, 8, 8)
    assert synset.stored()[0].shape == (18, 3, 8, 8)


@pytest.mark.parametrize("objective", [replace(STUDENTS, steps=2), Features(8)], ids=["MTT", "DM"])
def test_an_interrupted_run_ends_with_the_same_bits(toy, tmp_path, objective):
    method = replace(QUICK, iterations=13, batch=4, objective=objective)
    path, calm = tmp_path / "run.checkpoint", distill(method, toy.train, 2, 7)
    interrupted(method, toy.train, path, 11)
    again = distill(method, toy.train, 2, 7, checkpoint=path)
    same(again, calm)
    assert torch.equal(again.synset.images, calm.synset.images)


def test_an_unknown_way_back_is_one_line():
    with pytest.raises(CompanionError, match="unknown mode of unrolling 'x'"):
        Trajectories(gradient="x")


def test_what_drives_it_decides_whether_a_rate_is_learned(toy):
    synset = distill(replace(QUICK, objective=Features(8), lr=0.2), toy.train, 2, 0).synset
    assert synset.step_size is None and synset.images.shape == (18, 1, 8, 8)
    assert distill(QUICK, toy.train, 2, 0).synset.step_size.numel() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hallucinators": 1}, "1 hallucinator renders no two images of a base: allowed 2 or more"),
        ({"identity": 1.5}, "identity 1.5 of hallucinators: allowed 0 to 1"),
        ({"batch": 7}, "batch 7 of a student: there are 6 bases"),
        ({"init": "mix"}, "unknown init 'mix'"),
        ({"network": "convnet-d2-w4-batch"}, "keeps running statistics"),
    ],
)
def test_wrong_settings_are_one_line(toy, change, said):
    with pytest.raises(CompanionError, match=said) as caught:
        replace(QUICK, **change).begin(toy.train, 2, generator(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"rate": 0.0}, "rate 0.0 is not allowed"),
        ({"experts": Experts(2, epochs=2)}, "experts of 2 epochs, but epoch 3 is read: allowed 3 or more"),
    ],
)
def test_wrong_students_are_one_line(toy, change, said):
    with pytest.raises(CompanionError, match=said) as caught:
        replace(QUICK, objective=replace(STUDENTS, **change)).begin(toy.train, 2, generator(0))
    assert "\n" not in str(caught.value)
