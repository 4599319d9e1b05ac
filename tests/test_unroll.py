"""Flat networks, the unrolling and its three ways back, and experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data
from torch import nn

from lib import nets
from lib.match import unroll
from lib.match.trajectory import relative_distance
from lib.match.unroll import MODES, Step, walk
from lib.nets import experts as recorder
from lib.nets.ensemble import Ensemble
from lib.nets.experts import Experts
from lib.nets.flat import draw, flatten, logits, template, unflatten
from lib.nets.starts import Fixed, Pretrained, Random
from lib.nets.training import sgd_steps
from lib.system.errors import CompanionError

NET = "convnet-d2-w4-swish"  # smooth, for finite differences
QUICK = Experts(2, lr=0.05, batch=16)


@pytest.fixture(scope="module")
def net():
    return template(NET, toy_data().train).double()


def weights(net, count=1, seed=0):
    return draw(net, [generator(seed + k) for k in range(count)]).double()


def some_steps(count, rate=0.3, n=6, own=None, soft=False, classes=3, seed=0):
    g = generator(seed)
    shape = (n, 1, 8, 8) if own is None else (own, n, 1, 8, 8)
    steps = []
    for _ in range(count):
        images = torch.randn(shape, generator=g, dtype=torch.float64)
        labels = torch.randint(classes, shape[:-3], generator=g)
        if soft:
            labels = torch.randn(*shape[:-3], classes, generator=g, dtype=torch.float64).softmax(-1)
        steps.append(Step(images, labels, torch.tensor(rate * (1 + len(steps)), dtype=torch.float64)))
    return steps


def pulled(net, theta, steps, mode, target):
    run = walk(net, theta, steps, mode)
    loss, u = relative_distance(run.end, theta, target)
    return run, loss, *run.pull(u)


# -- flat networks ----------------------------------------------------------------------------------------------------------


def test_flat_weights_are_the_networks_own_in_its_order():
    train = toy_data().train
    networks = Ensemble.make("convnet-d2-w4", train, [generator(k) for k in range(3)])
    theta = flatten(networks.parameters)
    like = template("convnet-d2-w4", train)
    assert theta.shape == (3, nets.count_parameters(like)) and list(networks.parameters) == list(
        unflatten(theta, like)
    )
    for name, tensor in unflatten(theta, like).items():
        assert torch.equal(tensor, networks.parameters[name])
    x = train.images[:5].unsqueeze(0)
    torch.testing.assert_close(logits(like, theta, x), networks(x))
    one = torch.cat([p.flatten() for p in networks.network(1).parameters()])
    assert torch.equal(theta[1], one) and torch.equal(draw(like, [generator(1)])[0], one)


def test_a_copy_is_no_view():
    networks = Ensemble.make("mlp", toy_data().train, [generator()])
    theta = flatten(networks.parameters)
    with torch.no_grad():
        next(iter(networks.parameters.values())).add_(1)
    assert not torch.equal(theta, flatten(networks.parameters))


def test_weights_of_another_network_are_one_line(net):
    with pytest.raises(CompanionError, match="weights of 5 numbers for a network of") as caught:
        unflatten(torch.zeros(1, 5), net)
    assert "\n" not in str(caught.value)
    with pytest.raises(CompanionError, match="keeps running statistics"):
        template("convnet-d2-w4-batch", toy_data().train)


def test_xavier_has_no_biases_and_its_own_spread():
    like = template("mlp", toy_data(size=16).train)
    parts = unflatten(draw(like, [generator(3)], "xavier"), like)
    first = parts["blocks.0.1.weight"][0]
    assert first.std().item() == pytest.approx((2 / sum(first.shape)) ** 0.5, rel=0.03)
    assert all(t.abs().max() == 0 for name, t in parts.items() if name.endswith("bias"))
    with pytest.raises(CompanionError, match="law of initial weights 'normal'"):
        draw(like, [generator()], "normal")


# -- the three ways back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 2])
@pytest.mark.parametrize("soft", [False, True])
def test_the_reverse_sweep_is_automatic_differentiation(net, own, soft):
    theta, target = weights(net, 2), weights(net, 2, seed=7)
    steps = some_steps(5, own=own, soft=soft)
    exact, swept = (pulled(net, theta, steps, mode, target) for mode in ("bptt", "recompute"))
    torch.testing.assert_close(swept[0].end, exact[0].end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(swept[0].losses, exact[0].losses, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip([*swept[2], swept[3]], [*exact[2], exact[3]], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own", [None, 2])
@pytest.mark.parametrize("mode", ["recompute", "tesla"])
def test_a_step_may_be_taken_in_parts(net, own, mode, monkeypatch):
    """Images too large for one graph: parts of 4 and 2, whose shares of the mean differ."""
    theta, target = weights(net, 2), weights(net, 2, seed=7)
    steps = some_steps(3, own=own)
    whole = pulled(net, theta, steps, mode, target)
    monkeypatch.setattr(unroll, "rows_at_once", lambda *_: 4)
    assert [share for *_, share in unroll.parts(net, *steps[0].batch, 2)] == [4 / 6, 2 / 6]
    in_parts = pulled(net, theta, steps, mode, target)
    torch.testing.assert_close(in_parts[0].end, whole[0].end, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_parts[0].losses, whole[0].losses, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(in_parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_it_is_the_derivative_that_finite_differences_find(net):
    theta, target, steps, eps = weights(net), weights(net, seed=7), some_steps(3), 1e-5

    def loss(images, rates):
        moved = [Step(x, s.labels, r) for x, s, r in zip(images, steps, rates, strict=True)]
        return relative_distance(walk(net, theta, moved, "recompute").end, theta, target)[0].item()

    _, _, dx, drate = pulled(net, theta, steps, "recompute", target)
    images, rates = [s.images for s in steps], [s.rate for s in steps]
    for n in range(3):
        v = torch.randn(images[n].shape, generator=generator(n), dtype=torch.float64)
        up, down = ([x + sign * eps * v if k == n else x for k, x in enumerate(images)] for sign in (1, -1))
        slope = (loss(up, rates) - loss(down, rates)) / (2 * eps)
        assert (dx[n] * v).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-10)
        up, down = ([r + sign * eps if k == n else r for k, r in enumerate(rates)] for sign in (1, -1))
        slope = (loss(images, up) - loss(images, down)) / (2 * eps)
        assert drate[n].item() == pytest.approx(slope, rel=1e-5)


def test_tesla_is_exact_for_one_step_and_worse_with_more_and_larger_ones(net):
    theta, target = weights(net), weights(net, seed=7)

    def cosine(count, rate):
        steps = some_steps(count, rate)
        exact, tesla = (pulled(net, theta, steps, mode, target) for mode in ("bptt", "tesla"))
        torch.testing.assert_close(tesla[1], exact[1], rtol=1e-12, atol=1e-12)  # the loss is the same
        a, b = (torch.cat([d.flatten() for d in found[2]]) for found in (exact, tesla))
        return F.cosine_similarity(a, b, 0).item()

    assert cosine(1, 0.5) == pytest.approx(1, abs=1e-12)
    few, many, large = cosine(4, 0.02), cosine(8, 0.02), cosine(4, 0.2)
    assert 1 - 1e-9 > few > many and few > large


def test_without_steps_or_rates_nothing_moves(net):
    theta, target = weights(net), weights(net, seed=7)
    for mode in MODES:
        run, loss, dx, _ = pulled(net, theta, [], mode, target)
        assert loss.item() == pytest.approx(1, abs=1e-14) and dx == [] and torch.equal(run.end, theta)
        run, loss, dx, drate = pulled(net, theta, some_steps(3, rate=0.0), mode, target)
        assert loss.item() == pytest.approx(1, abs=1e-14) and torch.equal(run.end, theta)
        assert all(d.abs().max() == 0 for d in dx) and drate.abs().max() > 0


def test_the_distance_is_relative():
    start, target, student = (
        torch.randn(2, 9, generator=generator(k), dtype=torch.float64) for k in range(3)
    )
    loss, u = relative_distance(student, start, target)
    scaled, _ = relative_distance(target + 3 * (student - target), target + 3 * (start - target), target)
    torch.testing.assert_close(scaled, loss)
    assert relative_distance(target, start, target)[0].abs().max() == 0
    student.requires_grad_()
    wanted = torch.autograd.grad(relative_distance(student, start, target)[0].sum(), student)[0]
    torch.testing.assert_close(u, wanted)


def test_networks_side_by_side_do_not_see_each_other(net):
    theta, target, steps = weights(net, 3), weights(net, 3, seed=7), some_steps(4)
    _, loss, dx, drate = pulled(net, theta, steps, "recompute", target)
    alone = [pulled(net, theta[k : k + 1], steps, "recompute", target[k : k + 1]) for k in range(3)]
    torch.testing.assert_close(loss, torch.cat([one[1] for one in alone]))
    torch.testing.assert_close(drate, sum(one[3] for one in alone))
    torch.testing.assert_close(dx[0], sum(one[2][0] for one in alone))


def test_the_network_that_lends_its_structure_is_not_touched(net):
    theta, target = weights(net), weights(net, seed=7)
    before = [p.clone() for p in net.parameters()]
    pulled(net, theta, some_steps(3), "bptt", target)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))


def test_wrong_modes_and_rates_are_one_line(net):
    with pytest.raises(CompanionError, match="unknown mode of unrolling 'bppt'.*bptt"):
        walk(net, weights(net), some_steps(1), "bppt")
    with pytest.raises(CompanionError, match="step 0 of 1 has 2 rates"):
        walk(net, weights(net), [replace(some_steps(1)[0], rate=torch.ones(2))])


def test_one_step_reaches_the_optimum_of_a_linear_regression_iff_the_images_are_orthogonal():
    r"""DD, section 3.3: with $X^\top X=\frac M\eta I$ one step solves least squares from every start; with M < D none can."""
    g, D, M, eta = generator(0), 4, 6, 0.7
    q = torch.linalg.qr(torch.randn(M, D, generator=g, dtype=torch.float64)).Q
    X, theta_star = q * (M / eta) ** 0.5, torch.randn(D, generator=g, dtype=torch.float64)
    y = X @ theta_star
    for k in range(3):
        theta = torch.randn(D, generator=generator(k), dtype=torch.float64)
        torch.testing.assert_close(theta - eta / M * X.T @ (X @ theta - y), theta_star)
    assert torch.linalg.matrix_rank(X[: D - 1].T @ X[: D - 1]) < D


# -- experts and starts -----------------------------------------------------------------------------------------------------


def test_experts_are_what_training_gives_and_a_snapshot_is_no_live_weight():
    train = toy_data().train
    buffer = QUICK.record("convnet-d2-w4", train, 3)
    assert buffer.shape[:2] == (2, 4)
    assert all(not torch.equal(buffer[:, t], buffer[:, t + 1]) for t in range(3))
    generators = QUICK.generators(train.device)
    networks = Ensemble.make("convnet-d2-w4", train, generators)
    assert torch.equal(buffer[:, 0], flatten(networks.parameters).detach())
    same = {"epochs": 3, "lr": 0.05, "batch": 16, "augmentation": train.augmentation}
    sgd_steps(networks, train.images[None], train.labels[None], generators, **same)
    torch.testing.assert_close(buffer[:, 3], flatten(networks.parameters).detach())


def test_an_expert_does_not_depend_on_how_many_there_are():
    train = toy_data().train
    two, one = (replace(QUICK, count=n).record("mlp", train, 1) for n in (2, 1))
    torch.testing.assert_close(two[:1], one)
    torch.testing.assert_close(QUICK.last("mlp", train, 1), two[:, 1])


def count_trainings(monkeypatch) -> list:
    calls, real = [], Experts._train
    monkeypatch.setattr(Experts, "_train", lambda self, *a: calls.append(a) or real(self, *a))
    return calls


def test_experts_are_kept_by_content(monkeypatch, tmp_path):
    train, calls = toy_data().train, count_trainings(monkeypatch)
    fast = replace(QUICK, momentum=0.5)  # one file for all epochs
    first = fast.record("mlp", train, 1)
    assert torch.equal(fast.record("mlp", train, 1), first) and len(calls) == 1
    (path,) = (tmp_path / "cache").glob("experts-*.safetensors")
    path.write_bytes(path.read_bytes()[:-20])  # damaged: recorded anew
    assert torch.equal(fast.record("mlp", train, 1), first) and len(calls) == 2
    for other in (("lenet", train, 1), ("mlp", toy_data(seed=3).train, 1), ("mlp", train, 2)):
        fast.record(*other)
    replace(fast, lr=0.02).record("mlp", train, 1)
    assert len(calls) == 6


@pytest.mark.parametrize("law", [{}, {"batch": 7, "augmentation": "data"}, {"weight_decay": 0.1, "count": 9}])
def test_a_longer_trajectory_goes_on_from_a_shorter_one(monkeypatch, law):
    train, calls, experts = toy_data().train, count_trainings(monkeypatch), replace(QUICK, **law)
    monkeypatch.setattr("lib.nets.training.EPOCHS_PER_DRAW", 2)  # the numbers of earlier epochs are drawn again
    at_once = experts._train("mlp", train, tuple(range(6)), None)
    short, longer = (experts.record("mlp", train, reach) for reach in (2, 5))
    assert torch.equal(longer, at_once) and torch.equal(longer[:, :3], short)
    assert [len(call[2]) for call in calls] == [6] + [1] * 6  # each epoch once
    assert torch.equal(replace(experts, epochs=4).record("mlp", train, 1), at_once[:, :5])
    assert torch.equal(experts.last("mlp", train, 3), at_once[:, 3]) and len(calls) == 7


def test_a_full_disk_while_recording_is_one_line(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CompanionError, match="cannot write .*experts.*No space left"):
        QUICK.record("mlp", toy_data().train, 1)


def test_wrong_experts_are_one_line():
    train = toy_data().train
    for change, said in (
        ({"count": 0}, "count must be a whole number"),
        ({"lr": 0.0}, "lr 0.0 is not allowed"),
        ({"law": "normal"}, "law of initial weights 'normal'"),
    ):
        with pytest.raises(CompanionError, match=said):
            replace(QUICK, **change)
    with pytest.raises(CompanionError, match="experts of 2 epochs, but epoch 3 is read: allowed 3 or more"):
        replace(QUICK, epochs=2).record("mlp", train, 3)
    with pytest.raises(CompanionError, match="diverged on toy at learning rate 1e"):
        replace(QUICK, lr=1e30).record("mlp", train, 1)
    assert recorder.SIDE_BY_SIDE > 1


def test_the_rate_of_experts_halves():
    halving = replace(QUICK, lr=0.8, halve_every=2, adam=True)
    assert [halving.rate(e) for e in (0, 1, 2, 3.9, 4)] == [0.8, 0.8, 0.4, 0.4, 0.2]
    assert halving.record("mlp", toy_data().train, 2).isfinite().all()


def test_where_an_unrolling_starts():
    train = toy_data().train
    like = template("mlp", train)
    fixed = Fixed()
    kept = fixed.begin("mlp", train)
    assert torch.equal(fixed.draw(like, kept, 5, generator(0)), fixed.begin("mlp", train, held_out=True))
    new = Random().draw(like, None, 2, generator(0))
    assert new.shape[0] == 2 and not torch.equal(new[0], new[1])
    pool = Pretrained(QUICK, epochs=1)
    mine, others = pool.begin("mlp", train), pool.begin("mlp", train, held_out=True)
    assert mine.shape == others.shape and not torch.equal(mine, others)
    drawn = pool.draw(like, mine, 1, generator(0))
    assert any(torch.equal(drawn[0], row) for row in mine)
    with pytest.raises(CompanionError, match="networks of digits see .*: allowed are data of the same shape"):
        Pretrained(QUICK, 1, source="digits").begin("mlp", train)


def test_a_network_that_is_no_convnet_is_unrolled_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    theta = flatten({name: p.detach().unsqueeze(0) for name, p in net.named_parameters()})
    found = [pulled(net, theta, some_steps(4), mode, theta + 1) for mode in ("bptt", "recompute")]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-10, atol=1e-12)
