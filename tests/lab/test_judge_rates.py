"""The judge by simulation: how often it is wrong on null data, and how often right at the margin.

Rates are compared with what is promised plus three binomial standard errors of the number of repeats.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.judge import judge
from mlcollage.lab.run import Scale
from mlcollage.stats.adaptive import required_seeds

SOMETHING = pd.DataFrame([{"arm": "a", "seed": 0, "metric": "m", "step": 0, "value": 0.0}])


def above(rate: float, repeats: int) -> float:
    return rate + 3 * np.sqrt(rate * (1 - rate) / repeats)


def verdicts(claims: list[dict], data: np.ndarray) -> Iterator[list[Status]]:
    """Judge ``data[i, j]`` (seeds, columns) as what claim j sees in study i."""
    for study in data:
        made = [
            Claim(f"C{j}", "", "", "", lambda e, v=values: pd.DataFrame(v), **kw)
            for j, (kw, values) in enumerate(zip(claims, study, strict=True))
        ]
        yield [v.status for v in judge(made, Evidence("demo", Scale.QUICK, "w", SOMETHING)).values()]


def rates(claim: dict, data: np.ndarray) -> dict[str, float]:
    statuses = [s for (s,) in verdicts([claim], data[:, None])]
    return {str(status): float(np.mean([s is status for s in statuses])) for status in Status}


def paired(effect: float, repeats: int, n: int = 8, seed: int = 0) -> np.ndarray:
    """Correlated arms, difference of sd 1, shape (repeats, n, 2)."""
    rng = np.random.default_rng(seed)
    base = 3 * rng.normal(size=(repeats, n))
    return np.stack([base + effect + rng.normal(size=(repeats, n)), base], axis=-1)


def unpaired(effect: float, repeats: int, n: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal([effect, 0.0], 1.0, (repeats, n, 2))


TESTS = [
    ("greater", "t", True, paired, 600),
    ("less", "sign_flip", True, paired, 400),
    ("greater", "bootstrap_t", True, paired, 200),
    ("less", "t", False, unpaired, 400),
    ("greater", "permutation", False, unpaired, 200),
]


@pytest.mark.parametrize(("direction", "test", "is_paired", "draw", "repeats"), TESTS)
def test_wrong_support_and_wrong_contradiction_of_a_difference(direction, test, is_paired, draw, repeats):
    """Truth at null: supported at most 5 %. Truth at the margin: contradicted at most 5 %."""
    claim = {"direction": direction, "test": test, "paired": is_paired}
    # a margin so small that no wrong support is hidden by a contradiction, and so large that none is by a veto
    wrong = rates({**claim, "margin": 0.01}, draw(0.0, repeats))["supported"]
    assert 0.01 <= wrong <= above(0.05, repeats)
    margin = 1.5 if direction == "greater" else -1.5
    assert rates({**claim, "margin": 1.5}, draw(margin, repeats))["contradicted"] <= above(0.05, repeats)


@pytest.mark.parametrize(
    ("test", "is_paired", "draw", "repeats"),
    [("t", True, paired, 400), ("sign_flip", True, paired, 300), ("t", False, unpaired, 300)],
)
@pytest.mark.parametrize("margin", [0.1, 1.0])
def test_equivalence_at_the_margin_errs_at_most_at_the_rate(test, is_paired, draw, repeats, margin):
    """Truth exactly on the margin: neither supported nor contradicted more often than 5 %."""
    claim = {"direction": "within", "margin": margin, "test": test, "paired": is_paired}
    found = rates(claim, draw(margin, repeats, seed=1))
    assert found["supported"] <= above(0.05, repeats)
    assert found["contradicted"] <= above(0.05, repeats)


@pytest.mark.parametrize("direction", ["at_most", "at_least"])
def test_a_value_on_the_limit_is_undecided(direction):
    found = rates({"direction": direction, "null": 2.0}, paired(2.0, 800, seed=2))
    assert found["supported"] <= above(0.05, 800)
    assert found["contradicted"] <= above(0.05, 800)


def test_trend_without_order_and_trend_at_the_margin():
    rng = np.random.default_rng(3)
    claim = {"direction": "greater", "margin": 0.5, "test": "trend"}
    assert rates(claim, rng.normal(size=(600, 8, 4)))["supported"] <= above(0.05, 600)
    slope = 0.495  # mean rank correlation 0.50 for four levels with unit noise
    at_margin = rng.normal(size=(600, 8, 4)) + slope * np.arange(4)
    ranks = at_margin.argsort(axis=-1).argsort(axis=-1) - 1.5
    assert (ranks @ (np.arange(4) - 1.5) / 5).mean() == pytest.approx(0.5, abs=0.02)
    assert rates(claim, at_margin)["contradicted"] <= above(0.05, 600)


def test_holm_keeps_the_rate_of_any_wrong_support_over_six_claims():
    """Six null claims of mixed tests: any supported in at most 5 % of 400 studies; uncorrected it would be 26 %."""
    repeats = 400
    data = np.stack([paired(0.0, repeats, seed=10 + j) for j in range(6)], axis=1)
    claims = [
        {"direction": d, "margin": 0.01, "test": t}
        for d, t in [("greater", "t"), ("less", "t"), ("greater", "sign_flip")] * 2
    ]
    wrong = np.mean([Status.SUPPORTED in s for s in verdicts(claims, data)])
    assert wrong <= above(0.05, repeats)
    alone = [[next(verdicts([c], data[[i]][:, [j]]))[0] for j, c in enumerate(claims)] for i in range(100)]
    assert np.mean([Status.SUPPORTED in s for s in alone]) > 0.15


def test_holm_keeps_the_rate_of_any_wrong_contradiction_over_six_claims():
    """Six claims whose true effect is the margin, with seeds for 80 % power: any contradicted in at most 5 %."""
    repeats, margin = 400, 1.0
    n = required_seeds(margin, 1.0, design="one_sample")
    data = np.stack([paired(margin, repeats, n, seed=20 + j) for j in range(6)], axis=1)
    claims = [{"direction": "greater", "margin": margin}] * 6
    wrong = np.mean([Status.CONTRADICTED in s for s in verdicts(claims, data)])
    assert wrong <= above(0.05, repeats)


@pytest.mark.parametrize(
    ("test", "is_paired", "draw", "design"),
    [
        ("t", True, paired, "one_sample"),
        ("sign_flip", True, paired, "one_sample"),
        ("bootstrap_t", True, paired, "one_sample"),
        ("t", False, unpaired, "unpaired"),
        ("permutation", False, unpaired, "unpaired"),
    ],
)
def test_power_at_the_margin_with_the_required_seeds(test, is_paired, draw, design):
    """Truth at the smallest effect that matters: supported in 80 %, less three standard errors (and 3 points for
    tests other than the t test that the seeds are computed for)."""
    repeats = 100 if test in ("bootstrap_t", "permutation") else 400
    n = required_seeds(1.0, 1.0, design=design)
    claim = {"direction": "greater", "margin": 1.0, "test": test, "paired": is_paired}
    slack = 3 * np.sqrt(0.8 * 0.2 / repeats) + (0.0 if test == "t" else 0.03)
    assert rates(claim, draw(1.0, repeats, n, seed=4))["supported"] >= 0.8 - slack


def test_power_of_equivalence_with_the_required_seeds():
    n = required_seeds(1.0, 1.0, design="one_sample", goal="equivalence")
    found = rates({"direction": "within", "margin": 1.0}, paired(0.0, 500, n, seed=5))
    assert found["supported"] >= 0.8 - 3 * np.sqrt(0.8 * 0.2 / 500)


def test_an_absent_effect_is_contradicted_rather_than_left_open():
    """Twice the seeds of 80 % power and no effect: most studies rule the margin out."""
    n = 2 * required_seeds(1.0, 1.0, design="one_sample")
    found = rates({"direction": "greater", "margin": 1.0}, paired(0.0, 400, n, seed=6))
    assert found["contradicted"] >= 0.9
