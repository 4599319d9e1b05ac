"""Generative priors: trained once, kept, saved, loaded, and refused in one line where they do not fit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from helpers import generator, toy_data
from torch import nn

from lib.nets.generators import prior as priors
from lib.nets.generators.prior import (
    Generator,
    Prior,
    load_prior,
    relative_spread,
    save_prior,
    spread,
    the_prior,
    to_data,
    to_generator,
)
from lib.system.errors import CompanionError


class Affine(Generator):
    """The mean of a class, plus the code times a learned number, in one layer."""

    latent, layers, aside = (1, 8, 8), 1, ("encoder",)

    def __init__(self, like):
        super().__init__()
        self.shape, self.num_classes = like.shape, like.num_classes
        self.mean, self.encoder = nn.Embedding(like.num_classes, 64), nn.Linear(64, 64)
        self.scale = nn.Linear(1, 1, bias=False)

    def start(self, w, y):
        return self.scale(w.unsqueeze(-1)).squeeze(-1)

    def layer(self, k, h, w, y):
        return h + self.mean(y).view(-1, 1, 8, 8)


@dataclass(frozen=True)
class AffinePrior(Prior):
    kind: ClassVar[str] = "affine"
    width: float = 0.3
    trained: ClassVar[list[int]] = []

    def make(self, like):
        return Affine(like).to(like.device)

    def fit(self, network, train, generator):
        self.trained.append(1)
        for c in range(train.num_classes):
            network.mean.weight.data[c] = to_generator(train.of_class(c), train.transform).mean(0).flatten()
        network.scale.weight.data.fill_(self.width * self.lr / 2e-3)


def same(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_prior_is_trained_once_and_comes_frozen(toy):
    AffinePrior.trained.clear()
    first, second = the_prior(AffinePrior(), toy.train), the_prior(AffinePrior(), toy.train)
    assert same(first, second) and len(AffinePrior.trained) == 1
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())
    the_prior(AffinePrior(steps=3), toy.train)
    the_prior(AffinePrior(seed=1), toy.train)
    the_prior(AffinePrior(), toy_data(seed=4).train)
    assert len(AffinePrior.trained) == 4  # other recipe, seed or data: another prior


def test_layers_make_the_same_image_from_every_depth(toy):
    network = the_prior(AffinePrior(), toy.train)
    y = torch.tensor([0, 2, 1])
    z = network.draw(y, generator())
    for n in range(network.layers + 1):
        torch.testing.assert_close(network.from_f(network.to_f(z, y, n), z, y, n), network(z, y))
    assert "encoder.weight" not in network.generating() and "mean.weight" in network.generating()
    with pytest.raises(CompanionError, match=r"latents of shape \(2, 8, 8\): Affine takes \(1, 8, 8\)"):
        network.check(z.expand(-1, 2, -1, -1))


def test_generated_images_and_data_are_two_views_of_the_same_pixels(toy):
    there = to_generator(toy.train.images, toy.train.transform)
    torch.testing.assert_close(to_data(there, toy.train.transform), toy.train.images)
    torch.testing.assert_close((there + 1) / 2, toy.train.transform.inverse(toy.train.images))


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_prior_comes_back(toy, tmp_path, half):
    network = the_prior(AffinePrior(), toy.train)
    path = save_prior(network, AffinePrior(), toy.train, tmp_path / "prior.safetensors", half)
    back = load_prior(AffinePrior(weights=str(path)), toy.train)
    assert same(back, network) != half
    y = torch.tensor([0, 1])
    z = network.draw(y, generator())
    torch.testing.assert_close(back(z, y), network(z, y), atol=2e-3, rtol=0)
    assert back.mean.weight.dtype == torch.float32 and not back.training


def test_a_file_that_does_not_fit_is_refused_in_one_line(toy, tmp_path):
    network, path = the_prior(AffinePrior(), toy.train), tmp_path / "prior.safetensors"
    save_prior(network, AffinePrior(), toy.train, path)
    mine = AffinePrior(weights=str(path))

    class Other(AffinePrior):
        kind: ClassVar[str] = "other"

    class Wider(AffinePrior):
        def make(self, like):
            network = super().make(like)
            network.scale = nn.Linear(2, 1, bias=False)
            return network

    class More(AffinePrior):
        def make(self, like):
            network = super().make(like)
            network.head = nn.Linear(1, 1)
            return network

    def refused(prior, train, message):
        with pytest.raises(CompanionError, match=message) as caught:
            the_prior(prior, train)
        assert "\n" not in str(caught.value)

    refused(mine, toy_data(seed=1).train, r"is a prior of other data: toy .* allowed with foreign=True")
    refused(mine, toy_data(classes=4).train, "allowed: the same shape and number of classes")
    refused(Other(weights=str(path)), toy.train, "holds a prior of kind 'affine', not 'other'")
    refused(Wider(weights=str(path)), toy.train, r"scale.weight is \(1, 1\), expected \(1, 2\)")
    refused(More(weights=str(path)), toy.train, r"head.bias is absent, expected \(1,\)")
    refused(AffinePrior(weights=str(tmp_path / "none")), toy.train, "no file")
    refused(AffinePrior(lr=float("inf")), toy.train, "the prior affine diverged on toy at learning rate inf")
    assert same(the_prior(replace(mine, foreign=True), toy_data(seed=1).train), network)


def test_a_collapsed_prior_is_told_with_its_number(toy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        the_prior(AffinePrior(), toy.train)
    with pytest.warns(UserWarning, match="the prior affine has collapsed on toy: .* expected at least 0.1"):
        the_prior(AffinePrior(width=1e-3), toy.train)
    network = the_prior(AffinePrior(), toy.train)
    network.scale.weight.data.fill_(0.3)  # noise of 0.6 in units of 0.25 is 0.3 in [-1, 1]
    assert relative_spread(network, toy.train, 20) == pytest.approx(1, rel=0.1)


def test_the_spread_does_not_depend_on_how_many_images_there_are():
    x = torch.randn(2, 4000, 3, 2, 2, generator=generator())
    assert spread(x).item() == pytest.approx(12, rel=0.03)
    few = torch.stack([spread(part) for part in x.split(4, 1)]).mean()
    assert few.item() == pytest.approx(12, rel=0.03)
    assert spread(x[:, :1].expand(-1, 5, -1, -1, -1)) == 0


@pytest.mark.parametrize(
    "field, value", [("steps", -1), ("batch", 0), ("lr", 0.0), ("lr", float("nan")), ("seed", -1)]
)
def test_bad_recipes_are_refused(field, value):
    with pytest.raises(CompanionError, match=field):
        AffinePrior(**{field: value})


def test_committed_priors_are_found_by_recipe_and_data(toy, tmp_path, monkeypatch):
    network = the_prior(AffinePrior(), toy.train)
    save_prior(network, AffinePrior(), toy.train, tmp_path / "affine_toy.safetensors", half=True)
    monkeypatch.setattr(priors, "COMMITTED", ("affine_toy.safetensors",))
    monkeypatch.setattr(priors, "__file__", str(tmp_path / "prior.py"))
    AffinePrior.trained.clear()
    the_prior(AffinePrior(), toy.train)
    assert not AffinePrior.trained
    the_prior(AffinePrior(steps=1), toy.train)
    assert len(AffinePrior.trained) == 1
