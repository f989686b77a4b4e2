from __future__ import annotations

import re
from dataclasses import replace

import demo
import numpy as np
import pytest
from PIL import Image

from mlcollage.collage.post import _sheet, write_post
from mlcollage.errors import InvalidInput


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return demo.entries(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def post(entries, tmp_path_factory):
    return write_post("2021-05", entries, tmp_path_factory.mktemp("post"))


def test_the_title_names_the_ideas_and_the_pictures_are_there(post):
    text = post[0].read_text("utf-8")
    title = text.splitlines()[0]
    assert title.startswith("# ML collage, May 2021: ")
    assert "the idea of deep\\_bootstrap" in title
    linked = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text))
    assert linked == {"deep_bootstrap.png", "gated_linear_networks.png", "2021-05-sheet.png"}
    assert {p.name for p in post[1:]} == linked | {"2021-05-teaser.png"}


def test_pictures_have_their_sizes(post):
    sizes = {}
    for path in post[1:]:
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    assert sizes["2021-05-sheet.png"] == (1600, 436 + 32)  # two slides side by side, and no empty room below
    assert sizes["2021-05-teaser.png"] == (1200, 630)
    assert sizes["deep_bootstrap.png"] == (1920, 1080)


def test_each_paper_has_its_paragraph_links_verdicts_and_command(post):
    text = post[0].read_text("utf-8")
    assert text.count("\n## DEMO") == 2
    assert "Four papers, two of which are measured here so far." in text
    assert "- ✓ supported: Beats one-pass MLP (+6.1 pts" in text
    assert "- ≈ inconclusive: Depth lowers the log-loss" in text
    assert "https://arxiv.org/abs/1910.01526" in text
    assert "collage 16 of 52" in text
    assert "$ mlcollage digest 2021-05" in text
    assert "`mlcollage run deep_bootstrap`" in text


def test_papers_that_are_not_measured_get_a_line_and_no_command(post):
    text = post[0].read_text("utf-8")
    waiting = text.split("## Not measured here yet\n\n")[1].split("\n\n")[0].splitlines()
    assert [line.split("**")[1] for line in waiting] == [
        "DEMO Asymmetric Self Play",
        "DEMO Bidirectional Update Rules",
    ]
    assert "not built yet" in waiting[0]
    assert "can be run" in waiting[1]
    assert "mlcollage run asymmetric_self_play" not in text


def test_a_verdict_names_what_it_needs_and_a_missing_value_its_reason(entries, tmp_path):
    rows = [
        replace(entries[5].claims[0], needs="needs ≥ 2 pts"),
        replace(entries[5].claims[2], status="pending", ours="–", reason="3 runs missing"),
    ]
    text = write_post("2021-05", [replace(entries[5], claims=rows)], tmp_path)[0].read_text("utf-8")
    assert "- ✓ supported: Beats one-pass MLP (+6.1 pts \\[4.8, 7.4\\]; needs ≥ 2 pts; the paper: 98%)" in text
    assert "- ◌ not measured yet: Resists forgetting (3 runs missing; the paper: almost on par)" in text


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_teaser_is_filled_by_its_pictures(count, tmp_path):
    for shape, size in (("wide", (192, 108)), ("tall", (108, 135))):
        Image.new("RGB", size, "white").save(tmp_path / f"{shape}.png")
    shape = "tall" if count in (2, 3) else "wide"
    sheet = _sheet([tmp_path / f"{shape}.png"] * count, (1200, 630))
    white = (np.asarray(sheet).min(axis=2) == 255).mean()
    assert white > 0.65


def test_markup_in_texts_is_shown_letter_by_letter(entries, tmp_path):
    nasty = "<b>*bold*</b> [link](javascript:alert(1))\n# heading"
    changed = [replace(e, title=nasty, summary=nasty, finding=nasty) if e.slide_svg else e for e in entries]
    text = write_post("2021-05", changed, tmp_path)[0].read_text("utf-8")
    assert "<b>" not in text.replace("\\<b", "")
    assert not re.search(r"(?<!\\)\[link(?<!\\)\]", text)
    assert "\n# heading" not in text


def test_a_month_without_measurements_is_refused(entries, tmp_path):
    with pytest.raises(InvalidInput, match="mlcollage digest 2021-09"):
        write_post("2021-09", entries, tmp_path)
