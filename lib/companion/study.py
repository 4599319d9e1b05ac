"""One case of a run (a data set at an IPC): data, protocols, distilled sets, baselines and rows, alike in every notebook.

results = {case: {"random": case.random(), "dm": case.study("dm")} for case in cases}
results[case]["dm"].spread
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lib import data as datasets
from lib.companion import plots, tables
from lib.companion.profiles import published_only
from lib.companion.published import quoted
from lib.companion.run import Run
from lib.distill import Distilled, distill, settings_digest
from lib.evaluate import (
    PROTOCOLS,
    Evaluation,
    Protocol,
    Spread,
    evaluate,
    evaluate_fresh,
    full_data_accuracy,
    protocol,
)
from lib.methods import METHODS, method, name_of, recipes
from lib.recipes import Recipe, Recipes
from lib.synset import SyntheticSet, check_ipc
from lib.system.errors import CompanionError

RANDOM_NETWORKS = 1  # per draw: with eight draws the draws, not the networks, make the spread
FULL_IMAGES = 30_000  # that a network sees: 21 epochs of digits, 3 of fashion14
SEED_STEP = 1000  # run seed 1 never meets the sets of run seed 0


@dataclass(frozen=True)
class Result:
    """A method on a case: its distilled sets, and their accuracies under a protocol.

    Attributes:
        method: the settings; variant: "" for those of the recipe.
    """

    method: Any
    variant: str
    distilled: list[Distilled]
    evaluation: Evaluation

    @property
    def name(self) -> str:
        """Of the method in ``lib.methods.METHODS``."""
        return name_of(self.method)

    @property
    def label(self) -> str:
        """How figures and tables write it."""
        return tables.label(self.name, self.variant)

    @property
    def spread(self) -> Spread:
        """Accuracy in percent over the distilled sets, the independent repetitions."""
        return self.evaluation.spread

    @property
    def sets(self) -> list[SyntheticSet]:
        return [run.synset for run in self.distilled]

    @property
    def seconds(self) -> float:
        """Seconds per distilled set."""
        return sum(run.seconds for run in self.distilled) / len(self.distilled)


class Case:
    """Everything of one (data set, IPC). Two cases of the same data set and IPC are equal, so results are indexed by case.

    Attributes:
        plain, augmented: the two protocols of the case, without and with DSA augmentation (the small ones on small data, ``dc``
            and ``dsa`` elsewhere).
    """

    def __init__(self, run: Run, dataset: str, ipc: int, whiten: str | None = None):
        self.run, self.dataset = run, dataset
        self.data = datasets.load(dataset, device=run.device, whiten=whiten)
        if run.profile.name == "cpu" and not self.small:
            raise CompanionError(published_only(dataset))
        self.ipc = check_ipc(ipc, self.data.train.smallest_class)
        names = ("cpu-small", "cpu-small-dsa") if self.small else ("dc", "dsa")
        self.plain, self.augmented = (protocol(name, self.data.train) for name in names)

    def __repr__(self) -> str:
        return f"{self.dataset} IPC {self.ipc}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Case) and (self.dataset, self.ipc) == (other.dataset, other.ipc)

    def __hash__(self) -> int:
        return hash((self.dataset, self.ipc))

    @property
    def small(self) -> bool:
        """Whether small networks and short runs are the point, as the data say."""
        return self.data.train.small

    @property
    def trainable(self) -> bool:
        """Whether a network can be trained on all of the data here: they are small, or there is a GPU."""
        return self.small or self.run.device.type != "cpu"

    def recipe(self, what: str | Recipes, variant: str = "") -> Recipe:
        """The row of a method (its name, or its table) for this data set and IPC."""
        table = recipes(what) if isinstance(what, str) else what
        return table.find(self.data.train, self.ipc, variant)

    def whitened(self, what: str | Recipes, variant: str = "") -> Case:
        """The same case with the data whitened as the recipe of a method says (its paper's whitening; of small data: none)."""
        kind = self.recipe(what, variant).whiten
        return self if kind is None else Case(self.run, self.dataset, self.ipc, kind)

    def distil(self, settings, sets: int | None = None, snapshots: Sequence[int] = ()) -> list[Distilled]:
        """Independent distilled sets of one method (cached by content), seeds derived from the run's."""
        with self.run.stage(f"{name_of(settings)} on {self!r}"):
            return [
                distill(
                    settings,
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
    ) -> Evaluation:
        """Accuracies of these sets (cached by content)."""
        sets = [run.synset for run in distilled]
        with self.run.stage(f"evaluation on {self!r}"):
            count = networks or self.run.profile.networks
            return evaluate(sets, self.data, protocol or self.plain, self.run.seed, count, cache=True)

    def study(
        self,
        what: Any,
        variant: str = "",
        protocol: Protocol | None = None,
        *,
        sets=None,
        networks=None,
        snapshots=(),
    ) -> Result:
        """Distil and evaluate.

        Args:
            what: name of a method (its recipe is taken, that of the variant, which must have one), a ``Recipe``, or settings.
            variant: "" for a method at its recipe; whatever differs from it has a name.
            protocol: default :attr:`plain`.
        """
        if isinstance(what, str):
            what = self.recipe(what, variant)
        if isinstance(what, Recipe):
            what, variant = what.method, variant or what.variant
        distilled = self.distil(what, sets, snapshots)
        return Result(what, variant, distilled, self.evaluate(distilled, protocol, networks))

    def under(self, result: Result, protocol: Protocol, networks: int | None = None) -> Result:
        """The same sets under another protocol."""
        return replace(result, evaluation=self.evaluate(result.distilled, protocol, networks))

    def fresh(
        self,
        result: Result,
        per_class: int | None = None,
        protocol: Protocol | None = None,
        networks: int | None = None,
    ) -> Result:
        """The generators of these sets, judged with new images in every epoch (``lib.evaluate.fresh``), as a rule IPC of a class."""
        protocol, count = protocol or self.plain, networks or self.run.profile.networks
        with self.run.stage(f"evaluation with new images on {self!r}"):
            found = evaluate_fresh(
                result.sets, self.data, protocol, per_class or self.ipc, self.run.seed, count, cache=True
            )
        return replace(result, evaluation=found)

    def random(self, protocol: Protocol | None = None) -> Result:
        """The baseline: more draws than any method gets, since draws of few images differ by ten points."""
        draws = self.run.profile.random_draws
        return self.study(method("random")(), protocol=protocol, sets=draws, networks=RANDOM_NETWORKS)

    def losses(self, result: Result, name: str = "loss") -> torch.Tensor:
        """A metric of every step of every set, ``(sets, steps)``."""
        return torch.stack([run.history[name] for run in result.distilled])

    def stem(self, result: Result) -> str:
        """Name of the files of a result: ``dm_digits_ipc1``, ``ddm_gram_digits_ipc1``."""
        variant = re.sub(r"[^a-z0-9]+", "-", result.variant.lower()).strip("-")
        return "_".join(filter(None, [result.name, variant, self.dataset, f"ipc{self.ipc}"]))

    def save_set(self, result: Result) -> None:
        """Store the first distilled set as ``results/<run>/<notebook>/<stem>.safetensors``."""
        self.run.save_set(result.sets[0], self.stem(result))

    def show(self, result: Result, *, see: str, columns: int = 10, thumbnail: bool = False) -> None:
        """Save the images of the first set: at the start and at the end of the distillation, a film strip between them, and what
        one stored image of four classes is decoded to, where that is more than itself.

        Args:
            see: one sentence: what to see in the distilled images.
        """
        first, title = result.distilled[0], f"{result.label} on {self!r}"
        begin = first.snapshots.get(0, first.synset.codes[:0])
        if len(begin):
            begin = begin[: len(first.synset.codes)]
            self._grid(
                result,
                "start",
                begin,
                f"{title}, before the first step",
                "Where the distillation starts.",
                columns,
            )
        self._grid(result, "end", first.synset.stored()[0], f"{title}, distilled", see, columns, thumbnail)
        if len(first.synset.targets) > len(first.synset.labels):
            self._decoded(result)
        if len(first.snapshots) > 1:
            self._film(result)

    def _grid(
        self, result: Result, part: str, images, title: str, see: str, columns: int, thumbnail=False
    ) -> None:
        synset = result.sets[0]
        fig = plots.image_grid(images.cpu(), synset.stored()[1].cpu(), synset.classes, title, columns)
        self.run.save_figure(
            fig, f"{part}_{self.stem(result)}", f"{title}: images by class.", see=see, thumbnail=thumbnail
        )

    def _firsts(self, result: Result) -> list[int]:
        """One stored image of each of the first four classes that have any."""
        labels = result.sets[0].stored()[1].cpu()
        return [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()[:4]]

    def _decoded(self, result: Result) -> None:
        synset, chosen = result.sets[0], self._firsts(result)
        few = replace(synset, codes=synset.codes[chosen], labels=synset.labels[chosen])
        title = f"{result.label} on {self!r}, decoded"
        fig = plots.image_grid(few.viewable().cpu(), few.hard_labels.cpu(), synset.classes, title)
        text = f"What one stored image of four classes is decoded to, {result.label} on {self!r}."
        see = "One stored image of a class makes all the images of its row: these are what a network is trained on."
        self.run.save_figure(fig, f"decoded_{self.stem(result)}", text, see=see)

    def _film(self, result: Result) -> None:
        first, chosen = result.distilled[0], self._firsts(result)
        steps = sorted(first.snapshots)
        film = torch.stack([first.snapshots[step][chosen] for step in steps])
        names = [first.synset.classes[c] for c in first.synset.stored()[1].cpu()[chosen].tolist()]
        fig = plots.film_strip(film, steps, names, f"{result.label} on {self!r}")
        text = f"One image of four classes while {result.label} runs on {self!r}."
        see = "Every row is one image, from its start on the left to the distilled one on the right."
        self.run.save_figure(fig, f"film_{self.stem(result)}", text, see=see)

    @functools.cached_property
    def full(self) -> Evaluation:
        """The ceiling: the same network on all training data. On small data a network sees about ``FULL_IMAGES`` images, however
        many there are of them."""
        count = len(self.data.train)
        epochs = max(1, round(FULL_IMAGES / count)) if self.small else 200
        networks = 1 if self.small and count > FULL_IMAGES / 4 else 2
        with self.run.stage(f"full data on {self!r}"):
            return full_data_accuracy(self.data, self.plain, self.run.seed, networks=networks, epochs=epochs)

    def row(self, result: Result, *, random: Result | None = None, **changes) -> tables.Row:
        """The tidy row of a result, with the published accuracy of the same method, data set and IPC if there is one.

        Args:
            random: the baseline under the same protocol; changes: fields of the row that are others.
        Raises:
            CompanionError: settings that differ from the recipe, or a changed protocol, without a name of their own.
        """
        self._check_identity(result)
        paper = quoted(result.name, self.dataset, self.ipc, result.variant)
        evaluation, synset = result.evaluation, result.sets[0]
        sets, networks = evaluation.accuracy.shape
        found = {
            "method": result.name,
            "variant": result.variant,
            "config": settings_digest(result.method),
            "dataset": self.dataset,
            "ipc": self.ipc,
            "network": evaluation.protocol.network,
            "protocol": evaluation.protocol.name,
            "labels": "soft" if synset.soft else "hard",
            "seeds": f"seed {self.run.seed}: {sets} sets x {networks} networks",
            "accuracy": result.spread,
            "networks": networks,
            "random": None if random is None else random.spread,
            "full": self.full.spread if self.trainable else None,
            "paper": None if paper is None else paper[0],
            "paper_source": "" if paper is None else paper[1],
            "seconds": result.seconds,
            "peak_mb": max(run.peak_bytes for run in result.distilled) / 1e6,
            "bytes_images": synset.bytes_images,
            "bytes_labels": synset.bytes_labels,
        }
        return self.run.row(**found | changes)

    def rows(self, results, baseline: str = "random") -> list[tables.Row]:
        """Rows of ``{key: result}``, each with the result under ``baseline`` beside it."""
        random = results.get(baseline)
        return [
            self.row(result, random=None if key == baseline else random) for key, result in results.items()
        ]

    def _check_identity(self, result: Result) -> None:
        """Refuse a variant or protocol that is not what its name says."""
        used = result.evaluation.protocol
        if isinstance(used, Protocol) and used.name in PROTOCOLS:
            named = replace(protocol(used.name, self.data.train), network=used.network)
            if replace(used, sets=named.sets, networks=named.networks) != named:
                raise CompanionError(
                    f"the protocol of {result.label} on {self!r} is called {used.name!r} but differs from it: give it a name of its own"
                )
        wanted = self._named_settings(result.name, result.variant)
        if wanted is not None and settings_digest(wanted) != settings_digest(result.method):
            what = f"variant {result.variant!r}" if result.variant else "recipe"
            raise CompanionError(
                f"the settings of {result.label} on {self!r} are not those of its {what}: name the variant, "
                f'as in case.study(method, "with DSA")'
            )

    def _named_settings(self, name: str, variant: str) -> Any:
        """What a name and a variant stand for; None for a variant that no table lists."""
        if name == "random":
            return None if variant else method("random")()
        known = name in METHODS and variant in recipes(name).variants
        return self.recipe(name, variant).method if known else None
