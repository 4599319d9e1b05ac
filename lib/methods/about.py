"""How a method says what it is about to do: the card that JupyterLab displays, and the line before a distillation."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from typing import Any

from lib.methods import METHODS, name_of, recipes
from lib.recipes import Recipe
from lib.system.errors import CompanionError

PRESET = ("cifar10", 10)  # the data set and IPC whose published row stands as the example, where there is one
NETWORKS = ("network", "proxy", "teacher", "prior")  # fields that say with which network the steps are done


def value_text(value: Any) -> str:
    """A setting as a reader writes it: ``ClassMean + Gram(1e4)``, ``Mosaic(2)``, ``none``.

    Of a value that is a dataclass its name and those fields that are not at their defaults; of one that is a sum of ``parts``
    these, joined by plus.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = getattr(value, "parts", None)
        if isinstance(parts, tuple) and len(dataclasses.fields(value)) == 1:
            return " + ".join(map(value_text, parts))
        return f"{type(value).__name__}{_changed(value)}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return (
            f"{value:.0e}".replace("e+0", "e")
            if abs(value) >= 1e4 and float(f"{value:.0e}") == value
            else f"{value:g}"
        )
    if isinstance(value, (tuple, list)):
        return ", ".join(map(value_text, value)) or "none"
    return str(value)


def _changed(value: Any) -> str:
    """``(1e4, k=2)``: the fields that are not at their defaults, the first one without its name; a weight is always said, unless 1."""
    words = []
    for number, field in enumerate(dataclasses.fields(value)):
        mine = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        silent = 1.0 if field.name == "weight" else default
        if silent is dataclasses.MISSING or mine != silent:
            words.append(value_text(mine) if number == 0 else f"{field.name}={value_text(mine)}")
    return f"({', '.join(words)})" if words else ""


def heading(method: Any) -> str:
    """Title, authors and year: ``DM (Zhao & Bilen 2023)``; of a class of somebody else its name."""
    entry = METHODS.get(name_of(method))
    if entry is None:
        return type(method).__name__
    return f"{entry.title} ({entry.paper})" if entry.paper else entry.title


def cost(method: Any, ipc: int | None = None) -> str:
    """What a run takes: ``20 000 steps with convnet-d3-w128``; without an IPC, where it decides, of IPC 1 and 10."""
    if ipc is not None:
        steps = _steps(method.total_steps(ipc))
    else:
        one, ten = (method.total_steps(count) for count in (1, 10))
        steps = _steps(one) if one == ten else f"{_steps(one)} at IPC 1, {_steps(ten)} at IPC 10"
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    looked_at = next((fields[name] for name in NETWORKS if name in fields), None)
    trained = getattr(looked_at, "network", None)
    looked_at = trained if isinstance(trained, str) else looked_at
    return steps if looked_at is None else f"{steps} with {value_text(looked_at)}"


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}".replace(",", " ") if count else "no step"


def source_of(method: Any) -> str:
    """Whose settings these are, found among the rows of the method's table: ``the published settings for cifar10 IPC 10 and 16 more``."""
    name = name_of(method)
    if name not in METHODS:
        return "a method of your own"
    rows = sorted((row for row in recipes(name) if row.method == method), key=_order)
    if not rows:
        return "settings that no recipe has"
    which = "small" if rows[0].small else _published(name)
    others = sum(row.small == rows[0].small for row in rows) - 1
    return f"the {which} settings for {rows[0]}{f' and {others} more' if others else ''}"


def how_to_ask(method: Any) -> str:
    """How to get settings that are not small: ``published settings: recipes("dm").named("cifar10", 10).method``; "" if there are none."""
    name = name_of(method)
    rows = [row for row in recipes(name) if not row.small] if name in METHODS else []
    if not rows:
        return ""
    row = min(rows, key=_order)
    words = [row.data] if row.ipc is None else [row.data, row.ipc]
    said = ", ".join(map(json.dumps, words)) + (f", variant={json.dumps(row.variant)}" if row.variant else "")
    return f"{_published(name)} settings: recipes({json.dumps(name)}).named({said}).method"


def _order(row: Recipe) -> tuple[bool, ...]:
    """The row that stands for others first: not small, as published, of the example's data and IPC."""
    return row.small, row.variant != "", row.data != PRESET[0], row.ipc != PRESET[1]


def _published(name: str) -> str:
    return "full" if METHODS[name].reconstruction else "published"


def announcement(method: Any, data: str, ipc: int) -> str:
    """The line before a distillation: what runs on which data, what it takes, whose settings they are and how to ask for published ones."""
    told = [cost(method, ipc), source_of(method), how_to_ask(method)]
    return f"{heading(method)} on {data} IPC {ipc}: {'; '.join(filter(None, told))}"


def card(method: Any) -> str:
    """The line above and all settings in a table, as HTML."""
    import pandas as pd

    try:
        takes = cost(method)
    except CompanionError as error:  # a value that only a run would refuse
        takes = str(error)
    values = {field.name: value_text(getattr(method, field.name)) for field in dataclasses.fields(method)}
    table = pd.DataFrame({"setting": values.keys(), "value": values.values()}).to_html(index=False)
    told = filter(None, [takes, source_of(method), how_to_ask(method)])
    return f"<p><b>{escape(heading(method))}</b>: {escape('; '.join(told))}</p>{table}"
