"""RCIG's expansion, its inner problem in closed form, its gradient against finite differences and unrolled descent, and its pool."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data

from lib.distill import distill
from lib.kernels import linearised, ridge
from lib.kernels.adam_rates import falls
from lib.kernels.linearised import Inner, adam, conjugate_gradient, gradient_along, predict
from lib.methods import rcig
from lib.methods.frepo import FRePo
from lib.methods.rcig import RCIG, clipped
from lib.nets.tangent import TangentNet
from lib.plain.rcig import Softplus, expand
from lib.system.errors import CompanionError

SMALL = RCIG(
    iterations=6, networks=2, online_updates=6, most_updates=4, lr=0.02, lr_network=0.01, real_batch=20, width=3, depth=2,
    solver="exact", flip=False,
)  # fmt: skip


def net(train, beta: float = 60.0, last_kernel: bool = False, depth: int = 2) -> TangentNet:
    """A network in 64 bits."""
    made = TangentNet(train, 3, depth, beta, last_kernel)
    made.reset(generator(1))
    return made.double().requires_grad_(False)


def jacobian(network: TangentNet, x):
    """Features and Jacobian (n, C, P) by automatic differentiation of the plain network, differentiable in x."""
    plain = Softplus(LIKE[x.shape[-1]], 3, len(network.convolutions), norm=False).double()
    plain.beta = network.beta
    plain.load_state_dict(network.state_dict())
    phi, J = expand(plain, x)
    return phi, J if network.last_kernel else J[:, :, _without_kernel(network)]


LIKE = {size: toy_data(size=size).train for size in (8, 14)}


def _without_kernel(network):
    kernel, classes = network.classifier.weight.numel(), network.classifier.out_features
    total = sum(p.numel() for p in network.parameters())
    return [*range(total - classes - kernel), *range(total - classes, total)]


def problem(train, beta: float = 60.0, last_kernel: bool = False, lam: float = 0.05, ipc: int = 2):
    """A network, images and perturbed labels in 64 bits, and their inner problem."""
    network, x = net(train, beta, last_kernel), train.sample(ipc, generator(2)).flatten(0, 1).double()
    y = ridge.centred_one_hot(torch.arange(3).repeat_interleave(ipc), 3)
    y = y + 0.1 * torch.randn(y.shape, generator=generator(3), dtype=y.dtype)
    return network, x, y, Inner.at(network, x, y, lam)


# -- the expansion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 14])
@pytest.mark.parametrize("beta", [60.0, 0.0])
@pytest.mark.parametrize("last_kernel", [False, True])
def test_jacobian_and_products_are_those_of_automatic_differentiation(size, beta, last_kernel):
    """At 14 pixels pooling drops a row, whose gradient is 0."""
    network = net(LIKE[size], beta, last_kernel)
    x = LIKE[size].images[:5].double()
    phi, J = jacobian(network, x)
    assert J.shape[2] == network.size
    torch.testing.assert_close(network.jacobian(x), J, rtol=1e-9, atol=1e-12)
    delta = torch.randn(network.size, generator=generator(4), dtype=torch.float64)
    features, o = network.tangent(x, delta)
    torch.testing.assert_close(o, J @ delta, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(features, phi)
    assert int(network.without_kernel().sum()) == len(_without_kernel(network))


def test_the_expansion_is_the_networks_first_order(toy):
    network, x = net(toy.train, last_kernel=True), toy.train.images[:5].double()
    theta = torch.nn.utils.parameters_to_vector(network.parameters())
    delta = torch.randn(network.size, generator=generator(4), dtype=torch.float64)
    errors = []
    for eps in (1e-4, 1e-5):
        torch.nn.utils.vector_to_parameters(theta, network.parameters())
        before, o = network(x), network.tangent(x, delta)[1]
        torch.nn.utils.vector_to_parameters(theta + eps * delta, network.parameters())
        errors.append(float((network(x) - before - eps * o).norm()))
    assert errors[1] < 0.02 * errors[0]  # of second order: a hundredth


# -- the inner problem --------------------------------------------------------------------------------------------------


def test_the_two_forms_of_the_inner_loss_agree_and_are_quadratic(toy):
    network, x, y, inner = problem(toy.train)
    delta, direction = torch.randn(2, network.size, generator=generator(4), dtype=torch.float64)
    K, r = network.embed(x) @ network.embed(x).T, y - network.tangent(x, delta)[1]
    A = torch.linalg.solve(K + 0.05 * torch.eye(len(x)), r)
    fit, length = (r - K @ A).square().sum(), (A.T @ K @ A).trace() + delta.square().sum()
    torch.testing.assert_close(inner.loss(delta), (fit / 2 + 0.05 / 2 * length) / y.numel())
    line = torch.stack([inner.loss(delta + t * direction) for t in range(4)])
    second = line.diff().diff()
    assert second.min() > 0 and abs(float(second.diff())) < 1e-9 * float(second[0])
    expected = inner.loss(direction * 0) - inner.b @ delta + delta @ inner.hessian(delta) / 2
    torch.testing.assert_close(inner.loss(delta), expected)


@pytest.mark.parametrize("last_kernel", [False, True])
def test_the_exact_solution_is_the_dense_one(toy, last_kernel):
    network, _, _, inner = problem(toy.train, last_kernel=last_kernel)
    H = torch.stack([inner.hessian(e) for e in torch.eye(network.size, dtype=torch.float64)])
    torch.testing.assert_close(H, H.T)
    assert torch.linalg.eigvalsh(H).min() > 0.999 * inner.scale  # H >= lambda / (nC)
    torch.testing.assert_close(inner.minimiser(), torch.linalg.solve(H, inner.b), rtol=1e-6, atol=1e-9)
    g = torch.randn(network.size, generator=generator(5), dtype=torch.float64)
    torch.testing.assert_close(inner.inverse(g), torch.linalg.solve(H, g), rtol=1e-6, atol=1e-6)
    assert (inner.hessian(inner.minimiser()) - inner.b).norm() < 1e-9 * inner.b.norm()


def test_exact_predictions_are_those_of_the_empirical_ntk(toy):
    """Kernel regression with K_ts (x) I + J_t J_s^T."""
    network, x, y, inner = problem(toy.train)
    x_t = toy.train.images[:9].double()
    (phi_s, J_s), (phi_t, J_t) = jacobian(network, x), jacobian(network, x_t)
    J_s, J_t, eye = J_s.flatten(0, 1), J_t.flatten(0, 1), torch.eye(3, dtype=torch.float64)
    theta_ts = torch.kron(phi_t @ phi_s.T, eye) + J_t @ J_s.T
    theta_ss = torch.kron(phi_s @ phi_s.T, eye) + J_s @ J_s.T
    wanted = ridge.predict(theta_ts, theta_ss, y.reshape(-1, 1), 0.05, scaled=False).view(9, 3)
    torch.testing.assert_close(predict(network, x, y, 0.05, inner.minimiser(), x_t), wanted)


def test_products_without_a_jacobian_are_the_same(toy):
    network, x, y, inner = problem(toy.train, last_kernel=True)
    free = Inner.at(network, x, y, 0.05, largest=0)
    assert free.J is None and inner.J is not None
    v = torch.randn(network.size, generator=generator(5), dtype=torch.float64)
    torch.testing.assert_close(free.hessian(v), inner.hessian(v))
    torch.testing.assert_close(free.b, inner.b)
    with pytest.raises(
        CompanionError, match=f"needs a Jacobian of 18 x {network.size} entries; allowed: .*cg or adam"
    ):
        free.minimiser()


def test_conjugate_gradients_reach_what_twenty_steps_of_adam_do_not(toy):
    _, _, _, inner = problem(toy.train)
    g = torch.randn(inner.network.size, generator=generator(5), dtype=torch.float64)
    exact = inner.inverse(g)

    def error(v):
        return float((v - exact).norm() / exact.norm())

    few, rates = (
        conjugate_gradient(inner.hessian, g, 20),
        [adam(inner.hessian, g, 20, lr)[0] for lr in (1e-3, 1e-2, 1e-1)],
    )
    assert error(few) < min(map(error, rates)) and error(rates[0]) > 0.5
    many = conjugate_gradient(inner.hessian, g, 500)
    assert error(many) < 1e-6 and many.isfinite().all()  # and stays there


def test_adam_moves_what_it_may_and_lowers_its_objective(toy):
    network, _, _, inner = problem(toy.train, last_kernel=True)
    delta, seen = adam(inner.hessian, inner.b, 20, 1e-3, network.without_kernel())
    assert torch.equal(delta != 0, network.without_kernel() > 0)
    assert seen[0] == 0 and (seen.diff() < 0).all()
    torch.testing.assert_close(
        inner.loss(delta) - inner.loss(0 * delta), delta @ (inner.hessian(delta) - 2 * inner.b) / 2
    )


# -- the gradient -------------------------------------------------------------------------------------------------------


def total(method: RCIG, network, learned, batch):
    _, direct, implicit, *_ = method.gradients(network, learned, batch)
    return [d + i for d, i in zip(direct, implicit, strict=True)], direct, implicit


def setting(toy, **changes):
    """A method, a network, what is learned, and real images, in 64 bits."""
    network, x, y, _ = problem(toy.train, **{key: changes.pop(key) for key in ("beta",) if key in changes})
    tau = torch.tensor(0.3, dtype=torch.float64)
    learned = [tensor.requires_grad_() for tensor in (x, y, tau)]
    batch = (toy.train.images[:12].double(), toy.train.labels[:12])
    return replace(SMALL, ridge=0.01, **changes), network, learned, batch


@pytest.mark.parametrize("changes", [{}, {"flip": True}, {"loss": "mse"}], ids=str)
def test_the_gradient_is_that_of_finite_differences(toy, changes):
    """Of L_T at the displacement that every moved set has; the direct part alone is not."""
    method, network, learned, batch = setting(toy, **changes)
    found, direct, _ = total(method, network, learned, batch)

    def loss_at(psi):
        inner = Inner.at(network, *method.support(*psi[:2]), method.ridge * len(psi[0]))
        return float(method.objective(network, *psi, inner.minimiser(), *batch))

    for i in range(3):
        way = torch.randn(learned[i].shape, generator=generator(7), dtype=torch.float64)
        way = way / way.norm()
        moved = [
            [p.detach() + s * 1e-5 * way if j == i else p.detach() for j, p in enumerate(learned)]
            for s in (1, -1)
        ]
        slope = (loss_at(moved[0]) - loss_at(moved[1])) / 2e-5
        assert math.isclose(float((found[i] * way).sum()), slope, rel_tol=1e-4, abs_tol=1e-8)
        if i < 2:
            assert not math.isclose(float((direct[i] * way).sum()), slope, rel_tol=1e-2)


def test_the_gradient_is_that_through_unrolled_descent(toy):
    """Gradient descent on the inner loss, through which autograd goes step by step."""
    method, network, (x, y, tau), batch = setting(toy)
    method = replace(method, ridge=0.5)  # few steps until it stands
    found, *_ = total(method, network, (x, y, tau), batch)
    lam, (phi, J) = 0.5 * len(x), jacobian(network, x)
    A = torch.linalg.inv(phi @ phi.T + lam * torch.eye(len(x)))
    scale, delta = lam / y.numel(), torch.zeros(network.size, dtype=torch.float64)
    with torch.no_grad():
        H = torch.einsum("icp,ij,jcq->pq", J, A, J) + torch.eye(network.size)
        eta = 1 / (scale * float(torch.linalg.eigvalsh(H).max()))
    for _ in range(400):
        gradient = scale * (delta - torch.einsum("icp,ij,jc->p", J, A, y - J @ delta))
        delta = delta - eta * gradient
    assert gradient.norm() < 1e-9
    loss = method.objective(network, x, y, tau, delta, *batch)
    for mine, theirs in zip(found, torch.autograd.grad(loss, (x, y, tau)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_the_implicit_part_vanishes_under_a_strong_ridge(toy):
    """As 1 / lambda, in which the direct part falls, too."""
    method, network, learned, batch = setting(toy)
    norms = []
    for strength in (1e-2, 1e2, 1e4):
        _, _, implicit = total(replace(method, ridge=strength), network, learned, batch)
        norms.append(float(implicit[0].norm()))
    assert norms[1] < 0.1 * norms[0] and math.isclose(norms[2], norms[1] / 100, rel_tol=0.1)


def test_without_displacement_it_is_frepo_with_another_loss(toy):
    method, network, (x, y, tau), batch = setting(toy, displaced=False, loss="mse")
    found, direct, implicit = total(method, network, (x, y, tau), batch)
    assert all(bool((i == 0).all()) for i in implicit)
    gram = network.embed(x) @ network.embed(x).T
    scaled = 0.01 * len(x) / float(gram.detach().diagonal().mean())
    wanted = ridge.centred_one_hot(batch[1], 3)
    phi = network.embed(batch[0])
    gram = network.embed(x) @ network.embed(x).T
    theirs = FRePo(flip=False, ridge=scaled).objective(network.embed, x, y, phi, batch[1]) - ridge.margin(y)
    mine = 3 * (
        method.objective(network, x, y, tau, torch.zeros(network.size), *batch) - ridge.margin(y, 0.5)
    )
    torch.testing.assert_close(mine, theirs)
    fixed = ridge.predict(phi @ network.embed(x).T, gram, y, 0.01 * len(x), scaled=False)
    (gradient,) = torch.autograd.grad(ridge.mse(fixed, wanted), x)
    torch.testing.assert_close(found[0], gradient)


def test_the_sign_of_the_implicit_term_matters(toy):
    """With the plus of some summaries the gradient is another one."""
    method, network, learned, batch = setting(toy)
    found, direct, implicit = total(method, network, learned, batch)
    cosine = torch.cosine_similarity(found[0].flatten(), (direct[0] - implicit[0]).flatten(), dim=0)
    assert cosine < 0.9 and gradient_along(*_along(network, learned)).isfinite()


def _along(network, learned):
    v, delta = torch.ones(2, network.size, dtype=torch.float64)
    return v, network, *learned[:2], 0.06, delta


def test_mirroring_every_image_changes_nothing_with_mirror_images(toy):
    method, network, (x, y, tau), batch = setting(toy, flip=True)
    losses = [
        method.gradients(network, (s.detach().requires_grad_(), y, tau), batch)[0] for s in (x, x.flip(3))
    ]
    torch.testing.assert_close(*losses)
    other = replace(method, flip=False)
    losses = [
        other.gradients(network, (s.detach().requires_grad_(), y, tau), batch)[0] for s in (x, x.flip(3))
    ]
    assert not torch.allclose(*losses)


def test_clipping_never_enlarges():
    g, other = torch.randn(2, 5, generator=generator())
    for scale in (1e-3, 1.0, 1e3):
        cut = clipped(scale * g, other)
        torch.testing.assert_close(cut.norm(), torch.minimum(scale * g.norm(), other.norm()))
        assert torch.cosine_similarity(cut, g, dim=0) > 0.9999
    assert (clipped(torch.zeros(5), other) == 0).all() and (clipped(g, torch.zeros(5)) == 0).all()
    assert (clipped(torch.full((5,), torch.nan), other) == 0).all()


def test_the_label_term_wants_half_of_frepos_margin():
    y = ridge.centred_one_hot(torch.arange(4), 4)
    assert math.isclose(ridge.margin(y, 0.5), -1 / 8) and math.isclose(ridge.margin(0.1 * y, 0.5), -0.1)


# -- the loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"implicit": False}, {"displaced": False}, {"loss": "mse"}, {"solver": "cg"}], ids=str
)
def test_it_lowers_its_loss(toy, changes):
    loss = distill(replace(SMALL, iterations=50, width=8, **changes), toy.train, 1, 0).history["loss"]
    assert loss[-10:].mean() < 0.8 * loss[:3].mean()


def test_the_result_is_the_running_mean(toy):
    g = generator(3)
    state, seen = SMALL.begin(toy.train, 1, g), []
    assert torch.equal(SMALL.finish(state).codes, state.pixels.detach())
    for _ in range(5):
        SMALL.step(state, g)
        seen.append((state.pixels.detach().clone(), state.labels.detach().clone()))
    weights = torch.tensor([0.99**i for i in reversed(range(5))])
    made = SMALL.finish(state)
    for got, parts in zip((made.codes, made.labels), zip(*seen, strict=True), strict=True):
        wanted = torch.einsum("t,t...->...", weights / weights.sum(), torch.stack(parts))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert made.soft and state.mean_pixels.requires_grad is False


def test_only_the_used_network_moves_and_old_ones_are_drawn_anew(toy):
    method, g = replace(SMALL, networks=3, online_updates=5, most_updates=2), generator()
    state = method.begin(toy.train, 1, g)
    for _ in range(25):
        ages, before = list(state.ages), [n.classifier.weight.clone() for n in state.pool]
        method.step(state, g)
        moved = [not torch.equal(b, n.classifier.weight) for b, n in zip(before, state.pool, strict=True)]
        (k,) = [i for i, m in enumerate(moved) if m]
        grown = state.ages[k] - ages[k]
        jump = float((before[k] - state.pool[k].classifier.weight).detach().norm())
        assert grown in (1, 2) and jump < 1 or state.ages[k] == 0 and ages[k] >= 3 and jump > 1
        assert bool(state.trainer.state.get(state.pool[k].classifier.weight)) == (state.ages[k] > 0)
        assert state.pixels.grad is not None and not any(p.grad is not None for p in state.pool.parameters())


def test_the_pool_learns_the_current_set(toy):
    method, g = replace(SMALL, networks=1, online_updates=1000, most_updates=200), generator()
    state = method.begin(toy.train, 1, g)
    before = float(ridge.mse(state.pool[0](state.pixels), state.labels).detach())
    method.advance(state, 0, g)
    assert ridge.mse(state.pool[0](state.pixels), state.labels) < 0.5 * before


def test_the_published_adam_tunes_its_rates(toy):
    """Both rates: nearly the largest at which a run from 0 falls at every step."""
    method = replace(SMALL, solver="adam")
    state = method.begin(toy.train, 2, generator())
    own = generator(rcig.TUNING_SEED)
    network, batch = method.network(toy.train, own), method.batch(toy.train, own)
    inner = Inner.at(network, state.pixels, state.labels, method.ridge * 6)
    lr, other = state.rates
    assert falls(method.minimiser(inner, lr * 0.99)[1]) and not falls(
        method.minimiser(inner, lr / 0.84)[1]
    )
    delta = method.minimiser(inner, lr)[0].requires_grad_()
    learned = (state.pixels, state.labels, state.log_scale)
    (g,) = torch.autograd.grad(method.objective(network, *learned, delta, *batch), delta)
    assert falls(method.solve(inner, g, other * 0.99)[1]) and not falls(
        method.solve(inner, g, other / 0.84)[1]
    )
    given = replace(method, lr_inner=0.5, lr_solver=0.25).begin(toy.train, 2, generator())
    assert given.rates == [0.5, 0.25]


def test_the_inner_rate_follows_what_was_seen(toy):
    state = SMALL.begin(toy.train, 1, generator())
    falling, rising, bumpy = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 3.5, 1.0]])

    def after(*runs):
        state.rates[0], state.looks = 1.0, [0, 0, 0]
        for seen, times in runs:
            for _ in range(times):
                SMALL.adapt(state, seen)
        return state.rates[0]

    assert after((rising, 15), (falling, 35)) == 0.9 and after((bumpy, 15), (falling, 35)) == 1.05
    assert (
        after((bumpy, 25), (falling, 25)) == 1.0 and after((rising, 49)) == 1.0 and state.looks == [49, 49, 0]
    )


@pytest.mark.parametrize("changes", [{}, {"solver": "adam"}, {"flip": True, "solver": "cg"}], ids=str)
def test_resume_ends_with_the_same_bits(toy, tmp_path, changes):
    class Stop(Exception):
        pass

    def stop(done, state, metrics):
        if done == 7:
            raise Stop

    method = replace(SMALL, iterations=12, **changes)
    calm, path = distill(method, toy.train, 2, 7), tmp_path / "c"
    with pytest.raises(Stop):
        distill(method, toy.train, 2, 7, checkpoint=path, checkpoint_seconds=0.0, callback=stop)
    again = distill(method, toy.train, 2, 7, checkpoint=path)
    assert torch.equal(again.synset.codes, calm.synset.codes) and torch.equal(
        again.synset.labels, calm.synset.labels
    )
    assert all(torch.equal(again.history[name], values) for name, values in calm.history.items())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"solver": "newton"}, "unknown solver 'newton'; allowed: adam, cg, exact"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; allowed: mse, platt"),
        ({"ridge": 0.0}, "ridge 0.0 is not allowed: it must be positive"),
        ({"lr_solver": -1.0}, "RCIG: lr_solver -1.0 is not allowed: it must be finite and at least 0"),
        ({"networks": 0}, "networks must be a whole number of at least 1, not 0"),
        ({"most_updates": 0}, "most_updates must be a whole number of at least 1, not 0"),
        ({"solver_steps": 1.5}, "solver_steps must be a whole number of at least 1, not 1.5"),
        ({"softplus": -1.0}, "RCIG: softplus -1.0 is not allowed: it must be finite and at least 0"),
        ({"init": "zeros"}, "unknown init 'zeros'.*allowed: noise, real"),
        ({"depth": 4}, "8-pixel images do not survive 4 poolings; allowed: 16 or more"),
    ],
)
def test_wrong_settings_are_one_line(toy, change, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **change), toy.train, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_jacobian_that_does_not_fit_is_one_line(toy, monkeypatch):
    monkeypatch.setattr(linearised.Inner.at.__func__, "__defaults__", (10,))
    with pytest.raises(CompanionError, match="solver 'exact' needs a Jacobian of 9 x"):
        distill(SMALL, toy.train, 1, 0)
    assert distill(replace(SMALL, solver="cg"), toy.train, 1, 0).history["loss"].isfinite().all()
