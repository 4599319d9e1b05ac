"""Objects that feel like torch: lengths, indices, data sets, short texts, pictures; networks and settings of one's own."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from html import escape

import pytest
import torch
import tqdm.auto
from helpers import toy_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lib.data import Data
from lib.distill import distill
from lib.evaluate import evaluate, protocol
from lib.formation.mosaic import Mosaic
from lib.methods import METHODS, recipes
from lib.methods import method as method_of
from lib.methods.about import announcement, card, how_to_ask
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.rfad import RFAD
from lib.synset import SyntheticSet, class_major
from lib.system.cards import rows_of, sheet
from lib.system.errors import CompanionError
from lib.system.files import ROOT

SMALL = DM(iterations=30, real_batch=8, network="convnet-d2-w4", augmentation="none")


@pytest.fixture(scope="module")
def toy() -> Data:
    return toy_data()


def a_set(toy: Data, **changes) -> SyntheticSet:
    train = toy.train
    images = train.sample(2, torch.Generator().manual_seed(0)).flatten(0, 1)
    fields = {"codes": images, "labels": class_major(train.num_classes, 2, "cpu")} | changes
    return SyntheticSet(classes=train.classes, transform=train.transform, **fields)


def test_sets_have_lengths_indices_and_loaders(toy):
    synset = a_set(toy)
    for one, labels in ((synset, synset.targets), (toy.train, toy.train.labels)):
        image, label = one[1]
        assert torch.equal(image, one.images[1]) and label == labels[1]
        images, some = one[1:4]
        assert images.shape == (3, *one.images.shape[1:]) and torch.equal(some, labels[1:4])
        assert len(one) == len(labels) and len(list(one)) == len(one)
        assert isinstance(one.as_dataset(), TensorDataset)
        for source in (one, one.as_dataset()):
            batches = list(DataLoader(source, batch_size=4))
            assert torch.equal(torch.cat([images for images, _ in batches]), one.images)
            assert torch.equal(torch.cat([labels for _, labels in batches]), labels)


def test_a_data_set_holds_what_is_trained_on(toy):
    plain = a_set(toy)
    tiled = replace(plain, decoder=Mosaic(2, "bilinear"))
    assert len(tiled) == 4 * len(plain) == len(tiled.as_dataset())
    weighted = replace(plain, weights=torch.rand(len(plain)))
    _, _, weights = weighted.as_dataset()[:]
    assert torch.equal(weights, weighted.weights)


def test_texts_are_short_and_pictures_are_shown(toy):
    synset = a_set(toy, meta={"method": "dm", "dataset": "toy"})
    for one in (synset, toy.train, toy):
        assert "\n" not in repr(one) and len(repr(one)) < 300 and "tensor(" not in repr(one)
        assert "data:image/png;base64," in one._repr_html_()
    assert "dm on toy" in repr(synset) and str(len(synset)) in repr(synset)
    assert "&lt;b&gt;" in replace(synset, meta={"method": "<b>"})._repr_html_()
    classes = toy.train.num_classes
    one_row, many = (toy.train.show(n).size for n in (1, 4))
    assert one_row[0] / classes == pytest.approx(many[1] / classes, abs=3) and one_row[1] < many[1]
    with pytest.raises(CompanionError, match="at least 1, not 0"):
        synset.show(0)


def test_a_sheet_shows_each_image_at_its_place():
    labels = torch.tensor([1, 0, 1])
    table = rows_of(labels, 2)
    assert table.tolist() == [[1, -1], [0, 2]]
    images = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 1, 16, 16)
    page = sheet(images, table)
    shown = [page.getpixel((x, y))[0] for y in (20, 70) for x in (20, 70)]
    assert shown == [102, 255, 51, 153]


class Mine(nn.Module):
    """A network with a norm whose statistics have to be kept per network."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x))


def made(toy: Data, classes: int):
    """A factory of ``Mine`` for these images."""

    def make():
        network = Mine(classes)
        network(toy.train.images[:2])
        return network

    return make


def test_networks_of_somebody_else_are_judged(toy):
    synset, make = a_set(toy), made(toy, toy.train.num_classes)
    brief = protocol("cpu-small", toy.train, epochs=1, lr=1e-6)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = evaluate(synset, toy, brief, seed=3, networks=3, network=make)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.accuracy.shape == (1, 3) and len(set(found.accuracy.flatten().tolist())) > 1
    again = evaluate(synset, toy, replace(brief, network=make), seed=3, networks=1)
    assert again.accuracy[0, 0] == found.accuracy[0, 0], "a network does not depend on its neighbours"
    assert "make" in str(found.protocol) and "convnet" not in str(found.protocol)
    named = evaluate(synset, toy, brief, seed=3, networks=1, network="mlp")
    assert named.protocol.network == "mlp"


def test_networks_that_do_not_fit_are_told_in_one_line(toy):
    synset, brief = a_set(toy), protocol("cpu-small", toy.train, epochs=2)
    wrong = {
        "gives": made(toy, toy.train.num_classes + 1),
        "cannot take images": lambda: nn.Linear(7, 3),
        "allowed: a torch.nn.Module": lambda: "network",
    }
    for words, make in wrong.items():
        with pytest.raises(CompanionError, match=words):
            evaluate(synset, toy, brief, networks=1, network=make)
    with pytest.raises(CompanionError, match="cache=False"):
        evaluate(synset, toy, brief, networks=1, network=wrong["gives"], cache=True)
    with pytest.raises(CompanionError, match="unknown network"):
        protocol("cpu-small", toy.train, network="resnet99")


def test_distill_takes_both_halves_and_methods_by_name(toy):
    one, other = (distill(SMALL, given, 1, seed=2).synset for given in (toy, toy.train))
    assert torch.equal(one.codes, other.codes)
    row = recipes("dm").find(toy.train, 1)
    named = distill("random", toy, 1).synset
    assert row.small and named.meta["method"] == "random"
    with pytest.raises(CompanionError, match="unknown method 'dmm' .did you mean 'dm'"):
        distill("dmm", toy, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DM(iterations=-5), "iterations must be a whole number of at least 0, not -5"),
        (lambda: DM(lr=0.0), "lr 0.0 is not allowed"),
        (lambda: replace(SMALL, momentum=-0.5), "DM: momentum -0.5 is not allowed"),
        (lambda: replace(SMALL, momentum=float("nan")), "DM: momentum nan is not allowed"),
        (lambda: DC(lr_network=-1.0), "DC: lr_network -1.0 is not allowed"),
        (lambda: RFAD(iterations=-1), "RFAD: iterations -1 is not allowed"),
    ],
)
def test_settings_are_checked_in_one_line(toy, make, words):
    with pytest.raises(CompanionError, match=words) as caught:
        distill(make(), toy, 1)
    assert "\n" not in str(caught.value)


@pytest.fixture
def heard():
    """Whoever starts the tests may have the signal ignored, as a shell does for what runs in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interruption_ends_its_step_and_the_same_call_goes_on(toy, monkeypatch, tmp_path):
    """A real signal in the middle of a step, no checkpoint asked for."""
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path))
    calm = distill(SMALL, toy, 2, seed=7)
    assert not list(tmp_path.iterdir())
    step, begun = DM.step, []

    def pressed(self, state, generator):
        begun.append(1)
        if len(begun) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, state, generator)

    monkeypatch.setattr(DM, "step", pressed)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on from step 13 of 30") as caught:
        distill(SMALL, toy, 2, seed=7)
    assert "\n" not in str(caught.value) and len(list(tmp_path.iterdir())) == 1
    resumed = distill(SMALL, toy, 2, seed=7)
    assert len(begun) == 30 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.equal(resumed.synset.codes, calm.synset.codes) and not list(tmp_path.iterdir())
    assert torch.equal(resumed.history["loss"], calm.history["loss"])


def test_the_bar_names_method_and_data_and_shows_the_loss(toy, capsys, monkeypatch):
    monkeypatch.setattr(
        tqdm.auto.tqdm, "__init__", functools.partialmethod(tqdm.auto.tqdm.__init__, mininterval=0)
    )  # every step
    distill(SMALL, toy, 1, progress=True)
    shown = capsys.readouterr().err
    assert f"DM on {toy.train.name} IPC 1" in shown and "loss " in shown


def test_a_distillation_with_a_bar_says_first_what_it_does(toy, capsys):
    method = replace(SMALL, iterations=20)
    for seed in (0, 1):
        distill(method, toy, 1, seed, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and err.count("Zhao & Bilen 2023") == 1, "once for the sets of all seeds"
    assert err.startswith(announcement(method, toy.train.name, 1))
    assert "20 steps with convnet-d2-w4; settings that no recipe has; published settings: recipes(" in err
    for shown in (False, None):  # None: there is no terminal here
        distill(replace(SMALL, iterations=21), toy, 1, progress=shown)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_about_to_do(name):
    one = method_of(name)(**METHODS[name].fields)
    line, shown = announcement(one, "digits", 1), card(one)
    assert "\n" not in line and line.startswith(METHODS[name].title) and METHODS[name].paper in line
    assert METHODS[name].title in shown and " step" in shown
    assert all(f"<td>{field.name}</td>" in shown for field in fields(one))
    assert "bound method" not in shown and "object at" not in shown
    if call := how_to_ask(one).partition(": ")[2]:
        assert escape(call) in shown and call in line
        assert type(eval(call, {"recipes": recipes})) is type(one)  # as a user would paste it


def test_presets_are_recognised():
    assert "the published settings for cifar10 IPC 10 and" in announcement(DM(), "digits", 1)
    assert "1 000 steps at IPC 1, 10 000 steps at IPC 10" in card(DC())
    small = recipes("dm").named("digits").method
    assert "the small settings for digits" in announcement(small, "digits", 1)


def test_ipython_shows_methods_as_cards():
    """In an interpreter of its own, where the shell is there before the library, as in a notebook."""
    script = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell()
InteractiveShell._instance = shell
from lib.methods.dm import DM
class Mine(DM):
    pass
for one in (DM(), Mine()):
    data, _ = shell.display_formatter.format(one)
    print(data["text/plain"].startswith(type(one).__name__ + "("), "<table" in data["text/html"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["True"] * 4
