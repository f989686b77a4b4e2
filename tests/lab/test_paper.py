"""Papers are found by their ``paper.toml``; a plug-in that is damaged is said in a sentence."""

import re

import pytest

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab.paper import IDEAS, broken_plugins, find_paper, papers


def edit(probe, old, new):
    file = probe / "probe_paper" / "paper.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_papers_come_in_the_order_of_their_months():
    known = list(papers().values())
    assert [p.month for p in known] == sorted(p.month for p in known)
    assert all(set(p.ideas) <= set(IDEAS) for p in known)
    assert all(p.authors and p.title and p.venue for p in known)


def test_a_plug_in_is_found_beside_the_built_in_ones(probe):
    paper = find_paper("probe")
    assert paper.built
    assert paper.package == "probe_paper"
    assert paper.origin == probe / "probe_paper"
    assert [claim.id for claim in paper.module("study").STUDY.claims] == ["C1", "C2"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('title = "A probe of the lab"', "", "lacks title"),
        ('arxiv = ""', 'arxiv = ""\ncolor = "red"', "unknown keys color"),
        ('ideas = ["explore"]', 'ideas = ["alchemy"]', "unknown ideas alchemy"),
        ('authors = ["Nobody"]', 'authors = "Nobody"', "authors in .* must be a list of strings"),
        ('month = "2021-05"', "month = 2021-05-01", "month in .* must be a string"),
        ('month = "2021-05"', 'month = "May 2021"', "must be written like 2021-05"),
        ('slug = "probe"', "slug = ", "is not valid TOML"),
        ('slug = "probe"', 'slug = "../probe"', "slug in .* must be lower-case letters"),
        ('arxiv = ""', 'arxiv = "2012.14193/../x"', "arxiv in .* must be a number like"),
        ('arxiv = ""', 'arxiv = ""\nofficial_code = "java\\tscript:alert(1)"', "must be an http or https address"),
        ('slug = "probe"', 'slug = "deep_bootstrap"', "two papers are called 'deep_bootstrap'"),
    ],
)
def test_a_damaged_identity(probe, old, new, sentence):
    others = {slug: paper for slug, paper in papers().items() if slug != "probe"}
    edit(probe, old, new)
    assert papers() == others
    assert re.search(sentence, broken_plugins()["probe"])
    with pytest.raises(InvalidInput, match=sentence):
        find_paper("probe")


@pytest.mark.parametrize("package", ["gone_away", "gone_away.inner"])
def test_a_plug_in_whose_package_is_gone(probe, package):
    (probe / "probe_paper-0.1.dist-info" / "entry_points.txt").write_text(f"[mlcollage.papers]\nprobe = {package}\n")
    assert "probe" not in papers()
    assert f"'{package}', which cannot be found; reinstall it" in broken_plugins()["probe"]


def test_a_plug_in_takes_the_place_of_a_planned_paper(probe, planned):
    edit(probe, 'slug = "probe"', f'slug = "{planned}"')
    assert find_paper(planned).package == "probe_paper"


def test_unknown_papers():
    with pytest.raises(UnknownName, match="did you mean 'barlow_twins'"):
        find_paper("barlow_twin")
    with pytest.raises(UnknownName, match="`mlcollage list` shows all"):
        find_paper("zzz")
