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
from mlcollage.stats.causal import t_test
from mlcollage.stats.sequential import sequential_sign_test

SOMETHING = pd.DataFrame([{"arm": "a", "seed": 0, "metric": "m", "step": 0, "value": 0.0}])


def above(rate: float, repeats: int) -> float:
    return rate + 3 * np.sqrt(rate * (1 - rate) / repeats)


def verdicts(claims: list[dict], data: np.ndarray) -> Iterator[list[Status]]:
    """Judge ``data[i, j]`` (seeds, columns) as what claim j sees in study i."""
    for study in data:
        made = [
            Claim(f"C{j}", "a claim", "", "", lambda e, v=values: pd.DataFrame(v), **kw)
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


# --- nulls that the tests were not made for: what comes out stands on the page "How claims are judged" ----------------


def rare_disaster(repeats: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """+1 in nine seeds of ten, -9 in the tenth: mean 0."""
    return np.where(rng.random((repeats, n)) < 0.1, -9.0, 1.0) + 0.1 * rng.normal(size=(repeats, n))


def tail_down(repeats: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """A lognormal tail towards the other side, mean 0."""
    return np.exp(0.5) - np.exp(rng.normal(size=(repeats, n)))


def tail_up(repeats: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return -tail_down(repeats, n, rng)


def crashed(repeats: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Each run of either arm falls to chance in one seed of ten."""
    arms = 0.9 + 0.01 * rng.normal(size=(2, repeats, n))
    arms[rng.random(arms.shape) < 0.1] = 0.1
    return arms[0] - arms[1]


def discrete(repeats: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Accuracies of arms that are alike on a test set of 30."""
    return np.diff(rng.binomial(30, 0.95, (2, repeats, n)), axis=0)[0] / 30


def lost(repeats: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Normal differences, of which those below half a standard deviation under 0 were lost (diverged, NaN)."""
    d = rng.normal(size=(repeats, n))
    return np.where(d < -0.5, np.nan, d)


def naive(d: np.ndarray) -> float:
    """Support by a t test of what there is, as the judge gave it before it looked at shape and losses."""
    kept = [row[np.isfinite(row)] for row in d]
    return float(np.mean([np.ptp(x) > 0 and t_test(x) <= 0.05 for x in kept if len(x) > 1]))


@pytest.mark.parametrize(
    ("draw", "n", "most"),
    [
        (crashed, 5, 0.05),
        (crashed, 10, 0.05),
        (discrete, 5, 0.05),
        (discrete, 10, 0.06),  # a t test of few different values is not exact
        (lost, 5, 0.05),
        (lost, 10, 0.05),
        (tail_up, 10, 0.05),
        # beyond the condition: a tail against the claim, of which few seeds show nothing
        (tail_down, 5, 0.22),
        (tail_down, 10, 0.16),
        (tail_down, 20, 0.12),
        (rare_disaster, 5, 0.9**5),
        (rare_disaster, 10, 0.9**10),
        (rare_disaster, 20, 0.9**20),
    ],
)
def test_wrong_support_under_odd_nulls(draw, n, most, capsys):
    repeats = 200
    d = draw(repeats, n, np.random.default_rng([n, 50]))
    found = rates({"direction": "greater", "margin": 1e-3}, d[..., None])["supported"]
    with capsys.disabled():
        print(f"\n{draw.__name__}, {n} seeds: {found:.1%} supported, by a plain t test {naive(d):.1%}")
    assert found <= above(most, repeats)


def test_signs_under_added_seeds_do_not_pass_for_a_mean():
    """The anytime-valid sign test is one of the median: half of the studies with a rare disaster would pass it."""
    repeats, most = 40, 30
    d = rare_disaster(repeats, most, np.random.default_rng(60))
    made = {}
    claims = [Claim("C", "seen", "", "", lambda e: pd.DataFrame(made["seen"]), "greater", 1e-3, test="sign_flip")]
    table = pd.DataFrame([{"arm": "a", "seed": s, "metric": "m", "step": 0, "value": 0.0} for s in range(most)])
    by_signs, by_judge = 0, 0
    for row in d:
        looks = [row[:n] for n in range(10, most + 1, 5)]
        by_signs += any(sequential_sign_test(x) <= 0.05 for x in looks)
        for seen in looks:
            made["seen"] = seen
            found = judge(claims, Evidence("demo", Scale.QUICK, "w", table, registered=10))["C"].status
            if found is Status.SUPPORTED:
                by_judge += 1
                break
    assert by_signs / repeats > 0.4
    assert by_judge / repeats <= above(0.9**10, repeats)  # the first ten seeds show no disaster
