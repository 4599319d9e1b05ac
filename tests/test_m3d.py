"""M3D: against DM, against its algorithm written out class by class, and the parts it takes from IDC."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill
from lib.formation import Pixels, mosaic
from lib.formation.mosaic import Mosaic
from lib.formation.start import initial_codes
from lib.match import mmd
from lib.match.distance import Look
from lib.match.mmd import MMD
from lib.methods.dm import DM
from lib.methods.m3d import M3D
from lib.nets.supply import Fresh
from lib.optim.sequential import sequential_rates
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
OFF = {
    "formation": Pixels(),
    "networks": Fresh(),
    "space": "normalised",
    "sequential": False,
    "mode": "single",
    "lr": 1.0,
}
SMALL = M3D(iterations=6, real_batch=8, network=NET, augmentation="none", **OFF)


@pytest.fixture(scope="module")
def valid():
    """Toy data whose pixels lie in [0, 1]."""
    train = toy_data().train
    images = train.transform.forward(train.transform.inverse(train.images).clamp(0.02, 0.98))
    return replace(train, images=images)


# -- DM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "data"])
def test_linear_kernel_and_options_off_is_dm_bit_for_bit(toy, augmentation):
    ours = distill(replace(SMALL, distance=MMD("linear"), augmentation=augmentation), toy.train, 2, 5)
    dm = distill(DM(iterations=6, real_batch=8, network=NET, augmentation=augmentation), toy.train, 2, 5)
    assert torch.equal(ours.synset.codes, dm.synset.codes) and ours.history.keys() == dm.history.keys()
    assert torch.equal(ours.history["loss"], dm.history["loss"])


def test_the_kernel_formula_with_a_linear_kernel_is_the_loss_of_dm(toy):
    """In the features of a network, in double precision."""
    network = nets.make(NET, toy.train, generator()).double()
    real, syn = (Look(network, toy.train.sample(n, generator(n)).double()) for n in (9, 4))
    (dm,) = DM().distance.between(real, syn).values()
    (kernel,) = MMD("linear").between(real, syn).values()
    gram = mmd.mmd(real.embedding, syn.embedding, "linear")
    torch.testing.assert_close(gram, dm, rtol=1e-10, atol=1e-10)
    assert torch.equal(kernel, dm) and (dm > 1e-3).all()


@pytest.mark.parametrize("kernel", ["gaussian", "poly", "laplace_code", "laplace", "rbf", "energy"])
def test_a_set_that_equals_the_batch_has_loss_zero(toy, kernel):
    """Under the published augmentation, which real and synthetic images of a class share; another set has not."""
    method = replace(SMALL, distance=MMD(kernel), augmentation="color_crop_cutout", mode="idc", lr=1e-3)
    far = distill(method, toy.train, 3, 1).history["loss"][0]
    same_set = distill(replace(method, real_batch=20, iterations=1), toy.train, 20, 1).history["loss"][0]
    assert same_set.abs() < 1e-3 * far and far > 0


def test_equal_means_stop_dm_but_not_m3d():
    """Features in pairs around a common mean, the synthetic ones closer to it."""
    half = torch.randn(2, 8, 5, generator=generator())
    real = Look.of(torch.cat([half, -half], 1))
    start = 0.5 * torch.randn(2, 2, 5, generator=generator(1))
    leaf = torch.stack([start[:, 0], -start[:, 0]], 1).requires_grad_()
    gradients = {}
    for kernel in ("linear", "gaussian"):
        (term,) = MMD(kernel).between(real, Look.of(leaf)).values()
        (gradients[kernel],) = torch.autograd.grad(term.sum(), leaf)
    assert gradients["linear"].abs().max() < 1e-6 < 1e-3 < gradients["gaussian"].abs().max()


# -- the steps ----------------------------------------------------------------------------------------------------------


def test_sequential_rates_equal_one_step_per_class():
    """Quadratic losses, one per class: every class where the loop over classes has it when its own gradient is taken."""
    classes, lr, momentum, rounds = 4, 0.3, 0.5, 6
    curvature, start = (
        torch.tensor([0.2, 0.5, 1.0, 1.5]).double(),
        torch.tensor([1.0, -2.0, 3.0, 4.0]).double(),
    )
    x, velocity, seen = start.clone(), torch.zeros(classes).double(), torch.zeros(rounds, classes).double()
    for round_ in range(rounds):
        for c in range(classes):
            seen[round_, c] = x[c]
            gradient = torch.zeros(classes).double()
            gradient[c] = curvature[c] * x[c]
            velocity = momentum * velocity + gradient
            x = x - lr * velocity
    rate, decay = sequential_rates(lr, momentum, classes)
    joint, speed, got = start.clone(), torch.zeros(classes).double(), []
    for _ in range(rounds):
        got.append(joint)
        speed = decay * speed + curvature * joint
        joint = joint - rate * speed
    torch.testing.assert_close(torch.stack(got), seen, rtol=1e-12, atol=1e-12)


def test_sequential_is_a_joint_step_with_other_rates(toy):
    lr, momentum = sequential_rates(2.0, 0.5, 3)
    assert lr == pytest.approx(3.5) and momentum == 0.125
    given = distill(replace(SMALL, lr=lr, momentum=momentum), toy.train, 2, 5)
    named = distill(replace(SMALL, lr=2.0, sequential=True), toy.train, 2, 5)
    assert torch.equal(given.synset.codes, named.synset.codes)


@pytest.mark.parametrize("every", [1, 3, 50])
def test_so_many_steps_share_a_network(toy, every):
    weights = []
    distill(
        replace(SMALL, iterations=7, networks=Fresh(every)),
        toy.train,
        1,
        0,
        callback=lambda step, state, metrics: weights.append(state.supply.network.classifier.weight.clone()),
    )
    for step in range(1, 7):
        assert torch.equal(weights[step], weights[step - 1]) == (step % every != 0)


def test_unit_pixels_are_dm_pixels_with_another_rate(valid):
    """x = 0.5 + z / 4: a rate in x is 16 times that rate in z, as long as nothing is clamped."""
    free = distill(replace(SMALL, lr=0.16, iterations=3), valid, 2, 5)
    unit = distill(replace(SMALL, lr=0.01, iterations=3, space="unit"), valid, 2, 5)
    torch.testing.assert_close(unit.synset.codes, free.synset.codes, rtol=1e-4, atol=1e-5)
    assert not torch.equal(unit.synset.codes, valid.sample(2, generator(5)).flatten(0, 1))


def test_unit_pixels_are_clamped(valid):
    run = distill(replace(SMALL, lr=300.0, space="unit"), valid, 2, 5)
    pixels = valid.transform.inverse(run.synset.codes)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    free = valid.transform.inverse(distill(replace(SMALL, lr=4800.0), valid, 2, 5).synset.codes)
    assert free.min() < -0.01 or free.max() > 1.01


# -- mosaics ------------------------------------------------------------------------------------------------------------


def test_mosaics_of_real_images(toy):
    """Every cell is a real image of the class, every second pixel of it; the images of a class differ."""
    start = initial_codes(Mosaic(2, "nearest"), toy.train, 2, "mix", generator(3)).unflatten(0, (3, 2))
    for c in range(3):
        found = mosaic.cells(start[c]).flatten(0, 1).flatten(1)
        real = toy.train.of_class(c)[:, :, ::2, ::2].flatten(1)
        match = (found[:, None] == real).all(2)
        assert (match.sum(1) == 1).all() and match.any(0).sum() == 8
    assert torch.equal(
        initial_codes(Pixels(), toy.train, 2, "mix", generator(3)),
        toy.train.sample(2, generator(3)).flatten(0, 1),
    )


def test_more_cells_than_images_of_a_class(toy):
    """20 images per class, 4 x 12 cells: those of one cell still differ."""
    cells = mosaic.cells(initial_codes(Mosaic(2, "nearest"), toy.train, 12, "mix", generator(3))).unflatten(
        1, (3, 12)
    )
    assert all(len(cells[k, c].flatten(1).unique(dim=0)) == 12 for k in range(4) for c in range(3))


def test_a_stored_image_is_four_training_images(toy):
    synset = distill(replace(SMALL, formation=Mosaic(2)), toy.train, 2, 5).synset
    assert synset.codes.shape == (6, 1, 8, 8) and synset.images.shape == (24, 1, 8, 8) and synset.ipc == 2
    by_class = [mosaic.expand(synset.codes[2 * c : 2 * c + 2]) for c in range(3)]
    for c in range(3):
        assert torch.equal(synset.images[synset.targets == c], by_class[c])
    method = M3D(network=NET, space="normalised")
    state = method.begin(toy.train, 2, generator(5))
    decoded = method.images(state, generator())
    stored = state.pixels.detach().unflatten(0, (3, 2))
    torch.testing.assert_close(decoded.detach(), torch.stack([mosaic.expand(part) for part in stored]))


def test_subsample_of_the_decoded_images(toy):
    method = replace(SMALL, formation=Mosaic(2), most=5, init="real")
    state, g = method.begin(toy.train, 3, generator(5)), generator(1)
    some, again = method.images(state, g), method.images(state, g)
    every = replace(method, most=12).images(state, g)
    assert some.shape == (3, 5, 1, 8, 8) and every.shape == (3, 12, 1, 8, 8)
    match = (some.flatten(2)[:, :, None] == every.flatten(2)[:, None]).all(3)
    assert (match.sum(2) == 1).all() and (match.sum(1) <= 1).all() and not torch.equal(some, again)
    distill(method, toy.train, 3, 5)


# -- resume, bad input, settings ----------------------------------------------------------------------------------------


def test_resume_in_the_middle_of_a_network(toy, tmp_path):
    method = M3D(iterations=25, real_batch=8, network=NET, networks=Fresh(7), most=5)
    calm = distill(method, toy.train, 2, 7, snapshots=(0, 25))
    for at in (11, 22):
        interrupted(method, toy.train, tmp_path / f"{at}", at, snapshots=(0, 25))
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 25)), calm)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"space": "log"}, "log.*normalised.*unit"),
        ({"most": 0}, "most must be a whole number of at least 1, not 0"),
        (
            {"distance": "gaussian"},
            "'gaussian' is no distance: allowed are those of lib.match and their sums",
        ),
        ({"formation": Mosaic(3)}, "factor 3 for 8x8 images: allowed 1, 2, 4, 8"),
        ({"formation": Mosaic(0)}, "factor 0 "),
        ({"init": "wishes"}, "wishes.*noise.*real"),
        ({"mode": "many", "augmentation": "crop"}, "many.*idc.*single"),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **wrong), toy.train, 1, 0)
    assert "\n" not in str(caught.value)


def test_a_fixed_bandwidth(toy):
    method = replace(SMALL, init="noise")
    far, near = (
        distill(replace(method, distance=MMD(bandwidth=b)), toy.train, 2, 5).history["loss"]
        for b in (1e6, 1e-6)
    )
    # so narrow that only the diagonals count: 5/m + 5/n for each of 3 classes; so wide that nothing is told apart
    torch.testing.assert_close(near, torch.full((6,), 3 * (5 / 2 + 5 / 8)))
    assert far.max() < 0.01


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kernel": "cauchy"}, "cauchy.*gaussian.*linear.*poly"),
        ({"bandwidth": 0.0}, "bandwidth 0.0 .*positive"),
        ({"bandwidth": -2}, "bandwidth -2 .*positive"),
        ({"bandwidth": "median"}, "bandwidth 'median' .*'adaptive'"),
        ({"bandwidth": float("nan")}, "bandwidth nan"),
        ({"weight": 0.0}, "weight 0.0 of MMD .*positive"),
    ],
)
def test_a_kernel_that_does_not_exist_is_one_line(wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        MMD(**wrong)
    assert "\n" not in str(caught.value)
