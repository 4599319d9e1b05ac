"""HaBa's hallucinators: affine renderers whose numbers are stored with a set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator

from lib.data.whitening import Standardise
from lib.formation import Hallucinators
from lib.synset import SyntheticSet, class_major
from lib.synset import read_safetensors as read
from lib.system.errors import CompanionError
from lib.system.files import write_tensors

SHAPE = (3, 8, 8)


def made(count=3, bases=3, shape=SHAPE, **more):
    return Hallucinators.make(count, bases, shape, generator(1), **more)


def codes(n=4, bases=3, seed=0):
    return torch.randn(n, bases, *SHAPE[1:], generator=generator(seed))


def the_set(decoder, n=4):
    transform = Standardise(torch.full((3,), 0.5), torch.full((3,), 0.25))
    return SyntheticSet(codes(n), class_major(2, n // 2, "cpu"), ("a", "b"), transform, decoder)


def test_the_identity_passes_a_basis_on_inside_its_border():
    z = codes()
    images = made(identity=1.0).render(z)
    assert images.shape == (3, 4, *SHAPE)
    torch.testing.assert_close(images[..., 1:-1, 1:-1], z[..., 1:-1, 1:-1].expand(3, -1, -1, -1, -1))
    assert images[..., 0, :].abs().max() == 0


@pytest.mark.parametrize("bases", [1, 3])
def test_a_hallucinator_is_affine_and_knows_nothing_of_the_others(bases):
    H, z, other = made(bases=bases), codes(bases=bases), codes(bases=bases, seed=5)
    offset = H.render(torch.zeros_like(z))
    mixed = H.render(0.3 * z + 2 * other) - offset
    torch.testing.assert_close(mixed, 0.3 * (H.render(z) - offset) + 2 * (H.render(other) - offset))
    alone = replace(H, **{name: tensor[1:2] for name, tensor in H.numbers.items()})
    torch.testing.assert_close(alone.render(z)[0], H.render(z)[1])
    torch.testing.assert_close(H(z), H.render(z).flatten(0, 1))


def test_the_published_start_is_pytorchs_law():
    """A random 3 -> 3 map within its bounds; at a = 0.8 a fifth of it around the identity."""
    H, near = made(500), made(500, identity=0.8)
    assert H.enc_weight.abs().max() <= 27**-0.5 and H.enc_weight.std() == pytest.approx(81**-0.5, rel=0.05)
    assert H.scale.eq(1).all() and H.shift.eq(0).all()
    centre = near.enc_weight[:, :, :, 1, 1].mean(0)
    torch.testing.assert_close(centre, 0.8 * torch.eye(3), rtol=0, atol=0.02)


def test_what_is_stored_is_counted_and_found_again(tmp_path):
    H = Hallucinators.make(5, 3, (3, 32, 32), generator(0))
    assert sum(tensor.numel() for tensor in H.numbers.values()) == 5 * 5568
    assert H.extra_bytes == 4 * 5 * 5568
    synset = the_set(made())
    assert synset.bytes_images == synset.codes.numel() * 4 + made().extra_bytes
    found = SyntheticSet.load(synset.save(tmp_path / "set.safetensors"))
    assert torch.equal(found.images, synset.images) and torch.equal(found.targets, synset.targets)
    assert len(found.targets) == 12 and found.bytes_images == synset.bytes_images
    header, tensors = read(tmp_path / "set.safetensors")  # no code of ours is needed to read the numbers
    assert torch.equal(tensors["decoder.scale"], synset.decoder.scale) and "hallucinators" in header["about"]
    moved = synset.to("cpu")
    assert torch.equal(moved.images, synset.images)


def test_a_file_without_its_numbers_is_refused_in_one_line(tmp_path):
    synset = the_set(made())
    tensors = synset.tensors()
    del tensors["decoder.scale"]
    write_tensors(tmp_path / "less.safetensors", tensors, synset.header())
    with pytest.raises(CompanionError, match="damaged.*scale") as caught:
        SyntheticSet.load(tmp_path / "less.safetensors")
    assert "\n" not in str(caught.value)


def test_wrong_values_are_one_line():
    with pytest.raises(CompanionError, match="identity 2 of hallucinators: allowed 0 to 1"):
        made(identity=2)
    with pytest.raises(CompanionError, match="for 2x2 images: allowed from 3x3 on"):
        made(shape=(3, 2, 2))
    with pytest.raises(CompanionError, match=r"bases of shape \(3, 8, 8\), not \(1, 8, 8\)"):
        made().check((1, 8, 8))


def test_grey_bases_start_from_the_mean_of_the_channels():
    images = torch.randn(1, 4, *SHAPE, generator=generator(2))
    assert torch.equal(made(bases=1).pack(images), images[0].mean(1, keepdim=True))
    assert torch.equal(made().pack(images), images[0])
