"""The ConvNet, its grouped form, and networks by name."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from torch import nn

from lib import nets
from lib.data import load
from lib.nets.convnet import TAPS, ConvNet
from lib.system.errors import CompanionError


def like(channels=3, classes=10, size=32, padding=1):
    return SimpleNamespace(
        channels=channels, num_classes=classes, size=size, first_padding=padding, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("convnet", like(), 320_010),
        ("convnet", like(classes=100), 504_420),
        ("convnet", like(1, 10, 28, 3), 317_706),
        ("convnet-d4", like(3, 200, 64), 857_160),
        ("mlp", like(), 411_146),
        ("lenet", like(), 62_006),
        ("resnet18", like(), 11_173_962),
        ("resnet10", like(), 4_903_242),
    ],
)
def test_published_parameter_counts(name, kind, count):
    assert nets.count_parameters(nets.make(name, kind)) == count


def as_sequential(net: ConvNet) -> nn.Sequential:
    """The same layers, called the plain way."""
    return nn.Sequential(net.features, nn.Flatten(), net.classifier)


VARIANTS = [
    {"norm": "instance"}, {"norm": "batch"}, {"norm": "layer"}, {"norm": "group"}, {"norm": "none"},
    {"act": "swish"}, {"act": "sigmoid"}, {"act": "leaky"}, {"pool": "max"}, {"pool": "none"},
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_forward_equals_its_layers(options, mode):
    net = (
        ConvNet(2, 4, 9, width=8, depth=2, **options).double().train(mode)
    )  # 9 pixels: the last row is dropped
    x = torch.randn(5, 2, 9, 9, generator=generator(1)).double()
    want = as_sequential(net)(x)
    torch.testing.assert_close(net(x), want)
    torch.testing.assert_close(net.classifier(net.embed(x)), net(x))
    taps = net.taps(x)
    assert len(taps) == 2 and torch.equal(taps[-1].flatten(1), net.embed(x))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_grouped_equals_separate(options, shared):
    networks = [ConvNet(2, 4, 8, width=8, depth=2, **options).double() for _ in range(3)]
    for k, net in enumerate(networks):
        nets.initialise(net, generator(k))
        with torch.no_grad():
            for parameter in net.parameters():  # affine weights of norms too
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator(k)).double()
    tensors = {
        name: torch.stack([net.state_dict()[name] for net in networks]) for name in networks[0].state_dict()
    }
    x = torch.randn(1 if shared else 3, 5, 2, 8, 8, generator=generator(1)).double()
    out = networks[0].grouped_logits(tensors, x)
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    embedding = networks[0].grouped_embed(tensors, x)
    for k, net in enumerate(networks):
        torch.testing.assert_close(out[k], net(x[0 if shared else k]))
        torch.testing.assert_close(embedding[k], net.embed(x[0 if shared else k]))
    if options == {"norm": "batch"}:  # running statistics move as in the stand-alone network
        fresh = nets.initialise(ConvNet(2, 4, 8, width=8, depth=2, norm="batch").double(), generator(2))
        fresh.load_state_dict(networks[2].state_dict())
        fresh.features[1].reset_running_stats()
        fresh.features[1].train()
        fresh.features[1](fresh.features[0](x[0 if shared else 2]))
        torch.testing.assert_close(moved["features.1.running_mean"][2], fresh.features[1].running_mean)


def test_instance_norm_is_torchs():
    """GroupNorm with one group per channel, written in the papers, is affine InstanceNorm2d, and standardises."""
    net = ConvNet(3, 4, 8, width=8, depth=1).double()
    x = torch.randn(4, 8, 6, 6, generator=generator()).double()
    norm = net.features[1]
    nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    want = F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=1e-5)
    tensors = {f"features.1.{k}": v.unsqueeze(0) for k, v in norm.named_parameters()}
    torch.testing.assert_close(net._normalise(x, norm, tensors, "features.1", 1), want)
    by_hand = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(want, by_hand * norm.weight[:, None, None] + norm.bias[:, None, None])


@pytest.mark.parametrize("side", [2, 3, 8, 9])
def test_two_strided_sums_are_average_pooling(side):
    net = ConvNet(1, 2, 8, width=4, depth=1)
    x = torch.randn(3, 4, side, side, generator=generator()).double().requires_grad_()
    torch.testing.assert_close(net._downsample(x), F.avg_pool2d(x, 2))
    weight = torch.randn(net._downsample(x).shape, generator=generator(1)).double()
    mine, torchs = (
        torch.autograd.grad((f(x) * weight).sum(), x)[0]
        for f in (net._downsample, lambda x: F.avg_pool2d(x, 2))
    )
    torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "size, padding, depth, side",
    [(8, 1, 2, 2), (16, 1, 3, 2), (28, 3, 3, 4), (32, 1, 3, 4), (64, 1, 4, 4), (128, 1, 5, 4)],
)
def test_every_image_size(channels, size, padding, depth, side):
    net = nets.make(f"convnet-d{depth}-w4", like(channels, 5, size, padding), generator())
    x = torch.randn(2, channels, size, size, generator=generator(1)).requires_grad_()
    assert net.embed(x).shape == (2, 4 * side * side)
    logits = net(x)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    (g,) = torch.autograd.grad(logits.square().sum(), x)
    assert g.isfinite().all() and g.abs().sum() > 0


def test_28_pixels_with_padding_3_are_32_with_zeros():
    small, large = (nets.make("convnet-w4", like(1, 10, s, p), generator(2)) for s, p in ((28, 3), (32, 1)))
    x = torch.randn(2, 1, 28, 28, generator=generator())
    torch.testing.assert_close(small(x), large(F.pad(x, (2, 2, 2, 2))))


def test_too_deep_is_one_line():
    with pytest.raises(CompanionError, match="depth 4 is too deep for 8x8 images: allowed 1 to 3"):
        nets.make("convnet-d4-w4", like(1, 10, 8))
    nets.make("convnet-d3-w4", like(1, 10, 8))


# -- initial weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet-d2-w32-batch", "mlp", "lenet", "vit-d1-w32"])
def test_initial_weights_come_from_the_generator_alone(name):
    kind = like(1, 10, 16)
    torch.manual_seed(1)
    first = nets.make(name, kind, generator(4)).state_dict()
    torch.manual_seed(2)
    second = nets.make(name, kind, generator(4)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = nets.make(name, kind, generator(5)).state_dict()
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_initial_law_is_torchs_default():
    net = nets.make("convnet-w64", like(), generator())
    assert isinstance(net.features[4], nn.Conv2d)
    for layer in (net.features[0], net.features[4], net.classifier):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for tensor in (layer.weight, layer.bias):
            assert tensor.abs().max() <= bound
        assert layer.weight.abs().max() > 0.98 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        torchs = type(layer)(*((layer.in_features, layer.out_features) if isinstance(layer, nn.Linear)
                               else (layer.in_channels, layer.out_channels, 3)))  # fmt: skip
        assert torchs.weight.abs().max().item() == pytest.approx(layer.weight.abs().max().item(), rel=0.02)
    assert (net.features[1].weight == 1).all() and (net.features[1].bias == 0).all()


def test_initialise_again_forgets_everything():
    net = nets.make("convnet-d2-w4-batch", like(1, 3, 8), generator(0))
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()(torch.randn(8, 1, 8, 8, generator=generator()))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
    nets.initialise(net, generator(0))
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in net.state_dict().items())


def test_has_batch_norm():
    assert nets.has_batch_norm(nets.make("convnet-d2-w4-batch", like(1, 3, 8)))
    assert not nets.has_batch_norm(nets.make("convnet-d2-w4", like(1, 3, 8)))


# -- names --------------------------------------------------------------------------------------------------------------


def test_names():
    assert nets.parse("convnet-d2-w32-batch-swish-max")[1] == {
        "depth": 2, "width": 32, "norm": "batch", "act": "swish", "pool": "max",
    }  # fmt: skip
    assert nets.parse("convnet-nopool")[1] == {"pool": "none"}
    assert nets.parse("vit-d2-w64") == ("vit", {"depth": 2, "dim": 64})
    assert nets.parse("mlp") == ("mlp", {})


@pytest.mark.parametrize(
    "name, says",
    [
        ("convnt", "unknown network 'convnt' .did you mean 'convnet'.*allowed: .*vgg11"),
        ("convnet-d0", "unknown option 'd0'.*allowed after convnet: d<depth>"),
        ("convnet-w", "unknown option 'w'"),
        ("mlp-d3", "unknown option 'd3'.*allowed after mlp: none"),
        ("lenet-batch", "unknown option 'batch'"),
        ("convnet--w32", "unknown option ''"),
        ("convnet-D2", "unknown option 'D2'"),
        ("", "unknown network ''"),
        (None, "unknown network None"),
    ],
)
def test_wrong_names_are_one_line(name, says):
    with pytest.raises(CompanionError, match=says) as caught:
        nets.make(name, like())
    assert "\n" not in str(caught.value)


def test_group_norm_needs_a_fitting_width():
    with pytest.raises(CompanionError, match="group"):
        nets.make("convnet-d2-w6-group", like(1, 3, 8))


@pytest.mark.parametrize("norm", ["", "-batch", "-none", "-layer"])
@pytest.mark.parametrize("where", TAPS)
def test_taps_of_one_pass(norm, where):
    """Every tap is what its module gives, and the embedding and its gradient are those of a pass without taps."""
    like = load("digits").train
    net = nets.make(f"convnet-d2-w8{norm}", like, torch.Generator().manual_seed(0))
    x = like.images[:6].clone().requires_grad_()
    embedding = net.embed(x)
    gradient = torch.autograd.grad(embedding.square().sum(), x)[0]
    maps, same = net.look(x, where)
    torch.testing.assert_close(same, embedding, rtol=1e-4, atol=1e-5)  # the tapped convolution keeps its bias
    torch.testing.assert_close(
        torch.autograd.grad(same.square().sum() + 0 * sum(m.sum() for m in maps), x)[0],
        gradient,
        rtol=1e-3,
        atol=1e-4,
    )
    y, expected = x, []
    for i in range(8):
        y = net.features[i](y)
        if i % 4 == TAPS.index(where):
            expected.append(y.clone())
            y = y.clone()
    for tap, value in zip(maps, expected, strict=True):
        torch.testing.assert_close(tap, value, rtol=1e-4, atol=1e-5)


def test_an_unknown_tap_is_named():
    net = nets.make("convnet-d2-w8", load("digits").train)
    with pytest.raises(CompanionError, match="tap 'relu'; allowed: act, conv, norm, pool"):
        net.look(torch.zeros(1, 1, 8, 8), "relu")
