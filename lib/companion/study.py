"""One case of a run (a data set at an IPC): data, protocols, distilled sets, baselines and rows, alike in every notebook."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lib import data as datasets
from lib.companion import plots, tables
from lib.companion.published import quoted
from lib.companion.run import Run
from lib.distill import Distilled, distill
from lib.evaluate import Evaluation, Protocol, evaluate, full_data_accuracy, protocol
from lib.synset import check_ipc

SMALL = ("digits", "photos16", "photos32")
FULL_EPOCHS = {"digits": 30, "photos16": 10, "photos32": 10}
RANDOM_NETWORKS = 1  # per draw: with eight draws the draws, not the networks, make the spread
SEED_STEP = 1000  # run seed 1 never meets the sets of run seed 0


@dataclass(frozen=True)
class Result:
    """A method on a case: its distilled sets, and their accuracies under a protocol."""

    method: str
    distilled: list[Distilled]
    evaluation: Evaluation

    @property
    def percent(self) -> list[float]:
        """Mean accuracy of every distilled set in percent: the independent repetitions."""
        return [100 * value for value in self.evaluation.per_set.tolist()]

    @property
    def sets(self):
        return [one.synset for one in self.distilled]

    @property
    def seconds(self) -> float:
        """Seconds per distilled set."""
        return sum(one.seconds for one in self.distilled) / len(self.distilled)


class Case:
    """Everything of one (data set, IPC).

    Attributes:
        plain, augmented: the two protocols of the case, without and with DSA augmentation (the small ones on the embedded data,
            ``dc`` and ``dsa`` elsewhere).
    """

    def __init__(self, run: Run, dataset: str, ipc: int):
        self.run, self.dataset = run, dataset
        self.data = datasets.load(dataset, device=run.device)
        self.ipc = check_ipc(ipc, self.data.train.smallest_class)
        names = ("cpu-small", "cpu-small-dsa") if dataset in SMALL else ("dc", "dsa")
        self.plain, self.augmented = (protocol(name, self.data.train) for name in names)

    def __repr__(self) -> str:
        return f"{self.dataset} IPC {self.ipc}"

    @property
    def small(self) -> bool:
        """Whether this is embedded data, where small networks and short runs are the point."""
        return self.dataset in SMALL

    def distil(self, method, sets: int | None = None, snapshots: Sequence[int] = ()) -> list[Distilled]:
        """Independent distilled sets of one method (cached by content), seeds derived from the run's."""
        with self.run.stage(f"{type(method).__name__} on {self!r}"):
            return [
                distill(
                    method,
                    self.data.train,
                    self.ipc,
                    self.run.seed * SEED_STEP + k,
                    snapshots=snapshots if k == 0 else (),
                    cache=True,
                    progress=self.run.bars,
                )
                for k in range(sets or self.run.profile.sets)
            ]

    def evaluate(
        self, distilled: Sequence[Distilled], protocol: Protocol | None = None, networks: int | None = None
    ):
        """Accuracies of these sets (cached by content)."""
        sets = [one.synset for one in distilled]
        with self.run.stage(f"evaluation on {self!r}"):
            count = networks or self.run.profile.networks
            return evaluate(sets, self.data, protocol or self.plain, self.run.seed, count, cache=True)

    def study(
        self, name: str, method, protocol: Protocol | None = None, *, sets=None, networks=None, snapshots=()
    ) -> Result:
        """Distil and evaluate."""
        distilled = self.distil(method, sets, snapshots)
        return Result(name, distilled, self.evaluate(distilled, protocol, networks))

    def random(self, method, protocol: Protocol | None = None) -> Result:
        """The baseline: more draws than any method gets, since draws of few images differ by ten points."""
        draws = self.run.profile.random_draws
        return self.study("random", method, protocol, sets=draws, networks=RANDOM_NETWORKS)

    def losses(self, result: Result, name: str = "loss") -> torch.Tensor:
        """A metric of every step of every set, ``(sets, steps)``."""
        return torch.stack([one.history[name] for one in result.distilled])

    def show(self, result: Result, *, columns: int = 10, thumbnail: bool = False) -> None:
        """Save the images of the first set: at the start and at the end of the distillation, a film strip between them, and what
        one stored image of four classes is decoded to, where that is more than itself."""
        one, name = result.distilled[0], f"{result.method.lower()}_{self.dataset}_ipc{self.ipc}"
        classes = one.synset.classes
        end, labels = (tensor.cpu() for tensor in one.synset.stored())
        begin = one.snapshots.get(0, end[:0])[: len(end)]
        for part, images in (("start", begin), ("end", end)):
            if len(images):
                steps = "before the first step" if part == "start" else "distilled"
                figure = plots.image_grid(
                    images, labels, classes, f"{result.method} on {self!r}, {steps}", columns
                )
                text = f"{result.method} on {self!r}: images {steps}, by class."
                self.run.save_figure(figure, f"{part}_{name}", text, thumbnail=thumbnail and part == "end")
        present = labels.unique().tolist()
        first = [int((labels == c).nonzero()[0]) for c in present]
        if len(one.synset.targets) > len(labels):
            first = first[:4]
            few = replace(one.synset, codes=one.synset.codes[first], labels=one.synset.labels[first])
            figure = plots.image_grid(
                few.viewable().cpu(),
                few.hard_labels.cpu(),
                classes,
                f"{result.method} on {self!r}, decoded",
            )
            text = f"What one stored image of four classes is decoded to, {result.method} on {self!r}."
            self.run.save_figure(figure, f"decoded_{name}", text)
        if len(one.snapshots) > 1:
            film = torch.stack([one.snapshots[step][first[:4]] for step in sorted(one.snapshots)])
            figure = plots.film_strip(
                film,
                sorted(one.snapshots),
                [classes[c] for c in present[:4]],
                f"{result.method} on {self!r}",
            )
            self.run.save_figure(
                figure, f"film_{name}", f"One image of four classes while {result.method} runs."
            )

    @functools.cached_property
    def full(self) -> Evaluation:
        """The ceiling: the same network on all training data."""
        with self.run.stage(f"full data on {self!r}"):
            return full_data_accuracy(
                self.data, self.plain, self.run.seed, networks=3, epochs=FULL_EPOCHS.get(self.dataset, 200)
            )

    def row(self, result: Result, *, random: Result | None = None) -> tables.Row:
        """The tidy row of a result, with the published accuracy of the same method, data set and IPC if there is one."""
        paper = quoted(result.method, self.dataset, self.ipc)
        evaluation, one = result.evaluation, result.distilled[0].synset
        sets, networks = evaluation.accuracy.shape
        return self.run.row(
            method=result.method,
            dataset=self.dataset,
            ipc=self.ipc,
            network=evaluation.protocol.network,
            protocol=evaluation.protocol.name,
            labels="soft" if one.soft else "hard",
            seed_scheme=f"{sets} sets x {networks} networks",
            acc=100 * evaluation.mean,
            acc_std=100 * evaluation.std,
            n_sets=sets,
            n_networks=networks,
            random_acc=None if random is None else 100 * random.evaluation.mean,
            full_acc=100 * self.full.mean,
            paper_acc=None if paper is None else paper[0],
            paper_source="" if paper is None else paper[1],
            seconds=result.seconds,
            peak_mb=max(one.peak_bytes for one in result.distilled) / 1e6,
            bytes_images=one.bytes_images,
            bytes_labels=one.bytes_labels,
        )
