"""Landscape figures: what is drawn is what was given, on shared axes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lib.companion import surfaces
from lib.companion.theme import use_style


@pytest.fixture(autouse=True)
def close():
    use_style()
    yield
    plt.close("all")


def bowl(scale: float) -> torch.Tensor:
    x = torch.linspace(-1, 1, 7)
    return scale * (x[:, None] ** 2 + 2 * x**2) + 0.1


ALONG = torch.linspace(-1, 1, 7)


def test_sheets_share_one_loss_axis():
    fig = surfaces.sheets(ALONG, {"a": (bowl(1), bowl(2)), "b": (bowl(1), bowl(5))}, names=("T", "S"))
    limits = [ax.get_zlim() for ax in fig.axes]
    assert limits[0] == limits[1] and limits[0][0] <= 0.1 + 1e-6 and limits[0][1] >= 15.1 - 1e-4
    assert [ax.get_title(loc="center") for ax in fig.axes] == ["a", "b"]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["T", "S"]


@pytest.mark.parametrize("log", [False, True])
def test_contours_share_levels_and_turn_the_first_direction_to_the_right(log):
    ridge = bowl(0) + torch.linspace(1, 2, 7)[:, None]  # rises along the first direction only
    fig = surfaces.contours(ALONG, {str(k): ridge * k for k in (1, 2, 3, 4, 5)}, log=log)
    shown = [ax for ax in fig.axes if ax.get_visible() and ax.get_title(loc="left")]
    assert len(shown) == 5
    levels = [ax.collections[0].levels for ax in shown]
    assert all(np.array_equal(levels[0], other) for other in levels)
    assert levels[0][0] <= 1.1 + 1e-6 and levels[0][-1] >= 10.5
    path = next(p for p in shown[4].collections[1].get_paths() if len(p.vertices) > 2)
    assert np.ptp(path.vertices[:, 0]) < 1e-6 < np.ptp(path.vertices[:, 1])  # lines stand upright


def test_slices_draw_the_mean_and_the_range():
    values = torch.stack([ALONG**2, ALONG**2 + 2])
    fig = surfaces.slices(ALONG, {"many": values, "one": ALONG + 2}, xlabel="x", title="t")
    ax = fig.axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), ALONG**2 + 1)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0, abs=1e-6) and band[:, 1].max() == pytest.approx(3)
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    both = surfaces.slices(torch.logspace(-2, 0, 3), {"a": torch.ones(3)}, xlabel="r", loglog=True).axes[0]
    assert (both.get_xscale(), both.get_yscale()) == ("log", "log")
