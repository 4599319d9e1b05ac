"""The figures of the notebooks, one look for all (:mod:`lib.companion.theme`): arrays or results in, a matplotlib figure out.

Tensors are accepted wherever arrays are. What has a mean and a deviation comes as a result, an evaluation or a
:class:`lib.evaluate.Spread`, never as two numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from lib.companion.theme import FAINT, GREY, HUE, INK, MARKERS, PALETTE, TINT, class_labels, ink_on, literal
from lib.evaluate.spread import Spread, spread_of
from lib.system.errors import CompanionError, choose, unknown

ACCURACY = "test accuracy (%)"
LEVELS = ((0, (6, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))  # dashes of level lines
TITLE_LETTER = 0.1  # inches at most, of a title


def image_grid(images01, labels, classes: Sequence[str], title: str = "", columns: int | None = None):
    """One row per class, or one row of all classes where each has a single image.

    Args:
        images01: ``(N, c, h, w)`` in display range; clipped to [0, 1]. One or three channels.
        labels: ``(N,)`` class indices.
        classes: the class names; classes without an image are left out.
        columns: show at most so many images of each class.
    """
    images, labels = _pictures(images01), array(labels).astype(int)
    present = [c for c in range(len(classes)) if (labels == c).any()]
    rows = [images[labels == c][:columns] for c in present]
    shown = class_labels(classes)
    names = [shown[c] for c in present]
    if all(len(row) == 1 for row in rows):
        return _mosaic([np.concatenate(rows)], title, bottom=names)
    return _mosaic(rows, title, left=names)


def film_strip(
    snapshots01, steps: Sequence, names: Sequence[str] | None = None, title="", xlabel="distillation step"
):
    """How images change: one row per image, one column per snapshot.

    Args:
        snapshots01: ``(T, N, c, h, w)`` in display range.
        steps: the T steps at which they were taken, or T other labels of the columns.
        names: N row labels.
    """
    snapshots = array(snapshots01)
    if len(snapshots) != len(steps):
        raise CompanionError(
            f"film_strip has {len(snapshots)} snapshots and {len(steps)} steps; these must be equal"
        )
    rows = [_pictures(snapshots[:, n]) for n in range(snapshots.shape[1])]
    labels = [step if isinstance(step, str) else f"{step:,}".replace(",", " ") for step in steps]
    fig = _mosaic(rows, title, left=names and [literal(name) for name in names], bottom=labels)
    fig.axes[0].set_xlabel(xlabel)
    return fig


def curves(
    series: Mapping, x=None, *, xlabel="distillation step", ylabel="loss", title="", log=False, smooth=1
):
    """Lines with a band of one standard deviation.

    Args:
        series: name -> ``(T,)`` or ``(n, T)`` values; n repetitions give mean, band and "n = ..." in the
            legend.
        x: ``(T,)`` positions, default 1 ... T.
        log: logarithmic vertical axis (the band is then cut at the smallest positive value).
        smooth: running mean over so many points, named on the axis.
    """
    fig, ax = _axes()
    for name, values in series.items():
        runs = np.atleast_2d(array(values).astype(float))
        if smooth > 1:
            runs = np.stack([np.convolve(run, np.ones(smooth) / smooth, mode="valid") for run in runs])
        at = (np.arange(1, runs.shape[1] + smooth) if x is None else array(x))[smooth - 1 :]
        points = [Spread.of(column) for column in runs.T]
        mean = np.array([point.mean for point in points])
        label = f"{name} (n = {len(runs)})" if len(runs) > 1 else str(name)
        (line,) = ax.plot(at, mean, label=label)
        if len(runs) > 1:
            sd = np.array([point.sd for point in points])
            low = np.maximum(mean - sd, mean[mean > 0].min() / 10) if log else mean - sd
            ax.fill_between(at, low, mean + sd, color=line.get_color(), alpha=0.18, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel + (f" (mean of {smooth})" if smooth > 1 else ""), title=title)
    if log:
        ax.set_yscale("log")
    if len(series) > 4:  # beside the lines, where it hides none
        fig.legend(loc="outside right center")
    elif len(series) > 1 or np.atleast_2d(array(next(iter(series.values())))).shape[0] > 1:
        ax.legend()
    return fig


def sweep(
    series: Mapping,
    *,
    xlabel: str,
    ylabel: str = ACCURACY,
    title="",
    logx=False,
    reference: Mapping | None = None,
):
    """A quantity against a setting, with bars of one standard deviation.

    Args:
        series: name -> {position: result}; the positions of the lines may differ.
        logx: logarithmic horizontal axis; the ticks are the positions themselves.
        reference: name -> result that does not depend on the setting, drawn as a level line.
    """
    fig, ax = _axes()
    for k, (name, points) in enumerate(series.items()):
        spreads = [spread_of(value, "sweep") for value in points.values()]
        look = {"color": PALETTE[k % 10], "marker": MARKERS[k % 10], "capsize": 3, "label": name}
        ax.errorbar(list(points), *_moments(spreads), **look)
    for k, (name, value) in enumerate((reference or {}).items()):
        ax.axhline(
            spread_of(value, "sweep").mean,
            color=INK,
            linestyle=LEVELS[k % len(LEVELS)],
            linewidth=1.1,
            label=name,
        )
    x = sorted({position for points in series.values() for position in points})
    if logx:
        ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, xticks=x)
    ax.set_xticklabels([f"{value:g}" for value in x])
    ax.minorticks_off()
    if len(series) > 1 or reference:
        ax.legend()
    return fig


def accuracy_vs_ipc(series: Mapping, *, baseline: str = "", reference=None, title: str = ""):
    """Accuracy over images per class, with bars of one standard deviation.

    Args:
        series: name -> {images per class: result}.
        baseline: the one of them that is drawn as a grey band, mean and standard deviation, such as random real images.
        reference: ``(label, result)`` drawn as a dashed line, such as the whole training set.
    """
    fig, ax = _axes()
    ipcs = sorted({ipc for points in series.values() for ipc in points})
    if baseline:
        _band(ax, baseline, choose("series", baseline, dict(series)), ipcs)
    if reference is not None:
        level = spread_of(reference[1], "accuracy_vs_ipc").mean
        ax.axhline(level, color=INK, linestyle=LEVELS[0], linewidth=1.1, label=reference[0])
    lines = [name for name in series if name != baseline]
    for k, name in enumerate(lines):
        shift = (k - (len(lines) - 1) / 2) * 0.12  # so that error bars do not hide one another
        at = [ipcs.index(ipc) + shift for ipc in series[name]]
        spreads = [spread_of(value, "accuracy_vs_ipc") for value in series[name].values()]
        look = {"color": PALETTE[k % 10], "marker": MARKERS[k % 10], "capsize": 3, "label": name}
        ax.errorbar(at, *_moments(spreads), **look)
    ax.set(xlabel="images per class", ylabel=ACCURACY, title=title)
    ax.set(xticks=range(len(ipcs)), xlim=(-0.6, len(ipcs) - 0.4))
    ax.set_xticklabels(ipcs)
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside right center")
    return fig


def _band(ax, name: str, points: Mapping, ipcs: Sequence[int]) -> None:
    """A result of every IPC as a grey band, half a step beyond both ends so that a single one shows as a band, too."""
    known = [k for k, ipc in enumerate(ipcs) if ipc in points]
    mean, sd = (
        np.array(values)
        for values in _moments([spread_of(points[ipcs[k]], "accuracy_vs_ipc") for k in known])
    )
    at = np.concatenate([[known[0] - 0.4], known, [known[-1] + 0.4]])
    mean, sd = (np.concatenate([values[:1], values, values[-1:]]) for values in (mean, sd))
    ax.fill_between(at, mean - sd, mean + sd, color=FAINT, alpha=0.35, linewidth=0)
    ax.plot(at, mean, color=FAINT, linestyle="-", marker="", label=name)


def _moments(spreads: Sequence[Spread]) -> tuple[list[float], list[float]]:
    """Means and deviations, 0 where there is none."""
    return [one.mean for one in spreads], [one.sd if np.isfinite(one.sd) else 0.0 for one in spreads]


def embed_2d(features, method: str = "pca", seed: int = 0) -> np.ndarray:
    """``(N, d)`` features as ``(N, 2)`` points by scikit-learn's PCA or t-SNE (perplexity at most 30, less
    for few points).
    """
    features = array(features).reshape(len(features), -1)
    if choose("embedding", method, {"pca": "PCA", "tsne": "t-SNE"}) == "PCA":
        from sklearn.decomposition import PCA

        return PCA(2, svd_solver="full", random_state=seed).fit_transform(features)
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(features) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def embedding_scatter(
    points, labels, kinds: Sequence[str], classes: Sequence[str], title="", axis="PCA component"
):
    """Where the synthetic images lie among the real ones.

    Args:
        points: ``(N, 2)`` of :func:`embed_2d`; labels: ``(N,)`` classes, which choose the colour.
        kinds: ``(N,)`` names. The first kind is drawn as faint dots, every further one as large outlined
            marks that carry the class index, so that classes are told apart without colour.
        axis: what the axes are, such as ``t-SNE dimension`` (they have no unit).
    """
    points, labels, kinds = array(points), array(labels).astype(int), np.asarray(kinds)
    names = list(dict.fromkeys(kinds.tolist()))
    fig, ax = _axes(height=4.4, width=5.6)
    for k, kind in enumerate(names):
        for c in range(len(classes)):
            at = points[(kinds == kind) & (labels == c)]
            if k == 0:
                ax.scatter(*at.T, s=9, color=PALETTE[c % 10], alpha=0.35, linewidth=0)
                continue
            ax.scatter(
                *at.T,
                s=95,
                color=PALETTE[c % 10],
                marker=MARKERS[k - 1],
                edgecolor=INK,
                linewidth=0.9,
                zorder=3,
            )
            for x, y in at:
                ax.annotate(
                    c,
                    (x, y),
                    ha="center",
                    va="center",
                    size=6.5,
                    weight="bold",
                    color=ink_on(PALETTE[c % 10]),
                )
    ax.set(xlabel=f"{axis} 1", ylabel=f"{axis} 2", title=title)
    shapes = [
        ax.scatter([], [], s=9 if k == 0 else 60, marker=MARKERS[max(k - 1, 0)], color=FAINT)
        for k in range(len(names))
    ]
    colours = [ax.scatter([], [], s=30, color=PALETTE[c % 10]) for c in range(min(len(classes), 10))]
    shown = class_labels(classes)
    entries = names + [f"{c}  {name}" if str(c) != name else name for c, name in enumerate(shown[:10])]
    fig.legend(shapes + colours, entries, loc="outside right center")
    return fig


def heatmap(table: Mapping, *, unit=ACCURACY, title="", xlabel="", ylabel="", digits: int = 1):
    """A table in colour, each cell annotated "mean ± sd".

    Args:
        table: row -> {column: result}; a column that a row lacks stays empty.
    """
    spreads = {
        str(row): {str(column): spread_of(value, "heatmap") for column, value in cells.items()}
        for row, cells in table.items()
    }
    columns = list(dict.fromkeys(column for cells in spreads.values() for column in cells))
    means = np.array([[_mean(cells.get(column)) for column in columns] for cells in spreads.values()])
    width, height = 2.2 + 0.92 * len(columns), 1.1 + 0.46 * len(spreads)
    fig, ax = _axes(width=max(width, 4.2), height=max(height, 2.2))
    image = ax.imshow(means, aspect="auto")
    for i, cells in enumerate(spreads.values()):
        for j, column in enumerate(columns):
            text = cells[column].text(digits) if column in cells and np.isfinite(means[i, j]) else ""
            ax.annotate(
                text, (j, i), ha="center", va="center", size=8, color=ink_on(image.to_rgba(means[i, j]))
            )
    ax.set(xticks=range(len(columns)), yticks=range(len(spreads)), title=title, xlabel=xlabel, ylabel=ylabel)
    slanted = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 11 else {}
    )
    ax.set_xticklabels(columns, **slanted)
    ax.set_yticklabels(list(spreads))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    fig.colorbar(image, label=unit, pad=0.02).outline.set_visible(False)
    return fig


def _mean(spread: Spread | None) -> float:
    return np.nan if spread is None else spread.mean


def bars(
    values: Mapping,
    *,
    highlight: str = "",
    baseline: str | Sequence[str] = (),
    reference=None,
    xlabel: str = ACCURACY,
    title: str = "",
    digits: int | None = None,
):
    """Horizontal bars with error bars (one standard deviation) and the numbers written out.

    One hue: all bars are pale, ``highlight`` is dark and ``baseline`` grey and hatched, so that the three are told apart
    without colour.

    Args:
        values: label -> result, from top to bottom.
        highlight: the label that the figure is about; baseline: the label (or labels) it is compared with.
        reference: ``(label, result)`` drawn as a dashed line, such as the whole training set.
        digits: decimals of the numbers; None: 1 for accuracies, else three figures of the longest bar.
    Raises:
        CompanionError: a highlight or baseline that is no label; a value that is no result.
    """
    spreads = {str(name): spread_of(value, "bars") for name, value in values.items()}
    grey = (baseline,) if isinstance(baseline, str) else tuple(baseline)
    for name in (*grey, highlight):
        if name and name not in spreads:
            raise unknown("bar", name, spreads)
    if digits is None:
        digits = 1 if xlabel == ACCURACY else _digits(max(abs(one.mean) for one in spreads.values()))
    fig, ax = _axes(height=1.2 + 0.38 * len(spreads))
    beside = (
        ax.get_yaxis_transform()
    )  # the numbers stand in a column of their own, where no line crosses them
    for k, (name, spread) in enumerate(spreads.items()):
        look = {"color": HUE if name == highlight else TINT, "edgecolor": "white", "hatch": ""}
        look = {"color": GREY, "edgecolor": "white", "hatch": "///"} if name in grey else look
        sd = spread.sd if np.isfinite(spread.sd) else None
        ax.barh(k, spread.mean, xerr=sd, height=0.62, ecolor=INK, capsize=3, linewidth=0, **look)
        weight = "bold" if name == highlight else "normal"
        ax.text(1.02, k, spread.text(digits), transform=beside, va="center", size=8.5, weight=weight)
    if reference is not None:
        line = {"color": INK, "linestyle": LEVELS[0], "linewidth": 1.1, "zorder": 1}
        ax.axvline(spread_of(reference[1], "bars").mean, label=reference[0], **line)
        fig.legend(loc="outside lower right")
    ax.set(xlabel=xlabel, title=title, yticks=range(len(spreads)))
    ax.set_yticklabels(list(spreads))
    ax.margins(x=0.04)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return fig


def _digits(largest: float) -> int:
    """Decimals that leave three figures."""
    return int(np.clip(2 - np.floor(np.log10(largest)), 1, 6)) if largest > 0 else 1


def cost_scatter(values: Mapping, seconds: Mapping, title: str = ""):
    """Accuracy against seconds per set (logarithmic), each label told apart.

    Args:
        values: label -> result; seconds: label -> seconds of one distillation.
    """
    fig, ax = _axes(height=max(3.8, 0.6 + 0.19 * len(values)))  # the legend is a column
    for k, (name, value) in enumerate(values.items()):
        (mean,), (sd,) = _moments([spread_of(value, "cost_scatter")])
        marker = MARKERS[(k + k // 10) % 10]  # no pair of colour and mark comes twice
        look = {"color": PALETTE[k % 10], "marker": marker, "capsize": 3, "linestyle": "none"}
        ax.errorbar(seconds[name], mean, sd, label=name, **look)
    ax.set(xlabel="seconds per set", ylabel=ACCURACY, title=title, xscale="log")
    fig.legend(loc="outside right center")
    return fig


def array(values) -> np.ndarray:
    """A numpy array of a tensor (any device), array or list."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _axes(panels: int = 1, *, width: float = 6.4, height: float = 3.8, **options):
    import matplotlib.pyplot as plt

    return plt.subplots(1, panels, figsize=(width * panels, height), **options)


def _pictures(images) -> np.ndarray:
    """``(N, c, h, w)`` -> ``(N, h, w, 3)`` in [0, 1]."""
    images = array(images).astype(float)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise CompanionError(f"images must be (N, 1 or 3 channels, height, width), not {images.shape}")
    return np.clip(np.broadcast_to(images, (len(images), 3, *images.shape[2:])).transpose(0, 2, 3, 1), 0, 1)


def _mosaic(
    rows: Sequence[np.ndarray],
    title: str,
    left: Sequence[str] | None = None,
    bottom: Sequence[str] | None = None,
):
    """Rows of pictures as one sharp image, each pixel a whole number of screen pixels, white gaps between."""
    across, (height, width) = max(len(row) for row in rows), rows[0].shape[1:3]
    zoom = max(1, round((96 if across <= 6 else 64) / width))
    gap, tall, wide = 4, height * zoom, width * zoom
    canvas = np.ones((len(rows) * (tall + gap) - gap, across * (wide + gap) - gap, 3))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, start = i * (tall + gap), j * (wide + gap)
            canvas[top : top + tall, start : start + wide] = picture.repeat(zoom, 0).repeat(zoom, 1)
    scale = min(1.0, 900 / canvas.shape[1]) / 100
    label = 0.1 * max(map(len, left)) + 0.25 if left else 0.1
    tilted = bottom is not None and max(map(len, bottom)) * 7 > wide * scale * 100
    below = 0.45 * bool(bottom) + (0.06 * max(map(len, bottom)) if tilted else 0)
    size = (canvas.shape[1] * scale + label, canvas.shape[0] * scale + 0.3 * bool(title) + below)
    fig, ax = _axes(width=max(size[0], 2.6), height=size[1])
    ax.imshow(canvas)
    heading = ax.set_title(title)
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set_yticks([i * (tall + gap) + tall / 2 for i in range(len(rows))] if left else [], left or [])
    ax.set_xticks([j * (wide + gap) + wide / 2 for j in range(across)] if bottom else [], bottom or [])
    if tilted:
        ax.tick_params(axis="x", labelrotation=35)
    if TITLE_LETTER * len(title) > size[0] - label:  # perhaps too long, which only a layout tells
        _make_room(fig, heading)
    return fig


def _make_room(fig, heading) -> None:
    """Widen a figure whose title leaves it at the right; the picture stays at the left, under the title."""
    with warnings.catch_warnings():  # of a figure so narrow that its layout fails
        warnings.simplefilter("ignore", UserWarning)
        fig.draw_without_rendering()
    beyond = heading.get_window_extent().x1 - fig.bbox.x1
    if beyond > 0:
        fig.set_figwidth(fig.get_figwidth() + beyond / fig.dpi + 0.1)
        heading.axes.set_anchor("W")
