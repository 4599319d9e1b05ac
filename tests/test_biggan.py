"""BigGAN with the released names: the list of its state, its formulas, and the files that are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data
from safetensors.torch import save_file

from lib.distill import distill
from lib.methods import method as class_of
from lib.nets.generators import BigGAN, the_prior
from lib.nets.generators.biggan import BigGAN32, Norm, conv
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

SMALL = BigGAN(latent=5, width=2)
SPECTRAL = ("weight", "bias", "u0", "sv0")
NAMES = {  # as the released generator registers them
    *(f"linear.{name}" for name in SPECTRAL),
    *(f"blocks.{i}.0.{part}.{name}" for i in range(3) for part in ("conv1", "conv2", "conv_sc") for name in SPECTRAL),
    *(
        f"blocks.{i}.0.{part}.{name}"
        for i in range(3)
        for part in ("bn1", "bn2")
        for name in ("gain.weight", "bias.weight", "stored_mean", "stored_var")
    ),
    *(f"output_layer.0.{name}" for name in ("gain", "bias", "stored_mean", "stored_var")),
    *(f"output_layer.2.{name}" for name in SPECTRAL),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy():
    return toy_data(channels=3, size=32, per_class=6)


@pytest.fixture
def state(toy):
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in SMALL.make(toy.train).state_dict().items()}


def test_names_and_sizes_are_those_of_the_released_files():
    network = BigGAN32(10)
    assert set(network.state_dict()) == NAMES
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["linear.weight"] == (4096, 128) and shapes["linear.u0"] == (1, 4096)
    assert shapes["blocks.2.0.conv_sc.weight"] == (256, 256, 1, 1)
    assert shapes["blocks.0.0.bn1.gain.weight"] == (10, 256) and shapes["output_layer.2.u0"] == (1, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_304_387


def test_weights_are_used_by_their_largest_singular_value():
    layer = conv(3, 4).requires_grad_(False)
    W = layer.weight.flatten(1)
    U, values, _ = torch.linalg.svd(W)
    layer.u0.copy_(U[:, :1].T)
    x = torch.randn(2, 3, 5, 5, generator=generator())
    before = layer.u0.clone()
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight / values[0], layer.bias, padding=1))
    assert torch.equal(layer.u0, before)


def test_a_norm_scales_and_shifts_by_class():
    norm, x, y = Norm(3, 2), torch.randn(4, 3, 2, 2, generator=generator()), torch.tensor([0, 1, 1, 0])
    norm.stored_mean.fill_(0.5)
    norm.stored_var.fill_(4.0)
    wanted = (x - 0.5) / (4 + 1e-5) ** 0.5
    for i, c in enumerate(y):
        scale, shift = (table.weight[c][:, None, None] for table in (norm.gain, norm.bias))
        torch.testing.assert_close(norm(x, y)[i], wanted[i] * (1 + scale) + shift)


@pytest.mark.filterwarnings("ignore:the prior")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_with_the_released_names_is_a_prior(toy, state, tmp_path, suffix):
    path = tmp_path / f"G{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    prior = replace(SMALL, weights=str(path))
    network = the_prior(prior, toy.train)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    method = class_of("itgan")(
        prior, 2, batch=None, real_batch=3, network="convnet-d2-w4", augmentation="none", inversion="none"
    )
    synset = distill(method, toy.train, 1).synset
    synset.save(tmp_path / "set.safetensors")
    torch.testing.assert_close(SyntheticSet.load(tmp_path / "set.safetensors").images, synset.images)


def test_what_does_not_fit_is_one_line(toy, state, tmp_path):
    def refused(tensors, message, prior=SMALL):
        path = tmp_path / "G.safetensors"
        save_file(tensors, path)
        with pytest.raises(CompanionError, match=message) as caught:
            the_prior(replace(prior, weights=str(path)), toy.train)
        assert "\n" not in str(caught.value)

    refused(
        {k: v for k, v in state.items() if k != "linear.u0"},
        r"does not fit biggan on toy; allowed: .*linear.u0 is absent",
    )
    refused(state | {"shared.weight": torch.zeros(1)}, r"shared.weight is \(1,\), expected absent")
    refused(state, r"blocks.0.0.bn1.bias.weight is \(3, 8\), expected \(3, 12\)", replace(SMALL, width=3))
    damaged = tmp_path / "G.pth"
    damaged.write_bytes(b"none")
    for path, message in ((damaged, "is damaged"), (tmp_path / "no.pth", "no file")):
        with pytest.raises(CompanionError, match=f"{message}.*allowed: a plain state dict"):
            the_prior(replace(SMALL, weights=str(path)), toy.train)
    with pytest.raises(CompanionError, match=r"BigGAN makes images of \(3, 32, 32\), not \(1, 8, 8\)"):
        the_prior(SMALL, toy_data().train)
    with pytest.raises(CompanionError, match="must be brought .*weights='FILE' with a plain state dict"):
        the_prior(SMALL, toy.train)
    with pytest.raises(CompanionError, match=r"latents of shape \(4,\): BigGAN32 takes \(5,\)"):
        SMALL.make(toy.train)(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))
