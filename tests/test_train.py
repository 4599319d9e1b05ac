"""Training K networks at once: equal to each alone, and to a plain ``torch.optim`` loop."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import generator

from lib import augment
from lib.nets.ensemble import Ensemble
from lib.nets.training import (
    EPOCHS_PER_DRAW,
    _Chance,
    batch_loss,
    halving_schedule,
    predict,
    predict_embeddings,
    schedule,
    sgd_steps,
)
from lib.system.errors import CompanionError

M, C = 7, 3


def ensemble(toy, seeds, name="convnet-d2-w4"):
    """Networks in float64, each with the generator that drew it."""
    generators = [generator(s) for s in seeds]
    made = Ensemble.make(name, toy.train, generators)
    made.template.double()
    made.parameters = {k: v.detach().double().requires_grad_() for k, v in made.parameters.items()}
    made.buffers = {k: v.double() if v.is_floating_point() else v for k, v in made.buffers.items()}
    return made, generators


def sets(toy, count, soft=False):
    """``count`` different sets of M images."""
    picks = torch.stack([torch.randperm(60, generator=generator(s))[:M] for s in range(count)])
    labels = toy.train.labels[picks]
    if soft:
        noise = torch.rand(count, M, C, generator=generator(9)).double()
        labels = (0.7 * F.one_hot(labels, C) + 0.3 * noise / noise.sum(2, keepdim=True)).double()
    return toy.train.images[picks].double(), labels


ALL_OF_IT = "color_crop_cutout_flip_scale_rotate"
CASES = {
    "plain": {},
    "shuffled": {"batch": 3},
    "augmented": {"augmentation": ALL_OF_IT},
    "augmented batches": {"augmentation": ALL_OF_IT, "batch": 3},
    "all families": {"augmentation": "color_crop_flip", "mode": "multiple", "batch": 4},
    "idc": {"augmentation": ALL_OF_IT, "mode": "idc", "cutmix": 0.5, "batch": 4},
    "cutmix": {"cutmix": 1.0},
    "momentum": {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "batch": 5},
}


def together_and_alone(
    toy, name="convnet-d2-w4", soft=False, weighted=False, shared=False, epochs=3, **options
):
    images, labels = sets(toy, 1 if shared else 3, soft)
    weights = torch.rand(labels.shape[:2], generator=generator(3)).double() + 0.2 if weighted else None
    made, generators = ensemble(toy, (0, 1, 2), name)
    loss = sgd_steps(made, images, labels, generators, epochs=epochs, lr=0.1, weights=weights, **options)
    for k in range(3):
        of = slice(0, 1) if shared else slice(k, k + 1)
        alone, own = ensemble(toy, (k,), name)
        one = {"weights": None if weights is None else weights[of]} | options
        single = sgd_steps(alone, images[of], labels[of], own, epochs=epochs, lr=0.1, **one)
        torch.testing.assert_close(loss[k], single[0], rtol=1e-5, atol=1e-6)
        for key, tensor in (alone.parameters | alone.buffers).items():
            mine = (made.parameters | made.buffers)[key][k]
            torch.testing.assert_close(
                mine, tensor[0], rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}"
            )
    start = ensemble(toy, (0, 1, 2), name)[0].parameters
    assert all(
        not torch.equal(made.parameters[k][0], start[k][0]) for k in start if k.startswith("classifier")
    )


@pytest.mark.parametrize("case", CASES)
def test_together_equals_alone(toy, case):
    together_and_alone(toy, **CASES[case])


@pytest.mark.parametrize("name", ["convnet-d2-w4-batch", "mlp", "lenet"])
def test_together_equals_alone_for_other_networks(toy, name):
    together_and_alone(toy, name, batch=4, momentum=0.9)


@pytest.mark.parametrize("options", [{"soft": True}, {"weighted": True}, {"shared": True},
                                     {"soft": True, "weighted": True, "shared": True}], ids=str)  # fmt: skip
def test_together_equals_alone_for_other_sets(toy, options):
    together_and_alone(toy, batch=3, **options)
    together_and_alone(toy, cutmix=0.5, augmentation="crop_color", epochs=2, **options)


def test_together_equals_alone_past_the_drawn_numbers(toy):
    together_and_alone(toy, name="mlp", batch=3, augmentation="color_crop", epochs=EPOCHS_PER_DRAW + 3)


# -- a plain loop as the reference --------------------------------------------------------------------------------------


def plain_loop(network, images, labels, g, epochs, lr, batch, drop=None, weights=None, **options):
    """One network, one ``torch.optim.SGD``, batches in the order of sorted random keys; ``drop`` as the card words it."""
    optimiser = torch.optim.SGD(network.parameters(), lr=lr, **options)
    order = torch.rand(EPOCHS_PER_DRAW, M, generator=g).argsort(1) if batch < M else torch.arange(M)[None]
    rates = []
    for epoch in range(epochs):
        rates.append(optimiser.param_groups[0]["lr"])
        for rows in order[epoch % len(order)].split(batch):
            losses = F.cross_entropy(network(images[rows]), labels[rows], reduction="none")
            w = torch.ones(M).double() if weights is None else weights
            optimiser.zero_grad()
            ((losses * w[rows]).sum() / w[rows].sum()).backward()
            for (
                parameter
            ) in network.parameters():  # no effect (a bias before a norm) is gradient 0: weight decay acts
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimiser.step()
        if epoch == drop:
            lr *= 0.1
            optimiser = torch.optim.SGD(network.parameters(), lr=lr, **options)
    return rates


@pytest.mark.parametrize("name", ["convnet-d2-w4", "convnet-d2-w4-batch", "mlp"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "weight_decay": 5e-4}, {"momentum": 0.9, "nesterov": True}],
    ids=["sgd", "momentum", "nesterov"],
)
def test_equals_a_plain_loop(toy, name, options):
    images, labels = sets(toy, 1)
    for batch, weights in ((256, None), (3, None), (3, torch.linspace(0.5, 2, M).double())):
        made, generators = ensemble(toy, (5,), name)
        network = made.network(0).train()
        given = None if weights is None else weights[None]
        sgd_steps(made, images, labels, generators, epochs=5, lr=0.05, batch=batch, weights=given, **options)
        g = generator(5)
        Ensemble.make(name, toy.train, [g])  # the generator first draws the weights
        plain_loop(network, images[0], labels[0], g, 5, 0.05, batch, weights=weights, **options)
        for key, parameter in network.named_parameters():
            torch.testing.assert_close(made.parameters[key][0], parameter, rtol=1e-7, atol=1e-9)
        for key, buffer in network.named_buffers():
            if buffer.is_floating_point():
                torch.testing.assert_close(made.buffers[key][0], buffer, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("E", [4, 9, 10])
def test_dc_schedule_is_the_cards(toy, E):
    """E + 1 epochs; after epoch E // 2 + 1 a tenth of the rate and a new optimiser, momentum lost."""
    images, labels = sets(toy, 1)
    made, generators = ensemble(toy, (1,))
    network = made.network(0).train()
    kept, _ = ensemble(toy, (1,))
    rate, fresh = schedule("dc", 0.05, E)
    sgd_steps(made, images, labels, generators, epochs=E + 1, lr=rate, momentum=0.9, fresh_at=fresh)
    rates = plain_loop(network, images[0], labels[0], None, E + 1, 0.05, 256, drop=E // 2 + 1, momentum=0.9)
    assert [rate(e) for e in range(E + 1)] == pytest.approx(rates)
    assert (
        rate(E) == pytest.approx(0.005)
        and rate(E // 2 + 1) == 0.05
        and rate(E // 2 + 2) == pytest.approx(0.005)
    )
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(made.parameters[key][0], parameter, rtol=1e-9, atol=1e-11)
    # momentum matters here: keeping it would have ended elsewhere
    sgd_steps(kept, images, labels, generators, epochs=E + 1, lr=rate, momentum=0.9)
    assert (kept.parameters["classifier.weight"] - made.parameters["classifier.weight"]).abs().max() > 1e-6


def test_augmented_training_uses_the_drawn_parameters(toy):
    """One epoch, one batch: the step is that on the images that the generator's next numbers augment."""
    images, labels = sets(toy, 1)
    made, generators = ensemble(toy, (2,))
    network = made.network(0).train()
    sgd_steps(made, images, labels, generators, epochs=1, lr=0.1, augmentation="crop_scale")
    g = generator(2)
    Ensemble.make("convnet-d2-w4", toy.train, [g])
    choice = (torch.rand(EPOCHS_PER_DRAW, 1, generator=g) * 2).long()[0].expand(M)
    u = torch.rand(EPOCHS_PER_DRAW, M, 1, 3, generator=g)[0]
    x = augment.apply(images[0], augment.Draw(("crop", "scale"), choice, u))
    F.cross_entropy(network(x), labels[0]).backward()
    for key, parameter in network.named_parameters():
        step = 0 if parameter.grad is None else 0.1 * parameter.grad
        torch.testing.assert_close(made.parameters[key][0], parameter - step, rtol=1e-7, atol=1e-9)


# -- chance -------------------------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_image_once_in_a_new_order():
    chance = _Chance([generator(0), generator(1)], 10, 4, (), "single", 0.0)
    orders = []
    for epoch in range(2 * EPOCHS_PER_DRAW):
        rows = torch.cat([chance.rows(epoch, b) for b in range(3)], 1)
        assert torch.equal(rows.sort(1).values, torch.arange(10).expand(2, 10))
        orders.append(rows)
    orders = torch.stack(orders)
    assert len(orders.flatten(0, 1).unique(dim=0)) == 4 * EPOCHS_PER_DRAW  # no order twice, in no network


def test_one_batch_is_not_shuffled_and_draws_nothing():
    g = generator(0)
    chance = _Chance([g], 10, 10, (), "single", 0.0)
    assert chance.rows(0, 0) is None and chance.omega(0, 0) is None
    assert torch.equal(g.get_state(), generator(0).get_state())


def test_one_family_per_batch_and_own_parameters_per_image():
    chance = _Chance([generator(0), generator(1)], 6, 3, ("color", "crop", "flip"), "single", 0.0)
    families = []
    for epoch in range(40):
        omega = chance.omega(epoch, epoch % 2)
        choice = omega.choice.view(2, 3)
        assert (choice == choice[:, :1]).all() and omega.u.shape == (6, 1, 3)
        assert omega.u.flatten().unique().numel() == 18
        families.append(choice[:, 0])
    families = torch.stack(families)
    assert (families[:, 0] != families[:, 1]).any()
    assert all(set(families[:, k].tolist()) == {0, 1, 2} for k in (0, 1))


def test_cutmix_happens_as_often_as_asked():
    chance = _Chance([generator(0)], 4, 4, (), "single", 0.25)
    on = [bool(u[0, 0] < u[0, 4]) for epoch in range(400) for _, u in [chance.mix(epoch, 0)]]
    assert abs(sum(on) / 400 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    partner, _ = chance.mix(400, 0)
    assert partner.sort().values.tolist() == [[0, 1, 2, 3]]


# -- losses, schedules, prediction --------------------------------------------------------------------------------------


def test_batch_loss_by_hand():
    logits = torch.randn(2, 5, C, generator=generator()).double()
    labels = torch.tensor([[0, 1, 2, 1, 0]])
    w = torch.rand(2, 5, generator=generator(1)).double()
    per_image = -logits.log_softmax(2).gather(2, labels.expand(2, 5)[..., None])[..., 0]
    torch.testing.assert_close(batch_loss(logits, labels), per_image.mean(1))
    torch.testing.assert_close(batch_loss(logits, labels, w), (per_image * w).sum(1) / w.sum(1))
    torch.testing.assert_close(batch_loss(logits, labels, 3 * w), batch_loss(logits, labels, w))
    torch.testing.assert_close(batch_loss(logits, F.one_hot(labels, C).double()), per_image.mean(1))
    soft = torch.rand(2, 5, C, generator=generator(2)).double().softmax(2)
    torch.testing.assert_close(batch_loss(logits, soft), -(soft * logits.log_softmax(2)).sum(2).mean(1))


def test_named_schedules():
    rate, fresh = schedule("steps", 1.0, 12)
    assert [rate(e) for e in (0, 7, 8, 9, 10, 11)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04]
    ) and fresh == ()
    rate, _ = schedule("cosine", 1.0, 10)
    assert rate(0) == 1 and rate(5) == pytest.approx(0.5) and 0 < rate(9) < 0.03
    assert schedule("constant", 0.3, 10)[0](9) == 0.3
    assert halving_schedule(0.01, 300)[1] == 152
    with pytest.raises(
        CompanionError, match="schedule 'cos'.*allowed: constant, cosine, cosine-steps, dc, steps"
    ):
        schedule("cos", 1.0, 10)


def test_after_epoch_and_returned_loss(toy):
    images, labels = sets(toy, 1)
    made, generators = ensemble(toy, (0, 1))
    seen = []
    losses = sgd_steps(made, images, labels, generators, epochs=4, lr=0.0, batch=3, after_epoch=seen.append)
    assert seen == [1, 2, 3, 4]
    # at rate 0 the mean over the batches is the mean over the set, for instance norm
    want = batch_loss(made(images), labels)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-6)


def test_training_learns(toy):
    made, generators = ensemble(toy, (0, 1))
    images, labels = toy.train.images[None].double(), toy.train.labels[None]
    sgd_steps(made, images, labels, generators, epochs=30, lr=0.05, momentum=0.9, batch=20)
    accuracy = (predict(made, toy.test.images.double()).argmax(2) == toy.test.labels).double().mean(1)
    assert (accuracy > 0.9).all()


@pytest.mark.parametrize("name", ["convnet-d2-w4-batch", "mlp"])
def test_predicting_in_chunks(toy, name):
    made, _ = ensemble(toy, (0, 1), name)
    x = toy.test.images.double()
    with torch.no_grad():
        want, embedding = made.train(False)(x[None]), made.embed(x[None])
    for rows in (1, 7, 60, 1000, None):
        torch.testing.assert_close(predict(made.train(), x, rows), want)
        torch.testing.assert_close(predict_embeddings(made.train(), x, rows), embedding)
    assert not predict(made, x).requires_grad


def test_training_ends_where_it_is_enough(toy):
    """After the update, in the middle of an epoch, and with the weights of a training that has no more updates."""
    images, labels = sets(toy, 1)
    made, generators = ensemble(toy, (0,))
    asked, finished = [], []
    options = {"lr": 0.05, "batch": 4}

    def enough():
        asked.append(1)
        return len(asked) == 5

    batches = -(-images.shape[1] // 4)
    sgd_steps(
        made, images, labels, generators, epochs=9, enough=enough, after_epoch=finished.append, **options
    )
    assert len(asked) == 5 and finished == list(range(1, 4 // batches + 1))
    assert all(parameter.grad is None for parameter in made.parameters.values())


def test_a_rate_by_updates_differs_within_an_epoch(toy):
    images, labels = sets(toy, 1)
    seen = []
    made, generators = ensemble(toy, (0,))
    sgd_steps(made, images, labels, generators, epochs=2, batch=3, lr=lambda at: seen.append(at) or 0.0)
    batches = len(seen) // 2
    assert batches > 1 and seen == [epoch + b / batches for epoch in range(2) for b in range(batches)]
    by_epoch, _ = schedule("cosine", 1.0, 4)
    by_update, _ = schedule("cosine-steps", 1.0, 4)
    assert (
        by_epoch(1.9) == by_epoch(1) and by_update(1.9) < by_update(1) and by_update(4) == pytest.approx(1e-3)
    )
