"""Methods that learn codes of a generator: identities of the papers, what is stored, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data

from lib.analysis.spectrum import high_frequencies
from lib.data import load
from lib.distill import distill, learned
from lib.formation import Generated
from lib.match import relations
from lib.match.distance import Look
from lib.match.features import ClassMean, class_mean, paired
from lib.match.relations import Inter, Intra
from lib.methods import method as class_of
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.mtt import MTT
from lib.nets.experts import Experts
from lib.nets.generators import KINDS, LayeredVAE, SpatialVAE, the_prior
from lib.nets.generators import prior as priors
from lib.nets.generators.gan import ACGAN
from lib.nets.generators.inversion import encoded, invert
from lib.nets.generators.prior import (
    relative_spread,
    room_for,
    save_prior,
    to_data,
    to_generator,
    train_prior,
)
from lib.nets.generators.vae import elbo
from lib.synset import SyntheticSet, class_major
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
LAYERED = LayeredVAE(steps=60, lr=0.01, batch=30, latent=6, width=8)
SPATIAL = SpatialVAE(steps=60, lr=0.01, batch=30, latent=3, width=8)
OBJECTIVE = DM(iterations=5, real_batch=8, network=NET, augmentation="none", init="noise")
GLAD = class_of("glad")(LAYERED, OBJECTIVE, "w", 4, lr=0.1, chunk=None)
ITGAN = class_of("itgan")(
    LAYERED, 4, lr=0.05, regulariser=0.1, batch=None, real_batch=8, network=NET, inversion="none", augmentation="none"
)  # fmt: skip
DCGM = class_of("dcgm")(LAYERED, 4, real_batch=8, network=NET, augmentation="none")
DC_ = DC(real_batch=8, network=NET, inner=2, epochs=2)
MTT_ = MTT(steps=3, start_epochs=1, expert_epochs=1, lr=1.0, rate=0.05, lr_rate=1e-2, network=NET, augmentation="none",
           experts=Experts(1, lr=0.05, batch=16, augmentation="none"))  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_priors_may_be_poor(recwarn):
    """Priors of sixty steps; whether they have collapsed is tested in test_prior.py."""


# -- the generators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [LAYERED, SPATIAL], ids=lambda p: p.kind)
def test_a_generator_is_one_map_seen_from_every_depth(toy, prior):
    G, y = prior.make(toy.train), torch.tensor([2, 0, 1])
    z = G.draw(y, generator())
    w = G.mapping(z, y)
    assert tuple(w.shape[1:]) == G.styles and tuple(z.shape[1:]) == G.latent
    wanted = G(z, y)
    assert wanted.shape == (3, *toy.train.shape) and wanted.abs().max() <= 1
    for n in range(G.layers + 1):
        torch.testing.assert_close(G.from_f(G.to_f(w, y, n), w, y, n), wanted)
    for n in range(G.layers):  # rows of W before those that later layers read have no say
        spoiled = torch.full_like(w, 9.0)
        spoiled[:, G.read_after(n)] = w[:, G.read_after(n)]
        torch.testing.assert_close(G.from_f(G.to_f(w, y, n), spoiled, y, n), wanted)


def test_generators_have_the_sizes_that_are_told():
    digits, photos = load("digits").train, load("photos16").train
    for G, numbers in ((LayeredVAE().make(digits), 206_849), (SpatialVAE().make(photos), 193_228)):
        assert sum(tensor.numel() for tensor in G.generating().values()) == numbers


@pytest.mark.parametrize("size", [8, 14, 16, 28])
def test_the_layered_generator_takes_any_side(size):
    train = toy_data(size=size, per_class=2).train
    assert LAYERED.make(train)(torch.zeros(1, 6), torch.tensor([0])).shape == (1, 1, size, size)


def test_the_spatial_generator_needs_a_side_that_4_divides():
    with pytest.raises(CompanionError, match="allowed is a side that 4 divides"):
        SPATIAL.make(toy_data(size=14, per_class=2).train)


def test_the_bound_of_a_vae_is_that_of_the_formula():
    x, recon = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    mean, log_var = torch.zeros(2, 3), torch.zeros(2, 3)
    assert elbo(recon, x, mean, log_var) == (1.0, 0.0)  # KL(N(0, I) || N(0, I))
    q = torch.distributions.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]))
    wanted = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum()
    torch.testing.assert_close(elbo(recon, x, q.mean[None], q.variance.log()[None])[1], wanted)


@pytest.mark.parametrize(
    ("name", "prior", "error"), [("digits", LayeredVAE(), 5.0), ("photos16", SpatialVAE(), 15.0)]
)
def test_a_committed_prior_is_that_of_its_recipe(name, prior, error):
    """It is found, it reconstructs the data and varies within a class; a few steps of its recipe are on the way there."""
    train = load(name).train
    path = priors.committed(prior, train)
    assert path is not None and path.stat().st_size < 600_000
    G = the_prior(prior, train)
    x, y = to_generator(train.images[:300], train.transform), train.labels[:300]

    def wrong(network):
        return (network(network.encoder(x, y)[0], y) - x).square().flatten(1).sum(1).mean().item()

    few = train_prior(replace(prior, steps=8), train)
    untrained = train_prior(replace(prior, steps=0), train)
    assert wrong(G) < error < wrong(few) < wrong(untrained)
    assert relative_spread(G, train) > 0.25


# -- inversion -------------------------------------------------------------------------------------------------------------


def test_inversion_finds_what_the_generator_can_make(toy):
    G, y, transform = the_prior(LAYERED, toy.train), torch.tensor([0, 1, 2]), toy.train.transform
    z = G.draw(y, generator())
    x = to_data(G(z, y), transform).detach()
    start = z + 0.3 * torch.randn(z.shape, generator=generator(1))
    embed = torch.nn.Flatten()

    def wrong(codes):
        return (to_data(G(codes, y), transform) - x).square().mean().item()

    found = invert(G, embed, x, y, transform, start, steps=150, lr=0.05, cosine=True)
    assert wrong(found) < 1e-3 * wrong(start)
    assert torch.equal(invert(G, embed, x, y, transform, z, steps=0), z)


def test_only_a_prior_with_an_encoder_encodes(toy):
    G = the_prior(LAYERED, toy.train)
    assert encoded(G, toy.train.images[:4], toy.train.labels[:4], toy.train.transform).shape == (4, 6)
    with pytest.raises(CompanionError, match="has no encoder"):
        encoded(G.alone(), toy.train.images[:4], toy.train.labels[:4], toy.train.transform)


# -- what is stored --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["z", "w", "f0", "f2", "f4"])
@pytest.mark.parametrize("prior", [LAYERED, SPATIAL], ids=lambda p: p.kind)
def test_a_set_is_saved_with_its_generator(toy, tmp_path, prior, space):
    method = replace(GLAD, prior=prior, space=space, iterations=2)
    state = method.begin(toy.train, 2, generator())
    for _ in range(2):
        method.step(state, generator())
    synset = method.finish(state)
    torch.testing.assert_close(synset.images, method.images(state, slice(None)).detach())
    back = SyntheticSet.load(synset.save(tmp_path / "set.safetensors"))
    assert torch.equal(back.images, synset.images) and back.decoder.where == space
    generating = the_prior(prior, toy.train).generating()
    assert synset.decoder.extra_bytes == 4 * sum(tensor.numel() for tensor in generating.values())
    assert synset.bytes_images == synset.bytes_codes + synset.decoder.extra_bytes
    assert synset.bytes_codes == 4 * synset.codes.numel()
    synset.export(tmp_path / "folder")
    assert len(list((tmp_path / "folder").rglob("*.png"))) == 6
    with pytest.raises(CompanionError, match="numbers and a class: the generator takes"):
        synset.decoder(synset.codes[:, 1:])


def test_a_space_that_is_not_there_is_refused(toy):
    with pytest.raises(CompanionError, match="unknown space 'f5'.*allowed: f0, f1, f2, f3, f4, w, z"):
        Generated.of(the_prior(LAYERED, toy.train), LAYERED, toy.train, "f5")


def test_more_codes_than_memory_are_refused():
    with pytest.raises(CompanionError, match="need .* GB with their optimiser.*allowed are at most"):
        room_for(10**12, 512, torch.device("cpu"))
    room_for(10, 512, torch.device("cpu"))


def test_kinds_are_known_by_their_names():
    assert all(name == kind.kind for name, kind in KINDS.items())


# -- GLaD ------------------------------------------------------------------------------------------------------------------


def slopes(state):
    """The gradients of codes and of the styles beside a map, if a later layer reads one."""
    parts = [part for part in (state.codes, state.w) if part is not None]
    return [part.grad.clone() for part in parts if part.grad is not None]


@pytest.mark.parametrize("space", ["z", "w", "f1", "f4"])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_the_chunked_gradient_is_the_direct_one(toy, space, chunk):
    method = replace(GLAD, space=space, chunk=chunk, lr_w=0.1)
    state = method.begin(toy.train, 2, generator())
    method.step(state, generator(7))
    chunked = slopes(state)

    state = method.begin(toy.train, 2, generator())
    dm, given = method.objective, state.given
    network = dm.networks.draw(given.supply, g := generator(7))
    real = toy.train.sample(8, g)
    f = network.embed(method.images(state, slice(None))).unflatten(0, (3, 2))
    r = network.embed(real.flatten(0, 1)).unflatten(0, (3, 8))
    class_mean(r, f).sum().backward()
    for one, other in zip(chunked, slopes(state), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_in_pixels_it_is_the_method_itself(toy):
    """The same losses and images as DM, DC and MTT, step by step."""
    for objective in (
        replace(OBJECTIVE, lr=2.0),
        replace(DC_, outer=2, lr=0.5, inner=2),
        replace(MTT_, iterations=4, init="noise"),
    ):
        method = replace(GLAD, objective=objective, space="pixels", lr=objective.lr, iterations=4)
        state, own = method.begin(toy.train, 2, generator()), objective.begin(toy.train, 2, generator())
        with torch.no_grad():
            own.pixels.copy_(state.codes)
        g, h = generator(3), generator(3)
        for _ in range(4):
            ours, theirs = method.step(state, g), objective.step(own, h)
            torch.testing.assert_close(ours["loss"], theirs["loss"])
        torch.testing.assert_close(state.codes, own.pixels)
        if objective is MTT_:
            torch.testing.assert_close(state.given.rate, own.rate)


def test_styles_before_the_map_do_not_move_and_the_generator_never_does(toy):
    method = replace(GLAD, space="f2", lr_w=0.5)
    state = method.begin(toy.train, 2, generator())
    w, before = state.w.detach().clone(), {k: v.clone() for k, v in state.generator.state_dict().items()}
    method.step(state, generator())
    assert torch.equal(state.w[:, :3], w[:, :3]) and not torch.equal(state.w[:, 3:], w[:, 3:])
    assert all(torch.equal(v, before[k]) for k, v in state.generator.state_dict().items())
    assert all(parameter.grad is None for parameter in state.generator.parameters())


def test_the_generator_learns_where_it_is_asked_to_and_is_stored(toy):
    method = replace(GLAD, learn_generator=True, lr_generator=0.01)
    result = distill(method, toy.train, 2)
    frozen = Generated.of(the_prior(LAYERED, toy.train), LAYERED, toy.train, "w")
    assert not torch.equal(result.synset.decoder.weights, frozen.weights)


def test_average_styles_make_one_image_a_class(toy):
    state = replace(GLAD, average=True).begin(toy.train, 1, generator())
    again = replace(GLAD, average=True).begin(toy.train, 1, generator(1))
    assert (state.given.pixels - again.given.pixels).abs().mean() < 0.2 * state.given.pixels.std()
    with pytest.raises(CompanionError, match="allowed at IPC 1"):
        replace(GLAD, average=True).begin(toy.train, 2, generator())


def test_a_random_map_has_the_moments_of_the_map(toy):
    f = replace(GLAD, space="f2").begin(toy.train, 2, generator()).codes
    drawn = replace(GLAD, space="f2", random_map=True).begin(toy.train, 2, generator()).codes
    dims = (1, 2, 3)
    torch.testing.assert_close(drawn.mean(dims), f.mean(dims), atol=0.3 * f.std().item(), rtol=0)
    torch.testing.assert_close(drawn.std(dims), f.std(dims), rtol=0.3, atol=0)


def test_mtts_rate_is_learned_beside_the_codes(toy):
    result = distill(replace(GLAD, objective=MTT_), toy.train, 2)
    assert result.synset.step_size is not None and result.synset.step_size.item() != pytest.approx(
        0.05, abs=1e-9
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": ITGAN}, "allowed|not allowed"),
        ({"objective": replace(OBJECTIVE, space="unit")}, "no other pixel space"),
        ({"init": "zeros"}, "unknown init"),
        ({"lr": 0.0}, "must be positive"),
        ({"chunk": 0}, "whole number"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(CompanionError, match=message):
        replace(GLAD, **change)


# -- IT-GAN ----------------------------------------------------------------------------------------------------------------


def test_the_two_losses_at_their_ends():
    g = generator()
    f, r, real = (torch.randn(2, n, 5, generator=g, dtype=torch.float64) for n in (6, 6, 9))
    assert class_mean(f, f).abs().max() == 0 and paired(f, f).abs().max() == 0
    assert (paired(r, f) > class_mean(r, f)).all()  # Jensen
    shifted = r + torch.randn(2, 1, 5, generator=g, dtype=torch.float64)
    torch.testing.assert_close(paired(r, shifted), class_mean(r, shifted))  # equal residuals
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    torch.testing.assert_close(paired(r[:, order], f[:, order]), paired(r, f))
    assert not torch.allclose(paired(r[:, order], f), paired(r, f))
    torch.testing.assert_close(class_mean(real, f[:, order]), class_mean(real, f))


def test_without_the_regulariser_partners_do_not_matter(toy):
    for weight, same in ((0.0, True), (0.5, False)):
        method, ends = replace(ITGAN, regulariser=weight), []
        for spoil in (False, True):
            state = method.begin(toy.train, 2, generator())
            if spoil:
                state.partners.mul_(-1)
            method.step(state, generator(5))
            ends.append(state.z.detach())
        assert torch.equal(*ends) == same


def test_latents_move_and_nothing_else(toy):
    state = ITGAN.begin(toy.train, 2, generator())
    before = {k: v.clone() for k, v in state.generator.state_dict().items()}
    z = state.z.detach().clone()
    ITGAN.step(state, generator())
    assert not torch.equal(state.z, z) and not state.generator.training
    assert all(torch.equal(v, before[k]) for k, v in state.generator.state_dict().items())
    assert all(p.grad is None for net in (state.generator, state.supply.network) for p in net.parameters())


def test_a_trained_classifier_may_see_the_inversion(toy):
    method = replace(ITGAN, inversion="adam", inversion_steps=4, classifier_epochs=2, iterations=0)
    ends = [distill(method, toy.train, 2).synset.codes for _ in range(2)]  # the second one from the cache
    other = distill(replace(method, classifier_epochs=0), toy.train, 2).synset.codes
    assert torch.equal(*ends) and not torch.equal(ends[0], other)


# -- DCGM ------------------------------------------------------------------------------------------------------------------


def features(n=4, classes=3, d=7, dtype=torch.float64):
    f = torch.randn(classes * n, d, generator=generator(), dtype=dtype)
    return f, class_major(classes, n, "cpu"), torch.randn(d, generator=generator(1), dtype=dtype)


def test_relations_have_their_closed_forms():
    f, y, mu = features()
    alike = torch.ones(6, 4, dtype=torch.float64)
    two = class_major(3, 2, "cpu")
    assert relations.intra(alike, two).item() == pytest.approx(1) and relations.inter(
        alike, two
    ).item() == pytest.approx(1)
    assert relations.intra(alike, two, margin=0.25).item() == pytest.approx(0.75)
    apart = torch.eye(6, dtype=torch.float64)
    assert relations.intra(apart, two) == 0 and relations.inter(apart, two) == 0
    opposed = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert relations.intra(opposed, class_major(2, 2, "cpu")) == 0
    assert relations.intra(f[:3], torch.arange(3), mu) == 0  # one image a class
    for relation in (relations.intra, relations.inter):
        value = relation(f, y, mu)
        assert 0 <= value <= 1
        torch.testing.assert_close(relation(3 * f, y, 3 * mu), value)
        order = torch.tensor([1, 0, 3, 2, 4, 6, 5, 7, 9, 8, 11, 10])
        torch.testing.assert_close(relation(f[order], y[order], mu), value)
        x = f.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, of=relation: of(x, y, mu), x)
    x = f.clone().requires_grad_()
    (slope,) = torch.autograd.grad(relations.inter(x, y, mu), x)
    assert (slope.unflatten(0, (3, 4)) - slope.unflatten(0, (3, 4))[:, :1]).abs().max() < 1e-15
    uneven = torch.tensor([0, 0, 0, 1, 2, 2])  # a class with one image is skipped and not counted
    kept = uneven != 1
    torch.testing.assert_close(
        relations.intra(f[:6], uneven, mu), relations.intra(f[:6][kept], uneven[kept], mu)
    )


def test_relations_are_distances_that_dm_can_add():
    f, y, _ = features(dtype=torch.float32)
    real = torch.randn(3, 9, 7, generator=generator(4))
    terms = (ClassMean() + Intra(2.0) + Inter(3.0)).between(Look.of(real), Look.of(f.unflatten(0, (3, 4))))
    mu = real.mean((0, 1))
    torch.testing.assert_close(terms["intra"].sum(), 2 * relations.intra(f, y, mu))
    torch.testing.assert_close(terms["inter"].sum(), 3 * relations.inter(f, y, mu))


def test_without_its_terms_it_is_it_gan_and_glad(toy):
    """Frozen G and no relations: IT-GAN without regulariser from random codes, by the same Adam; and GLaD's loss in z."""
    dcgm = replace(DCGM, intra=0.0, inter=0.0, learn_generator=False, lr=0.05)
    itgan = replace(ITGAN, regulariser=0.0)
    one = dcgm.begin(toy.train, 2, generator())
    two = itgan.begin(toy.train, 2, generator())
    three = replace(GLAD, space="z").begin(toy.train, 2, generator())
    with torch.no_grad():
        for codes in (two.z, three.codes):
            codes.copy_(one.codes)
        replace(GLAD, space="z").show(three)
    for _ in range(3):
        a, b = dcgm.step(one, generator(3)), itgan.step(two, generator(3))
        torch.testing.assert_close(a["loss"], b["loss"])
    torch.testing.assert_close(one.codes, two.z)


GAN_ = replace(
    DCGM,
    prior=ACGAN(
        steps=3, batch=8, noise=6, width=4, least=2, convs=(0, 0), critic_width=4, critic_convs=1, strided=()
    ),
)


def test_the_gan_loss_moves_generator_and_critic_and_stays_out_of_the_set(toy):
    """With weight 0 it changes nothing; with a weight the critic learns, too, and what is stored is the generator alone."""
    trained = the_prior(GAN_.prior, toy.train)
    made = {}
    for weight in (0.0, 0.5):
        method = replace(GAN_, gan=weight)
        state = method.begin(toy.train, 2, generator())
        terms = method.step(state, generator(3))
        assert ("gan" in terms) == ("critic" in terms) == (weight > 0)
        made[weight] = method.finish(state)
        assert made[weight].decoder.extra_bytes == 4 * sum(t.numel() for t in trained.generating().values())
    moved = [(a != b).any() for a, b in zip(state.generator.critic.parameters(), trained.critic.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 1  # the bias of the source cancels in the loss
    assert (made[0.5].decoder.weights != made[0.0].decoder.weights).any()
    torch.testing.assert_close(
        terms["loss"], terms["match"] + terms["intra"] + terms["inter"] + 0.5 * terms["gan"]
    )


def test_the_gan_loss_needs_a_critic_and_a_generator_that_learns():
    with pytest.raises(CompanionError, match="has no critic: with gan=0.1 an ACGAN is allowed"):
        replace(DCGM, gan=0.1)
    with pytest.raises(CompanionError, match="gan 0.1 for a frozen generator: allowed is 0"):
        replace(GAN_, gan=0.1, learn_generator=False)
    with pytest.raises(CompanionError, match="gan -1.0 is not allowed: 0 or more"):
        replace(GAN_, gan=-1.0)


def test_learned_numbers_are_codes_and_generator(toy):
    state = DCGM.begin(toy.train, 2, generator())
    generating = the_prior(LAYERED, toy.train).generating()
    assert sum(t.numel() for t in learned(state)) == 3 * 2 * 6 + sum(t.numel() for t in generating.values())


# -- the loop --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [ITGAN, DCGM, GLAD, replace(GLAD, objective=DC_, space="f2", learn_generator=True), replace(GLAD, objective=MTT_)],
    ids=["itgan", "dcgm", "glad-dm", "glad-dc", "glad-mtt"],
)  # fmt: skip
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(toy, tmp_path, method):
    method = replace(method, iterations=6)
    whole = distill(method, toy.train, 2, 3)

    def stop(done, state, metrics):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(method, toy.train, 2, 3, checkpoint=tmp_path / "run", checkpoint_seconds=0.0, callback=stop)
    assert (tmp_path / "run").is_file()
    resumed = distill(method, toy.train, 2, 3, checkpoint=tmp_path / "run", checkpoint_seconds=0.0)
    assert torch.equal(resumed.synset.codes, whole.synset.codes)
    assert torch.equal(resumed.synset.images, whole.synset.images)
    assert torch.equal(resumed.history["loss"], whole.history["loss"])


def test_the_guard_sees_the_numbers_of_a_learned_generator(toy):
    def spoil(done, state, metrics):
        next(state.generator.parameters()).data.fill_(float("nan"))

    with pytest.raises(CompanionError, match="DCGM stopped: a learned value is not finite"):
        distill(replace(DCGM, iterations=1), toy.train, 2, callback=spoil)


@pytest.mark.parametrize("name", ["itgan", "dcgm", "glad"])
def test_what_a_user_must_bring_is_named_in_one_line(toy, name):
    from lib.methods import recipes

    row = next(row for row in recipes(name) if not row.small)
    images, what = (
        (toy, "write a Prior") if name == "glad" else (toy_data(channels=3, size=32), "weights='FILE'")
    )
    with pytest.raises(CompanionError, match=f"must be brought .*{what}") as caught:
        row.method.begin(images.train, 1, generator())
    assert "\n" not in str(caught.value)


def test_a_brought_prior_may_be_given_as_a_file(toy, tmp_path):
    path = save_prior(the_prior(LAYERED, toy.train), LAYERED, toy.train, tmp_path / "p.safetensors")
    method = replace(GLAD, prior=replace(LAYERED, weights=str(path)))
    assert torch.equal(distill(method, toy.train, 2).synset.images, distill(GLAD, toy.train, 2).synset.images)


# -- what is looked at -----------------------------------------------------------------------------------------------------


def test_the_share_of_high_frequencies():
    x = torch.arange(16.0)
    slow, fast = (torch.cos(2 * torch.pi * f * x).expand(1, 1, 16, 16) for f in (1 / 16, 7 / 16))
    assert high_frequencies(5 + slow).item() == pytest.approx(0, abs=1e-12)
    assert high_frequencies(5 + fast).item() == pytest.approx(1)
    assert high_frequencies(3 * slow + 4 * fast).item() == pytest.approx(16 / 25)
    assert high_frequencies(torch.ones(2, 3, 8, 8)).tolist() == [0, 0]
    noise = torch.randn(50, 1, 32, 32, generator=generator())
    assert high_frequencies(noise).mean().item() == pytest.approx(
        1 - torch.pi / 16, abs=0.02
    )  # the area beyond the circle
    with pytest.raises(CompanionError, match="frequency 0.8"):
        high_frequencies(noise, 0.8)
