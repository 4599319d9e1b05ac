"""KRR: the distilled set's own ridge regression is its teacher, in every mode; where it cannot be, an error or a gap says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lib import data
from lib.companion.published import quoted
from lib.distill import distill as distil
from lib.distill import pack, unpack
from lib.evaluate import evaluate, protocol
from lib.evaluate.kernel import kernel_accuracy, predictor_accuracy
from lib.kernels import closed_form
from lib.kernels.feature_maps import LeakyNet
from lib.kernels.ridge import centred_one_hot
from lib.methods import krr
from lib.methods.krr import KRR, MAPS, columns, predictor, solution
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

K, P, D, N = 3, 9, 6, 40


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def gap(got, want):
    return float((got - want).norm() / want.norm())


def one_hot(n=N):
    return F.one_hot(torch.arange(n) % K).T.double()


# -- the method on digits -----------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"init": "real"},
    {"lambda_s": "teacher"},
    {"lambda_s": 1e-3, "root": "minus"},
    {"init": "real", "lambda_s": "teacher", "root": "minus"},
]


@pytest.mark.parametrize("ipc", [1, 10])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_set_has_its_teachers_weights_and_predictions(digits, kind, options, ipc):
    method = KRR(map=kind, **options)
    teacher = method.teacher(digits.train, seeded(5))
    synset = distil(method, digits.train, ipc, seed=5).synset
    phi = krr.feature_map(synset.meta["map"])
    assert synset.images.shape == (10 * ipc, 1, 8, 8) and synset.targets.shape == (10 * ipc, 10)
    w = solution(phi, synset.images, synset.targets, synset.meta["lambda_s"])
    assert gap(w, teacher.w) < 1e-9
    x = columns(digits.test.images)
    assert torch.equal(
        predictor(synset)(digits.test.images).argmax(1), (teacher.w @ teacher.phi(x)).argmax(0)
    )


def test_the_ridge_value_is_the_first_best_of_the_grid(digits):
    method, train = KRR(map="fourier"), digits.train
    teacher = method.teacher(train, seeded(1))
    g = seeded(1)
    torch.randint(2**31, (), generator=g)
    order = torch.randperm(len(train), generator=g)
    held, rest = order[: round(0.05 * len(train))], order[round(0.05 * len(train)) :]
    phi, y = teacher.phi(columns(train.images)), F.one_hot(train.labels).T.double()
    best = (-1.0, None, None)
    for lam in (10 ** (-6 + 0.5 * i) for i in range(24)):
        a = phi[:, rest]
        w = y[:, rest] @ a.T @ torch.linalg.inv(a @ a.T + lam * torch.eye(64))
        accuracy = float(((w @ phi[:, held]).argmax(0) == train.labels[held]).double().mean())
        if accuracy > best[0]:
            best = (accuracy, lam, w)
    assert math.isclose(teacher.lam, best[1]) and math.isclose(teacher.accuracy, best[0])
    assert gap(teacher.w, best[2]) < 1e-6


@pytest.mark.parametrize("lam_factor", [1e-3, 1.0])
def test_a_ridge_above_its_bound_is_clipped_and_said(digits, lam_factor):
    method = KRR(lambda_s=1e4 * lam_factor if lam_factor == 1 else 1e-3)
    found = distil(method, digits.train, 2)
    note = found.synset.meta.get("note")
    if lam_factor == 1:
        bound = found.synset.meta["lambda_s"]
        assert note == f"lambda_S 1e+04 clipped to {bound:.4g} = 1 / (4 s_1^2)"
        assert float(found.history["lambda_s asked"]) == 1e4
        images = columns(found.synset.images)
        d = closed_form.regularised_pinv(
            images, bound
        )  # D of the finished images: its largest value is at the bound
        assert math.isclose(4 * bound * float(torch.linalg.matrix_norm(d, 2)) ** 2, 1, rel_tol=1e-6)
    else:
        assert note is None and found.synset.meta["lambda_s"] == 1e-3
    assert float(found.history["gap"]) < 1e-9


def test_real_images_stay_close_and_noise_does_not(digits):
    method = KRR(init="real")
    g = seeded(3)
    state = method.begin(digits.train, 10, g)
    start = state.images.clone()
    method.step(state, g)
    noise = distil(KRR(), digits.train, 10, seed=3).synset.images
    assert (state.images - start).norm() < 0.5 * start.norm() < noise.norm()


def test_labels_alone_need_as_many_points_as_features(digits):
    few, enough = (
        distil(KRR(map="fcnn", labels_only=True), digits.train, ipc, seed=2) for ipc in (6, 7)
    )  # 60 and 70 points, 64 features
    assert float(few.history["gap"]) > 1e-3 and float(enough.history["gap"]) < 1e-9
    position = (enough.synset.images[:1].float() == digits.train.images).flatten(1).all(1)
    assert position.any()  # the images are real ones


def test_a_run_repeats_and_seeds_differ(digits):
    a, b, c = (distil(KRR(map="fourier"), digits.train, 2, seed=s).synset for s in (0, 0, 1))
    assert torch.equal(a.codes, b.codes) and not torch.equal(a.codes, c.codes)


def test_a_killed_run_goes_on_from_its_state(digits):
    method = KRR(lambda_s=1e4)
    g = seeded(4)
    state = method.begin(digits.train, 1, g)
    method.step(state, g)
    fresh = method.begin(digits.train, 1, seeded(4))
    unpack(fresh, pack(state))
    ours, theirs = method.finish(fresh), method.finish(state)
    assert torch.equal(ours.codes, theirs.codes) and ours.meta == theirs.meta and "note" in ours.meta


# -- its set as others use it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAPS)
def test_a_saved_set_predicts_the_same(digits, kind, tmp_path):
    synset = distil(KRR(map=kind, init="real"), digits.train, 2).synset
    synset.save(tmp_path / "set.safetensors")
    loaded = SyntheticSet.load(tmp_path / "set.safetensors")
    assert torch.equal(predictor(loaded)(digits.test.images), predictor(synset)(digits.test.images))
    assert json.dumps(loaded.meta)
    synset.export(tmp_path / "out")
    assert len(list((tmp_path / "out" / "train").rglob("*.png"))) == 20


def test_networks_take_its_images_with_hard_labels_only(digits):
    synset = distil(KRR(init="real"), digits.train, 2).synset
    rule = protocol("cpu-small", digits.train)
    brief = replace(rule, epochs=2, labels="hard")
    assert 0 <= evaluate(synset, digits, brief, networks=1).spread.mean <= 100
    assert float(synset.targets.min()) < 0
    with pytest.raises(CompanionError, match="targets of a regression"):
        evaluate(synset, digits, replace(brief, labels="own"), networks=1)


def test_kernel_accuracy_is_that_of_the_features(digits):
    synset = distil(KRR(map="fcnn", lambda_s=1e-2), digits.train, 3).synset
    phi, lam = krr.feature_map(synset.meta["map"]), synset.meta["lambda_s"]

    def kernel(a, b):
        return phi(columns(a)).T @ phi(columns(b))

    wanted = predictor_accuracy(predictor(synset), digits.test)
    assert kernel_accuracy(kernel, synset.images, synset.targets, digits.test, lam, scaled=False) == wanted
    assert predictor_accuracy(predictor(synset), digits.test, chunk=7) == wanted
    labels = centred_one_hot(digits.test.labels, 10)
    rows = iter(labels.split(50))
    assert predictor_accuracy(lambda x: next(rows), digits.test, chunk=50) == 1


# -- wrong input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map": "linear"}, "unknown map 'linear'; allowed: fcnn, fourier, identity"),
        ({"root": "both"}, "unknown root 'both'"),
        ({"init": "zeros"}, "unknown init 'zeros'"),
        ({"lambda_s": -1.0}, "lambda_s -1; allowed: 0 or more"),
        ({"lambda_s": math.nan}, "lambda_s nan"),
        ({"lambda_s": "bound"}, "unknown lambda_s 'bound'"),
        ({"lam": 0.0}, "lam 0; allowed: above 0"),
        (
            {"features": 65, "map": "fcnn"},
            "65 features of 64 pixels have no exact preimage; allowed: at most 64",
        ),
    ],
)
def test_wrong_settings_are_told_in_one_line(digits, options, message):
    with pytest.raises(CompanionError, match=message) as error:
        distil(KRR(**options), digits.train, 1)
    assert "\n" not in str(error.value)


def test_fewer_images_than_classes_and_labels_of_too_low_rank_are_refused(digits):
    with pytest.raises(CompanionError, match="ipc 1 is not allowed: one of the classes has no image"):
        distil(KRR(), digits.train.subset(list(range(5))), 1)
    repeated = torch.ones(K, 5, dtype=torch.float64)
    with pytest.raises(
        CompanionError, match="labels of rank 1 for 3 classes; allowed: rank 3, with 3 points or more"
    ):
        closed_form.admissible(repeated, randn(K, P), randn(5, P))


# -- theory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", range(1, K))
def test_fewer_points_than_classes_cannot_beat_the_rank_bound(m):
    w = randn(K, P)
    s = torch.linalg.svdvals(w)
    bound = float(s[m:].norm() / s.norm())
    for seed in range(5):
        w_s = closed_form.student(randn(P, m, seed=seed), randn(K, m, seed=seed + 9))
        assert gap(w_s, w) >= bound - 1e-12 > 0.1


def test_a_small_root_keeps_its_digits():
    w = randn(K, P)
    d = closed_form.admissible(closed_form.cyclic_labels(K, 1), w, randn(K, P))
    lam = 1e-13 * closed_form.clipped(d, math.inf)  # 1 - sqrt(1 - 1e-13) would keep three digits
    assert (
        gap(
            closed_form.student(
                closed_form.solve_features(d, lam, -1.0), closed_form.cyclic_labels(K, 1), lam
            ),
            w,
        )
        < 1e-9
    )


def test_the_loss_of_kip_is_zero_where_data_is_fewer_than_features():
    """Theorem 6.1: full-rank features of n <= p images and lambda = 0."""
    phi, y = randn(P, 7), one_hot(7)
    w = closed_form.student(phi, y)
    y_s = closed_form.cyclic_labels(K, 2)
    phi_s = closed_form.solve_features(closed_form.admissible(y_s, w, closed_form.noise(y_s, w, seeded())))
    assert (closed_form.student(phi_s, y_s) @ phi - y).abs().max() < 1e-10


def test_features_without_a_pseudo_inverse_of_d():
    """Theorem C.2: W^+ Y_S + (I - W^+ W) Z (I - Y_S^+ Y_S) is a distilled feature matrix for every Z."""
    w, y_s, pinv = randn(K, P), randn(K, 5, seed=1), torch.linalg.pinv
    z = randn(P, 5, seed=2)
    phi_s = pinv(w) @ y_s + (torch.eye(P) - pinv(w) @ w) @ z @ (torch.eye(5) - pinv(y_s) @ y_s)
    assert gap(closed_form.student(phi_s, y_s), w) < 1e-10


def wide():
    weights = LeakyNet.draw((D, P, P), seeded(3)).weights
    return weights, weights[1] @ weights[0]


def test_widening_linear_net_is_matched_by_one_point_per_class_for_a_trained_teacher():
    weights, product = wide()
    w = closed_form.ridge_path(product @ randn(D, N), one_hot())(0.1)
    y_s = closed_form.cyclic_labels(K, 1)
    x_s, _ = closed_form.deep_linear(weights, w, y_s)
    assert x_s.shape == (D, K) and gap(closed_form.student(product @ x_s, y_s), w) < 1e-10


@pytest.mark.parametrize("ipc", [1, 2, 4])
def test_no_number_of_points_reaches_weights_outside_the_range(ipc):
    weights, product = wide()
    w, y_s = randn(K, P, seed=5), closed_form.cyclic_labels(K, ipc)
    x_s, rank = closed_form.deep_linear(weights, w, y_s, randn(P, K * ipc, seed=6))
    outside = w - w @ product @ torch.linalg.pinv(product)
    assert gap(closed_form.student(product @ x_s, y_s), w) >= float(outside.norm() / w.norm()) - 1e-9 > 0.1
    assert rank == (P if ipc == 1 else D)  # theorem 5.3 assumes P, which d < p rules out


def test_recipe_of_the_widening_linear_net_is_exact_where_nothing_widens():
    weights = LeakyNet.draw((P, P, P), seeded(3)).weights
    product, w, y_s = weights[1] @ weights[0], randn(K, P, seed=5), closed_form.cyclic_labels(K, 3)
    x_s, rank = closed_form.deep_linear(weights, w, y_s, randn(P, 3 * K, seed=6))
    assert rank == P and gap(closed_form.student(product @ x_s, y_s), w) < 1e-9
    with pytest.raises(CompanionError, match="labels of rank 2 for 3 classes"):
        closed_form.deep_linear(weights, w, randn(K, 2), None)


@pytest.mark.parametrize("m", [P - 1, P])
def test_widening_leaky_net_is_exact_once_labels_are_solved_for_p_points(m):
    net = LeakyNet.draw((D, P, P), seeded(3))
    w, y_s = closed_form.ridge_path(net(randn(D, N)), one_hot())(0.1), randn(K, m, seed=1)
    target = closed_form.solve_features(closed_form.admissible(y_s, w, randn(m, P, seed=2)))
    with pytest.raises(CompanionError, match="cannot be inverted"):
        net.inverse(target)
    x_s = net.inverse(target, exact=False)
    assert gap(net(x_s), target) > 1e-2
    solved = gap(closed_form.student(net(x_s), closed_form.labels_for(net(x_s), w)), w)
    assert (solved < 1e-9) == (m >= P)


def test_no_row_moves_further_than_the_privacy_bound_allows():
    """Theorem 6.2: |[Y_S^+ (W - W')]_i| <= 2 B |[Y_S^+]_i Y| / s_0^2 for one image replaced."""
    x, y, y_s = randn(P, N), one_hot(), closed_form.cyclic_labels(K, 2)
    pinv, w = torch.linalg.pinv(y_s), closed_form.student(x, y)
    length = float(x.norm(dim=0).max())
    for j in range(10):
        other = x.clone()
        other[:, j] = x[:, -1 - j]
        smallest = min(float(torch.linalg.svdvals(v)[-1]) for v in (x, other))
        allowed = 2 * length * (pinv @ y).norm(dim=1) / smallest**2
        assert bool(((pinv @ (w - closed_form.student(other, y))).norm(dim=1) <= allowed).all())


def test_published_numbers_of_tables_3_and_4_are_quoted():
    assert quoted("krr", "mnist", 1)[0].mean == 86.41
    assert quoted("krr", "cifar10", 50, "fcnn")[0].mean == 47.77
    assert quoted("kip", "cifar100", 50, "fcnn features") is None
