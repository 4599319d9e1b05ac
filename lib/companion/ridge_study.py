"""What the notebook on closed-form ridge regression measures: teachers, KIP as its rival, maps that are not onto, rows."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.companion import tables
from lib.companion.published import quoted
from lib.distill import settings_digest
from lib.evaluate.kernel import predictor_accuracy
from lib.evaluate.spread import Spread
from lib.kernels import closed_form
from lib.kernels.feature_maps import LeakyNet
from lib.methods import krr
from lib.methods.krr import KRR, Teacher, columns

PUBLISHED_STEPS = 30_000  # of KIP


def percent(w: Tensor, phi, test) -> float:
    """Test accuracy of the weights W (k, p)."""
    return 100 * predictor_accuracy(lambda images: (w @ phi(columns(images))).T, test)


def teacher_of(method: KRR, data, seed: int) -> tuple[Teacher, float]:
    """The teacher of the set with this seed (the same draws), and its test accuracy in percent."""
    teacher = method.teacher(data.train, torch.Generator(data.train.device).manual_seed(seed))
    return teacher, percent(teacher.w, teacher.phi, data.test)


def record(run, test, **about) -> dict:
    """What a distilled set is judged by: gap of the weights, accuracy of its ridge regression in percent, pixels, seconds."""
    accuracy = 100 * predictor_accuracy(krr.predictor(run.synset), test)
    about |= {"gap": float(run.history["gap"]), "accuracy": accuracy, "seconds": run.seconds}
    largest = float(run.synset.images.abs().max())
    return about | {"largest pixel": largest, "note": run.synset.meta.get("note", "")}


def gap(w_s: Tensor, w: Tensor) -> float:
    """Norm of the difference of the weights, relative to the teacher's."""
    return float((w_s - w).norm() / w.norm())


# -- KIP ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """KIP's accuracy in percent after its steps, the seconds they took, and those until the goal (None: not reached)."""

    accuracy: float
    seconds: float
    reached: float | None


def kip(data, phi, ipc: int, steps: int, goal: float, generator: torch.Generator, every: int = 10) -> Race:
    """KIP as the authors run it: Adam 0.01 on pixels from real images, labels solved on all data at every step.

    Seconds leave out the looks at the test accuracy.
    """
    begun, looking, reached, train = time.perf_counter(), 0.0, None, data.train
    real, y = phi(columns(train.images)), F.one_hot(train.labels, train.num_classes).T.double()
    gram, moment = real @ real.T, real @ y.T
    x_s = columns(train.sample(ipc, generator).flatten(0, 1)).clone().requires_grad_()
    optimiser = torch.optim.Adam([x_s], lr=0.01)
    for step in range(steps):
        phi_s = phi(x_s)
        _, w_s = closed_form.kip_labels(phi_s, gram, moment, 1e-6 * phi_s.square().sum() / phi_s.shape[1])
        batch = torch.randperm(len(train), generator=generator, device=train.device)[:5000]
        loss = (w_s @ real[:, batch] - y[:, batch]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % every == 0 or step == steps - 1:
            float(loss.detach())  # waits for a GPU
            look = time.perf_counter()
            accuracy = percent(w_s.detach(), phi, data.test)
            if reached is None and accuracy >= goal:
                reached = look - begun - looking
            looking += time.perf_counter() - look
    return Race(accuracy, time.perf_counter() - begun - looking, reached)


def closed_form_seconds(method: KRR, data, ipc: int, seed: int, calls: int = 3) -> float:
    """Seconds of the whole routine, teacher included: the best of ``calls``."""
    best = float("inf")
    for _ in range(calls):
        begun, generator = time.perf_counter(), torch.Generator(data.train.device).manual_seed(seed)
        state = method.begin(data.train, ipc, generator)
        float(method.step(state, generator)["gap"])
        best = min(best, time.perf_counter() - begun)
    return best


def race_row(
    dataset: str, ipc: int, steps: int, races: list[Race], goals: list[float], ours: list[float]
) -> dict:
    """A line in the form of the paper's Table 4, with the ratio at equal accuracy (median; a lower bound for runs that
    did not get there) and the one to the published number of steps, extrapolated where fewer were run."""
    mean = sum(race.seconds for race in races) / len(races)
    long, own = mean / steps * PUBLISHED_STEPS, sum(ours) / len(ours)
    ratios = [(race.reached or race.seconds) / seconds for race, seconds in zip(races, ours, strict=True)]
    reached = sum(race.reached is not None for race in races)
    extrapolated = " (extrapolated)" if steps < PUBLISHED_STEPS else ""
    return {
        "dataset": dataset,
        "IPC": ipc,
        "KIP steps": steps,
        "KIP accuracy": Spread.of(race.accuracy for race in races).text(count=True),
        "KIP s": mean,
        "KIP s, 30 000 steps": f"{long:.0f}{extrapolated}",
        "KRR accuracy": Spread.of(goals).text(count=True),
        "KRR s": own,
        "ratio at equal accuracy": float(torch.tensor(ratios).median()),
        "reached in": f"{reached} of {len(races)}",
        "ratio, 30 000 steps": f"{long / own:.0f}{extrapolated}",
    }


# -- maps that are not onto ---------------------------------------------------------------------------------------------


def widening(x: Tensor, y: Tensor, spare: int, generator: torch.Generator) -> list[dict]:
    """Sets for maps with ``spare`` more features than the d pixels of x (d, n), labels y (k, n); theorems 5.2 and 5.3.

    Deep linear: weights found by ridge regression and random ones, k and 2k points (the latter by the recipe). LeakyReLU:
    approximate images, with given labels and with labels solved for them.
    """
    k, d = len(y), len(x)
    p, rows = d + spare, []
    weights = LeakyNet.draw((d, p, p), generator, device=x.device).weights
    product, net = functools.reduce(lambda a, b: b @ a, weights), LeakyNet(weights)

    def add(what: str, phi_s: Tensor, y_s: Tensor, w: Tensor, rank: str = "") -> None:
        value = gap(closed_form.student(phi_s, y_s), w)
        rows.append({"map and weights": what, "points": y_s.shape[1], "rank of V22": rank, "gap": value})

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)

    for what, w in (("trained", closed_form.ridge_path(product @ x, y)(10.0)), ("random", normal(k, p))):
        for ipc in (1, 2):
            y_s = closed_form.cyclic_labels(k, ipc).to(x)
            x_s, rank = closed_form.deep_linear(weights, w, y_s, normal(p, k * ipc))
            add(f"deep linear, {what} W", product @ x_s, y_s, w, f"{rank} of {p}" if ipc > 1 else "")
    w = closed_form.ridge_path(net(x), y)(10.0)
    for ipc in (1, p // (2 * k), -(-p // k)):
        y_s = closed_form.cyclic_labels(k, ipc).to(x)
        target = closed_form.solve_features(
            closed_form.admissible(y_s, w, closed_form.noise(y_s, w, generator))
        )
        phi_s = net(net.inverse(target, exact=False))
        add("LeakyReLU, trained W", phi_s, y_s, w)
        add("LeakyReLU, trained W, labels solved", phi_s, closed_form.labels_for(phi_s, w), w)
    return rows


# -- rows of the results table ------------------------------------------------------------------------------------------


def own_row(run, dataset: str, ipc: int, method: KRR, found, chance: Spread, synset) -> tables.Row:
    """The tidy row of a set under its own ridge regression.

    Args:
        method: the settings; those of another map than the recipe's first are the variant of that name.
        found: the records of its seeds; chance: accuracies of random real images under the same predictor.
    """
    variant = "" if method.map == KRR().map else method.map
    paper = quoted("krr", dataset, ipc, variant)
    return run.row(
        method="krr",
        variant=variant,
        config=settings_digest(method),
        dataset=dataset,
        ipc=ipc,
        network=f"ridge-{method.map}",
        protocol="own-ridge",
        labels="soft",
        seeds=f"seed {run.seed}: {len(found)} sets",
        accuracy=Spread.of(found["accuracy"]),
        random=chance,
        full=Spread.of([found["teacher"].mean()]),
        paper=None if paper is None else paper[0],
        paper_source="" if paper is None else paper[1],
        seconds=found["seconds"].mean(),
        bytes_images=synset.bytes_images,
        bytes_labels=synset.bytes_labels,
    )


def random_accuracies(draws, data, teacher: Teacher) -> Spread:
    """Accuracies of random real sets in percent: one-hot labels, the teacher's map and lambda."""
    solved = [
        (run.synset.images, krr.one_hot(data.train, len(run.synset.images) // data.train.num_classes))
        for run in draws
    ]
    return Spread.of(
        percent(krr.solution(teacher.phi, *pair, teacher.lam), teacher.phi, data.test) for pair in solved
    )
