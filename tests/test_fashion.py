"""Fashion-MNIST from any of its places, and the part of it that is embedded."""

from __future__ import annotations

import gzip
import hashlib
import io

import numpy as np
import pytest
import torch
from test_data_files import refused, sha, write_mnist

import lib.data
from lib import nets
from lib.data import fashion, fashion14
from lib.evaluate import protocol

REAL = pytest.mark.skipif(
    fashion.find(fashion.INSTALLED) is None, reason=f"the real files are not here ({fashion.PACKAGE})"
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Small files in the format of the real ones under tmp_path, known by their hashes; nothing installed."""
    write_mnist(tmp_path, "FashionMNIST")
    folder = tmp_path / "FashionMNIST" / "raw"
    known = {key: (name, sha(folder / name)) for key, (name, _) in fashion.FILES.items()}
    monkeypatch.setattr(fashion, "FILES", known)
    monkeypatch.setattr(fashion, "INSTALLED", tmp_path / "no package")
    return folder


def test_every_place_and_either_form_gives_the_same(files, tmp_path, monkeypatch):
    plain = lib.data.load("fashionmnist", root=tmp_path).train
    packed = tmp_path / "packed"
    packed.mkdir()
    for name, _ in fashion.FILES.values():
        (packed / f"{name}.gz").write_bytes(gzip.compress((files / name).read_bytes()))
    named = lib.data.load("fashionmnist", root=packed).train
    monkeypatch.setattr(fashion, "INSTALLED", packed)
    installed = lib.data.load("fashionmnist", root=tmp_path / "empty").train
    assert plain.fingerprint == named.fingerprint == installed.fingerprint
    assert plain.classes == fashion.CLASSES and plain.shape == (1, 28, 28)


def test_other_bytes_are_refused_and_an_absent_set_says_how_to_get_it(files, tmp_path):
    name = fashion.FILES["test", "labels"][0]
    (files / name).write_bytes((files / name).read_bytes()[:-1] + b"\x07")
    refused(lambda: lib.data.load("fashionmnist", root=tmp_path), files / name, "SHA-256")
    (files / name).unlink()
    (files / f"{name}.gz").write_bytes(b"no gzip")
    refused(lambda: lib.data.load("fashionmnist", root=tmp_path), f"{name}.gz", "damaged")
    refused(
        lambda: lib.data.load("fashionmnist", root=tmp_path / "none"),
        "apt-get install",
        "python -m lib.data",
        "none",
    )


def test_the_embedded_part():
    data = lib.data.load("fashion14")
    assert data.train.counts.tolist() == [1000] * 10 and data.test.counts.tolist() == [200] * 10
    assert data.train.shape == (1, 14, 14) and data.train.classes == fashion.CLASSES and data.train.small
    assert abs(data.train.images.mean()) < 1e-4 and abs(data.train.images.std() - 1) < 1e-3
    pixels = data.train.transform.inverse(data.train.images) * 255
    assert (pixels - pixels.round()).abs().max() < 1e-3 and pixels.round().unique().numel() > 200
    assert "Zalando SE" in fashion14.FILE.with_suffix(".LICENSE").read_text()


def test_fourteen_pixels_become_sixteen_in_a_convnet():
    data = lib.data.load("fashion14").train
    network = nets.make("convnet-d3-w4", data)
    assert network.taps(data.images[:1])[0].shape == (1, 4, 8, 8)
    assert network.embed(data.images[:1]).shape == (1, 4 * 2 * 2)
    assert protocol("cpu-small", data).network == "convnet-d3-w32"
    assert lib.data.load("fashion14", size=28).train.first_padding == 1


def test_halves_are_rounded_means():
    images = np.random.RandomState(0).randint(0, 256, (3, 28, 28)).astype(np.uint8)
    mean = images.reshape(3, 14, 2, 14, 2).astype(float).mean((2, 4))
    assert np.array_equal(fashion14.halved(images), np.floor(mean + 0.5).astype(np.uint8))


@REAL
def test_the_embedded_part_is_made_from_the_real_files():
    halves = fashion.read(fashion.find(fashion.INSTALLED))
    assert [len(labels) for _, labels in halves] == [60_000, 10_000]
    with np.load(io.BytesIO(fashion14.make(halves))) as made, np.load(fashion14.FILE) as stored:
        assert {name: hashlib.sha256(made[name].tobytes()).digest() for name in made} == {
            name: hashlib.sha256(stored[name].tobytes()).digest() for name in stored
        }


@REAL
def test_the_real_files_load():
    data = lib.data.load("fashionmnist", root="nowhere")
    assert data.train.counts.tolist() == [6000] * 10 and data.test.counts.tolist() == [1000] * 10
    assert data.train.first_padding == 3 and not data.train.small
    assert abs(float(data.train.images.mean())) < 2e-3 and torch.isfinite(data.test.images).all()
