from __future__ import annotations

import re
from dataclasses import replace

import demo
import pytest
from PIL import Image

from mlcollage.collage.post import write_post
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
    assert sizes["2021-05-sheet.png"] == (1600, 900)
    assert sizes["2021-05-teaser.png"] == (1200, 630)
    assert sizes["deep_bootstrap.png"] == (1920, 1080)


def test_each_paper_has_its_paragraph_links_verdicts_and_command(post):
    text = post[0].read_text("utf-8")
    assert text.count("\n## DEMO") == 4  # papers that are not measured are told too
    assert "- ✓ supported: Beats one-pass MLP (+6.1 pts" in text
    assert "- ≈ inconclusive: Depth lowers the log-loss" in text
    assert "https://arxiv.org/abs/1910.01526" in text
    assert "collage 16 of 52" in text
    assert "$ mlcollage digest 2021-05" in text
    assert "`mlcollage run deep_bootstrap`" in text


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
