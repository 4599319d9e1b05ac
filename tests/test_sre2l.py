"""SRe2L, its teacher, its views and what saving does to the pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, killed_after, toy_data

from lib import nets
from lib.augment import views
from lib.distill import distill
from lib.match import batchnorm
from lib.match.batchnorm import Watch
from lib.methods.sre2l import SRe2L
from lib.recover import blocks as recover
from lib.recover import teacher as teachers
from lib.recover.teacher import Teacher
from lib.system.arithmetic import PLAIN, Arithmetic
from lib.system.checkpoint import Checkpoint
from lib.system.errors import CompanionError

QUICK = Teacher("convnet-d2-w4-batch", epochs=2, lr=0.05, batch=32, augmentation="none")
SMALL = SRe2L(iterations=5, lr=0.1, crop=None, flip=False, roll=(-1, 1), storage="float", teacher=QUICK)


# -- views -----------------------------------------------------------------------------------------------------------------


def test_matrices_crop_and_resize_as_torchvision_then_mirror_then_roll():
    from torchvision.transforms.v2 import functional as TF

    x = torch.randn(6, 3, 16, 16, generator=generator(), dtype=torch.float64)
    boxes = views.crop_boxes(torch.full((6,), 0.08), 16, generator(1))
    flips = torch.tensor([True, False] * 3)
    shifts = torch.randint(-3, 4, (6, 2), generator=generator(2))
    ours = views.resample(x, *views.crop_matrices(boxes, flips, 16, shifts, x.dtype))
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        wanted = TF.resized_crop(x[i : i + 1], top, left, height, width, [16, 16], antialias=True)
        wanted = wanted.flip(3) if flips[i] else wanted
        wanted = wanted.roll(tuple(shifts[i].tolist()), (2, 3))
        assert torch.allclose(ours[i : i + 1], wanted, atol=1e-9)


def test_crop_boxes_have_torchvisions_law():
    boxes = views.crop_boxes(torch.full((4000,), 0.08), 64, generator()).double()
    area = boxes[:, 2] * boxes[:, 3] / 64**2
    assert 0.07 < area.min() and area.max() <= 1 and 0.40 < area.mean() < 0.54
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 64).all()
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 0.7 < ratio.min() and ratio.max() < 1.43
    whole = views.crop_boxes(torch.ones(50), 8, generator())  # only the whole image has the whole area
    assert (whole[:, 2:].prod(1) >= 49).all()
    assert torch.equal(views.crop_boxes(torch.full((9,), 0.5), 32, views.keyed("a", 1)),
                       views.crop_boxes(torch.full((9,), 0.5), 32, views.keyed("a", 1)))  # fmt: skip


# -- the objective -----------------------------------------------------------------------------------------------------------


def prepared(method=SMALL, ipc=2, data=None):
    return method.prepare((data or toy_data()).train, ipc, 0)


def test_a_batch_with_the_running_statistics_has_no_distance():
    made = (
        nets.make("resnet18-batch-w4", toy_data(channels=3).train, generator()).eval().requires_grad_(False)
    )
    watch, x = Watch(made), torch.randn(12, 3, 8, 8, generator=generator(1))
    for _ in range(len(watch.layers)):  # a layer's statistics depend on those before it
        for layer, (mean, var) in zip(watch.layers, batchnorm.statistics(watch(x)[0]), strict=True):
            layer.running_mean.copy_(mean[0])
            layer.running_var.copy_(var[0])
    found = batchnorm.statistics(watch(x)[0])
    terms = batchnorm.running_terms(found, batchnorm.running_statistics(made))
    assert terms.max() < 1e-4
    assert (
        batchnorm.running_terms(batchnorm.statistics(watch(2 * x)[0]), batchnorm.running_statistics(made)) > 0
    ).all()
    order = torch.randperm(12, generator=generator(2))
    for (a, b), (c, d) in zip(found, batchnorm.statistics(watch(x[order])[0]), strict=True):
        assert torch.allclose(a, c, atol=1e-5) and torch.allclose(b, d, atol=1e-5)


def test_gradient_to_the_pixels_is_that_of_finite_differences():
    at = prepared()
    at.watch.network.double()
    block = SMALL.blocks(3, 2)[0]
    target = SMALL.block_target(at, block)

    def objective(x):
        terms = SMALL.terms(target, *at.watch(x))
        return terms["ce"] + 0.5 * terms["bn"]

    x = torch.randn(6, 1, 8, 8, generator=generator(3), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x), x)
    for seed in range(3):
        direction = torch.randn(x.shape, generator=generator(seed), dtype=torch.float64)
        with torch.no_grad():
            slope = (objective(x + 1e-6 * direction) - objective(x - 1e-6 * direction)) / 2e-6
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_the_first_layer_counts_ten_times_once():
    layers = torch.tensor([2.0, 3.0, 5.0])
    assert batchnorm.weigh(layers).item() == 10 and batchnorm.weigh(layers, 10.0).item() == 28


def test_groups_have_one_image_of_each_class_and_statistics_of_their_own():
    at = prepared(ipc=4)
    block = SMALL.blocks(3, 4)[0]
    assert len(block) == 12 and len(block.images) == 4
    target = SMALL.block_target(at, block)
    assert target["labels"].tolist() == [0, 1, 2] * 4
    x = torch.randn(12, 1, 8, 8, generator=generator())
    whole = SMALL.terms(target, *at.watch(x))
    alone = []
    for k in range(4):
        part = SMALL.block_target(at, SMALL.blocks(3, 1)[0])
        alone.append(SMALL.terms(part, *at.watch(x[3 * k : 3 * k + 3])))
    for name in ("ce", "bn"):
        assert whole[name].item() == pytest.approx(sum(one[name].item() for one in alone), rel=1e-5)


def test_blocks_divide_the_set():
    method = SRe2L()
    for classes, ipc in ((10, 1), (10, 10), (10, 50), (37, 3), (100, 10), (200, 2), (1000, 10)):
        blocks = method.blocks(classes, ipc)
        assert sorted(row for block in blocks for row in block.rows(ipc)) == list(range(classes * ipc))
        assert {len(block) for block in blocks} == {len(blocks[0])} and len(blocks[0]) <= 100
    assert len(method.blocks(1000, 10)) == 100 and len(method.blocks(1000, 10)[0].classes) == 100
    with pytest.raises(CompanionError, match="101 classes do not divide into groups of 100"):
        method.blocks(101, 1)


# -- recovery ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"block_images": 3}, {"crop": 0.3, "flip": True}])
def test_blocks_alone_are_bit_for_bit_those_of_the_whole(toy, change):
    method = replace(SMALL, **change)
    whole = distill(method, toy.train, 2, seed=4)
    blocks = method.blocks(3, 2)
    assert len(blocks) == (2 if "block_images" in change else 1)
    for block in reversed(blocks):
        pixels = method.recover_block(method.prepare(toy.train, 2, 4), block, 4)
        assert torch.equal(pixels, whole.synset.images[block.rows(2)])
    assert whole.synset.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_are_recovered_for_their_own_class(toy):
    method = replace(SMALL, iterations=80, bn_weight=0.01, teacher=replace(QUICK, epochs=6))
    made = distill(method, toy.train, 3, seed=0).synset
    network = teachers.the_teacher(method.teacher, toy.train)
    assert (network(made.images).argmax(1) == made.labels).all()


def test_curriculum_without_milestone_is_none_and_else_falls(toy):
    plain = replace(SMALL, crop=0.2)
    same = distill(replace(plain, crop_from=0.9, curriculum="linear"), toy.train, 1, seed=0)
    assert torch.equal(same.synset.images, distill(plain, toy.train, 1, seed=0).synset.images)
    part = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    shares = {
        kind: replace(plain, milestone=0.5, curriculum=kind).lowest_share(part)
        for kind in ("cosine", "linear", "step")
    }
    assert shares["cosine"].tolist() == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    assert shares["linear"].tolist() == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    assert shares["step"].tolist() == pytest.approx([1, 1, 0.2, 0.2, 0.2])
    cda = distill(replace(plain, milestone=1.0), toy.train, 1, seed=0)
    assert not torch.equal(cda.synset.images, same.synset.images)


def test_learning_rate_falls_along_a_cosine():
    method = replace(SMALL, iterations=10)
    assert [method.rate(t) for t in (0, 5)] == pytest.approx([0.1, 0.05]) and 0 < method.rate(9) < 0.01


def test_storage_loses_what_it_says(toy):
    at, x = toy.train.transform, toy.train.images[:4].clamp(-1.9, 1.9)
    assert torch.equal(recover.stored_pixels(x, at, "float"), x)
    png, jpeg = (recover.stored_pixels(x, at, kind) for kind in ("png", "jpeg"))
    levels = at.inverse(png) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    gap = at.inverse(x) * 255 - levels
    assert gap.min() > -1e-3 and gap.max() < 1 + 1e-3  # truncated, not rounded
    assert (jpeg - x).abs().mean() > (png - x).abs().mean()
    colour = toy_data(2, channels=3).train
    back = recover.stored_pixels(colour.images[:2], colour.transform, "jpeg")
    assert back.shape == colour.images[:2].shape and back.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"curriculum": "sine"}, "allowed: cosine, linear, step"),
        ({"storage": "bmp"}, "allowed: float, jpeg, png"),
        ({"crop": 0.0}, "crop 0.0 is not allowed"),
        ({"iterations": 0}, "at least 1"),
    ],
)
def test_bad_settings(change, words):
    with pytest.raises(CompanionError) as error:
        SRe2L(**change)
    assert words in str(error.value)


# -- the teacher -------------------------------------------------------------------------------------------------------------


def test_a_teacher_learns_is_frozen_and_is_found_again(toy, monkeypatch):
    recipe = replace(QUICK, network="convnet-d2-w8-batch", epochs=12)
    first = teachers.train_teacher(recipe, toy.train)
    right = (first(toy.test.images).argmax(1) == toy.test.labels).float().mean()
    assert right > 0.9 and not first.training and not any(p.requires_grad for p in first.parameters())
    monkeypatch.setattr(teachers, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = teachers.train_teacher(recipe, toy.train)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(pytest.fail.Exception):
        teachers.train_teacher(replace(recipe, seed=1), toy.train)


@pytest.mark.parametrize("augmentation", ["resized", "crop_flip"])
def test_augmented_training_is_repeatable(toy, augmentation):
    recipe = replace(QUICK, augmentation=augmentation)
    x = toy.train.images[:7]
    whole, rows = [torch.arange(7)], slice(None)
    (a, _), (b, _) = (
        next(iter(teachers.shown(toy.train, recipe, whole, range(1), rows, 0.5, generator(3))))
        for _ in range(2)
    )
    assert torch.equal(a, b) and a.shape == x.shape and not torch.equal(a, x)
    assert teachers.train_teacher(recipe, toy.train)(x).isfinite().all()


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("augmentation", ["none", "resized", "crop_flip"])
def test_an_interrupted_teacher_ends_with_the_same_bits(toy, tmp_path, augmentation, step):
    recipe = replace(QUICK, augmentation=augmentation, epochs=3, batch=25)

    def train(checkpoint=None):
        g = generator(4)
        network = teachers.drawn(recipe.network, toy.train, g)
        teachers.fit(network, recipe, toy.train, g, checkpoint=checkpoint)
        return network.state_dict()

    whole = train()
    with killed_after(step):
        train(Checkpoint(tmp_path / "training", "key"))
    assert (tmp_path / "training").is_file()
    found = train(Checkpoint(tmp_path / "training", "key"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_damaged_checkpoint_is_no_checkpoint(toy, tmp_path):
    recipe, path = replace(QUICK, epochs=1), tmp_path / "training"
    path.write_bytes(b"not a checkpoint")
    g = generator(4)
    network = teachers.drawn(recipe.network, toy.train, g)
    teachers.fit(network, recipe, toy.train, g, checkpoint=Checkpoint(path, "key"))
    assert next(network.parameters()).isfinite().all()


def test_torchvisions_networks_begin_as_torchvision_begins():
    """The law of its constructor, from an explicit generator: convolutions normal by fan-out, other networks as their papers say."""
    like = toy_data(3, channels=3, size=32).train
    state = torch.get_rng_state()
    network = teachers.drawn("torchvision-resnet18", like, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    weight = network.layer1[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    again, other = (teachers.drawn("torchvision-resnet18", like, generator(k)) for k in (1, 2))
    assert torch.equal(again.layer1[0].conv1.weight, weight)
    assert not torch.equal(other.layer1[0].conv1.weight, weight)
    mobile = teachers.drawn("torchvision-mobilenet_v3_small", like, generator(1))
    assert mobile.classifier[-1].weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_small_vision_transformers():
    """Parameters of DeiT-Ti and DeiT-S at 224 pixels with 1000 classes: 5.7 and 22.1 million (arXiv 2012.12877, table 1)."""
    from types import SimpleNamespace

    like = SimpleNamespace(channels=3, num_classes=1000, size=224, first_padding=1, device="meta")
    for kind, millions in (("ti", 5.717), ("s", 22.051)):
        network = teachers.make_teacher(f"torchvision-vit_{kind}_16", like)
        count = sum(p.numel() for p in network.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.001)
    small = toy_data(3, channels=3, size=32).train
    assert teachers.drawn("torchvision-vit_ti_8", small, generator())(torch.zeros(2, 3, 32, 32)).shape == (
        2,
        3,
    )
    with pytest.raises(CompanionError, match="side must be a multiple of 5, not 32"):
        teachers.make_teacher("torchvision-vit_ti_5", small)
    with pytest.raises(CompanionError, match="unknown torchvision network 'torchvision-inception_v3'"):
        teachers.make_teacher("torchvision-inception_v3", small)


def test_a_teacher_in_16_bits_is_close(toy):
    data = toy_data(3, channels=3, size=32).train
    network = teachers.frozen(teachers.drawn("torchvision-resnet18", data, generator()))
    x = data.images[:8].clone().requires_grad_()
    found = {}
    for arithmetic in (PLAIN, Arithmetic("bfloat16", True)):
        with Watch(network, arithmetic) as watch:
            inputs, features, logits = watch(x)
        assert {t.dtype for t in (*inputs, features, logits)} == {torch.float32}
        (gradient,) = torch.autograd.grad(logits.sum() + features.square().sum(), x)
        found[arithmetic] = [*inputs, features, logits, gradient]
    with torch.no_grad():
        pairs = list(zip(found[PLAIN], found[Arithmetic("bfloat16", True)], strict=True))
        gaps = [float((a - b).norm() / a.norm()) for a, b in pairs[:-1]]
        a, b = pairs[-1]
    assert 0 < max(gaps) < 0.05 and F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.95


def test_stems_of_torchvisions_networks():
    like = toy_data(3, channels=3, size=32).train
    tiny = teachers.make_teacher("torchvision-resnet18-tiny", like)
    assert tiny.conv1.stride == (2, 2) and tiny.conv1.padding == (3, 3) and tiny.conv1.kernel_size == (3, 3)
    assert teachers.make_teacher("torchvision-resnet18", like)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    inputs, features, _ = Watch(tiny.eval())(torch.zeros(2, 3, 32, 32))
    assert len(inputs) == 20 and features.shape == (2, 512)
    with pytest.raises(CompanionError, match="unknown torchvision network"):
        teachers.make_teacher("torchvision-resnet19", like)
    with pytest.raises(CompanionError, match="takes 3 channels"):
        teachers.make_teacher("torchvision-resnet18", toy_data().train)


def test_pretrained_weights_need_the_classes_in_their_order():
    from torchvision import models

    names = ("tench", "goldfish", "great white shark")
    state = models.resnet18(num_classes=3).state_dict()
    network = teachers.pretrained("resnet18", names, state, names)
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3) and not network.training
    with pytest.raises(CompanionError, match="class 0 is 'tench' there, 'goldfish' in the data"):
        teachers.pretrained("resnet18", ("goldfish", "tench", "great white shark"), state, names)
    with pytest.raises(CompanionError, match="has 3 classes, the data 2"):
        teachers.pretrained("resnet18", names[:2], state, names)
    synsets = ("n01440764", "n01443537", "n01484850")
    teachers.pretrained("resnet18", synsets, state, names)  # folders: ascending, as torchvision counts them
    with pytest.raises(CompanionError, match="class 1 is 'n01443537' there, 'n01484850' in the data"):
        teachers.pretrained("resnet18", (synsets[0], synsets[2], synsets[1]), state, names)
    with pytest.raises(CompanionError, match="has 1000 classes, the data 3"):
        teachers.pretrained("resnet18", names)  # refused before anything is downloaded
    with pytest.raises(CompanionError, match="no ImageNet-1K weights of 'resnet19'"):
        teachers.pretrained("resnet19", names)


def test_a_saved_teacher_fits_its_own_data_only(toy, tmp_path):
    network = teachers.train_teacher(QUICK, toy.train)
    path = teachers.save_teacher(network, tmp_path / "teacher.safetensors", QUICK.network, toy.train.classes)
    back = teachers.load_teacher(path, QUICK.network, toy.train)
    assert torch.equal(back(toy.test.images), network(toy.test.images)) and not back.training
    same = teachers.the_teacher(replace(QUICK, weights=str(path)), toy.train)
    assert torch.equal(same(toy.test.images), network(toy.test.images))
    swapped = replace(toy.train, classes=("class 1", "class 0", "class 2"))
    with pytest.raises(CompanionError, match="class 0 is 'class 0' there, 'class 1' in the data"):
        teachers.load_teacher(path, QUICK.network, swapped)
    with pytest.raises(CompanionError, match="has 3 classes, the data 4"):
        teachers.load_teacher(path, QUICK.network, toy_data(4).train)
    with pytest.raises(CompanionError, match="holds a convnet-d2-w4-batch"):
        teachers.load_teacher(path, "convnet-d2-w8-batch", toy.train)
    with pytest.raises(CompanionError, match="no file"):
        teachers.load_teacher(tmp_path / "other.safetensors", QUICK.network, toy.train)
    made = distill(SMALL, toy.train, 1).synset.save(tmp_path / "set.safetensors")
    with pytest.raises(CompanionError, match="is no teacher"):
        teachers.load_teacher(made, QUICK.network, toy.train)


def test_a_loss_is_the_cross_entropy_of_the_view(toy):
    """What a step logs is the objective before the step, on the view that its numbers say."""
    method = replace(SMALL, roll=(2, 2))
    at = prepared(method, 1, toy)
    state = method.start(at, method.blocks(3, 1), 0)
    x = state.pixels[0].detach().clone().roll((2, 2), (2, 3))
    wanted = F.cross_entropy(at.watch.network(x), torch.arange(3))
    assert method.step(state)["ce"].item() == pytest.approx(wanted.item(), rel=1e-5)
