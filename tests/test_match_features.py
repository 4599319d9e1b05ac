"""The discrepancies of distribution matching: identities, invariances, closed forms, finite differences in float64."""

from __future__ import annotations

import math
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator

from lib.formation import mosaic
from lib.match import attention, features, mmd, style, transport
from lib.match.distance import At, Look
from lib.match.features import ClassAware, ClassMean, LayerMeans
from lib.methods.datadam import attention_and_mean
from lib.system.errors import CompanionError

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def sets(real: int = 9, syn: int = 4, d: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + randn(classes, real, d), 0.7 * randn(classes, syn, d, seed=1)


def maps(real: int = 6, syn: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ReLU maps of one layer for 2 classes, (2, n, 4, 3, 3)."""
    return randn(2, real, 4, 3, 3, seed=seed).relu(), randn(2, syn, 4, 3, 3, seed=seed + 1).relu()


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(randn(d, d, seed=7)).Q


def numeric_gradient(function, x: torch.Tensor, h: float = 1e-6) -> torch.Tensor:
    """Central differences of a scalar function."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = h
        out.view(-1)[i] = (function(x + step) - function(x - step)) / (2 * h)
    return out


def assert_gradient(function, x: torch.Tensor, numeric_function=None) -> None:
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(function(leaf), leaf)
    want = numeric_gradient(numeric_function or function, x)
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7 * float(want.abs().max() + 1))


def attention_distance(real: torch.Tensor, syn: torch.Tensor, p: float) -> torch.Tensor:
    """DataDAM's of one layer, ``(C,)``."""
    return attention.mean_distance(attention.attention_map(real, p), attention.attention_map(syn, p))


EMBEDDING_DISTANCES = {
    **{f"mmd {name}": lambda r, s, k=name: mmd.mmd(r, s, k) for name in mmd.KERNELS},
    "w1": lambda r, s: transport.wasserstein(r, s, 1),
    "w2": lambda r, s: transport.wasserstein(r, s, 2),
    "sliced": lambda r, s: transport.sliced(
        r, s, transport.directions(r.shape[-1], 8, generator(), r), 2
    ).mean(-1),
    "sinkhorn": lambda r, s: transport.sinkhorn_divergence(r, s, 5.0, tolerance=1e-10),
    "bures": transport.bures,
    "principal": lambda r, s: style.principal_spread_distance(r, s, 2),
}
MAP_DISTANCES = {
    "gram": style.gram_distance,
    "moments": style.moment_distance,
    "image moments": style.image_moment_distance,
    "spread": style.style_spread_distance,
    "attention p1": lambda r, s: attention_distance(r, s, 1),
    "attention p4": lambda r, s: attention_distance(r, s, 4),
}


@pytest.mark.parametrize("name", EMBEDDING_DISTANCES)
def test_same_set_is_zero_different_is_positive_and_order_does_not_matter(name):
    distance = EMBEDDING_DISTANCES[name]
    real, syn = sets()
    apart = distance(real, syn)
    assert apart.shape == (3,) and (apart > 1e-3).all()
    shuffled = real[:, torch.randperm(9, generator=generator())]
    assert distance(real, shuffled).abs().max() < 1e-8 * (1 + apart.max())
    torch.testing.assert_close(distance(real.flip(1), syn.flip(1)), apart, rtol=1e-7, atol=1e-9)
    # every class is its own problem
    torch.testing.assert_close(distance(real[1:2], syn[1:2])[0], apart[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in EMBEDDING_DISTANCES if n != "principal"])
def test_symmetric(name):
    real, syn = sets()
    distance = EMBEDDING_DISTANCES[name]
    torch.testing.assert_close(distance(real, syn), distance(syn, real), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MAP_DISTANCES)
def test_same_maps_are_zero(name):
    real, syn = maps()
    assert MAP_DISTANCES[name](real, real.flip(1)).abs().max() < 1e-20
    assert (MAP_DISTANCES[name](real, syn) > 1e-6).all()


# ---------------------------------------------------------------- MMD


def test_linear_kernel_is_class_mean():
    real, syn = sets()
    torch.testing.assert_close(mmd.mmd(real, syn, "linear"), features.class_mean(real, syn), **EXACT)


def test_polynomial_kernel_is_the_gap_of_the_first_two_moments():
    real, syn = sets()
    second = [z.transpose(1, 2) @ z / z.shape[1] for z in (real, syn)]
    want = (second[0] - second[1]).square().sum((1, 2)) + 2 * features.class_mean(real, syn)
    torch.testing.assert_close(mmd.mmd(real, syn, "poly"), want, **EXACT)


def test_gaussian_with_its_own_bandwidth_ignores_translation_rotation_and_scale():
    real, syn = sets()
    base = mmd.mmd(real, syn)
    q = rotation(5)
    torch.testing.assert_close(mmd.mmd(30 * real @ q + 1e3, 30 * syn @ q + 1e3), base, rtol=1e-9, atol=0)
    assert not torch.allclose(mmd.mmd(2 * real, 2 * syn, bandwidth=3.0), mmd.mmd(real, syn, bandwidth=3.0))


def test_gaussian_is_the_sum_of_five_widths_over_pairs():
    real, syn = sets()
    union = torch.cat([real, syn], 1)
    squares = (union.unsqueeze(2) - union.unsqueeze(1)).square().sum(-1)  # a slow reference
    b = squares.sum((1, 2)) / (13 * 12)
    torch.testing.assert_close(mmd.mean_squared_distance(real, syn), b, **EXACT)
    gram = sum((-squares / (b[:, None, None] * 2.0 ** (j - 2))).exp() for j in range(5))
    want = gram[:, :9, :9].mean((1, 2)) + gram[:, 9:, 9:].mean((1, 2)) - 2 * gram[:, :9, 9:].mean((1, 2))
    torch.testing.assert_close(mmd.mmd(real, syn), want, **EXACT)
    assert (mmd.gaussian(union, union, b[:, None, None]).diagonal(dim1=1, dim2=2) == 5).all()


@pytest.mark.parametrize("kernel", mmd.KERNELS)
def test_mmd_gradient_holds_the_bandwidth_fixed(kernel):
    real, syn = sets()
    rule = mmd.BANDWIDTHS.get(kernel)
    fixed = rule(real, syn) if rule else None
    assert_gradient(
        lambda s: mmd.mmd(real, s, kernel).sum(), syn, lambda s: mmd.mmd(real, s, kernel, fixed).sum()
    )


def test_equal_means_stop_class_mean_but_not_mmd():
    real = randn(1, 8, 4)
    real = torch.cat([real, -real], 1)
    syn = (0.3 * real).requires_grad_()
    (linear,) = torch.autograd.grad(features.class_mean(real, syn).sum(), syn)
    (gaussian,) = torch.autograd.grad(mmd.mmd(real, syn).sum(), syn)
    assert linear.abs().max() < 1e-14 and gaussian.abs().max() > 1e-3


def test_rbf_has_the_closed_form_of_gaussians():
    m, s, sigma = 1.5, 0.6, 1.2
    quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    z = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    x, y = z.view(1, -1, 1), (m + s * z).view(1, -1, 1)

    def expected(variance: float, delta: float) -> float:
        return (variance / sigma**2 + 1) ** -0.5 * math.exp(-0.5 * delta**2 / (variance + sigma**2))

    want = expected(2, 0) + expected(2 * s**2, 0) - 2 * expected(1 + s**2, m)
    assert mmd.mmd(x, y, "rbf", sigma).item() == pytest.approx(want, rel=2e-3)
    assert mmd.mmd(x, y, "rbf", sigma).sqrt() <= transport.wasserstein_1d(x[..., 0], y[..., 0], 1) / sigma


def test_energy_in_one_dimension_is_twice_the_squared_gap_of_the_distribution_functions():
    real, syn = sets(d=1)
    levels = torch.cat([real, syn], 1)[..., 0].sort(-1).values

    def cdf(points):
        return (points[..., 0].unsqueeze(-1) <= levels[:, None, :-1]).double().mean(1)

    want = 2 * ((cdf(real) - cdf(syn)).square() * levels.diff(dim=-1)).sum(-1)
    torch.testing.assert_close(mmd.mmd(real, syn, "energy"), want, **EXACT)


def test_unbiased_mmd_averages_to_zero_for_one_distribution():
    x, y = randn(400, 6, 2), randn(400, 6, 2, seed=5)
    values = mmd.mmd(x, y, "rbf", 1.0, biased=False)
    assert values.min() < 0 and abs(values.mean()) < 3 * values.std() / 20
    assert mmd.mmd(x, y, "rbf", 1.0).min() >= 0 and mmd.mmd(x, y, "rbf", 1.0).mean() > 0.05


def test_coinciding_points_give_finite_values_and_gradients():
    real = torch.full((2, 3, 4), 0.5, dtype=torch.float64)
    for kernel in mmd.KERNELS:
        syn = real.clone().requires_grad_()
        value = mmd.mmd(real, syn, kernel).sum()
        (gradient,) = torch.autograd.grad(value, syn)
        assert abs(value.item()) < 1e-12 and gradient.isfinite().all()


def test_mmd_refuses_what_is_not_a_kernel_or_bandwidth():
    real, syn = sets()
    with pytest.raises(CompanionError, match="gausian.*allowed.*gaussian"):
        mmd.mmd(real, syn, "gausian")
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(CompanionError, match="must be positive"):
            mmd.mmd(real, syn, bandwidth=bad)
    with pytest.raises(CompanionError, match="1 image"):
        mmd.mmd(real, syn[:, :1], biased=False)


# ---------------------------------------------------------------- CAFE, IDM, partition


def look(*maps: torch.Tensor) -> Look:
    """Maps of some ReLUs; the last one is also the pooling, whose flattened form is the embedding."""
    return Look.of(maps[-1].flatten(2), {"act": list(maps)})


def test_layer_means_add_up_to_class_means():
    real, syn = (look(part, part) for part in maps())
    terms = LayerMeans((0.5, 0.0, 2.0)).between(real, syn)
    mean = ClassMean().between(real, syn)["mean"]
    assert terms.keys() == {"relu1", "pool"}  # a layer of weight 0 is not compared
    torch.testing.assert_close(terms["relu1"], 0.5 * mean, **EXACT)
    torch.testing.assert_close(terms["pool"], 2 * mean, **EXACT)
    torch.testing.assert_close(mean, features.class_mean(real.embedding, syn.embedding), **EXACT)
    assert sum(LayerMeans((1.0, 1.0, 1.0)).between(real, real).values()).abs().max() == 0


def test_discrimination_limits_and_gradient():
    classes, n, m = 4, 5, 2
    centres = 50 * torch.eye(classes, dtype=torch.float64)
    real = centres.unsqueeze(1).expand(-1, n, -1)
    assert features.discrimination(real, centres.unsqueeze(1)).abs().max() < 1e-12
    same = torch.ones(classes, m, classes, dtype=torch.float64)
    torch.testing.assert_close(
        features.discrimination(real, same).sum().item(), classes * n * math.log(classes)
    )
    real, syn = randn(classes, n, 3), randn(classes, m, 3, seed=1).requires_grad_()
    (got,) = torch.autograd.grad(features.discrimination(real, syn).sum(), syn)
    p = features.discrimination_logits(real, syn).softmax(-1)
    residual = p - torch.eye(classes, dtype=torch.float64).unsqueeze(1)  # (C, n, C)
    want = torch.einsum("cnk,cnd->kd", residual, real) / m
    torch.testing.assert_close(got, want.unsqueeze(1).expand_as(got), **EXACT)


def test_class_aware_weighs_the_cross_entropy_by_percent_accuracy():
    real, syn = (Look.of(part) for part in sets())
    classifier = torch.nn.Linear(5, 6).double()
    network = SimpleNamespace(classifier=classifier)
    logits = classifier(syn.embedding)
    entropy = torch.stack([F.cross_entropy(logits[c], torch.full((4,), c)) for c in range(3)])
    at = At(network, 37.5)
    terms = (ClassMean() + ClassAware(0.5)).between(real, syn, at)
    torch.testing.assert_close(terms["cross-entropy"], 18.75 * entropy, **EXACT)
    assert at.measured == {"accuracy": torch.tensor(37.5)}
    assert ClassAware().between(real, syn, At(network, 0.0))["cross-entropy"].abs().max() == 0  # untrained


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_partition_round_trip_order_and_constants(factor):
    images = randn(2, 3, 6, 12)
    parts = mosaic.cells(images, factor)
    assert parts.shape == (factor**2, 2, 3, 6 // factor, 12 // factor)
    assert torch.equal(mosaic.compose(parts), images)
    if factor == 2:  # top left, bottom left, top right, bottom right
        assert torch.equal(parts[1], images[..., 3:, :6]) and torch.equal(parts[2], images[..., :3, 6:])
    values = torch.arange(2.0 * factor**2).view(factor**2, 2, 1, 1, 1)
    flat = mosaic.compose(values.expand(-1, -1, 3, 4, 4).contiguous())
    grown = mosaic.expand(flat, factor)
    assert grown.shape == (2 * factor**2, 3, 4 * factor, 4 * factor)
    torch.testing.assert_close(grown, values.view(-1, 1, 1, 1).expand_as(grown))  # cell by cell
    labels = mosaic.expand_labels(torch.tensor([4, 7]), factor)
    assert labels.tolist() == [4, 7] * factor**2


def test_partition_halves_by_averaging_and_refuses_odd_sizes():
    images = randn(4, 2, 3, 8, 8)
    torch.testing.assert_close(mosaic.shrink(images[0]), F.avg_pool2d(images[0], 2), **EXACT)
    assert torch.equal(mosaic.cells(mosaic.mosaics(images))[3], mosaic.shrink(images[3]))
    with pytest.raises(CompanionError, match="factor 3 for 8x8 images: allowed 1, 2, 4, 8"):
        mosaic.cells(images[0], 3)
    with pytest.raises(CompanionError, match="5 cells"):
        mosaic.compose(randn(5, 1, 1, 2, 2))


# ---------------------------------------------------------------- DataDAM


@pytest.mark.parametrize("p", [1, 2, 3.5, 4])
def test_attention_maps_are_unit_and_ignore_scale_and_channel_order(p):
    real, _ = maps()
    got = attention.attention_map(real, p)
    assert got.shape == (2, 6, 9) and (got >= 0).all()
    torch.testing.assert_close(got.norm(dim=-1), torch.ones(2, 6, dtype=torch.float64), **EXACT)
    scales = 0.5 + torch.rand(2, 6, 1, 1, 1, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(attention.attention_map(scales * real.flip(2), p), got, **EXACT)
    want = real.abs().pow(p).sum(2).flatten(2)
    torch.testing.assert_close(got, want / want.norm(dim=-1, keepdim=True), **EXACT)


def test_attention_gradient_is_orthogonal_to_the_features_of_each_image():
    real, syn = maps()
    syn.requires_grad_()
    (gradient,) = torch.autograd.grad(attention_distance(real, syn, 2).sum(), syn)
    assert gradient.abs().max() > 1e-3
    assert (gradient * syn).flatten(2).sum(-1).abs().max() < 1e-14
    assert_gradient(lambda s: attention_distance(real, s, 4).sum(), syn.detach() + 0.1)


def test_attention_of_one_position_is_no_distance():
    single = [m[..., :1, :1] + 0.1 for m in maps()]  # every map is the number 1
    assert attention_distance(*single, 1).abs().max() < 1e-28
    looks = [look(part, part) for part in single]
    terms = attention_and_mean(4.0, 0.01).between(*looks)
    assert terms.keys() == {"mean", "attention1"} and terms["attention1"].abs().max() < 1e-26
    torch.testing.assert_close(
        terms["mean"], features.class_mean(*(one.embedding for one in looks)), rtol=1e-12, atol=0
    )


def test_attention_edge_cases():
    dead = torch.zeros(1, 2, 3, 2, 2, requires_grad=True)
    value = attention_distance(torch.ones(1, 2, 3, 2, 2), dead, 1).sum()
    assert torch.autograd.grad(value, dead)[0].isfinite().all()
    large = torch.full((1, 1, 2, 2, 2), 300.0, dtype=torch.float16)
    assert attention.attention_map(large, 4).tolist() == [[[0.5] * 4]]
    with pytest.raises(CompanionError, match="p = 0"):
        attention.attention_map(large, 0)


# ---------------------------------------------------------------- style and diversity


def test_gram_is_positive_semidefinite_with_the_mean_square_as_trace():
    real, _ = maps()
    grams = torch.einsum("cnkhw,cnlhw->cnkl", real, real) / real[0, 0].numel()  # of each image, 1 / Khw
    assert torch.equal(grams, grams.transpose(-1, -2)) or torch.allclose(grams, grams.transpose(-1, -2))
    assert torch.linalg.eigvalsh(grams).min() > -1e-14
    torch.testing.assert_close(
        grams.diagonal(dim1=-2, dim2=-1).sum(-1), real.square().mean((-3, -2, -1)), **EXACT
    )
    torch.testing.assert_close(style.mean_gram(real), grams.mean(1), **EXACT)  # one product = per image


def test_permuted_positions_tell_the_two_moment_estimators_apart():
    real, syn = maps()
    common = torch.randperm(9, generator=generator(3))
    together = real.flatten(3)[..., common].unflatten(3, (3, 3))
    orders = torch.rand(2, 6, 1, 9, generator=generator(4)).argsort(-1).expand(-1, -1, 4, -1)
    apart = real.flatten(3).gather(3, orders).unflatten(3, (3, 3))
    for name in ("gram", "moments", "image moments"):
        distance = MAP_DISTANCES[name]
        torch.testing.assert_close(distance(together, syn), distance(real, syn), **EXACT)
        unchanged = torch.allclose(distance(apart, syn), distance(real, syn), rtol=1e-9)
        assert unchanged == (name != "moments")


@pytest.mark.parametrize("name", [n for n in MAP_DISTANCES if "attention" not in n])
def test_style_gradients(name):
    real, syn = maps()
    assert_gradient(lambda s: 100 * MAP_DISTANCES[name](real, s).sum(), syn)


def test_batch_first_deviation_shrinks_with_the_batch_and_the_other_does_not():
    many = randn(1, 64, 3, 8, 8)
    averaged_first = style.moments(many.mean(1))[1].mean()
    assert averaged_first < 0.2 and style.moments(many)[1].mean() > 0.9


@pytest.mark.parametrize("classes, layers", [(10, 3), (2, 2), (5, 4), (3, 1)])
def test_accumulation_weights_are_those_of_the_published_loop(classes, layers):
    distances = randn(classes).abs()
    style_variable, total = 0.0, 0.0
    for distance in distances:
        style_variable = (style_variable + distance) / layers
        total = total + style_variable
    got = (style.accumulation_weights(classes, layers, legacy=True) * distances).sum()
    torch.testing.assert_close(got, total, **EXACT)
    assert (style.accumulation_weights(classes, layers) == 1 / layers).all()


def test_diversity_is_negative_shift_free_equivariant_and_zero_when_collapsed():
    _, syn = sets(syn=6)
    value = style.neighbour_diversity(syn, 2)
    assert (value < 0).all()
    torch.testing.assert_close(style.neighbour_diversity(syn + 7, 2), value, **EXACT)
    torch.testing.assert_close(style.neighbour_diversity(syn.flip(1), 2), value, **EXACT)
    assert style.neighbour_diversity(syn[:, :1].expand(-1, 6, -1), 2).abs().max() < 1e-14
    assert (style.neighbour_diversity(3 * syn, 2) < value).all()
    assert_gradient(lambda s: style.neighbour_diversity(s, 2).sum(), syn)


def test_diversity_against_a_loop():
    _, syn = sets(syn=6)
    total = 0.0
    for i in range(6):
        others = sorted((j for j in range(6) if j != i), key=lambda j: (syn[0, i] - syn[0, j]).norm().item())
        q = syn[0, others[:3]].mean(0).log_softmax(0)
        total -= F.kl_div(q, syn[0, i].softmax(0), reduction="sum")
    torch.testing.assert_close(style.neighbour_diversity(syn, 3)[0], total, **EXACT)


def test_diversity_of_one_image_is_zero_and_k_is_checked():
    syn = randn(3, 1, 5).requires_grad_()
    value = style.neighbour_diversity(syn)
    assert value.tolist() == [0, 0, 0]
    assert torch.autograd.grad(value.sum(), syn)[0].abs().max() == 0
    assert style.principal_spread_distance(randn(3, 9, 5), syn).tolist() == [0, 0, 0]
    assert [style.default_neighbours(m) for m in (1, 2, 5, 10, 50)] == [0, 1, 1, 2, 10]
    for bad in (0, 4, 9):
        with pytest.raises(CompanionError, match=f"k = {bad} .*allowed 1 to 3"):
            style.neighbour_diversity(randn(2, 4, 5), bad)
    with pytest.raises(CompanionError, match="rank 6"):
        style.principal_spread_distance(randn(2, 9, 5), randn(2, 4, 5), 6)
    with pytest.raises(CompanionError, match="2 or more"):
        style.style_spread_distance(*maps(syn=1))


def test_bounded_diversity_rises_on_both_sides_of_the_real_spread():
    real = randn(2, 30, 4)
    values = [style.principal_spread_distance(real, s * real + 5, 3) for s in (0.5, 0.8, 1.0, 1.2, 1.5)]
    assert (values[2] < 1e-20).all()
    assert (values[0] > values[1]).all() and (values[4] > values[3]).all() and (values[3] > 0.01).all()
    torch.testing.assert_close(values[0], torch.full((2,), 0.25, dtype=torch.float64), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- transport


def test_exact_transport_is_the_best_assignment():
    real, syn = sets(real=4, syn=4)
    for p in (1, 2):
        pairs = transport.cost_matrix(real, syn, p)
        orders = list(permutations(range(4)))
        best = torch.stack([pairs[:, range(4), order].mean(-1) for order in orders]).min(0).values
        torch.testing.assert_close(transport.wasserstein(real, syn, p), best, **EXACT)


def test_exact_plan_marginals_duals_and_witness():
    real, syn = sets()
    a, b = (torch.rand(3, n, generator=generator(n), dtype=torch.float64) + 0.1 for n in (9, 4))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    cost = transport.cost_matrix(real, syn, 1)
    plan, f, g = transport.exact_plan(cost, a, b)
    torch.testing.assert_close(plan.sum(-1), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(-2), b, rtol=0, atol=1e-12)
    assert (f.unsqueeze(-1) + g.unsqueeze(-2) - cost).max() < 1e-9
    primal = transport.wasserstein(real, syn, 1, a, b)
    torch.testing.assert_close(transport.wasserstein_dual(real, syn, 1, a, b)[0], primal, rtol=0, atol=1e-9)

    def theta(z):
        return transport.lipschitz_extension(z, syn, g)

    torch.testing.assert_close(
        transport.witness_gap(theta(real), theta(syn), a, b), primal, rtol=0, atol=1e-9
    )
    probes = randn(3, 40, 5, seed=9)
    assert ((theta(probes) - theta(-probes)).abs() <= (2 * probes).norm(dim=-1) + 1e-12).all()
    direction = F.normalize(randn(5, seed=3), dim=0)  # any other 1-Lipschitz critic stays below
    assert (transport.witness_gap(real @ direction, syn @ direction, a, b) <= primal + 1e-12).all()


def test_transport_inequalities_and_translation():
    real, syn = sets()
    w1, w2 = (transport.wasserstein(real, syn, p) for p in (1, 2))
    mean = features.class_mean(real, syn)
    assert (mean.sqrt() <= w1).all() and (w1 <= w2.sqrt()).all()
    assert (transport.bures(real, syn) <= w2 + 1e-9).all() and (mean <= transport.bures(real, syn)).all()
    directions = transport.directions(5, 50, generator(), real)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(50, dtype=torch.float64), **EXACT)
    assert (transport.sliced(real, syn, directions) <= w2.unsqueeze(-1)).all()
    v = randn(5, seed=4)
    torch.testing.assert_close(transport.wasserstein(real, real + v, 1), v.norm().expand(3), **EXACT)
    moved = w2 + v.square().sum() + 2 * (syn.mean(1) - real.mean(1)) @ v
    torch.testing.assert_close(transport.wasserstein(real, syn + v, 2), moved, **EXACT)
    third = randn(3, 6, 5, seed=8)
    assert (w1 <= transport.wasserstein(real, third, 1) + transport.wasserstein(third, syn, 1) + 1e-12).all()


def test_one_synthetic_image_has_the_gradient_of_class_mean():
    real, syn = sets(syn=1)
    syn.requires_grad_()
    value = transport.wasserstein(real, syn, 2)
    spread = real.var(1, correction=0).sum(-1)
    torch.testing.assert_close(value, features.class_mean(real, syn) + spread, **EXACT)
    gradients = [
        torch.autograd.grad(v.sum(), syn)[0]
        for v in (value, features.class_mean(real, syn), transport.sinkhorn_divergence(real, syn, 1.0))
    ]
    torch.testing.assert_close(gradients[0], gradients[1], **EXACT)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_exact_and_sinkhorn_gradients(p):
    real, syn = sets(classes=1)
    assert_gradient(lambda s: transport.wasserstein(real, s, p).sum(), syn)
    assert_gradient(
        lambda s: transport.sinkhorn_divergence(real, s, 0.5, p, tolerance=1e-11, sweeps=3000).sum(), syn
    )


def test_sinkhorn_limits():
    real, syn = sets(real=5, syn=5)
    exact = transport.wasserstein(real, syn, 2)
    cost = transport.cost_matrix(real, syn)
    uniform = torch.full((3, 5), 0.2, dtype=torch.float64)
    costs = [transport.sinkhorn(cost, uniform, uniform, e, 1e-4, 5000).transport for e in (0.1, 1.0, 10.0)]
    torch.testing.assert_close(costs[0], exact, rtol=5e-3, atol=1e-3)
    assert (exact <= costs[0] + 1e-2).all() and (costs[0] < costs[1]).all() and (costs[1] < costs[2]).all()
    wide = transport.sinkhorn(cost, uniform, uniform, 1e6)
    torch.testing.assert_close(wide.plan, torch.full_like(wide.plan, 0.04), rtol=1e-4, atol=0)
    far = transport.sinkhorn_divergence(real, syn, 1e6, tolerance=1e-10)
    torch.testing.assert_close(far, features.class_mean(real, syn), rtol=1e-4, atol=0)


def test_sinkhorn_says_when_it_did_not_converge_and_what_it_needs():
    real, syn = sets()
    with pytest.warns(UserWarning, match="after 12 sweeps with marginal error"):
        transport.sinkhorn_divergence(real, syn, 1e-3, sweeps=12)
    with pytest.raises(CompanionError, match="regularisation 0 "):
        transport.sinkhorn_divergence(real, syn, 0.0)
    assert transport.sinkhorn_divergence(real.float(), syn.float()).dtype == torch.float32
    for bad in (float("nan"), float("inf")):
        broken = syn.clone()
        broken[0, 0, 0] = bad
        for distance in (transport.wasserstein, transport.wasserstein_dual, transport.sinkhorn_divergence):
            with pytest.raises(CompanionError, match="NaN or infinite"):
                distance(real, broken)
    with pytest.raises(CompanionError, match="exponent p 3"):
        transport.wasserstein(real, syn, 3)
    with pytest.raises(CompanionError, match="4 weights for 9 points"):
        transport.wasserstein(real, syn, 2, torch.ones(4) / 4)


@pytest.mark.parametrize("n, m", [(8, 8), (8, 4), (4, 8), (7, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_dimensional_transport_equals_the_linear_program(n, m, weighted):
    x, y = randn(2, n), randn(2, m, seed=1) + 1
    a = b = None
    if weighted:
        a, b = (F.softmax(randn(2, k, seed=k), -1) for k in (n, m))
    for p in (1, 2):
        want = transport.wasserstein(x.unsqueeze(-1), y.unsqueeze(-1), p, a, b)
        torch.testing.assert_close(transport.wasserstein_1d(x, y, p, a, b), want, **EXACT)
    uniform = [torch.full((2, k), 1 / k, dtype=torch.float64) for k in (n, m)]
    torch.testing.assert_close(
        transport.wasserstein_1d(x, y, 2), transport.wasserstein_1d(x, y, 2, *uniform), **EXACT
    )
    assert_gradient(lambda s: transport.wasserstein_1d(x, s, 2, a, b).sum(), y)


def test_one_dimensional_gaussians_have_their_closed_forms():
    quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    z = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    for mu, s in ((1.3, 0.4), (0.0, 0.5), (-0.7, 0.0)):
        w1, w2 = (transport.wasserstein_1d(z, z * (1 + s) - mu, p).item() for p in (1, 2))
        phi = 0.5 * (1 + math.erf(-mu / s / math.sqrt(2))) if s else 0.0
        gap = (
            s * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / 2 / s**2) + mu * (1 - 2 * phi) if s else abs(mu)
        )
        assert w1 == pytest.approx(gap, rel=2e-3) and w2 == pytest.approx(mu**2 + s**2, rel=2e-3)


def test_gaussian_w2_commuting_covariances_and_metric_properties():
    q, delta = rotation(4), randn(4)
    one, two = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0, 3.0, 0.0], [4.0, 0.5, 3.0, 1.0]))
    first, second = (q @ torch.diag(v) @ q.T for v in (one, two))
    want = delta.square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    torch.testing.assert_close(
        transport.gaussian_w2(delta, first, torch.zeros_like(delta), second), want, rtol=1e-7, atol=1e-7
    )
    assert transport.gaussian_w2(delta, second, delta, second).abs() < 1e-12
