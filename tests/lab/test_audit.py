"""The audit finds what chance alone would support, whether swapped arms keep their support, and who has power."""

import json

import numpy as np
import pandas as pd
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.lab import Claim, Difference, Evidence, Level, Scale, Trend, audit, judge
from mlcollage.stats import power


def claim(name: str = "C1", estimand=None, direction: str = "greater", **how) -> Claim:
    estimand = estimand or Difference("m", "a", "b")
    return Claim(name, f"title of {name}", "A sentence.", "", estimand, direction, **{"margin": 0.5, **how})


def evidence(columns: dict[str, np.ndarray], registered: int | None = None) -> Evidence:
    rows = [
        {"arm": arm, "seed": seed, "metric": "m", "step": 0, "value": float(v)}
        for arm, values in columns.items()
        for seed, v in enumerate(values)
    ]
    return Evidence("demo", Scale.QUICK, "w", pd.DataFrame(rows), registered=registered)


def normal(seeds: int = 10, **means: float) -> Evidence:
    draw = np.random.default_rng(1)
    return evidence({arm: mean + draw.normal(size=seeds) for arm, mean in means.items()})


def test_a_large_effect_is_no_longer_found_in_permuted_labels():
    found = audit([claim()], normal(a=5.0, b=0.0), draws=400)
    assert found.claims.loc["C1", "verdict"] == "supported"
    assert found.false_any <= found.level + 3 * found.standard_error
    assert found.claims.loc["C1", "false_support"] == found.false_any


def test_all_ways_of_dealing_out_labels_are_as_likely():
    """Of the 2^5 ways only the one that was measured has a mean difference that a t test takes for an effect."""
    exact = evidence({"a": np.array([1.0, 1.1, 0.9, 1.05, 0.95]), "b": np.zeros(5)})
    found = audit([claim()], exact, draws=4000)
    assert found.false_any == pytest.approx(1 / 32, abs=4 * np.sqrt(1 / 32 / 4000))


@pytest.mark.parametrize("how", ["paired", "unpaired", "one value", "trend"])
@pytest.mark.parametrize("direction", ["greater", "less"])
def test_swapped_arms_turn_support_into_contradiction(how, direction):
    sign = 1.0 if direction == "greater" else -1.0
    null = 0.0 if how == "trend" else 2.0
    values = normal(a=null + 5 * sign, b=0.0, c=-5 * sign)
    estimand = {"one value": Level("m", "a"), "trend": Trend("m", over=("c", "b", "a"))}.get(how)
    one = claim(estimand=estimand, direction=direction, null=null, paired=how != "unpaired", margin=0.3)
    if how == "trend":
        one = claim(estimand=estimand, direction=direction, test="trend", margin=0.3)
    found = audit([one], values, draws=100)
    assert found.claims.loc["C1", ["verdict", "swapped"]].tolist() == ["supported", "contradicted"]
    assert found.kept_support == []
    assert found.false_any <= 0.05 + 3 * found.standard_error


def test_identities_and_equivalences_are_left_out_with_the_reason():
    claims = [claim(), claim("C2", direction="within"), claim("C3", test="exact"), claim("C4", Level("n", "a"))]
    found = audit(claims, normal(a=5.0, b=0.0), draws=20)
    assert list(found.left_out) == ["C2", "C3", "C4"]
    assert "equivalence" in found.left_out["C2"]
    assert "without a test" in found.left_out["C3"]
    assert "'n'" in found.left_out["C4"]
    assert found.claims.loc[["C2", "C3", "C4"], "false_support"].isna().all()
    assert found.cells()[1] == "1 of 4"


def test_nothing_to_permute_is_said():
    with pytest.raises(InvalidInput, match="nothing to permute"):
        audit([claim(direction="within")], normal(a=0.0, b=0.0))
    empty = Evidence("demo", Scale.QUICK, "w", pd.DataFrame())
    with pytest.raises(InvalidInput, match="nothing was measured of demo"):
        audit([claim()], empty)


def test_power_is_counted_over_headlines():
    few, many = claim(margin=0.1, headline=True), claim("C2", margin=3.0, headline=True)
    found = audit([few, many, claim("C3", margin=0.1)], normal(a=1.0, b=0.0), draws=10)
    assert found.powered == (1, 2)
    values = normal(a=1.0, b=0.0)
    difference = values.by_seed("m", arm="a") - values.by_seed("m", arm="b")
    reached = [power(m, difference.std(), 10, design="one_sample") >= 0.8 for m in (0.1, 3.0)]
    assert reached == [False, True]


def test_added_seeds_are_left_out():
    whole = normal(a=0.8, b=0.0, seeds=30)
    added = Evidence("demo", Scale.QUICK, "w", whole.table, registered=10)
    first = Evidence("demo", Scale.QUICK, "w", whole.table[whole.table["seed"] < 10])
    assert audit([claim()], added, draws=30).to_dict() == audit([claim()], first, draws=30).to_dict()


def test_the_same_seed_gives_the_same_audit_and_json_takes_it():
    values = normal(a=1.0, b=0.0)
    one, two = (audit([claim()], values, draws=50, seed=3).to_dict() for _ in range(2))
    assert one == two
    assert json.loads(json.dumps(one))["claims"][0]["claim"] == "C1"
    assert judge([claim()], values)["C1"].status == one["claims"][0]["verdict"]
