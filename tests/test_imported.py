"""Sets that others released: every layout, and every mistake in one line."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import generator, toy_data
from PIL import Image

from lib.data import load
from lib.data.whitening import WHITENINGS
from lib.evaluate.__main__ import main
from lib.synset import SyntheticSet, class_major
from lib.synset.imported import Released, all_in, read, synsets
from lib.system.errors import CompanionError


@pytest.fixture(scope="module")
def like():
    return toy_data(channels=3).train


def refused(call, *texts: str) -> None:
    with pytest.raises(CompanionError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


def images(ipc: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(3 * ipc, 3, 8, 8, generator=generator(seed))


X, Y = images(), class_major(3, 2, "cpu")


@pytest.mark.parametrize(
    "content",
    [
        {"data": [[X, Y]], "accs_all_exps": {"ConvNet": [0.5]}},
        {"data": [[X, Y]], "accs_all_exps": OrderedDict(ConvNet=[np.float64(0.5), np.int64(3)])},
        [X, Y],
        (X.double(), Y.int()),
        {"images": X, "labels": Y},
        {"image_syn": X.clone().requires_grad_(), "label_syn": Y, "lr": torch.tensor(0.1)},
        X,  # classes in their order
    ],
    ids=["dc", "dc with NumPy's numbers", "idc", "doubles", "names", "other names", "images only"],
)
def test_layouts_of_tensors(like, tmp_path, content):
    torch.save(content, tmp_path / "set.pt")
    (found,) = synsets(tmp_path / "set.pt", like)
    assert torch.equal(found.codes, X) and torch.equal(found.labels, Y) and not found.codes.requires_grad
    assert found.ipc == 2 and found.classes == like.classes and found.meta["space"] == "normalised"
    back = SyntheticSet.load(found.save(tmp_path / "set.safetensors"))
    (again,) = synsets(tmp_path / "set.safetensors", like)
    assert torch.equal(back.codes, again.codes) and torch.equal(again.codes, X)


def test_every_run_of_a_file_is_a_set(like, tmp_path):
    torch.save({"data": [[images(2, k), Y] for k in range(3)]}, tmp_path / "set.pt")
    found = synsets(tmp_path / "set.pt", like)
    assert len(found) == 3 and torch.equal(found[2].codes, images(2, 2))


def test_mtt_has_two_files_and_kip_has_arrays_with_channels_last(like, tmp_path):
    torch.save(X, tmp_path / "images_best.pt")
    torch.save(Y.flip(0), tmp_path / "labels_best.pt")
    (found,) = synsets(tmp_path / "images_best.pt", like, labels=tmp_path / "labels_best.pt")
    assert torch.equal(found.labels, Y.flip(0))
    soft = torch.rand(6, 3, generator=generator()).numpy()
    np.savez(tmp_path / "kip.npz", images=X.permute(0, 2, 3, 1).numpy(), labels=soft)
    (found,) = synsets(tmp_path / "kip.npz", like)
    assert torch.equal(found.codes, X) and torch.equal(found.labels, torch.from_numpy(soft)) and found.soft


@pytest.mark.parametrize("kind", WHITENINGS)
def test_whitened_sets_are_judged_in_their_own_space(tmp_path, kind):
    """Real images whitened elsewhere by the same recipe are those that the data show, and no other space takes them."""
    plain, white = load("digits"), load("digits", whiten=kind)
    pixels = plain.train.transform.inverse(plain.train.images)
    outside = WHITENINGS[kind].fit(pixels).forward(pixels[:10])
    torch.save([outside, plain.train.labels[:10]], tmp_path / "set.pt")
    (found,) = synsets(tmp_path / "set.pt", white.train, kind)
    torch.testing.assert_close(found.images, white.train.images[:10], rtol=1e-4, atol=1e-4)
    assert found.transform is white.train.transform and found.meta["space"] == kind
    refused(
        lambda: synsets(tmp_path / "set.pt", plain.train, kind),
        "the data are standardise",
        f"whiten={kind!r}",
    )


def test_pixels_in_the_unit_interval(like, tmp_path):
    unit = torch.rand(6, 3, 8, 8, generator=generator())
    torch.save([unit, Y], tmp_path / "set.pt")
    (found,) = synsets(tmp_path / "set.pt", like, "unit")
    assert torch.allclose(like.transform.inverse(found.codes), unit, atol=1e-6)
    refused(lambda: synsets(tmp_path / "set.pt", like), "all values lie in [0, 1]: read it as the space unit")
    torch.save([(unit * 255).to(torch.uint8), Y], tmp_path / "bytes.pt")
    (found,) = synsets(tmp_path / "bytes.pt", like)
    assert torch.allclose(like.transform.inverse(found.codes), unit, atol=1 / 255)
    torch.save([X, Y], tmp_path / "other.pt")
    refused(
        lambda: synsets(tmp_path / "other.pt", like, "unit"), "are not of the space unit; allowed: [0, 1]"
    )


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ({"pictures": X, "labels": Y}, ["has the keys pictures, labels; needed: data with runs"]),
        ({"images": X}, ["has the keys images", "with one of labels, label_syn"]),
        ([X], ["holds a list of 1"]),
        ("text", ["holds a str"]),
        ([X[:, :1], Y], ["images are (6, 1, 8, 8), those of the data (m, 3, 8, 8)"]),
        ([X[0], Y], ["images are (3, 8, 8); allowed: a tensor (m, 3, 8, 8)"]),
        ([X, Y[:5]], ["labels are (5,); allowed: (6,) class indices or (6, 3)"]),
        ([X, Y + 1], ["labels from 1 to 3; allowed: whole numbers from 0 to 2"]),
        ([X, Y + 0.5], ["labels from 0.5 to 2.5"]),
        ([X * float("nan"), Y], ["finite floating point numbers"]),
        (X[:5], ["5 images without labels, which do not divide among 3 classes"]),
    ],
)
def test_mistakes_in_files(like, tmp_path, content, texts):
    torch.save(content, tmp_path / "set.pt")
    refused(lambda: synsets(tmp_path / "set.pt", like), *texts)


class Trap:
    def __reduce__(self):
        return print, ("executed",)


def test_pickled_code_is_not_executed(like, tmp_path, capsys):
    torch.save({"data": [[X, Y]], "args": Trap()}, tmp_path / "set.pt")
    refused(lambda: synsets(tmp_path / "set.pt", like), "holds pickled code", "print")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    refused(lambda: synsets(tmp_path / "plain.pt", like), "plain.pt")
    np.savez(tmp_path / "set.npz", images=np.array([Trap()], dtype=object), labels=np.zeros(1))
    refused(lambda: synsets(tmp_path / "set.npz", like), "holds other things than arrays")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "set.pt").read_bytes()[:200])
    refused(lambda: synsets(tmp_path / "cut.pt", like), "cut.pt is damaged")
    refused(lambda: synsets(tmp_path / "absent.pt", like), "no file or folder")
    refused(lambda: synsets(tmp_path / "set.pt", like, "whitened"), "unknown space 'whitened'")
    assert "executed" not in capsys.readouterr().out


# -- folders -----------------------------------------------------------------------------------------------------------------


def folders(base, names, suffix="png", side=8):
    levels = torch.randint(0, 256, (len(names), 2, side, side, 3), generator=generator(), dtype=torch.uint8)
    for name, pair in zip(names, levels, strict=True):
        (base / name).mkdir(parents=True)
        for k, one in enumerate(pair):
            Image.fromarray(one.numpy()).save(base / name / f"{k}.{suffix}")
    return levels.permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(
    "names", [("class 2", "class 0", "class 1"), ("new002", "new000", "new001"), ("2_c", "0_a", "1_b")]
)
def test_folders_by_class_or_number(like, tmp_path, names):
    levels = folders(tmp_path / "set", names)
    (found,) = synsets(tmp_path / "set", like)
    order = [1, 2, 0]
    wanted = levels[order].flatten(0, 1)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.allclose(like.transform.inverse(found.codes) * 255, wanted.float(), atol=1e-3)
    raw = read(tmp_path / "set", like.name, like.classes, like.shape)
    assert isinstance(raw, Released) and torch.equal(raw.images, wanted) and raw.images.dtype == torch.uint8


def test_larger_files_are_scaled_and_jpeg_is_read(like, tmp_path):
    folders(tmp_path / "set", like.classes, "JPEG", side=20)
    (found,) = all_in(tmp_path / "set", like.name, like.classes, like.shape)
    assert found.images.shape == (6, 3, 8, 8)


def test_an_exported_set_comes_back(like, tmp_path):
    made = SyntheticSet(like.images[:6].clamp(-2, 2), Y, like.classes, like.transform)
    made.export(tmp_path / "export")
    (found,) = synsets(tmp_path / "export", like)
    assert (found.codes - made.codes).abs().max() < 0.01 and torch.equal(found.labels, Y)


def test_mistakes_in_folders(like, tmp_path):
    folders(tmp_path / "two", like.classes[:2])
    refused(lambda: synsets(tmp_path / "two", like), "has 2 class folders, the data 3 classes")
    folders(tmp_path / "other", ("class 0", "class 1", "dog"))
    refused(lambda: synsets(tmp_path / "other", like), "the folder 'dog' is no class of", "numbered 0 to 2")
    folders(tmp_path / "empty", like.classes)
    for path in (tmp_path / "empty" / "class 1").iterdir():
        path.unlink()
    refused(lambda: synsets(tmp_path / "empty", like), "class 1 has no readable image")
    torch.save([X, Y], tmp_path / "set.pt")
    refused(
        lambda: read(tmp_path / "set.pt", "toy", like.classes, like.shape), "neither a folder of images nor"
    )
    made = SyntheticSet(X, Y, ("a", "b", "c"), like.transform)
    refused(lambda: synsets(made.save(tmp_path / "s.safetensors"), like), "'a' there, 'class 0' here")


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_the_command_judges_a_released_set(tmp_path, capsys):
    train = load("digits").train
    rows = torch.cat([(train.labels == c).nonzero().flatten()[:3] for c in range(10)])
    torch.save({"data": [[train.images[rows], train.labels[rows]]] * 2}, tmp_path / "set.pt")
    words = [
        str(tmp_path / "set.pt"),
        "--data",
        "digits",
        "--protocol",
        "cpu-small",
        "--networks",
        "2",
        "--device",
        "cpu",
    ]
    assert main([*words, "--set", "epochs=40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 sets of 30 images, digits, space normalised" in lines[0] and "41 epochs" in lines[1]
    accuracy = float(lines[2].split("hard labels: ")[1].split()[0])
    assert accuracy > 60 and "(2 sets x 2 networks)" in lines[2]
    refused(lambda: main([*words, "--set", "epochs"]), "expected NAME=VALUE, not 'epochs'")
    refused(lambda: main([*words[:2], "digit"]), "unknown dataset 'digit' (did you mean 'digits'?)")
    refused(lambda: main([words[0]]), "--data")


def test_weights_of_an_exported_coreset_are_read_with_its_images(tmp_path):
    data = toy_data()
    codes = data.train.sample(2, generator(3)).flatten(0, 1)
    weights = torch.tensor([141.0, 1.0, 142.0, 4.0, 0.5, 7.0])
    synset = SyntheticSet(
        codes, class_major(3, 2, "cpu"), data.train.classes, data.train.transform, weights=weights
    )
    (found,) = synsets(synset.export(tmp_path / "out"), data.train)
    assert found.weights.tolist() == weights.tolist()
    assert torch.equal(found.labels, synset.labels)
    (tmp_path / "out/images.csv").write_text("file,weight\nx.png,1\n")
    with pytest.raises(CompanionError, match="does not fit the images beside it"):
        synsets(tmp_path / "out", data.train)
