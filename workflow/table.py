"""The table of notebooks (notebooks.yaml), their parameters, and the request that a run carries out."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lib.methods import METHODS
from lib.system.errors import CompanionError, choose, unknown
from lib.system.naming import run_name

RESOURCES = ("cpus", "mem_mb", "runtime", "gpu")


@dataclass(frozen=True)
class Notebook:
    """One row: ``resources[profile]`` has the keys of :data:`RESOURCES`."""

    name: str
    title: str
    reads: tuple[str, ...]
    resources: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Table:
    """All rows in running order, the names of the profiles, and what each notebook writes."""

    notebooks: Mapping[str, Notebook]
    profiles: tuple[str, ...]
    outputs: tuple[str, ...]


def load(root: Path) -> Table:
    """Read ``root/workflow/notebooks.yaml``.

    Raises:
        CompanionError: a row reads a notebook that is not in the table, or misspells a profile or a resource.
    """
    content = yaml.safe_load((root / "workflow" / "notebooks.yaml").read_text(encoding="utf-8"))
    rows, defaults = content["notebooks"] or {}, content["resources"]
    shown = {entry.notebook for entry in METHODS.values()}
    groups = {"all": tuple(rows), "methods": tuple(name for name in rows if name in shown)}
    notebooks = {}
    for name, row in rows.items():
        where, reads, changed = (
            f"in the row {name} of notebooks.yaml:",
            row.get("reads", ()),
            row.get("resources", {}),
        )
        if isinstance(reads, str):
            reads = choose(f"group of notebooks {where}", reads, groups)
        for kind, given, allowed in (
            ("notebook", reads, rows),
            ("profile", changed, defaults),
            ("resource", [key for values in changed.values() for key in values], RESOURCES),
        ):
            for value in given:
                if value not in allowed:
                    raise unknown(f"{kind} {where}", value, allowed)
        resources = {profile: values | changed.get(profile, {}) for profile, values in defaults.items()}
        notebooks[name] = Notebook(name, row["title"], tuple(nb for nb in reads if nb != name), resources)
    return Table(notebooks, tuple(defaults), tuple(content["outputs"]))


def select(table: Table, names: Iterable[str] | None) -> tuple[str, ...]:
    """The notebooks meant by ``names`` (full names or beginnings that fit exactly one), in running order; all for None.

    Raises:
        CompanionError: for a name that fits none or several.
    """
    chosen = set(table.notebooks if names is None else ())
    for name in names or ():
        word = Path(name).name.removesuffix(".ipynb")
        fits = [known for known in table.notebooks if known.startswith(word)]
        if word in fits:
            fits = [word]
        if not fits:
            raise unknown("notebook", name, table.notebooks)
        if len(fits) > 1:
            raise CompanionError(f"the notebook {name!r} fits several; allowed: {', '.join(fits)}")
        chosen.update(fits)
    return tuple(name for name in table.notebooks if name in chosen)


# ------------------------------------------------------------------ parameters


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's ``parameters`` cell."""

    name: str
    types: tuple[str, ...]  # from the hint, such as ("int", "None"); from the default where there is no hint
    default: object


def parameters_of(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, from its cell tagged ``parameters``.

    Read with ``ast`` because ``papermill.inspect_notebook`` passes over hints such as ``int | None``.

    Raises:
        CompanionError: if the notebook is missing or not exactly one cell has the tag, or one holds more than literals.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except FileNotFoundError as error:
        raise CompanionError(f"the notebook {path} of workflow/notebooks.yaml does not exist") from error
    except (ValueError, KeyError) as error:
        raise CompanionError(f"{path} is not a notebook") from error
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise CompanionError(f"{path.name} must have one cell tagged 'parameters', it has {len(tagged)}")
    found = {}
    try:
        for line in ast.parse("".join(tagged[0]["source"])).body:
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            default = ast.literal_eval(line.value)
            hint = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else type(default).__name__
            types = tuple(
                re.sub(r"\[.*\]", "", word).strip() for word in re.sub(r"\[.*\]", "", hint).split("|")
            )
            found[target.id] = Parameter(target.id, types, default)
    except (SyntaxError, ValueError, AttributeError) as error:
        raise CompanionError(
            f"the parameters cell of {path.name} may hold only lines such as `ipc: int = 1`"
        ) from error
    return found


def value_of(parameter: Parameter, text: str) -> object:
    """``text`` from the command line as the parameter's type.

    Raises:
        CompanionError: if it is none of the types.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if "str" in parameter.types and not (value is None and "None" in parameter.types):
        value = value if isinstance(value, str) else text
    kind = "None" if value is None else type(value).__name__
    if kind == "int" and "float" in parameter.types and "int" not in parameter.types:
        return float(value)
    if kind not in parameter.types:
        types = " or ".join(parameter.types)
        raise CompanionError(
            f"the parameter {parameter.name} takes {types} (default {parameter.default!r}), not {text!r}"
        )
    return value


def check_parameters(
    given: Sequence[tuple[str, str]], known: Mapping[str, Mapping[str, Parameter]], strict: bool
) -> dict:
    """Command-line texts as values, checked against the notebooks that are to run.

    Args:
        given: (name, text) pairs.
        known: per notebook its parameters.
        strict: every notebook must have every parameter (the notebooks were named); otherwise one of them is enough.

    Raises:
        CompanionError: for a name that no (``strict``: not every) notebook has, and for a value of the wrong type.
    """
    values = {}
    for name, text in given:
        having = [nb for nb, parameters in known.items() if name in parameters]
        lacking = [nb for nb in known if nb not in having]
        if lacking and (strict or not having):
            allowed = set.intersection(*(set(known[nb]) for nb in lacking)) - {"profile"}
            where = "" if not having else f" of {', '.join(lacking)}"
            raise unknown(f"parameter{where}", name, allowed)
        if name == "profile":
            raise CompanionError("the profile is chosen by --profile NAME, not by -p")
        for nb in having:
            values[name] = value_of(known[nb][name], text)
        if lacking:
            print(f"note: {', '.join(lacking)} has no parameter {name!r} and runs without it")
    return values


# ------------------------------------------------------------------ a run


@dataclass(frozen=True)
class Request:
    """What to run: the science profile, parameters that differ from the notebooks' defaults, and which notebooks."""

    profile: str
    notebooks: tuple[str, ...]
    parameters: Mapping[str, object] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Name of the folder under ``results/`` and ``figures/``: ``cpu``, or ``cpu+dataset=photos16+ipc=10``."""
        return run_name(self.profile, self.parameters)

    def config(self) -> dict:
        """The request as Snakemake's config."""
        return {
            "profile": self.profile,
            "notebooks": list(self.notebooks),
            "parameters": dict(self.parameters),
        }

    def of(self, known: Mapping[str, Parameter]) -> dict:
        """What papermill gives to one notebook: the profile and those changed parameters that the notebook has."""
        given = {"profile": self.profile, **self.parameters}
        return {name: value for name, value in given.items() if name in known}


def request_from(config: Mapping, table: Table) -> Request:
    """The request in Snakemake's config; everything at the ``cpu`` profile if it is empty.

    Raises:
        CompanionError: for an unknown profile or notebook.
    """
    profile = choose("profile", config.get("profile", "cpu"), {name: name for name in table.profiles})
    return Request(profile, select(table, config.get("notebooks")), dict(config.get("parameters", {})))
