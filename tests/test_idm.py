"""IDM: against DM, and the bookkeeping of its queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill
from lib.formation import Pixels, decode_by_class, mosaic
from lib.formation.mosaic import Mosaic
from lib.formation.start import initial_codes
from lib.match.features import ClassAware, ClassMean
from lib.methods.dm import DM
from lib.methods.idm import IDM
from lib.nets.supply import Fresh, Queue
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
QUEUE = Queue(4, start=2, interval=2, fetch=2, steps=3, batch=16, lr=0.05)
SMALL = IDM(iterations=7, lr=0.4, real_batch=8, network=NET, augmentation="none", networks=QUEUE,
            distance=ClassMean() + ClassAware(0.1), sequential=False)  # fmt: skip
OFF = {"distance": ClassMean(), "networks": Queue(1, start=0, interval=1, steps=0), "formation": Pixels()}


def queued(**changes) -> IDM:
    """SMALL with another queue."""
    return replace(SMALL, networks=replace(QUEUE, **changes))


def steps(method, toy, ipc=1, count=None):
    """The state after every step, with the metrics."""
    g = generator(5)
    state = method.begin(toy.train, ipc, g)
    for step in range(count or method.iterations):
        metrics = method.step(state, g)
        yield step, state, metrics


def weights(state):
    """One number per slot that tells networks apart."""
    return state.supply.networks.parameters["classifier.weight"].flatten(1).double().sum(1)


# -- DM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "data"])
def test_options_off_is_dm_bit_for_bit(toy, augmentation):
    ours = distill(replace(SMALL, augmentation=augmentation, **OFF), toy.train, 2, 5)
    method = DM(iterations=7, lr=0.4, real_batch=8, network=NET, augmentation=augmentation)
    dm = distill(method, toy.train, 2, 5)
    assert torch.equal(ours.synset.codes, dm.synset.codes) and ours.history.keys() == dm.history.keys()
    assert torch.equal(ours.history["loss"], dm.history["loss"])


def test_without_the_cross_entropy_nothing_is_left_of_it(toy):
    on, off = (
        distill(replace(SMALL, distance=distance), toy.train, 1, 5).history
        for distance in (SMALL.distance, ClassMean())
    )
    assert on.keys() == {"loss", "mean", "cross-entropy", "accuracy"} and off.keys() == {"loss"}
    torch.testing.assert_close(on["loss"], on["mean"] + on["cross-entropy"])
    assert off["loss"][0] == on["mean"][0]  # nothing is trained yet


# -- the queue ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "start", "size"), [(1, 3, 5), (3, 0, 4), (5, 2, 2)])
def test_the_queue_grows_then_drops_the_oldest(toy, interval, start, size):
    """With untrained networks: who is in the queue, step by step."""
    method = queued(size=size, start=start, interval=interval, steps=0)
    g = generator(5)
    state = method.begin(toy.train, 1, g)
    born = weights(state)[: state.supply.count].tolist()  # oldest first
    for step in range(16):
        method.step(state, g)
        inside = weights(state)[: state.supply.count].tolist()
        new = [w for w in inside if w not in born]
        assert len(new) == (step % interval == 0)
        born += new
        assert state.supply.count == min(start + 1 + step // interval, size) == len(set(inside))
        assert sorted(inside) == sorted(born[-size:])


def test_a_new_network_has_no_past(toy):
    method = replace(queued(size=3, interval=1, start=0), iterations=6)
    for step, state, _ in steps(method, toy):
        memory = state.supply
        if step >= 3:
            slot = step % 3  # just replaced, then perhaps trained in the same step
            assert memory.seen[slot] <= method.networks.steps * method.networks.batch
    method.networks.push(memory, generator())
    slot = (memory.pushed - 1) % 3
    assert memory.percents[slot] == 0 and memory.seen[slot] == 0
    assert all((v[slot] == 0).all() for v in memory.velocity.parameters.values())
    assert any((v[(slot + 1) % 3] != 0).any() for v in memory.velocity.parameters.values())


def test_only_the_fetched_networks_change(toy):
    method = replace(queued(size=6, start=6, interval=100), iterations=5)
    before = None
    for _, state, _ in steps(method, toy):
        if before is not None:
            changed = weights(state) != before
            assert changed.sum() == 2
        before = weights(state).clone()


def test_the_images_update_leaves_the_networks_alone(toy):
    method = queued(steps=0, interval=100)
    seen = [weights(state).clone() for _, state, _ in steps(method, toy)]
    assert all(torch.equal(seen[0], later) for later in seen)


def test_an_empty_meter_gives_no_weight_to_the_cross_entropy(toy):
    untrained = distill(queued(steps=0), toy.train, 1, 5).history
    assert (untrained["cross-entropy"] == 0).all() and (untrained["accuracy"] == 0).all()
    trained = distill(replace(SMALL, iterations=60), toy.train, 1, 5).history
    assert 50 < trained["accuracy"].max() <= 100  # percent


def test_the_accuracy_of_the_network_that_is_looked_at_weighs_its_cross_entropy(toy):
    """In percent: at 37.5 and weight 0.5 the cross-entropy counts 18.75 times."""
    method = replace(
        SMALL, distance=ClassMean() + ClassAware(0.5), networks=replace(QUEUE, size=1, start=1, interval=100)
    )
    state, g = method.begin(toy.train, 1, generator()), generator(5)
    state.supply.pushed, state.supply.done = 1, 1  # no new network now
    state.supply.correct.fill_(3)
    state.supply.seen.fill_(8)
    stored = {name: tensor[0].clone() for name, tensor in state.supply.networks.parameters.items()}
    pixels = state.pixels.detach().clone()
    found = method.step(state, g)
    network = nets.make(NET, toy.train)
    network.load_state_dict(stored)
    images = decode_by_class(Mosaic(2), pixels.unflatten(0, (3, 1)))
    entropy = sum(F.cross_entropy(network(images[c]), torch.full((4,), c)) for c in range(3))
    assert found["accuracy"] == 37.5
    torch.testing.assert_close(found["cross-entropy"], 18.75 * entropy.detach())


def test_the_published_meter_is_cleared(toy):
    method = queued(meter="reset", reset_every=5, fetch=0, interval=100, size=2)
    state, g = method.begin(toy.train, 1, generator()), generator(5)
    for step in range(7):
        state.supply.seen.fill_(10)
        state.supply.correct.fill_(5)
        metrics = method.step(state, g)
        assert metrics["accuracy"] == (0 if step % 5 == 0 else 50)
    running = replace(method, networks=replace(method.networks, meter="running"))
    assert all(running.step(state, g)["accuracy"] == 50 for _ in range(6))


def test_counts_of_a_network_that_is_trained(toy):
    """Running: what was seen earlier weighs 0.9 after every training step; published: all count alike."""
    for meter, seen in (("running", 16 * (0.9**2 + 0.9 + 1)), ("reset", 48)):
        method = queued(meter=meter, size=1, start=0, interval=100)
        state = method.begin(toy.train, 1, generator())
        method.step(state, generator(5))
        memory = state.supply
        assert memory.seen.item() == pytest.approx(seen) and 0 < memory.correct.item() <= seen


def test_training_in_the_queue_is_torchs_sgd(toy):
    """Momentum and decay, also of a network that is fetched again; the weights of the others stay."""
    memory, queue = QUEUE.begin(NET, toy.train, generator()), replace(QUEUE, fetch=1, start=2)
    mine = [memory.networks.network(k) for k in range(2)]
    optimisers = [torch.optim.SGD(n.parameters(), 0.05, 0.9, weight_decay=5e-4) for n in mine]
    g, same_draws = generator(3), generator(3)
    for _ in range(6):
        queue.after(memory, toy.train, g)
        k = int(torch.randperm(2, generator=same_draws)[0])
        for rows in torch.randint(60, (3, 1, 16), generator=same_draws):
            weights_k = list(mine[k].requires_grad_().parameters())
            loss = F.cross_entropy(mine[k](toy.train.images[rows[0]]), toy.train.labels[rows[0]])
            gradients = torch.autograd.grad(loss, weights_k, materialize_grads=True)
            for weight, gradient in zip(weights_k, gradients, strict=True):
                weight.grad = gradient
            optimisers[k].step()
    for k in range(2):
        for name, weight in mine[k].named_parameters():
            torch.testing.assert_close(memory.networks.parameters[name][k], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["convnet-d2-w4-batch", "mlp"])
def test_other_networks_work(toy, network):
    method = replace(SMALL, network=network, iterations=12)
    assert distill(method, toy.train, 2, 5).history["loss"].isfinite().all()
    if network.endswith("batch"):  # running statistics travel with their network
        *_, (_, state, _) = steps(method, toy, 2)
        assert (state.supply.networks.buffers["features.1.running_mean"] != 0).any()


# -- mosaics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_expansion_of_all_classes_is_that_of_each(factor):
    images = torch.randn(3, 2, 1, 8, 8, generator=generator())
    got = decode_by_class(Mosaic(factor), images)
    assert got.shape == (3, 2 * factor**2, 1, 8, 8)
    torch.testing.assert_close(got, torch.stack([mosaic.expand(part, factor) for part in images]))


def test_cells_are_averages_of_real_images(toy):
    start = initial_codes(Mosaic(2), toy.train, 2, "mix", generator(3)).unflatten(0, (3, 2))
    for c in range(3):
        found = mosaic.cells(start[c]).flatten(0, 1).flatten(1)
        real = F.avg_pool2d(toy.train.of_class(c), 2).flatten(1)
        assert ((found[:, None] - real).abs().amax(2) < 1e-5).sum() == 8


def test_stored_images_count(toy):
    synset = distill(SMALL, toy.train, 2, 5).synset
    assert synset.codes.shape == (6, 1, 8, 8) and synset.images.shape == (24, 1, 8, 8) and synset.ipc == 2


# -- resume, bad input, settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("meter", ["running", "reset"])
def test_resume_with_the_queue(toy, tmp_path, meter):
    method = replace(queued(meter=meter, reset_every=7), iterations=25, network="convnet-d2-w4-batch")
    calm = distill(method, toy.train, 2, 7, snapshots=(0, 25))
    for at in (11, 22):
        interrupted(method, toy.train, tmp_path / f"{at}", at, snapshots=(0, 25))
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 25)), calm)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"formation": Mosaic(3)}, "factor 3 for 8x8 images: allowed 1, 2, 4, 8"),
        ({"init": "wishes"}, "wishes.*noise.*real"),
        ({"network": "convnet-d9"}, "depth 9 is too deep"),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **wrong), toy.train, 1, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Queue(meter="legacy"), "legacy.*reset, running"),
        (lambda: Queue(0), "size must be a whole number of at least 1, not 0"),
        (lambda: Queue(interval=0), "interval must be .*not 0"),
        (lambda: Queue(batch=0), "batch must be .*not 0"),
        (lambda: Queue(fetch=-1), "fetch must be .*not -1"),
        (lambda: Fresh(0), "every must be .*not 0"),
        (lambda: ClassAware(-0.5), "weight -0.5 of ClassAware is not allowed: it must be positive"),
        (lambda: ClassMean(float("nan")), "weight nan of ClassMean"),
    ],
)
def test_a_part_that_does_not_exist_is_one_line(make, says):
    with pytest.raises(CompanionError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_cross_entropy_needs_a_classifier():
    with pytest.raises(
        CompanionError, match="ClassAware needs a network with a linear classifier, not Flatten"
    ):
        ClassAware().check(torch.nn.Flatten(), 1)
