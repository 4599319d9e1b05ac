"""Kernels, ridge regression, feature maps and the closed forms: closed-form values, invariances, slow references."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lib.kernels import closed_form, ridge
from lib.kernels.conv import box_filter, convolutional
from lib.kernels.fc import arc_cosine, fully_connected
from lib.kernels.feature_maps import (
    Fourier,
    Identity,
    LeakyNet,
    conjugate_kernel,
    conv_features,
    random_blocks,
)
from lib.optim.adabelief import AdaBelief
from lib.system.errors import CompanionError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def close(a, b, tol=1e-12):
    assert (a - b).abs().max() <= tol * b.abs().max()


# -- fully-connected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_fc_diagonal_has_its_closed_form(depth):
    x = randn(5, 7)
    size = 2 * x.square().sum(1) / 7
    kernels = fully_connected(x, depth=depth, sigma_b=0)
    close(kernels.nngp.diagonal(), size)
    close(kernels.ntk.diagonal(), (depth + 1) * size)


@pytest.mark.parametrize("width", [None, 64])
def test_kernels_are_symmetric_and_positive(width):
    x = randn(12, 6)
    for k in fully_connected(x, depth=2, width=width):
        close(k, k.T, 1e-14)
        assert torch.linalg.eigvalsh(k)[0] > 0
    images = randn(6, 2, 4, 4)
    for net in ("cpf", "ccg", "ccf"):
        for k in convolutional(images, net=net):
            assert torch.equal(k, k.T) and torch.linalg.eigvalsh(k)[0] > 0


def test_fc_without_biases_is_homogeneous_and_ignores_pixel_order():
    x, z, order = randn(4, 6), randn(3, 6, seed=1), torch.randperm(6, generator=seeded())
    plain = fully_connected(x, z, 2, sigma_b=0)
    for a, b, c in zip(
        plain,
        fully_connected(2 * x, 3 * z, 2, sigma_b=0),
        fully_connected(x[:, order], z[:, order], 2, sigma_b=0),
        strict=True,
    ):
        close(b, 6 * a)
        close(c, a)


def test_guards_at_coincident_opposite_and_blank_inputs():
    x = randn(1, 50).requires_grad_()
    z = torch.cat([x.detach(), -x.detach(), 0 * x.detach()])
    kernels = fully_connected(x, z, 1, sigma_b=0)
    size = float(2 * x.detach().square().sum() / 50)
    close(kernels.nngp[0], torch.tensor([size, 0, 0], dtype=torch.float64))
    close(kernels.ntk[0], torch.tensor([2 * size, 0, 0], dtype=torch.float64))
    assert torch.equal(kernels.ntk[0, 1:], torch.zeros(2).double())  # exactly, not 1e-8
    for k in kernels:
        assert torch.autograd.grad(k.sum(), x, retain_graph=True)[0].isfinite().all()


def test_a_blank_input_has_a_right_angle():
    value, active = arc_cosine(*(torch.tensor([v], dtype=torch.float64) for v in (0.0, 0.0, 2.0)))
    assert float(value) == 0 and float(active) == 0.25


def test_standard_parameterisation_of_a_linear_model_is_the_gram_matrix():
    x = randn(4, 7)  # gradients of w^T x + b
    close(fully_connected(x, depth=0, width=9).ntk, x @ x.T + 1)
    close(fully_connected(x, depth=0, width=9, sigma_b=0).ntk, x @ x.T)


def test_arc_cosine_has_the_right_derivative_and_expectation():
    k, q1, q2 = randn(3, 4).tanh(), 1.5 + randn(3, 1).square(), 1.5 + randn(1, 4).square()
    assert gradcheck(arc_cosine, [v.requires_grad_() for v in (k, q1, q2)])
    u, v = randn(2, 400_000)
    v = 0.6 * u + v  # covariance 0.6, variances 1 and 1.36
    value, active = arc_cosine(*(torch.tensor([c], dtype=torch.float64) for c in (0.6, 1.0, 1.36)))
    assert abs(float((u.relu() * v.relu()).mean() - value)) < 5e-3
    assert abs(float(((u > 0) & (v > 0)).double().mean() - active)) < 5e-3


@pytest.mark.parametrize("standard", [False, True])
def test_ntk_is_the_limit_of_a_finite_network(standard):
    n, d, width = 3, 5, 1024
    x = randn(n, d)
    shapes = [(width, d), (width, width), (1, width)]
    params = []
    for index, (out, fan_in) in enumerate(shapes):
        scale = math.sqrt(2 / fan_in) if standard else 1.0
        bias = (0.1 if standard else 1.0) * randn(out, seed=10 + index)
        params += [scale * randn(out, fan_in, seed=index), bias]
    params = [p.requires_grad_() for p in params]

    def net(h):
        for index in range(3):
            w, b = params[2 * index : 2 * index + 2]
            h = h @ w.T + b if standard else h @ w.T * math.sqrt(2 / w.shape[1]) + 0.1 * b
            h = h.relu() if index < 2 else h
        return h

    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(net(x[i : i + 1]), params)]) for i in range(n)
    ]
    gradients = torch.stack(rows)
    close(gradients @ gradients.T, fully_connected(x, depth=2, width=width if standard else None).ntk, 0.08)


# -- convolutional --------------------------------------------------------------------------------------------------


def test_box_filter_is_the_sum_over_common_offsets_and_symmetric():
    k, out = randn(2, 3, 4, 3, 4), torch.zeros(2, 3, 4, 3, 4, dtype=torch.float64)
    padded = torch.nn.functional.pad(k, (1, 1) * 4)
    for a in range(3):
        for b in range(3):
            out += padded[:, a : a + 3, b : b + 4, a : a + 3, b : b + 4] / 9
    close(box_filter(k), out)
    other = randn(2, 3, 4, 3, 4, seed=1)
    assert torch.allclose((box_filter(k) * other).sum(), (k * box_filter(other)).sum())


def test_diagonal_path_equals_full_path():
    x, z = randn(3, 2, 4, 5), randn(2, 2, 4, 5, seed=1)
    for fast, full in zip(
        convolutional(x, z, "ccf"), convolutional(x, z, "ccf", diagonal=False), strict=True
    ):
        close(fast, full)


@pytest.mark.parametrize("net", ["ccf", "cpcg", "kip"])
def test_chunks_and_symmetry_change_nothing(net):
    side = 8 if net == "kip" else 5  # an odd size loses its last row and column in the pooling
    x = randn(3, 1, side, side).requires_grad_()
    grads = []
    for args in ({}, {"chunk": 1}, {"x2": x}):
        kernels = convolutional(x, net=net, **args)
        grads.append((kernels.ntk, torch.autograd.grad((kernels.ntk * randn(3, 3)).sum(), x)[0]))
    for k, g in grads[1:]:
        close(k, grads[0][0], 1e-7)
        close(g, grads[0][1], 1e-7)


def test_convolution_on_one_pixel_is_a_dense_layer():
    x, z = randn(4, 3, 1, 1), randn(2, 3, 1, 1, seed=1)
    for conv, dense in zip(convolutional(x, z, "cf"), fully_connected(x / 3, z / 3, 1), strict=True):
        close(conv, dense)


@pytest.mark.parametrize("net", ["ccf", "cpf", "cg"])
def test_a_common_flip_leaves_conv_kernels_unchanged(net):
    x, z = randn(2, 1, 4, 4), randn(3, 1, 4, 4, seed=1)
    for a, b in zip(convolutional(x, z, net), convolutional(x.flip(3), z.flip(3), net), strict=True):
        close(a, b)


@pytest.mark.parametrize("net", ["cpcf", "ccg", "ccf"])
def test_conv_gradient_agrees_with_finite_differences(net):
    x, z = randn(2, 1, 4, 4).requires_grad_(), randn(2, 1, 4, 4, seed=1).requires_grad_()
    assert gradcheck(lambda x, z: tuple(convolutional(x, z, net)), (x, z))
    # K_ss, whose diagonal has no gradient through the angle: along a line the whole diagonal is smooth
    direction, eps = randn(2, 1, 4, 4, seed=2), 1e-5
    weight = randn(2, 2, seed=3)

    def value(shift):
        return (convolutional(x + shift * direction, net=net).nngp * weight).sum()

    slope = (torch.autograd.grad(value(0), x)[0] * direction).sum()
    assert torch.allclose((value(eps) - value(-eps)).detach() / (2 * eps), slope, rtol=1e-6)


def test_random_features_approach_the_exact_nngp():
    x = randn(4, 1, 8, 8)
    exact = convolutional(x, net="convnet3").nngp

    def error(nets):
        phi = conv_features(x, random_blocks(nets, 1, seeded(), width=32, dtype=torch.float64))
        return float((conjugate_kernel(phi, phi) - exact).norm() / exact.norm())

    few, many = error(4), error(256)
    assert many < 0.05 and few / many > 3  # the slope -1/2 predicts 8


@pytest.mark.parametrize(
    ("net", "shape", "part"),
    [
        ("cpcpcpf", (1, 4, 4), "survive 3"),
        ("convnet4", (1, 8, 8), "allowed: convnet3"),
        ("cfp", (1, 8, 8), "cfp"),
    ],
)
def test_conv_errors(net, shape, part):
    with pytest.raises(CompanionError, match=part):
        convolutional(randn(2, *shape), net=net)


# -- ridge ----------------------------------------------------------------------------------------------------------


def test_ridge_predicts_its_support_and_shrinks_to_zero():
    x, y = randn(8, 5), ridge.centred_one_hot(torch.arange(8) % 4, 4)
    k = fully_connected(x).ntk
    close(ridge.predict(k, k, y, 0), y, 1e-9)
    assert ridge.mse(ridge.predict(k, k, y, 1e-9), y) < 1e-12
    assert ridge.predict(k, k, y, 1e9).abs().max() < 1e-6
    assert ridge.accuracy(ridge.predict(k, k, y, 0), torch.arange(8) % 4) == 1
    assert torch.equal(y.sum(1).abs() < 1e-15, torch.ones(8, dtype=torch.bool))


@pytest.mark.parametrize("apart", [0.0, 1e-15, 1e-14])
def test_labels_of_copies_of_an_image_stay_finite(apart):
    """Two copies, up to rounding, leave a direction of labels that the targets cannot see: it gets none."""
    x, t, y_t = randn(12, 40), randn(60, 40, seed=1), randn(60, 3, seed=2)
    x[1] = x[0] + apart * randn(40, seed=3) / 40**0.5
    k_ss, k_ts = fully_connected(x).ntk, fully_connected(t, x).ntk
    labels = ridge.label_solve(k_ts, k_ss, y_t)
    alone = ridge.label_solve(k_ts[:, 1:], k_ss[1:, 1:], y_t)
    assert labels.abs().max() < 2 * alone.abs().max()
    both, one = ridge.predict(k_ts, k_ss, labels), ridge.predict(k_ts[:, 1:], k_ss[1:, 1:], alone)
    assert ridge.mse(both, y_t) < 1.01 * ridge.mse(one, y_t)


def test_label_solve_is_a_minimum_and_the_published_form_its_limit():
    x, z, y_t = randn(6, 5), randn(40, 5, seed=1), randn(40, 3, seed=2)
    k_ss, k_ts = fully_connected(x).ntk, fully_connected(z, x).ntk
    y = ridge.label_solve(k_ts, k_ss, y_t).requires_grad_()
    loss = ridge.mse(ridge.predict(k_ts, k_ss, y), y_t)
    assert torch.autograd.grad(loss, y)[0].abs().max() < 1e-12
    close(ridge.label_solve_regularised(k_ts, k_ss, y_t, 1e-9), ridge.label_solve(k_ts, k_ss, y_t, 0), 1e-6)


def test_ridge_is_scaled_by_the_mean_of_the_diagonal_or_by_nothing():
    x, y_t, eye = randn(6, 5), randn(6, 2, seed=1), torch.eye(6, dtype=torch.float64)
    k = fully_connected(x).ntk
    for scaled, r in ((True, 0.5 * k.trace() / 6), (False, 0.5)):
        close(ridge.predict(k, k, y_t, 0.5, scaled), k @ torch.linalg.inv(k + r * eye) @ y_t, 1e-10)
    r = 0.5 / 6
    published = (k + r * eye) @ torch.linalg.inv(k.T @ k + r * eye) @ k.T @ y_t
    close(ridge.label_solve_regularised(k, k, y_t, 0.5), published, 1e-10)


def test_ridge_in_32_bits_solves_in_64():
    x, y = randn(30, 3).float(), randn(30, 2, seed=1).float()
    k = fully_connected(x).ntk
    want = ridge.predict(k.double(), k.double(), y.double(), 1e-4)
    got = ridge.predict(k, k, y, 1e-4)
    assert got.dtype == torch.float32
    close(got.double(), want, 1e-3)


def test_platt_gradient_and_margin():
    prediction, labels = randn(6, 3), torch.arange(6) % 3
    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(ridge.platt(prediction, labels, k), k)[0]
    scaled = k.detach().exp() * prediction
    gap = scaled.softmax(1) - torch.nn.functional.one_hot(labels, 3)
    assert torch.allclose(gradient, (gap * scaled).sum() / 6)
    one_hot = ridge.centred_one_hot(labels, 3).requires_grad_()
    value = ridge.margin(one_hot)
    assert math.isclose(value.detach(), -1 / 3) and torch.autograd.grad(value, one_hot)[0].abs().max() == 0


def test_ridge_errors_name_what_is_wrong():
    singular = torch.ones(3, 3).double()
    with pytest.raises(CompanionError, match=r"not positive definite \(condition number"):
        ridge.predict(singular, singular - 0.5 * torch.eye(3), torch.ones(3, 1).double(), 0)
    with pytest.raises(CompanionError, match="1 of 9 entries of the kernel are not finite"):
        bad = torch.eye(3).double()
        bad[2, 1] = math.nan
        ridge.solve(bad, bad)
    with pytest.raises(CompanionError, match="ridge -1"):
        ridge.regularised(singular, -1)


# -- feature maps ---------------------------------------------------------------------------------------------------


def test_invertible_maps_invert():
    x = randn(6, 9)
    net = LeakyNet.draw((6, 6, 6), seeded())
    close(net.inverse(net(x)), x, 1e-9)
    narrow = LeakyNet.draw((6, 5, 3), seeded())
    close(narrow(narrow.inverse(narrow(x))), narrow(x), 1e-9)
    fourier = Fourier.draw(6, 4, seeded())
    v = (2 * torch.rand(4, 9, generator=seeded(1), dtype=torch.float64) - 1) * math.sqrt(2 / 4)
    close(fourier(fourier.inverse(v, rescale=False)), v, 1e-9)
    scaled = fourier(fourier.inverse(5 * v))
    close(scaled / scaled.abs().max(), v / v.abs().max(), 1e-9)
    with pytest.raises(CompanionError, match="allowed: -1 to 1"):
        fourier.inverse(5 * v, rescale=False)
    with pytest.raises(CompanionError, match="7 features of 6 inputs"):
        LeakyNet.draw((6, 7), seeded()).inverse(randn(7, 2))


def test_grouped_networks_equal_single_ones():
    x, blocks = randn(3, 2, 8, 8), random_blocks(3, 2, seeded(), width=5, dtype=torch.float64)
    phi = conv_features(x, blocks)
    single = [conv_features(x, [(w[j : j + 1], b[j : j + 1]) for w, b in blocks]) for j in range(3)]
    close(phi, torch.cat(single, 1) / math.sqrt(3))
    copies = [(w[:1].expand_as(w), b[:1].expand_as(b)) for w, b in blocks]
    repeated = conv_features(x, copies)
    close(conjugate_kernel(repeated, repeated), conjugate_kernel(single[0], single[0]))
    with pytest.raises(CompanionError, match="4-pixel images do not survive 3"):
        conv_features(randn(1, 2, 4, 4), blocks)


# -- closed-form distillation ---------------------------------------------------------------------------------------

K, P, N = 3, 8, 40


def teacher(lam=0.1):
    phi, y = randn(P, N), torch.nn.functional.one_hot(torch.arange(N) % K).T.double()
    return phi, y, closed_form.ridge_path(phi, y)(lam)


@pytest.mark.parametrize("m", [K, 5, P, 12])
@pytest.mark.parametrize("roots", ["zero", "plus", "minus", "mixed", "bound"])
def test_distilled_set_has_the_teacher_as_its_solution(m, roots):
    _, _, w = teacher()
    y_s, z = randn(K, m, seed=3), randn(m, P, seed=4)
    d = closed_form.admissible(y_s, w, z)
    bound = closed_form.clipped(d, math.inf)
    lam = {"zero": 0.0, "bound": bound}.get(roots, 0.5 * bound)
    rank = min(m, P)
    signs = {"minus": -1.0, "mixed": (-1.0) ** torch.arange(rank).double()}.get(roots, 1.0)
    phi_s = closed_form.solve_features(d, lam, signs)
    assert phi_s.shape == (P, m)
    close(closed_form.student(phi_s, y_s, lam), w, 1e-9)
    test = randn(P, 100, seed=5)
    assert torch.equal((closed_form.student(phi_s, y_s, lam) @ test).argmax(0), (w @ test).argmax(0))


def test_too_few_points_and_too_large_a_ridge_are_refused():
    _, _, w = teacher()
    with pytest.raises(CompanionError, match="labels of rank 2 for 3 classes"):
        closed_form.admissible(randn(K, 2), w, randn(2, P))
    d = closed_form.admissible(closed_form.cyclic_labels(K, 2), w, randn(6, P))
    bound = closed_form.clipped(d, math.inf)
    assert closed_form.clipped(d, 1e9) == bound and closed_form.clipped(d, bound / 2) == bound / 2
    with pytest.raises(CompanionError, match="no real features"):
        closed_form.solve_features(d, 1.01 * bound)
    with pytest.raises(CompanionError, match="lambda_S -1"):
        closed_form.solve_features(d, -1)


@pytest.mark.parametrize("n", [5, N])
def test_ridge_path_equals_one_solve_per_lambda(n):
    phi, y, _ = teacher()
    path = closed_form.ridge_path(phi[:, :n], y[:, :n])
    for lam in (1e-3, 1.0, 1e3):
        direct = y[:, :n] @ phi[:, :n].T @ torch.linalg.inv(phi[:, :n] @ phi[:, :n].T + lam * torch.eye(P))
        close(path(lam), direct, 1e-10)
        close(closed_form.student(phi[:, :n], y[:, :n], lam), direct, 1e-10)
    with pytest.raises(CompanionError, match="lambda 0"):
        path(0)


@pytest.mark.parametrize("lam", [0.0, 0.2])
def test_regularised_features_and_pinv_are_inverse_to_each_other(lam):
    for shape in ((P, 5), (5, P)):
        phi = randn(*shape)
        close(
            torch.linalg.pinv(closed_form.regularised_features(phi, lam)),
            closed_form.regularised_pinv(phi, lam),
            1e-10,
        )


def test_whole_training_set_is_its_own_distillation():
    phi, y, w = teacher(0.2)
    d = closed_form.admissible(y, w, closed_form.nearest(y, w, phi, 0.2))
    close(d, closed_form.regularised_pinv(phi, 0.2), 1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.2])
def test_real_mode_takes_the_nearest_admissible_set(lam):
    _, _, w = teacher()
    real, y_s = randn(P, 6, seed=6), randn(K, 6, seed=7)
    target = closed_form.regularised_pinv(real, lam)

    def distance(z):
        return float((closed_form.admissible(y_s, w, z) - target).norm())

    best = closed_form.nearest(y_s, w, real, lam)
    assert all(distance(best + 0.1 * randn(6, P, seed=s)) > distance(best) for s in range(5))


def test_labels_alone_need_as_many_points_as_features():
    _, _, w = teacher()
    for m, exact in ((P - 1, False), (P, True)):
        real = randn(P, m, seed=8)
        error = (closed_form.student(real, closed_form.labels_for(real, w, 0.3), 0.3) - w).norm() / w.norm()
        assert (error < 1e-10) == exact


def test_a_rotated_pixel_basis_rotates_the_images():
    phi, y, w = teacher()
    q = torch.linalg.qr(randn(P, P, seed=9)).Q
    y_s = closed_form.cyclic_labels(K, 1)
    images = closed_form.solve_features(closed_form.admissible(y_s, w, randn(K, P)))
    turned = closed_form.ridge_path(q @ phi, y)(0.1)
    close(closed_form.solve_features(closed_form.admissible(y_s, turned, randn(K, P))), q @ images, 1e-9)


@pytest.mark.parametrize("ipc", [1, 3])
def test_images_pulled_back_through_a_map_keep_the_teacher(ipc):
    x, y = randn(P, N), torch.nn.functional.one_hot(torch.arange(N) % K).T.double()
    for phi in (Identity(), LeakyNet.draw((P, P), seeded()), Fourier.draw(P, P, seeded())):
        w = closed_form.ridge_path(phi(x), y)(0.1)
        y_s = closed_form.cyclic_labels(K, ipc)
        d = closed_form.admissible(y_s, w, closed_form.noise(y_s, w, seeded(2)))
        images = phi.inverse(closed_form.solve_features(d))
        got = closed_form.student(phi(images), y_s)
        assert torch.equal((got @ phi(x)).argmax(0), (w @ phi(x)).argmax(0))
        assert torch.nn.functional.cosine_similarity(got.flatten(), w.flatten(), 0) > 1 - 1e-9


def test_kip_labels_equal_the_pseudo_inverse_on_all_data():
    phi, y, _ = teacher()
    phi_s = randn(P, 6, seed=3).requires_grad_()
    m = torch.linalg.inv(phi_s.T @ phi_s + 0.01 * torch.eye(6)) @ phi_s.T
    want = y @ torch.linalg.pinv(m @ phi)
    got, student = closed_form.kip_labels(phi_s, phi @ phi.T, phi @ y.T, 0.01)
    close(got, want, 1e-9)
    close(student, want @ m, 1e-9)
    slow, fast = (
        torch.autograd.grad((w @ randn(P, 2)).square().sum(), phi_s)[0] for w in (want @ m, student)
    )
    close(fast, slow, 1e-7)


def test_privacy_noise_scales_as_stated_and_needs_spare_points():
    _, y, _ = teacher()
    y_s = closed_form.cyclic_labels(K, 2)
    printed = closed_form.privacy_noise(y_s, y, 1.0, 0.5, 1.0, 1e-5, standard=False)
    # every row: |Y_S^+ Y| = sqrt(14) / 2 at most (14 images of a class), |I - Y_S^+ Y_S| = 1 / sqrt(2)
    assert math.isclose(printed, 2 * math.sqrt(math.log(1.25e5)) * math.sqrt(14) / 2 * math.sqrt(2) / 0.25)
    assert math.isclose(closed_form.privacy_noise(y_s, y, 1.0, 0.5, 1.0, 1e-5), math.sqrt(2) * printed)
    with pytest.raises(CompanionError, match="no room for noise"):
        closed_form.privacy_noise(closed_form.cyclic_labels(K, 1), y, 1.0, 0.5, 1.0, 1e-5)


def test_adabelief_steps_by_the_learning_rate_under_a_large_first_gradient():
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = AdaBelief([theta], lr=0.1)
    theta.grad = torch.tensor([4.0, -2.0]).double()
    optimiser.step()
    # m = g / 10, s = (9 g / 10)^2 / 1000: the step is lr g / (9 |g| / 10)
    close(theta.detach(), torch.tensor([-1.0, 1.0]).double() / 9, 1e-9)
