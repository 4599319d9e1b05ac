"""IDM: against DM, against its algorithm written out with plain modules, and the queue's bookkeeping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib import nets
from lib.distill import distill
from lib.formation import decode_by_class, mosaic
from lib.formation.mosaic import Mosaic
from lib.formation.start import initial_codes
from lib.match import features
from lib.methods import idm
from lib.methods.dm import DM
from lib.methods.idm import IDM
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
SMALL = IDM(iterations=7, lr=0.4, real_batch=8, network=NET, augmentation="none", queue=4, start=2, interval=2, fetch=2,
            train_steps=3, train_batch=16, train_lr=0.05, ce_weight=0.1, sequential=False)  # fmt: skip
OFF = {"ce_weight": 0.0, "queue": 1, "start": 0, "interval": 1, "train_steps": 0, "factor": 1}


def steps(method, toy, ipc=1, count=None):
    """The state after every step, with the metrics."""
    g = generator(5)
    state = method.begin(toy.train, ipc, g)
    for step in range(count or method.iterations):
        metrics = method.step(state, g)
        yield step, state, metrics


def weights(state):
    """One number per slot that tells networks apart."""
    return state.networks.parameters["classifier.weight"].flatten(1).double().sum(1)


# -- DM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["none", "data"])
def test_options_off_is_dm_bit_for_bit(toy, augmentation):
    ours = distill(replace(SMALL, augmentation=augmentation, **OFF), toy.train, 2, 5)
    method = DM(iterations=7, lr=0.4, real_batch=8, network=NET, augmentation=augmentation)
    dm = distill(method, toy.train, 2, 5)
    assert torch.equal(ours.synset.codes, dm.synset.codes) and ours.history.keys() == dm.history.keys()
    assert torch.equal(ours.history["loss"], dm.history["loss"])


def test_a_zero_weight_leaves_no_trace(toy):
    on, off = (distill(replace(SMALL, ce_weight=w), toy.train, 1, 5).history for w in (0.1, 0.0))
    assert on.keys() == {"loss", "mean", "cross-entropy", "accuracy"} and off.keys() == {"loss"}
    torch.testing.assert_close(on["loss"], on["mean"] + on["cross-entropy"])
    assert off["loss"][0] == on["mean"][0]  # nothing is trained yet


# -- the algorithm written out ------------------------------------------------------------------------------------------


class Member:
    """A network with an optimiser and a meter of its own."""

    def __init__(self, train, g, method):
        self.net = nets.make(NET, train, g)
        self.sgd = torch.optim.SGD(
            self.net.parameters(),
            lr=method.train_lr,
            momentum=method.train_momentum,
            weight_decay=method.train_decay,
        )
        self.right = self.all = 0.0

    def train(self, images, labels, keep):
        logits = self.net(images)
        self.net.zero_grad(set_to_none=False)
        F.cross_entropy(logits, labels).backward()
        for (
            parameter
        ) in self.net.parameters():  # biases without effect: decay alone, as in the published code
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.sgd.step()
        self.right = keep * self.right + float((logits.argmax(1) == labels).sum())
        self.all = keep * self.all + len(labels)

    @property
    def percent(self):
        return 100 * self.right / self.all if self.all else 0.0


def slow_idm(method, train, ipc, seed, keep):
    g = generator(seed)
    x = initial_codes(Mosaic(2), train, ipc, "mix", g).unflatten(0, (3, ipc))
    slots = [Member(train, g, method) for _ in range(method.start)]
    pushed, velocity, losses = method.start, torch.zeros_like(x), []
    for step in range(method.iterations):
        if method.meter == "reset" and step % method.reset_every == 0:
            for member in slots:
                member.right = member.all = 0.0
        if step % method.interval == 0:
            new = Member(train, g, method)
            if len(slots) < method.queue:
                slots.append(new)
            else:
                slots[pushed % method.queue] = new
            pushed += 1
        member = slots[int(torch.randint(len(slots), (1,), generator=g))]
        real, leaf, loss = train.sample(method.real_batch, g), x.clone().requires_grad_(), 0
        for c in range(3):
            syn = mosaic.expand(leaf[c], 2)
            target = member.net.embed(real[c]).mean(0).detach()
            loss = loss + (target - member.net.embed(syn).mean(0)).square().sum()
            entropy = F.cross_entropy(member.net(syn), torch.full((len(syn),), c))
            loss = loss + method.ce_weight * member.percent * entropy
        velocity = 0.5 * velocity + torch.autograd.grad(loss, leaf)[0]
        x = x - method.lr * velocity
        losses.append(loss.detach())
        members = torch.randperm(len(slots), generator=g)[: method.fetch]
        shape = (method.train_steps, len(members), method.train_batch)
        for rows in torch.randint(len(train), shape, generator=g):
            for k, row in zip(members.tolist(), rows, strict=True):
                slots[k].train(train.images[row], train.labels[row], keep)
    return x.flatten(0, 1), torch.stack(losses), [member.percent for member in slots]


@pytest.mark.parametrize(("meter", "keep"), [("running", 0.9), ("reset", 1.0)])
def test_idm_equals_the_algorithm_written_out(toy, meter, keep):
    """Queue of separate networks with torch's own SGD against the stacked one; a network that is fetched again keeps its
    momentum; the queue overflows twice."""
    method = replace(SMALL, meter=meter, reset_every=4, iterations=9)
    codes, losses, percent = slow_idm(method, toy.train, 2, 5, keep)
    got = distill(method, toy.train, 2, 5)
    torch.testing.assert_close(got.history["loss"], losses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.synset.codes, codes, rtol=1e-3, atol=1e-3)
    *_, (_, state, _) = steps(method, toy, 2)
    assert torch.allclose(state.percent, torch.tensor(percent), atol=0.1) and max(percent) > 30
    assert got.history["cross-entropy"].max() > 1


# -- the queue ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "start", "queue"), [(1, 3, 5), (3, 0, 4), (5, 2, 2)])
def test_the_queue_grows_then_drops_the_oldest(toy, interval, start, queue):
    """With untrained networks: who is in the queue, step by step."""
    method = replace(SMALL, queue=queue, start=start, interval=interval, train_steps=0)
    g = generator(5)
    state = method.begin(toy.train, 1, g)
    born = weights(state)[: state.size].tolist()  # oldest first
    for step in range(16):
        method.step(state, g)
        inside = weights(state)[: state.size].tolist()
        new = [w for w in inside if w not in born]
        assert len(new) == (step % interval == 0)
        born += new
        assert state.size == min(start + 1 + step // interval, queue) == len(set(inside))
        assert sorted(inside) == sorted(born[-queue:])


def test_a_new_network_has_no_past(toy):
    method = replace(SMALL, queue=3, interval=1, start=0, iterations=6)
    last = None
    for step, state, _ in steps(method, toy):
        if last is not None and step >= 3:
            slot = step % 3  # just replaced, then perhaps trained in the same step
            assert state.seen[slot] <= method.train_steps * method.train_batch
        last = state
    method.push(state, generator())
    slot = (state.pushed - 1) % 3
    assert state.percent[slot] == 0 and state.seen[slot] == 0
    assert all((v[slot] == 0).all() for v in state.velocity.parameters.values())
    assert any((v[(slot + 1) % 3] != 0).any() for v in state.velocity.parameters.values())


def test_only_the_fetched_networks_change(toy):
    method = replace(SMALL, queue=6, start=6, interval=100, iterations=5)
    before = None
    for _, state, _ in steps(method, toy):
        if before is not None:
            changed = weights(state) != before
            assert changed.sum() == 2
        before = weights(state).clone()


def test_the_images_update_leaves_the_networks_alone(toy):
    method = replace(SMALL, train_steps=0, interval=100)
    seen = [weights(state).clone() for _, state, _ in steps(method, toy)]
    assert all(torch.equal(seen[0], later) for later in seen)


def test_an_empty_meter_gives_no_weight_to_the_cross_entropy(toy):
    untrained = distill(replace(SMALL, train_steps=0), toy.train, 1, 5).history
    assert (untrained["cross-entropy"] == 0).all() and (untrained["accuracy"] == 0).all()
    trained = distill(replace(SMALL, iterations=60), toy.train, 1, 5).history
    assert 50 < trained["accuracy"].max() <= 100  # percent


def test_accuracy_counts_in_percent(toy):
    method = replace(SMALL, ce_weight=0.5)
    state = method.begin(toy.train, 1, generator())
    state.accuracy.fill_(37.5)
    real, syn = ([torch.randn(3, n, 16, generator=generator(n))] for n in (8, 4))
    terms = method.terms(state, real, syn)
    logits, labels = state.network.classifier(syn[0]), torch.arange(3)[:, None].expand(3, 4)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4).mean(1)
    torch.testing.assert_close(terms["cross-entropy"], 18.75 * entropy)
    total = features.idm(real[0], syn[0], logits, labels, 37.5, 0.5)
    torch.testing.assert_close(sum(terms.values()), total)


def test_the_published_meter_is_cleared(toy):
    method = replace(SMALL, meter="reset", reset_every=5, fetch=0, interval=100, queue=2)
    state, g = method.begin(toy.train, 1, generator()), generator(5)
    for step in range(7):
        state.seen.fill_(10)
        state.correct.fill_(5)
        metrics = method.step(state, g)
        assert metrics["accuracy"] == (0 if step % 5 == 0 else 50)
    running = replace(method, meter="running")
    assert all(running.step(state, g)["accuracy"] == 50 for _ in range(6))


@pytest.mark.parametrize("network", ["convnet-d2-w4-batch", "mlp"])
def test_other_networks_work(toy, network):
    method = replace(SMALL, network=network, iterations=12)
    assert distill(method, toy.train, 2, 5).history["loss"].isfinite().all()
    if network.endswith("batch"):  # running statistics travel with their network
        *_, (_, state, _) = steps(method, toy, 2)
        assert (state.networks.buffers["features.1.running_mean"] != 0).any()


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
    method = replace(SMALL, iterations=25, meter=meter, reset_every=7, network="convnet-d2-w4-batch")
    calm = distill(method, toy.train, 2, 7, snapshots=(0, 25))
    for at in (11, 22):
        interrupted(method, toy.train, tmp_path / f"{at}", at, snapshots=(0, 25))
        same(distill(method, toy.train, 2, 7, checkpoint=tmp_path / f"{at}", snapshots=(0, 25)), calm)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"meter": "legacy"}, "legacy.*reset, running"),
        ({"queue": 0}, "queue 0 "),
        ({"interval": 0}, "interval 0 "),
        ({"train_batch": 0}, "train_batch 0 "),
        ({"factor": 3}, "factor 3 for 8x8 images: allowed 1, 2, 4, 8"),
        ({"init": "wishes"}, "wishes.*noise.*real"),
        ({"network": "convnet-d9"}, "depth 9 is too deep"),
    ],
)
def test_bad_input_is_one_line(toy, wrong, says):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(SMALL, **wrong), toy.train, 1, 0)
    assert "\n" not in str(caught.value)


def test_settings():
    p = idm.PRESETS
    assert p["paper"] == IDM() and p["paper-ipc1"].real_batch == 5000 and p["paper-ipc1"].interval == 5
    assert p["paper-cifar100-ipc10"].train_steps == 50 and p["paper-tinyimagenet-ipc50"].ce_weight == 0.8
    assert p["paper-imagenet100"].queue == 50 and p["paper-imagenet100-ipc50"].factor == 1
