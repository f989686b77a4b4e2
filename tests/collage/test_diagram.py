from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from mlcollage.collage.diagram import Diagram
from mlcollage.errors import InvalidInput


@pytest.fixture
def canvas():
    figure = Figure(figsize=(4.4, 4.4), dpi=100)
    FigureCanvasAgg(figure)
    return Diagram(figure.add_axes((0, 0, 1, 1)), 440, 440)


def area(polygon):
    x, y = polygon.get_xy()[:-1].T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def test_halfspaces_partition_the_square(canvas):
    rng = np.random.default_rng(0)
    normals, offsets = rng.normal(size=(4, 2)), rng.normal(size=4) * 0.2
    canvas.halfspaces(200, 200, 100, 80, normals, offsets)
    regions = [p for p in canvas.ax.patches if isinstance(p, Polygon)]
    assert sum(area(p) for p in regions) == pytest.approx(100 * 80)
    points = rng.uniform(-1, 1, (20000, 2))
    signs = {tuple(row) for row in (points @ normals.T > offsets).tolist()}
    assert len(regions) == len(signs)  # a sampled region is one that exists


def test_a_line_that_misses_the_square_cuts_nothing(canvas):
    canvas.halfspaces(200, 200, 100, 80, [[1.0, 0.0]], [5.0])
    assert len([p for p in canvas.ax.patches if isinstance(p, Polygon)]) == 1


def test_arrows_end_on_the_edges(canvas):
    box, ball = canvas.box(100, 100, 60, 40, "f"), canvas.circle(300, 100, 20, "x")
    assert box.edge_towards((300, 100)) == pytest.approx((130, 100))
    assert ball.edge_towards((100, 100)) == pytest.approx((280, 100))
    assert box.edge_towards((100, 400)) == pytest.approx(box.bottom)
    assert ball.edge_towards((300 + 30, 100 + 40)) == pytest.approx((312, 116))


def test_tensor_has_a_cell_an_entry_and_colors_only_the_highlighted_rows(canvas):
    node = canvas.tensor(200, 200, np.arange(6).reshape(2, 3), cell=20, highlight=[1])
    cells = [p for p in canvas.ax.patches if isinstance(p, Rectangle)]
    assert (node.width, node.height, len(cells)) == (60, 40, 6)
    assert len({c.get_facecolor() for c in cells[:3]}) == 1
    assert len({c.get_facecolor() for c in cells[3:]}) == 3


def test_text_in_a_box_is_set_to_fit(canvas):
    canvas.box(220, 100, 150, 60, "a rather long name of a module")
    text = canvas.ax.texts[-1]
    box = text.get_window_extent(canvas.ax.figure.canvas.get_renderer())
    assert box.width <= 150
    assert "\n" in text.get_text()


def test_an_image_leaves_the_canvas_as_it_was(canvas):
    canvas.image(100, 100, 50, 50, np.eye(4))
    canvas.stack(200, 200, 40, 40, 3)
    canvas.curve(300, 300, 40, 20, [1, 3, 2])
    canvas.equation(200, 400, r"\sum_i w_i x_i")
    assert canvas.ax.get_xlim() == (0, 440)
    assert canvas.ax.get_ylim() == (440, 0)


def test_bad_input(canvas):
    with pytest.raises(InvalidInput, match="normals"):
        canvas.halfspaces(0, 0, 10, 10, [[1, 0, 0]], [0])
    with pytest.raises(InvalidInput, match="tensor"):
        canvas.tensor(0, 0, np.zeros((2, 2, 2)))
