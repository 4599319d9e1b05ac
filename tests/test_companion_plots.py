"""Figures: the right size, not blank, the data really in them, and the same bytes every time."""

from __future__ import annotations

import warnings

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from PIL import Image

from lib.companion import plots, start, theme
from lib.evaluate.spread import Spread
from lib.system.errors import CompanionError

CLASSES = [f"class {c}" for c in range(10)]


@pytest.fixture(autouse=True)
def _look():
    with matplotlib.rc_context():
        theme.use_style()
        yield
    plt.close("all")


def _by_ipc():
    return {
        method: {ipc: Spread.of([48 + 10 * k + ipc, 52 + 10 * k + ipc]) for ipc in (1, 10)}
        for k, method in enumerate(("random", "DM", "DC"))
    }


PAIR = {"random": Spread.of([60.0, 64.5, 69.0]), "DM": Spread.of([86.4, 87.6]), "DC": Spread.of([85.0])}


def _figures() -> dict:
    rng = np.random.default_rng(0)
    images, labels = torch.from_numpy(rng.random((20, 3, 8, 8))), torch.arange(10).repeat(2)
    points = rng.normal(size=(60, 2))
    return {
        "grid": lambda: plots.image_grid(images, labels, CLASSES, "Images"),
        "row": lambda: plots.image_grid(images[:10, :1], labels[:10], CLASSES),
        "film": lambda: plots.film_strip(images.reshape(5, 4, 3, 8, 8), [0, 1, 10, 100, 1000], CLASSES[:4]),
        "curves": lambda: plots.curves({"DM": rng.random((3, 50)), "DC": rng.random(50)}, title="Loss"),
        "sweep": lambda: plots.sweep(
            {"a": {x: Spread.of(rng.random(4)) for x in (0.1, 1, 10)}, "b": {1: Spread.of([0.5])}},
            xlabel="weight",
            logx=True,
            reference={"limit": Spread.of([0.3])},
        ),
        "ipc": lambda: plots.accuracy_vs_ipc(_by_ipc(), baseline="random", title="Accuracy"),
        "scatter": lambda: plots.embedding_scatter(
            points, rng.integers(0, 10, 60), ["real"] * 50 + ["DM"] * 10, CLASSES
        ),
        "heatmap": lambda: plots.heatmap(
            {row: {c: Spread.of(rng.random(3)) for c in CLASSES[:4]} for row in "abc"}
        ),
        "bars": lambda: plots.bars(
            PAIR, highlight="DM", baseline="random", reference=("whole set", Spread.of([96.5]))
        ),
        "cost": lambda: plots.cost_scatter(PAIR, {"random": 0.01, "DM": 2.0, "DC": 9.0}),
    }


@pytest.mark.parametrize("name", list(_figures()))
def test_figures_are_drawn_at_the_size_they_state(name, tmp_path):
    fig = _figures()[name]()
    theme.save_png(fig, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
        assert "Software" not in image.info
    width, height = fig.get_size_inches() * 150
    assert pixels.shape[:2] == pytest.approx((height, width), abs=1.01)
    assert pixels.std() > 10 and (pixels == 255).all(-1).mean() > 0.02  # neither blank nor filled
    assert fig.get_size_inches()[0] <= 11


@pytest.mark.parametrize("name", ["curves", "ipc", "bars", "grid"])
def test_the_same_figure_is_the_same_bytes(name, tmp_path):
    files = [tmp_path / f"{k}.png" for k in range(2)]
    for file in files:
        theme.save_png(_figures()[name](), file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bars_have_one_hue_a_grey_baseline_and_one_highlight():
    ax = plots.bars(PAIR, highlight="DM", baseline="random").axes[0]
    faces = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert faces == [theme.GREY, theme.HUE, theme.TINT] and ax.patches[0].get_hatch()
    assert [text.get_text() for text in ax.texts] == ["64.5 ± 4.5", "87.0 ± 0.8", "85.0"]
    light = sorted(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in faces)
    assert light[1] - light[0] > 0.25  # the highlight is told apart without colour; the baseline by its hatch


def test_small_numbers_keep_three_figures():
    fig = plots.bars({"a": Spread.of([0.0123, 0.0125])}, xlabel="gap")
    assert fig.axes[0].texts[0].get_text() == "0.0124 ± 0.0001"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plots.bars({"a": 1.0}), "bars takes results, evaluations or Spreads, not float"),
        (lambda: plots.heatmap({"a": {"x": (1.0, 2.0)}}), "heatmap takes .*, not tuple"),
        (lambda: plots.sweep({"a": {1: [1.0, 2.0]}}, xlabel="x"), "sweep takes .*, not list"),
        (lambda: plots.bars(PAIR, highlight="dm"), "unknown bar 'dm'.*did you mean 'DM'"),
        (lambda: plots.bars(PAIR, baseline=["random", "DDM"]), "unknown bar 'DDM'"),
        (lambda: plots.accuracy_vs_ipc(_by_ipc(), baseline="rand"), "unknown series 'rand'"),
    ],
)
def test_plots_take_spreads_and_nothing_else(call, says):
    with pytest.raises(CompanionError, match=says):
        call()


def test_an_image_grid_shows_the_pixels_themselves():
    images = torch.zeros(4, 1, 2, 2)
    images[3, 0, 0, 1] = 5.0  # clipped to white
    images[1] = -1.0
    fig = plots.image_grid(images, torch.tensor([0, 0, 1, 1]), ["a", "b"])
    canvas = fig.axes[0].images[0].get_array()
    tile = (canvas.shape[0] - 4) // 2
    second = canvas[tile + 4 :, tile + 4 :]  # row of class b, second image
    assert (second[: tile // 2, tile // 2 :] == 1).all() and (second[tile // 2 :] == 0).all()
    assert (canvas[:tile, :tile] == 0).all() and (canvas[tile : tile + 4] == 1).all()
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["a", "b"]


def test_a_title_is_seen_to_its_end():
    """A figure is as wide as its title, if that is long; the picture keeps its size."""
    images = torch.rand(4, 1, 8, 8)
    for title in (
        "DM on digits IPC 1",
        "M3D (m3d, multi-formation, representative, dsa) on digits IPC 1, before the first step",
    ):
        for fig in (
            plots.image_grid(images, torch.arange(4), ["a", "b", "c", "d"], title),
            plots.film_strip(images.view(2, 2, 1, 8, 8), [0, 100], ["a", "b"], title),
        ):
            fig.draw_without_rendering()
            (heading,) = [text for text in fig.findobj(Text) if text.get_text() == title]
            box, picture = heading.get_window_extent(), fig.axes[0].get_window_extent()
            assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
            assert abs(box.x0 - picture.x0) < 2 and picture.height > 0.4 * fig.bbox.height


def test_classes_without_images_leave_no_gap():
    fig = plots.image_grid(torch.rand(3, 1, 4, 4), torch.tensor([0, 2, 2]), ["a", "b", "c"], columns=1)
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["a", "c"]


def test_wrong_shapes_are_told():
    with pytest.raises(CompanionError, match="1 or 3 channels"):
        plots.image_grid(torch.rand(3, 2, 4, 4), torch.arange(3), CLASSES)
    with pytest.raises(CompanionError, match="2 snapshots and 3 steps"):
        plots.film_strip(torch.rand(2, 1, 1, 4, 4), [0, 1, 2])


def test_curves_band_is_one_standard_deviation():
    runs = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]])
    ax = plots.curves({"DM": runs}).axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([2, 2, 4])
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(4 + np.sqrt(2))
    assert ax.get_legend().get_texts()[0].get_text() == "DM (n = 2)"
    assert ax.get_xlabel() and ax.get_ylabel()


def test_smoothing_keeps_positions():
    ax = plots.curves({"DM": np.arange(10.0)}, smooth=3).axes[0]
    assert list(ax.lines[0].get_xdata()) == list(range(3, 11))
    assert ax.lines[0].get_ydata() == pytest.approx(np.arange(1, 9))
    assert "mean of 3" in ax.get_ylabel()


def test_accuracy_plot_has_baseline_and_ceiling():
    whole = ("all training data", Spread.of([96.5]))
    fig = plots.accuracy_vs_ipc(_by_ipc(), baseline="random", reference=whole)
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert set(labels) == {"random", "all training data", "DM", "DC"}
    band = fig.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    sd = np.std([48, 52], ddof=1)
    assert (band.min(), band.max()) == pytest.approx((51 - sd, 60 + sd))  # random: 51 and 60
    assert "(%)" in fig.axes[0].get_ylabel()


def test_lines_differ_without_colour():
    fig = plots.curves({str(k): np.arange(5.0) + k for k in range(6)})
    assert len({str(line._dash_pattern) for line in fig.axes[0].lines}) >= 5


def test_embeddings_have_two_dimensions():
    features = np.random.default_rng(0).normal(size=(12, 3, 4))
    assert plots.embed_2d(features).shape == plots.embed_2d(features, "tsne").shape == (12, 2)
    with pytest.raises(CompanionError, match="embedding 'umap'.*pca, tsne"):
        plots.embed_2d(features, "umap")


def test_heatmap_writes_mean_and_spread():
    fig = plots.heatmap(
        {"a": {"x": Spread.of([49.0, 51.0])}, "b": {"x": Spread.of([40.0]), "y": Spread.of([30.0])}}
    )
    assert [text.get_text() for text in fig.axes[0].texts] == ["50.0 ± 1.4", "", "40.0", "30.0"]


def test_a_run_keeps_figure_caption_and_what_to_see(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_OUT", str(tmp_path))
    monkeypatch.delenv("COMPANION_RUN", raising=False)
    strict = torch.are_deterministic_algorithms_enabled()
    run = start("20_dm")
    torch.use_deterministic_algorithms(strict)
    fig = _figures()["curves"]()
    run.save_figure(fig, "loss", "The loss", see="The loss falls.", thumbnail=True)
    assert run.saved["figures"]["loss"] == {
        "file": "figures/cpu+by-hand/20_dm/loss.png",
        "caption": "The loss",
        "see": "The loss falls.",
        "thumbnail": True,
    }
    assert [path.name for path in run.figures.iterdir()] == ["loss.png"]
    assert plt.fignum_exists(fig.number)  # outside a notebook nothing is closed
    for nothing in ("", "  ", "the loss"):
        with pytest.raises(CompanionError, match="'loss' needs one sentence"):
            run.save_figure(fig, "loss", "The loss", see=nothing)


# -- text that users wrote ----------------------------------------------------------------------------------------------

NASTY = (
    "a$b$c",
    "$_$",
    "cost $5 and $6",
    "_hidden",
    "日本",
    "naïve ψ",
    "犬 dog",
    "x" * 300,
    "",
    "a\nb\x00",
    r"\$\frac$",
)


def _with_classes(names):
    """The figures that show names of classes, and one whose title and keys are words of users."""
    images, labels = torch.rand(len(names), 1, 4, 4), np.arange(len(names))
    yield plots.image_grid(images, labels, names, "set $")
    yield plots.image_grid(images.repeat(2, 1, 1, 1), np.tile(labels, 2), names, "$_$ of $\\frac$")
    yield plots.film_strip(images[None].repeat(2, 1, 1, 1, 1), [0, 10], names)
    points, kinds = (
        np.random.RandomState(0).rand(2 * len(names), 2),
        ["real"] * len(names) + ["made"] * len(names),
    )
    yield plots.embedding_scatter(points, np.tile(labels, 2), kinds, names)
    table = {
        name: {"one": Spread.of([1.0, 2.0]), name: Spread.of([3.0, 5.0])} for name in ("a$_$c", "日本", "b")
    }
    yield plots.heatmap(table, title="folder:犬")
    yield plots.bars({name: Spread.of([1.0, 2.0]) for name in ("a$_$c", "犬", "b")})


@pytest.mark.parametrize("number", range(6))
def test_words_of_users_break_no_figure_and_leave_no_box(number, tmp_path):
    """No formula where none was meant, no missing glyph (a warning of matplotlib), nothing hidden, no name that fills the page."""
    fig = list(_with_classes(NASTY))[number]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theme.save_png(fig, tmp_path / "a.png")
    assert max(fig.get_size_inches()) < 40


def test_names_of_classes_are_shown_as_they_are():
    labels = theme.class_labels(NASTY)
    assert labels[:4] == [r"a\$b\$c", r"\$_\$", r"cost \$5 and \$6", " _hidden"] and labels[5] == "naïve ψ"
    assert len(set(labels)) == len(labels) and labels[8] == "class 8" and labels[9] == "a b"
    assert all(len(label) <= 2 * theme.LONGEST for label in labels)


def test_formulas_of_ours_stay_and_a_data_set_is_no_formula(tmp_path):
    fig, ax = plt.subplots()
    ax.set(title="$W_2^2$ on folder:a$b$c", xlabel="$\\alpha$", ylabel="folder:a$b$c")
    theme.save_png(fig, tmp_path / "a.png", ["folder:a$b$c"])
    assert ax.get_title("left") == "$W_2^2$ on folder:a\\$b\\$c" and ax.get_xlabel() == "$\\alpha$"
    assert ax.get_ylabel() == "folder:a\\$b\\$c"


def test_another_font_of_this_machine_is_taken_where_the_first_lacks_a_character(tmp_path):
    """U+1D8D is in STIX, which comes with matplotlib, and not in DejaVu Sans; an ideograph is in none that is certain to be there."""
    assert theme.font_with("a") == "" and theme.font_with("ψ") == ""
    assert theme.font_with("\u1d8d") not in ("", None)
    fig = plots.image_grid(torch.rand(2, 1, 4, 4), [0, 1], ["\u1d8d", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theme.save_png(fig, tmp_path / "a.png")
    labels = [text for text in fig.findobj(Text) if text.get_text() == "\u1d8d"]
    assert labels and all(theme.font_with("\u1d8d") in label.get_fontfamily() for label in labels)


def test_a_name_without_any_font_is_told_by_its_number(monkeypatch):
    monkeypatch.setattr(theme, "font_with", lambda char: None if char in "犬日本" else "")
    assert theme.class_labels(["犬", "日本", "cat", "犬 dog"]) == [
        "class 0",
        "class 1",
        "cat",
        "class 3 (? dog)",
    ]
