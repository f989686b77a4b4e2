from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from scipy import stats

from mlcollage.collage import marks, theme
from mlcollage.errors import InvalidInput

BLUE, RED = theme.PALETTE["blue"], theme.PALETTE["vermillion"]
SEEDS = {"early": [60.0, 62.0, 61.0], "late": [70.0, 72.0, 74.0]}


@pytest.fixture
def ax():
    figure = Figure(figsize=(4, 3), dpi=100)
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def course():
    return pd.DataFrame({"mean": [50.0, 99.0], "lo": [40.0, 97.0], "hi": [60.0, 101.0]}, index=[10, 1000])


def test_the_interval_of_a_course_stays_within_its_bounds(ax):
    marks.course(ax, course(), BLUE, "accuracy", bounds=(0, 100))
    (band,) = (c for c in ax.collections if isinstance(c, PolyCollection))
    assert band.get_paths()[0].vertices[:, 1].max() == 100.0
    assert [t.get_text() for t in ax.texts] == ["accuracy"]


def test_what_is_only_compared_with_has_no_interval(ax):
    marks.course(ax, course(), BLUE, dashed=True, interval=False)
    assert not ax.collections
    assert not ax.texts
    assert ax.lines[0].get_linestyle() == "--"


@pytest.mark.parametrize("draw", [marks.rows, marks.columns])
def test_rows_and_columns_show_seeds_means_and_t_intervals(ax, draw):
    draw(ax, SEEDS, {"early": BLUE, "late": RED}, reference=65)
    along = 0 if draw is marks.rows else 1
    bars = [c.get_segments()[0][:, along] for c in ax.collections if isinstance(c, LineCollection)]
    for values, bar in zip(SEEDS.values(), bars, strict=True):
        half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
        assert bar == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    names = ax.get_yticklabels() if draw is marks.rows else ax.get_xticklabels()
    assert [t.get_text() for t in names] == list(SEEDS)
    # Seeds and means, and the line of reference.
    points = np.concatenate([np.atleast_1d(line.get_data()[along]) for line in ax.lines])
    assert {60.0, 61.0, 62.0, 70.0, 72.0, 74.0, 65.0} <= set(points.tolist())


def test_the_first_row_is_on_top(ax):
    marks.rows(ax, SEEDS, BLUE)
    bottom, top = ax.get_ylim()
    assert bottom > top
    with pytest.raises(InvalidInput, match="nothing to draw"):
        marks.rows(ax, {}, BLUE)


@pytest.mark.parametrize(
    ("xs", "ticks"), [([3, 2000], ["10", "100", "1,000"]), ([12, 90], ["20", "50"]), ([12, 18], ["12", "18"])]
)
def test_logarithmic_axes_name_round_values_or_their_ends(ax, xs, ticks):
    ax.plot(xs, [0, 1])
    marks.log_steps(ax)
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ticks


def test_the_key_of_an_image_has_its_ends_and_zero(ax):
    marks.color_scale(ax, theme.sequential(), (-0.25, 0.5))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["−0.25", "0", "+0.5"]
