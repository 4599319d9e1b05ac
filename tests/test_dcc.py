"""DCC: when it is DC, what the sum over classes changes, and the memory-bounded form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib.analysis import contrast
from lib.distill import distill
from lib.match import contrastive
from lib.match.contrastive import Contrastive, union_gradient
from lib.match.curvature import CurvatureGap
from lib.match.gradient import Cosine, GradientGap, LayerSum, RowCosine, SquaredError, class_gradients
from lib.methods.dc import DC
from lib.methods.dcc import DCC
from lib.methods.dsa import DSA
from lib.nets.ensemble import Ensemble
from lib.select.sampler import Representative
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
LABELS = torch.arange(3)
SOME = {"outer": 3, "inner": 4, "epochs": 2, "real_batch": 8, "network": NET, "lr": 0.5}
SMALL = DCC(**SOME, warm_outer=1, warm_inner=2)


DISTANCES = (RowCosine(), SquaredError(), Cosine(), LayerSum("mse"), LayerSum("l1_mean", "all"))


def network_of(toy, name=NET, seed=1):
    """One network in double precision."""
    one = Ensemble.make(name, toy.train, [generator(seed)])
    return Ensemble(
        one.template,
        {key: tensor.detach().double() for key, tensor in one.parameters.items()},
        {key: tensor.double() for key, tensor in one.buffers.items()},
    )


def measured(gap, networks, real, syn):
    """The loss of all classes, and its gradient."""
    terms, gradient = gap.match(networks, real, syn)
    return terms["gradients"].sum(), gradient


def images(toy, seed=2, syn=2):
    """Real and synthetic images in double precision."""
    g = generator(seed)
    real = toy.train.sample(8, g).double()
    return real, torch.randn(3, syn, *toy.train.shape, generator=g).double()


# -- when it is DC ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "data"])
@pytest.mark.parametrize("warm", [{"warm_outer": 3, "warm_inner": 4}, {"warm_outer": 99, "warm_inner": 99}])
def test_all_warm_up_is_dc_bit_for_bit(toy, augmentation, warm):
    ours = distill(DCC(**SOME, **warm, augmentation=augmentation), toy.train, 2, 3)
    theirs = distill(DC(**SOME, init="real", augmentation=augmentation), toy.train, 2, 3)
    assert torch.equal(ours.synset.codes, theirs.synset.codes)
    assert all(torch.equal(ours.history[name], theirs.history[name]) for name in theirs.history)


def test_augmented_warm_up_is_dsa(toy):
    ours = distill(DCC(**SOME, warm_outer=3, warm_inner=4, augmentation="data"), toy.train, 2, 3)
    assert torch.equal(ours.synset.codes, distill(DSA(**SOME), toy.train, 2, 3).synset.codes)


@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_one_class_is_dc(toy, distance):
    networks, (real, syn) = network_of(toy), images(toy)
    ours = measured(Contrastive(distance), networks, real[:1], syn[:1])
    theirs = measured(distance, networks, real[:1], syn[:1])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("outer", "inner", "pattern"),
    [(1, 2, "ccXX" "XXXX" "XXXX"), (2, 4, "cccc" "cccc" "XXXX"), (0, 9, "X" * 12), (9, 1, "cXXX" * 3), (9, 0, "X" * 12)],
)  # fmt: skip
def test_the_schedule(toy, monkeypatch, outer, inner, pattern):
    """Class-wise (c) while k < W_out and t < W_in, contrastive (X) otherwise."""
    seen = []
    for owner, mark in ((GradientGap, "c"), (Contrastive, "X")):
        original = owner.match
        monkeypatch.setattr(owner, "match", lambda *a, f=original, m=mark: seen.append(m) or f(*a))
    distill(replace(SMALL, warm_outer=outer, warm_inner=inner), toy.train, 1, 0)
    assert "".join(seen) == pattern


def test_the_published_warm_up():
    """At IPC 1 and 10 the switch is purely at network 250; at IPC 50 steps 10 to 49 are contrastive from the start."""
    state = type("At", (), {"ipc": 1, "done": 2499, "t": 9})()
    assert not DCC().contrastive(state)
    state.done, state.t = 2500, 0
    assert DCC().contrastive(state)
    state.ipc, state.done, state.t = 50, 10, 10
    assert DCC().contrastive(state)


# -- what the sum over classes does -------------------------------------------------------------------------------------


def union_and_mean(networks, x):
    tensors = networks.parameters | networks.buffers
    union = union_gradient(networks.template, tensors, x.flatten(0, 1), LABELS.repeat_interleave(x.shape[1]))
    each = class_gradients(networks.template, tensors, x, LABELS)
    return union, [g.mean(0, keepdim=True) for g in each]


def test_the_gradient_of_the_union_is_the_mean_of_the_class_gradients(toy):
    _, syn = images(toy)
    for a, b in zip(*union_and_mean(network_of(toy), syn), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_batch_norm_in_training_mode_breaks_that(toy):
    """Classes seen together have other statistics than alone; with frozen statistics (as used) it holds again."""
    _, syn = images(toy)
    networks = network_of(toy, NET + "-batch")
    pairs = list(zip(*union_and_mean(networks.train(), syn), strict=True))
    assert max((a - b).norm() / b.norm() for a, b in pairs if b.dim() > 2) > 0.1
    for a, b in zip(*union_and_mean(networks.train(False), syn), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_sum_or_mean_is_the_same_to_the_distance(toy):
    networks, (real, syn) = network_of(toy), images(toy)
    ours, theirs = (union_and_mean(networks, x)[0] for x in (syn, real))
    for distance in (RowCosine(), Cosine()):
        mean = distance.between(ours, theirs)
        total = distance.between([3 * g for g in ours], [3 * g for g in theirs])
        torch.testing.assert_close(mean, total, rtol=1e-3, atol=0)
        assert not torch.equal(mean, total)  # the 1e-6 of the denominator
    mse = SquaredError().between
    assert mse([3 * g for g in ours], [3 * g for g in theirs]) > 8 * mse(ours, theirs)


def linear_softmax(features, classes):
    """A linear classifier that says nothing yet (balanced predictions), on vectors ``(C, n, d)``."""
    template = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features, classes)).double()
    return Ensemble(
        template, {name: torch.zeros(1, *p.shape).double() for name, p in template.named_parameters()}, {}
    )


def test_a_feature_that_all_classes_share_cancels(toy):
    r"""At balanced predictions $\sum_c(p-e_c)v^\top=0$: however strong the common part v, DCC does not see it, DC does."""
    g = generator()
    common = torch.randn(1, 1, 1, 1, 6, generator=g).double()
    real, syn = (torch.randn(3, n, 1, 1, 6, generator=g).double() for n in (5, 2))
    networks = linear_softmax(6, 3)
    loss = {
        name: [measured(gap, networks, real + s * common, syn + 2 * s * common)[0] for s in (0, 1, 10)]
        for name, gap in (("DCC", Contrastive()), ("DC", RowCosine()))
    }
    for other in loss["DCC"][1:]:
        torch.testing.assert_close(other, loss["DCC"][0], rtol=1e-9, atol=0)
    assert (
        loss["DC"][0] > 3 * loss["DC"][1] > 9 * loss["DC"][2]
    )  # the common part is matched, and drowns the rest


def test_classes_pull_at_one_another(toy):
    """The gradient on class 0 depends on the images of class 1, contrary to DC."""
    networks, (real, syn) = network_of(toy), images(toy)
    other = syn.clone()
    other[1] += 0.3
    for gap, depends in ((Contrastive(), True), (RowCosine(), False)):
        a, b = (measured(gap, networks, real, x)[1][0] for x in (syn, other))
        assert ((a - b).norm() / a.norm() > 0.01) == depends
        assert depends or torch.equal(a, b)


def test_the_gradient_is_that_of_the_loss(toy):
    """Central differences."""
    networks, (real, syn) = network_of(toy), images(toy)
    direction = torch.randn(syn.shape, generator=generator(4)).double()

    def loss(h):
        return measured(Contrastive(), networks, real, syn + h * direction)[0]

    slope = (measured(Contrastive(), networks, real, syn)[1] * direction).sum()
    torch.testing.assert_close((loss(1e-5) - loss(-1e-5)) / 2e-5, slope, rtol=1e-5, atol=1e-8)


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 7, 12, 50])
@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_part_by_part_is_the_same(toy, rows, distance):
    networks, (real, syn) = network_of(toy), images(toy, syn=4)
    whole = measured(Contrastive(distance), networks, real, syn)
    parts = measured(Contrastive(distance, rows), networks, real, syn)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-7, atol=1e-12)


def test_no_second_order_pass_is_longer_than_asked_for(toy, monkeypatch):
    longest, original = [], contrastive.union_gradient

    def record(template, tensors, x, labels, create_graph=False, total=None):
        longest.append(len(x) if create_graph else 0)
        return original(template, tensors, x, labels, create_graph, total)

    monkeypatch.setattr(contrastive, "union_gradient", record)
    run = distill(replace(SMALL, distance=Contrastive(rows=4), warm_outer=0), toy.train, 3, 1)
    assert max(longest) == 4
    monkeypatch.undo()
    whole = distill(replace(SMALL, warm_outer=0), toy.train, 3, 1)
    torch.testing.assert_close(run.synset.codes, whole.synset.codes, rtol=1e-3, atol=1e-4)


# -- the rest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [NET + "-batch", "mlp"])
def test_other_networks(toy, network):
    run = distill(replace(SMALL, network=network, lr=0.1), toy.train, 2, 0)
    assert run.history["loss"].isfinite().all() and (run.history["loss"] > 0).all()


def test_resume_across_the_end_of_the_warm_up(toy, tmp_path):
    method = replace(SMALL, outer=5, inner=5, warm_outer=3, warm_inner=3, sampler=Representative(every=2))
    calm = distill(method, toy.train, 2, 7, snapshots=(0, 25))
    for at in (11, 22):
        interrupted(method, toy.train, tmp_path / f"{at}", at, snapshots=(0, 25))
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 25)), calm)


def test_it_lowers_its_loss(toy):
    loss = distill(replace(SMALL, outer=120, inner=1, warm_outer=0, lr=1.0), toy.train, 1, 0).history["loss"]
    assert loss[-20:].mean() < 0.9 * loss[:20].mean()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"warm_outer": -1}, "warm_outer must be a whole number of at least 0, not -1"),
        ({"warm_inner": -2}, "warm_inner must be a whole number of at least 0, not -2"),
        (
            {"distance": Contrastive() + CurvatureGap()},
            "the warm-up has the terms gradients, the distance gradients, curvature",
        ),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says):
        distill(replace(SMALL, **wrong), toy.train, 1, 0)


def test_a_second_order_pass_has_an_image():
    with pytest.raises(CompanionError, match="rows must be a whole number of at least 1, not 0"):
        Contrastive(rows=0)


# -- what is measured of it ---------------------------------------------------------------------------------------------


def test_agreement_of_gradients():
    g = torch.randn(4, 50, generator=generator()).double()
    same_ones = contrast.agreement(g, 3 * g)
    assert all(abs(same_ones[name] - 1) < 1e-12 for name in ("class", "mean", "difference"))
    common = 100 * torch.randn(1, 50, generator=generator(1)).double()
    other = torch.randn(4, 50, generator=generator(2)).double()
    drowned, plain = contrast.agreement(g + common, other + common), contrast.agreement(g, other)
    assert drowned["class"] > 0.99 and drowned["mean"] > 0.99  # the common part alone
    torch.testing.assert_close(drowned["difference"], plain["difference"])  # does not see it
    assert abs(drowned["own"] - 0.25) < 0.01 < contrast.agreement(g, g)["own"] - 0.25
    shares = contrast.class_shares(g, other)
    torch.testing.assert_close(shares.sum(1), torch.ones(4).double())
    torch.testing.assert_close(shares[1, 2], (g[1] @ other[2]).abs() / (other @ g[1]).abs().sum())


def test_agreement_in_training_begins_with_the_fresh_network(toy):
    synset = distill(SMALL, toy.train, 2, 0).synset
    got = contrast.agreement_in_training(synset, toy.train, NET, (0, 3), generator(7))
    g = generator(7)
    networks = Ensemble.make(NET, toy.train, [g])
    real, syn = toy.train.sample(20, g), synset.images.unflatten(0, (3, 2))
    vectors = [contrast.gradient_vectors(networks, x) for x in (syn, real)]
    flat = class_gradient_of(networks.network(0), syn[1], 1)
    torch.testing.assert_close(vectors[0][1], flat, rtol=1e-4, atol=1e-6)
    for name, value in contrast.agreement(*vectors).items():
        assert got[name].shape == (2,) and got[name][0] == value != got[name][1]


def class_gradient_of(network, x, c):
    weights = [p for p in network.parameters() if p.dim() > 1]
    loss = F.cross_entropy(network(x), torch.full((len(x),), c))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def test_the_tangent_kernel_written_out(toy):
    networks = Ensemble.make(NET, toy.train, [generator(1)])
    images, network = toy.train.images[:4], networks.network(0)
    rows = []
    for x in images:
        logits = network(x[None])[0]
        each = [
            torch.autograd.grad(z, list(network.parameters()), retain_graph=True, materialize_grads=True)
            for z in logits
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in one]) for one in each]))
    rows = torch.stack(rows)  # (n, C, P)
    torch.testing.assert_close(
        contrast.tangent_kernel(networks, images),
        torch.einsum("ikp,jkp->ij", rows, rows),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_kernel_rests_while_nothing_is_learned(toy):
    images, labels = toy.train.images[:6], toy.train.labels[:6]
    still, moving = (
        contrast.kernel_velocity(
            images, labels, toy.train, NET, toy.test.images[:5], (0, 2, 5), generator(), lr=lr
        )
        for lr in (0.0, 0.1)
    )
    assert still.shape == (2,) and still.max() < 1e-6 < 1e-4 < moving.min()
