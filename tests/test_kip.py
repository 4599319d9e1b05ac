"""KIP, Label Solve and their kernels: the algorithm written out, closed forms, slow references, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import generator
from torch.autograd import gradcheck

from lib.analysis.spectrum import intrinsic_dimension, spectral_bands
from lib.distill import distill
from lib.evaluate.kernel import kernel_accuracy
from lib.evaluate.regression import regression_targets
from lib.kernels import ridge
from lib.kernels.conv import convolutional
from lib.kernels.fc import fully_connected
from lib.kernels.feature_maps import conjugate_kernel, conv_features, random_blocks
from lib.methods import method
from lib.methods.kip import KIP, ConvKIP
from lib.system.errors import CompanionError

SMALL = KIP(iterations=4, target_batch=30)
CONV = ConvKIP(iterations=2, target_batch=9, nets=("cpf",), augmentation="none", learn_labels=False)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def close(a, b, tol=1e-12):
    assert (a - b).abs().max() <= tol * b.abs().max()


# -- kernels ------------------------------------------------------------------------------------------------------------


def plain_kernels(x, z, depth, width=None, sigma_w=1.3, sigma_b=0.1):
    """The recursion with arccos and autograd, for inputs in general position."""
    a, b, fan_in = sigma_w**2, sigma_b**2, x.shape[1]
    k, q, r = x @ z.T / fan_in, x.square().mean(1)[:, None], z.square().mean(1)[None]
    ntk = torch.zeros_like(k)
    for layer in range(depth + 1):
        ntk = a * ntk + (fan_in * k + (b > 0) if width else a * k + b)
        k, q, r = a * k + b, a * q + b, a * r + b
        if layer < depth:
            theta = torch.arccos(k / (q * r).sqrt())
            ntk = ntk * (math.pi - theta) / (2 * math.pi)
            k = (q * r).sqrt() / (2 * math.pi) * (theta.sin() + (math.pi - theta) * theta.cos())
            q, r, fan_in = q / 2, r / 2, width
    return k, ntk


@pytest.mark.parametrize("width", [None, 17])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("used", ["nngp", "ntk", "both"])
def test_closed_form_derivative_equals_autograd_of_the_plain_recursion(depth, width, used):
    x, z = randn(5, 7).requires_grad_(), randn(4, 7, seed=1).requires_grad_()
    weights = {"nngp": (1, 0), "ntk": (0, 1), "both": (1, 1)}[used]
    weights = [w * randn(5, 4, seed=2 + i) for i, w in enumerate(weights)]
    found = []
    for kernels in (fully_connected(x, z, depth, 1.3, 0.1, width), plain_kernels(x, z, depth, width)):
        chosen = [(k * w).sum() for k, w in zip(kernels, weights, strict=True) if w.any()]
        found.append((*kernels, *torch.autograd.grad(sum(chosen), (x, z))))
    for ours, plain in zip(*found, strict=True):
        close(ours, plain, 1e-11)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_kernel_of_a_set_with_itself_has_the_gradient_of_both_sides(depth):
    x, weight = randn(5, 7).requires_grad_(), randn(5, 5, seed=1)
    once = torch.autograd.grad((fully_connected(x, depth=depth).ntk * weight).sum(), x)[0]
    twin = x.detach().clone().requires_grad_()
    both = torch.autograd.grad((fully_connected(x, twin, depth).ntk * weight).sum(), (x, twin))
    close(once, both[0] + both[1], 1e-11)


def test_fc_gradient_agrees_with_finite_differences():
    x, z = randn(3, 4).requires_grad_(), randn(2, 4, seed=1).requires_grad_()
    assert gradcheck(lambda x, z: tuple(fully_connected(x, z, 2)), (x, z))


def test_the_solver_has_the_gradient_of_the_inverse():
    a, b = randn(5, 5), randn(5, 2, seed=1).requires_grad_()
    a = (a @ a.T + torch.eye(5)).requires_grad_()
    weight, found = randn(5, 2, seed=2), []
    for x in (ridge.solve(a, b), torch.linalg.inv(a) @ b):
        found.append(torch.autograd.grad((x * weight).sum(), (a, b)))
    for ours, plain in zip(*found, strict=True):
        close(ours, plain, 1e-9)


@pytest.mark.parametrize("net", ["pcf", "ppcg"])
def test_pooling_in_front_of_a_kernel_network_pools_the_images(net):
    x, z = randn(3, 2, 8, 8), randn(2, 2, 8, 8, seed=1)
    pooled = [torch.nn.functional.avg_pool2d(v, 2 ** net.count("p")) for v in (x, z)]
    for ours, rest in zip(convolutional(x, z, net), convolutional(*pooled, net.lstrip("p")), strict=True):
        close(ours, rest)


def plain_conv(x, z, layers, a, b):
    """Kernels of one pair of images (c, h, w) by loops over pixels and offsets, the NTK by its sum over layers."""
    c, h, w = x.shape
    pixels = [(i, j) for i in range(h) for j in range(w)]

    def own(u, v):
        return {(p, r): float((u[:, *p] * v[:, *r]).sum() / c) for p in pixels for r in pixels}

    def average(k):
        offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return {
            (p, r): sum(k.get(((p[0] + i, p[1] + j), (r[0] + i, r[1] + j)), 0.0) for i, j in offsets) / 9
            for p, r in k
        }

    k, q, s = own(x, z), own(x, x), own(z, z)
    ntk = dict.fromkeys(k, 0.0)
    for _ in range(layers):
        k, q, s = ({key: a * v + b for key, v in average(m).items()} for m in (k, q, s))
        ntk = {key: a * v + k[key] for key, v in average(ntk).items()}

        def relu(m, left, right):
            value, active = {}, {}
            for (p, r), v in m.items():
                size = math.sqrt(left[p, p] * right[r, r])
                theta = math.acos(max(-1.0, min(1.0, v / size)))
                value[p, r] = size * (math.sin(theta) + (math.pi - theta) * math.cos(theta)) / (2 * math.pi)
                active[p, r] = (math.pi - theta) / (2 * math.pi)
            return value, active

        (k, active), (q, _), (s, _) = relu(k, q, s), relu(q, q, q), relu(s, s, s)
        ntk = {key: v * active[key] for key, v in ntk.items()}
    windows = {}
    for (p, r), v in ntk.items():  # 2x2 average pooling, then flatten and Dense
        windows.setdefault((p[0] // 2, p[1] // 2, r[0] // 2, r[1] // 2), []).append((v, k[p, r]))
    same = [entries for (i, j, m, n), entries in windows.items() if (i, j) == (m, n)]
    ntk, k = (sum(sum(e[part] for e in entries) / 16 for entries in same) / len(same) for part in (0, 1))
    return a * k + b, a * ntk + a * k + b


def test_conv_kernel_equals_loops_over_pixels_and_offsets():
    x, z = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1)
    for ours, plain in zip(convolutional(x, z, "ccpf"), plain_conv(x[0], z[0], 2, 2.0, 0.01), strict=True):
        assert math.isclose(float(ours), plain, rel_tol=1e-12)


def test_conv_gradient_in_chunks_agrees_with_finite_differences():
    x, z = randn(2, 1, 4, 4).requires_grad_(), randn(2, 1, 4, 4, seed=1).requires_grad_()
    assert gradcheck(lambda x, z: convolutional(x, z, "cpcg", chunk=300).ntk, (x, z))


def test_features_of_wide_random_networks_average_to_the_nngp():
    """Monte Carlo: 2 phi phi^T / N + 0.01, and the error falls as one over the square root of the number of networks."""
    x = randn(5, 1, 8, 8)
    exact = convolutional(x, net="cpcpf").nngp
    draws = [random_blocks(1, 1, generator(s), width=64, depth=2, dtype=torch.float64) for s in range(64)]
    estimates = torch.stack([conjugate_kernel(*[conv_features(x, blocks)] * 2) for blocks in draws])
    mean, error = estimates.mean(0), estimates.std(0) / 8
    assert ((mean - exact).abs() < 5 * error).all() and (error < 0.1 * exact.diagonal().mean()).all()


# -- the method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("which", ["fc", "conv"])
def test_kip_lowers_its_loss(toy, which, learn):
    base = replace(SMALL, iterations=40) if which == "fc" else replace(CONV, iterations=10)
    run = distill(replace(base, learn_labels=learn), toy.train, 1, 0)
    assert run.history["loss"][-5:].mean() < 0.8 * run.history["loss"][0]
    hard = ridge.centred_one_hot(torch.arange(3), 3)
    assert learn != torch.equal(regression_targets(run.synset, dtype=torch.float64), hard)


def test_a_support_that_is_all_targets_has_no_loss(toy):
    run = distill(replace(SMALL, iterations=1, target_batch=60, ridge=1e-12), toy.train, 20, 0)
    assert run.history["loss"] < 1e-12 and run.history["accuracy"] == 1


def test_mixed_precision_has_nearly_the_same_gradient(toy):
    """What 32 bits in K_ts cost: the loss to 1e-5 and the gradient to 1e-3, while 64 bits in K_ss stay."""
    found = []
    for precision in ("float64", "mixed"):
        chosen = replace(SMALL, precision=precision, target_batch=60)
        state = chosen.begin(toy.train, 2, generator(1))
        loss = chosen.step(state, generator(2))["loss"]
        assert state.pixels.dtype == torch.float64
        found.append((loss, state.pixels.grad))
    (loss, gradient), (rough_loss, rough) = found
    assert abs(rough_loss / loss - 1) < 1e-5 and 0 < (rough - gradient).norm() < 1e-3 * gradient.norm()


def test_label_solve_minimises_the_loss_over_all_training_images(toy):
    chosen = KIP(iterations=0, labels="solve", target_batch=30)
    synset = distill(chosen, toy.train, 2, 0).synset
    state = chosen.begin(toy.train, 2, generator(0))
    torch.testing.assert_close(synset.codes.double(), state.pixels.detach())
    y_s = state.labels.clone().requires_grad_()
    kernel, y_t = chosen.kernel(), ridge.centred_one_hot(toy.train.labels, 3)
    x_t, x_s = toy.train.images.double(), state.pixels.detach()
    loss = ridge.mse(ridge.predict(kernel(x_t, x_s), kernel(x_s), y_s, chosen.ridge), y_t)
    gradient = torch.autograd.grad(loss, y_s)[0]
    assert gradient.abs().max() < 1e-12
    hard = ridge.centred_one_hot(torch.arange(3).repeat_interleave(2), 3)
    assert loss < ridge.mse(ridge.predict(kernel(x_t, x_s), kernel(x_s), hard, chosen.ridge), y_t)
    assert (
        kernel_accuracy(kernel, x_s, y_s.detach(), toy.train)
        > kernel_accuracy(kernel, x_s, hard, toy.train) - 0.05
    )
    published = replace(chosen, labels="solve-published", ridge=1e-9).begin(toy.train, 2, generator(0))
    other = replace(chosen, ridge=0.0).begin(toy.train, 2, generator(0))
    close(published.labels, other.labels, 1e-4)


def test_label_solve_can_be_the_start_of_learned_labels(toy):
    chosen = replace(SMALL, labels="solve", learn_labels=True, target_batch=60)
    run = distill(chosen, toy.train, 1, 0)
    plain = distill(replace(chosen, labels="hard"), toy.train, 1, 0)
    assert run.history["loss"][0] < plain.history["loss"][0] and run.synset.soft


def test_a_drawn_kernel_changes_from_step_to_step(toy):
    chosen = replace(CONV, nets=("cf", "ccf"), iterations=8)
    losses = distill(chosen, toy.train, 1, 3).history["loss"]
    torch.testing.assert_close(losses, distill(chosen, toy.train, 1, 3).history["loss"], rtol=0, atol=0)
    g, x = generator(0), toy.train.images[:2].double()
    values = {round(float(chosen.kernel(g)(x)[0, 1]), 10) for _ in range(12)}
    assert values == {round(float(convolutional(x, net=net).ntk[0, 1]), 10) for net in chosen.nets}


def test_targets_are_balanced_and_augmented_one_by_one(toy):
    images, labels = SMALL.targets(toy.train, generator(0))
    assert torch.equal(torch.bincount(labels), torch.full((3,), 10))
    same, again = replace(SMALL, augmentation="flip").targets(toy.train, generator(0))
    assert torch.equal(labels, again)
    flipped = (same == images.flip(3)).flatten(1).all(1)
    assert (flipped | (same == images).flatten(1).all(1)).all() and 0 < flipped.sum() < len(images)


def test_methods_are_found_by_name():
    assert method("kip") is KIP and method("conv_kip") is ConvKIP


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: KIP(init="reel"), "init 'reel' .*real"),
        (lambda: KIP(kind="ntks"), "kind 'ntks' .*ntk"),
        (lambda: KIP(labels="soft"), "labels 'soft'"),
        (lambda: KIP(precision="float16"), "precision 'float16'"),
        (lambda: KIP(ridge=-1e-6), "ridge -1e-06; allowed: 0"),
        (lambda: KIP(depth=-1), "depth -1"),
        (lambda: ConvKIP(nets=("convnet4",)), "allowed: convnet3"),
        (lambda: ConvKIP(nets=()), "one net or more"),
        (lambda: ConvKIP(chunk=0), "chunk of 1 or more"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(make, part):
    with pytest.raises(CompanionError, match=part) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "ipc", "part"),
    [
        (KIP(target_batch=2), 1, "2 targets of 3 classes"),
        (replace(CONV, nets=("cpcpcpcpf",)), 1, "8-pixel images do not survive 4 poolings"),
        (SMALL, 21, "ipc 21 is larger"),
    ],
)
def test_data_that_does_not_fit_is_refused(toy, chosen, ipc, part):
    with pytest.raises(CompanionError, match=part):
        distill(chosen, toy.train, ipc)


def test_label_solve_needs_as_many_targets_as_images(toy):
    few = toy.train.subset([0, 20, 40])
    with pytest.raises(CompanionError, match="6 images needs as many targets, not 3"):
        replace(SMALL, labels="solve").solved(toy.train.images[:6].double(), few)


def test_coincident_support_without_a_ridge_is_refused(toy):
    """A set with the same image twice under two labels has no regression: the condition number is in the message."""
    images = toy.train.images[:1].repeat(2, 1, 1, 1).double()
    kernel = SMALL.kernel()
    with pytest.raises(CompanionError, match="not positive definite .condition number"):
        kernel_accuracy(kernel, images, torch.eye(2, 3).double(), toy.test, lam=0.0)


# -- spectrum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 3, 7])
def test_bands_add_up_to_the_whole_prediction_and_are_orthogonal(bands):
    x, z, y = randn(7, 5), randn(9, 5, seed=1), randn(7, 2, seed=2)
    k_ss, k_ts = fully_connected(x).ntk, fully_connected(z, x).ntk
    parts = spectral_bands(k_ss, k_ts, y, bands)
    close(parts.sum(0), k_ts @ torch.linalg.solve(k_ss, y), 1e-9)
    on_itself = spectral_bands(k_ss, k_ss, y, bands)  # projections of the labels
    gram = torch.einsum("anc,bnc->ab", on_itself, on_itself)
    close(gram, torch.diag(gram.diagonal()), 1e-9)
    with pytest.raises(CompanionError, match="8 bands of 7"):
        spectral_bands(k_ss, k_ts, y, 8)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_intrinsic_dimension_of_a_cube_in_a_larger_space(d):
    flat = torch.rand(1500, d, generator=generator(d), dtype=torch.float64)
    turned = flat @ torch.linalg.qr(randn(12, d)).Q.T
    assert abs(intrinsic_dimension(turned) / d - 1) < 0.12
    close(torch.tensor(intrinsic_dimension(3 * turned)), torch.tensor(intrinsic_dimension(turned)), 1e-5)
    with pytest.raises(CompanionError, match="2 points"):
        intrinsic_dimension(turned[:2])
