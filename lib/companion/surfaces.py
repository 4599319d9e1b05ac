"""Figures of loss landscapes: surfaces as sheets and as contours, slices and spectra; arrays in, a matplotlib figure out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lib.companion.plots import array
from lib.companion.theme import FAINT, INK, PALETTE

DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (10, 3)))
AXES = ("first direction (filter norms)", "second direction (filter norms)")


def sheets(along, panels: Mapping, *, zlabel: str = "loss", names=("all data", "small set"), title: str = ""):
    """Two surfaces over the same plane in every panel, the first as a grey net, the second in colour; one loss axis for all.

    Args:
        along: ``(m,)`` coefficients on both axes; panels: title -> two ``(m, m)`` surfaces.
        names: of the two.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    at = array(along)
    grids = {name: [array(surface) for surface in pair] for name, pair in panels.items()}
    low = min(surface.min() for pair in grids.values() for surface in pair)
    high = max(surface.max() for pair in grids.values() for surface in pair)
    fig, axes = plt.subplots(
        1, len(grids), figsize=(4.4 * len(grids), 3.9), subplot_kw={"projection": "3d"}, squeeze=False
    )
    x, y = np.meshgrid(at, at, indexing="ij")
    for ax, (name, (full, small)) in zip(axes[0], grids.items(), strict=True):
        ax.plot_surface(x, y, small, color=PALETTE[1], alpha=0.75, linewidth=0)
        ax.plot_wireframe(x, y, full, color=INK, linewidth=0.6, rcount=15, ccount=15)
        ax.set(zlim=(low, high), xlabel=AXES[0].split(" (")[0], ylabel=AXES[1].split(" (")[0], zlabel=zlabel)
        ax.set(xticks=_three(at), yticks=_three(at))
        ax.set_title(name, y=0.93)
        ax.zaxis.labelpad = 8
        ax.view_init(elev=22, azim=-60)
        ax.set_box_aspect((1, 1, 0.8), zoom=0.9)
    marks = [
        Line2D([], [], color=INK, linewidth=0.8),
        Line2D([], [], color=PALETTE[1], linewidth=6, alpha=0.75),
    ]
    fig.legend(marks, names, loc="outside lower center", ncols=2)
    if title:
        fig.suptitle(title, x=0.01, ha="left", weight="bold", size=10.5)
    return fig


def contours(
    along, panels: Mapping, *, label: str = "loss", title: str = "", levels: int = 12, log: bool = False
):
    """Filled contours of several surfaces ``(m, m)`` over the same plane, with the same levels; the centre is marked."""
    import matplotlib.pyplot as plt

    at, grids = array(along), {name: array(surface) for name, surface in panels.items()}
    low, high = (float(f([f(surface) for surface in grids.values()])) for f in (np.min, np.max))
    steps = np.geomspace(max(low, high * 1e-4), high, levels) if log else np.linspace(low, high, levels)
    steps[0], steps[-1] = min(low, steps[0]), high + 1e-9 * max(abs(high), 1)
    columns = 3 if len(grids) in (5, 6) else min(len(grids), 4)
    rows = -(-len(grids) // columns)
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.9 * columns + 0.9, 2.9 * rows + 0.3),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for ax in axes.flat[len(grids) :]:
        ax.set_visible(False)
    options = {"levels": steps}
    if log:
        from matplotlib.colors import LogNorm

        options["norm"] = LogNorm(steps[1] / 2, high)
    for ax, (name, surface) in zip(axes.flat, grids.items(), strict=False):
        filled = ax.contourf(at, at, surface.T, extend="neither", **options)
        ax.contour(at, at, surface.T, levels=steps, colors=[INK], linewidths=0.4, alpha=0.6)
        ax.tick_params(labelbottom=True, labelleft=True)
        ax.plot(0, 0, marker="+", color=INK, markersize=9, markeredgewidth=1.6)
        ax.set(title=name, aspect="equal", xticks=_three(at), yticks=_three(at))
        ax.grid(visible=False)
    fig.supxlabel(AXES[0], size=9)
    fig.supylabel(AXES[1], size=9)
    bar = fig.colorbar(
        filled, ax=axes, label=label, format="%.3g", pad=0.02, ticks=steps[:: max(1, levels // 6)]
    )
    bar.outline.set_visible(False)
    if title:
        fig.suptitle(title, x=0.01, ha="left", weight="bold", size=10.5)
    return fig


def slices(
    along, series: Mapping, *, xlabel: str, ylabel: str = "loss", title: str = "", log=False, loglog=False
):
    """Lines over the same positions, told apart by colour and dash; ``(n, m)`` values give a mean and the range of the n."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 3.8))
    for k, (name, values) in enumerate(series.items()):
        values = np.atleast_2d(array(values).astype(float))
        look = {"color": PALETTE[k % 10], "linestyle": DASHES[k % len(DASHES)]}
        ax.plot(array(along), values.mean(0), label=name, **look)
        if len(values) > 1:
            ax.fill_between(
                array(along), values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0
            )
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log or loglog:
        ax.set_yscale("log")
    if loglog:
        ax.set_xscale("log")
    elif array(along).min() < 0:
        ax.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
    fig.legend(loc="outside right center")
    return fig


def _three(at: np.ndarray) -> list[float]:
    """Ticks at both ends and in the middle."""
    return [float(at[0]), float((at[0] + at[-1]) / 2), float(at[-1])]
