"""The built site: all is rendered and public, and reads well by keyboard, on a phone, in the dark, and by searching."""

import functools
import html
import http.server
import importlib.util
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = ("", "papers/deep_bootstrap/", "reference/train/")  # landing page, a paper, a reference
MARKUP = {
    "an equation that was not typeset": r"\\[A-Za-z]{2,}|\\[()\[\]]|\$[^\s$]+\$",
    "a reStructuredText table": r"={4,}",
    "a Markdown table": r"\|\s*:?-{3,}",
    "a reStructuredText role or directive": r":[a-z]+:`|\.\. [a-z]+::|::\s*$",
    "literal backticks": r"``",
    "an option of the documentation": r"^:::",
}
# Modules whose functions are used by the module's name, or have one home only; all else is in its package's __all__.
MODULES = {
    *("mlcollage.errors", "mlcollage.testing", "mlcollage.collage.check"),
    *("mlcollage.lab." + name for name in ("evidence", "pool", "publish", "scaffold")),
    *("mlcollage.infer." + name for name in ("adaptation", "metric", "tensor_file", "warmup")),
    *("mlcollage.data." + n for n in ("cifar", "fashion_mnist", "fresh_networks", "imdb", "mnist1d", "permuted")),
    *("mlcollage.data." + name for name in ("problem", "row_hashes", "tables", "tiny_imagenet", "uci")),
    "mlcollage.papers.bnn_posteriors.sampler",  # the settings that its samplers share
}
HOOKS = {"extra_repr", "get_extra_state", "set_extra_state"}  # of torch.nn.Module


def build(folder: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site):
    """The site served on this machine: its search asks for files, which a browser refuses from disk."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


class Text(HTMLParser):
    """The text of a page outside of code."""

    def __init__(self, page: str):
        super().__init__()
        self.parts, self.inside = [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside += tag in ("script", "style", "pre", "code")

    def handle_endtag(self, tag):
        self.inside -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data):
        if not self.inside:
            self.parts.append(data)


@functools.cache
def pages(site: Path) -> dict[str, str]:
    """The HTML of each page, by its address."""
    return {str(p.relative_to(site).parent): p.read_text("utf-8") for p in sorted(site.rglob("index.html"))}


def test_the_site_asks_nothing_of_the_network(site):
    loads = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc(?:set)?=[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE)
    links = re.compile(r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*href=[\"']?(?:https?:)?//[^>]*>", re.IGNORECASE)
    assert len(pages(site)) > 15
    for name, page in pages(site).items():
        assert not loads.findall(page) + links.findall(page), f"{name} loads from the network"


@functools.cache
def texts(site: Path) -> dict[str, str]:
    """What a page says outside of code."""
    return {name: "".join(Text(page).parts) for name, page in pages(site).items()}


@pytest.mark.parametrize("what", MARKUP)
def test_nothing_is_left_unrendered(site, what):
    found = []
    for name, text in texts(site).items():
        found += [
            f"{name}: {text[max(0, m.start() - 60) : m.end() + 60]!r}" for m in re.finditer(MARKUP[what], text, re.M)
        ]
    assert found == []


def test_tables_of_docstrings_are_tables(site):
    shown = pages(site)
    for name, cells in {
        "papers/fisher_explosion": ("GPx", "drawn from the model"),
        "papers/neural_mechanics": ("translation", "rescale", "infinitely small steps; conserves all laws if λ = 0"),
    }.items():
        for cell in cells:
            assert re.search(rf"<td>{re.escape(cell)}</td>", html.unescape(shown[name])), f"{name}: {cell}"


def site_module(name: str):
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_an_equation_that_cannot_be_typeset_fails_the_build(tmp_path):
    package, docs = tmp_path / "sums", tmp_path / "docs"
    package.mkdir(), docs.mkdir()
    (package / "__init__.py").write_text('def f():\n    r"""Sum :math:`\\nonsense{x}`."""\n')
    (docs / "index.md").write_text("# A page\n\n```math\n\\sum_i x_i\n\n\\gibberish{y}\n```\n\n::: sums\n")
    hook = ROOT / "docs" / "_site" / "equations.py"
    handler = {"paths": [str(tmp_path)], "options": {"extensions": [f"{hook}:Docstrings"]}}
    plugins = [{"mkdocstrings": {"handlers": {"python": handler}}}]
    settings = {"site_name": "x", "strict": True, "theme": "mkdocs", "hooks": [str(hook)], "plugins": plugins}
    (tmp_path / "mkdocs.yml").write_text(json.dumps(settings))  # JSON is YAML
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert r"index.md: the equation '\gibberish{y}' cannot be typeset" in done.stderr
    assert r"sums.f: the equation '\nonsense{x}' cannot be typeset" in done.stderr
    assert "strict: true" in (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.mark.parametrize(
    "equation", [r"\frac1n \sum_i x_i", r"\tfrac{a}{b}", r"\Bigl( x \Bigr)", r"\sqrt n", r"a \le b"]
)
def test_common_spellings_are_typeset(equation, caplog):
    with caplog.at_level(logging.WARNING):
        assert site_module("equations").svg(equation, display=True, where="here").startswith("<svg")
    assert not caplog.records


def test_a_table_that_would_not_render_is_refused(caplog):
    with caplog.at_level(logging.WARNING, logger="mkdocs.hooks.equations"):
        site_module("equations").to_markdown("A table:\n\n====  ====\none   two\n====  ====\n", "package.name")
    assert "package.name: a table of '====' lines" in caplog.text


@functools.cache
def is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def resolve(name: str) -> tuple[str, list[str]]:
    """A documented name as module and path within it."""
    parts, cut = name.split("."), 1
    while cut < len(parts) and is_package(".".join(parts[:cut])) and is_module(".".join(parts[: cut + 1])):
        cut += 1
    return ".".join(parts[:cut]), parts[cut:]


@functools.cache
def is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name), "__path__")


def is_public(name: str) -> bool:
    module, path = resolve(name)
    if any(part.startswith("_") for part in (*module.split("."), *path)) or HOOKS & set(path):
        return False
    if not path or module in MODULES:
        return True
    packages = [module.rsplit(".", cut)[0] for cut in range(module.count("."))]
    names = {n for package in packages for n in getattr(importlib.import_module(package), "__all__", ())}
    parent = importlib.import_module(module.rpartition(".")[0])
    used_by_module = module.rpartition(".")[2] in getattr(parent, "__all__", ())
    return path[0] in names or used_by_module


def inherited(name: str) -> bool:
    """Whether a documented member comes from a class that is not ours."""
    module, path = resolve(name)
    owner = importlib.import_module(module)
    for part in path[:-1]:
        owner = getattr(owner, part)
    if not isinstance(owner, type):
        return False
    home = next((c for c in owner.__mro__ if path[-1] in vars(c)), owner)
    return not home.__module__.startswith("mlcollage")


def test_reference_pages_list_public_names_only(site):
    named = {n for page in pages(site).values() for n in re.findall(r'<h\d id="(mlcollage\.[\w.]+)" class="doc', page)}
    assert len(named) > 500
    assert sorted(n for n in named if not is_public(n)) == []
    assert sorted(n for n in named if inherited(n)) == []


def test_headings_of_the_site_go_down_one_level_at_a_time(site):
    wrong = []
    for name, page in pages(site).items():
        body = page.split('<article class="md-content__inner', 1)[-1]
        levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", body)]
        wrong += [f"{name}: h{a} then h{b}" for a, b in itertools.pairwise(levels) if b > a + 1]
        wrong += [] if levels.count(1) == 1 else [f"{name}: {levels.count(1)} titles"]
    assert wrong == []


def test_pictures_of_the_site_are_small_and_of_the_size_that_is_told():
    sizes = {"": site_module("pages").WIDE, "-portrait": site_module("pages").UPRIGHT}
    for path in (ROOT / "docs" / "img").glob("*.png"):
        assert path.stat().st_size <= 200_000, path.name
        with Image.open(path) as picture:
            assert picture.size == sizes["-portrait" if path.stem.endswith("-portrait") else ""]


def test_a_click_on_a_slide_opens_it_at_its_full_size(site):
    shown = [(n, m) for n, page in pages(site).items() for m in re.findall(r'<a class="slide" href="([^"]+)"', page)]
    assert len(shown) > 9
    for name, target in shown:
        with Image.open(site / name / target) as picture:
            assert picture.size == site_module("pages").WIDE


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_wrong_with_the_site(address, browser_page, violations, name):
    page = browser_page(address + name, color_scheme="light")
    assert violations(page) == []


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_wrong_in_the_dark(address, browser_page, violations, name):
    page = browser_page(address + name, color_scheme="dark")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert violations(page, only=("color-contrast", "link-in-text-block")) == []


def test_axe_finds_nothing_wrong_on_any_page(address, site, browser_page, violations):
    page = browser_page(address, color_scheme="light")
    wrong = {}
    for name in sorted(set(pages(site)) - {n.rstrip("/") for n in PAGES} - {"."}):
        page.goto(f"{address}{name}/")
        wrong[name] = violations(page)
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong_on_a_phone(address, browser_page, violations, name, scheme):
    page = browser_page(address + name, width=390, height=844, color_scheme=scheme)
    colors = ("color-contrast", "link-in-text-block")
    assert (violations(page, without=colors) if scheme == "light" else violations(page, only=colors)) == []
    # What sticks out is a table, which scrolls by itself; the page does not.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_pages_are_printed_dark_on_white(address, browser_page, violations):
    page = browser_page(address + "papers/deep_bootstrap/", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert violations(page, only=("color-contrast",)) == []


def test_no_page_of_the_site_is_wider_than_a_phone(address, site, browser_page):
    page = browser_page(address, width=390, height=844, java_script_enabled=False)
    for name in pages(site):
        page.goto(address + name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        cut = "[...document.querySelectorAll('pre > code')].filter((c) => c.scrollWidth > c.clientWidth + 1).length"
        assert page.evaluate(cut) == 0, f"{name} cuts code"


def test_no_page_of_the_site_is_wider_than_paper(address, site, browser_page):
    page = browser_page(address, width=700)  # A4 without margins, in pixels of print
    page.emulate_media(media="print")
    for name in pages(site):
        page.goto(f"{address}{name}/")
        assert page.evaluate("document.documentElement.scrollWidth") <= 700, name


SEARCHES = {
    "penalize": "papers/fisher_explosion/",
    "noisy labels": "papers/fisher_explosion/",
    "HMC my network": "papers/bnn_posteriors/",
    "uncertainty": "papers/bnn_posteriors/",
    "CKA": "reference/measure/",
    "CCA": "reference/measure/",
    "conformal": "reference/measure/",
    "calibration error": "reference/measure/",
    "continual learning": "papers/gated_linear_networks/",
    "streaming": "papers/gated_linear_networks/",
    "more data": "papers/deep_bootstrap/",
    "symmetry": "papers/neural_mechanics/",
    "selective neurons": "papers/class_selectivity/",
    "p value": "reference/stats/",
    "how many seeds": "statistics/",
    "my own data": "your-own-model/",
    "MCMC": "inference/",
    "install": "getting-started/",
    "add a paper": "contributing/",
}


META, SAID = "document.querySelector('.md-search-result__meta').textContent", "matching document"


def test_the_search_finds_pages_by_the_words_of_those_who_seek(address, browser_page):
    page = browser_page(address)
    missed = {}
    for query, target in SEARCHES.items():
        page.evaluate("document.querySelector('#__search').checked = true")
        page.fill(".md-search__input", "")
        page.press(".md-search__input", "End")
        page.wait_for_function(f"!/{SAID}/.test({META})")
        page.fill(".md-search__input", query)
        page.press(".md-search__input", "End")  # it listens to keys
        page.wait_for_function(f"/{SAID}/.test({META})")
        hits = page.evaluate("[...document.querySelectorAll('.md-search-result__link')].map((a) => a.href)")
        first = list(dict.fromkeys(h.split("#")[0].split("?")[0].removeprefix(address) for h in hits))[:5]
        if target not in first:
            missed[query] = first
    assert missed == {}
