from __future__ import annotations

import base64
import io
import itertools
import math
import re
import shutil
import subprocess
from dataclasses import replace
from xml.etree import ElementTree

import demo
import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image, ImageFilter

from mlcollage.collage import theme
from mlcollage.collage.cards import draw_interval
from mlcollage.collage.content import Collage, IntervalPlot, Panel
from mlcollage.collage.diagram import Diagram
from mlcollage.collage.fitting import Box
from mlcollage.collage.sheet import Sheet
from mlcollage.collage.slide import build_figure, build_portrait, check_layout, describe, render_slide, title_of
from mlcollage.collage.text import fit, wrap
from mlcollage.errors import InvalidInput

LONG = "How to train your ViT? Data, Augmentation, and Regularization in Vision Transformers, and then some more words"


def problems(slide):
    with theme.style():
        return [*check_layout(build_figure(slide)), *check_layout(build_portrait(slide))]


def with_panels(slide, *panels, **parts):
    return replace(slide, collage=replace(slide.collage, panels=panels or slide.collage.panels, **parts))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return render_slide(demo.slide(), tmp_path_factory.mktemp("slide"), scale=2)


@pytest.mark.parametrize(("panels", "cards"), [(1, 0), (2, 1), (1, 3), (2, 6), (2, 11)])
def test_nothing_overlaps_or_is_cut_for_any_number_of_panels_and_claims(panels, cards):
    assert problems(demo.slide(panels, cards)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"title": "X"},
        {"title": LONG},
        {"title": "Short: " + LONG + LONG, "tagline": LONG[:100]},
        {"tagline": "", "foot_left": "", "foot_right": ""},
    ],
)
def test_texts_of_any_length_are_fitted(fields):
    assert problems(demo.slide(**fields)) == []


def test_what_does_not_fit_is_reported():
    found = " ".join(problems(demo.slide(byline="A, B, C, D · " * 20, foot_left=LONG * 3)))
    assert found.count("was cut to fit") >= 2


@pytest.mark.parametrize("status", ["supported", "contradicted", "inconclusive", "untested", "pending"])
def test_headlines_are_never_folded(status):
    cards = [replace(c, status=status, headline=True) for c in demo.cards(6)]
    others = [replace(c, headline=False) for c in demo.cards(3)]
    texts = drawn_texts(replace(demo.slide(), cards=[*cards, *others]))
    word = f"{theme.STATUS_MARKS[status]} {theme.STATUS_WORDS[status]}"
    assert texts.count(word) == 6
    assert "3 more claims" in texts


def drawn_texts(slide):
    with theme.style():
        return [t.get_text() for t in build_figure(slide).texts]


def test_a_panel_is_titled_by_the_finding_of_its_claim():
    slide = demo.slide()
    assert title_of(slide, slide.collage.main) == "Resists forgetting, as a sentence"
    with pytest.raises(InvalidInput, match="C99"):
        title_of(slide, replace(slide.collage.main, claim="C99"))


def test_the_interval_plot_places_reference_margin_and_interval():
    sheet = Sheet(400, 200)
    draw_interval(sheet, IntervalPlot(1.1, 0.2, 2.0, 0.0, 0.0, 2.0), Box(100, 50, 300, 80), "#000000")
    reference, interval, dot = (np.asarray(line.get_xdata(), dtype=float) for line in sheet.figure.findobj(Line2D))
    (shade,) = (p for p in sheet.figure.findobj(Rectangle) if p is not sheet.figure.patch)
    left, right = shade.get_x(), shade.get_x() + shade.get_width()
    assert reference[0] == pytest.approx(left)
    assert interval[1] == pytest.approx(right)  # the interval ends where the margin does
    assert (dot[0] - left) / (right - left) == pytest.approx(1.1 / 2.0)
    assert left >= 100
    assert right <= 300


@pytest.mark.parametrize(
    ("claimed", "left", "right"),
    [((2.0, math.inf), 2.0, None), ((-math.inf, 0.0), None, 0.0), ((0.5, 1.5), 0.5, 1.5)],
)
def test_the_interval_plot_shades_what_is_claimed(claimed, left, right):
    sheet, box = Sheet(400, 200), Box(100, 50, 300, 80)
    draw_interval(sheet, IntervalPlot(1.1, 0.2, 1.9, 0.0, 0.0, 0.0, claimed=claimed), box, "#000000")
    reference, interval, _ = (np.asarray(line.get_xdata(), dtype=float) for line in sheet.figure.findobj(Line2D))
    (shade,) = (p for p in sheet.figure.findobj(Rectangle) if p is not sheet.figure.patch)
    scale = (interval[1] - reference[0]) / 1.9  # pixels for one unit of the effect
    ends = (shade.get_x(), shade.get_x() + shade.get_width())
    for end, value, edge in zip(ends, (left, right), (box.left, box.right), strict=True):
        assert end == pytest.approx(edge if value is None else reference[0] + scale * value)


def test_headlines_of_the_portrait_have_equal_gaps_whatever_their_length():
    slide = demo.slide(2, 11)
    titles = ("Short", "A title that is so long that it needs two lines on the list of a portrait", "Short", "Short")
    long = iter(titles)
    cards = [replace(c, title=next(long)) if c.headline else c for c in slide.cards]
    with theme.style():
        figure = build_portrait(replace(slide, cards=cards))
        bars = [p.get_window_extent() for p in figure.findobj(Rectangle) if p.get_width() == 7]
    bars.sort(key=lambda b: -b.y1)
    gaps = [above.y0 - below.y1 for above, below in itertools.pairwise(bars)]
    assert len(bars) == 4
    assert gaps == pytest.approx([gaps[0]] * 3)
    assert bars[1].height > bars[0].height


def test_the_name_of_the_x_axis_stands_beside_its_ticks_where_there_is_room():
    def with_labels(name):
        def draw(ax):
            demo.lines(ax)
            ax.set_xlabel(name)

        with theme.style():
            figure = build_figure(with_panels(demo.slide(1), Panel("Lines", draw, "lines", "a quantity")))
            assert check_layout(figure) == []
            ax = next(a for a in figure.axes if a.get_gid() == "panel-1")
            ticks = [t.get_window_extent() for t in ax.get_xticklabels()]
            return ax.xaxis.label.get_window_extent(), ticks[-1], ax.get_window_extent()

    beside, tick, tall = with_labels("tasks")
    assert beside.x0 > tick.x1
    assert beside.y0 < tick.y1
    below, tick, short = with_labels("tasks that were learned so far, one after the other")
    assert below.y1 < tick.y0
    assert short.height < tall.height


def test_a_log_scale_places_ratios():
    sheet = Sheet(400, 200)
    draw_interval(sheet, IntervalPlot(2.0, 1.0, 4.0, 1.0, 1.0, 1.0, log=True), Box(0, 50, 100, 80), "#000000")
    xs = [float(line.get_xdata()[0]) for line in sheet.figure.findobj(Line2D)]
    assert xs[2] == pytest.approx(50)


def test_check_layout_finds_what_is_wrong():
    def clash(ax):
        ax.text(0.5, 0.5, "first words")
        ax.text(0.5, 0.5, "second words")
        ax.text(0.1, 0.2, "tiny", fontsize=5)

    slide = demo.slide()
    found = " ".join(problems(with_panels(slide, Panel("Bad", clash, "bad", "nothing"))))
    assert "'first words' overlaps 'second words'" in found
    assert "'tiny' is set in 5.0 points" in found
    with theme.style():
        figure = build_figure(slide)
        figure.axes[1].annotate("outside", (0, 0), (-200, 0), textcoords="offset points")
        assert any("'outside'" in p and "runs out" in p for p in check_layout(figure))


def test_check_layout_finds_words_that_were_cut():
    def crowded(ax):
        Diagram(ax).box(220, 100, 90, 40, "far too many words for so small a box")

    slide = demo.slide()
    slide = with_panels(slide, idea=Panel("The idea", crowded, "a box"))
    assert any("was cut to fit" in p for p in problems(slide))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda d: d.box(200, 100, 200, 60, "inside"), ""),
        (lambda d: (d.field(200, 100, 200, 60), d.note(200, 100, "on the field")), ""),
        (lambda d: (d.box(200, 100, 60, 40), d.note(225, 100, "across")), "across the edge of a shape"),
        (lambda d: (d.field(200, 300, 300, 60), d.equation(200, 268, "a+b", size=20)), "across the edge of a shape"),
        (lambda d: (d.arrow((20, 200), (400, 200)), d.note(200, 200, "struck")), "a line runs through 'struck'"),
        (lambda d: (d.curve(200, 200, 300, 60, [0, 1, 0]), d.note(200, 176, "peak")), "a line runs through 'peak'"),
        (lambda d: d.note(430, 200, "beyond the right edge"), "runs out of the canvas"),
    ],
)
def test_check_layout_compares_text_with_shapes_lines_and_canvas(draw, words):
    slide = with_panels(demo.slide(), idea=Panel("The idea", lambda ax: draw(Diagram(ax, 440, 400)), "shapes"))
    with theme.style():
        found = " ".join(check_layout(build_figure(slide)))
    assert (words in found) if words else (found == "")


def test_direct_labels_and_ticks_lie_in_their_cards():
    def busy(ax):
        demo.lines(ax)
        ax.set_ylabel("a long name of the vertical axis")
        ax.set_yticks([0.5, 1.0], ["a half, in words", "one"])

    slide = demo.slide()
    assert problems(with_panels(slide, Panel("Busy", busy, "busy", "with long labels"))) == []


def test_axes_placed_by_hand_fill_the_panel():
    def by_hand(part):
        for x in (0.2, 0.6):
            part.add_axes((x, 0.4, 0.2, 0.2)).plot([1, 2])

    slide = demo.slide()
    slide = with_panels(slide, Panel("By hand", by_hand, "two axes", "lines", own_axes=True))
    with theme.style():
        figure = build_figure(slide)
        assert check_layout(figure) == []
        left, right = (ax.get_window_extent() for ax in figure.subfigs[0].axes)
        assert left.x1 < right.x0
        assert left.height > 100


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: demo.slide(0), "one to three small panels"),
        (lambda: with_panels(demo.slide(), replace(demo.PANELS[1], subtitle="")), "quantity and unit"),
        (lambda: with_panels(demo.slide(), replace(demo.PANELS[1], alt="w" * 301)), "301 characters"),
        (lambda: Collage("x", demo.IDEA, demo.PANELS[0], demo.PANELS[1:2], "", "MLP"), "names its data"),
        (lambda: render_slide(demo.slide(), "unused", ["gif"]), "gif"),
        (lambda: render_slide(demo.slide(), "unused", ["png"], scale=0), "scale"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, words):
    with theme.style(), pytest.raises(InvalidInput, match=words):
        make()


def test_the_text_alternative_tells_every_panel_and_verdict():
    slide = demo.slide(2, 6)
    words = describe(slide)
    for panel in slide.collage.panels:
        assert panel.alt.rstrip(".") in words
    for card in slide.cards:
        assert card.title in words
        assert card.ours in words


def test_sizes_and_formats(rendered):
    assert set(rendered) == {"svg", "png", "pdf", "portrait"}
    for name, size in (("png", (3840, 2160)), ("portrait", (2160, 2700))):
        with Image.open(rendered[name]) as picture:
            assert picture.size == size
    assert rendered["pdf"].read_bytes().startswith(b"%PDF")
    assert rendered["svg"].stat().st_size < 300_000
    assert not list(rendered["svg"].parent.glob(".*"))  # no half-written files


def test_svg_says_what_it_shows_and_keeps_its_text(rendered):
    root = ElementTree.parse(rendered["svg"]).getroot()
    names = [child.tag.split("}")[1] for child in root]
    assert names[:2] == ["title", "desc"]
    assert root.get("role") == "img"
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Gated Linear Networks" in texts
    assert "✓ supported" in texts


def test_svg_brings_every_font_it_names(rendered):
    svg = rendered["svg"].read_text("utf-8")
    faces = re.findall(r'@font-face\{font-family:"([^"]+)"', svg)
    named = set(re.findall(r"font-family=\"&#x27;([^&]+)&#x27;", svg))
    assert named
    assert named <= set(faces)
    assert not re.findall(r'(?:href|src)\s*[=:]\s*["(]?https?:', svg)


def test_svg_survives_the_loss_of_its_style_sheet(rendered):
    root = ElementTree.parse(rendered["svg"]).getroot()
    for element in root.iter():
        assert "style" not in element.attrib
    texts = [t for t in root.iter("{http://www.w3.org/2000/svg}text") if "font-family" in t.attrib]
    assert texts
    assert all(t.get("font-family").split(", ")[-1] in ("sans-serif", "serif") for t in texts)
    assert all(t.get("font-size") and t.get("fill") for t in texts)


def test_the_same_slide_gives_the_same_files(tmp_path):
    first = render_slide(demo.slide(), tmp_path / "a")
    again = render_slide(demo.slide(), tmp_path / "b")
    for name in first:
        assert first[name].read_bytes() == again[name].read_bytes(), name


def test_svg_looks_like_the_png_in_a_browser(rendered, browser_page):
    data = base64.b64encode(rendered["svg"].read_bytes()).decode()
    page = browser_page("about:blank", width=1600)
    page.set_content(f'<body style="margin:0"><img width="1600" alt="" src="data:image/svg+xml;base64,{data}"></body>')
    page.wait_for_function("document.images[0].complete")
    page.wait_for_timeout(200)
    shots = [Image.open(io.BytesIO(page.screenshot())).convert("RGB")]
    with Image.open(rendered["png"]) as picture:
        shots.append(picture.convert("RGB").resize((1600, 900), Image.Resampling.LANCZOS))
    blurred = [np.asarray(s.filter(ImageFilter.GaussianBlur(3)), dtype=float) for s in shots]
    difference = np.abs(blurred[0] - blurred[1]).max(axis=2)
    assert difference.mean() < 2.0
    assert (difference > 40).mean() < 0.002  # a missing or substituted font moves whole words


def test_text_lives_in_the_pdf(rendered):
    program = shutil.which("pdftotext")
    if program is None:  # poppler is not everywhere; the fonts are named in the file itself
        assert b"MLCollageSans" in rendered["pdf"].read_bytes()
        return
    words = subprocess.run([program, str(rendered["pdf"]), "-"], capture_output=True, text=True, check=True).stdout
    assert "Gated Linear Networks" in words


def test_wrapping_keeps_formulas_and_all_words():
    with theme.style():
        figure = build_figure(demo.slide())
        text = "weights $w_{c(z)} \\leftarrow w - \\eta q$ and a\u00a0b more words"
        lines = wrap(figure, text, 150, 14)
        assert " ".join(lines) == text
        assert any("$w_{c(z)} \\leftarrow w - \\eta q$" in line for line in lines)
        sizes = [fit(figure, "several words that need room", room, 30).size for room in (2000, 300, 250)]
        assert sizes == sorted(sizes, reverse=True)
        assert all(a >= theme.MIN_SIZE for a in sizes)
        assert all(a <= b for a, b in itertools.pairwise(sizes[::-1]))


@pytest.mark.parametrize(
    "text", ["tab\there", "null\x00byte", "costs $5", "$\\frac{$ broken", "a \u202ereversed", "$x^2$ fine"]
)
def test_texts_with_control_characters_or_broken_formulas_are_drawn(text, tmp_path):
    slide = demo.slide(2, 3, title=text, tagline=text)
    slide = replace(slide, cards=[replace(c, title=text, ours=text) for c in slide.cards])
    drawn = render_slide(slide, tmp_path, formats=("svg",))["svg"].read_text("utf-8")
    ElementTree.fromstring(drawn)
    assert "\x00" not in drawn
