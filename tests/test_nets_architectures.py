"""The evaluation networks: published parameter counts, every image size, torchvision's definitions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import nets
from lib.nets.alexnet import AlexNet
from lib.nets.layers import ACTIVATIONS, NORMS, activation, max_pool, norm_layer, resolve_padding
from lib.nets.lenet import LeNet
from lib.nets.mlp import MLP
from lib.nets.resnet import ResNet10, ResNet18, ResNet18AP
from lib.nets.vgg import VGG11
from lib.nets.vit import TransformerBlock, ViT
from lib.system.errors import CompanionError

ARCHITECTURES = [MLP, LeNet, AlexNet, VGG11, ResNet18, ResNet18AP, ViT]
# a small ViT where only the shape of the computation matters
SMALL = {ViT: {"dim": 32, "depth": 2, "heads": 4, "mlp": 32}}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def build(architecture, channels, size, **options):
    return architecture(channels, 10, size, **{**SMALL.get(architecture, {}), **options})


def images(n, channels, size, dtype=torch.float32):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def count(net):
    return sum(p.numel() for p in net.parameters())


def copy_parameters(source, target):
    """Copy tensor by tensor in the order of definition; the shapes have to agree."""
    pairs = list(zip(source.state_dict().values(), target.state_dict().values(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    for a, b in pairs:
        b.copy_(a)


# Parameter counts


@pytest.mark.parametrize(
    "architecture, norm, parameters",
    [
        (MLP, "none", 411_146),
        (LeNet, "none", 62_006),
        (AlexNet, "none", 1_872_202),
        (AlexNet, "batch", 1_874_122),
        (VGG11, "instance", 9_231_114),
        (VGG11, "batch", 9_231_114),
        (ResNet18, "instance", 11_173_962),
        (ResNet18, "batch", 11_173_962),
        (ResNet18AP, "instance", 11_250_762),
        (ResNet18AP, "batch", 11_250_762),
    ],
)
def test_published_parameter_counts(architecture, norm, parameters):
    with torch.device("meta"):
        assert count(architecture(3, 10, 32, norm=norm)) == parameters


def test_vit_parameter_count():
    """Embedding, class token and positions, six blocks, norm and linear layer of the published definition."""
    block = 2 * 2 * 512 + 3 * 512**2 + 3 * (512**2 + 512)
    with torch.device("meta"):
        assert (
            count(ViT(3, 10, 32)) == (48 + 1) * 512 + 66 * 512 + 6 * block + 2 * 512 + 513 * 10 == 9_523_722
        )


@pytest.mark.parametrize(
    "architecture, parameters",
    [
        (MLP, 784 * 128 + 128 + 128 * 129 + 10 * 129),
        (LeNet, 62_006 - 2 * 25 * 6),  # the map is 5x5 again
        (AlexNet, 1_872_202 - 2 * 25 * 128),  # 28 -> 32
        (VGG11, 9_231_114 - 2 * 9 * 64),
        (ResNet18, 11_173_962 - 2 * 9 * 64),
        (ResNet18AP, 11_250_762 - 2 * 9 * 64 - 10 * 512 * (16 - 9)),  # 3x3 is left of 28
    ],
)
def test_mnist_form(architecture, parameters):
    with torch.device("meta"):
        assert count(architecture(1, 10, 28)) == parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_default_padding_is_the_published_one(architecture):
    def shapes(*args, **options):
        with torch.device("meta"):
            return [p.shape for p in build(architecture, *args, **options).parameters()]

    assert shapes(1, 28) == shapes(1, 28, first_padding=3)
    assert shapes(1, 32) == shapes(1, 32, first_padding=1)
    assert shapes(3, 28) == shapes(3, 28, first_padding=1)


@pytest.mark.parametrize("architecture", [LeNet, AlexNet, VGG11])
def test_mnist_padding_equals_zero_padding_to_32(architecture):
    net = architecture(1, 10, 28).eval()
    wide = architecture(1, 10, 32).eval()
    x = images(2, 1, 28)
    with torch.no_grad():
        copy_parameters(net, wide)
        torch.testing.assert_close(net(x), wide(F.pad(x, (2, 2, 2, 2))))


# Every size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_embed_and_gradient_at_every_size(architecture, size, channels):
    net = build(architecture, channels, size).eval()
    x = images(2 if size < 64 else 1, channels, size)
    logits = net(x)
    assert logits.shape == (len(x), 10) and logits.isfinite().all()
    first = next(net.parameters())
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(x))), first)
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-6
    if size <= 32:
        with torch.no_grad():
            embedding = net.embed(x)
            assert embedding.shape == (len(x), net.classifier.in_features)
            torch.testing.assert_close(net.classifier(embedding), logits.detach())
            assert (embedding.std(0) > 0).any(), "two images must not have the same features"


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("architecture", [AlexNet, VGG11, ResNet18, ResNet18AP])
def test_no_norm_sees_a_single_pixel(architecture, size, norm):
    net = architecture(3, 10, size, norm=norm)
    seen = []
    for module in net.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            module.register_forward_hook(lambda _, inputs, __: seen.append(min(inputs[0].shape[2:])))
    with torch.no_grad():
        assert net(images(2, 3, size)).isfinite().all()
    assert all(side >= 2 for side in seen) and bool(seen) == (norm != "none")


@pytest.mark.parametrize(
    "architecture, sides",
    [
        (LeNet, [14, 5]),
        (AlexNet, [16, 8, 8, 8, 4]),
        (VGG11, [16, 8, 4, 2, 1]),
        (ResNet18, [32, 16, 8, 4]),
        (ResNet18AP, [32, 16, 8, 4]),
    ],
)
def test_taps_are_the_maps_of_the_blocks(architecture, sides):
    net = architecture(3, 10, 32).eval()
    x = images(2, 3, 32)
    with torch.no_grad():
        taps = net.taps(x)
        assert [tap.shape[-1] for tap in taps] == sides
        torch.testing.assert_close(net.neck(taps[-1]), net.embed(x))


@pytest.mark.parametrize("architecture, shape", [(MLP, (2, 128)), (ViT, (2, 17, 32))])
def test_taps_without_maps(architecture, shape):
    net = build(architecture, 3, 8).eval()
    with torch.no_grad():
        taps = net.taps(images(2, 3, 8))
    assert [tap.shape for tap in taps] == [shape, shape]


def test_taps_survive_the_rest_of_the_pass():
    """No activation writes into its input: a tap is what the following block reads."""
    net = VGG11(3, 10, 8).eval()
    with torch.no_grad():
        taps = net.taps(images(2, 3, 8))
        for block, before, after in zip(net.blocks[1:], taps, taps[1:], strict=False):
            torch.testing.assert_close(block(before), after)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_of_a_batch_do_not_mix(architecture):
    net = build(architecture, 1, 8).eval()
    x = images(4, 1, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=1e-4, atol=1e-5)


# Agreement with other definitions


@pytest.mark.parametrize(("ours", "blocks"), [(ResNet18, 2), (ResNet10, 1)])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_resnets_are_torchvisions_with_a_small_stem(size, ours, blocks):
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [blocks] * 4, num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    net = ours(3, 10, size, norm="batch")
    x = images(2, 3, size)
    with torch.no_grad():
        copy_parameters(net, reference)
        torch.testing.assert_close(net.train()(x), reference.train()(x), rtol=1e-4, atol=1e-4)


def test_vgg11_is_torchvisions_features():
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.vgg11_bn(num_classes=10).features
    net = VGG11(3, 10, 32, norm="batch")
    x = images(2, 3, 32)
    with torch.no_grad():
        copy_parameters(net.blocks, reference)
        torch.testing.assert_close(
            net.train().embed(x), reference.train()(x).flatten(1), rtol=1e-4, atol=1e-4
        )


def test_average_pooled_block_follows_the_definition():
    """Pool after the first ReLU, and between the 1x1 convolution and the norm of the shortcut."""
    net = ResNet18AP(3, 10, 8)
    block = net.blocks[1][0]
    x = images(2, 64, 8)

    def norm(x):
        return (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    def pool(x):
        return sum(x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4

    with torch.no_grad():
        inner = pool(norm(F.conv2d(x, block.conv1.weight, padding=1)).relu())
        direct = norm(F.conv2d(inner, block.conv2.weight, padding=1))
        shortcut = norm(pool(F.conv2d(x, block.shortcut[0].weight)))
        torch.testing.assert_close(block(x), (direct + shortcut).relu(), rtol=1e-4, atol=1e-5)


def test_transformer_block_is_pytorchs():
    block = TransformerBlock(32, 4, 48, 0.0).double()
    reference = nn.TransformerEncoderLayer(
        32, 4, 48, 0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        reference.self_attn.in_proj_weight.copy_(block.qkv.weight)
        reference.self_attn.in_proj_bias.zero_()
        for ours, theirs in [
            (block.out[0], reference.self_attn.out_proj),
            (block.norm1, reference.norm1),
            (block.norm2, reference.norm2),
            (block.mlp[0], reference.linear1),
            (block.mlp[3], reference.linear2),
        ]:
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                b.copy_(a)
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), reference(x))


def test_vit_sees_patches_only_through_their_positions():
    """Without positions a ViT is invariant under any permutation of its patches; with them it is not."""
    net = build(ViT, 1, 8).double().eval()
    x = images(1, 1, 8, torch.float64)
    swapped = torch.cat([x[..., 4:], x[..., :4]], dim=-1)  # whole patches of 2x2 pixels change places
    with torch.no_grad():
        assert not torch.allclose(net(x), net(swapped))
        net.blocks[0][0].position.weight.zero_()
        torch.testing.assert_close(net(x), net(swapped))


def test_vit_blocks_start_different_and_dropout_acts_only_in_training():
    net = build(ViT, 3, 16)
    assert not torch.equal(net.blocks[0][1].qkv.weight, net.blocks[1].qkv.weight)
    x = images(2, 3, 16)
    with torch.no_grad():
        assert not torch.equal(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))
        net = build(ViT, 3, 16, dropout=0).train()
        assert torch.equal(net(x), net(x))


# What distillation needs of a network


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_of_a_gradient(architecture):
    """The directional derivative of the weight gradient agrees with finite differences, in float64."""
    net = build(architecture, 1, 8).double().eval()
    x = images(2, 1, 8, torch.float64).requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype)
    parameters = [net.classifier.weight, next(net.parameters())]

    def gradient(x, create_graph=False):
        loss = F.cross_entropy(net(x), torch.tensor([0, 1]))
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=create_graph)]
        )

    probe = torch.randn(sum(p.numel() for p in parameters), dtype=x.dtype)
    (second,) = torch.autograd.grad(probe @ gradient(x, create_graph=True), x)
    step = 1e-6
    ahead, behind = gradient(x + step * direction), gradient(x - step * direction)
    torch.testing.assert_close(
        (second * direction).sum(), probe @ (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stacked_networks_equal_single_ones(architecture):
    nets = [build(architecture, 1, 8).eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(nets)
    x = images(3, 1, 8)

    def single(parameters, buffers):
        return torch.func.functional_call(nets[0], (parameters, buffers), (x,))

    with torch.no_grad():
        together = torch.func.vmap(single)(parameters, buffers)
        torch.testing.assert_close(together, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-5)


# Layers


def test_norms_standardise_over_their_axes():
    x = 3 + 2 * images(6, 8, 5, torch.float64)
    groups = {"layer": (6, 1, -1), "instance": (6, 8, -1), "group": (6, 4, -1)}
    for kind, shape in groups.items():
        y = norm_layer(kind, 8).double()(x).reshape(shape)
        torch.testing.assert_close(y.mean(-1), torch.zeros(shape[:2], dtype=y.dtype), atol=1e-9, rtol=0)
        torch.testing.assert_close(
            y.var(-1, correction=0), torch.ones(shape[:2], dtype=y.dtype), atol=1e-4, rtol=0
        )
    y = norm_layer("batch", 8).double().train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8, dtype=y.dtype), atol=1e-9, rtol=0)
    assert norm_layer("none", 8)(x) is x
    assert [count(norm_layer(kind, 8)) for kind in NORMS] == [0, 16, 16, 16, 16]


def test_activations():
    x = torch.linspace(-3, 3, 13)
    expected = {
        "relu": x.clamp(min=0),
        "sigmoid": 1 / (1 + (-x).exp()),
        "leaky": torch.where(x > 0, x, 0.01 * x),
        "swish": x / (1 + (-x).exp()),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for kind, y in expected.items():
        before = x.clone()
        torch.testing.assert_close(activation(kind)(x), y)
        assert torch.equal(x, before)


def test_max_pool_stops_at_the_smallest_map():
    assert [max_pool(size)[1] for size in (32, 7, 4, 3, 2)] == [16, 3, 2, 3, 2]
    assert [max_pool(size, smallest=1)[1] for size in (3, 2, 1)] == [1, 1, 1]
    for size in (7, 4, 3):
        pool, after = max_pool(size)
        assert pool(torch.zeros(1, 1, size, size)).shape[-1] == after


def test_first_padding_defaults():
    assert [resolve_padding(None, *form) for form in ((1, 28), (1, 8), (1, 32), (3, 28))] == [3, 1, 1, 1]
    assert resolve_padding(2, 1, 28) == 2


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: norm_layer("bach", 8), "unknown norm 'bach' (did you mean 'batch'?); allowed: batch, group"),
        (lambda: norm_layer("group", 6), "norm 'group' needs a multiple of 4 channels, not 6"),
        (lambda: activation("gelu"), "unknown activation 'gelu'"),
        (lambda: MLP(3, 10, 8, norm="batch"), "unknown norm of the MLP 'batch'; allowed: none"),
        (lambda: LeNet(3, 10, 8, norm="batch"), "unknown norm of LeNet 'batch'; allowed: none"),
        (lambda: ViT(3, 10, 8, norm="batch"), "unknown norm of the ViT 'batch'; allowed: layer"),
        (lambda: VGG11(3, 10, 8, norm="x"), "unknown norm 'x'; allowed: batch, group, instance, layer, none"),
        (lambda: ViT(3, 10, 30), "ViT: the image side must be a multiple of the patch 4, not 30"),
        (lambda: ViT(3, 10, 32, dim=50), "ViT: dim must be a multiple of the 8 heads, not 50"),
        (lambda: VGG11(3, 10, 32, first_padding=0), "first_padding must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_clear_line(wrong, said):
    with pytest.raises(CompanionError) as caught:
        wrong()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, published",
    [("alexnet", 128), ("vgg11", 64), ("resnet10", 64), ("resnet10ap", 64), ("resnet18", 64), ("resnet18ap", 64)],
)
def test_width_is_that_of_the_first_convolution(name, published):
    """The published width is the default; every convolution scales with it."""
    like = SimpleNamespace(channels=3, num_classes=10, size=32, first_padding=1, device=torch.device("cpu"))
    convolutions = {
        width: [
            m.out_channels for m in nets.make(f"{name}-w{width}", like).modules() if isinstance(m, nn.Conv2d)
        ]
        for width in (8, published)
    }
    assert convolutions[8][0] == 8 and count(nets.make(name, like)) == count(
        nets.make(f"{name}-w{published}", like)
    )
    assert [published * wide for wide in convolutions[8]] == [8 * wide for wide in convolutions[published]]
    assert nets.make(f"{name}-w8", like)(images(2, 3, 32)).shape == (2, 10)
