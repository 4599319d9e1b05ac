"""DD and the evaluation by a learned schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from test_distill import interrupted, same

from lib.distill import distill
from lib.evaluate import evaluate, protocol
from lib.evaluate.schedule import Schedule, evaluate_schedule, follow, steps_of
from lib.match.unroll import Step, walk
from lib.methods.dd import DD, real_loss
from lib.nets.experts import Experts
from lib.nets.flat import draw, logits, template
from lib.nets.starts import Fixed, Pretrained, Random
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError

NET = "convnet-d2-w4"
QUICK = DD(
    iterations=6,
    steps=2,
    epochs=2,
    rate=0.3,
    lr=0.05,
    decay_every=3,
    real_batch=25,
    networks=2,
    network=NET,
    init="real",
)
JUDGE = Schedule(NET, networks=3)


@pytest.fixture(scope="module")
def learned(toy):
    return distill(replace(QUICK, iterations=25, decay_every=30, init="noise"), toy.train, 2, 0)


def test_the_schedule_is_better_than_before(toy, learned):
    start = distill(replace(QUICK, iterations=0, init="noise"), toy.train, 2, 0).synset
    before, after = (evaluate_schedule(s, toy, JUDGE).accuracy.mean().item() for s in (start, learned.synset))
    assert after > before + 0.2 and learned.history["loss"][-5:].mean() < learned.history["loss"][:5].mean()
    assert (
        len(learned.synset.step_size) == 4 and len(learned.synset.step_size.unique()) == 4
    )  # passes share no rate


def test_images_are_kept_step_after_step(toy):
    synset = distill(replace(QUICK, iterations=0), toy.train, 4, 0).synset
    assert synset.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert synset.meta["schedule"] == {"steps": 2, "passes": 2} and synset.ipc == 4
    torch.testing.assert_close(synset.step_size, torch.full((4,), 0.3))
    real = toy.train.sample(4, generator(0))
    for c in range(3):  # both steps hold images of every class, none twice
        mine = synset.codes[synset.labels == c]
        assert all((mine == image).flatten(1).all(1).sum() == 1 for image in real[c])


def test_the_test_follows_the_learned_steps(toy, learned):
    synset, like = learned.synset, template(NET, toy.train)
    theta = draw(like, [generator(0)], "xavier")
    x, y = synset.codes.unflatten(0, (2, -1)), synset.labels.unflatten(0, (2, -1))
    by_hand = [Step(x[j % 2], y[j % 2], synset.step_size[j]) for j in range(4)]
    torch.testing.assert_close(walk(like, theta, by_hand).end, walk(like, theta, steps_of(synset)).end)
    more = [step.rate.item() for step in steps_of(synset, 3)]
    assert more == [*synset.step_size.tolist(), *synset.step_size.tolist()[2:]]
    assert len(steps_of(synset, 1)) == 2
    course = follow(synset, toy, JUDGE, every=True)
    assert course.shape == (5, 3) and torch.equal(course[-1], follow(synset, toy, JUDGE))
    torch.testing.assert_close(evaluate_schedule([synset], toy, JUDGE, cache=True).accuracy[0], course[-1])
    assert torch.equal(evaluate_schedule([synset], toy, JUDGE, cache=True).accuracy[0], course[-1])


def test_a_saved_set_keeps_its_schedule(toy, learned, tmp_path):
    found = SyntheticSet.load(learned.synset.save(tmp_path / "set.safetensors"))
    assert torch.equal(follow(found, toy, JUDGE), follow(learned.synset, toy, JUDGE))
    ordinary = protocol("cpu-small", toy.train, network=NET, epochs=2)
    assert evaluate(found, toy, ordinary, networks=1).accuracy.shape == (1, 1)


def test_a_set_without_a_schedule_or_with_a_wrong_one_is_refused(toy, learned):
    with pytest.raises(CompanionError, match="no schedule"):
        steps_of(replace(learned.synset, step_size=None))
    with pytest.raises(
        CompanionError, match="3 rates and 6 images for 2 steps in 2 passes: allowed are 4 rates"
    ):
        steps_of(replace(learned.synset, step_size=torch.ones(3)))
    with pytest.raises(CompanionError, match="passes must be a whole number"):
        Schedule(NET, passes=0)


def test_the_order_of_steps_counts_and_the_order_within_a_class_does_not(toy, learned):
    like, theta = template(NET, toy.train), None
    theta = draw(like, [generator(0)], "xavier").double()
    like = like.double()
    x = torch.randn(2, 6, 1, 8, 8, generator=generator(1), dtype=torch.float64)
    y, eta = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.5, 0.3], dtype=torch.float64)

    def end(images):
        return walk(like, theta, [Step(image, y, rate) for image, rate in zip(images, eta, strict=True)]).end

    torch.testing.assert_close(end(x[:, [1, 0, 2, 3, 4, 5]]), end(x), rtol=1e-12, atol=1e-12)
    assert (end(x.flip(0)) - end(x)).abs().max() > 1e-6


def test_one_step_is_the_formula(toy):
    r"""$T=E=1$: $-\eta\,\nabla_{\tilde x}\langle\nabla_\theta\ell(\theta_0;\tilde x),u\rangle$ with $u$ the gradient at $\theta_1$."""
    like = template(NET, toy.train)
    theta = draw(like, [generator(0)]).double()
    like, eta = like.double(), torch.tensor(0.4, dtype=torch.float64)
    x, y = torch.randn(3, 1, 8, 8, generator=generator(1), dtype=torch.float64), torch.arange(3)
    run = walk(like, theta, [Step(x, y, eta)], "recompute")
    loss, u = real_loss(like, run.end, toy.train.images.double(), toy.train.labels)
    (dx,), (deta,) = run.pull(u)
    x = x.clone().requires_grad_()
    theta = theta.requires_grad_()
    inner = F.cross_entropy(logits(like, theta, x[None])[0], y)
    g = torch.autograd.grad(inner, theta, create_graph=True)[0]
    wanted = torch.autograd.grad(-eta * (g * u).sum(), x)[0]
    torch.testing.assert_close(dx, wanted)
    assert deta.item() == pytest.approx(-(g * u).sum().item()) and loss.shape == (1,)


def test_an_attack_on_itself_is_none(toy):
    like = template(NET, toy.train)
    theta = draw(like, [generator(0)])
    batch = (toy.train.images, toy.train.labels)
    plain, none, attacked = (real_loss(like, theta, *batch, a)[0] for a in (None, (1, 1), (1, 2)))
    assert torch.equal(plain, none) and plain != attacked
    wrong = torch.where(batch[1] == 1, 2, batch[1])
    assert torch.equal(real_loss(like, theta, batch[0], wrong)[0], attacked)


def test_an_attack_makes_trained_networks_take_one_class_for_the_other(toy):
    pool = Pretrained(Experts(3, lr=0.05, batch=16, augmentation="none"), epochs=6)
    method = replace(
        QUICK, iterations=30, steps=1, epochs=1, rate=1.0, lr=0.1, start=pool, attack=(0, 1), decay_every=40
    )
    synset = distill(method, toy.train, 2, 0).synset
    like, kept = template(NET, toy.train), pool.begin(NET, toy.train, held_out=True)
    x = toy.test.images[toy.test.labels == 0]
    (step,) = steps_of(synset)
    after = walk(like, kept, [step]).end
    before, now = ((logits(like, w, x[None]).argmax(2) == 1).float().mean().item() for w in (kept, after))
    assert now > before + 0.3


def test_a_fixed_start_serves_its_own_network(toy):
    method = replace(QUICK, iterations=25, networks=1, start=Fixed(), decay_every=25, init="noise")
    synset = distill(method, toy.train, 2, 0).synset
    own, fresh = (
        evaluate_schedule(synset, toy, replace(JUDGE, start=s)).accuracy for s in (Fixed(), Random())
    )
    assert own.shape == (1, 1) and fresh.shape == (1, 3) and own.mean() > fresh.mean()


def test_the_rate_of_the_outer_loop_halves(toy):
    state, g = QUICK.begin(toy.train, 2, generator(0)), generator(1)
    rates = []
    for _ in range(6):
        QUICK.step(state, g)
        rates.append(state.optimiser.param_groups[0]["lr"])
    assert rates == [0.05] * 3 + [0.025] * 3


def test_real_images_come_in_whole_passes(toy):
    state, g = QUICK.begin(toy.train, 2, generator(0)), generator(1)
    batches = [QUICK.real(state, g)[0] for _ in range(3)]
    assert [len(x) for x in batches] == [25, 25, 10]
    seen = torch.cat(batches).flatten(1)
    assert len(seen.unique(dim=0)) == len(toy.train)


def test_an_interrupted_run_ends_with_the_same_bits(toy, tmp_path):
    method = replace(QUICK, iterations=14)
    path, calm = tmp_path / "run.checkpoint", distill(method, toy.train, 2, 7)
    interrupted(method, toy.train, path, 12)
    same(distill(method, toy.train, 2, 7, checkpoint=path), calm)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 3}, "IPC 2 in 3 steps: allowed are multiples of 3"),
        ({"attack": (0, 3)}, r"attack \(0, 3\) on 3 classes: allowed 0 to 2"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"gradient": "x"}, "unknown mode of unrolling 'x'"),
        ({"rate": 0.0}, "rate 0.0 is not allowed"),
        ({"real_batch": 0}, "real_batch must be a whole number of at least 1"),
        ({"network": "convnet-d2-w4-batch"}, "keeps running statistics"),
    ],
)
def test_wrong_settings_are_one_line(toy, change, said):
    with pytest.raises(CompanionError, match=said) as caught:
        replace(QUICK, **change).begin(toy.train, 2, generator(0))
    assert "\n" not in str(caught.value)
