"""Slices, worst-case perturbations and spectra of a small network's loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense import quadratic_gap
from helpers import generator, toy_data
from torch import nn

from lib import nets
from lib.analysis import landscape
from lib.system.errors import CompanionError


def small(seed: int = 0, count: int = 20):
    g = generator(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    x, y = torch.randn(count, 3, generator=g).double(), torch.randint(3, (count,), generator=g)
    loss = landscape.NetworkLoss(net, x, y)
    return net, x, y, loss, loss.theta


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
        return x @ slope + 0.5 * (x @ hessian * x).sum(-1)

    origin, rho = torch.zeros(6).double(), 0.7
    want = quadratic_gap(slope, hessian, rho)
    ascent = landscape.worst_gap(loss, origin, rho, torch.randn(4, 6, generator=g).double(), steps=500)
    torch.testing.assert_close(ascent, want, rtol=1e-6, atol=0)
    sphere = F.normalize(torch.randn(2000, 6, generator=g).double()) * rho
    assert loss(sphere).max() <= want
    with pytest.raises(CompanionError, match="radius 0 is not allowed"):
        landscape.worst_gap(loss, origin, 0, origin[None])


def test_the_worst_difference_of_two_losses_stays_below_its_bound():
    net, x, y, full, theta = small(count=40)
    subset = landscape.NetworkLoss(net, x[:5], y[:5])

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


# With the networks of the library ------------------------------------------------------------------------------------------


def of_network(name: str, seed: int = 0, count: int = 12, **options):
    train = toy_data(seed=seed).train
    network = nets.make(name, train, generator(seed)).double().eval()
    images, labels = train.images[:count].double(), train.labels[:count]
    return network, images, labels, landscape.NetworkLoss(network, images, labels, **options)


@pytest.mark.parametrize("name", ["convnet-d2-w4", "convnet-d2-w4-batch", "mlp", "lenet"])
def test_several_points_at_once_equal_one_after_the_other(name):
    network, images, labels, loss = of_network(name)
    direction = torch.stack([landscape.random_direction(network, generator(k)) for k in (1, 2, 3)])
    points = loss.theta + 0.5 * direction
    one = torch.stack([loss(point) for point in points])
    torch.testing.assert_close(loss(points), one)
    torch.testing.assert_close(loss(loss.theta), F.cross_entropy(network(images), labels))
    with torch.no_grad():  # then in parts
        torch.testing.assert_close(loss(points.view(3, 1, -1)), one.detach()[:, None])
    gradients, values = landscape.slope(loss, points)
    torch.testing.assert_close(values, one.detach())
    torch.testing.assert_close(gradients[1], landscape.slope(loss, points[1])[0])
    nn.utils.vector_to_parameters(points[2], network.parameters())
    torch.testing.assert_close(F.cross_entropy(network(images), labels), one[2])


@pytest.mark.parametrize("name", ["convnet-d2-w4", "mlp"])
def test_hessian_products_of_networks_are_symmetric_and_differences_of_gradients(name):
    *_, loss = of_network(name)
    theta, (u, v) = loss.theta, torch.randn(2, len(loss.theta), generator=generator(3)).double()
    product = landscape.hessian_product(loss, theta)
    torch.testing.assert_close(u @ product(v), v @ product(u))
    step = 1e-6 * v
    difference = (landscape.slope(loss, theta + step)[0] - landscape.slope(loss, theta - step)[0]) / 2e-6
    torch.testing.assert_close(product(v), difference, rtol=1e-4, atol=1e-6)


def test_weights_count_as_repetitions_and_soft_labels_as_mixtures():
    network, images, labels, loss = of_network("mlp")
    theta = loss.theta
    weights = torch.tensor([3.0] + [1.0] * 11)
    heavy = landscape.NetworkLoss(network, images, labels, weights)
    again = landscape.NetworkLoss(
        network, torch.cat([images, images[:1].repeat(2, 1, 1, 1)]), torch.cat([labels, labels[:1].repeat(2)])
    )
    torch.testing.assert_close(heavy(theta), again(theta))
    torch.testing.assert_close(
        landscape.NetworkLoss(network, images, labels, 7 * weights)(theta), heavy(theta)
    )
    hard = F.one_hot(labels, 3).double()
    torch.testing.assert_close(landscape.NetworkLoss(network, images, hard)(theta), loss(theta))
    other = landscape.NetworkLoss(network, images, (labels + 1) % 3)
    mixed = landscape.NetworkLoss(network, images, 0.25 * hard + 0.75 * hard.roll(1, 1))
    torch.testing.assert_close(mixed(theta), 0.25 * loss(theta) + 0.75 * other(theta))


def test_lines_and_surfaces_are_single_evaluations_and_do_not_depend_on_chunks():
    network, *_, loss = of_network("convnet-d2-w4")
    theta, along = loss.theta, torch.linspace(-1, 1, 5)
    plane = torch.stack([landscape.random_direction(network, generator(k)) for k in (1, 2)])
    surface = landscape.surface(loss, theta, plane, along, chunk=3)
    for i, a in enumerate(along):
        for j, b in enumerate(along):
            torch.testing.assert_close(surface[i, j], loss(theta + a * plane[0] + b * plane[1]).detach())
    torch.testing.assert_close(landscape.surface(loss, theta, plane, along, chunk=25), surface)
    torch.testing.assert_close(landscape.line(loss, theta, plane[0], along), surface[:, 2])


def test_filter_normalised_slices_do_not_see_a_rescaling_of_the_layers():
    """Without biases (W1, W2) and (c W1, W2 / c) are the same function of a ReLU network."""
    g = generator(2)
    first = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight *= 5
        second[2].weight /= 5
    x, y, along = (
        torch.randn(20, 6, generator=g).double(),
        torch.randint(3, (20,), generator=g),
        torch.linspace(-1, 1, 9),
    )
    slices = []
    for network in (first, second):
        loss = landscape.NetworkLoss(network, x, y)
        slices.append(
            landscape.line(loss, loss.theta, landscape.random_direction(network, generator(7)), along)
        )
    torch.testing.assert_close(*slices)
    raw = torch.randn(len(loss.theta), generator=g).double()  # not normalised: they differ
    pair = [landscape.NetworkLoss(network, x, y) for network in (first, second)]
    lines = [landscape.line(loss, loss.theta, raw, along) for loss in pair]
    assert (lines[0] - lines[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["convnet-d2-w4-batch", "mlp"])
def test_interpolation_ends_at_both_networks_with_their_running_statistics(name):
    train = toy_data().train
    pair = [nets.make(name, train, generator(k)) for k in (1, 2)]
    for network in pair:  # running statistics of their own
        network.train()(train.images)
        network.eval()
    along = torch.tensor([0.0, 0.5, 1.0])
    got = landscape.interpolation(*pair, train.images, train.labels, along)
    want = torch.stack([F.cross_entropy(network(train.images), train.labels) for network in pair])
    torch.testing.assert_close(got[[0, 2]], want.detach())
    with pytest.raises(CompanionError, match="must have the same architecture"):
        landscape.interpolation(pair[0], nets.make("lenet", train), train.images, train.labels, along)


def test_the_bound_holds_for_a_smooth_network_and_small_radii():
    """A ReLU's kinks have no Hessian: there it may be missed by a percent."""
    network, images, labels, full = of_network("convnet-d2-w4-swish", count=40)
    subset = landscape.NetworkLoss(network, images[:6], labels[:6])
    theta, starts = full.theta, signs(2, full.theta)
    for rho in (1e-3, 1e-2):
        bound = landscape.gap_bound(full, subset, theta, rho, starts[0])
        gap = landscape.worst_difference(full, subset, theta, rho, starts, steps=10)
        assert 0.5 * bound < gap <= bound * (1 + rho)
    assert landscape.gap_bound(full, full, theta, 1.0, starts[0]).abs() < 1e-10


def test_data_that_does_not_fit_the_network_is_refused_in_one_line():
    train = toy_data().train
    network = nets.make("convnet-d2-w4", train, generator())
    mistakes = [
        ((train.images[:4], train.labels[:5]), "equally many, and at least 1, not 4 / 5 / 4"),
        ((train.images[:0], train.labels[:0]), "at least 1, not 0 / 0 / 0"),
        ((train.images[:4], train.labels[:4], torch.ones(3)), "not 4 / 4 / 3"),
        ((train.images[:4].repeat(1, 3, 1, 1), train.labels[:4]), r"does not fit images \(3, 8, 8\)"),
        ((train.images[:4], train.labels[:4] + 7), "does not fit the labels: it has 3 outputs, they need"),
        ((train.images[:4], torch.ones(4, 5)), "it has 3 outputs, they need 5"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(CompanionError, match=message) as error:
            landscape.NetworkLoss(network, *arguments)
        assert "\n" not in str(error.value)
