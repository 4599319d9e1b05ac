"""LCMat's two methods, the proxy behind them, and the coresets that share it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dense import full_hessian
from helpers import generator, toy_data
from torch import nn

from lib import nets
from lib.distill import distill
from lib.match import curvature
from lib.match.curvature import CurvatureGap
from lib.match.gradient import RowCosine
from lib.methods import selection
from lib.methods.dsa import DSA
from lib.methods.lcmat import LCMatC, LCMatS
from lib.methods.selection import Coreset
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict
from lib.select import greedy, proxy, scores, similarity, submodular
from lib.select.last_layer import LastLayer
from lib.select.pair_cost import curvature_coordinates, pair_cost, top_eigenvalue
from lib.select.proxy import Proxy, last_layer, train_proxy
from lib.select.rules import RULES
from lib.system.errors import CompanionError

SMALL = Proxy(network="mlp", epochs=3, lr=0.02, batch=16)


def outputs(n: int, classes: int = 3, width: int = 4, seed: int = 0) -> curvature.Outputs:
    g = generator(seed)
    h = torch.randn(classes, n, width, generator=g).double()
    logits = h @ torch.randn(width, classes, generator=g).double()
    return curvature.Outputs(F.pad(h, (1, 0), value=1.0), logits, torch.arange(classes))


def as_last_layer(o: curvature.Outputs, c: int) -> LastLayer:
    return LastLayer(o.logits[c], o.inputs[c, :, 1:], o.labels[c].expand(o.logits.shape[1]))


# The proxy ---------------------------------------------------------------------------------------------------------------


def test_the_proxy_learns_and_its_last_layer_is_what_it_says(toy):
    trained = train_proxy(replace(SMALL, epochs=10), toy.train, generator(1))
    logits = predict(trained.ensemble, toy.train.images)[0]
    torch.testing.assert_close(trained.last.logits, logits)
    torch.testing.assert_close(trained.network(toy.train.images), logits)
    assert (logits.argmax(1) == toy.train.labels).float().mean() > 0.9
    torch.testing.assert_close(trained.last.embeddings, trained.network.embed(toy.train.images))


def test_correctness_is_that_of_the_training_pass(toy):
    """With one batch per epoch the pass of an epoch sees the network that all epochs before it left."""
    whole = Proxy(network="mlp", epochs=4, batch=1000)
    correct = train_proxy(whole, toy.train, generator(1)).correct
    assert correct.shape == (4, 60)
    for epochs in (1, 3):
        before = train_proxy(replace(whole, epochs=epochs), toy.train, generator(1))
        assert torch.equal(correct[epochs], before.last.logits.argmax(1) == toy.train.labels)
    in_batches = train_proxy(
        replace(SMALL, lr=1e-12), toy.train, generator(1)
    )  # nothing is learned: every pass agrees
    still = in_batches.last.logits.argmax(1) == toy.train.labels
    assert torch.equal(in_batches.correct, still.expand(3, -1)) and 0 < still.sum() < 60


def test_a_stored_proxy_is_the_same_and_leaves_the_same_generator(toy, monkeypatch):
    g = generator(2)
    cold, after = train_proxy(SMALL, toy.train, g), g.get_state()
    other = train_proxy(SMALL, toy.train, g)
    assert not torch.equal(other.last.logits, cold.last.logits)
    monkeypatch.setattr(proxy, "sgd_steps", lambda *_, **__: pytest.fail("trained again"))
    g = generator(2)
    warm = train_proxy(SMALL, toy.train, g)
    assert torch.equal(warm.last.logits, cold.last.logits) and torch.equal(warm.correct, cold.correct)
    assert torch.equal(g.get_state(), after)


def test_a_proxy_stops_at_its_train_accuracy(toy):
    """At the first look, an eighth of an epoch after the last, where so much is right; the run up to there is that without."""
    until = replace(SMALL, epochs=30, batch=4, until=0.6)  # 15 batches: a look at every one
    stopped = train_proxy(until, toy.train, generator(1))
    assert 0.6 <= stopped.accuracy < 1 and 1 <= stopped.updates < 15 * 30
    looks = [train_proxy(replace(until, until=u), toy.train, generator(1)) for u in (0.3, 0.9, 1.0)]
    assert looks[0].updates <= stopped.updates <= looks[1].updates <= looks[2].updates
    whole = train_proxy(replace(until, until=None), toy.train, generator(1))
    assert whole.updates == 15 * 30 and whole.accuracy == 1.0
    epoch, rest = divmod(stopped.updates, 15)
    assert torch.equal(stopped.correct[:epoch], whole.correct[:epoch])
    assert stopped.correct[epoch].sum() <= 4 * rest and not stopped.correct[epoch + 1 :].any()
    never = train_proxy(replace(until, epochs=1, lr=1e-9, until=1.0), toy.train, generator(1))
    assert never.updates == 15 and never.accuracy < 1.0  # what is not reached ends with the epochs
    for wrong in (0.0, 1.5, -1):
        with pytest.raises(CompanionError, match=f"until {wrong} of a proxy: an accuracy lies in"):
            train_proxy(replace(until, until=wrong), toy.train, generator(1))


def test_forgetting_watches_the_whole_training(toy):
    method = Coreset(proxy=replace(SMALL, until=0.4), rule="forgetting")
    assert method.look(toy.train, generator(3))[0].updates == 12
    assert replace(method, rule="margin").look(toy.train, generator(3))[0].updates < 12


def test_networks_that_cannot_serve_are_refused(toy):
    with pytest.raises(CompanionError, match="Sequential has no linear last layer.*convnet"):
        last_layer(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), toy.train)
    with pytest.raises(CompanionError, match="it has 5 outputs, the data 3 classes"):
        last_layer(nets.make("mlp", toy_data(classes=5).train), toy.train)
    with pytest.raises(CompanionError, match=r"does not fit toy images \(1, 8, 8\)"):
        last_layer(nets.make("mlp", toy_data(size=12).train), toy.train)
    with pytest.raises(CompanionError, match="epochs 0 of a proxy"):
        train_proxy(replace(SMALL, epochs=0), toy.train, generator())
    with pytest.raises(CompanionError, match="the proxy mlp diverged on toy at learning rate 1e\\+30"):
        train_proxy(replace(SMALL, lr=1e30), toy.train, generator())


# DeepFool and contextual diversity -----------------------------------------------------------------------------------------


def test_deepfool_on_a_linear_model_is_the_distance_to_the_nearest_boundary():
    g = generator(4)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        linear[1].weight.copy_(torch.randn(4, 9, generator=g))
    images = torch.randn(20, 1, 3, 3, generator=g).double()
    logits, w = linear(images).detach(), linear[1].weight.detach()
    for score, z in zip(scores.deepfool(linear, images, rows=7, iterations=1), logits, strict=True):
        c = int(z.argmax())
        others = [k for k in range(4) if k != c]
        want = min(float((z[c] - z[k]) / (w[k] - w[c]).norm()) for k in others)
        torch.testing.assert_close(score, torch.tensor(want**2).double())


def test_deepfool_changes_predictions_and_certain_images_need_more(toy):
    network = train_proxy(replace(SMALL, network="convnet-d2-w4", epochs=10), toy.train, generator(0)).network
    images = toy.train.images[:30]
    reach = scores.deepfool(network, images, 50)
    torch.testing.assert_close(scores.deepfool(network, images, 50, rows=7), reach, rtol=1e-4, atol=1e-6)
    lead = scores.margin(network(images).detach())
    ranks = torch.stack([values.argsort().argsort().double() for values in (reach, lead)])
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_contextual_diversity_takes_the_farthest_prediction():
    logits = 2 * torch.randn(20, 4, generator=generator(3)).double()
    kl = similarity.symmetric_kl(logits.log_softmax(1)).matrix()
    order = greedy.contextual_diversity(logits, 8, 3).tolist()
    assert order[0] == 3
    for k in range(1, 8):
        assert order[k] == int(kl[:, order[:k]].amin(1).argmax())
    assert greedy.contextual_diversity(logits, 8, already_selected=order[:3]).tolist() == order
    with pytest.raises(CompanionError, match="not finite"):
        greedy.contextual_diversity(logits * torch.nan, 2)


# Coresets ------------------------------------------------------------------------------------------------------------------

QUICK = Coreset(proxy=SMALL, repeats=2, iterations=3, neighbours=3)


@pytest.mark.parametrize("variant", scores.VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_its_budget_and_points_at_its_images(toy, rule, variant):
    s = distill(replace(QUICK, rule=rule, variant=variant), toy.train, 4, 3).synset
    assert torch.equal(s.codes, toy.train.images[s.indices])
    assert torch.equal(s.labels, toy.train.labels[s.indices])
    assert len(s.indices.unique()) == len(s.indices)
    if rule == "gradmatch":
        assert 3 <= len(s.indices) <= 12 and (s.weights > 0).all()
    else:
        assert torch.bincount(s.labels).tolist() == [4, 4, 4]
    if rule == "craig":
        assert s.weights.view(3, 4).sum(1).tolist() == ([20] * 3 if variant == "paper" else [24] * 3)
    assert (s.weights is not None) == (rule in ("craig", "gradmatch"))


def picks(method, data, ipc: int, seed: int = 3) -> list[int]:
    return distill(method, data, ipc, seed).synset.indices.tolist()


def test_the_rules_are_the_functions_on_the_proxy(toy):
    trained = train_proxy(SMALL, toy.train, generator(3))
    for c in range(3):
        rows = (toy.train.labels == c).nonzero().flatten()
        last = trained.last[rows]
        want = {
            "margin": scores.best(scores.margin(last.logits), 4, largest=False),
            "glister": scores.glister(last, 4),
            "forgetting": scores.best(scores.forgetting(trained.correct[:, rows]), 4),
            "cal": scores.best(scores.cal(last.logits, scores.neighbours(last.embeddings, 3)), 4),
            "deepfool": scores.best(
                scores.deepfool(trained.network, toy.train.images[rows], 3), 4, largest=False
            ),
            "log_det": submodular.naive(submodular.LogDet(similarity.cosine(last.gram())), 4).order,
        }
        for rule, order in want.items():
            got = picks(replace(QUICK, rule=rule), toy.train, 4)[4 * c : 4 * c + 4]
            assert got == rows[order].tolist(), rule


def test_error_norms_are_means_over_independent_proxies(toy):
    g = generator(3)
    first, second = train_proxy(SMALL, toy.train, g), train_proxy(SMALL, toy.train, g)
    rows = (toy.train.labels == 0).nonzero().flatten()
    want = rows[scores.best((scores.grand(first.last) + scores.grand(second.last))[rows], 4)]
    assert picks(replace(QUICK, rule="grand"), toy.train, 4)[:4] == want.tolist()
    assert picks(replace(QUICK, rule="grand", repeats=1), toy.train, 4) != picks(
        replace(QUICK, rule="grand"), toy.train, 4
    )


@pytest.mark.parametrize("optimiser", submodular.OPTIMISERS)
def test_optimisers_by_name(toy, optimiser):
    method = replace(QUICK, rule="facility_location")
    got = picks(replace(method, optimiser=optimiser, epsilon=1e-300), toy.train, 4)
    if optimiser != "approximate_lazy":
        assert got == picks(method, toy.train, 4)
    few = picks(replace(method, optimiser="stochastic", epsilon=0.9), toy.train, 4)
    assert few != got


def test_fractions_and_unbalanced_selections(toy):
    s = distill(replace(QUICK, rule="margin", fraction=0.25), toy.train, 1, 0).synset
    assert torch.bincount(s.labels).tolist() == [5, 5, 5]
    whole = distill(replace(QUICK, rule="margin", fraction=1.0), toy.train, 1, 0).synset
    assert sorted(whole.indices.tolist()) == list(range(60))
    method = replace(QUICK, rule="margin", balanced=False)
    free = distill(method, toy.train, 4, 0).synset
    trained = train_proxy(SMALL, toy.train, generator(0))
    margins = scores.margin(trained.last.logits)
    assert free.indices.tolist() == scores.best(margins, 12, largest=False).tolist()
    certain = distill(replace(method, variant="deepcore"), toy.train, 4, 0).synset
    assert certain.indices.tolist() == scores.best(margins, 12).tolist()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rule": "craigg"}, "unknown rule 'craigg' .did you mean 'craig'"),
        ({"variant": "official"}, "unknown variant 'official'; allowed: deepcore, paper"),
        ({"optimiser": "greedy"}, "unknown optimiser 'greedy'; allowed: approximate_lazy, lazy"),
        ({"fraction": 0.0}, r"fraction 0.0 is not allowed: it must lie in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction 1.5 is not allowed"),
        ({"fraction": 0.01}, "a selection of 0 is not allowed: there are 1 to 20 images"),
        ({"proxy": Proxy(network="convnett")}, "unknown network 'convnett'"),
    ],
)
def test_mistakes_end_in_one_line(toy, changes, message):
    with pytest.raises(CompanionError, match=message) as error:
        distill(replace(QUICK, **changes), toy.train, 2, 0)
    assert "\n" not in str(error.value)
    with pytest.raises(CompanionError, match="ipc 21 is larger than the smallest class"):
        distill(QUICK, toy.train, 21, 0)


def test_a_selection_does_not_depend_on_the_order_of_the_images(toy, monkeypatch):
    """With the same network. Two picks: later ones may be mutually nearest points, whose gains are equal."""
    trained = train_proxy(SMALL, toy.train, generator(3))
    shuffle = torch.randperm(60, generator=generator(9))
    other = toy.train.subset(shuffle)
    moved = proxy.Trained(trained.ensemble, other, trained.correct[:, shuffle], trained.updates)
    for method in (
        LCMatS(proxy=SMALL),
        replace(QUICK, rule="facility_location"),
        replace(QUICK, rule="gradmatch"),
    ):
        monkeypatch.setattr(selection, "train_proxy", lambda *_, kept=trained: kept)
        want = method.begin(toy.train, 2, generator(0)).indices
        monkeypatch.setattr(selection, "train_proxy", lambda *_, kept=moved: kept)
        got = shuffle[method.begin(other, 2, generator(0)).indices]
        assert got.tolist() == want.tolist(), method


# LCMat-S -------------------------------------------------------------------------------------------------------------------


def test_lcmat_s_is_facility_location_on_the_pair_cost(toy):
    trained = train_proxy(SMALL, toy.train, generator(3))
    found = {}
    for eps in (0.0, 0.5, 50.0):
        found[eps] = picks(LCMatS(proxy=SMALL, eps=eps, coordinates=20), toy.train, 4)
        rows = (toy.train.labels == 1).nonzero().flatten()
        last = trained.last[rows]
        cost = pair_cost(last, eps, curvature_coordinates(last, 20)).matrix()
        chosen, nearest = [], torch.full((20,), cost.max() + 1e-3)
        for _ in range(4):  # the largest fall of the summed cost
            totals = [torch.minimum(nearest, cost[:, j]).sum() for j in range(20)]
            chosen.append(int(torch.stack(totals).argmin()))
            nearest = torch.minimum(nearest, cost[:, chosen[-1]])
        assert found[eps][4:8] == rows[chosen].tolist()
    assert found[0.0] == picks(
        replace(QUICK, rule="craig"), toy.train, 4
    )  # CRAIG's picks, without its weights
    assert found[0.0] != found[50.0]


def test_lcmat_s_with_cluster_weights(toy):
    """Each weight is the number of images whose cost to this pick is the least; the picks stay."""
    plain = distill(LCMatS(proxy=SMALL), toy.train, 4, 3).synset
    s = distill(LCMatS(proxy=SMALL, weighted=True), toy.train, 4, 3).synset
    assert plain.weights is None and torch.equal(s.indices, plain.indices)
    last = train_proxy(SMALL, toy.train, generator(3)).last
    rows = (toy.train.labels == 2).nonzero().flatten()
    cost = pair_cost(last[rows], 0.01, curvature_coordinates(last[rows], 100)).matrix()
    places = [rows.tolist().index(i) for i in s.indices[8:].tolist()]
    owner = cost[:, places].argmin(1)
    assert s.weights[8:].tolist() == torch.bincount(owner, minlength=4).tolist()


def test_the_official_variant_scales_by_batches(toy):
    """One batch for every class: all gradients shrink alike, and a larger offset changes nothing."""
    one_batch = replace(SMALL, batch=60)
    paper = picks(LCMatS(proxy=one_batch), toy.train, 4)
    assert picks(LCMatS(proxy=one_batch, variant="official"), toy.train, 4) == paper
    assert picks(LCMatS(proxy=SMALL, variant="official"), toy.train, 4) != picks(
        LCMatS(proxy=SMALL), toy.train, 4
    )
    with pytest.raises(CompanionError, match="unknown variant 'deepcore'; allowed: official, paper"):
        distill(LCMatS(proxy=SMALL, variant="deepcore"), toy.train, 2, 0)
    with pytest.raises(CompanionError, match="eps -1 and 100 coordinates"):
        distill(LCMatS(proxy=SMALL, eps=-1), toy.train, 2, 0)


# Curvature gaps ------------------------------------------------------------------------------------------------------------


def test_curvature_quantities_equal_those_of_one_class():
    o = outputs(9)
    v = torch.randn(3, 3, 5, generator=generator(7)).double()
    for c in range(3):
        last = as_last_layer(o, c)
        gradients, hessians = last.gradients(), last.diagonal_hessians()
        variance, diagonal = o.gradient_variance()[c], o.diagonal_hessian()[c]
        for got, want in ((variance, gradients.var(0, correction=0)), (diagonal, hessians.mean(0))):
            torch.testing.assert_close(torch.cat([got[:, 0], got[:, 1:].flatten()]), want)
        hessian = full_hessian(last)
        torch.testing.assert_close(o.hessian_product(v)[c].flatten(), hessian @ v[c].flatten())
        torch.testing.assert_close(o.curvature_along(v)[c], v[c].flatten() @ hessian @ v[c].flatten())


def test_the_eigenvalue_gap_is_that_of_the_dense_hessians():
    real, syn = outputs(30), outputs(4, seed=1)
    start = torch.randn(3, 3, 5, generator=generator(2)).double()
    got = curvature.top_eigenvalue(real, syn, start, steps=2000)
    for c in range(3):
        dense = full_hessian(as_last_layer(real, c)) - full_hessian(as_last_layer(syn, c))
        torch.testing.assert_close(got[c], torch.linalg.eigvalsh(dense).abs().max(), rtol=1e-6, atol=0)


def test_the_eigenvalue_of_two_sets_is_that_of_the_dense_hessians():
    full, subset = as_last_layer(outputs(30), 0), as_last_layer(outputs(4, seed=1), 0)
    values = torch.linalg.eigvalsh(full_hessian(full) - full_hessian(subset))
    start = torch.randn(3, 5, generator=generator(2)).double()
    torch.testing.assert_close(
        top_eigenvalue(full, subset, start, 2000), values.abs().max(), rtol=1e-6, atol=0
    )


GAPS = {
    "gradvar": curvature.gradient_variance,
    "diag": curvature.diagonal,
    "eig": lambda a, b: curvature.top_eigenvalue(a, b, torch.ones_like(a.diagonal_hessian()), 30),
}


@pytest.mark.parametrize("name", GAPS)
def test_gaps_vanish_on_equal_sets_and_do_not_depend_on_repetition(name):
    o = outputs(5)
    twice = curvature.Outputs(o.inputs.repeat(1, 2, 1), o.logits.repeat(1, 2, 1), o.labels)
    assert GAPS[name](o, o).abs().max() < 1e-12
    assert GAPS[name](o, twice).abs().max() < 1e-12
    assert GAPS[name](o, outputs(5, seed=1)).min() > 1e-3


def test_the_eigenvalue_gap_has_the_gradient_of_the_dense_eigenvalue():
    real, given = outputs(30), outputs(4, seed=1)
    start = torch.randn(3, 3, 5, generator=generator(2)).double()
    logits = given.logits.clone().requires_grad_()
    syn = curvature.Outputs(given.inputs, logits, given.labels)
    (got,) = torch.autograd.grad(curvature.top_eigenvalue(real, syn, start, 2000).sum(), logits)
    dense = [full_hessian(as_last_layer(real, c)) - full_hessian(as_last_layer(syn, c)) for c in range(3)]
    values = torch.linalg.eigvalsh(torch.stack(dense)).abs().amax(1)
    (want,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["gradvar", "diag"])
def test_the_gradient_of_the_loss_is_its_finite_difference(toy, form):
    """Of the curvature term alone: the matching term has its own tests."""
    train = toy_data().train
    g = generator(1)
    networks = Ensemble.make("mlp", train, [g])
    networks.parameters = {name: tensor.detach().double() for name, tensor in networks.parameters.items()}
    real, syn = train.sample(10, g).double(), train.sample(3, g).double()
    gap = CurvatureGap(2.0, form)

    def value(pixels):
        return gap.match(networks, real, pixels)[0]["curvature"].sum()

    direction = torch.randn(syn.shape, generator=generator(6)).double()
    step = 1e-5 * direction
    _, gradient = gap.match(networks, real, syn)
    difference = (value(syn + step) - value(syn - step)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-8)


# LCMat-C -------------------------------------------------------------------------------------------------------------------

MATCH = {"network": "convnet-d2-w4", "outer": 2, "inner": 2, "epochs": 1, "real_batch": 8}


def with_curvature(rho, form="gradvar", **changes):
    return LCMatC(**MATCH | changes, distance=RowCosine() + CurvatureGap(rho, form))


def test_without_radius_lcmat_c_is_dsa(toy):
    ours = distill(with_curvature(0.0), toy.train, 3, 5)
    dsa = distill(DSA(**MATCH), toy.train, 3, 5)
    assert torch.equal(ours.synset.codes, dsa.synset.codes)
    assert torch.equal(ours.history["per_class"], dsa.history["per_class"])


@pytest.mark.parametrize("form", curvature.KINDS)
def test_the_term_is_added_to_the_loss_and_moves_the_images(toy, form):
    dsa = distill(DSA(**MATCH), toy.train, 3, 5)
    ours = distill(with_curvature(1.0, form), toy.train, 3, 5)
    assert (ours.history["per_class"][0] > dsa.history["per_class"][0]).all()
    terms = ours.history["gradients"] + ours.history["curvature"]
    torch.testing.assert_close(terms, ours.history["loss"])
    assert not torch.equal(ours.synset.codes, dsa.synset.codes)
    again = distill(with_curvature(1.0, form), toy.train, 3, 5)
    assert torch.equal(again.synset.codes, ours.synset.codes)


def test_one_image_has_no_gradient_variance_to_match(toy):
    """``gradvar`` then only adds a constant; ``diag`` acts."""
    plain, same, other = (
        distill(method, toy.train, 1, 5).synset.codes
        for method in (DSA(**MATCH), with_curvature(5.0), with_curvature(5.0, "diag"))
    )
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)
    assert (other - plain).abs().max() > 1e-3


def test_a_step_lowers_the_curvature_gap_that_it_descends(toy):
    """Without augmentation and at one network, with a radius that dwarfs the matching term."""
    method = with_curvature(100.0, "diag", inner=40, epochs=1, augmentation="none", lr=0.01)
    method = replace(method, outer=1, lr_network=1e-9, real_batch=20)
    losses = distill(method, toy.train, 2, 5).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rho": -1.0}, "rho -1.0 is not allowed"),
        ({"kind": "eigen"}, "unknown curvature 'eigen'.*diag, eig, gradvar"),
        ({"power_steps": 0}, "power_steps must be"),
    ],
)
def test_wrong_settings_of_lcmat_c(changes, message):
    with pytest.raises(CompanionError, match=message):
        CurvatureGap(**changes)


def test_a_network_of_another_kind_has_curvature_too(toy):
    found = distill(with_curvature(1.0, network="mlp"), toy.train, 2, 0)
    assert found.synset.codes.isfinite().all()
