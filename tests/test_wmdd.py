"""WMDD: barycenter, per-class BatchNorm statistics, recovery in blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Killed, generator, toy_data

from lib import nets
from lib.distill import distill
from lib.match import barycenter as ot
from lib.match import batchnorm, mmd
from lib.match.batchnorm import Watch
from lib.methods.sre2l import SRe2L
from lib.methods.wmdd import WMDD
from lib.recover import blocks as recover
from lib.recover.blocks import class_images
from lib.recover.teacher import Teacher
from lib.system.errors import CompanionError

QUICK = Teacher("convnet-d2-w4-batch", epochs=2, lr=0.05, batch=32, augmentation="none")
SMALL = WMDD(iterations=6, lr=0.1, crop=None, flip=True, roll=(-1, 1), storage="float", teacher=QUICK)


def cloud(n=60, d=5, seed=0):
    g = generator(seed)
    centres = 3 * torch.randn(4, d, generator=g, dtype=torch.float64)
    return centres[torch.randint(4, (n,), generator=g)] + torch.randn(n, d, generator=g, dtype=torch.float64)


def network(seed=0, norm="batch", classes=3):
    made = nets.make(f"convnet-d2-w4-{norm}", toy_data(classes).train, generator(seed))
    g = generator(seed + 1)
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(generator=g)
                layer.running_var.uniform_(0.5, 2, generator=g)
    return made.eval().requires_grad_(False)


# -- barycenter ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["uniform", "alternating"])
def test_cost_never_rises_and_the_atoms_keep_the_mean(mode):
    points = cloud(61)
    found = ot.barycenter(points, 7, mode, generator=generator(1))
    assert (found.costs.diff() <= 1e-10).all() and found.costs[-1] < 0.9 * found.costs[0]
    assert torch.allclose(found.weights @ found.atoms, points.mean(0), atol=1e-9)
    assert len(found.costs) == len(found.moves) + 1
    assert found.costs[-1].item() == pytest.approx(
        ot.transport_cost(points, found.atoms, found.weights), rel=1e-9
    )


def test_one_atom_is_the_mean_and_n_atoms_are_the_points():
    points = cloud(20)
    one = ot.barycenter(points, 1, generator=generator())
    assert torch.allclose(one.atoms[0], points.mean(0), atol=1e-12)
    all_of_them = ot.barycenter(points, 20, start=points.flip(0) + 0.01)
    assert all_of_them.costs[-1] < 1e-12
    assert torch.cdist(points, all_of_them.atoms).min(1).values.max() < 1e-6


def test_k_means_is_the_bound_that_voronoi_weights_reach():
    from sklearn.cluster import KMeans

    points = cloud(90, 6)
    bound = KMeans(6, n_init=10, random_state=0).fit(points.numpy()).inertia_ / len(points)
    uniform = ot.barycenter(points, 6, generator=generator(2))
    assert bound <= uniform.costs[-1] + 1e-9
    nearest = torch.cdist(points, uniform.atoms).argmin(1)
    weights = torch.bincount(nearest, minlength=6).to(points) / len(points)  # of the Voronoi cells
    inertia = torch.cdist(points, uniform.atoms).min(1).values.square().mean().item()
    assert ot.transport_cost(points, uniform.atoms, weights) == pytest.approx(inertia, rel=1e-9)
    # What equal weights cost beyond that is at least nothing, and the cells' masses explain it: no other weights do better.
    for seed in range(5):
        other = torch.rand(6, generator=generator(seed)).double()
        assert ot.transport_cost(points, uniform.atoms, other / other.sum()) >= inertia - 1e-9


def test_decaying_mirror_descent_comes_near_the_best_weights_and_the_published_one_does_not():
    points = cloud(83, 6, seed=3)
    atoms = ot.barycenter(points, 5, generator=generator(1)).atoms
    best = torch.cdist(points, atoms).min(1).values.square().mean().item()
    _, published = ot.optimal_weights(points, atoms, 100, rate=10.0, decay=False)
    _, ours = ot.optimal_weights(points, atoms, 100, rate=1.0)
    start = ot.transport_cost(points, atoms, torch.full((5,), 0.2).double())
    assert best <= ours < best + 0.2 * (start - best) and ours < published


def test_moving_or_turning_the_cloud_moves_or_turns_the_atoms():
    points, start = cloud(), cloud(8, seed=5)
    plain = ot.barycenter(points, 8, start=start)
    shifted = ot.barycenter(points + 4, 8, start=start + 4)
    assert torch.allclose(shifted.atoms, plain.atoms + 4, atol=1e-8)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator(9), dtype=torch.float64))[0]
    turned = ot.barycenter(points @ turn, 8, start=start @ turn)
    assert torch.allclose(turned.atoms, plain.atoms @ turn, atol=1e-8)
    assert torch.allclose(turned.costs, plain.costs) and torch.allclose(shifted.costs, plain.costs)


def test_an_empty_cell_begins_anew():
    points = torch.cat([torch.zeros(5, 2), torch.ones(5, 2), 10 * torch.ones(5, 2)]).double()
    far = torch.tensor([[0.0, 0.0], [-50.0, 0.0], [-60.0, 0.0]], dtype=torch.float64)
    found = ot.barycenter(points, 3, "alternating", start=far)
    assert found.costs[-1] < 1e-12 and found.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_official_moves_of_a_fifth_leave_some_of_the_start():
    points, start = cloud(43), 2 * cloud(4, seed=8)
    found = ot.barycenter(points, 4, "official_weighted", start=start)
    left = 0.8 ** len(found.moves)
    assert left >= 0.8**10
    rest = (found.atoms - left * start) / (1 - left)
    assert (rest >= points.min(0).values - 1e-9).all() and (rest <= points.max(0).values + 1e-9).all()


@pytest.mark.parametrize(
    ("atoms", "options", "words"),
    [
        (3, {"mode": "fast"}, "allowed: alternating, official_weighted, uniform"),
        (11, {"generator": generator()}, "allowed 1 to 10"),
        (0, {"generator": generator()}, "allowed 1 to 10"),
        (3, {}, "initial atoms, or a generator"),
        (3, {"start": torch.zeros(2, 5)}, "allowed (3, 5)"),
    ],
)
def test_bad_barycenters(atoms, options, words):
    with pytest.raises(CompanionError, match=".*") as error:
        ot.barycenter(cloud(10), atoms, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


# -- statistics ------------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_each_class_and_their_gradient_is_autograds():
    x = torch.randn(6, 3, 4, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    mean, var = batchnorm.moments(x, 2)
    wanted = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(2)
    assert torch.allclose(mean, wanted.mean(2)) and torch.allclose(var, wanted.var(2, correction=0))
    assert torch.autograd.gradcheck(lambda x: torch.stack(batchnorm.moments(x, 2)), x)
    equal = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    for ours, plain in zip(batchnorm.moments(x, 2, equal), (mean, var), strict=True):
        assert torch.allclose(ours, plain)


def test_a_watch_sees_what_enters_the_norms_and_leaves_nothing_behind():
    like = toy_data(3, channels=3).train
    made = nets.make("resnet18-batch-w4", like, generator()).eval()
    hooks = [len(layer._forward_pre_hooks) for layer in made.modules()]
    with Watch(made) as watch:
        inputs, features, logits = watch(like.images[:5])
    assert len(inputs) == 20 and hooks == [len(layer._forward_pre_hooks) for layer in made.modules()]
    assert torch.equal(inputs[0], made.blocks[0][0](like.images[:5]))  # before the norm, not after
    assert torch.equal(features, made.embed(like.images[:5])) and torch.equal(logits, made(like.images[:5]))
    layers = [layer for layer in made.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert [x.shape[1] for x in inputs] == [layer.num_features for layer in layers]
    conv = network()
    inputs, features, logits = Watch(conv)(toy_data().train.images[:5])
    assert torch.equal(inputs[0], conv.features[0](toy_data().train.images[:5])) and torch.equal(
        logits, conv.classifier(features)
    )


def test_class_statistics_come_from_one_pass_over_chunks():
    watch, images = Watch(network()), toy_data(1).train.images
    whole = batchnorm.class_statistics(watch, images, chunk=8)
    parts = batchnorm.class_statistics(watch, iter(images.split(8)))
    assert torch.equal(whole.features, parts.features) and len(whole.features) == len(images)
    for (a, b), (c, d) in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    x = watch(images)[0][0]
    mean, var = whole.layers[0]
    assert torch.allclose(
        mean, x.mean((0, 2, 3)), atol=1e-6
    )  # means add up, variances within chunks are smaller
    assert (var <= x.var((0, 2, 3), correction=0) + 1e-6).all() and not torch.allclose(
        var, x.var((0, 2, 3), correction=0)
    )


def test_a_block_that_is_the_real_chunk_has_no_distance():
    watch, train = Watch(network()), toy_data(3, 7).train
    real = torch.stack([train.of_class(c) for c in range(3)])
    seen = [batchnorm.class_statistics(watch, images) for images in real]
    wanted = [tuple(torch.stack([one.layers[l][k] for one in seen]) for k in (0, 1)) for l in range(2)]
    inputs = watch(real.flatten(0, 1))[0]
    assert batchnorm.class_terms(batchnorm.statistics(inputs, 3), wanted).abs().max() < 1e-5
    # With one class, per-class and global are the same.
    single = [tuple(pair[:1] for pair in layer) for layer in wanted]
    inputs = watch(real[1])[0]
    found = batchnorm.statistics(inputs)
    assert torch.equal(batchnorm.class_terms(found, single), batchnorm.running_terms(found, single))
    assert batchnorm.class_terms(found, single, "paper").sum() > 0


def test_paper_form_squares_and_sums_and_weighs():
    found = [(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2))]
    wanted = [(torch.zeros(2, 2), torch.zeros(2, 2))]
    assert batchnorm.class_terms(found, wanted).item() == pytest.approx(2.5)
    assert batchnorm.class_terms(found, wanted, "paper").item() == pytest.approx(25)
    x = torch.randn(4, 2, 3, 3, generator=generator())
    one_sided = batchnorm.moments(x, 2, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.allclose(one_sided[0], x[[0, 3]].mean((2, 3)), atol=1e-6)


# -- recovery --------------------------------------------------------------------------------------------------------------


def test_blocks_hold_whole_classes_up_to_a_hundred_images():
    method = WMDD()
    assert [(b.classes, b.images) for b in method.blocks(10, 1)] == [(range(10), range(1))]
    assert [len(b) for b in method.blocks(1000, 10)] == [100] * 100
    assert [len(b.classes) for b in method.blocks(1000, 50)] == [2] * 500
    for ipc in (1, 5, 10, 50):
        rows = [row for block in method.blocks(200, ipc) for row in block.rows(ipc)]
        assert sorted(rows) == list(range(200 * ipc))


@pytest.mark.parametrize("ipc", [30, 101])
def test_an_ipc_that_fits_no_block_is_refused(ipc):
    with pytest.raises(CompanionError, match=f"ipc {ipc} does not fit.*allowed"):
        WMDD().blocks(10, ipc)


@pytest.mark.parametrize(
    "method", [SMALL, replace(SMALL, block_images=2), replace(SMALL, crop=0.3, form="paper")]
)
def test_blocks_alone_are_bit_for_bit_those_of_the_whole(toy, method):
    whole = distill(method, toy.train, 2, seed=5)
    prepared = method.prepare(toy.train, 2, seed=5)
    blocks = method.blocks(3, 2)
    assert len(blocks) == (3 if method.block_images == 2 else 1)
    for block in reversed(blocks):  # in any order, with the targets of its own classes alone
        own = replace(prepared, targets={c: prepared.targets[c] for c in block.classes})
        pixels = method.recover_block(own, block, seed=5)
        assert torch.equal(pixels, whole.synset.images[block.rows(2)])
    assert not torch.equal(
        method.recover_block(prepared, blocks[0], 6), whole.synset.images[blocks[0].rows(2)]
    )


@pytest.mark.parametrize(
    "method", [replace(SMALL, block_images=2), replace(SMALL, statistics="global", first_multiplier=10.0)]
)
def test_killed_and_resumed_is_the_same(toy, tmp_path, method):
    whole = distill(method, toy.train, 2, seed=1)

    def kill(done, state, metrics):
        if done == 4:
            raise Killed

    from lib.distill.loop import Run

    file = tmp_path / "run.checkpoint"
    run = Run(method, toy.train, 2, 1, _key(method, toy, 1), file, 0.0, [])
    with pytest.raises(Killed):
        run.to_the_end(False, kill)
    run.save(run.core() | {"done": run.done})
    run.history = {}
    resumed = Run(method, toy.train, 2, 1, _key(method, toy, 1), file, 1e9, [])
    assert resumed.done == 4 and resumed.state.done == 4
    resumed.to_the_end(False, None)
    assert torch.equal(method.finish(resumed.state).images, whole.synset.images)


def _key(method, data, seed):
    from lib.distill import configuration_key

    return configuration_key(method, data.train, 2, seed)


def test_recovery_lowers_every_term_and_touches_no_teacher(toy):
    method = replace(SMALL, iterations=60)
    prepared = method.prepare(toy.train, 2, 0)
    before = {name: tensor.clone() for name, tensor in prepared.watch.network.state_dict().items()}
    state = method.start(prepared, method.blocks(3, 2), 0)
    history = [method.step(state) for _ in range(method.iterations)]
    for name in ("ce", "feature", "bn", "loss"):
        assert history[-1][name] < history[0][name], name
    assert all(
        torch.equal(before[name], tensor) for name, tensor in prepared.watch.network.state_dict().items()
    )
    assert all(p.grad is None and not p.requires_grad for p in prepared.watch.network.parameters())
    low, high = recover.bounds(prepared)
    assert all((x >= low).all() and (x <= high).all() for x in state.pixels)


def test_sre2l_is_a_special_case_number_for_number(toy):
    shared = {
        "iterations": 5,
        "lr": 0.1,
        "bn_weight": 0.3,
        "crop": 0.4,
        "roll": (0, 2),
        "storage": "float",
        "teacher": QUICK,
    }
    plain = SRe2L(**shared)
    special = WMDD(**shared, feature_weight=0.0, statistics="global", first_multiplier=10.0)
    a, b = (distill(method, toy.train, 2, seed=3) for method in (plain, special))
    assert torch.equal(a.synset.images, b.synset.images)
    for name in ("loss", "ce", "bn"):
        assert torch.equal(a.history[name], b.history[name])


def test_atoms_belong_to_their_images(toy):
    """The feature of image (c, j) goes to atom j of class c, in either order of the pixels."""
    for change in ({}, {"statistics": "global"}):
        method = replace(
            SMALL, iterations=150, lr=0.2, bn_weight=0.0, ce_weight=0.0, roll=(0, 0), flip=False, **change
        )
        prepared = method.prepare(toy.train, 4, 0)
        images = torch.cat([method.recover_block(prepared, block, 0) for block in method.blocks(3, 4)])
        found = prepared.watch(images)[1]
        atoms = torch.cat([prepared.targets[c]["atoms"] for c in range(3)])
        nearest = torch.cdist(found, atoms).argmin(1)
        assert (nearest == torch.arange(12)).float().mean() > 0.7


def test_alternating_mode_weighs_the_images(toy):
    method = replace(SMALL, iterations=2, mode="alternating", form="paper")
    made = distill(method, toy.train, 3, seed=0).synset
    prepared = method.prepare(toy.train, 3, 0)
    wanted = torch.cat([prepared.targets[c]["weights"] for c in range(3)])
    assert torch.allclose(made.weights, wanted) and made.weights.view(3, 3).sum(1).tolist() == pytest.approx(
        [1, 1, 1]
    )
    assert distill(SMALL, toy.train, 3, seed=0).synset.weights is None


def test_bad_settings_and_data(toy):
    with pytest.raises(CompanionError, match="unknown form 'codes'.*allowed: code, paper"):
        WMDD(form="codes")
    with pytest.raises(CompanionError, match="unknown statistics 'classes'"):
        WMDD(statistics="classes")
    with pytest.raises(CompanionError, match="unknown barycenter mode"):
        WMDD(mode="x")
    with pytest.raises(CompanionError, match="no BatchNorm layer.*allowed"):
        replace(SMALL, teacher=replace(QUICK, network="convnet-d2-w4")).prepare(toy.train, 1, 0)
    with pytest.raises(CompanionError, match="ipc 21 is larger than the smallest class"):
        SMALL.prepare(toy.train, 21, 0)


def test_images_of_a_class_from_memory_and_from_a_stream_are_the_same(toy):
    class Streamed:
        labels = toy.train.labels

        @staticmethod
        def in_turn(chunks):
            return ((toy.train.images[rows], toy.train.labels[rows]) for rows in chunks)

    for c in range(3):
        ours, theirs = (list(class_images(data, c, 8)) for data in (toy.train, Streamed))
        assert [len(part) for part in ours] == [8, 8, 4]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_plan_carries_atoms_to_the_points_of_an_equally_large_cloud():
    points = cloud(12)
    order = torch.randperm(12, generator=generator())
    assert torch.allclose(ot.carried(points, points[order] + 0.01), points[order])
    assert torch.allclose(ot.carried(points, points[:1]), points.mean(0, keepdim=True))


def test_simpler_targets_are_what_they_say(toy):
    means, fitted, random = (
        replace(SMALL, mode=mode).prepare(toy.train, 4, 0) for mode in ("mean", "mmd", "random")
    )
    for c in range(3):
        features = means.watch(toy.train.of_class(c))[1]
        assert torch.allclose(means.targets[c]["atoms"], features.mean(0).expand(4, -1), atol=1e-5)
        assert torch.cdist(random.targets[c]["atoms"], features).min(1).values.max() < 1e-3
        before, after = (mmd.mmd(features[None], one.targets[c]["atoms"][None]) for one in (random, fitted))
        assert after < before


def test_recovery_has_the_values_of_the_published_loop():
    from benchmarks.harness import assert_equal
    from benchmarks.recover_spots import METHOD, random_data, recovery

    hot_spot = recovery("resnet18-batch-w4", METHOD, random_data(side=8))
    assert 0 < assert_equal(hot_spot)["ours"] < 1e-3
