from __future__ import annotations

import itertools
import re
from dataclasses import replace
from urllib.parse import unquote, urlparse

import demo
import pytest

from mlcollage.collage.content import Entry
from mlcollage.collage.digest import SHOWN, render_index, render_month
from mlcollage.errors import InvalidInput, MissingFile

PAGES = ["index.html", "2021-05.html", "2021-09.html"]
PLANNED = Entry("demo", "A Title", "A. Author", "Venue", "2021-05", "1910.01526", ["causal"], "planned")

# Contrast of every piece of text with the nearest opaque ground behind it, by WCAG's formula.
LOW_CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility() || e.closest(".sr, .skip, [aria-hidden=true]")) continue;
    let ground = e, color;
    do { color = parse(getComputedStyle(ground).backgroundColor); ground = ground.parentElement; }
    while (ground && color.length === 4 && color[3] === 0);
    if (color.length === 4 && color[3] === 0) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(color)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${e.className} ${node.data.trim().slice(0, 30)}`);
  }
  return [...new Set(found)];
}"""


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return demo.entries(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def folder(entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digest")
    (folder / "index.html").write_text(render_index(entries), "utf-8")
    for month in demo.PAPERS:
        (folder / f"{month}.html").write_text(render_month(month, entries), "utf-8")
    for name in ("measurements.parquet", "runs.json"):
        (folder / name).write_text("demo", "utf-8")
    return folder


# --- in a browser, from disk; the fixture fails a test on console errors and on requests that leave the disk ----------


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window(folder, browser_page, name, width, scheme):
    page = browser_page((folder / name).as_uri(), width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_themes(folder, browser_page, name, scheme):
    page = browser_page((folder / name).as_uri(), color_scheme=scheme)
    assert page.evaluate(LOW_CONTRAST) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")


@pytest.mark.parametrize("name", ["index.html", "2021-05.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_wrong_with_a_digest(folder, browser_page, violations, name, scheme, width):
    page = browser_page((folder / name).as_uri(), width=width, color_scheme=scheme)
    assert violations(page) == []


def test_theme_button_goes_through_auto_light_dark(folder, browser_page):
    page = browser_page((folder / "index.html").as_uri(), color_scheme="light")
    seen = []
    for _ in range(4):
        seen.append((page.inner_text("#theme"), page.evaluate("getComputedStyle(document.body).backgroundColor")))
        page.click("#theme")
    assert [label for label, _ in seen] == ["Theme: auto", "Theme: light", "Theme: dark", "Theme: auto"]
    assert seen[0][1] == seen[1][1] != seen[2][1]


@pytest.mark.parametrize("name", PAGES)
def test_every_image_and_control_has_a_name(folder, browser_page, name):
    page = browser_page((folder / name).as_uri())
    assert (
        page.evaluate("[...document.querySelectorAll('main img, header img')].filter((i) => !i.alt.trim()).length") == 0
    )
    unnamed = "[...document.querySelectorAll('button, a')].filter((b) => !(b.ariaLabel || b.textContent).trim()).length"
    assert page.evaluate(unnamed) == 0
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("name", PAGES)
def test_headings_go_down_one_level_at_a_time(folder, browser_page, name):
    page = browser_page((folder / name).as_uri())
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("name", ["index.html", *(f"{month}.html" for month in demo.PAPERS)])
def test_every_link_resolves(folder, browser_page, name):
    page = browser_page((folder / name).as_uri())
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map((a) => a.href)")
    assert links
    for link in links:
        parts = urlparse(link)
        if parts.scheme == "https":
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link)
            continue
        target = folder / unquote(parts.path).rsplit("/", 1)[1]
        assert parts.scheme == "file"
        assert target.is_file(), link
        if parts.fragment:
            assert f'id="{parts.fragment}"' in target.read_text("utf-8"), link
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_keyboard_reaches_the_papers_first(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_slide_opens_full_screen_with_enter_and_closes_with_escape(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri())
    page.focus(".zoom")
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('full').open")
    first = page.get_attribute("#full img", "src")
    box = page.locator("#full img").bounding_box()
    assert box["width"] >= 1100
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#full img", "src") != first
    page.keyboard.press("Escape")
    assert not page.evaluate("document.getElementById('full').open")
    assert page.evaluate("document.activeElement.className") == "zoom"


def test_code_is_copied_whole(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri(), permissions=["clipboard-read", "clipboard-write"])
    page.locator(".copy").first.click()
    page.wait_for_function("document.getElementById('said').textContent.includes('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == demo.USAGE


def test_claims_are_cards_on_a_phone(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri(), width=390)
    wide = page.evaluate("[...document.querySelectorAll('tbody tr')].map((r) => r.getBoundingClientRect().right)")
    assert wide
    assert max(wide) <= 390
    assert page.evaluate("getComputedStyle(document.querySelector('tbody tr')).display") == "block"


def test_every_claim_has_an_address(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri() + "#deep_bootstrap-C3")
    assert page.evaluate("document.querySelector(':target').querySelector('.claim').textContent").startswith("C3")


def test_code_fits_on_a_phone(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri(), width=390)
    assert page.evaluate("[...document.querySelectorAll('pre')].every((p) => p.scrollWidth <= p.clientWidth)")


def test_full_screen_buttons_do_not_cover_the_slide(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri())
    page.click(".zoom")
    picture, keys = (page.locator(f"#full {what}").bounding_box() for what in ("img", ".keys"))
    assert picture["y"] + picture["height"] <= keys["y"]


def test_slides_do_not_glare_on_a_dark_page(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri(), color_scheme="dark")
    style = "getComputedStyle(document.querySelector('{}')).{}"
    ground = page.evaluate(style.format(".zoom", "backgroundColor"))
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 200
    assert "brightness" in page.evaluate(style.format(".zoom img", "filter"))


@pytest.mark.parametrize("name", PAGES)
def test_links_to_a_page_have_a_preview(folder, name):
    head = (folder / name).read_text("utf-8").split("</head>")[0]
    there = dict(re.findall(r'<meta property="og:(\w+)" content="([^"]*)"', head))
    assert there["title"]
    assert there["description"]
    if name != "2021-09.html":  # nothing is measured there
        assert there["image"].endswith(".png")


def test_measured_papers_come_first_and_say_their_finding(entries):
    page = render_index(entries)
    states = re.findall(r'<li class="card (\w+)" data-month="([\d-]+)"', page)
    for month in demo.PAPERS:
        order = [SHOWN.index(state) for state, when in states if when == month]
        assert order == sorted(order)
    assert page.count('class="finding"') == 3


def test_alternative_texts_are_short_and_the_whole_is_there(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri())
    texts = page.evaluate("[...document.images].map((i) => i.alt)")
    assert all(0 < len(t) <= 300 for t in texts)
    assert page.locator(".described").count() == 2


def cards(page):
    return page.evaluate("[...document.querySelectorAll('.card')].filter((c) => c.checkVisibility()).length")


def test_filters_work_with_the_keyboard_and_live_in_the_address(folder, browser_page):
    page = browser_page((folder / "index.html").as_uri())
    assert cards(page) == 16
    page.focus('[data-value="2021-05"]')
    page.keyboard.press("Space")
    assert cards(page) == 4
    assert page.inner_text("#count") == "4 of 16 papers"
    page.click('[data-value="2021-06"]')  # within a group: either
    assert cards(page) == 8
    page.click('[data-value="contradicted"]')  # groups together: both
    assert cards(page) == 3
    assert page.evaluate("location.hash") == "#month=2021-05,2021-06&verdict=contradicted"
    page.reload()
    assert cards(page) == 3
    assert page.get_attribute('[data-value="contradicted"]', "aria-pressed") == "true"
    page.click("#clear")
    assert cards(page) == 16
    assert page.evaluate("location.hash") == ""


def test_filter_that_fits_nothing_says_so(folder, browser_page):
    page = browser_page((folder / "index.html").as_uri() + "#month=2021-09&verdict=supported")
    assert cards(page) == 0
    assert page.is_visible("text=No paper fits all of these")


@pytest.mark.parametrize("idea", ["causal", "multilevel"])
def test_filter_by_idea(folder, browser_page, idea, entries):
    page = browser_page((folder / "index.html").as_uri() + f"#idea={idea}")
    assert cards(page) == sum(idea in e.ideas for e in entries)


def test_without_a_script_everything_is_shown(folder, browser_page):
    page = browser_page((folder / "index.html").as_uri() + "#month=2021-05", java_script_enabled=False)
    assert page.locator(".card:visible").count() == 16
    assert page.locator(".pick:visible").count() == 0
    page.goto((folder / "2021-05.html").as_uri())
    assert page.locator(".zoom img:visible").count() == 2
    assert page.locator("button:visible").count() == 2  # the slides; none that would do nothing but zoom


def test_page_prints_a_slide_a_page(folder, browser_page):
    page = browser_page((folder / "2021-05.html").as_uri(), color_scheme="dark")
    pdf = page.pdf(prefer_css_page_size=True)
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert float(boxes[0][0]) > float(boxes[0][1])  # landscape
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(LOW_CONTRAST) == []
    assert page.locator("button.quiet:visible").count() == 0
    # Title, finding and slide stand on one page, which is 188 mm (710 pixels) high between its margins.
    page.set_viewport_size({"width": 1039, "height": 710})
    ends = "[...document.querySelectorAll('.paper.measured')].map((p) => [p, p.querySelector('.slide img')]"
    ends += ".map((e) => e.getBoundingClientRect())).map(([p, s]) => s.bottom - p.top)"
    heights = page.evaluate(ends)
    assert heights
    assert max(heights) <= 710


# --- the text of the pages --------------------------------------------------------------------------------------------


def test_index_shows_all_papers_with_month_ideas_and_state(entries):
    page = render_index(entries)
    assert page.count('<li class="card') == 16
    for entry in entries:
        assert entry.title in page
    assert page.count("not built yet") == sum(e.state == "planned" for e in entries)
    assert page.count("built, not measured here yet") == sum(e.state == "built" for e in entries)


def test_claims_table_is_whole(folder, entries):
    page = (folder / "2021-06.html").read_text("utf-8")
    for row in next(e for e in entries if e.slug == "barlow_twins").claims:
        for text in (row.sentence, row.source, row.paper, row.estimand, row.smallest_effect, row.ours, row.reason):
            assert text in page
        assert all(w in page for w in row.warnings)
    assert page.count("✗ contradicted</span>") == 2  # the one row, and the marks explained at the foot


@pytest.mark.parametrize("name", PAGES)
def test_page_is_one_file(folder, name):
    page = (folder / name).read_text("utf-8")
    assert not re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"(?!data:)", page)
    assert not re.findall(r"<link[^>]+href=\"(?!data:)", page)
    assert all(u.startswith("data:") for u in re.findall(r"url\(\"?([^\")]{0,10})", page))
    assert len(page) < 2_000_000


def test_the_same_entries_give_the_same_page(entries):
    assert render_month("2021-05", entries) == render_month("2021-05", entries)
    assert render_index(entries) == render_index(entries)


def test_text_is_escaped():
    nasty = "<script>alert(1)</script> & \"quotes\" 'single'"
    entry = replace(
        PLANNED, title=nasty, authors=nasty, summary=nasty, usage=nasty, ideas=[nasty.split()[0]], state="measured",
        claims=[replace(demo.claim_rows()[0], sentence=nasty, estimand=nasty, ours=nasty, warnings=[nasty])],
        data_links=[(nasty, 'x" onclick="alert(1)')], foot=nasty,
    )  # fmt: skip
    for page in (render_month("2021-05", [entry]), render_index([entry])):
        assert "<script>alert" not in page
        assert 'onclick="alert' not in page
        assert page.count("<script>") == 1


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)",
        "java\tscript:alert(1)",
        "\x01javascript:alert(1)",
        " JavaScript:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
    ],
)
def test_links_that_run_or_leave_are_refused(target):
    with pytest.raises(InvalidInput, match="relative path"):
        render_month("2021-05", [replace(PLANNED, data_links=[("data", target)])])


def test_bad_input(tmp_path):
    with pytest.raises(InvalidInput, match="2021-13"):
        render_month("2021-13", [PLANNED])
    with pytest.raises(InvalidInput, match="no paper belongs"):
        render_month("2021-06", [PLANNED])
    with pytest.raises(InvalidInput, match="at least one"):
        render_index([])
    with pytest.raises(MissingFile, match="demo"):
        render_index([replace(PLANNED, slide_svg=tmp_path / "none.svg")])


def test_pages_can_stand_alone():
    assert "index.html" not in render_month("2021-05", [PLANNED], index_page=None)
    assert "2021-05.html" not in render_index([PLANNED], month_page=None)
