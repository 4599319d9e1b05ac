"""MTT: what a step draws, learns and refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers import generator
from test_distill import interrupted, same

from lib.distill import distill
from lib.match.trajectory import chunks, keep_above, relative_distance, segment
from lib.match.unroll import Step, walk
from lib.methods import mtt
from lib.methods.mtt import MTT
from lib.nets.experts import Experts
from lib.plain import plain
from lib.system.errors import CompanionError

QUICK = MTT(
    iterations=6, steps=5, lr=10.0, rate=0.05, lr_rate=1e-3, network="convnet-d2-w4", augmentation="none",
    experts=Experts(2, lr=0.05, batch=16, augmentation="none"),
)  # fmt: skip


def begun(method, toy, ipc=2):
    return method.begin(toy.train, ipc, generator(1))


def test_the_loss_falls_and_the_rate_is_learned(toy):
    run = distill(replace(QUICK, iterations=20), toy.train, 1, 0)
    loss = run.history["loss"]
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()
    assert run.synset.step_size.item() == run.history["rate"][-1].item() != pytest.approx(0.05, abs=1e-4)
    assert run.synset.labels.tolist() == [0, 1, 2]


def test_exact_ways_agree_and_tesla_differs(toy):
    ways = {g: distill(replace(QUICK, gradient=g), toy.train, 2, 0) for g in ("bptt", "recompute", "tesla")}
    torch.testing.assert_close(
        ways["bptt"].synset.codes, ways["recompute"].synset.codes, rtol=1e-4, atol=1e-4
    )
    assert (ways["bptt"].synset.codes - ways["tesla"].synset.codes).abs().max() > 1e-3
    assert ways["bptt"].history["loss"][0] == pytest.approx(ways["tesla"].history["loss"][0].item(), rel=1e-5)


def test_the_learned_rate_is_the_plain_versions(toy):
    synset = distill(QUICK, toy.train, 2, 5).synset
    rates = []
    clamp = torch.Tensor.clamp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clamp", lambda x, **bound: rates.append(x) or clamp(x, **bound))
        plain("mtt")(QUICK, toy.train, 2, generator(5))
    assert rates[-1].item() == pytest.approx(synset.step_size.item(), rel=1e-4)


def test_experts_come_in_passes_from_epochs_below_the_bound(toy, monkeypatch):
    method = replace(QUICK, start_epochs=3, experts=replace(QUICK.experts, count=3))
    state, g = begun(method, toy), generator(0)
    assert state.experts.shape[:2] == (3, method.reach + 1) and method.reach == 4
    starts = []
    for _ in range(12):
        start, target = segment(state, 3, 2, g)
        ((k, t),) = (state.experts == start[0]).all(2).nonzero().tolist()
        assert torch.equal(target[0], state.experts[k, t + 2])
        starts.append((k, t))
    assert all({k for k, _ in starts[i : i + 3]} == {0, 1, 2} for i in range(0, 12, 3))
    assert {t for _, t in starts} == {0, 1, 2}


def test_the_short_chunk_of_a_permutation_comes_first():
    rows = list(chunks(10, 4, 6, generator(0)))
    assert [len(r) for r in rows] == [2, 4, 4, 2, 4, 4]
    assert sorted(torch.cat(rows[:3]).tolist()) == list(range(10)) == sorted(torch.cat(rows[3:]).tolist())
    assert [len(r) for r in chunks(5, None, 2, generator(0))] == [5, 5]


def test_the_experts_own_batches_lead_where_it_went(toy):
    """S = the training data in the expert's own batches, N = all its steps: the student ends where the expert did."""
    train, experts = toy.train, replace(QUICK.experts, count=1, batch=len(toy.train))
    method = replace(QUICK, experts=experts, rate=0.05)
    buffer = experts.record(method.network, train, 2)
    state = begun(method, toy)
    steps = [Step(train.images, train.labels, torch.tensor(0.05))] * 2
    end = walk(state.template, buffer[:, 0], steps).end
    assert relative_distance(end, buffer[:, 0], buffer[:, 2])[0].item() < 1e-6


def test_soft_labels_are_the_targets(toy):
    method = replace(QUICK, soft_labels=True, iterations=1)
    state, g = begun(method, toy), generator(3)
    before = state.pixels.detach().clone()
    kept = g.get_state()
    method.step(state, g)
    again = generator(0)
    again.set_state(kept)
    state.deck = []
    _, target = segment(state, method.start_epochs, method.expert_epochs, again)
    torch.testing.assert_close(state.labels, mtt.expert_labels(state.template, target, before))
    assert method.finish(state).soft and state.labels.sum(1).allclose(torch.ones(6))


def test_a_rate_that_would_vanish_is_kept_and_said_once():
    rates = [torch.tensor(value) for value in (-1.0, 0.1, 0.7)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for rate in rates:
            keep_above(rate, 0.5)
    assert [str(w.message) for w in said] == ["the learned rate fell below 0.5 and is kept there"]
    assert [rate.item() for rate in rates] == pytest.approx([0.5, 0.5, 0.7])


def test_an_interrupted_run_ends_with_the_same_bits(toy, tmp_path):
    method = replace(QUICK, batch=4, augmentation="data", soft_labels=True, iterations=14)
    path, calm = tmp_path / "run.checkpoint", distill(method, toy.train, 2, 7)
    interrupted(method, toy.train, path, 12)
    same(distill(method, toy.train, 2, 7, checkpoint=path), calm)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"start_epochs": 0}, "start_epochs must be"),
        ({"gradient": "exact"}, "unknown mode of unrolling 'exact'"),
        ({"expert_epochs": 0}, "expert_epochs must be"),
        ({"rate": -0.1}, "rate -0.1 is not allowed"),
        ({"least_rate": 0.0}, "least_rate 0.0 is not allowed"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"batch": 7}, "batch 7 of a student: S has 6 images, allowed 1 to 6"),
        ({"experts": Experts(2, epochs=2)}, "experts of 2 epochs, but epoch 3 is read"),
        ({"network": "convnet-d2-w4-batch"}, "keeps running statistics"),
    ],
)
def test_wrong_settings_are_one_line(toy, change, said):
    with pytest.raises(CompanionError, match=said) as caught:
        begun(replace(QUICK, **change), toy)
    assert "\n" not in str(caught.value)
