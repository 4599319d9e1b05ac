"""What the notebooks on kernel methods measure: sets under their own kernel regression, under other kernels, by eigenvalues.

A method is anything with a ``kernel()`` -> K(x1, x2) and a ``ridge`` (:class:`lib.methods.kip.KIP`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lib.analysis.spectrum import spectral_bands
from lib.companion import tables
from lib.companion.published import quoted
from lib.companion.study import Case
from lib.distill import Distilled, settings_digest
from lib.evaluate.kernel import Kernel, kernel_accuracy
from lib.evaluate.regression import regression_targets
from lib.evaluate.spread import Spread
from lib.kernels import ridge
from lib.methods import name_of


def accuracy(method, distilled: Sequence[Distilled], data, kernel: Kernel | None = None) -> Spread:
    """Test accuracy in percent of the kernel regression on every set, with the method's kernel or another one."""
    kernel = kernel or method.kernel()
    parts = ((run.synset.images.double(), _labels(run)) for run in distilled)
    return Spread.of(
        (kernel_accuracy(kernel, images, labels, data.test, method.ridge) for images, labels in parts), 100
    )


def whole(method, data) -> Spread:
    """Test accuracy in percent of the regression on all training images."""
    labels = ridge.centred_one_hot(data.train.labels, data.train.num_classes)
    found = kernel_accuracy(method.kernel(), data.train.images.double(), labels, data.test, method.ridge)
    return Spread.of([found], 100)


def checkpoints(
    case: Case, variants: Mapping[str, object], counts: Sequence[int], value: Callable
) -> dict[str, Tensor]:
    """Value of (method, distilled sets) -> one number per set after so many steps: name -> (sets, counts).

    A run of k steps is the first part of a longer one with the same seed.
    """
    runs = {
        name: [(m, case.distil(replace(m, iterations=k))) for k in counts] for name, m in variants.items()
    }
    return {name: torch.tensor([list(value(m, sets)) for m, sets in at]).T for name, at in runs.items()}


def transfer(
    case: Case, sources: Mapping[str, object], kernels: Mapping[str, Kernel]
) -> dict[str, dict[str, Spread]]:
    """Accuracies in percent of sets distilled with one kernel under others: source -> kernel -> spread over the sets."""
    sets = {name: (method, case.distil(method)) for name, method in sources.items()}
    return {
        name: {other: accuracy(method, runs, case.data, kernel) for other, kernel in kernels.items()}
        for name, (method, runs) in sets.items()
    }


@torch.no_grad()
def bands(method, distilled: Sequence[Distilled], test, count: int = 5) -> Tensor:
    """Accuracy with one band of eigenvalues of K_ss, divided by that with all: (sets, bands), largest eigenvalues first."""
    rows = []
    for run in distilled:
        x, kernel = run.synset.images.double(), method.kernel()
        k_ss = ridge.regularised(kernel(x, x), method.ridge)
        parts = spectral_bands(k_ss, kernel(test.images.double(), x), _labels(run), count)
        right = [ridge.accuracy(part, test.labels) for part in (*parts, parts.sum(0))]
        rows.append(torch.tensor(right[:-1]) / right[-1])
    return torch.stack(rows)


def row(
    case: Case,
    method,
    variant: str,
    network: str,
    distilled: Sequence[Distilled],
    accuracy: Spread,
    *,
    random: Spread | None = None,
    full: Spread | None = None,
    protocol: str = "own-kernel",
) -> tables.Row:
    """The tidy row of sets judged by their own regression, with a kernel or as ``protocol`` says, accuracies in percent.

    Args:
        method: the settings of the sets; variant: "" for those of the recipe; network: the kernel, as the table names it.
    """
    name, synset = name_of(method), distilled[0].synset
    paper = quoted(name, case.dataset, case.ipc, variant)
    return case.run.row(
        method=name,
        variant=variant,
        config=settings_digest(method),
        dataset=case.dataset,
        ipc=case.ipc,
        network=network,
        protocol=protocol,
        labels="soft" if synset.soft else "hard",
        seeds=f"seed {case.run.seed}: {accuracy.n} sets",
        accuracy=accuracy,
        random=random,
        full=full,
        paper=None if paper is None else paper[0],
        paper_source="" if paper is None else paper[1],
        seconds=sum(run.seconds for run in distilled) / len(distilled),
        peak_mb=max(run.peak_bytes for run in distilled) / 1e6,
        bytes_images=synset.bytes_images,
        bytes_labels=synset.bytes_labels,
    )


def _labels(run: Distilled) -> Tensor:
    return regression_targets(run.synset, dtype=torch.float64)
