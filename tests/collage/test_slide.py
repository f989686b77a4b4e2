from __future__ import annotations

import base64
import io
import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from xml.etree import ElementTree

import demo
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mlcollage.collage import theme
from mlcollage.collage.content import Chip, Panel
from mlcollage.collage.diagram import Diagram
from mlcollage.collage.slide import build_figure, check_layout, describe, render_slide
from mlcollage.collage.text import fit, wrap
from mlcollage.errors import InvalidInput

LONG = "How to train your ViT? Data, Augmentation, and Regularization in Vision Transformers, and then some more words"


def problems(slide):
    with theme.style():
        return check_layout(build_figure(slide))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return render_slide(demo.slide(), tmp_path_factory.mktemp("slide"), scale=2)


@pytest.mark.parametrize(
    ("panels", "chips", "wide"),
    [(1, 0, ()), (2, 1, ()), (3, 3, (0,)), (3, 5, ()), (4, 6, ()), (4, 7, ()), (4, 9, ()), (5, 11, ()), (6, 8, ())],
)
def test_nothing_overlaps_or_is_cut_for_any_number_of_panels_and_chips(panels, chips, wide):
    assert problems(demo.slide(panels, chips, wide=wide)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"title": "X"},
        {"title": LONG},
        {"title": LONG + " " + LONG, "tagline": LONG},
        {"byline": "A, B, C, D · " * 20, "tagline": LONG, "foot_left": LONG * 3, "foot_right": LONG},
        {"tagline": "", "foot_left": "", "foot_right": ""},
    ],
)
def test_texts_of_any_length_are_fitted(fields):
    assert problems(demo.slide(**fields)) == []


def test_eleven_tested_chips_with_long_values_are_fitted():
    chips = [
        Chip(
            f"C{i}",
            "W" * 14 + " " + "m" * 13,
            "a value that is far too long for a chip " * 2,
            "+1234.56 points [−1234.56, 1234.56]",
            "contradicted",
        )
        for i in range(1, 12)
    ]
    assert problems(replace(demo.slide(), chips=chips)) == []


def test_check_layout_finds_what_is_wrong():
    def clash(ax):
        ax.text(0.5, 0.5, "first words")
        ax.text(0.5, 0.5, "second words")
        ax.text(0.1, 0.2, "tiny", fontsize=5)

    slide = demo.slide()
    bad = replace(slide.collage, panels=[Panel("Bad", clash, "bad"), *slide.collage.panels[1:]])
    found = " ".join(problems(replace(slide, collage=bad)))
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
    slide = replace(slide, collage=replace(slide.collage, idea=Panel("The idea", crowded, "a box")))
    assert any("was cut to fit" in p for p in problems(slide))


def test_direct_labels_and_ticks_lie_in_their_cards():
    def busy(ax):
        demo.lines(ax)
        ax.set_ylabel("a long name of the vertical axis")
        ax.set_yticks([0.5, 1.0], ["a half, in words", "one"])

    slide = demo.slide()
    one = replace(slide.collage, panels=[Panel("Busy", busy, "busy", "with long labels"), *slide.collage.panels[1:]])
    assert problems(replace(slide, collage=one)) == []


def test_axes_placed_by_hand_fill_the_panel():
    def by_hand(part):
        for x in (0.2, 0.6):
            part.add_axes((x, 0.4, 0.2, 0.2)).plot([1, 2])

    slide = demo.slide()
    panel = Panel("By hand", by_hand, "two axes", own_axes=True)
    slide = replace(slide, collage=replace(slide.collage, panels=[panel, *slide.collage.panels[1:]]))
    with theme.style():
        figure = build_figure(slide)
        assert check_layout(figure) == []
        left, right = (ax.get_window_extent() for ax in figure.subfigs[0].axes)
        assert left.x1 < right.x0
        assert left.height > 100


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build_figure(demo.slide(0)), "no panels"),
        (lambda: build_figure(demo.slide(6, wide=(0, 1, 2, 3))), "at most six"),
        (lambda: render_slide(demo.slide(), "unused", ["gif"]), "gif"),
        (lambda: render_slide(demo.slide(), "unused", ["png"], scale=0), "scale"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, words):
    with theme.style(), pytest.raises(InvalidInput, match=words):
        make()


def test_the_text_alternative_tells_every_panel_and_verdict():
    slide = demo.slide(4, 6)
    words = describe(slide)
    for panel in slide.collage.panels:
        assert panel.alt.rstrip(".") in words
    for chip in slide.chips:
        assert chip.title in words
        assert chip.ours in words


def test_sizes_and_formats(rendered):
    assert set(rendered) == {"svg", "png", "pdf"}
    with Image.open(rendered["png"]) as picture:
        assert picture.size == (3200, 1800)
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
    named = set(re.findall(r"font-family: '([^']+)'", svg))
    assert named <= set(faces)
    assert not re.findall(r'(?:href|src)\s*[=:]\s*["(]?https?:', svg)


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
    slide = demo.slide(3, 3, title=text, tagline=text)
    slide = replace(slide, chips=[replace(slide.chips[0], title=text, ours=text)])
    drawn = render_slide(slide, tmp_path, formats=("svg",))["svg"].read_text("utf-8")
    ElementTree.fromstring(drawn)
    assert "\x00" not in drawn
