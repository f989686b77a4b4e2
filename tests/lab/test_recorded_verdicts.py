"""The verdicts of two papers that were recorded are those that the statistical layer gives now.

``recorded/`` holds what the claims of both studies read at scale quick (one row per number) and their verdicts.
Whoever changes a claim or a rule so that a verdict changes records them anew, by ``tools/record_verdicts.py``, and says
why.
"""

import ast
import json
from pathlib import Path

import pandas as pd
import pytest

import mlcollage.lab
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import judge
from mlcollage.lab.paper import find_paper
from mlcollage.lab.run import Scale

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("slug", ["gated_linear_networks", "deep_bootstrap"])
def test_recorded_verdicts_are_what_the_judge_gives(slug):
    table = pd.read_parquet(RECORDED / f"{slug}.parquet")
    recorded = json.loads((RECORDED / f"{slug}.json").read_text("utf-8"))
    claims = find_paper(slug).module("study").STUDY.claims
    assert {claim.id for claim in claims} == set(recorded), "claims came or went: record them anew"
    verdicts = judge(claims, Evidence(slug, Scale.QUICK, "default", table))
    assert {k: v.status.value for k, v in verdicts.items()} == {k: r["status"] for k, r in recorded.items()}
    for name, verdict in verdicts.items():
        now = verdict.to_dict()
        for key, then in recorded[name].items():
            number = isinstance(then, float | list)
            assert now[key] == (pytest.approx(then, rel=1e-6) if number else then), (name, key)


@pytest.mark.parametrize("module", ["judge", "procedures", "pool", "running"])
def test_the_lab_takes_tests_and_intervals_from_the_statistical_layer(module):
    """What decides a verdict is a tested function of ``stats``: no distribution, test or interval is computed here."""
    tree = ast.parse((Path(mlcollage.lab.__file__).parent / f"{module}.py").read_text("utf-8"))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not {name.split(".")[0] for name in imported} & {"scipy", "statsmodels", "arviz", "sklearn", "torch"}
