"""The judge's rules, one by one, on evidence small enough to check by hand."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput, UnknownName, UserCodeError
from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.estimand import Difference, Level, PerSeed, Trend
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.judge import judge
from mlcollage.lab.run import Run, Scale
from mlcollage.stats.adaptive import holm, required_seeds
from mlcollage.stats.bootstrap import t_interval
from mlcollage.stats.causal import permutation_test_two_sample, t_test

NOISE = np.array([0.3, -0.5, 0.1, 0.6, -0.2, -0.4, 0.5, -0.4])  # mean 0, sd 0.43


def evidence(scale=Scale.QUICK, failures=(), waiting=(), **arms) -> Evidence:
    rows = [
        {"arm": arm, "seed": seed, "metric": "score", "step": 0, "value": value}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
        if value is not None
    ]
    return Evidence("demo", scale, "digits", pd.DataFrame(rows), failures=failures, waiting=waiting)


def claim(id="C1", direction="greater", margin=1.0, estimand=None, **kw) -> Claim:
    return Claim(id, id, id, "", estimand or Difference("score", "a", "b"), direction, margin, **kw)


def one(claim_, evidence_):
    return judge([claim_], evidence_)[claim_.id]


def pair(effect: float, scale: float = 1.0, n: int = 8) -> dict[str, np.ndarray]:
    """Arms whose paired differences have exactly this mean."""
    base = np.linspace(10, 17, n)
    return {"a": base + effect + scale * NOISE[:n], "b": base}


# --- the rules of each direction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "effect", "status"),
    [
        ("greater", 1.2, "supported"),
        ("greater", 0.0, "contradicted"),  # an effect of 1 is ruled out
        ("greater", -3.0, "contradicted"),
        ("greater", 0.5, "contradicted"),  # there, but smaller than what matters
        ("less", -1.2, "supported"),
        ("less", 0.0, "contradicted"),
        ("less", -0.5, "contradicted"),
        ("within", 0.1, "supported"),
        ("within", 1.0, "inconclusive"),
        ("within", -2.0, "contradicted"),
        ("at_most", -1.0, "supported"),
        ("at_most", 1.0, "contradicted"),
        ("at_most", 0.1, "inconclusive"),
        ("at_least", 1.0, "supported"),
        ("at_least", -1.0, "contradicted"),
    ],
)
@pytest.mark.parametrize("test", ["t", "bootstrap_t", "sign_flip"])
def test_directions(test, direction, effect, status):
    assert one(claim(direction=direction, test=test), evidence(**pair(effect))).status == status


@pytest.mark.parametrize("null", [-2.0, 5.0])
@pytest.mark.parametrize("direction", ["greater", "less", "within", "at_most", "at_least"])
@pytest.mark.parametrize("effect", [-1.2, 0.0, 0.5, 3.0])
def test_null_only_shifts_the_effect(null, direction, effect):
    plain = one(claim(direction=direction), evidence(**pair(effect)))
    moved = one(claim(direction=direction, null=null), evidence(**pair(effect + null)))
    assert moved.status is plain.status
    assert moved.p_value == pytest.approx(plain.p_value, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(effect=st.floats(-3, 3), scale=st.floats(0.2, 4), test=st.sampled_from(["t", "sign_flip"]))
def test_greater_and_less_mirror_each_other(effect, scale, test):
    up = one(claim(direction="greater", test=test), evidence(**pair(effect, scale)))
    arms = pair(effect, scale)
    down = one(claim(direction="less", test=test), evidence(a=arms["b"], b=arms["a"]))
    assert up.status is down.status
    assert up.p_value == pytest.approx(down.p_value, abs=1e-9)


def test_noise_is_inconclusive_and_says_how_many_seeds_it_takes():
    verdict = one(claim(), evidence(**pair(0.8, scale=5)))
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.seeds_needed == required_seeds(1.0, 5 * NOISE.std(ddof=1), design="one_sample")
    assert f"80% power for 1.00 takes about {verdict.seeds_needed}" in verdict.reason
    assert "other claims not counted" in verdict.reason


def test_an_effect_that_is_there_but_looks_smaller_than_the_margin_is_not_called_supported():
    many = [claim(), *(claim(id=f"C{k}", estimand=Level("absent", "a")) for k in range(2, 12))]
    verdict = judge(many, evidence(**pair(0.8, scale=0.46)))["C1"]
    assert verdict.interval[1] < 1
    assert verdict.status is Status.INCONCLUSIVE
    assert "not settled" in verdict.reason


def test_a_real_effect_smaller_than_the_margin_is_contradicted_and_says_so():
    verdict = one(claim(), evidence(**pair(0.5, scale=0.5)))
    assert verdict.status is Status.CONTRADICTED
    assert "smaller than what matters, 1.00" in verdict.reason
    assert 0 < verdict.interval[0] < verdict.interval[1] < 1


def test_estimate_interval_and_p_are_those_of_the_paired_t_test():
    arms = pair(0.9)
    verdict = one(claim(), evidence(**arms))
    d = arms["a"] - arms["b"]
    assert verdict.estimate == pytest.approx(0.9)
    assert verdict.interval == pytest.approx(t_interval(d))
    assert verdict.p_value == pytest.approx(t_test(d))
    assert (verdict.seeds, verdict.test, verdict.level, verdict.warnings) == (8, "paired t", 0.95, ())


def test_unpaired_arms_use_welch_or_permutation_and_may_have_other_seeds():
    a, b = NOISE + 12, np.concatenate([np.full(8, None), 2 * NOISE[:6] + 10])  # b's seeds are 8 to 13
    verdict = one(claim(paired=False), evidence(a=a, b=b))
    x, y = a, b[8:].astype(float)
    assert (verdict.test, verdict.seeds, verdict.warnings) == ("Welch t", 6, ())
    assert verdict.p_value == pytest.approx(t_test(x, y))
    assert verdict.interval == pytest.approx(t_interval(x, y=y))
    permuted = one(claim(paired=False, test="permutation"), evidence(a=a, b=b))
    assert permuted.p_value == pytest.approx(permutation_test_two_sample(x, y))
    assert permuted.status is verdict.status is Status.SUPPORTED


def test_one_column_is_tested_against_null():
    verdict = one(claim(estimand=Level("score", "a"), null=10.0), evidence(a=11.5 + NOISE))
    assert (verdict.status, verdict.test, verdict.estimate) == (Status.SUPPORTED, "t", pytest.approx(11.5))


# --- exact claims ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "values", "status", "worst"),
    [
        ("at_most", [0.0, 1e-9, 0.5], "supported", 0.5),
        ("at_most", [0.0, 1e-9, 0.6], "contradicted", 0.6),
        ("at_most", [0.0, np.inf, 0.1], "contradicted", np.inf),
        ("at_least", [0.5, 2.0], "supported", 0.5),
        ("greater", [0.5, 2.0], "contradicted", 0.5),
        ("less", [0.4, 0.2], "supported", 0.4),
        ("within", [0.4, 0.65], "supported", 0.65),
        ("within", [0.4, 0.2], "contradicted", 0.2),
        ("at_most", [0.1, np.nan], "inconclusive", 0.1),
        ("at_most", [0.7, np.nan], "contradicted", 0.7),
        ("at_most", [np.nan], "inconclusive", None),
        ("at_most", [0.3], "supported", 0.3),  # true or false: one seed is enough
    ],
)
def test_exact_claims_need_every_seed(direction, values, status, worst):
    c = claim(direction=direction, margin=0.2, null=0.5, test="exact", estimand=Level("score", "a"))
    verdict = one(c, evidence(a=values))
    assert (verdict.status, verdict.estimate, verdict.p_value) == (status, worst, None)


@pytest.mark.parametrize(
    ("direction", "values", "status"),
    [
        ("at_most", [0.1 + 0.2] * 3, Status.SUPPORTED),  # 0.30000000000000004
        ("greater", [0.1 + 0.2] * 3, Status.CONTRADICTED),
        ("at_least", [0.3 - 4e-17, 0.4, 0.5], Status.SUPPORTED),
        ("at_most", [0.3 + 1e-9] * 3, Status.CONTRADICTED),
        ("within", [0.3 + 0.1] * 3, Status.SUPPORTED),  # 0.3 + 0.1 - 0.3 > 0.1 in floating point
        ("within", [0.3, np.inf, 0.3], Status.CONTRADICTED),
    ],
)
def test_rounding_violates_no_exact_claim(direction, values, status):
    exact = claim(direction=direction, test="exact", null=0.3, margin=0.1, estimand=Level("score", "a"))
    assert one(exact, evidence(a=np.array(values))).status is status


def test_a_run_that_diverged_violates_an_exact_comparison():
    verdict = one(
        claim(direction="at_most", test="exact"), evidence(a=np.array([1.0, np.inf, 1.0]), b=np.array([1.0, 1.0, 1.0]))
    )
    assert (verdict.status, verdict.estimate) == (Status.CONTRADICTED, np.inf)


@pytest.mark.parametrize("size", [1e200, 1e-300, 1e-310])
def test_values_whose_variance_is_no_double_have_no_verdict(size):
    values = pair(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = one(claim(margin=size / 10), evidence(**{arm: v * size for arm, v in values.items()}))
    assert verdict.status is Status.INCONCLUSIVE
    assert "use another unit, or log=True" in verdict.reason


def test_exact_claims_are_no_part_of_the_family():
    exact = claim("E", "at_most", 0.0, Level("score", "b"), null=99.0, test="exact")
    alone, with_exact = one(claim(), evidence(**pair(0.9))), judge([claim(), exact], evidence(**pair(0.9)))
    assert with_exact["C1"].p_holm == alone.p_holm == alone.p_value
    assert with_exact["E"].status is Status.SUPPORTED


# --- trends ------------------------------------------------------------------------------------------------------

LEVELS = ("k1", "k2", "k3", "k4")


def trend_claim(direction="greater", margin=0.5) -> Claim:
    return claim(direction=direction, margin=margin, estimand=Trend("score", over=LEVELS), test="trend")


def rising(slope: float, n: int = 8) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).normal(size=(n, 4))
    return {name: slope * i + noise[:, i] for i, name in enumerate(LEVELS)}


def test_trend_rises_falls_or_is_ruled_out():
    assert one(trend_claim(), evidence(**rising(1.5))).status is Status.SUPPORTED
    assert one(trend_claim("less"), evidence(**rising(-1.5))).status is Status.SUPPORTED
    assert one(trend_claim(), evidence(**rising(-1.5))).status is Status.CONTRADICTED
    assert one(trend_claim("less"), evidence(**rising(1.5))).status is Status.CONTRADICTED
    assert one(trend_claim(), evidence(**rising(0.0))).status is Status.INCONCLUSIVE


def test_trend_in_every_seed_gets_no_p_of_zero_and_no_interval_without_width():
    verdict = one(trend_claim(), evidence(**rising(50)))
    assert (verdict.status, verdict.estimate, verdict.interval) == (Status.SUPPORTED, 1.0, None)
    assert verdict.p_value == pytest.approx(24.0**-8)  # Page's exact tail: all eight of 4! orders
    assert "same rank correlation" in verdict.warnings[0]
    falling = one(trend_claim(), evidence(**rising(-50)))
    assert falling.status is Status.CONTRADICTED
    assert f"p = {2.0**-8:.2g}" in falling.reason


# --- degenerate, few and missing ---------------------------------------------------------------------------------


def test_equal_differences_are_tested_by_sign_flips():
    base = np.random.default_rng(1).uniform(size=6)
    verdict = one(claim(margin=0.01), evidence(a=base + 0.013, b=base))  # equal up to rounding
    assert verdict.status is Status.SUPPORTED
    assert verdict.p_value == 2.0**-6
    assert (verdict.interval, verdict.seeds_needed) == (None, None)
    assert "no variation over seeds" in verdict.warnings[0]
    nothing = one(claim(margin=0.01), evidence(a=base, b=base))
    assert (nothing.status, nothing.p_value) == (Status.CONTRADICTED, 1.0)
    assert one(claim(margin=0.01), evidence(a=base[:4] + 0.5, b=base[:4])).status is Status.INCONCLUSIVE  # 1/16


def test_equal_values_in_unpaired_arms_are_tested_by_permutation():
    verdict = one(claim(paired=False, margin=0.1), evidence(a=[1.0] * 5, b=[0.0] * 5))
    assert (verdict.status, verdict.p_value) == (Status.SUPPORTED, pytest.approx(1 / 252))
    assert "no variation" in verdict.warnings[0]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_seeds_are_said(n):
    assert f"only {n} seeds" in one(claim(), evidence(**pair(2.0, n=n))).warnings


@pytest.mark.parametrize("n", [5, 8])
def test_five_seeds_are_not_few(n):
    assert one(claim(), evidence(**pair(2.0, n=n))).warnings == ()


def test_one_seed_has_no_variance():
    verdict = one(claim(), evidence(**pair(2.0, n=1)))
    assert verdict.status is Status.INCONCLUSIVE
    assert "variance not identifiable" in verdict.reason


def test_bootstrap_t_with_three_seeds_is_inconclusive_with_the_reason():
    verdict = one(claim(test="bootstrap_t"), evidence(**pair(2.0, n=3)))
    assert (verdict.status, verdict.seeds) == (Status.INCONCLUSIVE, 3)
    assert "at least 4" in verdict.reason


def test_sign_flips_with_five_seeds_print_no_interval():
    verdict = one(claim(test="sign_flip"), evidence(**pair(2.0, n=5)))
    assert (verdict.status, verdict.p_value, verdict.interval) == (Status.SUPPORTED, 2.0**-5, None)
    assert any("no 95% interval" in w for w in verdict.warnings)


def test_missing_pairs_are_named_and_counted_against_the_claim():
    arms = pair(1.5)
    arms["a"] = np.array([*arms["a"][:6], np.nan, np.inf])
    arms["b"] = np.array([*arms["b"][:4], None, *arms["b"][5:]])
    verdict = one(claim(), evidence(**arms))
    assert verdict.seeds == 5
    assert "seed 4 (b), seed 6 (a), seed 7 (a)" in verdict.warnings[0]
    d = (arms["a"][[0, 1, 2, 3, 5]] - arms["b"][[0, 1, 2, 3, 5]]).astype(float)
    p = t_test([*d, *[-np.abs(d).max()] * 3])
    assert verdict.p_value == pytest.approx(p)
    assert verdict.warnings[1].startswith(f"the 3 seeds without a value counted against the claim: p = {p:.2g}")
    assert verdict.status is Status.INCONCLUSIVE


def test_a_nan_in_an_unpaired_arm_is_named():
    arms = pair(1.5)
    arms["a"][3] = np.nan
    verdict = one(claim(paired=False), evidence(**arms))
    assert "seed 3 (a)" in verdict.warnings[0]


def test_failed_runs_of_the_claims_arms_are_listed():
    failures = [
        Failure(Run("demo", "all", "a", 8), "loss is NaN"),
        Failure(Run("demo", "all", "replicas", 0), "out of memory"),  # an arm that no row carries may have held a or b
        Failure(Run("demo", "all", "c", 1), "unrelated"),
    ]
    arms = {**pair(1.5), "c": NOISE}
    warning, counted = one(claim(), evidence(failures=failures, **arms)).warnings
    assert counted.startswith("the 1 seed without a value")  # seed 8; seed 0 has its values
    assert "2 runs failed (a seed 8: loss is NaN; replicas seed 0: out of memory)" in warning
    everything = PerSeed(lambda rows: rows["value"].iloc[0], "first value")
    assert "3 runs failed" in one(claim(estimand=everything), evidence(failures=failures, **arms)).warnings[0]


def test_a_claim_whose_runs_are_not_finished_is_pending_and_the_others_are_judged():
    waiting = [Run("demo", "train", "c", 8), Run("demo", "train", "c", 9)]
    other = claim("C2", estimand=Difference("score", "c", "b"))
    verdicts = judge([claim(), other], evidence(waiting=waiting, **pair(1.5), c=NOISE))
    assert verdicts["C1"].status is Status.SUPPORTED
    assert verdicts["C1"].p_holm == pytest.approx(min(1, 2 * verdicts["C1"].p_value))  # the other stays in the family
    assert (verdicts["C2"].status, verdicts["C2"].estimate) == (Status.PENDING, None)
    assert verdicts["C2"].reason == "2 runs missing"


def test_while_runs_are_missing_an_absent_arm_is_pending_and_not_inconclusive():
    waiting = [Run("demo", "train", "c", 0)]
    absent = claim(estimand=Difference("score", "c", "b"))
    assert one(absent, evidence(waiting=waiting, **pair(1.5))).status is Status.PENDING
    assert one(absent, evidence(**pair(1.5))).status is Status.INCONCLUSIVE


def test_an_absent_arm_is_inconclusive_and_counts_in_the_family():
    absent = claim("C2", estimand=Difference("score", "a", "nobody"))
    verdicts = judge([claim(), absent], evidence(**pair(0.9)))
    assert verdicts["C2"].status is Status.INCONCLUSIVE
    assert "no arm nobody" in verdicts["C2"].reason
    assert verdicts["C1"].p_holm == pytest.approx(2 * verdicts["C1"].p_value)


def test_nothing_measured_is_inconclusive():
    verdict = one(claim(), Evidence("demo", Scale.QUICK, "digits", pd.DataFrame()))
    assert (verdict.status, verdict.reason) == (Status.INCONCLUSIVE, "nothing was measured.")


def test_episodes_as_seeds_are_refused_with_the_unit():
    table = pd.concat([evidence(**pair(1.5)).table] * 10)
    verdict = one(claim(), Evidence("demo", Scale.QUICK, "digits", table))
    assert verdict.status is Status.INCONCLUSIVE
    assert "10 rows for seed" in verdict.reason
    assert "the seed is the unit of replication" in verdict.reason
    twice = claim(estimand=lambda e: pd.DataFrame({"a": [1.0, 2.0]}, index=[3, 3]))
    assert "several rows for seed 3" in one(twice, evidence(**pair(1.5))).reason


@pytest.mark.parametrize(
    ("kw", "sentence"),
    [
        ({"estimand": Trend("score", over=("a", "b", "c"))}, "takes one (values) or two"),
        ({"test": "trend", "margin": 0.5}, "at least 3 ordered levels"),
        ({"test": "permutation", "paired": False, "estimand": Level("score", "a")}, "compares two arms"),
        ({"estimand": lambda e: pd.DataFrame()}, "gave no values"),
    ],
)
def test_an_estimand_that_does_not_fit_is_inconclusive_with_the_reason(kw, sentence):
    verdict = one(claim(**kw), evidence(**pair(1.5), c=NOISE))
    assert verdict.status is Status.INCONCLUSIVE
    assert sentence in verdict.reason


# --- scales, families, errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "from_scale"), [("smoke", "quick"), ("smoke", "smoke"), ("quick", "full")])
def test_untested_below_the_claims_scale(scale, from_scale):
    verdict = one(claim(from_scale=Scale(from_scale)), evidence(scale=Scale(scale), **pair(1.5)))
    assert (verdict.status, verdict.reason) == (Status.UNTESTED, "not tested at this scale")
    assert (verdict.estimate, verdict.p_value) == (None, None)


def test_untested_claims_do_not_count_in_the_family():
    verdicts = judge([claim(), claim("C2", from_scale=Scale.FULL)], evidence(**pair(0.9)))
    assert verdicts["C1"].p_holm == verdicts["C1"].p_value


def test_holm_runs_over_the_studys_claims():
    effects = {"C1": 1.4, "C2": 0.25, "C3": 0.3}
    arms = {f"{k}{side}": v for k, e in effects.items() for side, v in pair(e).items()}
    claims = [claim(k, estimand=Difference("score", f"{k}a", f"{k}b"), margin=0.8) for k in effects]
    verdicts = judge(claims, evidence(**arms))
    raw = [verdicts[k].p_value for k in effects]
    assert [verdicts[k].p_holm for k in effects] == pytest.approx(holm(raw).tolist())


def test_an_effect_that_only_the_correction_takes_away():
    effect = 0.36  # p = 0.025 alone
    arms = {**pair(effect), **{f"n{i}": NOISE for i in range(4)}}
    lone = one(claim(margin=2.0, alpha=0.05), evidence(**arms))
    assert lone.p_value < 0.05
    others = [claim(f"N{i}", estimand=Level("score", f"n{i}")) for i in range(4)]
    crowd = judge([claim(margin=2.0), *others], evidence(**arms))["C1"]
    assert crowd.p_holm > 0.05


def test_deterministic_and_pure():
    data = evidence(**pair(0.9))
    before = data.table.copy()
    claims = [claim(t, test=t) for t in ("t", "bootstrap_t", "sign_flip")]
    first, second = judge(claims, data), judge(claims, data)
    assert first == second
    pd.testing.assert_frame_equal(data.table, before)


def test_defects_of_the_code_are_raised():
    with pytest.raises(UserCodeError, match=r"the estimand of claim \w+ failed with ZeroDivisionError"):
        judge([claim(estimand=lambda e: 1 / 0)], evidence(**pair(1.0)))
    with pytest.raises(UserCodeError, match="gave float, not a DataFrame"):
        judge([claim(estimand=lambda e: 0.5)], evidence(**pair(1.0)))
    for odd in (
        pd.DataFrame([[1.0, 2.0]] * 3, columns=["a", "a"]),
        pd.DataFrame({"a": [1.0, 2.0]}, index=[0, np.nan]),
        pd.DataFrame({"a": [1.0 + 1j, 2.0]}),
    ):
        with pytest.raises(UserCodeError, match="expected one row per seed"):
            judge([claim(estimand=lambda e, odd=odd: odd)], evidence(**pair(1.0)))

    def unknown(e):
        raise UnknownName("no such thing.")

    assert one(claim(estimand=unknown), evidence(**pair(1.0))).reason == "no such thing."


@pytest.mark.parametrize(
    ("claims", "sentence"),
    [
        ([claim(), claim()], "two claims have the id"),
        ([claim(direction="bigger")], "direction 'bigger'"),
        ([claim(test="anova")], "test 'anova'"),
        ([claim(test="permutation")], "set paired=False"),
        ([claim(test="sign_flip", paired=False)], "needs seeds that pair"),
        ([claim(test="trend", direction="within")], "a trend has direction"),
        ([claim(test="trend", margin=2.0)], "a trend has direction"),
    ],
)
def test_malformed_claims_are_refused_at_every_scale(claims, sentence):
    for scale in (Scale.SMOKE, Scale.QUICK):
        with pytest.raises(InvalidInput, match=sentence):
            judge(claims, evidence(scale=scale, **pair(1.0)))


def test_no_claims_no_verdicts():
    assert judge([], evidence(**pair(1.0))) == {}
