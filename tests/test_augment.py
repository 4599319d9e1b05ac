"""Differentiable siamese augmentation: every operation against its definition, and the laws of its parameters."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import generator

from lib import augment
from lib.augment import FAMILIES, MODES, Draw
from lib.system.errors import CompanionError

ALL = ("color", "crop", "cutout", "flip", "scale", "rotate")


def images(n=6, channels=3, size=8, seed=0, dtype=torch.float64):
    return torch.randn(n, channels, size, size, generator=generator(seed), dtype=torch.float64).to(dtype)


def full(x, value):
    return torch.full((len(x),), value, dtype=x.dtype)


# -- every operation against its definition -----------------------------------------------------------------------------


def test_identity_parameters():
    x = images()
    half, zero, one = full(x, 0.5), full(x, 0), full(x, 1)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(augment.brightness(x, half), x, **close)
    torch.testing.assert_close(augment.saturation(x, half), x, **close)
    torch.testing.assert_close(augment.contrast(x, half), x, **close)
    assert torch.equal(augment.crop(x, zero.long(), zero.long()), x)
    assert torch.equal(augment.flip(x, half), x)  # 0.5 exactly is not flipped
    torch.testing.assert_close(augment.scale(x, one, one), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(augment.rotate(x, zero), x, rtol=0, atol=1e-6)


def test_color_definitions_by_hand():
    x = images(3)
    u = torch.tensor([0.0, 0.3, 0.9], dtype=x.dtype)
    for i in range(3):
        v, image = u[i], x[i]
        torch.testing.assert_close(augment.brightness(x, u)[i], image + v - 0.5)
        grey = image.mean(0, keepdim=True)
        torch.testing.assert_close(augment.saturation(x, u)[i], (image - grey) * 2 * v + grey)
        torch.testing.assert_close(
            augment.contrast(x, u)[i], (image - image.mean()) * (v + 0.5) + image.mean()
        )


def test_means_that_color_keeps():
    x, u = images(), torch.rand(6, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(augment.contrast(x, u).mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(augment.saturation(x, u).mean(1), x.mean(1))
    torch.testing.assert_close(augment.brightness(x, u).std((1, 2, 3)), x.std((1, 2, 3)))
    grey = images(channels=1)
    torch.testing.assert_close(augment.saturation(grey, u), grey)


@pytest.mark.parametrize("size", [8, 9])
def test_crop_by_loops(size):
    x = images(5, size=size)
    rows, cols = torch.tensor([0, 1, -1, 2, -3]), torch.tensor([0, -1, 2, 0, 3])
    got = augment.crop(x, rows, cols)
    for i in range(5):
        for r in range(size):
            for q in range(size):
                a, b = r + int(rows[i]), q + int(cols[i])
                want = x[i, :, a, b] if 0 <= a < size and 0 <= b < size else torch.zeros(3).double()
                assert torch.equal(got[i, :, r, q], want)


@pytest.mark.parametrize("box", [3, 4])
def test_cutout_by_loops(box):
    """The published clipping: a box beyond the border still takes the border row or column."""
    x = images(9) + 10
    centers = torch.arange(9)
    got = augment.cutout(x, centers, centers.flip(0), box)
    for i in range(9):
        rows, cols = (
            sorted({min(max(o - box // 2 + j, 0), 7) for j in range(box)})
            for o in (int(centers[i]), 8 - int(centers[i]))
        )
        want = x[i].clone()
        for r in rows:
            for c in cols:
                want[:, r, c] = 0
        assert torch.equal(got[i], want)


def by_bilinear_sampling(image, theta):
    """The warp written out: pixel centres, grid times theta, bilinear, zero outside (``align_corners=False``)."""
    _, h, w = image.shape
    out = torch.zeros_like(image)
    for r in range(h):
        for q in range(w):
            X, Y = (2 * q + 1) / w - 1, (2 * r + 1) / h - 1
            px = ((theta[0][0] * X + theta[0][1] * Y + 1) * w - 1) / 2
            py = ((theta[1][0] * X + theta[1][1] * Y + 1) * h - 1) / 2
            for dy in (0, 1):
                for dx in (0, 1):
                    a, b = math.floor(py) + dy, math.floor(px) + dx
                    weight = (1 - abs(py - a)) * (1 - abs(px - b))
                    if 0 <= a < h and 0 <= b < w:
                        out[:, r, q] += weight * image[:, a, b]
    return out


def test_warps_by_hand():
    x = images(2)
    sx, sy, phi = (torch.tensor(v).double() for v in ([0.85, 1.2], [1.13, 0.9], [0.2, -0.11]))
    scaled, rotated = augment.scale(x, sx, sy), augment.rotate(x, phi)
    for i in range(2):
        want = by_bilinear_sampling(x[i], [[float(sx[i]), 0], [0, float(sy[i])]])
        torch.testing.assert_close(scaled[i], want, rtol=0, atol=1e-9)
        c, s = math.cos(phi[i]), math.sin(phi[i])
        torch.testing.assert_close(
            rotated[i], by_bilinear_sampling(x[i], [[c, -s], [s, c]]), rtol=0, atol=1e-9
        )


def test_scale_borders():
    x = torch.ones(1, 1, 16, 16).double()
    out = augment.scale(x, full(x, 1.2), full(x, 1.2))  # content shrinks
    assert (out[..., 0, :] == 0).all() and (out[..., -1, :] == 0).all() and (out[..., 0] == 0).all()
    inner = augment.scale(x, full(x, 1 / 1.2), full(x, 1 / 1.2))
    torch.testing.assert_close(inner, x)


def test_rotate_back_and_forth():
    line = torch.linspace(-1, 1, 32).double()
    smooth = torch.exp(-2 * ((line[:, None] - 0.1) ** 2 + (line + 0.2) ** 2))[None, None]
    phi = full(smooth, math.radians(15))
    back = augment.rotate(augment.rotate(smooth, phi), -phi)
    centre = (..., slice(8, 24), slice(8, 24))
    assert (back - smooth)[centre].abs().max() < 0.01
    assert (augment.rotate(smooth, phi) - smooth)[centre].abs().max() > 0.05


def test_flip_twice():
    x, zero = images(), torch.zeros(6).double()
    assert torch.equal(augment.flip(x, zero), x.flip(-1))
    assert torch.equal(augment.flip(augment.flip(x, zero), zero), x)


# -- laws of the parameters ---------------------------------------------------------------------------------------------


def spread(n, columns=3):
    """n evenly spread numbers in [0, 1), in every column."""
    return ((torch.arange(n).double() + 0.5) / n)[:, None].expand(n, columns)


@pytest.mark.parametrize("size, reach", [(8, 1), (28, 4), (32, 4), (64, 8)])
def test_crop_reaches_an_eighth_evenly(size, reach, monkeypatch):
    seen = {}
    monkeypatch.setattr(augment, "crop", lambda x, rows, cols: seen.update(rows=rows, cols=cols) or x)
    options = 2 * reach + 1
    FAMILIES["crop"](torch.zeros(10 * options, 1, size, size), spread(10 * options))
    for axis in ("rows", "cols"):
        values, counts = seen[axis].unique(return_counts=True)
        assert values.tolist() == list(range(-reach, reach + 1)) and (counts == 10).all()


@pytest.mark.parametrize("size, box, last", [(8, 4, 8), (28, 14, 28), (32, 16, 32), (10, 5, 9), (64, 32, 64)])
def test_cutout_box_and_centres(size, box, last, monkeypatch):
    seen = {}
    monkeypatch.setattr(augment, "cutout", lambda x, a, b, k: seen.update(a=a, b=b, k=k) or x)
    n = 10 * (last + 1)
    FAMILIES["cutout"](torch.zeros(n, 1, size, size), spread(n))
    assert seen["k"] == box
    for axis in "ab":
        values, counts = seen[axis].unique(return_counts=True)
        assert values.tolist() == list(range(last + 1)) and (counts == 10).all()


def test_scale_and_rotation_ranges(monkeypatch):
    seen = {}
    monkeypatch.setattr(augment, "scale", lambda x, sx, sy: seen.update(sx=sx, sy=sy) or x)
    monkeypatch.setattr(augment, "rotate", lambda x, radians: seen.update(phi=radians) or x)
    u = torch.stack([spread(1000, 1)[:, 0], spread(1000, 1)[:, 0].flip(0), torch.zeros(1000).double()], 1)
    FAMILIES["scale"](torch.zeros(1000, 1, 8, 8).double(), u)
    FAMILIES["rotate"](torch.zeros(1000, 1, 8, 8).double(), u)
    for factor in (seen["sx"], seen["sy"]):
        assert 1 / 1.2 <= factor.min() < 1 / 1.2 + 1e-3 and 1.2 - 1e-3 < factor.max() < 1.2
    assert torch.equal(seen["sx"], seen["sy"].flip(0))  # independent numbers on the two axes
    limit = math.radians(15)
    assert -limit <= seen["phi"].min() < -limit + 1e-3 and limit - 1e-3 < seen["phi"].max() < limit
    assert abs(seen["phi"].mean()) < 1e-9


def test_half_of_the_rows_flip():
    x = images(100)
    flipped = (FAMILIES["flip"](x, spread(100)) != x).flatten(1).any(1)
    assert flipped.sum() == 50 and flipped[:50].all()


# -- drawing ------------------------------------------------------------------------------------------------------------


def test_draw_is_one_family_per_group_and_repeats_with_its_generator():
    omega = augment.draw(ALL, 500, generator(3), rows=4)
    assert omega.choice.shape == (2000,) and omega.u.shape == (2000, 1, 3)
    assert (omega.choice.view(500, 4) == omega.choice.view(500, 4)[:, :1]).all()
    counts = torch.bincount(omega.choice[::4], minlength=6)
    assert (counts - 500 / 6).abs().max() < 4 * math.sqrt(500 * 5 / 36)
    assert 0 <= omega.u.min() and omega.u.max() < 1 and omega.u.unique().numel() > 5900
    again = augment.draw(ALL, 500, generator(3), rows=4)
    assert torch.equal(omega.choice, again.choice) and torch.equal(omega.u, again.u)


def test_draw_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    augment.apply(images(), augment.draw(ALL, 6, generator(0)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode, slots", [("single", 1), ("multiple", 6), ("idc", 6)])
def test_shape_of_a_draw(mode, slots):
    omega = augment.draw(ALL, 2, generator(), rows=3, mode=mode)
    assert omega.u.shape == (6, slots, 3)
    assert (omega.choice is None) == (mode == "multiple")


# -- applying -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, size", [(3, 8), (1, 9), (3, 16)])
def test_sorted_by_family_equals_every_family_on_every_row(channels, size):
    x = images(64, channels, size)
    u = torch.rand(64, 3, generator=generator(1)).double()
    choice = torch.randint(6, (64,), generator=generator(2))
    dense = augment._dense(ALL, x, choice, u)
    torch.testing.assert_close(augment._by_family(ALL, x, choice, u), dense, rtol=0, atol=1e-12)
    one_by_one = [FAMILIES[ALL[choice[i]]](x[i : i + 1], u[i : i + 1]) for i in range(64)]
    torch.testing.assert_close(torch.cat(one_by_one), dense, rtol=0, atol=1e-12)
    for c in range(6):  # all rows of one family take a path of their own
        same = torch.full((64,), c)
        torch.testing.assert_close(
            augment._by_family(ALL, x, same, u), augment._dense(ALL, x, same, u), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("mode", MODES)
def test_siamese_images_share_everything(mode):
    """A(concat(a, b)) = concat(A(a), A(b)), and equal images stay equal."""
    omega = augment.draw(ALL, 4, generator(5), mode=mode)
    a, b = images(4 * 3, seed=1), images(4 * 2, seed=2)
    joint = torch.cat([a.view(4, 3, 3, 8, 8), b.view(4, 2, 3, 8, 8)], 1)
    out = augment.apply(joint.flatten(0, 1), omega.repeat(5)).view(joint.shape)
    torch.testing.assert_close(out[:, :3].flatten(0, 1), augment.apply(a, omega.repeat(3)))
    torch.testing.assert_close(out[:, 3:].flatten(0, 1), augment.apply(b, omega.repeat(2)))
    same = images(1).expand(20, -1, -1, -1)
    out = augment.apply(same, omega.repeat(5)).view(4, 5, -1)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


@pytest.mark.parametrize("family", [f for f in ALL if f != "flip"])
def test_rows_of_a_training_batch_have_own_parameters(family):
    same = images(1).expand(8, -1, -1, -1)
    out = augment.apply(same, augment.draw((family,), 1, generator(1), rows=8)).flatten(1)
    assert len(out.unique(dim=0)) > 1


def test_multiple_applies_all_in_the_listed_order():
    x, names = images(), ("scale", "color", "crop")
    omega = augment.draw(names, 6, generator(2), mode="multiple")
    want = x
    for i, name in enumerate(names):
        want = FAMILIES[name](want, omega.u[:, i].double())
    torch.testing.assert_close(augment.apply(x, omega), want)
    turned = Draw(names[::-1], None, omega.u.flip(1), "multiple")
    assert not torch.allclose(augment.apply(x, turned), want)


def test_idc_mode_is_flip_color_one_of_three_and_cutout():
    x = images(30)
    omega = augment.draw(ALL, 30, generator(2), mode="idc")
    assert augment.alternatives(ALL, "idc") == ("crop", "scale", "rotate")
    assert set(omega.choice.tolist()) == {0, 1, 2}
    u = {name: omega.u[:, i].double() for i, name in enumerate(ALL)}
    want = FAMILIES["color"](FAMILIES["flip"](x, u["flip"]), u["color"])
    for i in range(30):
        name = ("crop", "scale", "rotate")[omega.choice[i]]
        want[i] = FAMILIES[name](want[i : i + 1], u["crop"][i : i + 1])[0]
    torch.testing.assert_close(augment.apply(x, omega), FAMILIES["cutout"](want, u["cutout"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", [(), ("flip",), ("crop",), ("color", "cutout")])
def test_short_strategies_work_in_every_mode(mode, names):
    x = images()
    out = augment.apply(x, augment.draw(names, 6, generator(1), mode=mode))
    assert out.shape == x.shape and out.isfinite().all()
    assert bool(torch.equal(out, x)) == (not names) or names == ("flip",)


# -- derivatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_gradient_by_finite_differences(family):
    x = images(2, size=5).requires_grad_()
    u = torch.rand(2, 3, generator=generator(4)).double()
    assert torch.autograd.gradcheck(lambda x: FAMILIES[family](x, u), x)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_a_whole_strategy(mode):
    x = images(3, size=5).requires_grad_()
    omega = augment.draw(ALL, 3, generator(4), mode=mode)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, omega), x)


def test_what_leaves_the_picture_has_no_gradient():
    x = images(1, size=8).requires_grad_()
    two = torch.tensor([2])
    (g,) = torch.autograd.grad(augment.crop(x, two, torch.tensor([0])).sum(), x)
    assert (g[:, :, :2] == 0).all() and (g[:, :, 2:] == 1).all()
    (g,) = torch.autograd.grad(augment.cutout(x, torch.tensor([3]), torch.tensor([4]), 4).sum(), x)
    assert (g[:, :, 1:5, 2:6] == 0).all() and g.sum() == 3 * (64 - 16)


# -- CutMix -------------------------------------------------------------------------------------------------------------


def test_cutmix_keeps_the_share_it_says():
    x = torch.arange(40 * 5).double().view(40, 5, 1, 1, 1).expand(40, 5, 2, 12, 12)
    partner = torch.stack([torch.randperm(5, generator=generator(k)) for k in range(40)])
    mixed, share = augment.cutmix(x, partner, torch.rand(40, 3, generator=generator(9)).double())
    assert share.min() < 0.4 and share.max() > 0.9
    for k in range(40):
        for i in range(5):
            own, other = x[k, i], x[k, partner[k, i]]
            if partner[k, i] == i:
                assert torch.equal(mixed[k, i], own)
                continue
            kept = mixed[k, i] == own
            assert (kept | (mixed[k, i] == other)).all()
            assert kept.double().mean() == pytest.approx(float(share[k]))
            box = (~kept[0]).nonzero()
            if len(box):  # the pasted pixels fill a rectangle
                h, w = (box.amax(0) - box.amin(0) + 1).tolist()
                assert h * w == len(box)


def test_cutmix_extremes():
    x = images(3).view(1, 3, 3, 8, 8)
    partner = torch.tensor([[1, 2, 0]])
    _, share = augment.cutmix(x, partner, torch.tensor([[0.999999, 0.5, 0.5]]).double())
    assert share == 1  # lambda = 1: nothing is pasted
    mixed, share = augment.cutmix(x, partner, torch.tensor([[0.0, 0.5, 0.5]]).double())
    assert share == 0 and torch.equal(mixed[0], x[0, partner[0]])


# -- mistakes -----------------------------------------------------------------------------------------------------------


def test_strategy_strings():
    assert augment.strategy("color_crop") == ("color", "crop")
    assert augment.strategy("none") == augment.strategy("") == ()


def test_mistakes_are_one_line():
    with pytest.raises(CompanionError, match="'colour'.*did you mean 'color'.*allowed:.*rotate") as caught:
        augment.strategy("crop_colour")
    assert "\n" not in str(caught.value)
    with pytest.raises(CompanionError, match="mode 'both'.*allowed: idc, multiple, single"):
        augment.draw(ALL, 2, generator(), mode="both")
