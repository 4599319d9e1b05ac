"""Integral probability metrics: linear programs, closed forms, rank correlation, and the sets that notebooks stored."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import generator
from scipy.optimize import linprog
from scipy.stats import spearmanr

from lib.companion.stored import plain, stored_sets
from lib.data.whitening import ZCA
from lib.distill import distill
from lib.formation.mosaic import Mosaic
from lib.match import features, ipm, mmd, transport
from lib.methods.dm import DM
from lib.methods.selection import RandomReal
from lib.synset import SyntheticSet


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_w1_equals_both_linear_programs():
    """Primal and dual written out for HiGHS."""
    x, y = randn(1, 6, 3), randn(1, 4, 3, seed=1) + 0.5
    cost = transport.cost_matrix(x, y, 1)[0].numpy()
    n, m = cost.shape
    rows = [[float(k // m == i) for k in range(n * m)] for i in range(n)]
    columns = [[float(k % m == j) for k in range(n * m)] for j in range(m)]
    masses = [1 / n] * n + [1 / m] * m
    primal = linprog(cost.ravel(), A_eq=rows + columns, b_eq=masses)
    below = [
        [float(r == k // m) for r in range(n)] + [float(r == k % m) for r in range(m)] for k in range(n * m)
    ]
    dual = linprog([-v for v in masses], A_ub=below, b_ub=cost.ravel(), bounds=(None, None))
    value = transport.wasserstein(x, y, 1).item()
    assert value == pytest.approx(primal.fun, abs=1e-9) and value == pytest.approx(-dual.fun, abs=1e-9)


def test_metrics_of_stretched_and_moved_points():
    x, y = randn(3, 9, 5), randn(3, 4, 5, seed=1) + 0.3
    for p in (1, 2):
        base = transport.wasserstein(x, y, p)
        torch.testing.assert_close(transport.wasserstein(3 * x, 3 * y, p), 3**p * base)
        torch.testing.assert_close(transport.wasserstein(x + 7, y + 7, p), base)
    torch.testing.assert_close(mmd.mmd(3 * x, 3 * y, "energy"), 3 * mmd.mmd(x, y, "energy"))
    for sigma in (0.5, 2.0):  # the Gaussian kernel's unit ball is 1/sigma-Lipschitz
        assert (mmd.mmd(x, y, "rbf", sigma).sqrt() <= transport.wasserstein(x, y, 1) / sigma).all()


def test_equal_covariances_are_as_far_apart_as_their_means():
    """W_1 = W_2 = |delta| for Gaussians of one covariance, whatever it is."""
    root = randn(4, 4)
    cov, delta = root @ root.T + torch.eye(4), randn(4, seed=3)
    value = transport.gaussian_w2(delta, cov, torch.zeros(4, dtype=torch.float64), cov)
    torch.testing.assert_close(value, delta.square().sum(), rtol=1e-9, atol=1e-9)


def test_every_metric_is_zero_for_equal_sets_positive_else_and_blind_to_order():
    x, y = randn(3, 9, 5), randn(3, 4, 5, seed=1) + 0.5
    columns = transport.directions(5, 20, generator(), x)
    same, apart = (ipm.metrics(x, points, columns) for points in (x.flip(1), y))
    assert same.keys() == apart.keys() and len(same) == 11
    for name, value in apart.items():
        assert abs(same[name]) < 1e-5 and value > 1e-2, name
    again = ipm.metrics(x.flip(1), y.flip(1), columns)
    assert all(again[name] == pytest.approx(value, rel=1e-6) for name, value in apart.items())
    assert apart["mean"] <= apart["W1"] <= apart["W2"] and apart["sliced W2"] <= apart["W2"]
    # classes matter: exchanging two leaves only the metric that ignores them
    swapped = ipm.metrics(x, y[[1, 0, 2]], columns)
    assert swapped["W1, classes ignored"] == pytest.approx(apart["W1, classes ignored"], rel=1e-9)
    assert abs(swapped["W1"] - apart["W1"]) > 1e-6


def test_to_a_single_image_w2_is_the_distance_of_the_means_and_the_spread():
    x = randn(1, 9, 5)
    columns, spread = transport.directions(5, 4, generator(), x), x.var(1, correction=0).sum().item()
    for k in range(1, 5):
        one = ipm.metrics(x, k * randn(1, 1, 5, seed=k), columns)
        assert one["W2"] ** 2 - one["mean"] ** 2 == pytest.approx(spread, rel=1e-9)


def test_gaussian_forms_agree_with_samples_on_a_grid():
    """Quantiles of a normal on a square grid stand for it without noise."""
    q = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    line = 2**0.5 * torch.erfinv(2 * q - 1)
    z = torch.cartesian_prod(line, line)
    z = z / z.std(0, correction=0)
    scale, shift = torch.tensor([0.6, 1.4]).double(), torch.tensor([0.7, -0.2]).double()
    forms = ipm.gaussian_forms(
        torch.zeros(2).double(), torch.eye(2).double(), shift, torch.diag(scale**2), 1.1
    )
    x, y = z.unsqueeze(0), (shift + scale * z).unsqueeze(0)
    assert forms["mean"].item() == pytest.approx(features.class_mean(x, y).sqrt().item(), rel=1e-9)
    assert forms["MMD\u00b2"].item() == pytest.approx(mmd.mmd(x, y, "rbf", 1.1).item(), rel=2e-2)
    assert forms["W2\u00b2"].item() == pytest.approx(transport.bures(x, y).item(), rel=1e-6)


def test_rank_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (6, 12)).astype(float), rng.normal(size=(6, 12))
    got = ipm.rank_correlation(x, y)
    np.testing.assert_allclose(
        got, [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)], atol=1e-12
    )
    assert ipm.rank_correlation(np.ones(4), np.arange(4.0)) == 0
    assert ipm.rank_correlation(np.arange(9.0), np.exp(np.arange(9.0))) == pytest.approx(1)


def test_bootstrap_resamples_pairs():
    x = np.arange(30.0)
    noise = np.random.default_rng(1).normal(size=30)
    exact, loose = ipm.bootstrap(x, x**3, 200), ipm.bootstrap(x, x + 20 * noise, 200)
    np.testing.assert_allclose(exact, 1)
    assert loose.shape == (200,) and 0.02 < loose.std() < 0.3
    assert abs(loose.mean() - ipm.rank_correlation(x, x + 20 * noise)) < 0.05
    np.testing.assert_array_equal(loose, ipm.bootstrap(x, x + 20 * noise, 200))


# -- stored sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def case(toy):
    run = SimpleNamespace(name="cpu", notebook="24_ipm", device=torch.device("cpu"))
    return SimpleNamespace(run=run, data=toy, dataset="toy", ipc=2)


def test_stored_sets_are_those_of_the_case(case, toy, tmp_path):
    dm = distill(DM(iterations=2, real_batch=4, network="convnet-d2-w4"), toy.train, 2).synset
    one = distill(RandomReal(), toy.train, 1).synset
    for notebook, name, synset in (
        ("20_dm", "dm_toy_ipc2", dm),
        ("20_dm", "dm_toy_ipc1", one),
        ("24_ipm", "mine_toy_ipc2", dm),
        ("30_dsa", "dm_toy_ipc2", distill(RandomReal(), toy.train, 2).synset),
    ):
        (tmp_path / notebook).mkdir(exist_ok=True)
        synset.save(tmp_path / notebook / f"{name}.safetensors")
    found = stored_sets(case, tmp_path)
    assert found.keys() == {"dm"} and torch.equal(found["dm"].codes, dm.codes)
    assert stored_sets(case, tmp_path / "nothing") == {}


def test_the_plain_form_decodes_sorts_hardens_and_goes_to_the_pixel_space_of_the_case(case, toy):
    train = toy.train
    start = train.sample(2, generator()).flatten(0, 1)
    labels = torch.arange(3).repeat_interleave(2)
    order = torch.tensor([5, 2, 0, 3, 1, 4])
    soft = torch.eye(3)[labels][order] + 0.1
    same = plain(SyntheticSet(start[order], soft, train.classes, train.transform), case)
    assert torch.equal(same.labels, labels) and same.images.shape == start.shape
    for c in range(3):
        got, want = (images[2 * c : 2 * c + 2].flatten(1) for images in (same.images, start))
        assert torch.cdist(got, want).amin(1).max() < 1e-3
    whitening = ZCA.fit(train.transform.inverse(train.images))
    whitened = whitening.forward(train.transform.inverse(start))
    back = plain(SyntheticSet(whitened, labels, train.classes, whitening), case)
    torch.testing.assert_close(back.images, start, rtol=1e-3, atol=1e-3)
    mosaic = plain(SyntheticSet(start, labels, train.classes, train.transform, decoder=Mosaic(2)), case)
    assert mosaic.images.shape == (24, *train.shape) and mosaic.labels.bincount().tolist() == [8, 8, 8]
    uneven = SyntheticSet(start, torch.tensor([0, 0, 0, 1, 1, 2]), train.classes, train.transform)
    assert plain(uneven, case) is None
