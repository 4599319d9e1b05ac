"""WassersteinDM: DM where a distance reduces to it, the bounds of the dual, resume, and what it refuses."""

from __future__ import annotations

import builtins
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import generator
from scipy.optimize import linear_sum_assignment
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill, read_checkpoint
from lib.match import features, mmd, points, transport
from lib.match.distance import At, Distance, Look, Sum
from lib.match.features import ClassMean
from lib.match.points import Critic, Sinkhorn, Sliced, Wasserstein, values
from lib.methods.dm import DM
from lib.methods.wasserstein import DISTANCES, WassersteinDM
from lib.nets.supply import Fresh
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
PLAIN = {"iterations": 5, "real_batch": 8, "network": NET}
SMALL = WassersteinDM(**PLAIN)
OURS = DISTANCES | {"sliced": Sliced(projections=16)}
CRITIC = Critic("mlp", lr=1e-3, steps=2, first=(2, 4))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def of(distance: str | Distance, **options) -> WassersteinDM:
    distance = OURS[distance] if isinstance(distance, str) else distance
    return replace(SMALL, distance=distance, **options)


def between(distance: Distance, real: torch.Tensor, syn: torch.Tensor) -> torch.Tensor:
    """Its one term on these points."""
    (value,) = distance.between(Look.of(real), Look.of(syn), At(generator=generator())).values()
    return value


# -- DM as a special case ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "data"])
def test_the_distance_of_the_means_is_dm_bit_for_bit(toy, augmentation):
    ours = distill(of("mean", augmentation=augmentation), toy.train, 2, 5)
    theirs = distill(DM(**PLAIN, augmentation=augmentation), toy.train, 2, 5)
    assert torch.equal(ours.synset.codes, theirs.synset.codes)
    assert ours.history.keys() == {"loss"} and torch.equal(ours.history["loss"], theirs.history["loss"])


def test_one_image_per_class_moves_as_under_dm(toy):
    """$W_2^2(\\delta_s, \\nu)$ is DM's distance and the spread of the real batch: another value, the same gradient."""
    ours, theirs = distill(of("w2"), toy.train, 1, 5), distill(DM(**PLAIN), toy.train, 1, 5)
    torch.testing.assert_close(ours.synset.codes, theirs.synset.codes, rtol=1e-4, atol=1e-4)
    assert (ours.history["loss"] > theirs.history["loss"] + 0.1).all()
    start = toy.train.sample(1, generator(5)).flatten(0, 1)
    assert (ours.synset.codes - start).abs().max() > 1e-2
    # with two images the plan tells them apart
    ours, theirs = distill(of("w2"), toy.train, 2, 5), distill(DM(**PLAIN), toy.train, 2, 5)
    assert (ours.synset.codes - theirs.synset.codes).abs().max() > 1e-2


def test_a_large_epsilon_is_dm_and_a_small_one_exact(toy):
    far, mean = (distill(m, toy.train, 2, 5).synset.codes for m in (of(Sinkhorn(epsilon=1e4)), of("mean")))
    torch.testing.assert_close(far, mean, rtol=0, atol=2e-3)
    real, syn = randn(3, 4, 3), randn(3, 4, 3, seed=1)
    near, _ = transport.divergence_and_error(real, syn, relative=0.02, sweeps=3000)
    torch.testing.assert_close(near, transport.wasserstein(real, syn), rtol=5e-3, atol=0)
    nearer, _ = transport.divergence_and_error(real, syn, relative=1.0)
    assert (nearer < 0.9 * near).any() and (nearer >= features.class_mean(real, syn)).all()


def test_sliced_along_all_axes_moves_one_image_as_dm(toy, monkeypatch):
    """With an orthonormal basis for the directions, d times the mean over slices is the sum over coordinates."""

    def basis(d, count, generator, like):
        return torch.eye(d)

    monkeypatch.setattr(transport, "directions", basis)
    ours, theirs = distill(of("sliced"), toy.train, 1, 5), distill(DM(**PLAIN), toy.train, 1, 5)
    torch.testing.assert_close(ours.synset.codes, theirs.synset.codes, rtol=1e-4, atol=1e-4)


def test_sliced_stays_below_w2_on_every_direction_and_is_unbiased_for_a_shift():
    distance, real = Sliced(projections=4000), randn(3, 8, 5)
    shifted = between(distance, real, real + 2)
    torch.testing.assert_close(shifted, torch.full((3,), 20.0, dtype=torch.float64), rtol=0.05, atol=0)
    syn = randn(3, 4, 5, seed=1)
    assert (between(distance, real, syn) / 5 <= transport.wasserstein(real, syn)).all()


# -- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["w1", "w2"])
def test_a_step_equals_a_linear_program_per_class(toy, distance):
    """Written out with scipy's solvers; the gradient is that of the cost under their plan."""
    method, p = replace(of(distance), iterations=1, momentum=0.0, augmentation="none"), int(distance[1])
    got = distill(method, toy.train, 2, 5)
    g, loss = generator(5), 0
    x = toy.train.sample(2, g).requires_grad_()
    network = nets.make(NET, toy.train, g)
    real = toy.train.sample(8, g)
    for c in range(3):
        e, s = network.embed(real[c]).detach(), network.embed(x[c])
        squares = (e.unsqueeze(1) - s.unsqueeze(0)).square().sum(-1)  # (8, 2)
        cost = squares if p == 2 else (squares + 1e-12).sqrt()
        rows, columns = linear_sum_assignment(cost.detach().repeat_interleave(4, 1))
        loss = loss + cost[rows, columns // 4].mean()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got.history["loss"][0], loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        got.synset.codes, (x - method.lr * gradient).detach().flatten(0, 1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("distance", [d for d in DISTANCES if d != "critic"])
def test_the_order_of_the_synthetic_images_does_not_matter(distance):
    real, syn = randn(3, 8, 6), randn(3, 4, 6, seed=1)
    order, gradients = torch.tensor([2, 0, 3, 1]), []
    for one in (syn, syn[:, order]):
        leaf = one.clone().requires_grad_()
        value = between(OURS[distance], real, leaf)
        gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
    assert value.shape == (3,) and gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0][:, order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distance", [d for d in DISTANCES if d != "critic"])
def test_a_set_that_equals_the_batch_is_at_rest(toy, distance):
    start = toy.train.sample(20, generator(1)).flatten(0, 1)
    chosen = Sinkhorn(epsilon=1.0) if distance == "sinkhorn" else DISTANCES[distance]
    method = WassersteinDM(iterations=2, network=NET, distance=chosen)
    run = distill(method, toy.train, 20, 1)
    assert run.history["loss"].abs().max() < 2e-3  # squared distances of float32 features of length about 5
    torch.testing.assert_close(run.synset.codes, start, rtol=0, atol=5e-3)


@pytest.mark.parametrize("distance", ["w1", "w2", "sinkhorn", "sliced"])
def test_every_distance_lowers_itself(toy, distance):
    method = replace(
        of(distance), iterations=60, real_batch=20, augmentation="none", lr=5 if distance == "w1" else 1
    )
    loss = distill(method, toy.train, 2, 0).history["loss"]
    assert loss[-10:].mean() < 0.9 * loss[:10].mean()


def test_pooled_and_projected_embeddings(toy):
    network = nets.make(NET, toy.train, generator())
    images = toy.train.sample(4, generator())

    def seen(pool: int) -> torch.Tensor:
        return Wasserstein(pool=pool).observe(Look(network, images, ("pool",)))["points"]

    whole, pooled = seen(0), seen(1)
    assert whole.shape == (3, 4, 16) and pooled.shape == (3, 4, 4)
    torch.testing.assert_close(pooled, whole.unflatten(2, (4, 4)).mean(-1))
    assert torch.equal(seen(2), whole)  # 2 x 2 positions: nothing to pool
    x, y = randn(3, 8, 5), randn(3, 4, 5, seed=1)
    close = {"rtol": 0.1, "atol": 0}  # squared lengths are kept on average
    torch.testing.assert_close(between(Wasserstein(project=4000), x, y), transport.wasserstein(x, y), **close)
    moved = distill(of(Wasserstein(pool=1, project=8)), toy.train, 2, 0).history["loss"]
    assert moved.shape == (5,) and (moved > 0).all()


# -- Sinkhorn ---------------------------------------------------------------------------------------------------------


def test_sinkhorn_that_does_not_converge_is_told_once_with_its_error(toy, tmp_path):
    method = of(Sinkhorn(epsilon=1e-3, sweeps=12))
    with pytest.warns(UserWarning) as told:
        run = distill(method, toy.train, 3, 0, checkpoint=tmp_path / "a", checkpoint_seconds=0.0)
    assert len([w for w in told if "Sinkhorn" in str(w.message)]) == 1
    error = run.history["marginal_error"]
    assert error.shape == (5,) and (error > 1e-4).all()
    assert f"marginal error {error[0].item():.2g} at step 1" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calm = distill(of("sinkhorn"), toy.train, 3, 0)
    assert (calm.history["marginal_error"] <= 1e-4).all() and (calm.history["loss"] > 0).all()


# -- the dual ---------------------------------------------------------------------------------------------------------


def trained_critics(train, penalty):
    """Gap, largest slope between any two of the points, and exact W_1, each (3,)."""
    distance, g = replace(CRITIC, lr=5e-3, penalty=penalty), generator()
    memory = distance.begin(train, g)
    real, syn = train.sample(8, generator(1)), 0.3 * train.sample(4, generator(2)) + 0.5
    for _ in range(100):
        distance.improve(memory, real, syn, g)
    of_real, of_syn = (values(memory.critics, x, fixed=True) for x in (real, syn))
    points, theta = torch.cat([real, syn], 1).flatten(2), torch.cat([of_real, of_syn], 1)
    apart = mmd.distances(points, points) + 1e9 * torch.eye(points.shape[1])
    slope = ((theta.unsqueeze(2) - theta.unsqueeze(1)).abs() / apart).amax((1, 2))
    exact = transport.wasserstein(real.flatten(2), syn.flatten(2), 1)
    return transport.witness_gap(of_real, of_syn), slope, exact


def test_critics_find_the_gap_of_two_sets_but_no_more_than_w1(toy):
    gap, slope, exact = trained_critics(toy.train, 10.0)
    assert (gap / slope <= exact * (1 + 1e-5)).all()  # a 1-Lipschitz function on these points
    assert (gap / slope > 0.4 * exact).all()
    loose_gap, loose_slope, _ = trained_critics(toy.train, 1e-3)
    assert (loose_slope > 3 * slope).all() and (loose_gap / loose_slope <= exact * (1 + 1e-5)).all()


def test_every_critic_sees_its_own_class_alone(toy):
    for critic in ("mlp", "convnet-d2-w4-none-leaky"):
        memory = Critic(critic).begin(toy.train, generator())
        images = toy.train.sample(4, generator())
        all_at_once = values(memory.critics, images)
        assert all_at_once.shape == (3, 4)
        for c in range(3):
            single = memory.critics.network(c)(images[c]).squeeze(-1)
            torch.testing.assert_close(all_at_once[c], single, rtol=1e-5, atol=1e-6)


def test_the_penalty_of_a_linear_critic_of_unit_slope_is_zero(toy):
    distance = Critic("mlp", penalty=1.0)
    memory = distance.begin(toy.train, generator())

    def linear(x):
        return x.flatten(2)[..., 0] * scale

    real, syn = toy.train.sample(4, generator(1)), toy.train.sample(2, generator(2))
    for scale, want in ((1.0, 0.0), (3.0, 12.0)):  # 3 classes x (3 - 1)^2
        memory.optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        memory.critics = _Linear(scale)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(points, "values", lambda critics, x, fixed=False: critics(x))
            penalty = distance.improve(memory, real, syn, generator())
        assert penalty.item() == pytest.approx(want, abs=1e-5)


class _Linear:
    """theta(x) = scale times the first pixel; its weight takes part, so that there is something to learn."""

    def __init__(self, scale):
        self.weight = torch.tensor(scale, requires_grad=True)

    def __call__(self, x):
        return self.weight * x.flatten(2)[..., 0]


def test_the_gap_pulls_the_images_and_leaves_the_critics_alone(toy):
    distance = replace(CRITIC, first=(0, 1), steps=1)
    memory, g = distance.begin(toy.train, generator()), generator(3)
    before = {name: tensor.detach().clone() for name, tensor in memory.critics.parameters.items()}
    syn = toy.train.sample(2, generator(2)).requires_grad_()
    seen = {"pixels": toy.train.sample(4, generator(1))}, {"pixels": syn}
    value = distance.terms(*seen, At(generator=g, memory=memory))["critic"]
    changed = {name: tensor.detach().clone() for name, tensor in memory.critics.parameters.items()}
    assert any(not torch.equal(before[n], changed[n]) for n in before)
    gradients = [None if t.grad is None else t.grad.clone() for t in memory.critics.parameters.values()]
    value.sum().backward()
    assert syn.grad.abs().max() > 0
    for was, tensor in zip(gradients, memory.critics.parameters.values(), strict=True):
        assert (was is None and tensor.grad is None) or torch.equal(was, tensor.grad)


@pytest.mark.parametrize(
    "distance",
    [CRITIC, Sinkhorn(epsilon=1.0), OURS["sliced"], ClassMean() + Sinkhorn(epsilon=1.0) + CRITIC],
    ids=lambda d: type(d).__name__,
)
def test_a_resumed_run_ends_with_the_same_bits(toy, tmp_path, distance):
    """Critics and their optimiser in the middle of a run; in a sum, every part with what it keeps."""
    method, path = replace(of(distance), iterations=25), tmp_path / "checkpoint"
    calm = distill(method, toy.train, 2, 7)
    interrupted(method, toy.train, path, 13)
    kept = read_checkpoint(path)["state"]["compared"]
    if isinstance(distance, Critic):
        assert kept["done"] == 12 and {"weights", "optimiser"} < kept.keys()
    elif isinstance(distance, Sum):
        assert kept.keys() == {"1", "2"} and kept["2"]["done"] == 12
    same(distill(method, toy.train, 2, 7, checkpoint=path), calm)


def test_without_a_look_no_network_is_drawn(toy, monkeypatch):
    drawn = []
    draw = Fresh.draw
    monkeypatch.setattr(Fresh, "draw", lambda *rest: drawn.append(1) or draw(*rest))
    distill(of(CRITIC), toy.train, 2, 0)
    assert drawn == []
    distill(of(ClassMean() + CRITIC), toy.train, 2, 0)
    assert len(drawn) == 5


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Wasserstein(p=3), "order 3 of a Wasserstein distance is not allowed: 1 or 2"),
        (lambda: Sinkhorn(epsilon=0.0), "epsilon 0.0 is not allowed: it must be positive"),
        (lambda: Sinkhorn(epsilon=float("nan")), "epsilon nan is not allowed"),
        (lambda: Critic(penalty=-1.0), "penalty -1.0"),
        (lambda: Sinkhorn(sweeps=0), "sweeps must be a whole number of at least 1, not 0"),
        (lambda: Sliced(projections=1.5), "projections must be a whole number"),
        (lambda: Wasserstein(pool=-1), "pool must be a whole number of at least 0"),
        (lambda: WassersteinDM(distance="w2"), "'w2' is no distance: allowed are those of lib.match"),
    ],
)
def test_mistakes_are_told_in_one_line(make, message):
    with pytest.raises(CompanionError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_pool_that_the_network_does_not_have(toy):
    with pytest.raises(CompanionError, match="pool 3 is larger than the last map.*allowed 0 to 2"):
        distill(of(Wasserstein(pool=3)), toy.train, 1, 0)
    with pytest.raises(CompanionError, match="Wasserstein looks at maps, MLP has none"):
        distill(of(Wasserstein(pool=1), network="mlp"), toy.train, 1, 0)


def test_without_pot_exact_transport_names_the_alternatives(toy, monkeypatch):
    original = builtins.__import__

    def without(name, *rest, **more):
        if name == "ot":
            raise ImportError("No module named 'ot'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompanionError, match="needs the package POT.*without it: sinkhorn, sliced"):
        distill(SMALL, toy.train, 2, 0)
    assert distill(of("sliced"), toy.train, 2, 0).history["loss"].shape == (5,)
