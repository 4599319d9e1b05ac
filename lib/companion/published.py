"""Published accuracies, each with its source: quoted beside ours, never mixed with them.

They are test accuracies in percent with the papers' own protocols (IPC 1, 10, 50: hard labels, no whitening), kept in
``published.csv``. A number that no reachable source states is not in the file.
"""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("published.csv")


def published(methods=None, datasets=None):
    """The rows (method, dataset, ipc, acc, acc_std, network, source) of these methods and data sets, as a DataFrame."""
    import pandas as pd

    frame = pd.read_csv(FILE).astype({"ipc": "Int64"})
    for column, wanted in (("method", methods), ("dataset", datasets)):
        if wanted is not None:
            frame = frame[frame[column].isin(wanted)]
    return frame.reset_index(drop=True)


def quoted(method: str, dataset: str, ipc: int) -> tuple[float, str] | None:
    """``(accuracy, "published, cifar10: source")`` of one cell, or None where nothing is published."""
    frame = published([method], [dataset])
    frame = frame[frame["ipc"] == ipc]
    if frame.empty:
        return None
    row = frame.iloc[0]
    return float(row["acc"]), f"published, {dataset}: {row['source']}"
