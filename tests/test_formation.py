"""Formations: what they compute, that they are linear, what they store, and that every method that learns pixels takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, toy_data
from test_distill import interrupted, same

from lib.data.whitening import ZCA, Standardise
from lib.distill import distill
from lib.formation import CYCLES, PLANES, ChannelMix, MultiFormation, Pixels, bounded, decode_by_class
from lib.formation.mosaic import Mosaic
from lib.formation.start import initial_codes
from lib.methods import dc
from lib.methods.datadam import DataDAM
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.dsa import DSA
from lib.methods.idc import IDC
from lib.methods.m3d import M3D
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError

SHIFTED = MultiFormation(2, shifts=(0, 1, 2))
PADDED = MultiFormation(3, pad=True)
UNEVEN = Standardise(torch.tensor([0.2, 0.5, 0.6]), torch.tensor([0.25, 0.3, 0.1]))
ALL = {
    "multi-formation 2": MultiFormation(2),
    "multi-formation 4": MultiFormation(4),
    "factors 1 and 2": MultiFormation(2, kind="multi"),
    "padded": PADDED,
    "shifted tiles": SHIFTED,
    "planes": ChannelMix(),
    "cycles": ChannelMix(CYCLES),
    "mosaic": Mosaic(2),
}
formations = pytest.mark.parametrize("formation", ALL.values(), ids=ALL)


@pytest.fixture(scope="module")
def colour():
    data = toy_data(channels=3)
    return replace(data, train=replace(data.train, transform=UNEVEN))


def pixels(m=3, c=3, h=8, w=8, seed=0, dtype=torch.float64):
    return torch.rand(m, c, h, w, generator=generator(seed), dtype=dtype)


def parts(formation, images):
    """The images of every formation, ``(k, m, c, h, w)``."""
    return formation(images).unflatten(0, (formation.multiplicity, len(images)))


# -- all ----------------------------------------------------------------------------------------------------------------


@formations
def test_shape_and_order(formation):
    """Formation-major: image j of formation i comes of code j; labels follow."""
    x, labels = pixels(), torch.tensor([4, 2, 7])
    formed = formation(x)
    assert formed.shape == (3 * formation.multiplicity, 3, 8, 8)
    for j in range(3):
        torch.testing.assert_close(parts(formation, x)[:, j], formation(x[j : j + 1]), rtol=0, atol=1e-15)
    assert formation.labels(labels).tolist() == [4, 2, 7] * formation.multiplicity
    soft = formation.labels(torch.rand(3, 10, generator=generator()))
    assert soft.shape == (3 * formation.multiplicity, 10) and torch.equal(soft[:3], soft[-3:])


@formations
def test_affine_and_adjoint(formation):
    """f(x) - f(0) is linear, and backward is its adjoint."""
    x, y, zero = pixels().requires_grad_(), pixels(seed=1), torch.zeros(3, 3, 8, 8, dtype=torch.float64)
    constant = formation(zero)
    assert (constant.abs().max() > 0) == (formation == PADDED)
    torch.testing.assert_close(
        formation(2 * x + 3 * y) - constant, 2 * (formation(x) - constant) + 3 * (formation(y) - constant)
    )
    v = torch.randn(constant.shape, generator=generator(2), dtype=torch.float64)
    adjoint = torch.autograd.grad(formation(x), x, v)[0]
    torch.testing.assert_close(((formation(x) - constant) * v).sum(), (x * adjoint).sum())
    assert (adjoint != 0).all()  # every stored number matters


@formations
def test_classes_together_are_classes_one_by_one(formation):
    stored = pixels(6).unflatten(0, (2, 3))
    want = torch.stack([formation(part) for part in stored])
    torch.testing.assert_close(decode_by_class(formation, stored), want, rtol=0, atol=1e-15)


@formations
@pytest.mark.parametrize(
    "transform", [UNEVEN, Standardise(torch.zeros(3), torch.ones(3))], ids=["uneven", "none"]
)
def test_on_normalised_codes_it_is_the_same_formation(formation, transform):
    """Normalise after forming: per-channel statistics differ, and padding has a colour."""
    x = pixels(dtype=torch.float32)
    bound = formation.on(transform)
    want = transform.forward(formation(x))
    torch.testing.assert_close(bound(transform.forward(x)), want, rtol=1e-5, atol=1e-5)
    assert bound.on(transform) == bound
    torch.testing.assert_close(
        bound.pack(transform.forward(torch.stack([x] * formation.multiplicity))),
        transform.forward(formation.pack(torch.stack([x] * formation.multiplicity))),
        rtol=1e-5,
        atol=1e-5,
    )


@formations
def test_save_and_load(formation, tmp_path):
    codes = pixels(6, dtype=torch.float32)
    synset = SyntheticSet(codes, class_major(3, 2, "cpu"), ("a", "b", "c"), UNEVEN, formation.on(UNEVEN))
    back = SyntheticSet.load(synset.save(tmp_path / "set.safetensors"))
    assert back.decoder == synset.decoder and hash(back.decoder) == hash(synset.decoder)
    assert torch.equal(back.images, synset.images) and torch.equal(back.targets, synset.targets)


@formations
def test_what_is_stored_is_what_is_counted(formation):
    codes = pixels(30, dtype=torch.float32)
    synset = SyntheticSet(codes, class_major(3, 10, "cpu"), ("a", "b", "c"), UNEVEN, formation)
    plain = replace(synset, decoder=Pixels())
    assert synset.bytes_images == plain.bytes_images == 30 * 3 * 64 * 4 and synset.ipc == plain.ipc == 10
    assert len(synset.images) == len(synset.targets) == 30 * formation.multiplicity


def test_learned_mixtures_count_36_numbers():
    synset = SyntheticSet(pixels(), class_major(3, 1, "cpu"), ("a", "b", "c"), UNEVEN, ChannelMix(CYCLES))
    learned = replace(synset, decoder=ChannelMix(CYCLES, learned=True))
    assert learned.bytes_images == synset.bytes_images + 36 * 4


def test_ten_stored_images_of_a_class_are_40_or_90():
    codes, labels = pixels(10, h=12, w=12), class_major(1, 10, "cpu")
    for factor, count in ((2, 40), (3, 90)):
        synset = SyntheticSet(codes, labels, ("a",), UNEVEN, MultiFormation(factor))
        assert len(synset.images) == count and synset.ipc == 10


# -- multi-formation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "h", "w"), [(2, 8, 8), (3, 12, 6), (2, 5, 7), (3, 10, 8)])
def test_multi_formation_is_crop_and_enlarge(factor, h, w):
    x = pixels(2, h=h, w=w)
    tall, wide = -(-h // factor), -(-w // factor)
    canvas = torch.full((2, 3, factor * tall, factor * wide), 0.5, dtype=torch.float64)
    canvas[..., :h, :w] = x
    got = parts(MultiFormation(factor, pad=True), x)
    for i in range(factor):
        for j in range(factor):
            tile = canvas[..., i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
            want = F.interpolate(tile, size=(h, w), mode="bilinear", align_corners=False)
            torch.testing.assert_close(got[factor * i + j], want)


def test_factor_one_is_pixels():
    x = pixels()
    assert torch.equal(MultiFormation(1)(x), x) and torch.equal(MultiFormation(1, kind="multi")(x), x)
    assert MultiFormation(1).multiplicity == 1 and torch.equal(MultiFormation(1).pack(x[None]), x)


def test_multi_formation_is_a_mosaic_read_by_rows():
    x = pixels()
    rows, columns = (parts(f, x) for f in (MultiFormation(2), Mosaic(2)))
    torch.testing.assert_close(rows, columns[[0, 2, 1, 3]])


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_enlarging_keeps_the_range_and_constants(factor):
    x = pixels(h=12, w=12)
    formed = MultiFormation(factor)(x)
    assert formed.min() >= x.min() - 1e-12 and formed.max() <= x.max() + 1e-12
    torch.testing.assert_close(MultiFormation(factor)(torch.full_like(x, 0.3)), torch.full_like(formed, 0.3))
    padded = MultiFormation(5, pad=True)(torch.full((1, 3, 12, 12), 0.5))
    torch.testing.assert_close(padded, torch.full((25, 3, 12, 12), 0.5))


def test_several_factors_are_their_concatenation():
    x = pixels(h=12, w=12)
    want = torch.cat([MultiFormation(f)(x) for f in (1, 2, 3)])
    multi = MultiFormation(3, kind="multi")
    assert multi.multiplicity == 14 and torch.equal(multi(x), want)


@pytest.mark.parametrize(("factor", "side"), [(2, 8), (2, 9), (3, 8), (3, 10), (4, 11)])
def test_packed_tiles_are_pixels_of_their_image(factor, side):
    sources = pixels(factor**2 * 2, h=side, w=side).unflatten(0, (factor**2, 2))
    packed = MultiFormation(factor).pack(sources)
    assert packed.shape == sources.shape[1:]
    edges = [sum((side + factor - 1 - i) // factor for i in range(n)) for n in range(factor + 1)]
    assert edges[-1] == side and edges[1] == -(-side // factor)  # the first ones are the larger ones
    for k in range(factor**2):
        i, j = divmod(k, factor)
        tile = packed[..., edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
        rows, columns = (torch.arange(n) * side // n for n in tile.shape[-2:])
        assert torch.equal(tile, sources[k][..., rows[:, None], columns])


@pytest.mark.parametrize(
    ("factor", "count", "most"), [(2, 20, 128), (3, 20, 128), (3, 50, 128), (3, 10, 128), (2, 200, 128)]
)
def test_bounded_decodes_as_many_as_fit(factor, count, most):
    found = bounded(factor, count, most)
    assert sum(n for _, n in found) == count and [f for f, _ in found] == sorted(
        {f for f, _ in found}, reverse=True
    )
    total = sum(f * f * n for f, n in found)
    assert total <= max(most, count)
    largest = dict(found).get(factor, 0)
    assert largest == min(count, max(0, (most - count) // factor**2))


def test_bounded_by_hand():
    """108 // 9 images at factor 3, then (128 - 108 - 8) // 4 at factor 2: the counts of the official code."""
    assert bounded(3, 20, 128) == [(3, 12), (2, 3), (1, 5)] and bounded(3, 10, 128) == [(3, 10)]
    assert bounded(3, 50, 128) == [(3, 8), (2, 3), (1, 39)]


# -- channels -----------------------------------------------------------------------------------------------------------


def test_shifted_tiles():
    x = pixels()
    plain, shifted = parts(MultiFormation(2), x), parts(SHIFTED, x)
    for j in range(4):
        for c in range(3):
            assert torch.equal(shifted[j, :, c], plain[(j + c) % 4, :, c])
    assert torch.equal(MultiFormation(2, shifts=(0, 0, 0))(x), MultiFormation(2)(x))
    grey = pixels(c=1)
    assert torch.equal(SHIFTED(grey), MultiFormation(2)(grey))


def test_planes_and_cycles_are_what_they_say():
    x = pixels()
    planes, cycles = parts(ChannelMix(PLANES), x), parts(ChannelMix(CYCLES), x)
    for k in range(3):
        assert torch.equal(planes[k], x[:, k : k + 1].expand_as(x))
        assert torch.equal(cycles[k], x.roll(-k, 1))
    assert torch.equal(planes[3], x)
    torch.testing.assert_close(cycles[3], x.mean(1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("maps", [PLANES, CYCLES], ids=["planes", "cycles"])
def test_a_grey_image_is_formed_into_four_equal_ones(maps):
    grey = pixels(c=1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(parts(ChannelMix(maps), grey), grey.expand(4, *grey.shape))
    bound = ChannelMix(maps).on(
        UNEVEN
    )  # in the normalised space as well: it is formed before it is normalised
    code = UNEVEN.forward(grey.float())
    torch.testing.assert_close(parts(bound, code), code.expand(4, *grey.shape), rtol=1e-5, atol=1e-5)


def test_a_subset_that_keeps_the_image_is_pixels():
    x = pixels(dtype=torch.float32)
    for maps in (PLANES[3:], CYCLES[:1]):
        mix = ChannelMix(maps).on(UNEVEN)
        assert mix.multiplicity == 1 and torch.equal(mix(x), x)
    turned = decode_by_class(ChannelMix(CYCLES[1:2]), x[None])  # one image for one, and yet another
    assert torch.equal(turned[0], x.roll(-1, 1))


def test_a_plane_learns_from_its_own_formation_and_from_the_colour_one():
    x, mix = pixels(1).requires_grad_(), ChannelMix(PLANES)

    def reached(which):
        gradient = torch.autograd.grad(parts(mix, x)[which].sum(), x)[0]
        return gradient.sum((0, 2, 3)).tolist()

    assert [reached(k) for k in range(4)] == [[192, 0, 0], [0, 192, 0], [0, 0, 192], [64, 64, 64]]
    assert torch.autograd.gradcheck(lambda z: mix.on(UNEVEN)(z), x[:, :, :2, :2].detach().requires_grad_())


def test_learned_maps_take_gradients_and_are_used():
    x, mix = pixels(2), ChannelMix(PLANES, learned=True).on(UNEVEN)
    maps = torch.randn(4, 3, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.equal(mix(x, maps), replace(mix, maps=maps.tolist())(x))
    assert torch.autograd.gradcheck(lambda a: mix(x[:1, :, :2, :2], a), maps)


def test_planes_start_as_the_luminance_of_three_images():
    sources = pixels(8).unflatten(0, (4, 2))
    packed = ChannelMix().pack(sources)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    for c in range(3):
        torch.testing.assert_close(packed[:, c], (sources[c] * weights).sum(1))


# -- under every method -------------------------------------------------------------------------------------------------

NET = {"network": "convnet-d2-w4", "real_batch": 6}
METHODS = {
    "dc": DC(**NET, outer=6, inner=2, epochs=2, init="mix"),
    "dsa": DSA(**NET, outer=6, inner=2, epochs=2),
    "dm": DM(**NET, iterations=12, init="mix"),
    "m3d": M3D(**NET, iterations=12),
    "datadam": DataDAM(**NET, iterations=12),
    "idc": IDC(**NET, outer=6, inner=2, n_data=12, network_batch=6),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("formation", [MultiFormation(2), PADDED, SHIFTED, ChannelMix(), ChannelMix(CYCLES)],
                         ids=["tiles", "padded", "shifted", "planes", "cycles"])  # fmt: skip
def test_every_method_takes_every_formation(method, formation, colour, tmp_path):
    method = replace(method, formation=formation)
    done = distill(method, colour.train, 2, 3)
    synset = done.synset
    assert synset.codes.shape == (6, 3, 8, 8) and synset.images.shape == (6 * formation.multiplicity, 3, 8, 8)
    assert synset.decoder == formation.on(UNEVEN) and synset.bytes_images == 6 * 3 * 64 * 4
    assert done.history["loss"].isfinite().all() and synset.codes.isfinite().all()
    begin = initial_codes(formation, colour.train, 2, method.init, generator(3))
    assert ((synset.codes - begin).abs().amax((1, 2, 3)) > 1e-6).all()  # every stored image learns
    interrupted(method, colour.train, tmp_path / "run", 11, ipc=2, seed=3)
    assert (tmp_path / "run").is_file()
    same(distill(method, colour.train, 2, 3, checkpoint=tmp_path / "run"), done)
    back = SyntheticSet.load(synset.save(tmp_path / "set"))
    assert torch.equal(back.images, synset.images)


def test_networks_train_on_the_decoded_images(colour, monkeypatch):
    """Also where DC's networks learn from S between two steps."""
    seen = []

    def record(networks, images, labels, *rest, **more):
        seen.append((images.shape, labels.shape))
        return plain(networks, images, labels, *rest, **more)

    plain = dc.sgd_steps
    monkeypatch.setattr(dc, "sgd_steps", record)
    distill(replace(METHODS["dc"], formation=MultiFormation(2)), colour.train, 2, 0)
    assert seen == [((1, 24, 3, 8, 8), (1, 24))] * 6


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formation", "says"),
    [
        (MultiFormation(3), "factor 3 for 8x8 images: allowed 1, 2, 4, 8"),
        (MultiFormation(0), "factor 0 for 8x8 images: allowed 1, 2, 4, 8"),
        (MultiFormation(3, kind="multi"), "factor 3 for 8x8 images: allowed 1, 2, 4, 8"),
        (MultiFormation(9, pad=True), "factor 9 for 8x8 images: allowed 1 to 8"),
        (MultiFormation(2, shifts=(0, 1)), "2 shifts of tiles for 3 channels"),
    ],
)
@pytest.mark.parametrize("method", [DM(**NET), DSA(**NET), IDC(**NET)], ids=["dm", "dsa", "idc"])
def test_bad_factors_are_one_line(method, formation, says, colour):
    with pytest.raises(CompanionError, match=says) as caught:
        distill(replace(method, formation=formation), colour.train, 1, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("maps", [PLANES, CYCLES])
def test_channels_need_colours(maps, toy, colour):
    with pytest.raises(
        CompanionError, match="'channel-mix' mixes 3 colour channels, these images have 1: allowed is Multi"
    ):
        distill(DM(**NET, formation=ChannelMix(maps)), toy.train, 1, 0)
    whitened = replace(colour.train, transform=ZCA.fit(pixels(200, h=8, w=8, dtype=torch.float32)))
    for formation in (ChannelMix(maps), PADDED):
        with pytest.raises(
            CompanionError, match="needs the colours of pixels, the data is 'zca': allowed is 'standardise'"
        ):
            distill(DM(**NET, formation=formation), whitened, 1, 0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(CompanionError, match=r"unknown kind of multi-formation 'all'.*multi, single"):
        MultiFormation(kind="all")
