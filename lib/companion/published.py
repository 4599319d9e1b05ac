"""Published accuracies, each with its source: quoted beside ours, never mixed with them.

They are test accuracies in percent with the papers' own protocols (IPC 1, 10, 50: hard labels, no whitening), kept in
``published.csv`` under the same names as our results (``lib.methods.METHODS``; beside these ``full data``, ``MTT`` and ``ridge teacher``,
which are no method here). A number that no reachable source states is not in the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lib.companion import tables
from lib.evaluate.spread import Spread
from lib.methods import METHODS
from lib.system.errors import choose

FILE = Path(__file__).with_name("published.csv")
OTHERS = ("full data", "MTT", "ridge teacher")


def numbers(methods: Iterable[str] | None = None, datasets: Iterable[str] | None = None):
    """The rows (method, variant, dataset, ipc, acc, acc_sd, network, source) of these methods and data sets, as a DataFrame.

    Raises:
        CompanionError: a method that neither the registry nor the file knows.
    """
    import pandas as pd

    frame = pd.read_csv(FILE, dtype={"variant": str}).astype({"ipc": "Int64"}).fillna({"variant": ""})
    methods = None if methods is None else list(methods)
    for name in methods or ():
        choose("published method", name, METHODS | dict.fromkeys(OTHERS))
    for column, wanted in (("method", methods), ("dataset", datasets)):
        if wanted is not None:
            frame = frame[frame[column].isin(list(wanted))]
    return frame.reset_index(drop=True)


def published(
    methods: Iterable[str] | None = None,
    datasets: Iterable[str] | None = None,
    ipcs: Iterable[int] | None = None,
):
    """The same to display: method, data set, IPC, accuracy, network and source."""
    frame = numbers(methods, datasets)
    if ipcs is not None:
        frame = frame[frame["ipc"].isin(list(ipcs))]
    shown = frame[["dataset"]].copy()
    shown.insert(
        0, "method", [tables.label(*pair) for pair in zip(frame["method"], frame["variant"], strict=True)]
    )
    shown["IPC"] = [
        "all" if count is None else str(count)
        for count in frame["ipc"].astype(object).where(frame["ipc"].notna(), None)
    ]
    shown["accuracy (%)"] = [Spread.stated(row["acc"], row["acc_sd"]).text() for _, row in frame.iterrows()]
    shown[["network", "source"]] = frame[["network", "source"]].fillna("")
    return tables.readable(shown.reset_index(drop=True))


def quoted(method: str, dataset: str, ipc: int, variant: str = "") -> tuple[Spread, str] | None:
    """``(accuracy, "published, cifar10: source")`` of one cell, or None where nothing is published."""
    frame = numbers([method], [dataset])
    frame = frame[(frame["ipc"] == ipc) & (frame["variant"] == variant)]
    if frame.empty:
        return None
    row = frame.iloc[0]
    return Spread.stated(row["acc"], row["acc_sd"]), f"published, {dataset}: {row['source']}"
