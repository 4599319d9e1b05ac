"""The figures of the notebooks: arrays in, a matplotlib figure out, one look for all (:mod:`lib.companion.theme`).

Tensors are accepted wherever arrays are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lib.companion.theme import FAINT, HATCHES, INK, MARKERS, PALETTE, ink_on
from lib.system.errors import CompanionError, choose

ACCURACY = "test accuracy (%)"


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
    names = [str(classes[c]) for c in present]
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
    fig = _mosaic(rows, title, left=names, bottom=labels)
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
        mean = runs.mean(0)
        label = f"{name} (n = {len(runs)})" if len(runs) > 1 else str(name)
        (line,) = ax.plot(at, mean, label=label)
        if len(runs) > 1:
            spread = runs.std(0, ddof=1)
            low = np.maximum(mean - spread, mean[mean > 0].min() / 10) if log else mean - spread
            ax.fill_between(at, low, mean + spread, color=line.get_color(), alpha=0.18, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel + (f" (mean of {smooth})" if smooth > 1 else ""), title=title)
    if log:
        ax.set_yscale("log")
    if len(series) > 4:  # beside the lines, where it hides none
        fig.legend(loc="outside right center")
    elif len(series) > 1 or np.atleast_2d(array(next(iter(series.values())))).shape[0] > 1:
        ax.legend()
    return fig


def sweep(x: Sequence[float], series: Mapping, *, xlabel: str, ylabel: str = ACCURACY, title="", logx=False):
    """A quantity against a setting: the mean of every point's values, with a bar of one standard deviation.

    Args:
        x: positions of the points; series: name -> one list of repeated values per point.
        logx: logarithmic horizontal axis; the ticks are the positions themselves.
    """
    fig, ax = _axes()
    for k, (name, points) in enumerate(series.items()):
        means, spreads = (
            [float(f(np.asarray(values, float))) for values in points] for f in (np.mean, np.std)
        )
        ax.errorbar(x, means, spreads, color=PALETTE[k % 10], marker=MARKERS[k % 10], capsize=3, label=name)
    if logx:
        ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, xticks=x)
    ax.set_xticklabels([f"{value:g}" for value in x])
    ax.minorticks_off()
    if len(series) > 1:
        ax.legend()
    return fig


def accuracy_vs_ipc(frame, title: str = ""):
    """Accuracy over images per class, one panel per data set, from the tidy results
    (:data:`lib.companion.tables.COLUMNS`).

    The shaded band is random real images (the rows of method ``random``, mean and standard deviation, else
    ``random_acc``), the dashed line the whole training set (``full_acc``). Error bars are one standard
    deviation.
    """
    datasets = list(dict.fromkeys(frame["dataset"]))
    fig, axes = _axes(len(datasets), width=max(3.4, 5.4 - len(datasets)), sharey=True)
    methods = [name for name in dict.fromkeys(frame["method"]) if name != "random"]
    for ax, dataset in zip(np.atleast_1d(axes), datasets, strict=True):
        part = frame[frame["dataset"] == dataset]
        ipcs = sorted(set(part["ipc"]))
        _baselines(ax, part, ipcs)
        for k, method in enumerate(methods):
            rows = part[part["method"] == method].sort_values("ipc")
            shift = (k - (len(methods) - 1) / 2) * 0.12  # so that error bars do not hide one another
            at = [ipcs.index(ipc) + shift for ipc in rows["ipc"]]
            errors = rows["acc_std"].astype(float).fillna(0)
            ax.errorbar(
                at,
                rows["acc"],
                errors,
                color=PALETTE[k % 10],
                marker=MARKERS[k % 10],
                capsize=3,
                label=method,
            )
        ax.set(
            xlabel="images per class", title=dataset, xticks=range(len(ipcs)), xlim=(-0.6, len(ipcs) - 0.4)
        )
        ax.set_xticklabels(ipcs)
        ax.grid(axis="x", visible=False)
    np.atleast_1d(axes)[0].set_ylabel(ACCURACY)
    entries = {}
    for ax in np.atleast_1d(axes):
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(entries.values(), entries.keys(), loc="outside right center")
    if title and len(datasets) == 1:
        axes.set_title(f"{title}, {datasets[0]}")
    elif title:
        fig.suptitle(title, x=0.01, ha="left", weight="bold", size=10.5)
    return fig


def _baselines(ax, part, ipcs: Sequence[int]) -> None:
    """Shaded random real images and the dashed ceiling of one data set."""
    random = part[part["method"] == "random"].set_index("ipc")
    known = (
        part.dropna(subset=["random_acc"]).drop_duplicates("ipc").set_index("ipc")["random_acc"].astype(float)
    )
    mean = np.array([random["acc"].get(ipc, known.get(ipc, np.nan)) for ipc in ipcs], dtype=float)
    spread = np.nan_to_num(np.array([random["acc_std"].get(ipc, 0) for ipc in ipcs], dtype=float))
    if np.isfinite(mean).any():
        # half a step beyond the first and last point, so that a single one shows as a band, too
        at = np.concatenate([[-0.4], np.arange(len(ipcs)), [len(ipcs) - 0.6]])
        mean, spread = (np.concatenate([v[:1], v, v[-1:]]) for v in (mean, spread))
        ax.fill_between(at, mean - spread, mean + spread, color=FAINT, alpha=0.3, linewidth=0)
        ax.plot(at, mean, color=FAINT, linestyle="-", linewidth=1.2, label="random real images")
    full = part["full_acc"].dropna().astype(float)
    if len(full):
        ax.axhline(full.max(), color=INK, linestyle=(0, (6, 3)), linewidth=1.1, label="whole training set")


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
    entries = names + [f"{c}  {name}" if str(c) != name else name for c, name in enumerate(classes[:10])]
    fig.legend(shapes + colours, entries, loc="outside right center")
    return fig


def heatmap(
    matrix,
    spread,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    unit=ACCURACY,
    title="",
    xlabel="",
    ylabel="",
):
    """A table in colour, each cell annotated "mean ± sd" (only the mean where ``spread`` is None or not
    finite).
    """
    matrix = array(matrix).astype(float)
    spread = np.full_like(matrix, np.nan) if spread is None else array(spread).astype(float)
    width, height = 2.2 + 0.92 * len(columns), 1.1 + 0.46 * len(rows)
    fig, ax = _axes(width=max(width, 4.2), height=max(height, 2.2))
    image = ax.imshow(matrix, aspect="auto")
    for (i, j), value in np.ndenumerate(matrix):
        text = "" if np.isnan(value) else f"{value:.1f}"
        text += f" ± {spread[i, j]:.1f}" if text and np.isfinite(spread[i, j]) else ""
        ax.annotate(text, (j, i), ha="center", va="center", size=8, color=ink_on(image.to_rgba(value)))
    ax.set(xticks=range(len(columns)), yticks=range(len(rows)), title=title, xlabel=xlabel, ylabel=ylabel)
    slanted = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 11 else {}
    )
    ax.set_xticklabels(columns, **slanted)
    ax.set_yticklabels(rows)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    fig.colorbar(image, label=unit, pad=0.02).outline.set_visible(False)
    return fig


def bars(
    names: Sequence[str], values, errors=None, *, xlabel: str = ACCURACY, title: str = "", reference=None
):
    """Horizontal bars with error bars (one standard deviation) and the numbers written out.

    Args:
        reference: ``(label, value)`` drawn as a dashed line, such as the whole training set.
    """
    values = array(values).astype(float)
    errors = np.zeros_like(values) if errors is None else np.nan_to_num(array(errors).astype(float))
    largest = np.abs(values).max()  # three figures of the longest bar
    digits = int(np.clip(2 - np.floor(np.log10(largest)), 1, 6)) if largest > 0 else 1
    fig, ax = _axes(height=1.2 + 0.38 * len(names))
    halo = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
    for k, (value, error) in enumerate(zip(values, errors, strict=True)):
        colour, hatch = PALETTE[k % 10], HATCHES[k % len(HATCHES)]
        ax.barh(k, value, xerr=error or None, height=0.62, color=colour, hatch=hatch, ecolor=INK, capsize=3)
        text = f"{value:.{digits}f} ± {error:.{digits}f}" if error else f"{value:.{digits}f}"
        ax.annotate(
            text,
            (value + error, k),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size=8.5,
            bbox=halo,
        )
    if reference is not None:
        line = {"color": INK, "linestyle": (0, (6, 3)), "linewidth": 1.1, "zorder": 1}
        ax.axvline(reference[1], label=reference[0], **line)
        fig.legend(loc="outside lower right")
    ax.set(xlabel=xlabel, title=title, yticks=range(len(names)))
    ax.set_yticklabels(names)
    ax.margins(x=0.16)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return fig


def cost_scatter(seconds, values, errors, names: Sequence[str], title: str = ""):
    """Accuracy against seconds per set (logarithmic), each method labelled."""
    seconds, values = array(seconds).astype(float), array(values).astype(float)
    errors = np.nan_to_num(array(errors).astype(float))
    fig, ax = _axes()
    for k, name in enumerate(names):
        look = {"color": PALETTE[k % 10], "marker": MARKERS[k % 10], "capsize": 3, "linestyle": "none"}
        ax.errorbar(seconds[k], values[k], errors[k], label=name, **look)
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
    ax.set_title(title)
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set_yticks([i * (tall + gap) + tall / 2 for i in range(len(rows))] if left else [], left or [])
    ax.set_xticks([j * (wide + gap) + wide / 2 for j in range(across)] if bottom else [], bottom or [])
    if tilted:
        ax.tick_params(axis="x", labelrotation=35)
    return fig
