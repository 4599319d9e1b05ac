"""Continual learning: who sees what, what is kept, and that the test never holds a class of the future."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data

from lib.data.imageset import Data
from lib.distill import distill
from lib.evaluate import Protocol, evaluate
from lib.evaluate.continual import (
    ORDER_STEP,
    Memory,
    arriving,
    class_orders,
    incremental_accuracy,
    memories,
    of_classes,
)
from lib.formation.mosaic import Mosaic
from lib.methods.dm import DM
from lib.methods.selection import RandomReal
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

QUICK = Protocol("quick", network="convnet-d2-w8", epochs=15, lr=0.05, networks=2)
ORDER = torch.tensor([[2, 0], [3, 1], [5, 4]])


@pytest.fixture(scope="module")
def six():
    return toy_data(classes=6)


def random_memory(images, number):
    return distill(RandomReal(), images, 2, number).synset


def test_class_orders_are_permutations_of_their_generator():
    orders = class_orders(10, 5, 3, generator(4))
    assert orders.shape == (3, 5, 2) and torch.equal(orders, class_orders(10, 5, 3, generator(4)))
    assert all(sorted(order.flatten().tolist()) == list(range(10)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders, class_orders(10, 5, 3, generator(5)))
    # more orders do not change the first ones
    assert torch.equal(class_orders(10, 5, 2, generator(4)), orders[:2])


@pytest.mark.parametrize("stages", [3, 0, -1, 11, 2.0, True, None])
def test_stages_that_do_not_divide_the_classes(stages):
    if stages is True:
        says = "True stages"
    else:
        says = f"{stages!r} stages for 10 classes: allowed 1, 2, 5, 10"
    with pytest.raises(CompanionError, match=says):
        class_orders(10, stages, 1, generator())
    with pytest.raises(CompanionError, match="0 class orders"):
        class_orders(10, 5, 0, generator())


def test_a_stage_sees_its_own_classes_only(six):
    stage = arriving(six.train, [4, 1])
    assert stage.classes == ("class 4", "class 1") and stage.num_classes == 2 and len(stage) == 40
    for number, c in enumerate((4, 1)):
        assert torch.equal(stage.of_class(number), six.train.of_class(c))
    assert stage.smallest_class == 20 and stage.name == six.train.name


def test_memory_grows_by_whole_stages_and_never_changes(six):
    kept = memories(random_memory, six.train, ORDER)
    assert [memory.seen for memory in kept] == [[2, 0], [2, 0, 3, 1], [2, 0, 3, 1, 5, 4]]
    sets = [memory.synset for memory in kept]
    assert [len(one.images) for one in sets] == [4, 8, 12]
    for earlier, later in zip(sets, sets[1:], strict=False):
        assert torch.equal(later.images[: len(earlier.images)], earlier.images)
        assert torch.equal(later.labels[: len(earlier.labels)], earlier.labels)
    last = sets[-1]
    assert last.classes == six.train.classes and torch.bincount(last.labels).tolist() == [2] * 6
    for image, label in zip(last.images, last.labels, strict=True):  # each is a real image of its label
        assert (six.train.of_class(int(label)) == image).flatten(1).all(1).any()


def test_a_class_is_learned_once(six):
    kept = Memory(six.train.classes).add([2, 0], random_memory(arriving(six.train, [2, 0]), 0))
    one = random_memory(arriving(six.train, [3]), 0)
    for bad, says in (
        ([2], r"class 2 \('class 2'\) is in the memory already"),
        ([6], "class 6 does not exist: allowed 0 to 5"),
        ([-1], "class -1 does not exist"),
        ([3, 4], "a set of 1 classes for a stage of 2"),
    ):
        with pytest.raises(CompanionError, match=says):
            kept.add(bad, one)
    with pytest.raises(CompanionError, match="class 3 .* already"):
        kept.add([3, 3], random_memory(arriving(six.train, [3, 4]), 0))
    assert kept.add([3], one).seen == [2, 0, 3] and kept.seen == [2, 0]


def test_soft_labels_weights_and_mosaics_are_put_in_place(six):
    classes, transform = six.train.classes, six.train.transform
    codes = six.train.images[:2]
    soft = torch.tensor([[0.75, 0.25], [0.125, 0.875]])
    weights = torch.tensor([1.0, 3.0])
    kept = Memory(classes).add([4, 1], SyntheticSet(codes, soft, ("a", "b"), transform, weights=weights))
    assert kept.synset.labels.tolist() == [[0, 0.25, 0, 0, 0.75, 0], [0, 0.875, 0, 0, 0.125, 0]]
    assert torch.equal(kept.synset.weights, weights)
    mosaic = SyntheticSet(codes, torch.tensor([0, 1]), ("a", "b"), transform, decoder=Mosaic(2))
    kept = Memory(classes).add([4, 1], mosaic).synset
    assert len(kept.images) == 8 and kept.labels.tolist() == [4, 1] * 4
    assert torch.equal(kept.images, mosaic.images)


def test_handing_out_by_class(six):
    whole = distill(RandomReal(), six.train, 3, 1).synset
    part = of_classes(whole, [5, 2])
    assert part.classes == ("class 5", "class 2") and part.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(part.images, torch.cat([whole.images[15:18], whole.images[6:9]]))
    assert torch.equal(six.train.images[part.indices], part.images)
    kept = memories(lambda images, number: of_classes(whole, ORDER[number]), six.train, ORDER)[-1].synset
    assert torch.equal(kept.images[kept.labels.argsort(stable=True)], whole.images)
    with pytest.raises(CompanionError, match="soft labels"):
        of_classes(replace(whole, labels=torch.full((18, 6), 1 / 6)), [0])


def test_dm_with_a_joint_distillation_has_no_cross_class_terms(six):
    """The images of a class do not depend on which others are there, given the same draws: their gradients do not meet."""
    method = DM(iterations=1, real_batch=20, network="convnet-d2-w4", augmentation="none")
    whole, part = six.train, arriving(six.train, [0, 1, 2])
    pixels = whole.images[whole.indices(2, generator(1)).flatten()]
    after = []
    for images, count in ((whole, 6), (part, 3)):
        state = method.begin(images, 2, generator())
        with torch.no_grad():
            state.pixels.copy_(pixels[: 2 * count])
        network = method.networks.draw(state.supply, generator(2))
        method.match(state, network, generator())
        after.append(state.pixels.detach())
    torch.testing.assert_close(after[0][:6], after[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(after[0][:6], pixels[:6])


def test_accuracy_is_that_of_the_seen_classes(six):
    kept = memories(random_memory, six.train, ORDER)
    found = incremental_accuracy({"a": kept, "b": kept}, six, QUICK, seed=3, networks=2)
    assert found.keys() == {"a", "b"} and found["a"].shape == (3, 2)
    for number, memory in enumerate(kept):
        seen = torch.isin(six.test.labels, torch.tensor(memory.seen))
        data = Data(six.train, six.test.subset(seen.nonzero().flatten()))
        alone = evaluate([memory.synset], data, QUICK, 3 * ORDER_STEP + number, 2)
        torch.testing.assert_close(found["a"][number], alone.accuracy[0])
    # two classes with real images of both are told apart better than chance, and a later stage is harder
    assert found["a"][0].mean() > 0.7 and found["a"][2].mean() < found["a"][0].mean() + 0.05
    assert torch.equal(incremental_accuracy({"a": kept}, six, QUICK, 3, 2)["a"], found["a"])


def test_a_memory_of_the_wrong_images_is_at_chance_or_below(six):
    """Images of two classes under exchanged labels: a network that learns them is wrong on the real ones."""

    def swapped(images, number):
        one = random_memory(images, number)
        return replace(one, labels=1 - one.labels)

    kept = memories(swapped, six.train, ORDER[:1])
    assert incremental_accuracy({"a": kept}, six, QUICK)["a"].mean() < 0.3


def test_memories_must_agree(six):
    one, two = (memories(random_memory, six.train, order) for order in (ORDER, ORDER.flip(0)))
    for bad in ({"a": one, "b": two}, {"a": one, "b": one[:2]}, {}):
        with pytest.raises(CompanionError, match="same classes at the same stages"):
            incremental_accuracy(bad, six, QUICK)
