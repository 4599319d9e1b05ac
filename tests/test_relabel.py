"""Relabelling by a teacher and training on its labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, killed_after, toy_data

from lib import nets
from lib.augment import views
from lib.evaluate import relabel, soft_labels
from lib.evaluate.soft_labels import FKD
from lib.nets.ensemble import Ensemble
from lib.synset import SyntheticSet, class_major
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.checkpoint import Checkpoint
from lib.system.errors import CompanionError

QUICK = FKD(network="convnet-d2-w8", epochs=4, batch=5, lr=3e-3, crop=0.3, temperature=4.0, networks=2)


@pytest.fixture(scope="module")
def data():
    return toy_data(channels=3)


def some_set(data, ipc=4, weights=None):
    train = data.train
    images = torch.stack([train.of_class(c)[:ipc] for c in range(3)]).flatten(0, 1)
    return SyntheticSet(images, class_major(3, ipc, "cpu"), train.classes, train.transform, weights=weights)


def teacher_of(data, seed=0):
    return nets.make("convnet-d2-w8", data.train, generator(seed)).eval().requires_grad_(False)


# -- divergence --------------------------------------------------------------------------------------------------------------


def test_divergence_is_zero_for_logits_that_differ_by_a_constant_per_row():
    t = torch.randn(5, 7, generator=generator(), dtype=torch.float64)
    assert (
        relabel.divergence(t + torch.randn(5, 1, generator=generator(1)).double(), t, 3.0).abs().max() < 1e-12
    )
    s = torch.randn(5, 7, generator=generator(2), dtype=torch.float64)
    assert (relabel.divergence(s, t, 3.0) > 0).all()
    torch_own = torch.nn.functional.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")
    assert relabel.divergence(s, t, 3.0).mean().item() == pytest.approx(torch_own.item())


def test_hot_divergence_is_a_square_and_its_gradient_sums_to_zero():
    s = torch.randn(6, 9, generator=generator(), dtype=torch.float64).requires_grad_()
    t, tau = torch.randn(6, 9, generator=generator(1), dtype=torch.float64), 1e4
    gap = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    wanted = gap.square().sum(1) / (2 * 9)
    assert torch.allclose(relabel.divergence(s, t, tau) * tau**2, wanted, rtol=1e-3)
    (gradient,) = torch.autograd.grad(relabel.divergence(s, t, 4.0).sum(), s)
    assert gradient.abs().max() > 1e-3 and gradient.sum(1).abs().max() < 1e-12


def test_weights_are_relative_to_their_mean():
    losses, weights = torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.3])
    assert relabel.weighted_mean(losses, weights).item() == pytest.approx(2.5)
    assert (
        relabel.weighted_mean(losses, 7 * torch.ones(2)).item()
        == relabel.weighted_mean(losses, None).item()
        == 2
    )


# -- views -------------------------------------------------------------------------------------------------------------------


def test_an_empty_box_changes_nothing_and_a_full_one_is_the_partner():
    x, partner = torch.randn(4, 2, 6, 6, generator=generator()), torch.tensor([2, 0, 3, 1])
    assert torch.equal(views.paste(x, partner, (3, 3, 3, 3)), x)
    assert torch.equal(views.paste(x, partner, (0, 0, 6, 6)), x[partner])
    assert views.cutmix_box(1.0, (3, 3), (6, 6)) == (3, 3, 3, 3)
    assert torch.equal(views.blend(x, partner, 1.0), x)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("order", ["keyed", "published"])
def test_replayed_twice_is_the_same_tensor(data, mix, order):
    protocol, made = replace(QUICK, mix=mix, order=order, mix_alpha=0.8), some_set(data)
    for epoch in (0, 3):
        one, two = (
            [
                soft_labels.apply_view(made.images, view, mix)
                for view in soft_labels.epoch_views(protocol, 12, 8, epoch)
            ]
            for _ in range(2)
        )
        assert [len(x) for x in one] == [5, 5, 2] and all(
            torch.equal(a, b) for a, b in zip(one, two, strict=True)
        )
    rows = [torch.cat([v.rows for v in soft_labels.epoch_views(protocol, 12, 8, e)]) for e in (0, 1)]
    assert rows[0].sort().values.tolist() == list(range(12)) and not torch.equal(*rows)


def test_published_order_is_that_of_a_random_sampler():
    from torch.utils.data import RandomSampler

    sampler = RandomSampler(range(13), generator=torch.Generator().manual_seed(42))
    epochs = [list(sampler) for _ in range(3)]
    if [soft_labels.published_order(13, e, 42).tolist() for e in range(3)] != epochs:
        # a PyTorch that draws one permutation per epoch agrees in the first
        assert soft_labels.published_order(13, 0, 42).tolist() == epochs[0]


def test_mixup_shares_follow_their_law():
    g = generator()
    draws = torch.tensor([views.beta(0.8, g) for _ in range(2000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.var().item() == pytest.approx(0.25 / 2.6, abs=0.01)
    assert all(0 <= views.beta(1.0, g) <= 1 for _ in range(50))


# -- labels --------------------------------------------------------------------------------------------------------------------


def test_stored_labels_train_like_computed_ones(data, tmp_path):
    made, teacher = some_set(data), teacher_of(data)
    for epochs in (range(0, 3), range(3, 4)):
        soft_labels.store_labels(tmp_path, teacher, made, QUICK, epochs)
    store = soft_labels.LabelStore(tmp_path, made, QUICK)
    for epoch in range(4):
        wanted = soft_labels.soft_labels(teacher, made, QUICK, epoch)
        assert torch.equal(store(epoch), wanted.half().float())  # 16 bits, nothing else
    trained = []
    for source in (teacher, store):
        networks = Ensemble.make(QUICK.network, data.test, [generator(1), generator(2)])
        relabel.train_by_distillation(networks, made, source, QUICK)
        trained.append(networks(data.test.images.unsqueeze(0)).detach())
    assert torch.allclose(*trained, atol=2e-2) and trained[0].std() > 0.1
    assert soft_labels.label_bytes(QUICK, 12, 3) == 2 * 12 * 4 * 3 <= store.bytes < 2 * 12 * 4 * 3 + 2000


def test_networks_do_not_depend_on_their_neighbours(data):
    made, teacher = some_set(data), teacher_of(data)
    pair = Ensemble.make(QUICK.network, data.test, [generator(1), generator(2)])
    alone = Ensemble.make(QUICK.network, data.test, [generator(2)])
    for networks in (pair, alone):
        relabel.train_by_distillation(networks, made, teacher, QUICK)
    x = data.test.images.unsqueeze(0)
    assert torch.allclose(pair(x)[1], alone(x)[0], atol=1e-4)


def test_training_is_adamw_on_the_divergence_with_decay_on_matrices_only(data):
    """One network by hand: torch.optim.AdamW with two groups, a cosine by epochs."""
    weights = torch.rand(12, generator=generator(7))
    made, teacher, protocol = (
        some_set(data, weights=weights),
        teacher_of(data),
        replace(QUICK, weight_decay=0.5),
    )
    networks = Ensemble.make(protocol.network, data.test, [generator(3)])
    plain = networks.network(0).train()
    groups = [[], []]
    for name, p in plain.named_parameters():
        groups["weight" in name and p.dim() > 1].append(p)
    optimiser = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0}, {"params": groups[1], "weight_decay": 0.5}], lr=1
    )
    relabel.train_by_distillation(networks, made, teacher, protocol)
    for epoch in range(4):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 4)).item())
        for view in soft_labels.epoch_views(protocol, 12, 8, epoch):
            x = soft_labels.apply_view(made.images, view, "cutmix")
            t, s, w = (teacher(x) / 4).softmax(1), (plain(x) / 4).log_softmax(1), weights[view.rows]
            loss = ((w / w.mean()) * (t * (t.log() - s)).sum(1)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for name, p in plain.named_parameters():
        assert torch.allclose(networks.parameters[name][0], p, atol=2e-4), name


def test_evaluation_teaches_the_classes_and_is_cached(data, monkeypatch):
    from lib.recover.teacher import Teacher, train_teacher

    teacher = train_teacher(
        Teacher("convnet-d2-w8-batch", epochs=8, lr=0.05, augmentation="none"), data.train
    )
    protocol = replace(QUICK, epochs=40, crop=None)
    sets = [some_set(data), some_set(data, 5)]
    found = relabel.evaluate_by_distillation(sets, data, protocol, teacher, cache=True)
    assert found.accuracy.shape == (2, 2) and found.spread.mean > 80 and found.protocol.name == "fkd"
    monkeypatch.setattr(relabel, "train_by_distillation", lambda *a, **k: pytest.fail("trained again"))
    again = relabel.evaluate_by_distillation(sets, data, protocol, teacher, cache=True)
    assert torch.equal(again.accuracy, found.accuracy)
    with pytest.raises(pytest.fail.Exception):
        relabel.evaluate_by_distillation(sets, data, replace(protocol, temperature=5.0), teacher, cache=True)


# -- kept on the way, other numbers, hard labels ------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 12])
def test_an_interrupted_training_ends_with_the_same_bits(data, tmp_path, step, hard):
    """Killed right after any step, with a checkpoint after every second one; dropout draws from PyTorch's own generator."""
    made = replace(some_set(data), weights=torch.linspace(0.5, 2, 12))
    teacher = None if hard else teacher_of(data)
    protocol = replace(QUICK, network="vit-d1-w16")

    def train(checkpoint=None):
        torch.manual_seed(1)
        networks = Ensemble.make(protocol.network, data.test, [generator(1)])
        looks = []
        loss = relabel.train_by_distillation(
            networks, made, teacher, protocol, checkpoint, after_epoch=looks.append
        )
        return networks.parameters | networks.buffers | {"loss": loss}, looks

    whole, looks = train()
    assert looks == [1, 2, 3, 4]
    checkpoint = Checkpoint(tmp_path / "training", "key", seconds=0)
    with killed_after(step):
        train(checkpoint)
    torch.rand(7)  # the process has drawn something else meanwhile
    found, looks = train(Checkpoint(tmp_path / "training", "key"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert looks[-1] == 4 and (len(looks) < 4) == (step > 4)
    other, looks = train(Checkpoint(tmp_path / "training", "another key"))
    assert looks == [1, 2, 3, 4] and torch.equal(other["loss"], whole["loss"])


def test_hard_targets_are_shares_of_pixels():
    labels = torch.tensor([0, 1, 2, 0])
    view = soft_labels.View(
        torch.tensor([3, 1, 2]),
        None,
        torch.zeros(3, dtype=torch.bool),
        torch.tensor([1, 0, 2]),
        0.3,
        (1, 0, 3, 4),
    )
    cut = relabel.hard_targets(labels, 3, view, "cutmix", 4)  # half of the pixels are the partner's
    assert torch.equal(cut, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))
    mixed = relabel.hard_targets(labels, 3, view, "mixup", 4)
    assert torch.allclose(mixed[0], torch.tensor([0.3, 0.7, 0])) and torch.allclose(
        mixed.sum(1), torch.ones(3)
    )
    assert torch.equal(relabel.hard_targets(labels, 3, view, "none", 4).argmax(1), torch.tensor([0, 1, 2]))


def test_hard_labels_teach_the_classes(data):
    networks = Ensemble.make(QUICK.network, data.test, [generator(1)])
    relabel.train_by_distillation(networks, some_set(data, 8), None, replace(QUICK, epochs=40, crop=None))
    found = networks.train(False)(data.test.images.unsqueeze(0))[0].argmax(1) == data.test.labels
    assert found.float().mean() > 0.8


@pytest.mark.parametrize("name", ["convnet-d2-w8", "resnet18-w4-batch"])
def test_other_arithmetic_is_close_and_the_default_is_none(name):
    data = toy_data(channels=3, size=32)
    made, teacher = some_set(data), teacher_of(data)
    outputs = {}
    for arithmetic in (None, PLAIN, Arithmetic(channels_last=True), Arithmetic("bfloat16", True)):
        networks = relabel.fresh_networks(name, data.test, [generator(1)])
        given = {} if arithmetic is None else {"arithmetic": arithmetic}
        relabel.train_by_distillation(networks, made, teacher, replace(QUICK, epochs=1, lr=1e-4), **given)
        outputs[arithmetic] = networks.train(False)(data.test.images[:20].unsqueeze(0)).detach()
        assert outputs[arithmetic].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in networks.parameters.values())
    assert torch.equal(outputs[None], outputs[PLAIN])
    assert torch.equal(outputs[PLAIN], outputs[Arithmetic(channels_last=True)])  # of GPUs only
    wanted = outputs[PLAIN]
    gap = (outputs[Arithmetic("bfloat16", True)] - wanted).norm() / wanted.norm()
    assert 0 < gap < 0.2


def test_unknown_precision():
    with pytest.raises(CompanionError, match="unknown precision 'fp16'.*allowed: bfloat16, float32"):
        Arithmetic("fp16")


# -- mistakes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 6}, "batch=5, not 6"),
        ({"seed": 1}, "seed=42, not 1"),
        ({"mix": "none"}, "mix='cutmix', not 'none'"),
    ],
)
def test_labels_of_other_views_are_refused(data, tmp_path, change, words):
    made = some_set(data)
    path = soft_labels.store_labels(tmp_path, teacher_of(data), made, QUICK, range(4))
    with pytest.raises(CompanionError, match="labels in .* are for") as error:
        soft_labels.read_labels(path, made, replace(QUICK, **change))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert soft_labels.read_labels(path, made, replace(QUICK, lr=1.0, temperature=9.0))[0] == range(
        4
    )  # not of the views


def test_labels_of_another_set_or_epoch_are_refused(data, tmp_path):
    made = some_set(data)
    path = soft_labels.store_labels(tmp_path, teacher_of(data), made, QUICK, range(2))
    with pytest.raises(CompanionError, match="are of another set of images"):
        soft_labels.read_labels(path, some_set(data, 3), QUICK)
    with pytest.raises(CompanionError, match="no labels of epoch 2 in .*: relabel 0 to 3"):
        soft_labels.LabelStore(tmp_path, made, QUICK)(2)
    saved = made.save(tmp_path / "set.safetensors")
    with pytest.raises(CompanionError, match="holds no soft labels"):
        soft_labels.read_labels(saved, made, QUICK)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CompanionError, match="damaged"):
        soft_labels.read_labels(path, made, QUICK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mix": "cut"}, "allowed: cutmix, mixup, none"),
        ({"order": "random"}, "allowed: keyed, published"),
        ({"batch": 0}, "whole number of at least 1"),
        ({"temperature": 0.0}, "allowed: above 0"),
        ({"crop": 1.5}, "allowed: above 0"),
        ({"network": "convnett"}, "unknown network"),
    ],
)
def test_bad_protocols(change, words):
    with pytest.raises(CompanionError) as error:
        FKD(**change)
    assert words in str(error.value)


def test_a_teacher_of_other_classes_is_refused(data):
    other = nets.make("convnet-d2-w8", toy_data(4, channels=3).train, generator()).eval()
    with pytest.raises(CompanionError, match="the teacher has 4 classes, the data 3"):
        relabel.evaluate_by_distillation(some_set(data), data, QUICK, other)
    with pytest.raises(CompanionError, match="0 sets"):
        relabel.evaluate_by_distillation([], data, QUICK, other)
