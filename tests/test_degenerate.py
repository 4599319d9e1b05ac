"""Data at the edge: one class, one image in a class, classes of very unequal size, halves without images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import toy_data
from test_plain import CASES

from lib.data import Data
from lib.distill import distill
from lib.evaluate import evaluate, full_data_accuracy, protocol
from lib.methods import METHODS
from lib.select.subset import real_set
from lib.system.errors import CompanionError

RIDGE, EXPERTS = (
    "needs at least 2 classes, these data have 1",
    "a trajectory of experts needs at least 2 classes",
)
NEEDS_SEVERAL = {
    "frepo": f"FRePo {RIDGE}",
    "rcig": f"RCIG {RIDGE}",
    "margin": f"the lead of a class over the next {RIDGE}",
    "mtt": EXPERTS,
    "esp": EXPERTS,
    "haba": EXPERTS,
}


def first_of(images, counts):
    """So many images of every class."""
    rows = [(images.labels == c).nonzero().flatten()[:n] for c, n in enumerate(counts)]
    return images.subset(torch.cat(rows))


def class_alone(images):
    """The first class and no other."""
    return replace(first_of(images, [len(images)]), classes=images.classes[:1])


def case_of(name):
    case = CASES[name][0]
    return case.method, 2 if name == "dd" else 1, toy_data(channels=case.channels).train


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_one_class(name):
    """It runs to finite images, or says in one line that one class is too few."""
    method, ipc, train = case_of(name)
    if name in NEEDS_SEVERAL:
        with pytest.raises(CompanionError, match=NEEDS_SEVERAL[name]):
            distill(method, class_alone(train), ipc, 0)
        return
    found = distill(method, class_alone(train), ipc, 0).synset
    assert found.images.isfinite().all() and found.labels.isfinite().all()
    assert found.hard_labels.unique().tolist() == [0]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dd"])
def test_every_method_where_a_class_has_one_image(name):
    method, ipc, train = case_of(name)
    found = distill(method, first_of(train, [1, 3, 20]), ipc, 0).synset
    assert found.images.isfinite().all() and found.labels.isfinite().all()
    assert found.hard_labels.unique().tolist() == [0, 1, 2]
    with pytest.raises(CompanionError, match="ipc 2 is larger than the smallest class: allowed 1 to 1"):
        distill(method, first_of(train, [1, 3, 20]), 2, 0)


def test_a_class_without_images_is_named_as_the_reason():
    data = toy_data()
    train, method = first_of(data.train, [5, 0, 5]), case_of("dm")[0]
    with pytest.raises(CompanionError, match="ipc 1 is not allowed: one of the classes has no image"):
        distill(method, train, 1, 0)


def test_evaluation_at_the_edge():
    data, small = toy_data(), protocol("cpu-small", network="convnet-d2-w4", epochs=3)
    synset = real_set(data.train, torch.arange(6))
    empty = Data(data.train, data.test.subset([]))
    for call in (
        lambda: evaluate(synset, empty, small),
        lambda: full_data_accuracy(empty, small, cache=False),
    ):
        with pytest.raises(CompanionError, match="the data 'toy' have no test images"):
            call()
    nothing = real_set(data.train, torch.arange(0))
    with pytest.raises(CompanionError, match="the set has no images"):
        evaluate(nothing, data, small)
    one = Data(class_alone(data.train), class_alone(data.test))
    assert evaluate(real_set(one.train, torch.arange(2)), one, small).accuracy.tolist() == [[1.0] * 5]
    lacks = Data(data.train, first_of(data.test, [10, 0, 4]))
    assert (
        evaluate(synset, lacks, small).balanced and evaluate(synset, lacks, small).accuracy.isfinite().all()
    )
