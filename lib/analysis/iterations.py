"""How much sooner a method reaches the accuracy of another, with the spread that few repetitions leave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def first_reached(x, accuracy, target: float) -> float:
    """Where the best accuracy so far first reaches ``target``, interpolated between the points ``x``; infinity if nowhere."""
    best = np.maximum.accumulate(accuracy)
    if best[-1] < target:
        return np.inf
    at = int((best >= target).argmax())
    return float(x[0] if at == 0 else np.interp(target, best[at - 1 : at + 1], x[at - 1 : at + 1]))


def speedups(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], host: str, seed: int = 0, resamplings: int = 1000
) -> dict[str, np.ndarray]:
    r"""How many times less every other method needs to get to the host's last accuracy, ``(resamplings,)`` each.

    Repetitions are drawn with replacement, the same ones of every method; curves are their means. The target is the mean last
    accuracy of the host less its standard error: what cannot be told from it. 0 where a method never gets there.

    Args:
        curves: name -> (cost, accuracy), each ``(repetitions, marks)``; costs are positive and ascend.
    """
    rng, out = np.random.default_rng(seed), {name: [] for name in curves if name != host}
    last = curves[host][1][:, -1]
    slack = last.std(ddof=1) / len(last) ** 0.5
    for pick in rng.integers(len(last), size=(resamplings, len(last))):
        target = last[pick].mean() - slack
        reached = {
            name: first_reached(cost[pick].mean(0), accuracy[pick].mean(0), target)
            for name, (cost, accuracy) in curves.items()
        }
        for name, values in out.items():
            values.append(reached[host] / reached[name])
    return {name: np.array(values) for name, values in out.items()}
