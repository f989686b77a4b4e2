"""The README and the pages: their code runs, their links lead somewhere, their commands exist, the site builds."""

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from mlcollage.cli import app
from mlcollage.lab.paper import papers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text("utf-8")) if language.strip() in languages]


def without_code(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    text = "\n".join(blocks(page, "python"))
    (tmp_path / "page.py").write_text(text, "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small networks, and a machine that others use too
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name(page)}:\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_column_of_a_table_has_a_name(page):
    lines = FENCE.sub("", page.read_text("utf-8")).splitlines()
    heads = [above for above, below in itertools.pairwise(lines) if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", below.strip())]
    assert not [head for head in heads if any(not cell.strip() for cell in head.strip().strip("|").split("|"))]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            missing.append(target)
    assert not missing, f"{name(page)} links to what is not there: {missing}"


def commands(page: Path) -> list[tuple[str, bool]]:
    """Each ``mlcollage ...`` of a page, and whether it stands whole in a console block."""
    lines = "\n".join(blocks(page, "console", "bash", "sh", "shell")).splitlines()
    whole = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?mlcollage( |$)", line)]
    text = FENCE.sub("", page.read_text("utf-8"))
    mentioned = re.findall(r"`(mlcollage(?: [^`\n]*)?)`", text)
    return [(line, True) for line in whole] + [(line, False) for line in mentioned]


def complaint(line: str, *, whole: bool) -> str | None:
    """What the command line's own parser says against a command, without executing it."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    command = get_command(app)
    while words and (commands := getattr(command, "commands", None)) and not words[0].startswith("-"):
        if words[0] not in commands:
            return f"there is no command {words[0]!r}"
        command, words = commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if hasattr(command, "commands"):
        unknown = set(words) - options - {"--help"}
        return f"unknown: {unknown}" if unknown else None
    try:
        command.make_context("mlcollage", list(words))
    except Exception as error:
        if not whole and type(error).__name__ == "MissingParameter":
            return None
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name)
def test_commands_exist_with_the_options_that_are_shown(page):
    wrong = {line: why for line, whole in commands(page) if (why := complaint(line, whole=whole))}
    assert not wrong


def test_the_check_of_commands_notices_what_is_wrong():
    assert complaint("mlcollage frobnicate", whole=False)
    assert complaint("mlcollage run", whole=True)
    assert complaint("mlcollage run all --sideways", whole=False)
    assert complaint("mlcollage run all --scale enormous", whole=True)
    assert complaint("mlcollage data --sideways", whole=True)
    assert complaint("mlcollage run", whole=False) is None


def leaves(command, path=()):
    """Every command that does something, with its words."""
    for word, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, word))
    yield path, command


def test_every_command_and_option_is_on_its_page():
    text = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    for path, command in leaves(get_command(app)):
        words = " ".join(("mlcollage", *path))
        assert words in text, f"{words} is not documented"
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert not option.startswith("-") or f"{option}" in text, f"{words} {option} is not documented"


def test_the_generated_tables_are_up_to_date():
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    try:
        tables = importlib.import_module("tables")
    finally:
        sys.path.pop(0)
    assert [name(page) for page in tables.outdated()] == [], "run `make tables`"
    for page in ("README.md", "docs/papers/index.md"):
        assert len(re.findall(r"^\| 20\d\d-\d\d ", (ROOT / page).read_text("utf-8"), re.MULTILINE)) >= 16


@pytest.mark.parametrize("slug", [s for s, p in papers().items() if (p.package or "").startswith("mlcollage.")])
def test_a_papers_page_has_its_claims_and_public_names(slug):
    paper = papers()[slug]
    page = ROOT / "docs" / "papers" / f"{slug}.md"
    assert page.exists(), "a built paper needs a page"
    text = page.read_text("utf-8")
    assert f"https://arxiv.org/abs/{paper.arxiv}" in text
    assert "<!-- table: claims -->" in text
    assert "<!-- table: slide -->" in text
    assert text.startswith("---\ntags:\n"), "name the words by which it should be found"
    public = importlib.import_module(str(paper.package)).__all__
    assert not [n for n in public if not re.search(rf"\b{n}\b", text)]


def test_the_navigation_holds_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text, re.MULTILINE)
    there = [str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs")]
    assert sorted(listed) == sorted(there)


def test_the_changelog_knows_the_present_version():
    import mlcollage

    assert f"## {mlcollage.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_extras_named_in_the_pages_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {e for page in PAGES for e in re.findall(r"mlcollage\[(\w+)\]|'\.\[(\w+)\]'", page.read_text("utf-8"))}
    assert {a or b for a, b in named} <= set(extras)
