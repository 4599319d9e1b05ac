"""The data that needs no download, the image set with its sampling, whitening, names and devices."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lib.data
from lib.data import ZCA, PerImageZCA, Standardise, embedded, from_saved
from lib.data.imageset import DIGITS, NATURAL, ImageSet, class_table, draw
from lib.data.whitening import StandardisedZCA, second_moment, zca_matrix
from lib.system.device import resolve_device
from lib.system.errors import CompanionError
from lib.system.files import ROOT


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_line(error, *words):
    """The message of a caught CompanionError: a single line that holds all the words."""
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"
    return text


@pytest.fixture(scope="module")
def photos32():
    return lib.data.load("photos32")


@pytest.fixture(scope="module")
def digits():
    return lib.data.load("digits")


# --- embedded data


def test_digits_are_the_documented_split(digits):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    X, y = load_digits(return_X_y=True)
    train, test, y_train, y_test = train_test_split(X, y, test_size=360, random_state=0, stratify=y)
    mean, std = train.mean() / 16, train.std() / 16
    for half, pixels, labels in ((digits.train, train, y_train), (digits.test, test, y_test)):
        expected = torch.tensor((pixels / 16 - mean) / std, dtype=torch.float32).view(-1, 1, 8, 8)
        torch.testing.assert_close(half.images, expected, rtol=1e-5, atol=1e-5)
        assert half.labels.tolist() == labels.tolist()
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.first_padding == 1 and digits.train.augmentation == DIGITS


def test_photos_no_test_pixel_is_in_a_training_crop(photos32):
    for label, name in enumerate(embedded.PHOTOS):
        photo = embedded.photograph(name)
        corners = embedded.crop_corners(name, *photo.shape[1:])
        seen = []
        for half, place in zip((photos32.train, photos32.test), corners, strict=True):
            covered = torch.zeros(photo.shape[1:], dtype=torch.int)
            crops = []
            for top, left in place.tolist():
                # inside the photograph and inside one 64-pixel block
                assert top // 64 == (top + 31) // 64 and left // 64 == (left + 31) // 64
                assert top + 32 <= photo.shape[1] and left + 32 <= photo.shape[2]
                covered[top : top + 32, left : left + 32] += 1
                crops.append(photo[:, top : top + 32, left : left + 32])
            seen.append(covered)
            # what is loaded are exactly these crops
            loaded = half.transform.inverse(half.images[half.labels == label]) * 255
            torch.testing.assert_close(loaded, torch.stack(crops).float(), rtol=0, atol=1e-3)
        assert not ((seen[0] > 0) & (seen[1] > 0)).any(), name
        assert seen[1].max() == 1, "test crops overlap"


def test_photos_counts_and_statistics(photos32):
    assert photos32.train.counts.tolist() == [400] * 10
    assert 28 <= int(photos32.test.counts.min()) and int(photos32.test.counts.max()) <= 60
    assert photos32.train.classes == tuple(embedded.PHOTOS) and photos32.train.num_classes == 10
    torch.testing.assert_close(photos32.train.images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(photos32.train.images.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-4)
    pixels = photos32.test.transform.inverse(photos32.test.images)
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    assert photos32.train.augmentation == NATURAL and photos32.train.shape == (3, 32, 32)


def test_photos16_is_the_area_average(photos32):
    small = lib.data.load("photos16")
    for big, half in ((photos32.train, small.train), (photos32.test, small.test)):
        expected = big.transform.inverse(big.images).unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
        torch.testing.assert_close(half.transform.inverse(half.images), expected, rtol=0, atol=1e-5)
        assert torch.equal(half.labels, big.labels)


def test_loading_is_deterministic_whatever_the_thread_count():
    code = "import torch, lib.data; torch.set_num_threads({}); print(lib.data.load('photos16').train.fingerprint)"
    run = [sys.executable, "-c", code.format(2)]
    other = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    assert other == lib.data.load("photos16").train.fingerprint


def test_import_and_embedded_data_stay_light():
    code = (
        "import sys, lib.data; lib.data.load('digits'); lib.data.load('photos16');"
        "print([m for m in ('torchvision', 'sklearn', 'skimage', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


def test_missing_and_altered_packaged_files(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_folder", lambda package: tmp_path)
    with pytest.raises(CompanionError) as error:
        lib.data.load("photos16")
    one_line(error, "astronaut.png", "scikit-image", "pip install")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "astronaut.png").write_bytes(b"something else")
    with pytest.raises(CompanionError) as error:
        lib.data.load("photos16")
    one_line(error, "astronaut.png", "SHA-256", "repair")


# --- names, options, devices


def test_unknown_names_and_options(tmp_path):
    with pytest.raises(CompanionError) as error:
        lib.data.load("digit")
    one_line(
        error, "unknown dataset 'digit'", "did you mean 'digits'", "cifar10", "imagewoof", "folder:/path"
    )
    for call in (
        lambda: lib.data.check("folder:"),
        lambda: lib.data.check(3),
        lambda: lib.data.stream("nope"),
    ):
        with pytest.raises(CompanionError, match="unknown dataset"):
            call()
    with pytest.raises(CompanionError) as error:
        lib.data.load("digits", whiten="pca")
    one_line(error, "whitening 'pca'", "zca", "zca-kip")
    for size in (0, -3, 8.0, True, "8"):
        with pytest.raises(CompanionError, match="size must be a whole number"):
            lib.data.load("digits", size=size)
    with pytest.raises(CompanionError, match="digits fits in memory"):
        lib.data.stream("digits")
    for name in lib.data.names():
        lib.data.check(name)


def test_resolve_device(monkeypatch):
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(CompanionError) as error:
            lib.data.load("digits", device=name)
        one_line(error, name, "CUDA is not available", "cpu")
    for name in ("gpu", "cuda:x", "cuda:-1", "cpu:0", ""):
        with pytest.raises(CompanionError, match="unknown device.*auto, cpu, cuda"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(CompanionError, match="'cuda:2': this machine has 2"):
        resolve_device("cuda:2")


def test_size_resizes_before_normalising(digits):
    larger = lib.data.load("digits", size=16)
    assert larger.train.shape == (1, 16, 16) and larger.train.size == 16
    plain = digits.train.transform.inverse(digits.train.images)
    expected = F.interpolate(plain, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(
        larger.train.transform.inverse(larger.train.images), expected, rtol=0, atol=1e-5
    )
    assert abs(float(larger.train.images.mean())) < 1e-4


# --- the image set


def uneven(counts=(5, 3, 9), seed=0):
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    images = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 2).clone()
    identity = Standardise(torch.zeros(1), torch.ones(1))
    return ImageSet("toy", images, labels, tuple("abc"[: len(counts)]), identity)


def test_sampling_is_per_class_without_replacement():
    toy = uneven()
    assert toy.smallest_class == 3 and toy.counts.tolist() == [5, 3, 9] and len(toy) == 17
    for seed in range(20):
        index = toy.indices(3, seeded(seed))
        assert index.shape == (3, 3) and index.dtype == torch.int64
        assert torch.equal(toy.labels[index], torch.arange(3)[:, None].expand(3, 3))
        assert all(len(set(row)) == 3 for row in index.tolist())
        batch = toy.sample(3, seeded(seed))
        assert batch.shape == (3, 3, 1, 2, 2)
        assert torch.equal(batch[..., 0, 0, 0].long(), index), "images and indices of one seed differ"
    assert not torch.equal(toy.indices(3, seeded(1)), toy.indices(3, seeded(2)))


def test_sampling_is_uniform():
    toy = uneven()
    generator, hits = seeded(), torch.zeros(17)
    draws = 3000
    for _ in range(draws):
        hits.index_add_(0, toy.indices(2, generator).flatten(), torch.ones(6))
    expected = 2 * draws / toy.counts[toy.labels].float()
    # binomial: five standard deviations
    assert ((hits - expected).abs() < 5 * (expected * (1 - 2 / toy.counts[toy.labels])).sqrt()).all()


def test_sampling_leaves_the_global_generator_alone():
    toy, before = uneven(), torch.get_rng_state()
    toy.sample(2, seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_class_table_lists_every_position_once():
    toy = uneven((4, 0, 6))
    table = class_table(toy.labels, 3)
    assert table.shape == (3, 6) and (table[1] == -1).all()
    for c in (0, 2):
        assert table[c][table[c] >= 0].tolist() == torch.nonzero(toy.labels == c).flatten().tolist()
    assert draw(table[2:], 6, seeded())[0].sort().values.tolist() == table[2].tolist()


def test_bad_numbers_per_class():
    toy = uneven()
    for n in (0, -1, 1.5, True, "2"):
        with pytest.raises(CompanionError, match="whole number of at least 1"):
            toy.sample(n, seeded())
    with pytest.raises(CompanionError) as error:
        toy.sample(4, seeded())
    one_line(error, "4 images per class", "'b'", "has 3")


def test_of_class_subset_and_move():
    toy = uneven()
    assert toy.of_class(1).shape == (3, 1, 2, 2)
    part = toy.subset([16, 0, 3])
    assert part.images[:, 0, 0, 0].tolist() == [16, 0, 3] and part.classes == toy.classes
    assert part.labels.tolist() == toy.labels[[16, 0, 3]].tolist() and int(part.counts.sum()) == 3
    assert torch.equal(toy.to("cpu").images, toy.images) and toy.device.type == "cpu"


def test_fingerprint_follows_content():
    toy = uneven()
    assert toy.fingerprint == uneven().fingerprint and len(toy.fingerprint) == 64
    assert toy.fingerprint != toy.subset(list(range(16))).fingerprint
    flipped = uneven()
    flipped.labels[0] = (flipped.labels[0] + 1) % 3
    assert flipped.fingerprint != toy.fingerprint


# --- standardising and whitening


def photos_part(n, size=4):
    data = lib.data.load("photos16", size=size)
    pixels = data.train.transform.inverse(data.train.images)
    return pixels[torch.randperm(len(pixels), generator=seeded())[:n]]


def test_standardise_statistics_and_inverse():
    x = torch.rand(3000, 3, 5, 5, generator=seeded())  # more than one chunk
    x[:, 2] = 0.25  # a channel without variation
    transform = Standardise.fit(x)
    torch.testing.assert_close(transform.mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(transform.std[:2], x.std((0, 2, 3), correction=0)[:2], rtol=1e-5, atol=1e-6)
    assert transform.std[2] == 1 and torch.isfinite(transform.forward(x)).all()
    torch.testing.assert_close(transform.inverse(transform.forward(x)), x, rtol=0, atol=1e-6)
    assert torch.equal(transform.forward(x[:4].view(2, 2, 3, 5, 5)).flatten(0, 1), transform.forward(x[:4]))


def test_zca_matches_its_definition():
    x = photos_part(2500).double()
    transform = ZCA.fit(x)
    flat = x.flatten(1)
    eigenvalues, basis = torch.linalg.eigh(torch.cov(flat.T))
    W = basis @ torch.diag((eigenvalues + 0.1).rsqrt()) @ basis.T
    torch.testing.assert_close(
        transform.forward(x).flatten(1), (flat - flat.mean(0)) @ W, rtol=1e-9, atol=1e-9
    )
    # what is left of the covariance: lambda / (lambda + eps), in the same directions
    left = torch.cov(transform.forward(x).flatten(1).T)
    torch.testing.assert_close(left, basis @ torch.diag(eigenvalues / (eigenvalues + 0.1)) @ basis.T)
    torch.testing.assert_close(transform.inverse(transform.forward(x)), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(transform.matrix, transform.matrix.T)


def test_zca_kip_matches_its_definition():
    x = photos_part(2500).double()
    transform = PerImageZCA.fit(x)
    flat = x.flatten(1)
    unit = F.normalize(flat - flat.mean(1, keepdim=True), eps=1e-4)
    moment = unit.T @ unit / len(unit)
    ridge = 0.1 * moment.trace() / len(moment)
    inverse_root = transform.matrix
    eye = torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close(
        inverse_root @ (moment + ridge * eye) @ inverse_root, eye, rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(transform.forward(x).flatten(1), unit @ inverse_root, rtol=1e-9, atol=1e-9)
    # brightness and contrast of an image do not matter, unless it has none: a blank one maps to 0
    x = x[transform.statistics(x)[1][:, 0] > 1e-3]
    torch.testing.assert_close(transform.forward(0.3 * x + 0.2), transform.forward(x))
    blank = transform.forward(torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64))
    assert blank.norm() < 1e-2


def test_zca_kip_inverse_is_exact_only_with_the_image_statistics():
    x = photos_part(300).double()
    x = x[PerImageZCA.statistics(x)[1][:, 0] > 1e-3]  # not the blank ones, which have no direction
    transform = PerImageZCA.fit(x)
    z = transform.forward(x)
    mean, norm = transform.statistics(x)
    torch.testing.assert_close(transform.inverse(z, mean, norm), x, rtol=0, atol=1e-9)
    view = transform.inverse(z)
    seen_mean, seen_norm = transform.statistics(view)
    torch.testing.assert_close(seen_mean, mean.mean().expand_as(mean))
    torch.testing.assert_close(seen_norm, norm.mean().expand_as(norm))
    torch.testing.assert_close(transform.forward(view), z)  # same direction, so the same whitened image


def test_zca_agrees_with_reference_vectors():
    with np.load(ROOT / "tests" / "golden" / "rfad_zca_adabelief.npz", allow_pickle=False) as file:
        golden = {name: torch.from_numpy(file[name]) for name in ("X_norm", "W_zca", "X_ln", "X_ln_zca")}
    x = golden["X_norm"]
    flat = x.flatten(1)
    moment = second_moment([flat], len(flat))
    got = zca_matrix(moment, 0.1 * float(moment.trace()) / len(moment))
    torch.testing.assert_close(got, golden["W_zca"], rtol=1e-8, atol=1e-8)
    mean, norm = PerImageZCA.statistics(x)
    torch.testing.assert_close(((flat - mean) / norm).view_as(x), golden["X_ln"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(PerImageZCA.fit(x).forward(x), golden["X_ln_zca"], rtol=1e-8, atol=1e-8)


def test_rank_control_leaves_empty_directions_alone():
    x = photos_part(20).double()  # 20 images, 48 values each
    plain, controlled = PerImageZCA.fit(x), PerImageZCA.fit(x, rank_control=True)
    unit = plain.forward(x).flatten(1)
    empty = torch.linalg.svd(unit.double(), full_matrices=True).Vh[20:]  # orthogonal to every image
    torch.testing.assert_close(empty @ controlled.matrix, empty)
    assert torch.linalg.vector_norm(empty @ plain.matrix) > 2 * torch.linalg.vector_norm(empty)
    torch.testing.assert_close(controlled.forward(x), plain.forward(x))


@pytest.mark.parametrize("whiten", ["zca", "zca-kip", "zca-rfad"])
def test_load_whitened(whiten, digits):
    white = lib.data.load("digits", whiten=whiten)
    pixels = digits.train.transform.inverse(digits.train.images)
    expected = {"zca": ZCA, "zca-kip": PerImageZCA, "zca-rfad": StandardisedZCA}[whiten].fit(pixels)
    # the test half uses the training statistics
    test = digits.test.transform.inverse(digits.test.images)
    torch.testing.assert_close(white.test.images, expected.forward(test), rtol=0, atol=1e-3)
    assert white.train.fingerprint != digits.train.fingerprint
    if whiten != "zca-kip":
        torch.testing.assert_close(white.test.transform.inverse(white.test.images), test, rtol=0, atol=1e-4)


def test_zca_of_large_images_is_refused():
    with pytest.raises(CompanionError) as error:
        ZCA.fit(torch.zeros(2, 3, 65, 65))
    one_line(error, "3x65x65", "12288", "size=")


@pytest.mark.parametrize("cls", [Standardise, ZCA, PerImageZCA, StandardisedZCA])
def test_transforms_survive_saving(cls, tmp_path):
    import safetensors.torch

    x = photos_part(200)
    before = cls.fit(x)
    safetensors.torch.save_file(before.tensors(), tmp_path / "t.safetensors")
    about = json.loads(json.dumps(before.config()))
    tensors = safetensors.torch.load_file(tmp_path / "t.safetensors")
    for saved in (about, about["kind"]):
        after = from_saved(saved, tensors)
        assert type(after) is cls
        assert torch.equal(after.forward(x), before.forward(x)) and torch.equal(
            after.inverse(x), before.inverse(x)
        )
    assert torch.equal(before.to("cpu").forward(x), before.forward(x))
    name = sorted(tensors)[0]
    del tensors[name]
    with pytest.raises(CompanionError) as error:
        from_saved(about, tensors)
    one_line(error, "lacks", name)
    with pytest.raises(CompanionError, match="unknown transform 'pca'"):
        from_saved("pca", tensors)
    with pytest.raises(CompanionError, match="unknown transform"):
        from_saved({}, tensors)


def test_command_line(capsys):
    from lib.data.__main__ import main

    assert main(["digits"]) == 0
    assert "1437 training and 360 test images of 1x8x8, 10 classes" in capsys.readouterr().out
    assert main(["digitz"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown dataset" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_on_the_gpu():
    data = lib.data.load("digits", device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    batch = data.train.indices(5, generator)
    assert batch.is_cuda and torch.equal(
        data.train.labels[batch], torch.arange(10, device="cuda")[:, None].expand(10, 5)
    )
    assert data.train.fingerprint == lib.data.load("digits").train.to("cuda").fingerprint


def test_data_say_whether_they_are_small():
    """At most 32 pixels a side and 20 000 images: all embedded data, and a part of larger ones."""
    assert all(lib.data.load(name).train.small for name in ("digits", "fashion14", "photos16", "photos32"))
    images, labels = torch.zeros(20_001, 1, 8, 8), torch.zeros(20_001, dtype=torch.long)
    transform = Standardise(torch.zeros(1), torch.ones(1))
    many = ImageSet("many", images, labels, ("one",), transform)
    assert not many.small and many.subset(range(20_000)).small
    assert not ImageSet("wide", torch.zeros(4, 1, 33, 33), labels[:4], ("one",), transform).small
