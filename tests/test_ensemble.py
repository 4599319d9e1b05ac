"""K networks as one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import generator

from lib import nets
from lib.nets.ensemble import Ensemble, apply

LIKE = SimpleNamespace(channels=1, num_classes=3, size=8, first_padding=1, device=torch.device("cpu"))
NAMES = ("convnet-d2-w4", "convnet-d2-w4-batch", "mlp", "lenet", "resnet18-batch", "vit-d1-w16")


def make(name, seeds=(0, 1, 2)):
    return Ensemble.make(name, LIKE, [generator(s) for s in seeds])


@pytest.mark.parametrize("name", NAMES)
def test_network_k_comes_from_generator_k_alone(name):
    three, one = make(name), make(name, (2,))
    alone = nets.make(name, LIKE, generator(2)).state_dict()
    for key, tensor in (three.parameters | three.buffers).items():
        assert torch.equal(tensor[2], (one.parameters | one.buffers)[key][0])
        assert torch.equal(tensor[2], alone[key])
    assert all(p.requires_grad and p.is_leaf for p in three.parameters.values())
    assert not any(b.requires_grad for b in three.buffers.values())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES[:5])
def test_applied_together_equals_each_network(name, mode):
    made = make(name).train(mode)
    singles = [made.network(k).train(mode) for k in range(3)]
    own = torch.randn(3, 6, 1, 8, 8, generator=generator(5))
    same = own[:1]
    for x, pick in ((own, lambda k: own[k]), (same, lambda k: same[0])):
        logits = made(x)
        assert logits.shape == (3, 6, 3)
        for k, single in enumerate(singles):
            torch.testing.assert_close(logits[k], single(pick(k)), rtol=1e-4, atol=1e-5)
    if mode:  # batch norms moved their statistics the same way
        for key, buffer in made.buffers.items():
            if buffer.is_floating_point():
                want = torch.stack([single.state_dict()[key] for single in singles])
                torch.testing.assert_close(buffer, want, rtol=1e-4, atol=1e-5)
    else:
        embedding = made.embed(own)
        for k, single in enumerate(singles):
            torch.testing.assert_close(embedding[k], single.embed(own[k]), rtol=1e-4, atol=1e-5)


def test_eval_mode_changes_nothing():
    made = make("convnet-d2-w4-batch").train(False)
    before = {k: v.clone() for k, v in made.buffers.items()}
    made(torch.randn(1, 4, 1, 8, 8, generator=generator()))
    assert all(torch.equal(v, before[k]) for k, v in made.buffers.items())


@pytest.mark.parametrize("name", ["convnet-d2-w4", "mlp"])
def test_gradients_do_not_cross(name):
    made = make(name)
    logits = apply(
        made.template, made.parameters | made.buffers, torch.randn(3, 4, 1, 8, 8, generator=generator())
    )
    gradients = torch.autograd.grad(
        logits[1].square().sum(), list(made.parameters.values()), materialize_grads=True
    )
    assert all((g[[0, 2]] == 0).all() for g in gradients)
    assert sum(g[1].abs().sum() for g in gradients) > 0


def test_a_copy_is_a_copy():
    made = make("convnet-d2-w4")
    single = made.network(1)
    with torch.no_grad():
        for parameter in single.parameters():
            parameter.zero_()
    assert made.parameters["classifier.weight"][1].abs().sum() > 0
