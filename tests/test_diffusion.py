"""Diffusion, its networks, and Minimax's memories: closed forms and invariances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.match.latent_memory import Memory, diversity, mean_over_classes, representativeness
from lib.nets.generators import dit
from lib.nets.generators.diffusion import Diffusion, guided_output, halves
from lib.nets.generators.dit import DiT
from lib.nets.generators.unet import UNet
from lib.system.errors import CompanionError

SHAPE, CLASSES = (4, 4, 4), 3


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def small_dit(**changes) -> DiT:
    torch.manual_seed(0)
    network = DiT(
        **{"size": 4, "channels": 4, "num_classes": CLASSES, "depth": 4, "width": 16, "heads": 2, "patch": 2}
        | changes
    )
    for (
        parameter
    ) in network.parameters():  # released weights begin with gates of 0, which would hide everything
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


class Oracle(nn.Module):
    """Knows the clean images, and says the noise in whatever it is shown."""

    null = None

    def __init__(self, chain: Diffusion, clean: torch.Tensor):
        super().__init__()
        self.chain, self.clean = chain, clean

    def forward(self, x, t, y):
        abar = self.chain.alphas_bar[t].to(x.dtype)[:, None, None, None]
        return (x - abar.sqrt() * self.clean) / (1 - abar).sqrt()


# -- the chain --------------------------------------------------------------------------------------------------------------


def test_the_true_noise_gives_the_clean_image_back(g):
    chain, (x, noise) = Diffusion(), torch.randn(2, 8, *SHAPE, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 1, 5, 100, 500, 900, 998, 999])
    terms = chain.terms(noise, x, chain.noised(x, t, noise), t, noise)
    torch.testing.assert_close(terms.clean, x, rtol=0, atol=1e-10)
    assert terms.mse.max() == 0 and terms.bound.max() == 0


@pytest.mark.parametrize("chain", [Diffusion(), Diffusion(200), Diffusion().respaced(50)])
def test_a_step_back_from_the_mean_of_a_step_is_the_mean_of_the_step_before(chain, g):
    x = torch.randn(len(chain) - 1, *SHAPE, generator=g, dtype=torch.float64)
    t = torch.arange(1, len(chain))
    back = chain.posterior_mean(x, chain.noised(x, t, torch.zeros_like(x)), t)
    torch.testing.assert_close(back, chain.noised(x, t - 1, torch.zeros_like(x)))


def test_the_variance_of_two_steps_adds_up():
    r"""$\tilde\beta_t+(\text{weight of }x_t)^2(1-\bar\alpha_t)=1-\bar\alpha_{t-1}$."""
    chain = Diffusion().respaced(20)
    weight = (1 - chain.betas).sqrt() * (1 - chain.before) / (1 - chain.alphas_bar)
    total = chain.posterior_variance + weight**2 * (1 - chain.alphas_bar)
    torch.testing.assert_close(total[1:], 1 - chain.before[1:])


def test_all_steps_kept_are_the_chain_itself():
    chain = Diffusion(50)
    torch.testing.assert_close(chain.respaced(50).betas, chain.betas, rtol=0, atol=0)


def test_a_shorter_chain_scales_its_ends():
    betas = Diffusion(200).betas
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([5e-4, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("count", [2, 10, 50])
def test_sampling_with_an_oracle_finds_the_images(count, g):
    clean = torch.rand(5, *SHAPE, generator=g) * 2 - 1
    network = Oracle(Diffusion(), clean)
    got = Diffusion().respaced(count).sample(network, torch.zeros(5).long(), SHAPE, g)
    torch.testing.assert_close(got, clean, rtol=0, atol=1e-3)


def test_the_bound_teaches_the_variance_alone(g):
    chain, (x, noise) = Diffusion(), torch.randn(2, 4, *SHAPE, generator=g)
    t = torch.tensor([0, 3, 500, 999])
    output = torch.randn(4, 8, 4, 4, generator=g, requires_grad=True)
    terms = chain.terms(output, x, chain.noised(x, t, noise), t, noise)
    (gradient,) = torch.autograd.grad(terms.bound.sum(), output)
    assert gradient[:, :4].abs().max() == 0
    assert (gradient[:, 4:].flatten(1).abs().amax(1) > 0).all()
    assert (terms.bound >= 0).all()


def test_the_ends_of_the_variance_are_beta_and_beta_tilde(g):
    chain, t = Diffusion(), torch.tensor([1, 10, 999])
    x_t, epsilon = torch.randn(2, 3, *SHAPE, generator=g)
    for v, table in ((1.0, chain.betas), (-1.0, chain.posterior_variance)):
        told = chain.posterior(torch.cat([epsilon, torch.full_like(epsilon, v)], 1), x_t, t)
        wanted = table[t].log().float()[:, None, None, None].expand_as(x_t)
        torch.testing.assert_close(told.log_variance, wanted)


@pytest.mark.parametrize(
    ("settings", "named"), [({"steps": 1}, "1"), ({"steps": 10}, "100"), ({"first": 0.0}, "0.0")]
)
def test_chains_that_are_none(settings, named):
    with pytest.raises(CompanionError, match=named):
        Diffusion(**settings)


@pytest.mark.parametrize("count", [1, 201, 2.5, True])
def test_numbers_of_sampling_steps_that_are_none(count):
    with pytest.raises(CompanionError, match="allowed 2 to 200"):
        Diffusion(200).respaced(count)


def test_outputs_of_another_shape_are_named():
    with pytest.raises(CompanionError, match=r"\(6, 4, 4\).*allowed are 4 or 8"):
        halves(torch.zeros(1, 6, 4, 4), torch.zeros(1, *SHAPE))


# -- guidance ---------------------------------------------------------------------------------------------------------------


def test_guidance_of_1_is_conditional_and_null_labels_are_unconditional(g):
    network, x, t = small_dit(), torch.randn(5, *SHAPE, generator=g), torch.arange(5)
    y, null = torch.tensor([0, 1, 2, 0, 1]), torch.full((5,), CLASSES)
    torch.testing.assert_close(guided_output(network, x, t, y, 1.0), network(x, t, y), rtol=0, atol=0)
    for scale in (0.5, 4.0):
        torch.testing.assert_close(guided_output(network, x, t, null, scale), network(x, t, null))
    torch.testing.assert_close(
        guided_output(network, x, t, y, 0.0)[:, :4], network(x, t, null)[:, :4], rtol=1e-4, atol=1e-5
    )


def test_channels_that_are_not_guided_keep_their_conditional_values(g):
    network, x, t, y = small_dit(), torch.randn(2, *SHAPE, generator=g), torch.arange(2), torch.arange(2)
    got, plain = guided_output(network, x, t, y, 4.0, 3), network(x, t, y)
    torch.testing.assert_close(got[:, 3:], plain[:, 3:])
    assert (got[:, :3] - plain[:, :3]).abs().min() > 0


def test_guidance_without_a_null_class_is_refused(g):
    network = UNet(1, CLASSES, 8, guided=False)
    x, y = torch.randn(2, 1, 8, 8, generator=g), torch.arange(2)
    assert guided_output(network, x, y, y, 1.0).shape == x.shape
    with pytest.raises(CompanionError, match="guidance 2 needs a network with a null class"):
        guided_output(network, x, y, y, 2.0)


# -- networks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 14), (3, 15), (12, 8)])
def test_a_unet_begins_with_no_noise_and_sees_time_and_label(channels, side, g):
    network = UNet(channels, CLASSES, 16)
    x, y = torch.randn(2, channels, side, side, generator=g), torch.arange(2)
    assert network(x, y, y).shape == x.shape and network(x, y, y).abs().max() == 0
    nn.init.normal_(network.leave[-1].weight)
    first = network(x, y, y)
    assert (network(x, y + 50, y) - first).abs().max() > 0 and (network(x, y, y + 1) - first).abs().max() > 0


def test_scale_vectors_of_1_change_nothing(g):
    network, x, t = small_dit(), torch.randn(3, *SHAPE, generator=g), torch.tensor([0, 500, 999])
    before = network(x, t, torch.arange(3))
    names = {name for name, _ in network.named_parameters()}
    network.scaled()
    assert {name.split(".")[1] for name, _ in network.named_parameters() if name not in names} == {"0", "1"}
    torch.testing.assert_close(network(x, t, torch.arange(3)), before, rtol=0, atol=0)


def test_the_published_dit_has_its_published_size():
    with torch.device("meta"):
        network = DiT(**dit.XL2).scaled()
    learned = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    gammas = sum(count for name, count in learned.items() if "gamma" in name)
    assert gammas == 14 * (3 + 1 + 1 + 1) * 1152
    assert round((sum(learned.values()) - gammas) / 1e6) == 675  # "DiT-XL/2, 675 M"
    few = {
        name: count for name, count in learned.items() if any(w in name for w in ("bias", "gamma", "y_embed"))
    }
    assert round(sum(few.values()) / 1e6, 2) == 1.74
    assert {
        "blocks.27.attn.qkv.weight",
        "t_embedder.mlp.2.bias",
        "final_layer.linear.weight",
    } < learned.keys()


def test_tokens_of_a_dit_are_put_back_where_they_came_from(g):
    """A patch that alone is changed, without attention, changes its own place alone."""
    network, x = small_dit(size=6), torch.randn(1, 4, 6, 6, generator=g)
    for block in network.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    other = x.clone()
    other[:, :, 2:4, 4:6] += 1
    t = torch.zeros(1).long()
    moved = (network(other, t, t) - network(x, t, t)).abs().amax((0, 1)) > 1e-6
    assert moved[2:4, 4:6].all() and moved.sum() == 4


def test_latents_of_another_shape_are_named():
    with pytest.raises(CompanionError, match=r"\(4, 8, 8\) for a DiT of \(4, 4, 4\)"):
        small_dit()(torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), torch.zeros(1).long())


def test_weights_of_diffusers_make_the_same_network(g):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=4,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    for i in range(1, 4):  # one embedder, as in the released weights
        theirs.transformer_blocks[i].norm1.emb.load_state_dict(
            theirs.transformer_blocks[0].norm1.emb.state_dict()
        )
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the released code; theirs is 1
    ours = small_dit()
    missing, unexpected = ours.load_state_dict(dit.from_diffusers(theirs.state_dict(), 4), strict=False)
    assert (missing, unexpected) == (["pos_embed"], [])
    ours.pos_embed.data = dit.positions(16, 2)
    x, t, y = torch.randn(3, *SHAPE, generator=g), torch.tensor([0, 400, 999]), torch.arange(3)
    torch.testing.assert_close(ours(x, t, y), theirs(x, t, y).sample, rtol=1e-4, atol=1e-4)


# -- Minimax's memories -----------------------------------------------------------------------------------------------------


def filled(g, size=5, per_class=7, shape=SHAPE) -> tuple[Memory, torch.Tensor, torch.Tensor]:
    latents = torch.randn(CLASSES * per_class, *shape, generator=g, dtype=torch.float64)
    labels = torch.randperm(len(latents), generator=g) % CLASSES
    memory = Memory(CLASSES, size, latents)
    for rows in torch.arange(len(latents)).split(4):
        memory.write(latents[rows], labels[rows])
    return memory, latents, labels


@pytest.mark.parametrize("size", [1, 3, 5, 50])
def test_a_memory_keeps_the_last_ones_in_their_order(size, g):
    memory, latents, labels = filled(g, size)
    for c in range(CLASSES):
        torch.testing.assert_close(memory.of(c), latents[labels == c][-size:], rtol=0, atol=0)
    memory.write(latents.requires_grad_(), labels)  # more of a class than there is room for
    assert not memory.kept.requires_grad
    for c in range(CLASSES):
        wanted = torch.cat([latents[labels == c]] * 2)[-size:]
        torch.testing.assert_close(memory.of(c), wanted, rtol=0, atol=0)


def test_the_first_batch_of_a_class_has_no_terms(g):
    z, labels = torch.randn(2, *SHAPE, generator=g), torch.tensor([0, 2])
    memory = Memory(CLASSES, 4, z)
    memory.write(z[:1], labels[:1])
    for criterion in (representativeness, diversity):
        per_class = criterion(z, labels, memory)
        assert per_class.isnan().tolist() == [False, True, True]
        assert mean_over_classes(per_class, labels) == per_class[0] / 2  # two classes are in the batch


def test_parallel_latents_are_representative_and_not_diverse(g):
    one = torch.randn(1, *SHAPE, generator=g, dtype=torch.float64)
    scales = torch.tensor([0.1, 1.0, 30.0])[:, None, None, None]
    memory, labels = Memory(1, 8, one), torch.zeros(3).long()
    memory.write(one * scales, labels)
    torch.testing.assert_close(
        representativeness(one * scales, labels, memory).item(), 0.0, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(diversity(one * scales, labels, memory).item(), 1.0)
    other = torch.cat([one, torch.randn(2, *SHAPE, generator=g)])
    assert representativeness(other, labels, memory) > 0.1


def test_the_terms_are_cosines_and_do_not_see_lengths(g):
    memory, z, labels = filled(g)
    scales = torch.rand(len(z), 1, 1, 1, generator=g) * 9 + 0.1
    for criterion, low, high in ((representativeness, 0, 2), (diversity, -1, 1)):
        values = criterion(-z, labels, memory)
        assert ((values >= low - 1e-9) & (values <= high + 1e-9)).all()
        torch.testing.assert_close(criterion(-z * scales, labels, memory), values)


@pytest.mark.parametrize("criterion", [representativeness, diversity])
def test_one_latent_of_a_class_has_a_gradient_and_it_is_that_of_finite_differences(criterion, g):
    memory, _, _ = filled(g)
    z = torch.randn(9, *SHAPE, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % CLASSES
    criterion(z, labels, memory).sum().backward()
    moved = z.grad.flatten(1).abs().amax(1) > 0
    assert [int(moved[labels == c].sum()) for c in range(CLASSES)] == [1, 1, 1]
    assert torch.autograd.gradcheck(lambda z: criterion(z, labels, memory), z)


def test_a_memory_may_be_written_before_the_backward_pass(g):
    memory, _, _ = filled(g)
    z, labels = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64, requires_grad=True), torch.arange(3)
    wanted = torch.autograd.grad(diversity(z, labels, memory).sum(), z)[0]
    loss = diversity(z, labels, memory).sum()
    memory.write(z, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], wanted)


def test_bad_memories_and_latents():
    with pytest.raises(CompanionError, match="memory 0 is not allowed"):
        Memory(2, 0, torch.zeros(1, *SHAPE))
    with pytest.raises(CompanionError, match=r"\(4, 8, 8\) for a memory of \(4, 4, 4\)"):
        Memory(2, 3, torch.zeros(1, *SHAPE)).write(torch.zeros(1, 4, 8, 8), torch.zeros(1).long())
