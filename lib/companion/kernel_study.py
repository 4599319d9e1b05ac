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
from lib.distill import Distilled
from lib.evaluate.kernel import Kernel, kernel_accuracy
from lib.evaluate.regression import regression_targets
from lib.kernels import ridge


def percents(method, distilled: Sequence[Distilled], data, kernel: Kernel | None = None) -> list[float]:
    """Test accuracy in percent of the kernel regression on every set, with the method's kernel or another one."""
    kernel = kernel or method.kernel()
    parts = ((one.synset.images.double(), _labels(one)) for one in distilled)
    return [
        100 * kernel_accuracy(kernel, images, labels, data.test, method.ridge) for images, labels in parts
    ]


def whole(method, data) -> float:
    """Test accuracy in percent of the regression on all training images."""
    labels = ridge.centred_one_hot(data.train.labels, data.train.num_classes)
    return 100 * kernel_accuracy(method.kernel(), data.train.images.double(), labels, data.test, method.ridge)


def checkpoints(
    case: Case, variants: Mapping[str, object], counts: Sequence[int], value: Callable
) -> dict[str, Tensor]:
    """Value of (method, distilled sets) -> one number per set after so many steps: name -> (sets, counts).

    A run of k steps is the first part of a longer one with the same seed.
    """
    runs = {
        name: [(m, case.distil(replace(m, iterations=k))) for k in counts] for name, m in variants.items()
    }
    return {name: torch.tensor([list(value(m, found)) for m, found in at]).T for name, at in runs.items()}


def transfer(case: Case, sources: Mapping[str, object], kernels: Mapping[str, Kernel]) -> dict[str, Tensor]:
    """Accuracies in percent of sets distilled with one kernel under others: name of the source -> (kernels, sets)."""
    sets = {name: (method, case.distil(method)) for name, method in sources.items()}
    return {
        name: torch.tensor([percents(method, found, case.data, kernel) for kernel in kernels.values()])
        for name, (method, found) in sets.items()
    }


@torch.no_grad()
def bands(method, distilled: Sequence[Distilled], test, count: int = 5) -> Tensor:
    """Accuracy with one band of eigenvalues of K_ss, divided by that with all: (sets, bands), largest eigenvalues first."""
    rows = []
    for one in distilled:
        x, kernel = one.synset.images.double(), method.kernel()
        k_ss = ridge.regularised(kernel(x, x), method.ridge)
        parts = spectral_bands(k_ss, kernel(test.images.double(), x), _labels(one), count)
        right = [ridge.accuracy(part, test.labels) for part in (*parts, parts.sum(0))]
        rows.append(torch.tensor(right[:-1]) / right[-1])
    return torch.stack(rows)


def row(
    case: Case,
    name: str,
    network: str,
    distilled: Sequence[Distilled],
    values: Sequence[float],
    random: Sequence[float] | None = None,
    full: float | None = None,
) -> tables.Row:
    """The tidy row of sets judged by their own kernel regression, accuracies in percent."""
    values, one, paper = torch.tensor(values), distilled[0].synset, quoted(name, case.dataset, case.ipc)
    return case.run.row(
        method=name,
        dataset=case.dataset,
        ipc=case.ipc,
        network=network,
        protocol="own-kernel",
        labels="soft" if one.soft else "hard",
        seed_scheme=f"{len(values)} sets",
        acc=float(values.mean()),
        acc_std=float(values.std(correction=0)),
        n_sets=len(values),
        random_acc=None if random is None else sum(random) / len(random),
        full_acc=full,
        paper_acc=None if paper is None else paper[0],
        paper_source="" if paper is None else paper[1],
        seconds=sum(found.seconds for found in distilled) / len(distilled),
        peak_mb=max(found.peak_bytes for found in distilled) / 1e6,
        bytes_images=one.bytes_images,
        bytes_labels=one.bytes_labels,
    )


def _labels(one: Distilled) -> Tensor:
    return regression_targets(one.synset, dtype=torch.float64)
