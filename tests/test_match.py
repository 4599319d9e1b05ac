"""Gradient matching and feature matching, against loops over classes with plain modules and autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator

from lib import nets
from lib.match import features, gradient
from lib.match.gradient import (
    EPS,
    LOWEST,
    METRICS,
    Cosine,
    FeatureMean,
    LayerSum,
    RowCosine,
    SquaredError,
    class_gradients,
)
from lib.nets.ensemble import Ensemble
from lib.system.errors import CompanionError

LIKE = SimpleNamespace(channels=2, num_classes=3, size=8, first_padding=1, device=torch.device("cpu"))
LABELS = torch.arange(3)
DISTANCES = {"ours": RowCosine(), "mse": SquaredError(), "cos": Cosine()} | {
    f"{parts}-{metric}": LayerSum(metric, parts) for parts in LOWEST for metric in METRICS
}
rowwise_cosine = RowCosine().between


def ensemble(name="convnet-d2-w4-swish", seed=0) -> Ensemble:
    """One network in float64, in eval mode, with statistics and affine weights that are not the initial ones."""
    made = Ensemble.make(name, LIKE, [generator(seed)])
    made.template.double()
    g = generator(seed + 1)
    made.parameters = {k: v.detach().double() for k, v in made.parameters.items()}
    made.buffers = {k: v.double() if v.is_floating_point() else v for k, v in made.buffers.items()}
    for tensors in (made.parameters, made.buffers):
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=g).double()
    return made.train(False)


def batches(real=6, syn=2, seed=0):
    g = generator(seed)
    shape = (2, 8, 8)
    return (torch.randn(3, n, *shape, generator=g).double() for n in (real, syn))


def step(made, real, syn, distance="ours"):
    terms, g = DISTANCES[distance].match(made, real, syn)
    return terms["gradients"], g


def gradients_like(seed, scale=1.0):
    """Random per-class gradients with one tensor of every kind: 4-D, 3-D, 2-D and vectors."""
    g = generator(seed)
    shapes = [(4, 2, 3, 3), (4,), (5, 3, 3), (6, 7), (6,)]
    return [scale * torch.randn(2, *shape, generator=g).double() for shape in shapes]


# -- the distance -------------------------------------------------------------------------------------------------------


def by_loops(a, b):
    total = torch.zeros(len(a[0])).double()
    for c in range(len(a[0])):
        for x, y in zip(a, b, strict=True):
            if x.dim() == 2:  # (C, vector)
                continue
            for r in range(x.shape[1]):
                row, other = x[c, r].flatten(), y[c, r].flatten()
                total[c] += 1 - row @ other / (row.norm() * other.norm() + EPS)
    return total


def test_distance_by_loops():
    a, b = gradients_like(0), gradients_like(1)
    torch.testing.assert_close(rowwise_cosine(a, b), by_loops(a, b))


def test_distance_to_itself():
    g = gradients_like(0, 1e-3)
    rows = [x[:, r].flatten(1).square().sum(1) for x in g if x.dim() > 2 for r in range(x.shape[1])]
    want = sum(EPS / (square + EPS) for square in rows)
    torch.testing.assert_close(rowwise_cosine(g, g), want)
    assert rowwise_cosine(*[gradients_like(0, 1e3)] * 2).abs().max() < 1e-9


def test_distance_ignores_scale_and_vectors():
    a, b = gradients_like(0), gradients_like(1)
    want = rowwise_cosine(a, b)
    torch.testing.assert_close(
        rowwise_cosine([5 * x for x in a], [0.3 * x for x in b]), want, rtol=0, atol=1e-5
    )
    one_row = [x.clone() for x in a]
    one_row[0][:, 1] *= 7
    one_row[3][1, 2] *= 0.2
    torch.testing.assert_close(rowwise_cosine(one_row, b), want, rtol=0, atol=1e-5)
    noisy = [x + torch.randn(x.shape, generator=generator(2)) if x.dim() == 2 else x for x in a]
    assert torch.equal(rowwise_cosine(noisy, b), want)


def test_distance_range_and_zero_rows():
    a, rows = gradients_like(0, 1e3), 4 + 5 + 6
    torch.testing.assert_close(rowwise_cosine(a, [-x for x in a]), torch.full((2,), 2.0 * rows).double())
    assert (rowwise_cosine(a, gradients_like(1)) > 0).all() and (
        rowwise_cosine(a, gradients_like(1)) < 2 * rows
    ).all()
    b = [x.clone() for x in a]
    b[0][0, 2] = 0  # class 0
    b[3][0, 1:4] = 0
    torch.testing.assert_close(rowwise_cosine(a, b), torch.tensor([4.0, 0.0]).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(rowwise_cosine(b, a), torch.tensor([4.0, 0.0]).double(), rtol=0, atol=1e-9)
    b[0].requires_grad_()
    assert torch.autograd.grad(rowwise_cosine(b, a).sum(), b[0])[0].isfinite().all()


def test_ablation_distances_by_hand():
    a, b = gradients_like(0), gradients_like(1)
    for c in range(2):
        x, y = (torch.cat([t[c].flatten() for t in g]) for g in (a, b))
        torch.testing.assert_close(SquaredError().between(a, b)[c], (x - y).square().sum())
        torch.testing.assert_close(Cosine().between(a, b)[c], 1 - x @ y / (x.norm() * y.norm() + EPS))


# -- per-class gradients and the matching step --------------------------------------------------------------------------

NETWORKS = (
    "convnet-d2-w4-swish", "convnet-d2-w4", "convnet-d2-w4-batch-swish", "convnet-d2-w4-layer-sigmoid",
    "convnet-d1-w4-group-max", "convnet-d2-w4-none-leaky", "lenet", "mlp", "vgg11-batch",
)  # fmt: skip


def slow_gradients(network, x, label, create_graph=False):
    loss = F.cross_entropy(network(x), torch.full((len(x),), label))
    return torch.autograd.grad(
        loss, list(network.parameters()), create_graph=create_graph, materialize_grads=True
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_class_gradients_are_those_of_each_class_alone(name):
    made, (real, _) = ensemble(name), batches(4)
    network = made.network(0)
    got = class_gradients(made.template, made.parameters | made.buffers, real, LABELS)
    for c in range(3):
        for (key, _), mine, want in zip(
            network.named_parameters(), got, slow_gradients(network, real[c], c), strict=True
        ):
            torch.testing.assert_close(
                mine[c], want, rtol=1e-8, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}"
            )


MEANINGFUL = [
    (name, distance)
    for name in NETWORKS
    for distance in DISTANCES
    if not name.startswith("vgg") and not (name.startswith("mlp") and distance.startswith("conv"))
]


@pytest.mark.parametrize("distance", [name for name in DISTANCES if name.startswith("conv")])
def test_distances_of_convolutions_need_convolutions(distance):
    made, (real, syn) = ensemble("mlp"), batches()
    with pytest.raises(CompanionError, match="compares convolutions, and this network has none.*weights"):
        step(made, real, syn, distance)


@pytest.mark.parametrize(("name", "distance"), MEANINGFUL)
def test_matching_step_equals_a_loop_over_classes(name, distance):
    made, (real, syn) = ensemble(name), batches()
    network = made.network(0)
    losses, got = step(made, real, syn, distance)
    for c in range(3):
        target = slow_gradients(network, real[c], c)
        pixels = syn[c].clone().requires_grad_()
        current = slow_gradients(network, pixels, c, create_graph=True)
        loss = DISTANCES[distance].between([g[None] for g in current], [g[None] for g in target]).sum()
        torch.testing.assert_close(losses[c], loss.detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(got[c], torch.autograd.grad(loss, pixels)[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["convnet-d2-w4-swish", "convnet-d2-w4-batch", "lenet"])
def test_class_by_class_equals_all_at_once(name, monkeypatch):
    made, (real, syn) = ensemble(name), batches()
    together = step(made, real, syn)
    monkeypatch.setattr(gradient, "GROUPED_BYTES", 0)
    assert gradient._classes_per_call(made.template, real) == 1
    for mine, want in zip(step(made, real, syn), together, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


def test_matching_leaves_network_and_images_alone():
    made, (real, syn) = ensemble("convnet-d2-w4-batch"), batches()
    before = {k: v.clone() for k, v in (made.parameters | made.buffers).items()}
    kept = syn.clone()
    step(made, real, syn)
    assert all(torch.equal(v, before[k]) for k, v in (made.parameters | made.buffers).items())
    assert torch.equal(syn, kept) and not syn.requires_grad


def test_the_real_batch_itself_costs_nothing():
    made, (real, _) = ensemble(), batches()
    losses, g = step(made, real, real.clone())
    own = class_gradients(made.template, made.parameters | made.buffers, real, LABELS)
    torch.testing.assert_close(losses, rowwise_cosine(own, own))
    assert losses.max() < 0.02 < step(made, real, real.roll(1, 0))[0].min()
    losses, g = step(made, real, real.clone(), "mse")
    assert losses.max() < 1e-28 and g.abs().max() < 1e-14
    # the mean loss sees duplicates as one
    assert step(made, real, real.repeat(1, 2, 1, 1, 1), "mse")[0].max() < 1e-25


@pytest.mark.parametrize("distance", list(DISTANCES))
def test_pixel_gradient_by_finite_differences(distance):
    made, (real, syn) = ensemble(), batches(3, 2)
    _, g = step(made, real, syn, distance)
    for at in [(0, 0, 0, 1, 2), (1, 1, 1, 4, 4), (2, 0, 1, 7, 0)]:
        values = []
        for h in (1e-5, -1e-5):
            moved = syn.clone()
            moved[at] += h
            values.append(step(made, real, moved, distance)[0].sum())
        assert g[at].item() == pytest.approx(((values[0] - values[1]) / 2e-5).item(), rel=1e-5, abs=1e-9)


def test_classes_do_not_touch_each_other():
    made, (real, syn) = ensemble(), batches()
    losses, g = step(made, real, syn)
    other_real, other_syn = real.clone(), syn.clone()
    other_real[1] += 1
    other_syn[1] -= 1
    changed, changed_g = step(made, other_real, other_syn)
    torch.testing.assert_close(changed[[0, 2]], losses[[0, 2]])
    torch.testing.assert_close(changed_g[[0, 2]], g[[0, 2]])
    assert not torch.allclose(changed[1], losses[1])


def test_lower_precision_targets_are_close():
    like = {k: v.float() for k, v in (ensemble().parameters).items()}
    template, (real, syn) = nets.make("convnet-d2-w4-swish", LIKE), (b.float() for b in batches())
    made = Ensemble(template, like, {})
    (exact, g), (rough, rough_g) = (
        RowCosine().match(made, real, syn, mixed=mixed) for mixed in (False, True)
    )
    exact, rough = exact["gradients"], rough["gradients"]
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).abs().max() < 0.02 * exact.abs().max()
    assert F.cosine_similarity(rough_g.flatten(), g.flatten(), dim=0) > 0.99


def test_gaps_add_up():
    """Losses by name, and gradients; two of the same name are one term."""
    made, (real, syn) = ensemble(), batches()
    parts = [RowCosine(), FeatureMean(0.5), LayerSum("l1")]
    each = [part.match(made, real, syn) for part in parts]
    terms, g = (parts[0] + (parts[1] + parts[2])).match(made, real, syn)
    assert list(terms) == ["gradients", "features"] == list((parts[0] + parts[1] + parts[2]).names)
    torch.testing.assert_close(terms["gradients"], each[0][0]["gradients"] + each[2][0]["gradients"])
    torch.testing.assert_close(terms["features"], each[1][0]["features"])
    torch.testing.assert_close(g, sum(gradient for _, gradient in each))


def test_the_distance_of_features_written_out():
    made, (real, syn) = ensemble(), batches()
    network, leaf = made.network(0), syn.clone().requires_grad_()
    terms, g = FeatureMean(0.5).match(made, real, syn)
    want = torch.stack(
        [
            0.5 * (network.embed(real[c]).mean(0) - network.embed(leaf[c]).mean(0)).square().sum()
            for c in range(3)
        ]
    )
    torch.testing.assert_close(terms["features"], want.detach())
    torch.testing.assert_close(g, torch.autograd.grad(want.sum(), leaf)[0])
    assert g.norm() > 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LayerSum("l2"), "unknown metric of gradients 'l2'.*l1, l1_mean, mse"),
        (lambda: LayerSum(parts="convs"), "unknown parts of a gradient 'convs'.*all, conv, weights"),
        (lambda: FeatureMean(-1.0), "weight -1.0 of FeatureMean"),
    ],
)
def test_bad_values_are_one_line(make, says):
    with pytest.raises(CompanionError, match=says):
        make()


# -- class means --------------------------------------------------------------------------------------------------------


def embeddings(n, seed):
    return torch.randn(4, n, 5, generator=generator(seed)).double()


def test_class_mean_closed_form_and_kernel_form():
    real, syn = embeddings(7, 0), embeddings(3, 1)
    got = features.class_mean(real, syn)
    for c in range(4):
        torch.testing.assert_close(got[c], (real[c].sum(0) / 7 - syn[c].sum(0) / 3).square().sum())
        mmd = (real[c] @ real[c].T).mean() + (syn[c] @ syn[c].T).mean() - 2 * (real[c] @ syn[c].T).mean()
        torch.testing.assert_close(got[c], mmd, rtol=1e-10, atol=1e-12)


def test_class_mean_invariances():
    real, syn = embeddings(7, 0), embeddings(3, 1)
    assert (features.class_mean(real, real.clone()) == 0).all()
    want = features.class_mean(real, syn)
    torch.testing.assert_close(features.class_mean(real, syn.repeat(1, 4, 1)), want)
    torch.testing.assert_close(features.class_mean(real.flip(1), syn[:, [2, 0, 1]]), want)
    torch.testing.assert_close(features.class_mean(real + 3, syn + 3), want)


def test_class_mean_gradient():
    real, syn = embeddings(7, 0), embeddings(3, 1).requires_grad_()
    (g,) = torch.autograd.grad(features.class_mean(real, syn).sum(), syn)
    want = 2 / 3 * (syn.detach().mean(1) - real.mean(1))
    torch.testing.assert_close(g, want[:, None].expand_as(g))
    (none,) = torch.autograd.grad(features.class_mean(real, syn)[2], syn)
    assert (none[[0, 1, 3]] == 0).all()
