from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mlcollage.collage import theme
from mlcollage.errors import InvalidInput

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear):
    xyz = (
        np.clip(linear, 0, 1)
        @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    )
    t = xyz / (0.95047, 1.0, 1.08883)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_arms_are_told_apart_with_color_vision_deficiencies(kind):
    seen = {}
    for name in list(theme.arm_colors(list("abcdefg")).values()):
        c = np.asarray(to_rgb(name))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        seen[name] = lab(np.array(DEFICIENCIES[kind]) @ linear)
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 10, (a, b)  # a just noticeable difference is about 2.3


def test_an_arm_keeps_its_color_and_the_order_decides():
    assert theme.arm_colors(["a", "b"])["a"] == theme.arm_colors(["a", "c", "d"])["a"]
    assert theme.arm_colors(["a", "b"]) == theme.arm_colors(["a", "b"])


@pytest.mark.parametrize("names", [list("abcdefgh"), ["a", "a"]])
def test_arms_that_cannot_be_told_apart_are_refused(names):
    with pytest.raises(InvalidInput, match="color"):
        theme.arm_colors(names)


def test_text_colors_are_readable():
    for color in (*theme.PALETTE.values(), *theme.GRAYS):
        assert theme.contrast(theme.ink(color)) >= 4.5
    for color in (*theme.STATUS_COLORS.values(), theme.INK, theme.MUTED):
        assert theme.contrast(color, theme.CARD) >= 4.5
    assert theme.contrast(theme.MUTED, theme.PAPER) >= 4.5
    assert theme.contrast(theme.BAND_MUTED, theme.BAND) >= 4.5


def test_style_leaves_rcparams_alone_even_after_an_error():
    before = dict(mpl.rcParams)
    with mpl.rc_context({"lines.linewidth": 9.0, "text.usetex": False}):
        with theme.style():
            assert mpl.rcParams["lines.linewidth"] == 2.5
        assert mpl.rcParams["lines.linewidth"] == 9.0
    with pytest.raises(ZeroDivisionError), theme.style():
        _ = 1 / 0
    assert dict(mpl.rcParams) == before


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8))
def test_labels_are_kept_apart_in_their_order(values):
    centers = np.sort(np.asarray(values))
    heights = np.full(len(values), 10.0)
    moved = theme._apart(centers, heights)
    assert np.all(np.diff(moved) >= 10.0 - 1e-6)
    assert np.isclose(moved.mean(), centers.mean())  # least squares moves the group as a whole nowhere
    if np.all(np.diff(centers) >= 10.0):
        assert np.allclose(moved, centers)


def test_line_end_labels_do_not_overlap():
    with theme.style():
        figure = Figure(figsize=(5, 3), dpi=100)
        FigureCanvasAgg(figure)
        ax = figure.add_axes((0.1, 0.1, 0.5, 0.8))
        for i in range(5):
            ax.plot([0, 1], [0, 0.5 + 0.001 * i])
            theme.label_line_end(ax, 1, 0.5 + 0.001 * i, f"arm {i}", "#0072B2")
        theme.spread_labels(ax)
        theme.spread_labels(ax)  # a second call changes nothing
        middles = [t.get_window_extent(figure.canvas.get_renderer()).y0 for t in ax.texts]
    assert min(np.diff(middles)) > 14


def test_helpers_refuse_what_they_cannot_draw():
    ax = Figure().add_subplot()
    with pytest.raises(InvalidInput, match="shapes"):
        theme.dots_with_interval(ax, [1, 2], [1], [0], [2], "#000000")
    with pytest.raises(InvalidInput, match="rows, columns"):
        theme.heatmap(ax, [1.0, 2.0])
    with pytest.raises(InvalidInput, match="positive"):
        theme.lollipops(ax, ["a", "b"], [1.0, 0.0], "#000000", log=True)
