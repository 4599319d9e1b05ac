"""Selection functions: identities of the gradients, greedy optimisers against slow references, closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import full_hessian
from helpers import generator
from torch import Tensor

from lib.select import gradmatch, pair_cost, scores, similarity, submodular
from lib.select.last_layer import LastLayer, batch_scale
from lib.select.subset import class_budgets
from lib.system.errors import CompanionError


def samples(n: int = 30, classes: int = 4, width: int = 5, seed: int = 0, **options) -> LastLayer:
    g = generator(seed)
    logits = 2 * torch.randn(n, classes, generator=g, dtype=torch.float64)
    embeddings = torch.randn(n, width, generator=g, dtype=torch.float64)
    return LastLayer(logits, embeddings, torch.randint(classes, (n,), generator=g), **options)


def points(n: int = 30, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=generator(seed), dtype=torch.float64)


def cosine_kernel(n: int = 30, seed: int = 0) -> similarity.Pairwise:
    return similarity.cosine(similarity.linear(points(n, seed=seed)))


def facility(kernel: similarity.Pairwise, chosen) -> float:
    return float(kernel.matrix()[:, list(chosen)].amax(1).sum())


# Gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_and_hessian_diagonals_equal_autograd():
    g = generator(1)
    w, b = torch.randn(3, 4, generator=g).double(), torch.randn(3, generator=g).double()
    h, labels = torch.randn(6, 4, generator=g).double(), torch.randint(3, (6,), generator=g)
    last = LastLayer(h @ w.T + b, h, labels)

    def loss(theta: Tensor, i: int) -> Tensor:
        return F.cross_entropy(h[i] @ theta[3:].view(3, 4).T + theta[:3], labels[i])

    theta = torch.cat([b, w.flatten()])
    gradients = torch.stack([torch.func.grad(loss)(theta, i) for i in range(6)])
    hessians = torch.stack([torch.func.hessian(loss)(theta, i) for i in range(6)])
    torch.testing.assert_close(last.gradients(), gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        last.diagonal_hessians(), hessians.diagonal(dim1=1, dim2=2), rtol=1e-10, atol=1e-12
    )
    want = torch.linalg.eigvalsh(hessians.mean(0))
    torch.testing.assert_close(torch.linalg.eigvalsh(full_hessian(last)), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, batch_scale(30, 8)])
def test_gram_identity_equals_the_gradients_written_out(scale):
    last = samples(scale=scale)
    explicit = last.gradients()
    gram = last.gram()
    torch.testing.assert_close(gram.matrix(), explicit @ explicit.T)
    torch.testing.assert_close(gram.diagonal, explicit.square().sum(1))
    torch.testing.assert_close(last.norms(), explicit.norm(dim=1))
    torch.testing.assert_close(last.mean(), explicit.mean(0))
    direction = points(1, explicit.shape[1])[0]
    torch.testing.assert_close(last.project(direction), explicit @ direction)
    hessians = last.diagonal_hessians()
    order = hessians.var(0, correction=0).argsort(descending=True)[:7]
    torch.testing.assert_close(pair_cost.curvature_coordinates(last, 7), order)
    torch.testing.assert_close(pair_cost.diagonal_hessian_at(last, order), hessians[:, order])
    variance = pair_cost.gradient_variance(last)
    flat = torch.cat([variance[:, 0], variance[:, 1:].flatten()])
    torch.testing.assert_close(flat, explicit.var(0, correction=0))


def test_batch_scale_inflates_the_short_last_batch():
    assert (1 / batch_scale(10, 4)).tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]
    assert (1 / batch_scale(8, 4)).tolist() == [4] * 8
    last = samples()
    single = LastLayer(last.logits.float(), last.embeddings.float(), last.labels, batch_scale(30, 8))
    assert single.gram().matrix().dtype == torch.float32


def test_grand_is_el2n_times_the_length_of_the_inputs():
    last = samples()
    want = scores.el2n(last) * (1 + last.embeddings.square().sum(1)).sqrt()
    torch.testing.assert_close(scores.grand(last), want)


# Kernels -----------------------------------------------------------------------------------------------------------


def test_kernels_equal_their_definitions_and_do_not_depend_on_chunks(monkeypatch):
    x, last = points(), samples()
    p = last.log_p.exp()
    kl = (p[:, None] * (last.log_p[:, None] - last.log_p)).sum(2)
    pairs = {
        "cosine": (
            similarity.cosine(similarity.linear(x)),
            0.5 + 0.5 * F.cosine_similarity(x[:, None], x, dim=2),
        ),
        "euclidean": (similarity.euclidean(similarity.linear(x)), (x[:, None] - x).norm(dim=2)),
        "kl": (similarity.symmetric_kl(last.log_p), 0.5 * (kl + kl.T)),
    }
    for name, (kernel, want) in pairs.items():
        torch.testing.assert_close(kernel.matrix(), want, msg=name)
        assert torch.equal(kernel.matrix().diagonal(), kernel.diagonal), name
    whole = pairs["cosine"][0].matrix()
    monkeypatch.setattr(similarity, "CHUNK", 70)  # two columns
    assert len(list(pairs["cosine"][0].chunks())) == 15
    torch.testing.assert_close(pairs["cosine"][0].matrix(), whole)
    few = submodular.lazy(submodular.FacilityLocation(pairs["cosine"][0]), 8)
    monkeypatch.setattr(similarity, "HELD", 0)  # nothing is kept
    again = submodular.lazy(submodular.FacilityLocation(pairs["cosine"][0]), 8)
    assert torch.equal(few.order, again.order)


def test_flipped_distances_are_positive_and_the_offset_leaves_the_order_unchanged():
    distance = similarity.euclidean(similarity.linear(points()), 1e-6)
    picks = []
    for offset in (None, float(distance.max()) + 5.0):
        kernel = similarity.flipped(distance, offset)
        assert kernel.matrix().min() > 0
        picks.append(submodular.naive(submodular.FacilityLocation(kernel), 9).order)
    assert torch.equal(*picks)


# Greedy ------------------------------------------------------------------------------------------------------------

FUNCTIONS = (submodular.FacilityLocation, submodular.GraphCut, submodular.LogDet)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_lazy_equals_naive_for_every_batch(function, seed):
    kernel, budget = cosine_kernel(seed=seed), 5 if function is submodular.LogDet else 30
    slow = submodular.naive(function(kernel), budget)
    for batch in (1, 4, 16):
        quick = submodular.lazy(function(kernel), budget, batch=batch)
        assert torch.equal(quick.order, slow.order)
        torch.testing.assert_close(quick.gains, slow.gains)
    assert len(slow.order.unique()) == budget
    assert submodular.lazy(function(kernel), budget, batch=1).evaluations < slow.evaluations
    sample_everything = submodular.stochastic(function(kernel), budget, generator(), epsilon=1e-300)
    assert torch.equal(sample_everything.order, slow.order)


def test_gains_are_the_differences_of_the_set_functions():
    kernel = cosine_kernel()
    s = kernel.matrix()
    values = {
        submodular.FacilityLocation: lambda a: s[:, a].amax(1).sum(),
        submodular.GraphCut: lambda a: s[:, a].sum() - s[a][:, a].sum(),
        submodular.LogDet: lambda a: torch.linalg.slogdet(s[a][:, a]).logabsdet,
    }
    for function, value in values.items():
        picks = submodular.naive(function(kernel), 5)
        for t in range(1, 5):
            grown = value(picks.order[: t + 1]) - value(picks.order[:t])
            gain = picks.gains[t]
            gain = {submodular.GraphCut: gain - 1, submodular.LogDet: gain.log()}.get(function, gain)
            torch.testing.assert_close(grown, gain)


def test_facility_location_gains_never_grow_and_end_at_all_points():
    kernel = cosine_kernel()
    picks = submodular.naive(submodular.FacilityLocation(kernel), 30)
    assert (picks.gains.diff() <= 1e-12).all()
    torch.testing.assert_close(picks.gains.sum(), torch.tensor(30.0).double())  # f(V) = sum of s_ii


@pytest.mark.parametrize("seed", range(3))
def test_greedy_reaches_its_guarantee_against_every_subset(seed):
    kernel = cosine_kernel(10, seed)
    optimum = max(facility(kernel, chosen) for chosen in itertools.combinations(range(10), 3))
    picks = submodular.lazy(submodular.FacilityLocation(kernel), 3)
    reached = facility(kernel, picks.order.tolist())
    assert (1 - 1 / math.e) * optimum <= reached <= optimum + 1e-12
    assert reached == pytest.approx(float(picks.gains.sum()))


def test_approximate_lazy_computes_fewer_gains_and_stays_close():
    kernel = cosine_kernel(60)
    exact = submodular.lazy(submodular.FacilityLocation(kernel), 20, batch=1)
    rough = submodular.lazy(submodular.FacilityLocation(kernel), 20, accept=0.5)
    assert rough.evaluations < exact.evaluations
    assert 0.5 * exact.gains.sum() <= rough.gains.sum() <= exact.gains.sum() * 1.02


@pytest.mark.parametrize("optimise", [submodular.naive, submodular.lazy])
def test_ties_go_to_the_lowest_index(optimise):
    kernel = similarity.cosine(similarity.linear(torch.eye(6).double()))
    for function in FUNCTIONS:
        assert optimise(function(kernel), 4).order.tolist() == [0, 1, 2, 3]


def test_logdet_avoids_what_deepcore_prefers():
    x = points(8)
    x[5] = x[0] + 1e-3  # nearly the same as the first pick
    kernel = similarity.cosine(similarity.linear(x))
    assert submodular.naive(submodular.LogDet(kernel), 4).order.tolist().count(5) == 0
    assert submodular.naive(submodular.LogDet(kernel, "deepcore"), 2).order.tolist() == [0, 5]


@pytest.mark.parametrize("seed", range(3))
def test_selections_follow_a_permutation_of_the_samples(seed):
    last, g = samples(seed=seed), generator(seed + 10)
    shuffle = torch.randperm(len(last), generator=g)
    # two picks by facility location: later ones may be mutually nearest points, whose gains are equal
    selectors = {
        "craig": lambda s: (
            submodular.lazy(
                submodular.FacilityLocation(similarity.flipped(similarity.euclidean(s.gram(), 1e-6))), 2
            ).order
        ),
        "lcmat": lambda s: (
            submodular.lazy(
                submodular.FacilityLocation(
                    similarity.flipped(pair_cost.pair_cost(s, 0.5, pair_cost.curvature_coordinates(s, 10)))
                ),
                2,
            ).order
        ),
        "gradmatch": lambda s: gradmatch.orthogonal_matching(s.gram(), s.project(s.mean()), 6).order,
        "glister": lambda s: scores.glister(s, 6),
        "margin": lambda s: scores.best(scores.margin(s.logits), 6, largest=False),
        "el2n": lambda s: scores.best(scores.el2n(s), 6),
    }
    for name, select in selectors.items():
        assert torch.equal(shuffle[select(last[shuffle])], select(last)), name


# Weights and GradMatch ---------------------------------------------------------------------------------------------


def test_cluster_sizes_sum_to_n_and_are_aligned_with_the_order():
    kernel = similarity.flipped(similarity.euclidean(similarity.linear(points()), 1e-6))
    order = submodular.lazy(submodular.FacilityLocation(kernel), 7).order
    weights = submodular.cluster_sizes(kernel, order)
    owner = kernel.matrix()[:, order].argmax(1)
    assert weights.tolist() == [int((owner == k).sum()) for k in range(7)] and weights.sum() == 30
    assert torch.equal(submodular.cluster_sizes(kernel, order, "deepcore"), weights + 1)
    assert (submodular.cluster_sizes(kernel, torch.arange(30).flip(0)) == 1).all()
    with pytest.raises(CompanionError, match="unknown variant 'papr'.*'paper'"):
        submodular.cluster_sizes(kernel, order, "papr")


def test_lcmat_cost_without_curvature_is_craigs_and_bounds_the_gaps():
    last = samples()
    everything = torch.arange(last.gradients().shape[1])
    plain = pair_cost.pair_cost(last, 0.0, everything)
    torch.testing.assert_close(plain.matrix(), similarity.euclidean(last.gram()).matrix())
    kernel = similarity.flipped(plain)
    order = submodular.lazy(submodular.FacilityLocation(kernel), 6).order
    weights = submodular.cluster_sizes(kernel, order)
    gap = (last.mean() - weights @ last[order].gradients() / len(last)).norm()
    assert gap <= plain.matrix()[:, order].amin(1).mean()
    assert all(float(value) < 1e-14 for value in pair_cost.gaps(last, last).values())


def test_matching_pursuit_agrees_with_dense_least_squares():
    a = points(12, 6).T  # (6, 12): columns are samples
    b, gram = a.mean(1), similarity.linear(a.T)
    before = math.inf
    for k in range(2, 7):
        match = gradmatch.orthogonal_matching(gram, a.T @ b, k, ridge=1e-12)
        chosen = a[:, match.order]
        want = torch.linalg.lstsq(chosen, b[:, None]).solution[:, 0]
        torch.testing.assert_close(match.ridge, want, rtol=1e-6, atol=1e-8)
        residual = b - chosen @ match.ridge
        assert residual.norm() <= before + 1e-9
        before = residual.norm()
        assert (match.weights >= 0).all()
        assert (chosen.T @ residual).abs().max() < 1e-8
    assert before < 1e-8  # six independent columns span everything


def test_matching_pursuit_on_orthonormal_columns_takes_the_largest_products():
    basis = torch.linalg.qr(points(8, 8)).Q
    b = points(1, 8, seed=4)[0]
    match = gradmatch.orthogonal_matching(similarity.linear(basis.T), basis.T @ b, 4, ridge=1e-12)
    want = (basis.T @ b).topk(4)
    assert torch.equal(match.order, want.indices)
    torch.testing.assert_close(match.ridge, want.values)


def test_matching_pursuit_by_hand_drops_negative_weights():
    a = torch.tensor([[2.0, 1, 0, 3], [3, 3, -2, -1]]).double()
    gram, target = similarity.linear(a.T), a.T @ torch.tensor([2.0, -2]).double()
    match = gradmatch.orthogonal_matching(gram, target, 3, ridge=1.0)
    assert match.order.tolist() == [3, 2, 0]
    torch.testing.assert_close(match.ridge, torch.tensor([142.0, 68, -30]).double() / 201)
    order, weights = match.kept()
    assert order.tolist() == [3, 2]
    np.testing.assert_allclose(weights, [0.608175, 0.607470], atol=1e-6)
    assert gradmatch.orthogonal_matching(gram, target, 1).weights.tolist() == [1.0]


# Scores ------------------------------------------------------------------------------------------------------------


def test_glister_without_refresh_is_the_largest_alignment_and_refresh_changes_it():
    last = samples(60)
    alignment = last.gradients() @ last.gradients().mean(0)
    assert torch.equal(scores.glister(last, 10, refresh=0), scores.best(alignment, 10))
    refreshed = [scores.glister(last, 10, eta=50.0, refresh=r) for r in (1, 5)]
    assert torch.equal(refreshed[1][:5], scores.best(alignment, 5))
    assert refreshed[0].tolist() != scores.best(alignment, 10).tolist()


def test_glister_direction_is_the_gradient_after_one_step_of_the_layer():
    g = generator(3)
    w, h = torch.randn(3, 4, generator=g).double(), torch.randn(20, 4, generator=g).double()
    labels = torch.randint(3, (20,), generator=g)
    last, rows = LastLayer(h @ w.T, h, labels), torch.tensor([1, 5, 7])
    step = last.rows_of(last[rows].mean())
    moved = LastLayer(h @ (w - 0.3 * step[:, 1:]).T - 0.3 * step[:, 0], h, labels)
    torch.testing.assert_close(scores.glister_direction(last[rows], last, 0.3), moved.mean())


def test_uncertainty_scores_of_certain_and_even_predictions():
    logits = torch.tensor([[20.0, 0, 0, 0], [0, 0, 0, 0], [3, 3, -9, -9]]).double()
    assert scores.confidence(logits).tolist() == pytest.approx([1, 0.25, 0.5], abs=1e-5)
    assert scores.confidence(logits, "deepcore").tolist() == [20, 0, 3]
    assert scores.margin(logits).tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    entropy = [0, -math.log(4), -math.log(2)]
    assert scores.negative_entropy(logits).tolist() == pytest.approx(entropy, abs=1e-4)


def test_forgetting_counts_events_and_treats_the_never_learned_as_maximal():
    correct = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]]).bool()
    assert scores.forgetting(correct).tolist() == [1, 2, 4, 0]
    assert scores.forgetting(correct, "deepcore").tolist() == [1, 2, 0, 0]


def test_cal_is_the_mean_divergence_from_the_nearest_points():
    last = samples()
    nearest = scores.neighbours(last.embeddings, 4)
    distance = torch.cdist(last.embeddings, last.embeddings)
    assert torch.equal(nearest, distance.fill_diagonal_(torch.inf).argsort(1)[:, :4])
    want = similarity.symmetric_kl(last.log_p).matrix().gather(1, nearest).mean(1)
    torch.testing.assert_close(scores.cal(last.logits, nearest), want)


def test_the_best_scores_are_stable_and_finite():
    ties = torch.tensor([1.0, 2, 2, 0, 2])
    assert scores.best(ties, 4).tolist() == [1, 2, 4, 0]
    assert scores.best(ties, 2, largest=False).tolist() == [3, 0]
    with pytest.raises(CompanionError, match="1 of 2 scores are not finite"):
        scores.best(torch.tensor([1.0, torch.nan]), 1)
    with pytest.raises(CompanionError, match="6 is not allowed: there are 1 to 5"):
        scores.best(ties, 6)
    with pytest.raises(CompanionError, match="of linear: vectors are not finite"):
        submodular.lazy(submodular.GraphCut(similarity.linear(points() * torch.nan)), 2)


def test_class_budgets_round_half_to_even():
    assert class_budgets([25, 50, 35], 0.1) == [2, 5, 4]
    for fraction in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(CompanionError, match=r"must lie in \(0, 1\]"):
            class_budgets([10], fraction)
