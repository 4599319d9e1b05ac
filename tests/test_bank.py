"""The bank of partly trained networks: which snapshots it keeps, what a step looks at, and that a run goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator
from test_distill import interrupted, same

from lib.distill import distill
from lib.methods import recipes
from lib.methods.dm import DM
from lib.methods.itgan import ITGAN
from lib.nets.bank import Bank
from lib.nets.experts import Experts
from lib.nets.flat import flatten, logits, template
from lib.nets.generators import LayeredVAE
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
RUNS = Experts(2, lr=0.05, momentum=0.9, batch=16, epochs=6, augmentation="none")
ALL = Bank(RUNS, least=0.0)


def flat(network):
    return flatten({name: p[None] for name, p in network.named_parameters()})[0]


def test_it_keeps_the_snapshots_within_its_bounds(toy):
    like, weights = template(NET, toy.train), RUNS.record(NET, toy.train, 6).flatten(0, 1)
    right = logits(like, weights, toy.train.images[None]).argmax(2) == toy.train.labels
    percents = 100 * right.float().mean(1)
    everything = ALL.begin(NET, toy.train, generator())
    assert len(everything.weights) == 2 * 7
    torch.testing.assert_close(everything.percents, percents)
    middle = float(percents.median())
    above, below = (
        replace(ALL, **bound).begin(NET, toy.train, generator())
        for bound in ({"least": middle}, {"most": middle})
    )
    assert torch.equal(above.weights, weights[percents >= middle])
    assert torch.equal(below.weights, weights[percents <= middle])
    assert 0 < len(above.weights) < 14


def test_the_snapshots_are_judged_once_for_all_sets(toy, monkeypatch):
    """Bounds are looked at afterwards; another number of judges asks anew."""
    calls, judge = [], Bank.accuracies
    monkeypatch.setattr(
        Bank, "accuracies", lambda self, *given: calls.append(self.judges) or judge(self, *given)
    )
    bank = replace(ALL, judges=17)
    first, second = (bank.begin(NET, toy.train, generator(k)) for k in range(2))
    assert torch.equal(first.percents, second.percents) and calls == [17]
    replace(bank, most=float(first.percents.max())).begin(NET, toy.train, generator())
    assert calls == [17]
    replace(bank, judges=18).begin(NET, toy.train, generator())
    assert calls == [17, 18]


def test_a_step_looks_at_any_of_them_and_trains_none(toy):
    memory, g = ALL.begin(NET, toy.train, generator()), generator(3)
    kept, counts = memory.weights.clone(), torch.zeros(14)
    for _ in range(700):
        network = ALL.draw(memory, g)
        (which,) = (memory.weights == flat(network)).all(1).nonzero()[:, 0]
        counts[which] += 1
        assert memory.percent == memory.percents[which]
    expected = 700 / 14
    assert ((counts - expected).square() / expected).sum() < 34.5  # chi squared of 13 degrees, 0.1 %
    assert not any(p.requires_grad for p in network.parameters())
    method = DM(iterations=3, real_batch=8, network=NET, networks=ALL)
    state = method.begin(toy.train, 1, generator())
    for _ in range(3):
        method.step(state, generator(4))
    assert torch.equal(state.supply.weights, kept)


@pytest.mark.filterwarnings("ignore:the prior .* has collapsed")  # six steps of training
def test_a_run_with_a_bank_goes_on_bit_for_bit(toy, tmp_path):
    method = ITGAN(
        LayeredVAE(steps=6, lr=0.01, batch=30, latent=6, width=8), 6, lr=0.05, batch=None, real_batch=8, network=NET,
        networks=ALL, inversion="none", augmentation="none",
    )  # fmt: skip
    path, calm = tmp_path / "a.checkpoint", distill(method, toy.train, 2, 7)
    interrupted(method, toy.train, path, 4)
    same(distill(method, toy.train, 2, 7, checkpoint=path), calm)


def test_bounds_that_no_snapshot_meets_are_told(toy):
    with pytest.raises(
        CompanionError, match="no snapshot of convnet-d2-w4 has 0 to 0 % .* allowed are bounds around"
    ):
        replace(ALL, most=0.0).begin(NET, toy.train, generator())
    with pytest.raises(CompanionError, match="0 <= least <= most <= 100"):
        Bank(least=80.0, most=70.0)
    with pytest.raises(CompanionError, match="judges must be a whole number of at least 1, not 0"):
        Bank(judges=0)
    with pytest.raises(CompanionError, match="a bank needs Experts"):
        Bank(Experts(3))
    with pytest.raises(CompanionError, match="running statistics"):
        ALL.begin("convnet-d2-w4-batch", toy.train, generator())


def test_the_released_banks_are_recipes():
    of = recipes("itgan")
    for data, ipc, least in (("cifar10", 5000, 70.0), ("cifar100", 500, 40.0)):
        banked, plain = of.named(data, ipc, "bank").method, of.named(data, ipc, "").method
        assert (banked.networks.least, banked.networks.most) == (least, 100.0)
        assert replace(banked, networks=plain.networks) == plain
        assert banked.networks.experts.count * banked.networks.experts.epochs == 5000
