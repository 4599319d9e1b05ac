"""The table that has published and measured accuracies of the same data in one row."""

from __future__ import annotations

import pytest

from lib.companion import benchmark, tables
from lib.evaluate import Spread
from lib.methods import recipes
from lib.recipes import TWO_CORES

CUT = [(name, ipc) for ipc, names in benchmark.METHODS.items() for name in names]


def row(method: str, ipc: int, network: str, accuracy: float, **more) -> tables.Row:
    about = {
        "notebook": benchmark.NOTEBOOK,
        "config": "0" * 12,
        "dataset": "fashionmnist",
        "protocol": "dc",
        "labels": "hard",
    }
    about |= {"seeds": "seed 0: 3 sets", "seconds": 7.4, "variant": "" if method == "random" else TWO_CORES}
    return tables.Row(
        method=method,
        ipc=ipc,
        network=network,
        accuracy=Spread.of([accuracy - 1, accuracy, accuracy + 1]),
        **about | more,
    )


def frame():
    paper = {"paper": Spread.stated(70.7, 0.6), "paper_source": "a table"}
    own = {"protocol": "own-kernel", "network": "FC1 NTK"}
    return tables.rows_to_frame(
        [
            row("random", 1, "convnet-d3-w32", 56.0),
            row("random", 1, "convnet-d3-w128", 55.0),
            row("dm", 1, "convnet-d3-w32", 71.0, **paper),
            row("dm", 1, "convnet-d3-w128", 72.0, **paper),
            row("random", 1, accuracy=60.0, **own),
            row("kip", 1, accuracy=80.0, **own),
            row("idc", 1, "convnet-d3-w32", 73.0),
            row("idc", 1, "convnet-d3-w32", 79.0, protocol="idc", paper=Spread.stated(81.0)),
        ]
    )


def test_published_and_ours_stand_in_one_row():
    table = benchmark.one_table(frame()).set_index("method")
    assert table.loc["DM", "IPC 1, d3-w32"] == "71.0 ± 1.0 (n=3)"
    assert table.loc["DM", "IPC 1, d3-w128"] == "72.0 ± 1.0 (n=3)"
    assert table.loc["DM", "IPC 1, published"] == "70.7"
    assert table.loc["DM", "distilled with"] == "d3-w32"


def test_a_methods_own_regression_has_its_own_random_images():
    table = benchmark.one_table(frame())
    assert list(table["judged by"]) == ["dc", "dc", "own-kernel", "own-kernel", "dc", "idc"]
    own = table[table["judged by"] == "own-kernel"].set_index("method")
    assert own.loc["KIP", "IPC 1, own"] == "80.0 ± 1.0 (n=3)"
    assert own.loc[tables.label("random"), "IPC 1, d3-w32"] == ""


def test_one_accuracy_is_found_by_method_ipc_and_network():
    assert benchmark.spread(frame(), "dm", 1, "convnet-d3-w128").mean == 72.0
    with pytest.raises(ValueError):
        benchmark.spread(frame(), "dm", 10, "convnet-d3-w128")


def test_an_accuracy_under_another_protocol_is_asked_for_by_name_and_has_a_row_of_its_own():
    assert benchmark.spread(frame(), "idc", 1, "convnet-d3-w32").mean == 73.0
    assert benchmark.spread(frame(), "idc", 1, "convnet-d3-w32", "idc").mean == 79.0
    table = benchmark.one_table(frame()).set_index(["method", "judged by"])
    assert table.loc[("IDC", "dc"), "IPC 1, published"] == "" and table.loc[("IDC", "idc"), "IPC 1, published"] == "81.0"


@pytest.mark.parametrize(("name", "ipc"), CUT)
def test_what_is_cut_is_a_variant_of_the_published_method(name, ipc):
    table = recipes(name)
    cut, published = table.named("fashionmnist", ipc, TWO_CORES), table.named("fashionmnist", ipc)
    assert type(cut.method) is type(published.method) and cut.source
    assert benchmark.made_with(cut) == "d3-w32" and benchmark.made_with(published) == "d3-w128"


@pytest.mark.parametrize("name", ["dm", "dc", "dsa"])
def test_a_quarter_of_the_width_takes_four_times_the_rate(name):
    cut, published = (recipes(name).named("fashionmnist", 1, variant).method for variant in (TWO_CORES, ""))
    assert cut.lr == pytest.approx(4 * published.lr)
