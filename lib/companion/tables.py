"""The tidy table of results: one row per method and case, the protocol and the baselines beside every
accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.system.errors import CompanionError, unknown
from lib.system.files import atomic

LABELS = ("hard", "soft")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result. Accuracies are in percent; what is unknown or does not apply stays ``None``."""

    notebook: str
    method: str
    dataset: str
    ipc: int
    network: str
    protocol: str
    labels: str  # hard | soft: never compared with one another silently
    seed_scheme: str  # what the spread runs over, such as "3 sets x 5 networks"
    acc: float
    acc_std: float | None = None
    n_sets: int = 1
    n_networks: int = 1
    random_acc: float | None = None  # random real images, same protocol
    full_acc: float | None = None  # the whole training set, same network
    paper_acc: float | None = None
    paper_source: str = ""  # table and data set of the published number
    seconds: float | None = None
    peak_mb: float | None = None
    bytes_images: int | None = None
    bytes_labels: int | None = None
    commit: str = ""

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise unknown("label type", self.labels, LABELS)
        if not 0 <= self.acc <= 100:
            raise CompanionError(f"accuracy of {self.method} is in percent, 0 to 100, not {self.acc!r}")


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def rows_to_frame(rows: Iterable[Row]):
    """A DataFrame with exactly :data:`COLUMNS`, in the order given."""
    import pandas as pd

    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=list(COLUMNS))


def read_tables(folder: Path | str, name: str = "table"):
    """The rows of every ``<run>/<notebook>/<name>.csv`` under ``folder`` in one frame, with a leading column
    ``run``.

    Files that lack the tidy columns are passed over; no file at all gives an empty frame.
    """
    import pandas as pd

    frames = []
    for path in sorted(Path(folder).glob(f"*/*/{name}.csv")):
        frame = pd.read_csv(path)
        if set(COLUMNS) <= set(frame.columns):
            frames.append(frame[list(COLUMNS)].assign(run=path.parent.parent.name))
    columns = ["run", *COLUMNS]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def mean_spread(values: Sequence[float], digits: int = 1) -> str:
    """``86.4 ± 1.2 (n=15)``: mean, standard deviation (n - 1) and count; a single value has no spread.

    Raises:
        CompanionError: for no value at all.
    """
    values = np.asarray(values, dtype=float).ravel()
    if values.size == 0:
        raise CompanionError("mean_spread needs at least one value")
    if values.size == 1:
        return f"{values[0]:.{digits}f} (n=1)"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f} (n={values.size})"


def readable(frame, digits: int = 1):
    """``frame`` to display: numbers as text with ``digits`` decimals, missing ones and row numbers empty.

    A frame of :data:`COLUMNS` is folded to what a reader compares: accuracies as "mean ± sd", what does not
    apply left out, and no times, which differ between machines (they are in the file). Text does not depend
    on display options, so that the cell's output is the same in JupyterLab, papermill and a test.
    """
    shown = _folded(frame, digits) if list(frame.columns) == list(COLUMNS) else frame.copy()
    shown = shown.astype(object)
    for position, column in enumerate(shown.columns):
        values = list(shown.iloc[:, position])
        numbers = [v for v in values if isinstance(v, (float, np.floating)) and np.isfinite(v)]
        decimals = 0 if numbers and all(float(v).is_integer() for v in numbers) else digits
        shown[column] = [_text(value, decimals) for value in values]
    if list(shown.index) == list(range(len(shown))):
        shown.index = [""] * len(shown)
    return shown


def _text(value: object, decimals: int) -> object:
    if value is None or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return ""
    return f"{value:.{decimals}f}" if isinstance(value, (float, np.floating)) else value


def _folded(frame, digits: int):
    """The tidy columns folded for a reader; columns without any value are left out."""

    def accuracy(row) -> str:
        spread = (
            ""
            if row["acc_std"] in (None, "") or np.isnan(row["acc_std"])
            else f" ± {row['acc_std']:.{digits}f}"
        )
        return f"{row['acc']:.{digits}f}{spread}"

    shown = frame[["method", "dataset", "ipc", "network", "protocol", "labels"]].copy()
    shown["accuracy (%)"] = [accuracy(row) for _, row in frame.iterrows()]
    shown["n"] = [
        f"{sets} x {networks}" for sets, networks in zip(frame["n_sets"], frame["n_networks"], strict=True)
    ]
    names = {
        "random_acc": "random",
        "full_acc": "whole set",
        "paper_acc": "published",
        "paper_source": "source",
    }
    names |= {"bytes_images": "image bytes", "bytes_labels": "label bytes"}
    for column, name in names.items():
        if (frame[column].notna() & (frame[column] != "")).any():
            shown[name] = frame[column]
    return shown


def use_display() -> None:
    """Let pandas print whole tables: all columns side by side, no text cut."""
    import pandas as pd

    pd.set_option("display.max_colwidth", None, "display.max_columns", None, "display.width", 200)


def write_csv(frame, path: Path) -> None:
    """Write ``frame`` as CSV, in one step, numbers to six significant digits so that a rerun gives a readable
    diff.
    """
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
