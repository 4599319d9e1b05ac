"""Minimax diffusion and its priors: what the criteria change and what they do not, phases, files of weights, settings."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import check_missing, generator, toy_data, with_fields

from lib.data import subsets
from lib.distill import distill
from lib.methods import recipes
from lib.methods.minimax import DIFFFIT, Minimax
from lib.nets.generators import denoiser
from lib.nets.generators.denoiser import LatentDiT, PixelUNet, denoising
from lib.nets.generators.dit import XL2, DiT
from lib.nets.generators.loops import rows_of_epoch
from lib.nets.generators.prior import the_prior
from lib.system.errors import CompanionError
from lib.system.files import write_tensors

PRIOR = PixelUNet(steps=2, batch=8, width=8, times=40)
METHOD = Minimax(
    prior=PRIOR, iterations=4, lr=1e-3, batch=6, memory=3, trainable="all", average=0.5, sampling_steps=4, guidance=2.0
)  # fmt: skip
TINY = XL2 | {"depth": 4, "width": 8, "heads": 2, "patch": 8}


@pytest.fixture(scope="module")
def data():
    return toy_data()


# -- the method -------------------------------------------------------------------------------------------------------------


def test_without_criteria_it_is_plain_fine_tuning_bit_for_bit(data):
    train, method = data.train, replace(METHOD, weight_real=0.0, weight_own=0.0)
    g, h = generator(2), generator(2)
    state = method.begin(train, 1, g)
    losses = [method.step(state, g)["loss"] for _ in range(5)]

    torch.randint(2**62, (), generator=h)
    network, wanted, rows = copy.deepcopy(the_prior(PRIOR, train)).requires_grad_(True), [], []
    adam, encoded = (
        torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True),
        PRIOR.encoded(train),
    )
    for _ in range(5):
        rows = rows or rows_of_epoch(len(train), 6, h)
        chosen = rows.pop()
        x, y = encoded.draw(chosen, h), train.labels[chosen]
        wanted.append(denoising(network, PRIOR.chain, x, y, method.drop, h).loss.mean())
        adam.zero_grad()
        wanted[-1].backward()
        adam.step()
    assert torch.equal(torch.stack(losses), torch.stack(wanted).detach())
    for mine, theirs in zip(state.network.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_first_batch_of_every_class_has_no_criteria_and_later_ones_have(data):
    g = generator()
    state = METHOD.begin(data.train, 1, g)
    first = METHOD.step(state, g)
    assert first["far"] == 0 == first["alike"] and first["loss"] == first["diffusion"]
    later = [METHOD.step(state, g) for _ in range(3)][-1]
    assert 0 < later["far"] <= 2 and -1 <= later["alike"] <= 1
    wanted = later["diffusion"] + 0.002 * later["far"] + 0.008 * later["alike"]
    torch.testing.assert_close(later["loss"], wanted)
    assert state.real.seen.sum() == 24 and not state.own.kept.requires_grad


def test_the_running_mean_is_what_is_drawn_from_and_begins_at_the_pretrained_weights(data):
    pretrained = the_prior(PRIOR, data.train)
    frozen = replace(METHOD, average=1 - 1e-9)
    prior_only, almost = (
        distill(m, data.train, 2, 0).synset.images for m in (replace(METHOD, iterations=0), frozen)
    )
    torch.testing.assert_close(prior_only, almost, rtol=0, atol=1e-4)
    state = METHOD.begin(data.train, 1, generator())
    for mine, theirs in zip(state.mean.parameters(), pretrained.parameters(), strict=True):
        assert torch.equal(mine, theirs) and not mine.requires_grad


def test_the_same_noise_for_every_variant(data):
    """Images of two variants of one seed differ by their networks alone: without any training they are equal."""
    one, other = (replace(METHOD, iterations=0, weight_own=w) for w in (0.0, 1.0))
    images = [distill(m, data.train, 1, 3).synset.images for m in (one, other)]
    assert torch.equal(*images)
    assert not torch.equal(images[0], distill(one, data.train, 1, 4).synset.images)


@pytest.mark.parametrize("phases", [1, 3])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(phases, data, tmp_path):
    method = replace(METHOD, phases=phases, iterations=3)
    whole = distill(method, data.train, 1, 4)

    def stop(done, state, metrics):
        if done == method.total_steps(1) - 1:
            raise KeyboardInterrupt

    path = tmp_path / "run.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        distill(method, data.train, 1, 4, checkpoint=path, checkpoint_seconds=0, callback=stop)
    again = distill(method, data.train, 1, 4, checkpoint=path)
    assert torch.equal(again.synset.images, whole.synset.images)


def test_phases_see_their_own_classes_and_keep_what_they_drew(data):
    method, g = replace(METHOD, phases=3, iterations=2), generator()
    state = method.begin(data.train, 2, g)
    pretrained = [p.clone() for p in state.pretrained.parameters()]
    for phase in range(3):
        method.step(state, g)
        seen = state.real.seen.tolist()
        assert state.phase == phase and seen[phase] == 6 and sum(seen) == 6
        kept = state.drawn.clone()
        method.step(state, g)
        if phase < 2:
            assert state.phase == phase + 1 and state.done == 0 and state.real.seen.sum() == 0
            assert all(
                torch.equal(*pair) for pair in zip(state.network.parameters(), pretrained, strict=True)
            )
            assert not torch.equal(kept, state.drawn)
    final = method.draw(state)
    assert torch.equal(final[:4], state.drawn[:4]) and not torch.equal(final[4:], state.drawn[4:])


# -- DiT with weights of the user's -----------------------------------------------------------------------------------------


class Encoder:
    """Every eighth pixel as a latent of four channels; and back."""

    def encode(self, x):
        latent = torch.cat([x, x.mean(1, keepdim=True)], 1)[..., ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latent, std=torch.full_like(latent, 0.1)))

    def decode(self, z):
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.fixture
def dogs(monkeypatch, tmp_path):
    """ImageWoof in name, a small DiT in the place of the large one, and a file of its weights."""
    monkeypatch.setattr(denoiser, "XL2", TINY)
    monkeypatch.setattr(denoiser, "autoencoder", lambda where, device: Encoder())
    torch.manual_seed(0)
    state = DiT(**TINY).state_dict()
    path = tmp_path / "dit.pt"
    torch.save(state, path)
    train = replace(toy_data(classes=10, per_class=2, channels=3, size=256).train, name="imagewoof")
    return train, state, path


def test_dit_is_fine_tuned_in_its_biases_scales_and_labels(dogs):
    train, state, path = dogs
    method = Minimax(prior=LatentDiT(weights=str(path)), iterations=2, sampling_steps=3)
    g = generator()
    at = method.begin(train, 1, g)
    learned = {name for name, p in at.network.named_parameters() if p.requires_grad}
    assert learned and all(any(part in name for part in DIFFFIT) for name in learned)
    assert {"blocks.0.gamma1", "blocks.1.attn.gamma_qkv", "y_embedder.embedding_table.weight"} < learned
    assert not any(name.startswith("blocks.2.gamma") for name in learned)
    weights = {name: p.detach().clone() for name, p in at.network.named_parameters()}
    for _ in range(2):
        method.step(at, g)
    moved = {name for name, p in at.network.named_parameters() if not torch.equal(p, weights[name])}
    assert moved and moved <= learned
    images = method.finish(at).images
    assert images.shape == (10, 3, 256, 256) and images.isfinite().all()
    assert at.names.tolist() == list(subsets.positions("imagewoof"))


def test_latents_are_drawn_around_their_means_plain_or_mirrored(dogs):
    train, _, path = dogs
    encoded = LatentDiT(weights=str(path)).encoded(train)
    rows = torch.arange(20).repeat(40)
    x = encoded.draw(rows, generator())
    plain, mirrored = (one[rows] for one in encoded.means)
    gaps = torch.stack([(x - one).flatten(1).norm(dim=1) for one in (plain, mirrored)])
    noise = (0.1 * denoiser.SCALE) * x[0].numel() ** 0.5
    torch.testing.assert_close(gaps.amin(0).mean().item(), noise, rtol=0.02, atol=0)
    assert 0.4 < (gaps[0] < gaps[1]).float().mean() < 0.6


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_read_from_both_formats(suffix, dogs, tmp_path):
    train, state, _ = dogs
    path = tmp_path / f"w{suffix}"
    torch.save(state, path) if suffix == ".pt" else write_tensors(path, state)
    network = LatentDiT(weights=str(path)).network(train)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: _without(s, "blocks.3.attn.qkv.bias"),
            r"blocks.3.attn.qkv.bias is absent, expected \(24,\)",
        ),
        (
            lambda s: s | {"y_embedder.embedding_table.weight": torch.zeros(11, 8)},
            r"is \(11, 8\), expected \(1001, 8\)",
        ),
        (
            lambda s: s | {"blocks.4.attn.qkv.bias": torch.zeros(3)},
            r"blocks.4.attn.qkv.bias is \(3,\), expected absent",
        ),
        (lambda s: {"transformer_blocks.0.ff.net.2.weight": torch.zeros(1)}, "lacks pos_embed.proj.weight"),
        (lambda s: {"ema": s}, "is no plain state dict"),
        (lambda s: [1, 2], "is no plain state dict"),
    ],
)
def test_weights_of_another_architecture_are_named(change, said, dogs, tmp_path):
    train, state, _ = dogs
    path = tmp_path / "other.pt"
    torch.save(change(state), path)
    with pytest.raises(CompanionError, match=said) as caught:
        LatentDiT(weights=str(path)).network(train)
    assert "\n" not in str(caught.value) and "DiT-XL-2-256x256.pt" in str(caught.value)


def test_missing_and_damaged_weights_are_named(dogs, tmp_path):
    train, _, _ = dogs
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"no weights")
    for prior, said in (
        (LatentDiT(), "no weights for DiT-XL/2: weights='FILE' with DiT-XL-2-256x256.pt"),
        (LatentDiT(weights="nowhere.pt"), "no file nowhere.pt; allowed: DiT-XL-2-256x256.pt"),
        (LatentDiT(weights="nowhere.safetensors"), "no file nowhere.safetensors"),
        (LatentDiT(weights=str(damaged)), "is damaged"),
    ):
        with pytest.raises(CompanionError, match=said) as caught:
            prior.network(train)
        assert "\n" not in str(caught.value)


def test_data_that_dit_does_not_know_are_named(dogs, data):
    train, _, path = dogs
    prior = LatentDiT(weights=str(path))
    with pytest.raises(CompanionError, match="not those of 'toy'; allowed: imagefruit"):
        prior.labels(data.train)
    with pytest.raises(CompanionError, match=r"takes images of \(3, 256, 256\), not \(1, 8, 8\)"):
        prior.encoded(data.train)


def test_an_autoencoder_needs_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        CompanionError, match="needs diffusers, which is not installed: pip install diffusers"
    ):
        denoiser.autoencoder("vae", torch.device("cpu"))


def test_an_autoencoder_of_diffusers_encodes_and_decodes(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {
        "block_out_channels": (8,) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    diffusers.AutoencoderKL(**blocks, **kinds).save_pretrained(tmp_path)
    prior = LatentDiT(autoencoder=str(tmp_path), decoder=str(tmp_path))
    train = replace(toy_data(classes=10, per_class=1, channels=3, size=256).train, name="imagewoof")
    encoded = prior.encoded(train)
    assert encoded.shape == (4, 32, 32) and (encoded.deviations[0] > 0).all()
    assert prior.decode(encoded.means[0], train).shape == train.images.shape
    with pytest.raises(CompanionError, match="is no AutoencoderKL"):
        denoiser.autoencoder(str(tmp_path / "nothing"), torch.device("cpu"))


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: Minimax(trainable="some"), "unknown set of trainable weights 'some'"),
        (lambda t: Minimax(prior=3), "3 is no diffusion model"),
        (lambda t: Minimax(average=1.0), "average 1.0 is not allowed"),
        (lambda t: Minimax(drop=-0.1), "drop -0.1 is not allowed"),
        (lambda t: Minimax(weight_own=-1.0), "weight_own -1.0 is not allowed"),
        (lambda t: Minimax(sampling_steps=1001), "1001 sampling steps"),
        (lambda t: PixelUNet(width=9).make(t), "width 9 of a UNet"),
        (lambda t: PixelUNet(average=2.0), "average 2.0 is not allowed"),
        (lambda t: replace(METHOD, phases=2).begin(t, 1, generator()), "2 phases of 3 classes"),
        (
            lambda t: replace(METHOD, prior=replace(PRIOR, drop=0.0)).begin(t, 1, generator()),
            "guidance 2 and label dropout 0.1 need a network with a null class",
        ),
    ],
)
def test_bad_settings_are_named(make, said, data):
    with pytest.raises(CompanionError, match=said) as caught:
        make(data.train)
    assert "\n" not in str(caught.value) and "allowed" in str(caught.value)


def test_a_network_without_a_null_class_is_fine_without_guidance(data):
    method = replace(METHOD, prior=replace(PRIOR, drop=0.0), guidance=1.0, drop=0.0, iterations=1)
    assert distill(method, data.train, 1, 0).synset.images.isfinite().all()


TEN = "imagenette imagewoof imageidc"
PUBLISHED = [(d, ipc, epochs, 1) for d in TEN.split() for ipc, epochs in ((10, 2000), (20, 1500), (50, 1500))]
PUBLISHED += [("imagewoof", ipc, 1000, 1) for ipc in (70, 100)]
PUBLISHED += [("imagenet100", 10, 1333, 5), ("imagenet100", 20, 1000, 5)]


@pytest.mark.parametrize(("name", "ipc", "epochs", "phases"), PUBLISHED)
def test_published_rows(name, ipc, epochs, phases):
    recipe = recipes("minimax").named(name, ipc)
    m = recipe.method
    assert (m.iterations, m.lr, m.batch, m.weight_real, m.weight_own, m.memory) == (
        12_000,
        1e-3,
        8,
        0.002,
        0.008,
        64,
    )
    assert (m.trainable, m.average, m.drop, m.sampling_steps, m.guidance) == ("difffit", 0.9999, 0.1, 50, 4.0)
    assert m.phases == phases and isinstance(m.prior, LatentDiT)
    assert recipe.protocol == f"idc-imagenet-{epochs}" and "weights='FILE'" in recipe.source


def test_nothing_else_is_published():
    typed = {(name, ipc) for name, ipc, *_ in PUBLISHED}
    assert typed == {(row.data, row.ipc) for row in recipes("minimax") if not row.small}
    check_missing("minimax", "cifar10", 10)


def test_the_small_row_takes_a_step():
    small = recipes("minimax").named("digits").method
    small = with_fields(small, iterations=1, batch=8, prior=replace(small.prior, steps=1, batch=8))
    result = distill(small, toy_data(classes=10, per_class=4).train, 1)
    assert result.synset.images.shape == (10, 1, 8, 8) and result.synset.images.isfinite().all()
