"""Slices, worst-case perturbations and spectra of a small network's loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from torch import nn

from lib.errors import CompanionError
from lib.evaluate import landscape


def small(seed: int = 0, count: int = 20):
    g = generator(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    x, y = torch.randn(count, 3, generator=g).double(), torch.randint(3, (count,), generator=g)
    return net, x, y, *landscape.network_loss(net, x, y)


def signs(count: int, theta, seed: int = 5):
    return landscape.rademacher(count, len(theta), generator(seed), theta)


def test_the_flat_loss_is_the_networks_and_slices_equal_single_evaluations():
    net, x, y, loss, theta = small()
    torch.testing.assert_close(loss(theta), F.cross_entropy(net(x), y))
    directions = torch.stack([landscape.random_direction(net, generator(s)) for s in (1, 2)])
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 5).double()] * 2)
    got = landscape.slice_losses(loss, theta, directions, grid, chunk=4)
    want = torch.stack([loss(theta + a * directions[0] + b * directions[1]) for a, b in grid])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got[12], loss(theta))


def test_directions_have_the_norms_of_the_filters_and_leave_biases_alone():
    g = generator(3)
    weight, noise = torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 3, 2, 2, generator=g)
    scaled = landscape.normalise(noise, weight)
    torch.testing.assert_close(scaled.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    torch.testing.assert_close(landscape.normalise(noise, weight, "layer").norm(), weight.norm())
    assert not landscape.normalise(torch.ones(4), torch.ones(4)).any()
    with pytest.raises(CompanionError, match="unknown direction mode 'filtre' .did you mean 'filter'"):
        landscape.normalise(noise, weight, "filtre")


def test_hessian_products_and_every_spectrum_tool_agree_with_the_dense_hessian():
    *_, loss, theta = small()
    dense = torch.func.hessian(loss)(theta)
    product = landscape.hessian_product(loss, theta)
    v = signs(1, theta)[0]
    torch.testing.assert_close(product(v), dense @ v)
    values = torch.linalg.eigvalsh(dense)
    start = torch.randn(len(theta), generator=generator(8)).double()
    ritz, weights, vectors = landscape.lanczos(product, start, 20)
    torch.testing.assert_close(ritz[[0, -1]], values[[0, -1]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.sum(), torch.ones(()).double())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(ritz)).double(), rtol=0, atol=1e-10)
    full, _, _ = landscape.lanczos(lambda u: torch.arange(1.0, 13).double() * u, torch.ones(12).double(), 50)
    torch.testing.assert_close(full, torch.arange(1.0, 13).double())
    top, vector = landscape.top_eigenvalue(product, v, steps=500, rtol=1e-12)
    largest = values[values.abs().argmax()]
    torch.testing.assert_close(top, largest, rtol=1e-6, atol=0)
    torch.testing.assert_close(product(vector), largest * vector, rtol=0, atol=1e-4)
    every_sign = torch.eye(len(theta)).double() * len(theta) ** 0.5  # probes with the identity as covariance
    torch.testing.assert_close(landscape.trace(product, every_sign), dense.trace())


def test_an_invariant_subspace_ends_lanczos():
    diagonal = torch.tensor([3.0, 3, -1, -1, -1]).double()
    ritz, weights, _ = landscape.lanczos(lambda v: diagonal * v, torch.ones(5).double(), 5)
    torch.testing.assert_close(ritz, torch.tensor([-1.0, 3]).double())
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.4]).double())


def test_the_spectral_density_integrates_to_one_and_has_the_traces_mean():
    *_, loss, theta = small()
    product, probes = landscape.hessian_product(loss, theta), signs(8, theta)
    grid = torch.linspace(-6, 6, 4001).double()
    density = landscape.spectral_density(product, probes, grid, width=0.05)
    assert (density >= 0).all()
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.ones(()).double(), rtol=0, atol=1e-6)
    mean = torch.trapezoid(density * grid, grid) * len(theta)
    torch.testing.assert_close(mean, landscape.trace(product, probes), rtol=1e-5, atol=1e-6)


def test_the_worst_gap_of_a_quadratic_is_the_dense_solution_and_beats_random_points():
    g = generator(4)
    root, slope = torch.randn(6, 6, generator=g).double(), torch.randn(6, generator=g).double()
    hessian = root @ root.T - 2 * torch.eye(6).double()

    def loss(x):
        return slope @ x + 0.5 * x @ hessian @ x

    origin, rho = torch.zeros(6).double(), 0.7
    want = landscape.quadratic_gap(slope, hessian, rho)
    ascent = landscape.worst_gap(loss, origin, rho, torch.randn(4, 6, generator=g).double(), steps=500)
    torch.testing.assert_close(ascent, want, rtol=1e-6, atol=0)
    sphere = F.normalize(torch.randn(2000, 6, generator=g).double()) * rho
    assert torch.vmap(loss)(sphere).max() <= want
    with pytest.raises(CompanionError, match="radius 0 is not allowed"):
        landscape.worst_gap(loss, origin, 0, origin[None])


def test_the_worst_difference_of_two_losses_stays_below_its_bound():
    net, x, y, full, theta = small(count=40)
    subset, _ = landscape.network_loss(net, x[:5], y[:5])

    def difference(point):
        return full(point) - subset(point)

    slope = torch.func.grad(difference)(theta).norm()
    curvature = torch.linalg.eigvalsh(torch.func.hessian(difference)(theta)).abs().max()
    starts = signs(2, theta)
    for rho in (1e-3, 1e-2):
        gap = landscape.worst_difference(full, subset, theta, rho, starts)
        assert 0 < gap <= rho * slope + 0.5 * rho**2 * curvature + 10 * rho**3
    small_gap = landscape.worst_difference(full, subset, theta, 1e-4, starts)
    torch.testing.assert_close(small_gap / 1e-4, slope, rtol=1e-2, atol=0)
    assert landscape.worst_difference(full, full, theta, 0.1, starts).abs() < 1e-12
