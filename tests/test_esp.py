"""ESP: the subspace, its projected step, and what a step learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib.distill import distill
from lib.match.subspace import Subspace, spectrum
from lib.match.unroll import gradient
from lib.methods.esp import ESP
from lib.nets.experts import Experts
from lib.nets.flat import draw, logits, template
from lib.system.errors import CompanionError

QUICK = ESP(
    iterations=12, window=3, start_epochs=2, reset=4, eta=0.1, lr=0.03, real_batch=20, network="convnet-d2-w4",
    augmentation="none", experts=Experts(2, lr=0.05, batch=16, augmentation="none"),
)  # fmt: skip


def points(count=5, size=40, seed=0):
    return torch.randn(count, size, generator=generator(seed), dtype=torch.float64).cumsum(0)


def test_the_basis_is_orthonormal_and_the_projection_is_one():
    way = points()
    P, v = Subspace.through(way), points(1, seed=3)[0]
    torch.testing.assert_close(P.basis.T @ P.basis, torch.eye(P.rank, dtype=torch.float64))
    assert P.rank == 4
    torch.testing.assert_close(P.project_point(P.project_point(v)), P.project_point(v))
    torch.testing.assert_close(P.project_point(way), way)  # nothing was cut
    left = torch.linalg.svd((way[1:] - way[0]).T, full_matrices=False).U
    torch.testing.assert_close(P.basis @ P.basis.T, left @ left.T)  # the same span


def test_the_span_does_not_depend_on_how_it_is_spanned():
    way = points()
    A = torch.randn(4, 4, generator=generator(1), dtype=torch.float64)
    other = torch.cat([way[:1], way[0] + A @ (way[1:] - way[0])])
    P, Q = Subspace.through(way, cut=0.0), Subspace.through(other, cut=0.0)
    torch.testing.assert_close(P.basis @ P.basis.T, Q.basis @ Q.basis.T)


def test_small_directions_are_cut_and_layers_have_their_own():
    way = points()
    way[2] = way[0] + 2 * (way[1] - way[0]) + 1e-4 * (way[2] - way[0])
    assert Subspace.through(way).rank == 3 and Subspace.through(way, cut=0.0).rank == 4
    values = spectrum(way)
    assert values.shape == (4,) and bool((values.diff() <= 0).all()) and values[-1] < 1e-4 * values[0]
    layered = Subspace.through(points(), blocks=[10, 30])
    assert layered.rank == 8 and layered.basis[:10, 4:].abs().max() == 0
    with pytest.raises(CompanionError, match="through 1 points: at least 2"):
        Subspace.through(way[:1])


@pytest.mark.parametrize("full", [False, True])
def test_the_images_gradient_is_that_through_the_projected_step(toy, full):
    """The formula against automatic differentiation through P; with the whole space it is one-step DD."""
    like = template("convnet-d2-w4-swish", toy.train)
    theta = draw(like, [generator(k) for k in range(4)]).double()
    like, eta = like.double(), 0.3
    P = Subspace.through(theta)
    if full:
        P = Subspace(torch.eye(theta.shape[1], dtype=torch.float64), theta[0])
    x, y = toy.train.images[:9].double(), toy.train.labels[:9]
    S = torch.randn(3, 1, 8, 8, generator=generator(5), dtype=torch.float64).requires_grad_()
    start = theta[:1].clone().requires_grad_()
    _, g_S = gradient(like, start, S[None], torch.arange(3)[None], graph=True)
    projected = P.project_point(start - eta * g_S)
    wanted = torch.autograd.grad(
        F.cross_entropy(logits(like, projected, x[None])[0], y), S, retain_graph=True
    )[0]
    _, g_T = gradient(like, projected.detach().requires_grad_(), x[None], y[None])
    got = torch.autograd.grad(-eta * (P.project_vector(g_S) * g_T).sum(), S, retain_graph=True)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)
    empty = Subspace(P.basis[:, :0], P.reference)
    none = torch.autograd.grad((empty.project_vector(g_S) * g_T).sum(), S)[0]
    assert none.abs().max() == 0


def test_the_student_never_leaves_the_span(toy):
    method = replace(QUICK, reset=100, iterations=30)
    state, g = method.begin(toy.train, 2, generator(0)), generator(1)
    for _ in range(30):
        method.step(state, g)
    P = Subspace(state.basis, state.reference)
    away = state.theta[0] - state.reference
    assert (away - P.project_vector(away)).norm() < 1e-6 * away.norm() and away.norm() > 0


@pytest.mark.parametrize(
    "change", [{}, {"projection": "layer"}, {"projection": "none"}, {"objective": "cos"}, {"objective": "l2"}]
)
def test_every_option_runs_and_differs(toy, change):
    run = distill(replace(QUICK, **change), toy.train, 2, 0)
    assert run.history["loss"].isfinite().all() and run.synset.step_size is None
    inside = run.history["inside"]
    assert bool((inside > 0).all()) and bool((inside < 1).all())
    if change:
        assert not torch.equal(run.synset.codes, distill(QUICK, toy.train, 2, 0).synset.codes)


def test_an_interrupted_run_ends_with_the_same_bits(toy, tmp_path):
    path, calm = tmp_path / "run.checkpoint", distill(QUICK, toy.train, 2, 7)
    interrupted(QUICK, toy.train, path, 11)
    same(distill(QUICK, toy.train, 2, 7, checkpoint=path), calm)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"projection": "all"}, "unknown projection 'all'"),
        ({"objective": "mse"}, "unknown objective 'mse'"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"eta": 0.0}, "eta 0.0 is not allowed"),
        ({"experts": replace(QUICK.experts, epochs=1)}, "experts of 1 epochs, but epoch .* is read"),
        ({"network": "convnet-d2-w4-batch"}, "keeps running statistics"),
    ],
)
def test_wrong_settings_are_one_line(toy, change, said):
    with pytest.raises(CompanionError, match=said) as caught:
        replace(QUICK, **change).begin(toy.train, 2, generator(0))
    assert "\n" not in str(caught.value)
