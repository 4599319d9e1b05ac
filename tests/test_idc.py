"""IDC: its distances, the step against DSA's and against the algorithm written out, its networks, its decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data
from test_distill import interrupted, same

from lib import augment
from lib.distill import distill
from lib.formation import MultiFormation, Pixels
from lib.match.gradient import METRICS, LayerSum, RowCosine, class_gradients
from lib.methods import idc
from lib.methods.dsa import DSA
from lib.methods.idc import IDC
from lib.nets.training import sgd_steps
from lib.optim.sequential import sequential_rates
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
SMALL = IDC(outer=3, inner=4, lr=0.1, base_side=8, real_batch=8, network=NET, n_data=24, network_batch=8)


@pytest.fixture(scope="module")
def dim():
    """Images well inside [0, 1], so that nothing is clamped; standard deviation 0.25."""
    data = toy_data(channels=3, per_class=20)
    return replace(data, train=replace(data.train, images=0.3 * data.train.images))


def gradients(seed, classes=3):
    """Of a small network: convolution, norm, classifier."""
    shapes = [(4, 3, 3, 3), (4,), (4,), (4,), (5, 4, 3, 3), (7, 20), (7,)]
    g = generator(seed)
    return [torch.randn(classes, *shape, generator=g, dtype=torch.float64) for shape in shapes]


# -- distances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_the_distance_is_zero_where_convolutions_agree(metric):
    """Whatever the classifier, the biases and the norms do."""
    a, b = gradients(0), gradients(1)
    near = [x if x.dim() == 5 else y for x, y in zip(a, b, strict=True)]
    value = LayerSum(metric).between(near, a)
    assert value.shape == (3,) and value.abs().max() < 1e-6  # the cosine has 1e-6 in its denominator
    for which in (0, 4):
        moved = [x + 1e-3 * (i == which) for i, x in enumerate(near)]
        assert (LayerSum(metric).between(moved, a) > value).all()
    assert (LayerSum(metric, "weights").between(near, a) > 1e-3).all()
    norms = [x if i not in (1, 2, 3, 6) else y for i, (x, y) in enumerate(zip(a, b, strict=True))]
    assert LayerSum(metric, "weights").between(norms, a).abs().max() < 1e-5
    assert (LayerSum(metric, "all").between(norms, a) > 1e-3).all()


@pytest.mark.parametrize(("metric", "degree"), [("mse", 2), ("l1", 1), ("l1_mean", 1), ("cos", 0)])
def test_homogeneous(metric, degree):
    a, b = gradients(0), gradients(1)
    one = LayerSum(metric).between(a, b)
    scaled = LayerSum(metric).between([3 * x for x in a], [3 * x for x in b])
    torch.testing.assert_close(scaled, 3**degree * one, rtol=1e-5, atol=0)


def test_plain_sums_written_out():
    a, b = gradients(0), gradients(1)
    convs = [(x[1], y[1]) for x, y in zip(a, b, strict=True) if x.dim() == 5]
    want = {
        "mse": sum((x - y).square().sum() for x, y in convs),
        "l1": sum((x - y).abs().sum() for x, y in convs),
        "l1_mean": sum((x - y).abs().mean((1, 2, 3)).sum() for x, y in convs),
    }
    for metric, value in want.items():
        torch.testing.assert_close(LayerSum(metric).between(a, b)[1], value)


def test_cosine_of_all_but_vectors_is_the_distance_of_dc():
    a, b = gradients(0), gradients(1)
    assert torch.equal(LayerSum("cos", "weights").between(a, b), RowCosine().between(a, b))


# -- DSA ----------------------------------------------------------------------------------------------------------------

AS_DSA = {
    "formation": Pixels(), "distance": LayerSum("cos", "weights"), "init": "real", "augmentation": "data", "mode": "single",
    "inner_data": "syn", "momentum_network": 0.0, "decay_network": 0.0, "cutmix": 0.0, "augmentation_network": "data",
    "sequential": False,
}  # fmt: skip


@pytest.mark.parametrize("augmentation", ["data", "none"])
def test_with_its_changes_undone_it_is_dsa(dim, augmentation):
    """Classifier in the distance, cosine, networks on S, no formation. A rate in [0, 1] is std^2 of one in normalised space."""
    base = {"outer": 3, "inner": 3, "epochs": 2, "real_batch": 8, "network": NET, "network_batch": 4}
    ours = IDC(**AS_DSA | base, lr=0.1 * 0.25**2 * 10 / 2, base_side=8)
    ours = replace(ours, augmentation=augmentation, augmentation_network=augmentation)
    dsa = DSA(**base, lr=0.1, augmentation=augmentation)
    a, b = (distill(method, dim.train, 2, 5) for method in (ours, dsa))
    begin = distill(replace(dsa, outer=0), dim.train, 2, 5).synset.codes
    assert (
        b.synset.codes - begin
    ).abs().max() > 0.05 and b.synset.codes.abs().max() < 2  # it moved, within [0, 1]
    torch.testing.assert_close(a.synset.codes, b.synset.codes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.history["loss"], b.history["loss"], rtol=1e-4, atol=1e-4)


def test_factor_one_is_idc_i(dim):
    one, none = (distill(replace(SMALL, formation=f), dim.train, 2, 5) for f in (MultiFormation(1), Pixels()))
    assert torch.equal(one.synset.codes, none.synset.codes) and torch.equal(
        one.history["loss"], none.history["loss"]
    )


# -- the optimiser ------------------------------------------------------------------------------------------------------


def test_rates_of_one_step_for_all_classes():
    """One parameter, its own gradient once in C steps: the joint rate and momentum put it where C steps put it."""
    lr, momentum, classes, gradient = 0.3, 0.5, 4, [1.0, -2.0, 0.5]
    x = torch.zeros(1, requires_grad=True)
    each = torch.optim.SGD([x], lr=lr, momentum=momentum)
    for value in gradient:
        for c in range(classes):
            x.grad = torch.tensor([value if c == 0 else 0.0])
            each.step()
    y = torch.zeros(1, requires_grad=True)
    joint_lr, joint_momentum = sequential_rates(lr, momentum, classes)
    joint = torch.optim.SGD([y], lr=joint_lr, momentum=joint_momentum)
    for value in gradient:
        y.grad = torch.tensor([value])
        joint.step()
    torch.testing.assert_close(x, y)


# -- pixels, decoding ---------------------------------------------------------------------------------------------------


def test_pixels_are_clamped_once_per_network_and_at_the_end(toy):
    method = replace(SMALL, lr=50.0)
    g = generator(5)
    state = method.begin(toy.train, 2, g)
    outside = []
    for step in range(method.outer * method.inner):
        if step % method.inner == 0:
            method.new_network(state, generator(step))
            assert state.pixels.min() >= 0 and state.pixels.max() <= 1
        method.step(state, g)
        outside.append(bool(state.pixels.min() < 0 or state.pixels.max() > 1))
    assert outside[2] and outside[-1]
    final = toy.train.transform.inverse(method.finish(state).codes)
    assert final.min() >= -1e-6 and final.max() <= 1 + 1e-6
    assert method.finish(state).codes.grad_fn is None


def test_rate_by_ipc_and_side(toy):
    assert SMALL.rate(toy.train, 10) == pytest.approx(SMALL.lr)
    assert SMALL.rate(toy.train, 1) == pytest.approx(SMALL.lr / 10)
    assert replace(SMALL, base_side=32).rate(toy.train, 10) == pytest.approx(SMALL.lr / 16)
    state = SMALL.begin(toy.train, 2, generator())
    assert state.optimiser.defaults["lr"] == pytest.approx(SMALL.lr / 5 * (1 - 0.5**3) / 0.5)
    assert state.optimiser.defaults["momentum"] == pytest.approx(0.5**3)


def test_at_most_so_many_decoded_images(dim):
    method = replace(SMALL, most=5)
    state = method.begin(dim.train, 3, generator(1))
    everything = method.decode(state, dim.train.transform.forward(state.pixels).unflatten(0, (3, 3)))
    first, second = (method.images(state, generator(seed)) for seed in (2, 3))
    assert everything.shape[1] == 12 and first.shape[1] == 5 and not torch.equal(first, second)
    for c in range(3):
        apart = (first[c][:, None] - everything[c]).abs().flatten(2).amax(2)
        assert (apart.min(1).values < 1e-6).all() and apart.argmin(1).unique().numel() == 5
    assert torch.equal(replace(method, most=12).images(state, generator(2)), everything)


def test_bound_decodes_some_at_the_factor_and_the_rest_whole(dim):
    method = replace(SMALL, most=12, bound=True)
    state = method.begin(dim.train, 4, generator(1))
    images = method.images(state, generator(2))
    codes = dim.train.transform.forward(state.pixels).unflatten(0, (3, 4))
    assert images.shape[1] == 2 * 4 + 2
    torch.testing.assert_close(images[:, 8:], codes[:, 2:])
    torch.testing.assert_close(images[1, :8], MultiFormation(2)(codes[1, :2]))
    images.sum().backward()
    assert (state.pixels.grad != 0).all()
    assert method.finish(state).decoder == MultiFormation(2)  # trained on later at the factor, all of it


# -- the networks -------------------------------------------------------------------------------------------------------


def test_networks_learn_from_real_data(toy, monkeypatch):
    calls = []

    def record(networks, images, labels, generators, **more):
        calls.append((images[0], labels[0], more))
        return sgd_steps(networks, images, labels, generators, **more)

    monkeypatch.setattr(idc, "sgd_steps", record)
    distill(replace(SMALL, n_data=20, early=2), toy.train, 1, 0)
    early, *others = calls[:4]
    assert len(calls) == 3 * (1 + 3) and early[2]["epochs"] == 2 and len(early[0]) == len(toy.train)
    for images, labels, more in others:
        assert len(images) == 24 and more["epochs"] == 1  # whole batches, as many as hold 20 images
        same_image = (images[:, None] == toy.train.images).flatten(2).all(2)
        assert same_image.sum() == 24 and (same_image.sum(0) <= 1).all()  # real, each at most once
        assert torch.equal(toy.train.labels[same_image.int().argmax(1)], labels)
        assert (more["augmentation"], more["mode"], more["cutmix"]) == ("color_crop", "idc", 0.5)
    assert not torch.equal(others[0][0], others[1][0])


def test_a_network_keeps_its_momentum(toy):
    """Two calls with one optimiser are one run, two calls without are not."""

    def run(*, shared):
        state = SMALL.begin(toy.train, 1, generator(3))
        for seed in (1, 2):
            if not shared:
                state.network_optimiser = SMALL.learner(state.networks)
            SMALL.learn(state, toy.train.images, toy.train.labels, 1, generator(seed))
        return state.networks.parameters["classifier.weight"].detach()

    kept, lost = run(shared=True), run(shared=False)
    assert (kept - lost).abs().max() > 1e-4


def test_networks_learn_from_s_if_told(toy):
    method = replace(SMALL, inner_data="syn", epochs=2)
    done = distill(method, toy.train, 2, 0)
    assert done.history["loss"].isfinite().all()
    assert not torch.equal(done.synset.codes, distill(SMALL, toy.train, 2, 0).synset.codes)


def test_cutmix_share_is_that_of_the_box():
    x = torch.zeros(400, 2, 1, 8, 8)
    x[:, 1] = 1
    partner = torch.tensor([[1, 0]]).expand(400, 2)
    u = torch.rand(400, 3, generator=generator())
    u[0, 0] = 1.0  # an empty box
    mixed, share = augment.cutmix(x, partner, u)
    torch.testing.assert_close(1 - mixed[:, 0].mean((1, 2, 3)), share)
    torch.testing.assert_close(mixed[:, 1].mean((1, 2, 3)), share)
    assert share[0] == 1 and torch.equal(mixed[0], x[0]) and share.min() < 0.5


def test_matching_is_siamese_in_idcs_mode(dim):
    """One draw for a class: real and synthetic copies of one image stay equal, classes differ."""
    images = dim.train.images[:1].expand(3, 4, 3, 8, 8).contiguous()
    real, syn = SMALL.transform(images, images.clone(), dim.train, generator(2))
    assert torch.equal(real, syn)
    assert torch.equal(real[:, 0], real[:, 3]) and not torch.equal(real[0], real[1])
    zero = (real == 0).float().mean((1, 2, 3, 4))
    assert (zero > 0.05).all()  # cutout is always there


def test_equal_images_have_no_gradient(dim):
    state = replace(SMALL, formation=Pixels()).begin(dim.train, 4, generator(1))
    network = state.networks
    real = dim.train.sample(4, generator(2))
    tensors = network.parameters | network.buffers
    g = class_gradients(network.template, tensors, real, torch.arange(3))
    assert LayerSum("mse").between(g, g).eq(0).all()
    terms, gradient = SMALL.distance.match(network, real, real.clone())
    assert terms["gradients"].abs().max() < 1e-10 and gradient.abs().max() < 1e-6


# -- resume, bad input, settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"early": 1, "most": 3}, {"network": NET + "-batch"}, {"inner_data": "syn", "epochs": 2}]
)
def test_resume_with_the_networks_momentum(toy, tmp_path, options):
    method = replace(SMALL, outer=5, inner=3, **options)
    calm = distill(method, toy.train, 2, 7, snapshots=(0, 15))
    for at in (11, 14):
        interrupted(method, toy.train, tmp_path / f"{at}", at, snapshots=(0, 15))
        assert (tmp_path / f"{at}").is_file()
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 15)), calm)


def test_it_learns(toy):
    """The distance to real gradients falls for the same networks."""
    method = replace(SMALL, outer=1, inner=40, lr=2.0, formation=Pixels(), augmentation="none", n_data=8)
    losses = torch.stack([distill(method, toy.train, 2, seed).history["loss"] for seed in range(3)]).mean(0)
    still = torch.stack(
        [distill(replace(method, lr=0.0), toy.train, 2, seed).history["loss"] for seed in range(3)]
    ).mean(0)
    assert losses[25:].mean() < 0.8 * still[25:].mean()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"formation": MultiFormation(3)}, "factor 3 for 8x8 images: allowed 1, 2, 4, 8"),
        ({"distance": "conv-mse"}, "distance 'conv-mse' does not compare gradients"),
        ({"bound": True, "most": None}, "bound without most"),
        ({"inner_data": "both"}, "both.*real, syn"),
        ({"most": 0}, "most must be a whole number of at least 1, not 0"),
        ({"n_data": 0}, "n_data must be a whole number of at least 1, not 0"),
        ({"bound": True, "formation": Pixels()}, "bound with formation 'pixels'.*MultiFormation"),
        (
            {"bound": True, "formation": MultiFormation(2, kind="multi")},
            "bound with formation 'multi-formation'",
        ),
        ({"init": "wishes"}, "wishes.*mix.*noise.*real"),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **wrong), toy.train, 1, 0)
    assert "\n" not in str(caught.value)
