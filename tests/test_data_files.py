"""Data sets read from disk: torchvision's formats, ImageNet's layouts, any folder; in memory and streamed."""

import gzip
import hashlib
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import lib.data
from lib.data import fashion, folders, images, memory
from lib.data.imageset import DIGITS, NATURAL
from lib.data.subsets import CLASSES, SUBSETS, class_names, positions
from lib.system.errors import CompanionError

RANDOM = np.random.RandomState(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def refused(call, *words):
    """Run ``call``, which must end in a one-line CompanionError that holds the words."""
    with pytest.raises(CompanionError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"


# --- torchvision's files


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_mnist(root, name="MNIST", n=(30, 20)):
    halves = {}
    for prefix, count in zip(("train", "t10k"), n, strict=True):
        pixels = RANDOM.randint(0, 256, (count, 28, 28))
        labels = np.arange(count) % 10
        write_idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", pixels)
        write_idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        halves[prefix] = (pixels, labels)
    return halves


def write_cifar(root, monkeypatch, classes=10):
    """CIFAR's pickles with few images each, and torchvision's checksum tables set to theirs."""
    import torchvision.datasets as tv

    cls, fine = (tv.CIFAR10, "labels") if classes == 10 else (tv.CIFAR100, "fine_labels")
    folder = root / cls.base_folder
    folder.mkdir(parents=True)

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    halves = []
    for attribute in ("train_list", "test_list"):
        table, pixels, labels = [], [], []
        for name, _ in getattr(cls, attribute):
            data = RANDOM.randint(0, 256, (classes, 3072)).astype(np.uint8)
            table.append([name, put(name, {"data": data, fine: list(range(classes))})])
            pixels.append(data)
            labels += list(range(classes))
        monkeypatch.setattr(cls, attribute, table)
        halves.append((np.concatenate(pixels).reshape(-1, 3, 32, 32), labels))
    names = [f"class {i}" for i in range(classes)]
    md5 = put(cls.meta["filename"], {cls.meta["key"]: names})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    return halves, tuple(names)


def write_svhn(root, monkeypatch):
    import scipy.io
    import torchvision.datasets as tv

    halves, table = [], dict(tv.SVHN.split_list)
    for split, count in (("train", 20), ("test", 10)):
        pixels = RANDOM.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        labels = 1 + np.arange(count) % 10  # 1..10, where 10 stands for the digit 0
        path = root / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": labels[:, None]})
        table[split] = [table[split][0], path.name, hashlib.md5(path.read_bytes()).hexdigest()]
        halves.append((pixels.transpose(3, 2, 0, 1), labels % 10))
    monkeypatch.setattr(tv.SVHN, "split_list", table)
    return halves


def check_half(half, pixels, labels):
    """The pixels come back through the inverse, the labels as they are."""
    back = half.transform.inverse(half.images) * 255
    torch.testing.assert_close(
        back, torch.as_tensor(np.array(pixels)).float().view_as(back), rtol=0, atol=1e-3
    )
    assert half.labels.tolist() == list(labels) and half.labels.dtype == torch.int64
    assert half.images.dtype == torch.float32 and half.images.is_contiguous()


@pytest.mark.parametrize("name, folder, mean, std", [("mnist", "MNIST", 0.1307, 0.3081),
                                                     ("fashionmnist", "FashionMNIST", 0.2861, 0.3530)])  # fmt: skip
def test_mnist_and_fashion(tmp_path, monkeypatch, name, folder, mean, std):
    halves = write_mnist(tmp_path, folder)
    known = {key: (file, sha(tmp_path / folder / "raw" / file)) for key, (file, _) in fashion.FILES.items()}
    monkeypatch.setattr(fashion, "FILES", known)
    data = lib.data.load(name, root=tmp_path)
    check_half(data.train, *halves["train"])
    check_half(data.test, *halves["t10k"])
    expected = (halves["train"][0][0, 0, 0] / 255 - mean) / std
    assert float(data.train.images[0, 0, 0, 0]) == pytest.approx(expected, rel=1e-5)
    assert data.train.first_padding == 3 and data.train.shape == (1, 28, 28)
    assert data.train.augmentation == (DIGITS if name == "mnist" else NATURAL)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, monkeypatch, classes):
    (train, test), names = write_cifar(tmp_path, monkeypatch, classes)
    data = lib.data.load(f"cifar{classes}", root=tmp_path)
    check_half(data.train, *train)
    check_half(data.test, *test)
    assert (
        data.train.classes == names and data.train.first_padding == 1 and data.train.augmentation == NATURAL
    )
    std = {10: (0.2023, 0.1994, 0.2010), 100: (0.2673, 0.2564, 0.2762)}[classes]
    torch.testing.assert_close(data.train.transform.std, torch.tensor(std))


def test_svhn(tmp_path, monkeypatch):
    train, test = write_svhn(tmp_path, monkeypatch)
    data = lib.data.load("svhn", root=tmp_path)
    check_half(data.train, *train)
    check_half(data.test, *test)
    assert data.train.augmentation == DIGITS and data.train.classes == tuple("0123456789")


def test_a_pickle_with_another_checksum_is_never_opened(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    opened = tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (open, (str(opened), "w"))

    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps(Bomb()))
    refused(
        lambda: lib.data.load("cifar10", root=tmp_path),
        "cifar10",
        "damaged",
        tmp_path,
        "python -m lib.data cifar10",
    )
    assert not opened.exists()


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "svhn", "cifar10", "cifar100"])
def test_missing_torchvision_data(tmp_path, name, monkeypatch):
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "no package")
    monkeypatch.delenv("COMPANION_DOWNLOAD", raising=False)
    refused(
        lambda: lib.data.load(name, root=tmp_path),
        name,
        tmp_path,
        f"python -m lib.data {name} --root",
        "http",
    )
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "elsewhere"))
    refused(lambda: lib.data.load(name), tmp_path / "elsewhere")


def test_damaged_mnist(tmp_path):
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    (raw / "train-images-idx3-ubyte").write_bytes(whole[:-100])
    refused(lambda: lib.data.load("mnist", root=tmp_path), "mnist", "damaged", raw)
    (raw / "train-images-idx3-ubyte").write_bytes(gzip.compress(whole))
    refused(lambda: lib.data.load("mnist", root=tmp_path), "damaged")
    (raw / "train-images-idx3-ubyte").write_bytes(whole)
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(29))
    refused(lambda: lib.data.load("mnist", root=tmp_path), "numbers of images and labels differ")
    write_idx(raw / "train-labels-idx1-ubyte", np.full(30, 10))
    refused(lambda: lib.data.load("mnist", root=tmp_path), "labels out of range")
    (raw / "train-labels-idx1-ubyte").unlink()
    refused(lambda: lib.data.load("mnist", root=tmp_path), "damaged or incomplete")


def test_download_only_when_asked_and_its_failure_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets as tv

    calls = []

    def no_network(self):
        calls.append(type(self).__name__)
        raise RuntimeError("Error downloading\ntried a mirror")

    monkeypatch.setattr(tv.MNIST, "download", no_network)
    monkeypatch.delenv("COMPANION_DOWNLOAD", raising=False)
    refused(lambda: lib.data.load("mnist", root=tmp_path), "get it with")
    assert calls == []
    refused(
        lambda: lib.data.load("mnist", root=tmp_path, download=True),
        "cannot download mnist",
        "tried a mirror",
    )
    monkeypatch.setenv("COMPANION_DOWNLOAD", "1")
    refused(lambda: lib.data.load("mnist", root=tmp_path), "cannot download mnist")
    assert calls == ["MNIST", "MNIST"]


# --- folders of images


def save(path, size=8, mode="RGB", value=None):
    """A picture of random pixels, or of one value; PNG unless the name says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = (size, size) if isinstance(size, int) else size
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = RANDOM.randint(0, 256, shape) if value is None else np.full(shape, value)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return pixels


def make_folder(base, halves=("train", "test"), classes=("cat", "dog"), n=5, **kind):
    for half in halves:
        for label, name in enumerate(classes):
            for i in range(n):
                save(base / half / name / f"{i}.png", value=None if i else 20 * label + 5, **kind)
    return base


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_own_folder(tmp_path, test_name):
    make_folder(tmp_path / "pets", ("train", test_name))
    data = lib.data.load(f"folder:{tmp_path / 'pets'}")
    assert data.train.classes == ("cat", "dog") and data.train.name == "folder:pets"
    assert data.train.shape == (3, 8, 8) and data.train.counts.tolist() == data.test.counts.tolist() == [5, 5]
    torch.testing.assert_close(data.train.images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    for half, folder in ((data.train, "train"), (data.test, test_name)):
        pixels = half.transform.inverse(half.images) * 255
        for position, name in ((1, "cat/1.png"), (7, "dog/2.png")):
            stored = np.array(Image.open(tmp_path / "pets" / folder / name)).transpose(2, 0, 1)
            torch.testing.assert_close(pixels[position], torch.tensor(stored).float(), rtol=0, atol=1e-3)
    assert lib.data.load(f"folder:{tmp_path / 'pets'}", size=4).train.shape == (3, 4, 4)


def test_own_folder_without_a_test_half(tmp_path):
    make_folder(tmp_path, ("",), ("b", "a"), n=11)
    first, again = (lib.data.load(f"folder:{tmp_path}") for _ in range(2))
    assert (
        first.train.fingerprint == again.train.fingerprint
        and first.test.fingerprint == again.test.fingerprint
    )
    assert first.train.counts.tolist() == [9, 9] and first.test.counts.tolist() == [2, 2]
    listing = folders.find(f"folder:{tmp_path}", tmp_path)
    train, test = set(listing.train.paths), set(listing.test.paths)
    assert not train & test and train | test == set(tmp_path.glob("*/*.png"))
    # one more class leaves the split of the others alone
    make_folder(tmp_path, ("",), ("c",), n=4)
    assert test < set(folders.find(f"folder:{tmp_path}", tmp_path).test.paths)
    save(tmp_path / "single" / "x.png")
    refused(lambda: lib.data.load(f"folder:{tmp_path}"), "single", "at least two")


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path, ("",), ("bus", "car", "train"), n=6)
    assert lib.data.load(f"folder:{tmp_path}").train.classes == ("bus", "car", "train")


def test_one_level_too_high_is_said(tmp_path):
    make_folder(tmp_path / "archive", ("",), ("a", "b"), n=4)
    refused(
        lambda: lib.data.load(f"folder:{tmp_path}"),
        "one class folder, 'archive'",
        f"folder:{tmp_path / 'archive'}",
    )
    save(tmp_path / "alone" / "only" / "x.png")
    refused(lambda: lib.data.load(f"folder:{tmp_path / 'alone'}"), "one class folder, 'only'", "at least two")


def test_grey_folder_has_one_channel(tmp_path):
    make_folder(tmp_path / "grey", mode="L", size=28)
    data = lib.data.load(f"folder:{tmp_path / 'grey'}")
    assert data.train.shape == (1, 28, 28) and data.train.first_padding == 3
    save(tmp_path / "grey" / "train" / "cat" / "9.png", 28)  # one colour image among them
    assert lib.data.load(f"folder:{tmp_path / 'grey'}").train.shape == (3, 28, 28)


def test_mixed_sizes_need_a_size(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "train" / "dog" / "odd.png", (12, 9))
    name = f"folder:{tmp_path}"
    refused(lambda: lib.data.load(name), "mixed sizes", "odd.png is 12x9", "8x8", "size=")
    assert lib.data.load(name, size=6).train.shape == (3, 6, 6)
    make_folder(tmp_path / "wide", size=(10, 8))
    refused(lambda: lib.data.load(f"folder:{tmp_path / 'wide'}"), "not square", "10x8", "size=")


def test_bad_folders(tmp_path):
    base = tmp_path / "pets"
    load = lambda: lib.data.load(f"folder:{base}")  # noqa: E731
    refused(load, base, "does not exist")
    base.write_text("a file")
    refused(load, "is not a folder")
    base.unlink()
    base.mkdir()
    refused(load, base, "no class folders")
    (base / "train").mkdir()
    refused(load, base / "train", "no class folders")
    make_folder(base)
    (base / "train" / "empty").mkdir()
    (base / "train" / "empty" / "notes.txt").write_text("no image")
    refused(load, base / "train" / "empty", "no readable image")
    (base / "train" / "empty" / "notes.txt").unlink()
    (base / "train" / "empty").rmdir()
    (base / "train" / ".hidden").mkdir()
    load()
    save(base / "test" / "bird" / "1.png")
    refused(load, base / "test" / "bird", "no counterpart", "cat, dog")
    (base / "test" / "bird" / "1.png").rename(base / "test" / "1.png")
    (base / "test" / "bird").rmdir()
    for file in (base / "test" / "dog").iterdir():
        file.unlink()
    refused(load, base / "test" / "dog", "no readable image")
    (base / "test" / "dog").rmdir()
    refused(load, base / "test", "no class folder 'dog'")


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "deep"])
def test_damaged_images_are_named(tmp_path, damage, size):
    make_folder(tmp_path, n=3, size=32)
    victim = tmp_path / "train" / "cat" / "1.png"
    if damage == "deep":
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(victim)
    else:
        whole = victim.read_bytes()
        victim.write_bytes(
            {"text": b"this is not an image", "empty": b"", "truncated": whole[: len(whole) // 2]}[damage]
        )
    refused(lambda: lib.data.load(f"folder:{tmp_path}", size=size), "cannot read the image", victim)
    stream = lib.data.stream(f"folder:{tmp_path}", size=8)
    refused(lambda: list(stream.batches(seeded(), 2)), "cannot read the image", victim)


@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (64, 64), (10, 13), (16, 16), (16, 21)])
def test_resize_and_crop_as_torchvision(tmp_path, shape):
    from torchvision.transforms import v2

    save(tmp_path / "x.png", shape)
    expected = v2.CenterCrop(16)(v2.Resize(16)(Image.open(tmp_path / "x.png").convert("RGB")))
    got = images.decode(tmp_path / "x.png", 16, 3)
    assert got.shape == (3, 16, 16) and np.array_equal(got.transpose(1, 2, 0), np.asarray(expected))


def test_what_does_not_fit_in_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(memory, "memory", lambda: 20 * 3 * 64 * 4 * 2)
    refused(lambda: lib.data.load(f"folder:{tmp_path}"), "20 images at 8 px", "size=", "lib.data.stream")
    lib.data.load(f"folder:{tmp_path}", size=4)
    monkeypatch.undo()
    assert memory.memory() > 2**28


# --- ImageNet and its parts


def test_named_subsets_label_in_listed_order(tmp_path):
    base = tmp_path / "imagenet"
    synsets = SUBSETS["imagewoof"]
    assert list(synsets) != sorted(synsets)
    for label, synset in enumerate(synsets):
        for half, n in (("train", 2), ("val", 1)):
            for i in range(n):
                save(base / half / synset / f"{i}.JPEG", (20, 16), value=20 * label)
    save(base / "train" / "n99999999" / "x.JPEG")  # classes of other subsets may lie there too
    for root in (tmp_path, base):
        data = lib.data.load("imagewoof", root=root, size=8)
        assert (
            data.train.classes == class_names("imagewoof") and data.train.classes[0] == "Australian terrier"
        )
        assert data.train.counts.tolist() == [2] * 10 and data.test.counts.tolist() == [1] * 10
        values = (data.test.transform.inverse(data.test.images) * 255).mean((1, 2, 3))
        torch.testing.assert_close(values, 20.0 * data.test.labels, rtol=0, atol=2)
    torch.testing.assert_close(data.train.transform.mean, torch.tensor([0.485, 0.456, 0.406]))
    assert lib.data.load("imagewoof", root=tmp_path).train.size == 128
    (base / "val" / synsets[3] / "0.JPEG").unlink()
    refused(lambda: lib.data.load("imagewoof", root=tmp_path), synsets[3], "no readable image")
    refused(lambda: lib.data.load("imagefruit", root=tmp_path), "no class folder", SUBSETS["imagefruit"][0])
    refused(lambda: lib.data.load("imagenet", root=tmp_path), "11 class folders", "1000")


@pytest.mark.parametrize("name", ["imagenette", "imagenet", "tinyimagenet"])
def test_missing_imagenet(tmp_path, name):
    refused(lambda: lib.data.load(name, root=tmp_path), f"{name} is not in {tmp_path}", "http")


def test_imagenet_labels_are_alphabetical(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "IMAGENET_CLASSES", 3)
    make_folder(tmp_path / "imagenet", ("train", "val"), ("n03", "n01", "n02"), n=2)
    data = lib.data.load("imagenet", root=tmp_path, size=8)
    assert data.train.classes == ("n01", "n02", "n03")
    assert lib.data.stream("imagenet", root=tmp_path).shape == (3, 224, 224)


def make_tiny(root):
    base = root / "tiny-imagenet-200"
    values = {"n02": 10, "n01": 200}
    for synset, value in values.items():
        for i in range(3):
            save(base / "train" / synset / "images" / f"{synset}_{i}.JPEG", 64, value=value)
        (base / "train" / synset / f"{synset}_boxes.txt").write_text("0 0 1 1")
    rows = []
    for i, synset in enumerate(("n02", "n01", "n02")):
        save(base / "val" / "images" / f"val_{i}.JPEG", 64, mode="L" if i else "RGB", value=values[synset])
        rows.append(f"val_{i}.JPEG\t{synset}\t0\t0\t63\t63")
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (base / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tsalamander\nn03\tother\n")
    return base


def test_tinyimagenet(tmp_path):
    base = make_tiny(tmp_path)
    data = lib.data.load("tinyimagenet", root=tmp_path)
    assert data.train.shape == (3, 64, 64) and data.train.classes == ("goldfish", "salamander")
    assert data.train.counts.tolist() == [3, 3] and data.test.labels.tolist() == [1, 0, 1]
    values = (data.test.transform.inverse(data.test.images) * 255).mean((1, 2, 3))
    torch.testing.assert_close(values, torch.tensor([10.0, 200.0, 10.0]), rtol=0, atol=2)
    notes = base / "val" / "val_annotations.txt"
    original = notes.read_text()
    notes.write_text(original + "val_9.JPEG\tn77\t0\n")
    refused(lambda: lib.data.load("tinyimagenet", root=tmp_path), notes, "n77")
    notes.write_text(original + "val_9.JPEG\tn01\t0\n")
    refused(lambda: lib.data.load("tinyimagenet", root=tmp_path), "val_9.JPEG")
    # the form in which many keep it: val sorted into class folders
    notes.unlink()
    for synset in ("n01", "n02"):
        save(base / "val" / synset / "images" / "a.JPEG", 64)
    assert lib.data.load("tinyimagenet", root=tmp_path).test.counts.tolist() == [1, 1]


def test_subset_table_is_consistent():
    assert {len(synsets) for name, synsets in SUBSETS.items() if name != "imagenet100"} == {10}
    assert len(SUBSETS["imagenet100"]) == 100 and len(SUBSETS) == 17
    for name, synsets in SUBSETS.items():
        assert len(set(synsets)) == len(synsets), name
        assert all(synset in CLASSES for synset in synsets)
    # synsets in alphabetical order have increasing positions in ImageNet-1K
    ordered = [CLASSES[synset][0] for synset in sorted(CLASSES)]
    assert ordered == sorted(set(ordered)) and 0 <= ordered[0] and ordered[-1] < 1000
    assert positions("imagenette") == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    assert positions("imagenet-marine") == (148, 2, 397, 327, 33, 150, 107, 108, 119, 392)
    assert SUBSETS["imageidc"] == SUBSETS["imagenet100"][:10]


def test_subset_names_are_those_of_the_classifiers():
    """Positions against the category names that torchvision ships with its ImageNet classifiers."""
    from torchvision.models import ResNet18_Weights

    categories = ResNet18_Weights.DEFAULT.meta["categories"]
    differing = {
        name: categories[position]
        for position, name in CLASSES.values()
        if categories[position].lower().replace("-", " ") != name.lower().replace("-", " ")
    }
    assert not differing


# --- streaming


@pytest.fixture
def streamed(tmp_path):
    make_folder(tmp_path / "pets", n=7, classes=("cat", "dog", "eel"), size=10)
    name = f"folder:{tmp_path / 'pets'}"
    data = lib.data.load(name)
    return data, lib.data.stream(name, size=10, transform=data.train.transform)


def test_stream_equals_the_set_in_memory(streamed):
    data, stream = streamed
    assert len(stream) == 21 and stream.classes == data.train.classes and stream.counts.tolist() == [7, 7, 7]
    whole = torch.cat([x for x, _ in stream.batches(None, 4)])
    assert torch.equal(whole, data.train.images)
    assert torch.equal(stream.labels, data.train.labels)
    assert torch.equal(stream.sample(3, seeded(1)), data.train.sample(3, seeded(1)))
    index = torch.tensor([[3, 20], [0, 3]])
    assert torch.equal(stream.images(index), data.train.images[index])
    part = stream.take(torch.tensor([20, 0]))
    assert part.labels.tolist() == [2, 0] and torch.equal(part.images, data.train.images[[20, 0]])
    test = lib.data.stream(f"folder:{stream.paths[0].parents[2]}", split="test", size=10)
    assert len(test) == 21 and "test" in str(test.paths[0])


def test_streamed_images_lie_channel_by_channel(streamed):
    _, stream = streamed
    images, _ = next(stream.batches(None, 4))
    assert images.is_contiguous() and images.shape[1] == 3


def test_stream_batches_are_one_shuffled_pass(streamed):
    data, stream = streamed
    batches = list(stream.batches(seeded(3), 4))
    assert [len(x) for x, _ in batches] == [4, 4, 4, 4, 4, 1]
    assert len(list(stream.batches(seeded(3), 4, drop_last=True))) == 5
    images_seen = torch.cat([x for x, _ in batches]).flatten(1)
    labels_seen = torch.cat([y for _, y in batches])
    whole = data.train.images.flatten(1)
    order = torch.cdist(images_seen, whole).argmin(1)
    assert sorted(order.tolist()) == list(range(21)) and order.tolist() != list(range(21))
    assert torch.equal(labels_seen, data.train.labels[order])
    again = torch.cat([x for x, _ in stream.batches(seeded(3), 4)]).flatten(1)
    assert torch.equal(again, images_seen)
    other = torch.cat([x for x, _ in stream.batches(seeded(4), 4)]).flatten(1)
    assert not torch.equal(other, images_seen)


def test_stream_draws_from_a_class(streamed):
    data, stream = streamed
    drawn = stream.of_class(1, 5, seeded()).flatten(1)
    order = torch.cdist(drawn, data.train.images.flatten(1)).argmin(1)
    assert len(set(order.tolist())) == 5 and (data.train.labels[order] == 1).all()
    refused(lambda: stream.of_class(1, 8, seeded()), "'dog'", "has 7")
    refused(lambda: stream.sample(0, seeded()), "at least 1")


def test_stream_options(streamed):
    _, stream = streamed
    name = f"folder:{stream.paths[0].parents[2]}"
    refused(lambda: lib.data.stream(name), "size=")
    refused(lambda: lib.data.stream(name, size=8, split="trian"), "unknown split 'trian'", "train")
    plain = lib.data.stream(name, size=10)
    torch.testing.assert_close(plain.transform.mean, torch.tensor([0.485, 0.456, 0.406]))
    refused(lambda: lib.data.stream(name, size=8, channels=2), "channels", "1", "3")
    assert lib.data.stream(name, size=8, channels=1).images(torch.tensor([0])).shape == (1, 1, 8, 8)


# --- what evaluation and training of ImageNet classifiers see


@pytest.fixture
def oblong(tmp_path):
    """A wide, a tall and a square image, as PNG."""
    generator = np.random.RandomState(0)
    for k, (width, height) in enumerate(((61, 40), (33, 70), (48, 48))):
        path = tmp_path / "pets" / "train" / ("cat", "cat", "dog")[k] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.randint(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    shutil.copytree(tmp_path / "pets" / "train", tmp_path / "pets" / "test")
    return lib.data.stream(f"folder:{tmp_path / 'pets'}", size=28, resize=32)


def test_stream_resizes_and_crops_as_torchvision(oblong):
    from torchvision import transforms

    seen = transforms.Compose(
        [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(),
         transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )  # fmt: skip
    wanted = torch.stack([seen(Image.open(path)) for path in oblong.paths])
    torch.testing.assert_close(oblong.images(torch.arange(3)), wanted)
    plain = lib.data.stream(f"folder:{oblong.paths[0].parents[2]}", size=28)
    assert not torch.equal(plain.images(torch.arange(3)), oblong.images(torch.arange(3)))
    refused(
        lambda: lib.data.stream(f"folder:{oblong.paths[0].parents[2]}", size=28, resize=20),
        "resize 20 is smaller than size 28",
    )


def test_random_crops_are_cut_from_the_whole_file(oblong):
    """Box by box as torchvision's resized_crop on the file, and some of them reach what a centre square leaves out."""
    from torchvision.transforms import functional

    from lib.augment.views import Crops

    rows = torch.arange(3).repeat(20)
    crops = Crops.draw(torch.full((60,), 0.08), seeded(), flip=True)
    ((x, labels),) = oblong.in_turn([rows], [crops])
    assert x.shape == (60, 3, 28, 28) and labels.tolist() == [0, 0, 1] * 20
    outside = 0
    for k, i in enumerate(rows.tolist()):
        image = Image.open(oblong.paths[i])
        top, left, height, width = crops.box(k, image.height, image.width)
        assert 0 <= top <= image.height - height and 0 <= left <= image.width - width
        outside += left < (image.width - image.height) / 2
        seen = functional.to_tensor(functional.resized_crop(image, top, left, height, width, [28, 28]))
        seen = seen.flip(2) if crops.flips[k] else seen
        torch.testing.assert_close(oblong.transform.inverse(x[k]), seen, rtol=0, atol=1e-6)
    assert outside > 5 and 10 < int(crops.flips.sum()) < 50


def test_crops_of_oblong_images_follow_torchvisions_law():
    """Share of the area uniform, ratios within bounds, corners everywhere; where no try fits, the largest centred box."""
    from torchvision.transforms import RandomResizedCrop

    from lib.augment.views import RATIO, Crops

    crops = Crops.draw(torch.full((4000,), 0.08), seeded())
    boxes = crops.boxes(torch.tensor([[80, 120]]).expand(4000, 2)).double()
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.zeros(3, 80, 120), (0.08, 1), RATIO) for _ in range(4000)]
    theirs = torch.tensor(theirs).double()
    error = 4 * (boxes.var(0) / 4000 + theirs.var(0) / 4000).sqrt()
    assert ((boxes.mean(0) - theirs.mean(0)).abs() < error).all()
    assert ((boxes.std(0) / theirs.std(0) - 1).abs() < 0.1).all()
    strip = Crops.draw(torch.ones(5), seeded()).boxes(torch.tensor([[10, 100]]).expand(5, 2))
    assert strip.tolist() == [[0, 43, 10, 13]] * 5


def gif(path, pictures=3):
    frames = [Image.new("RGB", (8, 8), (40 * k, 0, 0)) for k in range(pictures)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("read", ["load", "stream"])
def test_files_that_are_not_read_are_counted(tmp_path, read):
    """By suffix, in one line for each half; what an operating system puts there is no file of the user's."""
    for half in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / "pets" / half / name / "1.png")
    base = tmp_path / "pets/train"
    gif(base / "a" / "moves.gif")
    for name in (
        "a/photo.HEIC",
        "b/more/other.heic",
        "a/notes.txt",
        "b/README",
        "a/.hidden.gif",
        "a/Thumbs.db",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    save(base / "forgotten.png")
    with pytest.warns(UserWarning) as caught:
        if read == "load":
            data = lib.data.load(f"folder:{tmp_path / 'pets'}")
            assert len(data.train) == 2
        else:
            assert len(lib.data.stream(f"folder:{tmp_path / 'pets'}", size=8)) == 2
    (told,) = [str(one.message) for one in caught]
    assert told.startswith(f"{base}: 6 files are left out: 2 .heic, ") and "\n" not in told
    for words in ("1 .gif", "1 .txt", "1 without a suffix", "1 beside the class folders", "read are .bmp, "):
        assert words in told, told


def test_an_image_astray_makes_no_class_of_a_half(tmp_path):
    """train and test are halves as before; where another folder lies beside train, it is a class, also with folders in it."""
    base = make_folder(tmp_path / "pets")
    plain = lib.data.load(f"folder:{base}").train
    save(base / "train" / "astray.png")
    with pytest.warns(UserWarning, match="1 files are left out: 1 beside the class folders"):
        found = lib.data.load(f"folder:{base}").train
    assert found.classes == ("cat", "dog") and torch.equal(found.images, plain.images)
    for name in ("bus", "train", "train/more"):
        for k in range(2):
            save(tmp_path / "vehicles" / name / f"{k}.png")
    assert lib.data.load(f"folder:{tmp_path / 'vehicles'}").train.classes == ("bus", "train")


def test_files_of_several_pictures_are_counted_and_the_first_is_read(tmp_path):
    for name in ("a", "b"):
        for k in range(3):
            save(tmp_path / "pets" / name / f"{k}.png", value=7)
    gif(tmp_path / "pets/a/moves.webp")
    gif(tmp_path / "pets/b/pages.tiff")
    with pytest.warns(
        UserWarning, match="^2 of 8 files hold several pictures, of which the first one is read: .*, ...$"
    ):
        data = lib.data.load(f"folder:{tmp_path / 'pets'}")
    assert len(data.train) + len(data.test) == 8


def test_nothing_is_said_where_all_is_read(tmp_path, recwarn):
    for name in ("a", "b"):
        for k in range(2):
            save(tmp_path / "pets" / name / f"{k}.png")
        (tmp_path / "pets" / name / ".DS_Store").write_bytes(b"x")
    lib.data.load(f"folder:{tmp_path / 'pets'}")
    assert not recwarn.list
