"""DiM, its GAN and the evaluation with fresh images: closed forms, invariances, and what goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import generator, toy_data, with_fields

from lib import augment
from lib.distill import distill
from lib.evaluate import PROTOCOLS, evaluate, evaluate_fresh, protocol
from lib.formation import Generated, Pixels
from lib.match.seen import GAPS, feature_gap, gradient_gap, logit_gap
from lib.methods import recipes
from lib.methods.dim import DiM
from lib.nets.generators.gan import ACGAN, gradient_penalty
from lib.nets.generators.loops import follow
from lib.nets.generators.prior import the_prior
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError

pytestmark = pytest.mark.filterwarnings("ignore:the prior")  # trained for a few steps
SMALL = ACGAN(
    steps=3, lr=1e-3, batch=8, noise=6, width=4, least=2, convs=(1, 0), critic_width=4, critic_convs=2, penalty_every=2
)  # fmt: skip
DIM = DiM(
    prior=SMALL, iterations=6, lr=1e-3, batch=8, weight=1.0, pool=("convnet-d2-w4", "resnet18-w2-batch"), network_steps=1,
    renew_every=2,
)  # fmt: skip
QUICK = replace(PROTOCOLS["cpu-small"], network="convnet-d2-w4", epochs=6, networks=2)


@pytest.fixture(scope="module")
def data():
    return toy_data()


# -- what is matched --------------------------------------------------------------------------------------------------------


def test_equal_images_match_with_one_draw_of_the_augmentation():
    g = generator()
    x = torch.rand(6, 3, 8, 8, generator=g)
    omega = augment.draw(("color", "crop", "cutout"), 1, g, mode="idc").repeat(12)
    one, other = augment.apply(torch.cat([x, x]), omega).chunk(2)
    assert logit_gap(one.flatten(1), other.flatten(1)) == 0 and not torch.equal(one, x)


def test_logits_match_up_to_a_constant_and_not_up_to_a_factor():
    one, other = torch.randn(2, 7, 5, generator=generator(), dtype=torch.float64)
    gap = logit_gap(one, other)
    torch.testing.assert_close(logit_gap(one + torch.arange(7)[:, None], other - 3), gap)
    assert not torch.isclose(logit_gap(2 * one, 2 * other), gap)
    torch.testing.assert_close(logit_gap(one.repeat(2, 1), other.repeat(2, 1)), gap)  # a mean, not a sum


@pytest.mark.parametrize("gap", GAPS)
def test_features_are_compared_in_the_mean(gap):
    maps = [torch.randn(6, 5, 4, 4, generator=generator(), dtype=torch.float64) for _ in range(2)]
    shuffled = [torch.cat([one.flip(0), one]) for one in maps]
    assert feature_gap(maps, shuffled, gap) < 1e-4 < feature_gap(maps, [one + 1 for one in maps], gap)


def test_gradients_of_convolutions_alone_count():
    one = [torch.ones(2, 2, 3, 3), torch.ones(2), torch.ones(4, 5)]
    other = [torch.zeros(2, 2, 3, 3), torch.zeros(2), torch.zeros(4, 5)]
    assert gradient_gap(one, other) == 36


# -- the GAN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_the_penalty_of_a_linear_critic(length):
    g = generator()
    w = torch.randn(48, generator=g, dtype=torch.float64)
    w = w / w.norm() * length
    real, fake = torch.randn(2, 5, 3, 4, 4, generator=g, dtype=torch.float64)
    found = gradient_penalty(lambda x: x.flatten(1) @ w, real, fake, torch.rand(5, generator=g).double())
    torch.testing.assert_close(found.item(), 10 * (length - 1) ** 2, rtol=1e-9, atol=1e-12)


def test_the_published_networks_have_their_published_size():
    network = ACGAN().make(toy_data(classes=10, per_class=2, channels=3, size=32).train)
    own = sum(p.numel() for p in network.own()) / 1e6
    critic = sum(p.numel() for p in network.critic.parameters()) / 1e6
    assert (round(own, 2), round(critic, 2)) == (3.56, 3.14)


@pytest.mark.parametrize(
    ("size", "convs"), [(8, (3,)), (14, (3, 1)), (16, (3, 1)), (28, (3, 1, 0)), (32, (3, 1, 0))]
)
def test_images_of_every_size(size, convs):
    train = toy_data(classes=3, per_class=2, size=size).train
    network = replace(SMALL, least=4, convs=convs, strided=()).make(train)
    y = torch.arange(3)
    images = network(network.draw(y, generator()), y)
    assert images.shape == (3, 1, size, size) and images.abs().max() <= 1


def test_the_label_takes_the_first_numbers_and_the_same_code_makes_the_same_image(data):
    network = the_prior(SMALL, data.train)
    y = torch.tensor([2, 0, 1])
    z = network.draw(y, generator())
    w = network.mapping(z, y)
    assert w[:, :3].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert torch.equal(w[:, 3:], z[:, 3:])
    assert torch.equal(network(z, y), network(network.draw(y, generator()), y))
    alone = torch.cat([network(z[k : k + 1], y[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(network(z, y), alone)


def test_weight_0_is_the_first_stage_continued_bit_for_bit(data):
    train, method = data.train, replace(DIM, weight=0.0)
    g, h = generator(3), generator(3)
    state = method.begin(train, 2, g)
    for _ in range(5):
        method.step(state, g)

    network = the_prior(SMALL, train).requires_grad_(True).train()
    network.draw(class_major(3, 2, "cpu"), h)  # the codes of the fixed set
    replace(SMALL, steps=5, lr=method.lr).fit(network, train, h)
    for name, tensor in network.generating().items():
        assert torch.equal(tensor, state.network.state_dict()[name]), name
    assert all(
        torch.equal(*pair)
        for pair in zip(network.critic.parameters(), state.network.critic.parameters(), strict=True)
    )


def test_optimisers_go_on_where_they_stopped(data):
    network = the_prior(SMALL, data.train)
    for adam in network.optimisers(1e-3):
        kept = adam.state_dict()["state"].values()
        assert all(one["step"] == 3 for one in kept) and sum(one["exp_avg_sq"].sum() for one in kept) > 0


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_running_mean_of_weights(average):
    mean, now = {"a": torch.zeros(2), "n": torch.tensor(1)}, {"a": torch.ones(2), "n": torch.tensor(5)}
    follow(mean, now, average)
    torch.testing.assert_close(mean["a"], torch.full((2,), 1 - average))
    assert mean["n"] == 5


# -- the method -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["logit", "feat", "grad"])
def test_matching_moves_the_generator_and_not_the_network(match, data):
    method, g = replace(DIM, match=match), generator()
    state = method.begin(data.train, 1, g)
    method.step(state, g)
    x, y = data.train.images[:8], data.train.labels[:8]
    phi = [p.detach().clone() for p in state.pool.network.parameters()]
    fake = torch.randn_like(x).requires_grad_()
    method = replace(method, network_steps=0)
    gap = method.matching(state, x, fake, y, g)
    assert gap > 0 and torch.autograd.grad(gap, fake)[0].abs().sum() > 0
    assert all(torch.equal(*pair) for pair in zip(phi, state.pool.network.parameters(), strict=True))
    assert method.matching(state, x, x, y, g).item() == pytest.approx(0, abs=1e-5)


def test_a_run_that_is_killed_goes_on_with_the_same_bits(data, tmp_path):
    whole = distill(DIM, data.train, 1, 4)

    def stop(done, state, metrics):
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "run.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        distill(DIM, data.train, 1, 4, checkpoint=path, checkpoint_seconds=0, callback=stop)
    again = distill(DIM, data.train, 1, 4, checkpoint=path)
    assert torch.equal(again.synset.decoder.weights, whole.synset.decoder.weights)
    assert torch.equal(again.history["loss"], whole.history["loss"])


def test_one_generator_serves_every_number_of_images(data):
    """IPC enters when the set is drawn: the training is the same, and so is the generator."""
    one, five = (distill(DIM, data.train, ipc, 2).synset for ipc in (1, 5))
    assert one.decoder.extra_bytes == five.decoder.extra_bytes == 4 * len(one.decoder.weights)
    assert five.images.shape == (15, 1, 8, 8) and five.ipc == 5
    assert five.bytes_images - one.bytes_images == 12 * 7 * 4


def test_a_set_is_saved_with_its_generator(data, tmp_path):
    synset = distill(DIM, data.train, 2, 0).synset
    found = SyntheticSet.load(synset.save(tmp_path / "set.safetensors"))
    assert torch.equal(found.images, synset.images) and isinstance(found.decoder, Generated)
    assert found.stored()[0].shape == (6, 1, 8, 8)
    with pytest.raises(CompanionError, match="codes of 4 numbers and a class: the generator takes"):
        found.decoder(torch.zeros(1, 5))


# -- fresh images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stored(Pixels):
    """A generator that always draws the same images."""

    weights: torch.Tensor = None
    name: str = "pixels"

    def draw(self, labels, generators):
        return self.weights.expand(len(generators), *self.weights.shape)


def test_a_generator_of_stored_images_is_ordinary_training(data):
    train = data.train
    images = train.sample(4, generator()).flatten(0, 1)
    stored = SyntheticSet(
        images, class_major(3, 4, "cpu"), train.classes, train.transform, Stored(weights=images)
    )
    plain = replace(stored, decoder=Pixels())
    for quick in (QUICK, replace(QUICK, batch=5, augmentation="crop")):
        got, wanted = evaluate_fresh([stored, stored], data, quick, 4), evaluate([plain, plain], data, quick)
        assert torch.equal(got.accuracy, wanted.accuracy)
        assert got.protocol.name == "fresh-cpu-small" and wanted.protocol.name == "cpu-small"


def test_fresh_images_differ_from_epoch_to_epoch_and_networks_do_not_depend_on_each_other(data, monkeypatch):
    synset, seen = distill(DIM, data.train, 1, 0).synset, []
    draw = Generated.draw
    monkeypatch.setattr(Generated, "draw", lambda *a: seen.append(draw(*a)) or seen[-1])
    both = evaluate_fresh(synset, data, QUICK, 2, networks=2).accuracy
    assert len(seen) == QUICK.trained_epochs + 1 and seen[0].shape == (2, 6, 1, 8, 8)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0][0], seen[0][1])
    torch.testing.assert_close(evaluate_fresh(synset, data, QUICK, 2, networks=1).accuracy, both[:, :1])


def test_what_cannot_be_drawn_anew(data):
    train = data.train
    fixed = SyntheticSet(train.images[:3], torch.arange(3), train.classes, train.transform)
    with pytest.raises(CompanionError, match="'pixels' cannot draw new images"):
        evaluate_fresh(fixed, data, QUICK, 1)


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DiM(match="logits"), "unknown kind of matching 'logits'"),
        (lambda: DiM(gap="l2"), "unknown distance 'l2'"),
        (lambda: DiM(weight=-1.0), "weight -1.0 is not allowed"),
        (lambda: DiM(pool=()), "an empty pool"),
        (lambda: DiM(pool=("convnat",)), "unknown network"),
        (lambda: DiM(prior=None), "has no critic"),
        (lambda: ACGAN(average=1.0), "average 1.0 is not allowed"),
        (lambda: ACGAN(penalty=0.0), "penalty 0.0 is not allowed"),
        (lambda: SMALL.make(toy_data(classes=7, per_class=1).train), "7 classes and 6 numbers of noise"),
        (lambda: SMALL.make(toy_data(size=32, per_class=1).train), r"convs \(1, 0\) for images of 32 pixels"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(CompanionError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value) and "allowed" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "first", "second"),
    [
        ("cifar10", 58_500, 78_100),
        ("svhn", 85_800, 114_400),
        ("mnist", 70_200, 93_700),
        ("fashionmnist", 70_200, 93_700),
    ],
)
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_published_rows(data, first, second, ipc):
    recipe = recipes("dim").named(data, ipc)
    m = recipe.method
    assert (m.prior.steps, m.iterations) == (
        first,
        second,
    )  # 150 and 100 epochs, smaller last batches left out
    assert (m.prior.lr, m.prior.batch, m.lr, m.batch, m.weight, m.network_steps) == (
        1e-4,
        128,
        5e-6,
        64,
        0.01,
        16,
    )
    assert recipe.protocol == "dim" and not recipe.small
    rule = protocol("dim")
    assert (rule.epochs, rule.lr, rule.schedule, rule.augmentation) == (1000, 0.01, "constant", "color_crop")


def test_the_small_row_takes_a_step():
    small = recipes("dim").named("digits").method
    train = toy_data(classes=10, per_class=4).train
    result = distill(
        replace(with_fields(small, iterations=1, batch=8), prior=replace(small.prior, steps=1, batch=8)),
        train,
        1,
    )
    assert result.synset.images.isfinite().all()
