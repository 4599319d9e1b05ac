"""What a notebook shows of an algorithm: its plain text, and where the settings here differ from the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lib.companion.tables import readable
from lib.evaluate import relabel
from lib.evaluate.protocol import PROTOCOLS, protocol
from lib.evaluate.regression import OWN, own
from lib.methods import recipes, title_of
from lib.methods.about import value_text
from lib.plain import text
from lib.recipes import Recipe
from lib.system.errors import CompanionError


def markdown(source: str, plain: str | None = None) -> None:
    """Display Markdown in a notebook; elsewhere print it. The output's plain text is ``plain``, the same on every machine."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        print(plain or source)
    else:
        display({"text/markdown": source, "text/plain": plain or source}, raw=True)


def algorithm(name: str) -> None:
    """Display the plain version of a method (``lib/plain/<name>.py``) as highlighted Python."""
    source = text(name)
    markdown(f"```python\n{source}\n```", source)


def paper_recipe(name: str, dataset: str, ipc: int, variant: str = "") -> Recipe:
    """The published row to hold against: of this data set and IPC, else of CIFAR-10, else the first; the same IPC where there
    is one.

    Raises:
        CompanionError: nothing is published for the variant.
    """
    rows = [row for row in recipes(name) if not row.small and row.variant == variant]
    if not rows:
        raise CompanionError(
            f"{title_of(name)}{f' ({variant})' if variant else ''} has no published settings to compare with"
        )
    return min(rows, key=lambda row: (row.data != dataset, row.data != "cifar10", row.ipc not in (ipc, None)))


def settings(cases: Sequence, name: str, variant: str = "", *, method=None, paper: Recipe | None = None):
    """The settings of every case beside the published ones: a table of the fields that differ, the evaluation's after the method's.

    Args:
        cases: of :class:`lib.companion.study.Case`, one column each.
        name, variant: whose recipe is taken; method: settings that are used in every case instead of their recipe's.
        paper: the published row, default :func:`paper_recipe` of the first case.
    """
    import pandas as pd

    here = [case.recipe(name, variant) for case in cases]
    paper = paper or paper_recipe(name, cases[0].dataset, cases[0].ipc, variant)
    common = paper.protocol in PROTOCOLS  # else both sides are described by evaluations of their own
    columns = {
        f"here: {case}": _described(
            method or recipe.method, case.plain if common else judge(recipe, case.ipc), case.run.profile
        )
        for case, recipe in zip(cases, here, strict=True)
    }
    theirs = judge(paper, paper.ipc)
    columns[f"paper: {paper.data} IPC {paper.ipc or 'any'}"] = _described(
        paper.method, theirs, theirs if common else None
    )
    names = list(dict.fromkeys(key for column in columns.values() for key in column))
    differ = [key for key in names if len({column.get(key, "") for column in columns.values()}) > 1]
    frame = pd.DataFrame(
        {title: [column.get(key, "") for key in differ] for title, column in columns.items()}
    )
    frame.insert(0, "setting", differ)
    return readable(frame)


def judge(recipe: Recipe, ipc: int) -> Any:
    """The evaluation that a recipe names: a protocol, or the name itself where the set is judged by its own regression."""
    if recipe.protocol in PROTOCOLS:
        return protocol(recipe.protocol)
    if recipe.protocol in relabel.PROTOCOLS:
        return relabel.distillation(recipe.protocol)
    return own(recipe.protocol, recipe.data, ipc) if recipe.protocol in OWN else recipe.protocol


def _described(method: Any, evaluation: Any, repetitions: Any) -> dict[str, str]:
    """Setting -> text, of a method, of the protocol that judges it, and of how often (``sets``, ``networks``)."""
    found = {field.name: value_text(getattr(method, field.name)) for field in dataclasses.fields(method)}
    if isinstance(evaluation, str):
        return found | {"evaluation": evaluation}
    left_out = ("name", "source", "sets", "networks")
    fields = [field.name for field in dataclasses.fields(evaluation) if field.name not in left_out]
    about = {f"evaluation: {name}": value_text(getattr(evaluation, name)) for name in fields}
    if repetitions is not None:
        about |= {"evaluation: sets x networks": f"{repetitions.sets} x {repetitions.networks}"}
    return found | {"evaluation": evaluation.name} | about
