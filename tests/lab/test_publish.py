"""Evidence becomes slides and pages: complete, linked, and open about what failed or is missing."""

import dataclasses
import json
import re
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from mlcollage.errors import UnknownName
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.paper import papers
from mlcollage.lab.publish import draw_slide, make_slide, publish_study, slide_name, write_pages
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.lab.store import Store

BUILT = ("deep_bootstrap", "gated_linear_networks")


@pytest.fixture(scope="module")
def digest(smoke_store, tmp_path_factory):
    """The digest of both studies at smoke scale: its folder, and what was published."""
    folder = tmp_path_factory.mktemp("digest")
    store = smoke_store(*BUILT)
    published = {slug: publish_study(BoundStudy(slug, Scale.SMOKE), store, folder) for slug in BUILT}
    pages = write_pages({slug: p.entry for slug, p in published.items()}, folder)
    return folder, published, pages


def links(page: Path) -> set[str]:
    return {unescape(t) for t in re.findall(r'(?:href|src)="([^"]+)"', page.read_text("utf-8"))}


def test_the_index_lists_all_sixteen(digest):
    folder, _, pages = digest
    assert {p.name for p in pages} >= {"index.html", "2021-03.html", "2021-05.html", "2021-06.html", "2021-09.html"}
    text = unescape((folder / "index.html").read_text("utf-8"))
    for paper in papers().values():
        assert paper.title in text
    assert len([p for p in papers().values() if p.package is None or p.package.startswith("mlcollage.")]) == 16


def test_a_month_page_has_its_four_papers_and_whole_claims(digest):
    folder, published, _ = digest
    text = unescape((folder / "2021-05.html").read_text("utf-8"))
    for paper in papers().values():
        assert (paper.title in text) == (paper.month == "2021-05")
    for slug in BUILT:
        for verdict in published[slug].verdicts.values():
            assert verdict.claim.sentence in text
            assert verdict.claim.source in text


def test_every_link_within_the_digest_resolves(digest):
    folder, _, pages = digest
    local = 0
    for page in pages:
        for target in links(page):
            if re.match(r"(https?:|data:|mailto:)", target):
                continue
            file, _, anchor = target.partition("#")
            there = folder / file if file else page
            assert there.exists(), f"{page.name} links to {target}"
            if anchor:
                assert f'id="{anchor}"' in there.read_text("utf-8")
            local += bool(file)
    assert local > 10


def test_the_numbers_and_verdicts_behind_a_slide_can_be_read(digest, smoke_store):
    folder, published, _ = digest
    for slug in BUILT:
        table = pd.read_parquet(folder / "data" / f"{slug}-smoke.parquet")
        evidence = BoundStudy(slug, Scale.SMOKE).evidence(smoke_store(slug))
        pd.testing.assert_frame_equal(table, evidence.table)
        assert {"arm", "seed", "metric", "step", "value", "run"} <= set(table)
        text = (folder / "data" / f"{slug}-smoke-verdicts.json").read_text("utf-8")
        verdicts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert [v["id"] for v in verdicts] == list(published[slug].verdicts)
        assert {v["status"] for v in verdicts} == {"untested"}, "smoke scale gives no verdicts"


def test_verdicts_of_a_judged_scale_are_json_too(smoke_store):
    for slug in BUILT:
        evidence = dataclasses.replace(BoundStudy(slug, Scale.SMOKE).evidence(smoke_store(slug)), scale=Scale.QUICK)
        verdicts = BoundStudy(slug, Scale.QUICK).judge(evidence)
        text = json.dumps([v.to_dict() for v in verdicts.values()], allow_nan=False)
        assert len(json.loads(text)) == len(verdicts)


def test_each_slide_is_drawn_in_all_formats_with_a_text_alternative(digest):
    folder, published, _ = digest
    for slug in BUILT:
        assert set(published[slug].files) == {"svg", "png", "pdf", "portrait"}
        svg = (folder / "slides" / f"{slug}-smoke.svg").read_text("utf-8")
        assert "smoke scale" in svg
        assert "<title" in svg
        assert 100 < len(published[slug].entry.slide_alt) <= 300
        assert len(published[slug].entry.description) > 500


def test_the_digest_of_the_probe_joins_the_plug_in_to_the_sixteen(probe, tmp_path):
    run_study("probe", "quick", store=tmp_path / "results")
    published = publish_study(BoundStudy("probe"), Store(tmp_path / "results"), tmp_path / "digest")
    write_pages({"probe": published.entry}, tmp_path / "digest")
    index = (tmp_path / "digest" / "index.html").read_text("utf-8")
    assert "A probe of the lab" in index
    assert index.count("A probe of the lab") <= 4
    month = unescape((tmp_path / "digest" / "2021-05.html").read_text("utf-8"))
    assert "data/probe-quick.parquet" in month
    assert "2.01" in month


def test_failed_and_missing_runs_are_said_on_the_slide(probe, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "ok,raise")
    run_study("probe", "quick", store=tmp_path)
    study = BoundStudy("probe")
    evidence = study.evidence(Store(tmp_path))
    slide = make_slide(study, evidence, study.judge(evidence))
    assert "3 runs failed" in slide.foot_left
    assert "not finished" not in slide.foot_left
    monkeypatch.setenv("PROBE_SEEDS", "5")
    wider = BoundStudy("probe")
    evidence = wider.evidence(Store(tmp_path))
    verdicts = wider.judge(evidence)
    slide = make_slide(wider, evidence, verdicts)
    assert "3 runs failed" in slide.foot_left
    assert "4 of 10 runs not finished" in slide.foot_left
    assert verdicts["C1"].status.value == "pending"
    svg = draw_slide(wider, evidence, verdicts, tmp_path / "slides", ["svg"])[1]["svg"].read_text("utf-8")
    assert "3 runs failed" in re.sub(r"<[^>]+>", "", svg)


def test_few_seeds_and_untested_claims_are_said_on_the_chip(probe, tmp_path):
    run_study("probe", "quick", store=tmp_path)
    study = BoundStudy("probe")
    evidence = study.evidence(Store(tmp_path))
    c1, c2 = make_slide(study, evidence, study.judge(evidence)).cards
    assert (c1.status, c1.note) == ("supported", "only 3 seeds")
    assert (c2.status, c2.note) == ("untested", "not at this scale")


def test_a_slide_of_the_users_workload_is_named_by_it(probe, user_workloads, tmp_path):
    evidence = run_study("probe", "quick", workload=user_workloads["csv"], store=tmp_path / "results")
    own, usual = BoundStudy("probe", Scale.QUICK, user_workloads["csv"]), BoundStudy("probe")
    assert evidence.workload == own.workload_name
    assert own.workload_name.startswith("table.csv")
    assert slide_name(usual) == "probe-quick"
    assert re.fullmatch(r"probe-quick-table-csv[A-Za-z0-9_-]+", slide_name(own))
    slide, files = draw_slide(own, evidence, own.judge(evidence), tmp_path / "slides", ["svg"])
    assert f"workload {own.workload_name}" in slide.foot_left
    assert files["svg"].name == f"{slide_name(own)}.svg"


def test_nothing_measured_is_said_with_the_command(probe, tmp_path):
    study = BoundStudy("probe", Scale.FULL, "digits")
    with pytest.raises(UnknownName, match="run `mlcollage run probe --scale full --workload digits` first"):
        make_slide(study, study.evidence(Store(tmp_path)), {})


def test_pages_are_replaced_in_one_step(tmp_path):
    for _ in range(2):
        pages = write_pages({}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in pages)
