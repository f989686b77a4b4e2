"""Benchmarks are found by the name of their paper and may be written like any module."""

import pytest

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab import papers
from mlcollage.lab.bench import benchmarked, find_benchmark


def write(folder, text):
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "fisher_explosion.py").write_text(text)


def test_a_benchmark_may_define_dataclasses(tmp_path, monkeypatch):
    write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Task:\n"
        '    name: str\n\n\ndef bench(quick=True):\n    return [{"name": Task("a").name}]\n',
    )
    monkeypatch.chdir(tmp_path)
    file, bench = find_benchmark("fisher_explosion")
    assert file.parent.parent == tmp_path
    assert bench() == [{"name": "a"}]


def test_a_benchmark_without_its_function_or_paper_is_explained(tmp_path, monkeypatch):
    write(tmp_path, "rows = []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=r"no function bench\(\)"):
        find_benchmark("fisher_explosion")
    with pytest.raises(UnknownName):
        find_benchmark("fisher_explosions")


def test_every_built_paper_has_a_benchmark():
    built = [p.slug for p in papers().values() if p.built and p.package.startswith("mlcollage.")]
    assert benchmarked() == built
