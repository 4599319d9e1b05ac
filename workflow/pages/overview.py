"""The overview of the front page: every method's accuracy beside random real images and all training data, by family."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from lib.companion.contents import FAMILIES
from lib.companion.theme import PALETTE, use_style
from lib.methods import METHODS
from workflow.pages import readme

CAPTION = (
    "Every method at one image per class: mean and standard deviation over independent sets. The band is random real images, the "
    "dashed line all training data; hollow dots are not to be compared: own protocol or labels, other epochs or network."
)
INKS = {"light": ("#333333", "white"), "dark": ("#d8dbde", "#131416")}  # text and page


def draw(board, folder: Path) -> list[str]:
    """Write ``overview-light.png`` and ``overview-dark.png``; returns their names, none if there is nothing to show."""
    board = board[board["run"] == readme.RUN]
    found = {case: measured(board, *case) for case in readme.CASES}
    names = [name for name in METHODS if name != "random" and any(name in rows for rows in found.values())]
    if not names:
        return []
    import matplotlib

    written = []
    for theme, (ink, page) in INKS.items():
        with matplotlib.rc_context():
            use_style()
            colours = ["text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"]
            colours += [f"{axis}tick.{part}" for axis in "xy" for part in ("color", "labelcolor")]
            matplotlib.rcParams.update(dict.fromkeys(colours, ink) | {"axes.facecolor": page})
            drawn = figure(names, board, found, ink, page)
            drawn.savefig(folder / f"overview-{theme}.png", dpi=150, facecolor=page)
        written.append(f"overview-{theme}.png")
    return written


def measured(board, data: str, ipc: int) -> dict:
    """Method -> its row of the case and whether it is marked as judged otherwise."""
    rows = {name: readme.chosen(board, name, data, ipc) for name in METHODS}
    return {name: row for name, row in rows.items() if row is not None}


def figure(names: list[str], board, found: dict, ink: str, page: str):
    from matplotlib.figure import Figure

    families = [(digit, list(group)) for digit, group in groupby(sorted(names, key=family), key=family)]
    places, at, labels = {}, 0.0, []
    for digit, group in families:
        labels.append((at, FAMILIES[digit].split(":")[0]))
        for name in group:
            at += 1
            places[name] = at
        at += 1.3
    fig = Figure(figsize=(9, 1.2 + 0.21 * at), layout="constrained")
    for ax, ((data, ipc), rows) in zip(fig.subplots(1, len(found), sharey=True), found.items(), strict=True):
        if "random" in rows:
            row = rows["random"][0]
            ax.axvspan(
                row["acc"] - row["acc_sd"], row["acc"] + row["acc_sd"], color=ink, alpha=0.13, linewidth=0
            )
            ax.axvline(row["acc"], color=ink, alpha=0.5, linewidth=1)
        if ceiling := readme.full(board, data, ipc):
            ax.axvline(float(ceiling), color=ink, linestyle=(0, (5, 3)), linewidth=1.2)
        for number, (_, group) in enumerate(families):
            for name in group:
                if name in rows:
                    row, mark = rows[name]
                    colour = PALETTE[number % len(PALETTE)]
                    look = {
                        "color": colour,
                        "markeredgecolor": colour,
                        "markerfacecolor": page if mark else colour,
                        "fmt": "o",
                    }
                    ax.errorbar(
                        row["acc"], places[name], xerr=row["acc_sd"], elinewidth=1.4, markersize=5, **look
                    )
        ax.set(xlabel="test accuracy (%)", title=f"{data}, {ipc} image{'s' * (ipc > 1)} per class")
        ax.set_yticks(list(places.values()), [METHODS[name].title for name in places], fontsize=8)
        ax.grid(axis="x", alpha=0.25)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        for where, words in labels:
            ax.annotate(
                words,
                (0.01, where),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                style="italic",
                va="center",
            )
        ax.set_ylim(at - 0.6, -0.8)
    return fig


def family(name: str) -> str:
    return METHODS[name].notebook[0]
