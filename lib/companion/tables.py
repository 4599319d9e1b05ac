"""The tidy table of results: one row per result, its identity first, the protocol and the baselines beside every accuracy.

What a result is: method (name in ``lib.methods.METHODS``), variant ("" for the method at its recipe), digest of the settings, data
set, images per class, network, protocol, kind of labels, seeds. Which row stands for a method in a table is decided by
:func:`standing` and nowhere else; how a method is written by :func:`label`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.evaluate.spread import Spread
from lib.methods import METHODS, title_of
from lib.system.errors import CompanionError, choose, unknown
from lib.system.files import atomic

LABELS = ("hard", "soft")
CONFIG = re.compile(r"[0-9a-f]{12}")

# What must agree for two rows to be the same result of a method.
KEY = ("run", "method", "dataset", "ipc", "network", "protocol", "labels")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result. Accuracies are Spreads in percent; what is unknown or does not apply stays ``None``.

    Attributes:
        method: name in ``lib.methods.METHODS``; variant: "" for the method at its recipe; config: of ``lib.distill.settings_digest``.
        labels: hard | soft, never compared with one another silently.
        seeds: what the repetitions are, such as "seed 0: 3 sets x 5 networks".
        accuracy: over the independent repetitions; networks: trained per set.
        random, full: random real images under the same protocol, and the whole training set with the same network.
        paper: the published number; paper_source: its table and data set.
        seconds, peak_mb: of one distillation.

    Raises:
        CompanionError: unknown method or kind of labels, a config that is no digest, an accuracy outside 0 ... 100.
    """

    notebook: str
    method: str
    variant: str = ""
    config: str
    dataset: str
    ipc: int
    network: str
    protocol: str
    labels: str
    seeds: str
    accuracy: Spread
    networks: int = 1
    random: Spread | None = None
    full: Spread | None = None
    paper: Spread | None = None
    paper_source: str = ""
    seconds: float | None = None
    peak_mb: float | None = None
    bytes_images: int | None = None
    bytes_labels: int | None = None
    commit: str = ""

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        if self.labels not in LABELS:
            raise unknown("label type", self.labels, LABELS)
        if not CONFIG.fullmatch(self.config):
            raise CompanionError(
                f"config of {self.method} is 12 hexadecimal digits of its settings, not {self.config!r}"
            )
        if not isinstance(self.accuracy, Spread) or not 0 <= self.accuracy.mean <= 100:
            raise CompanionError(
                f"accuracy of {self.method} is a Spread in percent, 0 to 100, not {self.accuracy!r}"
            )

    def columns(self) -> dict:
        """The row as it stands in a table: :data:`COLUMNS`."""
        spread = self.accuracy
        found = {name: getattr(self, name) for name in _PLAIN_BEFORE}
        found |= {"acc": spread.mean, "acc_sd": None if math.isnan(spread.sd) else spread.sd, "n": spread.n}
        found |= {"networks": self.networks}
        for name in ("random", "full", "paper"):
            known = getattr(self, name)
            found[f"{name}_acc"] = None if known is None else known.mean
        return found | {name: getattr(self, name) for name in _PLAIN_AFTER}


_PLAIN_BEFORE = (
    "notebook", "method", "variant", "config", "dataset", "ipc", "network", "protocol", "labels", "seeds"
)  # fmt: skip
_PLAIN_AFTER = ("paper_source", "seconds", "peak_mb", "bytes_images", "bytes_labels", "commit")
COLUMNS = (
    *_PLAIN_BEFORE, "acc", "acc_sd", "n", "networks", "random_acc", "full_acc", "paper_acc", *_PLAIN_AFTER
)  # fmt: skip
TEXTS = ("notebook", "method", "variant", "config", "dataset", "network", "protocol", "labels", "seeds",
         "paper_source", "commit")  # fmt: skip


def label(method: str, variant: str = "") -> str:
    """How figures and tables write a method: ``DM``, ``DDM (gram)``."""
    return f"{title_of(method)} ({variant})" if variant else title_of(method)


def rows_to_frame(rows: Iterable[Row]):
    """A DataFrame with exactly :data:`COLUMNS`, in the order given."""
    import pandas as pd

    return pd.DataFrame([row.columns() for row in rows], columns=list(COLUMNS))


def read_tables(folder: Path | str, name: str = "table"):
    """The rows of every ``<run>/<notebook>/<name>.csv`` under ``folder`` in one frame, with a leading column ``run``.

    Files that lack the tidy columns are passed over, and so are copies: rows of another notebook than the folder's. No file at all
    gives an empty frame.
    """
    import pandas as pd

    frames = []
    for path in sorted(Path(folder).glob(f"*/*/{name}.csv")):
        # as text: a digest such as 123456789e12 is no number, and an empty variant is not missing
        frame = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
        if set(COLUMNS) <= set(frame.columns):
            frame = frame[list(COLUMNS)].fillna(dict.fromkeys(TEXTS, ""))
            frame = frame[frame["notebook"] == path.parent.name]
            frames.append(frame.assign(run=path.parent.parent.name))
    columns = ["run", *COLUMNS]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def standing(frame):
    """The rows that stand for the methods in a table: one per (run, method, data set, IPC, network, protocol, labels).

    Only rows of the variant "" stand, the method at its recipe. Where several notebooks measured the same, the method's own
    (``METHODS[...].notebook``) goes first, then the one with more repetitions, then the earlier file name. README, gallery,
    leaderboard and every comparison use this rule.

    Args:
        frame: of :data:`COLUMNS`, with or without ``run``.
    Raises:
        CompanionError: two of them differ in their settings: one of them is a variant and must say so.
    """
    chosen = []
    at_recipe = frame[frame["variant"] == ""]
    for key, rows in at_recipe.groupby([name for name in KEY if name in frame.columns], sort=False):
        _refuse_two_settings(key, rows)
        own = METHODS[rows["method"].iloc[0]].notebook
        order = sorted(
            rows.index, key=lambda at: (rows["notebook"][at] != own, -rows["n"][at], rows["notebook"][at])
        )
        chosen.append(order[0])
    return frame.loc[sorted(chosen)].reset_index(drop=True)


def _refuse_two_settings(key: tuple, rows) -> None:
    if rows["config"].nunique() == 1:
        return
    first = rows.iloc[0]
    other = rows[rows["config"] != first["config"]].iloc[0]
    raise CompanionError(
        f"{first['notebook']} and {other['notebook']} have different settings ({first['config']}, {other['config']}) of the same "
        f"result, {' '.join(map(str, key))}: what is not at its recipe must name its variant"
    )


def spread_in(row) -> Spread:
    """The accuracy that stands in a row of a frame of :data:`COLUMNS`."""
    return Spread.stated(row["acc"], row["acc_sd"], row["n"])


def spreads(frame) -> dict[str, Spread]:
    """Accuracies of a frame's rows by the label of their method, in the order of the rows: what plots take.

    Raises:
        CompanionError: two rows of one label.
    """
    found: dict[str, Spread] = {}
    for _, row in frame.iterrows():
        name = label(row["method"], row["variant"])
        if name in found:
            raise CompanionError(
                f"two rows of {name} in one table; choose with standing(), or by network and protocol"
            )
        found[name] = spread_in(row)
    return found


def readable(frame, digits: int = 1):
    """``frame`` to display: numbers as text with ``digits`` decimals, missing ones and row numbers empty.

    A frame of :data:`COLUMNS` is folded to what a reader compares: accuracies as "mean ± sd", what does not
    apply left out, and no times, which differ between machines (they are in the file). Spreads in other frames
    are written alike. Text does not depend on display options, so that the cell's output is the same in
    JupyterLab, papermill and a test.
    """
    shown = _folded(frame, digits) if list(frame.columns) == list(COLUMNS) else frame.copy()
    shown = shown.astype(object)
    for position, column in enumerate(shown.columns):
        values = list(shown.iloc[:, position])
        numbers = [v for v in values if isinstance(v, (float, np.floating)) and np.isfinite(v)]
        decimals = 0 if numbers and all(float(v).is_integer() for v in numbers) else digits
        shown[column] = [_text(value, decimals, digits) for value in values]
    if list(shown.index) == list(range(len(shown))):
        shown.index = [""] * len(shown)
    return shown


def _text(value: object, decimals: int, digits: int) -> object:
    if isinstance(value, Spread):
        return value.text(digits)
    if value is None or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return ""
    return f"{value:.{decimals}f}" if isinstance(value, (float, np.floating)) else value


def _folded(frame, digits: int):
    """The tidy columns folded for a reader; columns without any value are left out."""
    shown = frame[["dataset", "ipc", "network", "protocol", "labels"]].copy()
    names = [label(*pair) for pair in zip(frame["method"], frame["variant"], strict=True)]
    shown.insert(0, "method", names)
    shown["accuracy (%)"] = [spread_in(row).text(digits) for _, row in frame.iterrows()]
    shown["n"] = [f"{n} x {networks}" for n, networks in zip(frame["n"], frame["networks"], strict=True)]
    further = {"random_acc": "random", "full_acc": "whole set", "paper_acc": "published"}
    further |= {"paper_source": "source", "bytes_images": "image bytes", "bytes_labels": "label bytes"}
    for column, name in further.items():
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
