"""A published benchmark on a laptop: the data set and the protocol of the papers, methods cut to what a core does in minutes.

Every row of the table holds our accuracy and the published one of the same data set, images per class and protocol; networks of
the distillation and of the evaluation are named, because the first are narrower than the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lib.companion import kernel_study, ridge_study, tables
from lib.companion.published import quoted
from lib.companion.study import Case, Result
from lib.evaluate import PROTOCOLS, protocol
from lib.evaluate.spread import Spread
from lib.methods import method, recipes
from lib.recipes import TWO_CORES
from lib.system.files import ROOT

NOTEBOOK = "87_fashion_mnist"
NARROW = "convnet-d3-w32"
SETS = 3  # of every method; random real images get the profile's draws
_SELECTED = ("herding", "k_center")
_MATCHED = ("dm", "dc", "dsa")
OWN_PROTOCOL = ("idc",)  # methods whose published accuracies are taken under a longer protocol with more augmentation
METHODS = {
    1: (*_SELECTED, *_MATCHED, "idc"),
    10: (*_SELECTED, *_MATCHED),
    50: _SELECTED,
}  # by images per class


def random_rows(case: Case, networks: Sequence[str]) -> list[tables.Row]:
    """Random real images, judged by each of these networks."""
    results = [case.random(replace(case.plain, network=network)) for network in networks]
    return [case.row(result) for result in results]


def method_rows(
    case: Case, name: str, variant: str, networks: Sequence[str], random: Sequence[tables.Row]
) -> tuple[Result, list[tables.Row]]:
    """One method at its recipe of this variant, judged by each of these networks: its result with the first of them, and all rows. The
    published accuracy stands beside them unless the method is of :data:`OWN_PROTOCOL`."""
    recipe = case.recipe(name, variant)
    first = replace(case.plain, network=networks[0])
    result = case.study(recipe, protocol=first, sets=SETS, networks=1)
    results = [result, *(case.under(result, replace(case.plain, network=other), 1) for other in networks[1:])]
    found = {} if name in OWN_PROTOCOL else _paper(case, name)
    rows = [
        replace(case.row(result), random=chance.accuracy, **found)
        for result, chance in zip(results, random, strict=True)
    ]
    return result, rows


def own_protocol_rows(case: Case, result: Result, variant: str, network: str) -> list[tables.Row]:
    """The sets of a method, and random real images, under the protocol of its recipe and with this network."""
    own = protocol(case.recipe(result.name, variant).protocol, case.data.train, network=network)
    chance, found = case.random(own), case.under(result, own, 1)
    return [case.row(chance), case.row(found, random=chance, **_paper(case, result.name))]


def _paper(case: Case, name: str) -> dict:
    paper = quoted(name, case.dataset, case.ipc, "")
    return {"paper": paper[0], "paper_source": paper[1]} if paper else {}


def kip_rows(case: Case) -> list[tables.Row]:
    """KIP, and random real images, under the kernel regression of KIP."""
    recipe = case.recipe("kip", TWO_CORES)
    settings = {"kip": recipe.method, "random": replace(recipe.method, iterations=0)}
    counts = {"kip": SETS, "random": case.run.profile.random_draws}
    sets = {name: case.distil(one, counts[name]) for name, one in settings.items()}
    found = {name: kernel_study.accuracy(settings[name], made, case.data) for name, made in sets.items()}
    about = {"kip": (recipe.method, TWO_CORES), "random": (method("random")(), "")}
    chance = {"kip": found["random"], "random": None}
    return [
        kernel_study.row(case, *about[name], "FC1 NTK", sets[name], found[name], random=chance[name])
        for name in ("random", "kip")
    ]


def krr_rows(case: Case) -> list[tables.Row]:
    """The closed form of linear ridge regression, and random real images under it."""
    settings, draw = case.recipe("krr", TWO_CORES).method, method("random")()
    teacher, _ = ridge_study.teacher_of(settings, case.data, case.run.seed)
    sets, draws = case.distil(settings, SETS), case.distil(draw, case.run.profile.random_draws)
    chance = ridge_study.random_accuracies(draws, case.data, teacher)
    found = Spread.of(ridge_study.record(made, case.data.test)["accuracy"] for made in sets)

    own = {"network": "ridge-identity", "protocol": "own-ridge"}
    return [
        kernel_study.row(case, draw, "", distilled=draws, accuracy=chance, **own),
        kernel_study.row(case, settings, TWO_CORES, distilled=sets, accuracy=found, random=chance, **own),
    ]


def spread(board, method: str, ipc: int, network: str, judged_by: str = "") -> Spread:
    """The accuracy of a method in the frame of all rows; under ``dc`` where a network is trained and no protocol is named."""
    wanted = judged_by or ("dc" if network.startswith("convnet") else None)
    at = (board["method"] == method) & (board["ipc"] == ipc) & (board["network"] == network)
    at = at if wanted is None else at & (board["protocol"] == wanted)
    (found,) = [tables.spread_in(row) for _, row in board[at].iterrows()]
    return found


def one_table(board):
    """Published and ours in one row: a frame for people, an accuracy per cell; networks of distillation and evaluation named.

    *Own* is the accuracy under the method's own regression; published ones without a spread where none is known.
    """
    import pandas as pd

    lines, columns = {}, []
    for _, row in board.iterrows():
        method, ipc, trained = row["method"], row["ipc"], row["protocol"] in PROTOCOLS
        line = lines.setdefault(
            (method, row["protocol"]), {"method": tables.label(method), "judged by": row["protocol"]}
        )
        if method != "random":
            line["distilled with"] = made_with(recipes(method).named(row["dataset"], ipc, TWO_CORES))
        found = {
            f"IPC {ipc}, {row['network'].removeprefix('convnet-') if trained else 'own'}": tables.spread_in(
                row
            ).text(count=True)
        }
        if pd.notna(row["paper_acc"]):
            found[f"IPC {ipc}, published"] = f"{row['paper_acc']:.1f}"
        found[f"IPC {ipc}, seconds"] = f"{row['seconds']:.0f}"
        line.update(found)
        columns += found
    last = ("own", "published", "seconds")
    order = sorted(
        dict.fromkeys(columns),
        key=lambda name: (int(name.split()[1].rstrip(",")), name.split()[-1] in last, name),
    )
    return pd.DataFrame(list(lines.values()))[["method", "judged by", "distilled with", *order]].fillna("")


def stored():
    """:func:`one_table` as the profile ``overnight`` stored it; empty where it has not run."""
    import pandas as pd

    path = ROOT / "results" / "overnight" / NOTEBOOK / "benchmark.csv"
    return pd.read_csv(path, dtype=str).fillna("") if path.is_file() else pd.DataFrame()


def made_with(recipe) -> str:
    """The network of the distillation, as a table names it; "" for a method without one."""
    network = getattr(recipe.method, "network", None) or getattr(
        getattr(recipe.method, "proxy", None), "network", ""
    )
    return network.removeprefix("convnet-")
