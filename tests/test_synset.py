"""The synthetic set in a file and back, bit for bit, and in files of other tools."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import generator, toy_data

from lib.data.whitening import ZCA, PerImageZCA, Standardise
from lib.evaluate import evaluate, protocol
from lib.formation import Pixels
from lib.formation.mosaic import Mosaic, expand
from lib.synset import SyntheticSet, check_ipc, class_major, read_safetensors
from lib.synset.export import eight_bit_loss, folder_names, to_bytes
from lib.system.errors import CompanionError

CLASSES = ("cat", "dog", "owl")


def transforms(channels=3):
    pixels = torch.rand(200, channels, 6, 6, generator=generator(1))
    return {
        "standardise": Standardise.fit(pixels),
        "zca": ZCA.fit(pixels, eps=0.2),
        "zca-kip": PerImageZCA.fit(pixels),
    }


def make(kind="standardise", channels=3, soft=False, spread=1.0, **more) -> SyntheticSet:
    codes = spread * torch.randn(6, channels, 6, 6, generator=generator())
    labels = class_major(3, 2, "cpu")
    if soft:
        labels = torch.randn(6, 3, generator=generator(2)).add_(4 * torch.eye(3)[labels]).softmax(1)
    return SyntheticSet(codes, labels, CLASSES, transforms(channels)[kind], **more)


FULL = {
    "weights": torch.rand(6, generator=generator(3)),
    "indices": torch.randperm(6, generator=generator(4)),
    "step_size": torch.tensor([0.0123456789]),
    "meta": {"method": "DM", "config": {"lr": 0.1, "names": ["a", "b"]}, "seed": 3, "dataset": "toy"},
}


def message(call, *arguments) -> str:
    with pytest.raises(CompanionError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- safetensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standardise", "zca", "zca-kip"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("more", [{}, FULL], ids=["bare", "full"])
def test_round_trip_is_exact(kind, soft, more, tmp_path):
    synset = make(kind, soft=soft, **more)
    back = SyntheticSet.load(synset.save(tmp_path / "deep" / "set.safetensors"))
    for name in ("codes", "labels", "weights", "indices", "step_size"):
        mine, theirs = getattr(synset, name), getattr(back, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (torch.equal(mine, theirs) and mine.dtype == theirs.dtype)
    assert back.classes == CLASSES and back.meta == synset.meta and back.decoder == synset.decoder
    assert (
        type(back.transform) is type(synset.transform)
        and back.transform.config() == synset.transform.config()
    )
    for name, tensor in synset.transform.tensors().items():
        assert torch.equal(tensor, back.transform.tensors()[name])
    assert torch.equal(back.viewable(), synset.viewable())
    assert back.header() == synset.header()


def test_the_file_says_what_it_is(tmp_path):
    header, tensors = read_safetensors(make("zca", **FULL).save(tmp_path / "s"))
    about = json.loads(header["about"])
    assert header["format"].startswith("distillation-companion/") and about["classes"] == list(CLASSES)
    assert about["transform"]["kind"] == "zca" and about["transform"]["eps"] == 0.2
    assert about["value_range"] == "whitened" and about["meta"]["seed"] == 3
    assert {"codes", "labels", "transform.mean", "transform.matrix"} < tensors.keys()


def test_saving_detaches(tmp_path):
    synset = make()
    synset.codes.requires_grad_()
    assert not SyntheticSet.load(synset.save(tmp_path / "s")).codes.requires_grad


def test_damaged_truncated_and_foreign_files(tmp_path):
    path = make(**FULL).save(tmp_path / "s")
    whole = path.read_bytes()
    for content in (
        b"",
        b"PK nonsense",
        whole[:8],
        whole[:60],
        whole[: len(whole) // 2],
        whole[:-1],
        whole + b"x",
    ):
        path.write_bytes(content)
        assert "damaged or no safetensors file" in message(SyntheticSet.load, path)
        assert str(path) in message(SyntheticSet.load, path)
    assert "no file" in message(SyntheticSet.load, tmp_path / "missing")
    assert "no file" in message(SyntheticSet.load, tmp_path)
    foreign = tmp_path / "foreign"
    safetensors.torch.save_file({"weight": torch.ones(2)}, foreign)
    assert "not a synthetic set" in message(SyntheticSet.load, foreign)
    safetensors.torch.save_file({"weight": torch.ones(2)}, foreign, metadata={"format": "pt"})
    assert "'pt'; allowed: 'distillation-companion/1'" in message(SyntheticSet.load, foreign)


def test_incomplete_headers_and_tensors(tmp_path):
    header, tensors = read_safetensors(make().save(tmp_path / "s"))
    about = json.loads(header["about"])

    def load(tensors=tensors, **changed):
        return SyntheticSet.from_parts(header | {"about": json.dumps(about | changed)}, tensors, "f")

    load()
    without = {name: tensor for name, tensor in tensors.items() if name != "codes"}
    assert "f is damaged" in message(load, without)
    assert "f is damaged" in message(load, tensors | {"surprise": torch.ones(1)})
    assert "lacks mean" in message(load, {k: v for k, v in tensors.items() if k != "transform.mean"})
    assert "unknown decoder 'jpeg'" in message(lambda: load(decoder={"name": "jpeg"}))
    assert "unknown transform 'pca'" in message(lambda: load(transform={"kind": "pca"}))
    assert "f is damaged" in message(lambda: load(decoder="pixels"))
    assert "f is damaged" in message(lambda: load(decoder={"name": "pixels", "factor": 2}))
    assert "f is damaged" in message(SyntheticSet.from_parts, {"format": header["format"]}, tensors, "f")
    assert "f is damaged" in message(SyntheticSet.from_parts, header | {"about": "{"}, tensors, "f")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = make(**FULL).save(tmp_path / "s")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        said = message(make().save, path)
        export = message(make().export, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {path}" in said and "File too large" in said
    assert "cannot export to" in export and "File too large" in export
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in message(make().save, tmp_path / "file" / "s")
    assert "cannot export" in message(make().export, tmp_path / "file" / "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in message(make().save, tmp_path / "closed" / "s")
    assert "Permission denied" in message(make().export, tmp_path / "closed" / "s")


# -- sizes and views ----------------------------------------------------------------------------------------------------


def test_bytes():
    assert make().bytes_images == 6 * 3 * 6 * 6 * 4 and make().bytes_labels == 6
    assert make(soft=True).bytes_labels == 6 * 3 * 4
    for classes, each in ((1, 1), (2, 1), (256, 1), (257, 2), (1000, 2), (65536, 2), (65537, 3)):
        synset = replace(make(), classes=tuple(map(str, range(classes))))
        assert synset.bytes_labels == 6 * each


def test_views():
    synset = make(soft=True, spread=3)
    assert synset.soft and synset.ipc == 2 and torch.equal(synset.hard_labels, class_major(3, 2, "cpu"))
    free = synset.transform.inverse(synset.codes)
    assert free.min() < 0 and free.max() > 1
    assert torch.equal(synset.viewable(), free.clamp(0, 1))
    moved = make(**FULL).to("cpu")
    assert torch.equal(moved.weights, FULL["weights"]) and moved.meta == FULL["meta"]


@pytest.mark.parametrize("kind", ["standardise", "zca", "zca-kip"])
def test_looking_undoes_the_preprocessing(kind):
    transform = transforms()[kind]
    pixels = torch.rand(6, 3, 6, 6, generator=generator(5)) * 0.8 + 0.1
    known = transform.statistics(pixels) if kind == "zca-kip" else ()
    back = transform.inverse(transform.forward(pixels), *known)
    torch.testing.assert_close(back, pixels, rtol=0, atol=2e-4)


# -- mosaics ------------------------------------------------------------------------------------------------------------


def test_mosaics_are_stored_as_they_are_and_trained_on_decoded(tmp_path):
    synset = make(decoder=Mosaic(2), **FULL | {"weights": None, "indices": None})
    assert synset.ipc == 2 and synset.bytes_images == make().bytes_images and synset.bytes_labels == 6
    assert synset.images.shape == (24, 3, 6, 6) and synset.targets.tolist() == 4 * [0, 0, 1, 1, 2, 2]
    assert torch.equal(synset.images, expand(synset.codes, 2)) and synset.viewable().shape == (24, 3, 6, 6)
    back = SyntheticSet.load(synset.save(tmp_path / "s"))
    assert back.decoder == Mosaic(2) and torch.equal(back.codes, synset.codes)
    assert torch.equal(back.images, synset.images) and torch.equal(back.targets, synset.targets)
    assert read_safetensors(tmp_path / "s")[1]["codes"].shape == (6, 3, 6, 6)


@pytest.mark.parametrize("soft", [False, True])
def test_what_is_stored_can_be_looked_at(soft):
    plain, mosaic = make(soft=soft, spread=3), make(soft=soft, spread=3, decoder=Mosaic(3))
    assert torch.equal(plain.stored()[0], plain.viewable())
    for synset in (plain, mosaic):
        images, labels = synset.stored()
        assert torch.equal(images, synset.transform.inverse(synset.codes).clamp(0, 1))
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(mosaic.hard_labels) == 54


def test_codes_that_are_no_images_are_shown_decoded():
    class Double:
        def __call__(self, codes):
            return codes.repeat(1, 1, 2, 2)

        def labels(self, labels):
            return labels

    synset = make(decoder=Double())
    assert synset.stored()[0].shape == (6, 3, 12, 12)
    assert torch.equal(synset.stored()[0], synset.viewable())


@pytest.mark.parametrize("soft", [False, True])
def test_mosaics_are_exported_decoded(soft, tmp_path):
    from torchvision.datasets import ImageFolder

    synset = make(soft=soft, decoder=Mosaic(2))
    out = synset.export(tmp_path / "out")
    folder, want = ImageFolder(out / "train"), to_bytes(synset.viewable())
    assert len(folder) == 24
    for path, label in folder.samples:
        i = int(os.path.basename(path)[:-4])
        assert label == synset.hard_labels[i] and (np.asarray(folder.loader(path)) == want[i]).all()
    assert "24 images for 3 classes (2 stored per class, 2592 bytes of" in (out / "README.md").read_text()


def test_mosaics_are_evaluated_decoded():
    """A set of mosaics counts as the set of its cells, enlarged."""
    data = toy_data()
    codes, labels = data.train.sample(2, generator(3)).flatten(0, 1), class_major(3, 2, "cpu")
    mosaic = SyntheticSet(codes, labels, data.train.classes, data.train.transform, Mosaic(2))
    plain = replace(mosaic, codes=expand(codes, 2), labels=labels.repeat(4), decoder=Pixels())
    small = protocol("cpu-small", network="convnet-d2-w4", epochs=12, lr=0.1)
    one, other = (evaluate(synset, data, small, 0, 2).accuracy for synset in (mosaic, plain))
    assert torch.equal(one, other)
    assert not torch.equal(one, evaluate(replace(mosaic, decoder=Pixels()), data, small, 0, 2).accuracy)


# -- export -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_image_folder(kind, channels, tmp_path):
    from torchvision.datasets import ImageFolder

    synset = make(kind, channels)
    folder = ImageFolder(synset.export(tmp_path / "out") / "train")
    assert [name.split("_", 1)[1] for name in folder.classes] == list(CLASSES)
    assert len(folder) == 6
    want = to_bytes(synset.viewable())
    for path, label in folder.samples:
        i = int(os.path.basename(path)[:-4])
        assert label == synset.labels[i]
        pixels = np.asarray(folder.loader(path))
        assert pixels.shape == (6, 6, 3)  # ImageFolder reads grey images as RGB
        assert (pixels == want[i]).all()


@pytest.mark.parametrize("soft", [False, True])
def test_parquet(soft, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    synset = make(soft=soft)
    table = pq.read_table(synset.export(tmp_path / "out") / "train.parquet")
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("label").type == pa.int64()
    assert table["label"].to_pylist() == synset.hard_labels.tolist()
    want = to_bytes(synset.viewable())
    for i, image in enumerate(table["image"].to_pylist()):
        assert (np.asarray(Image.open(io.BytesIO(image["bytes"]))) == want[i]).all()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and len(features["label"]["names"]) == 3
    assert list(features) == table.column_names
    if soft:
        assert table.schema.field("soft_label").type == pa.list_(pa.float32(), 3)
        assert torch.equal(torch.tensor(table["soft_label"].to_pylist()), synset.labels)
        assert features["soft_label"]["length"] == 3
    else:
        assert "soft_label" not in table.column_names


@pytest.mark.parametrize("kind", ["standardise", "zca"])
@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_the_stated_eight_bit_loss_is_what_reading_back_gives(kind, spread, tmp_path):
    from PIL import Image

    synset = make(kind, spread=spread)
    out = synset.export(tmp_path / "out")
    read = {int(p.stem): torch.from_numpy(np.array(Image.open(p))) for p in out.glob("train/*/*.png")}
    pixels = torch.stack([read[i] for i in range(6)]).permute(0, 3, 1, 2) / 255
    rms = (synset.transform.forward(pixels) - synset.codes).square().mean().sqrt().item()
    free = synset.transform.inverse(synset.codes)
    clipped = ((free < 0) | (free > 1)).double().mean().item()
    loss = eight_bit_loss(synset)
    assert loss["rms"] == pytest.approx(rms, rel=1e-4) and loss["clipped"] == pytest.approx(clipped)
    card = (out / "README.md").read_text()
    assert f"RMS error {rms:.4f}" in card and f"{100 * clipped:.2f} % of the values clipped" in card
    if spread == 0.2 and kind == "standardise":  # nothing is clipped: only rounding is lost
        assert clipped == 0 and rms < 0.5 / 255 / synset.transform.std.min()


def test_export_refuses_a_folder_with_something_in_it(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    make().export(out)  # an empty one is fine
    before = sorted(p.name for p in out.rglob("*"))
    assert "not an empty folder" in message(make().export, out)
    assert sorted(p.name for p in out.rglob("*")) == before
    (tmp_path / "file").write_text("kept")
    assert "not an empty folder" in message(make().export, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept" and {p.name for p in tmp_path.iterdir()} == {
        "out",
        "file",
    }


def test_class_names_cannot_leave_the_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    names = (
        "../../x",
        "a/b",
        "/etc",
        "..",
        "",
        "naïve 日本",
        "a/b",
        "x" * 300,
        "con\x00\n",
        "-rf",
        ".hidden",
    )
    synset = SyntheticSet(torch.zeros(11, 1, 4, 4), torch.arange(11), names, transforms(1)["standardise"])
    out = synset.export(tmp_path / "inner" / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"inner"} and {
        p.name for p in (tmp_path / "inner").iterdir()
    } == {"out"}
    assert {p.name for p in out.iterdir()} == {
        "train", "train.parquet", "README.md", "set.safetensors", "images.csv", "classes.csv"
    }  # fmt: skip
    folders = sorted(p.name for p in (out / "train").iterdir())
    assert folders == folder_names(names) and len(set(folders)) == 11
    assert all("/" not in name and name[0].isdigit() and len(name.encode()) < 200 for name in folders)
    assert ImageFolder(out / "train").targets == list(range(11))


def rows_of(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_mangled_class_names_keep_their_mapping(tmp_path):
    import pyarrow.parquet as pq

    names = ("a/b", "naïve 日本 $x$", 'say "no", twice')
    synset = replace(make(), classes=names)
    out = synset.export(tmp_path / "out")
    rows = rows_of(out / "classes.csv")
    assert tuple(row["class"] for row in rows) == names
    assert [row["folder"] for row in rows] == sorted(p.name for p in (out / "train").iterdir())
    assert [(int(row["label"]), int(row["images"])) for row in rows] == [(0, 2), (1, 2), (2, 2)]
    features = json.loads(pq.read_schema(out / "train.parquet").metadata[b"huggingface"])["info"]["features"]
    assert tuple(features["label"]["names"]) == names


@pytest.mark.parametrize("kind", ["standardise", "zca", "zca-kip"])
def test_an_export_drops_nothing(kind, tmp_path):
    """Weights, positions, soft labels, step sizes, the formation and the numbers of the preprocessing: exactly, and by table."""
    import pyarrow.parquet as pq

    synset = make(kind, soft=True, decoder=Mosaic(2), **FULL)
    out = synset.export(tmp_path / "out")
    back = SyntheticSet.load(out / "set.safetensors")
    for name, tensor in synset.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert back.header() == synset.header()
    table, rows = pq.read_table(out / "train.parquet"), rows_of(out / "images.csv")
    for name, want in (("weight", synset.weights), ("index", synset.indices)):
        want = want.repeat(4)  # of the cells of the mosaics
        assert torch.equal(torch.tensor(table[name].to_pylist(), dtype=want.dtype), want)
        assert torch.equal(torch.tensor([float(row[name]) for row in rows]).to(want.dtype), want)
    for row, png in zip(rows, table["image"].to_pylist(), strict=True):
        assert (out / row["file"]).read_bytes() == png["bytes"] and row["class"] in row["file"]
    card = (out / "README.md").read_text()
    assert "0.0123456789"[:8] in card and '"factor": 2' in card and "weighted" in card
    said = json.loads(re.search("^Preprocessing: `(.*)`$", card, re.M)[1])
    for name, tensor in synset.transform.tensors().items():
        where = f"transform.{name} in set.safetensors"
        assert where in said[name] if tensor.numel() > 64 else torch.equal(torch.tensor(said[name]), tensor)


def test_the_card_alone_is_enough_to_preprocess(tmp_path):
    """(x - mean) / std with the numbers of the card gives the training images, but for the rounding that it states."""
    from PIL import Image

    synset = make(spread=0.2)
    out = synset.export(tmp_path / "out")
    said = json.loads(re.search("^Preprocessing: `(.*)`$", (out / "README.md").read_text(), re.M)[1])
    mean, std = (torch.tensor(said[name])[:, None, None] for name in ("mean", "std"))
    pixels = [np.array(Image.open(out / row["file"])) for row in rows_of(out / "images.csv")]
    x = (torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
    assert (x - synset.images).abs().max() <= 0.51 / 255 / std.min()


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_class_without_images(empty, tmp_path):
    from torchvision.datasets import ImageFolder

    synset, keep = make(), make().labels != empty
    synset = replace(synset, codes=synset.codes[keep], labels=synset.labels[keep])
    said = message(synset.export, tmp_path / "out")
    assert f"the class {CLASSES[empty]!r} has no image" in said and "allow_empty=True" in said
    assert list(tmp_path.iterdir()) == []
    out = synset.export(tmp_path / "out", allow_empty=True)
    assert sorted(ImageFolder(out / "train", allow_empty=True).targets) == synset.labels.tolist()
    assert "1 of 3 classes have no image" in (out / "README.md").read_text()


def test_two_exports_at_once_leave_one(tmp_path, monkeypatch):
    """The second finds the folder that was not there when it began."""
    out, real = tmp_path / "out", os.rename

    def late(source, target):
        if not out.exists():
            monkeypatch.setattr(os, "rename", real)
            make(spread=2.0).export(out)
        return real(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert "cannot export" in message(make().export, out)
    assert torch.equal(SyntheticSet.load(out / "set.safetensors").codes, make(spread=2.0).codes)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_meta_of_other_libraries_is_kept_as_plain_values(tmp_path):
    meta = {"rate": np.float32(0.5), "steps": np.int64(3), "path": torch.tensor([1.0, 2.0])}
    back = SyntheticSet.load(make(meta=meta).save(tmp_path / "s"))
    assert back.meta == {"rate": 0.5, "steps": 3, "path": [1.0, 2.0]}
    assert "the meta of a set holds a set; allowed" in message(make(meta={"x": {1}}).save, tmp_path / "t")


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_weights_of_mosaics_count_for_every_cell(labels):
    data = toy_data()
    codes, hard = data.train.sample(2, generator(3)).flatten(0, 1), class_major(3, 2, "cpu")
    given = hard if labels == "hard" else torch.eye(3)[hard]
    weights = torch.tensor([1.0, 5.0, 2.0, 1.0, 9.0, 3.0])
    mosaic = SyntheticSet(codes, given, data.train.classes, data.train.transform, Mosaic(2), weights=weights)
    plain = replace(
        mosaic, codes=mosaic.images, labels=mosaic.targets, weights=mosaic.image_weights, decoder=Pixels()
    )
    assert mosaic.image_weights.tolist() == 4 * weights.tolist()
    small = protocol("cpu-small", network="convnet-d2-w4", epochs=6, lr=0.1)
    one, other = (evaluate(synset, data, small, 0, 2).accuracy for synset in (mosaic, plain))
    assert torch.equal(one, other)


def test_order_of_many_classes_is_the_label_order():
    names = folder_names(tuple(f"c{i}" for i in range(1000)))
    assert names == sorted(names) and names[7] == "007_c7"


# -- ipc ----------------------------------------------------------------------------------------------------------------


def test_ipc():
    assert check_ipc(1) == 1 and check_ipc(20, 20) == 20
    for bad in (0, -1, 1.5, True, "3", None):
        assert f"ipc {bad!r} is not allowed" in message(check_ipc, bad)
    assert "ipc 21 is larger than the smallest class: allowed 1 to 20" in message(check_ipc, 21, 20)


def test_class_major():
    assert class_major(3, 2, "cpu").tolist() == [0, 0, 1, 1, 2, 2]
