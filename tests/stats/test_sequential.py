"""Confidence sequences: peeking is allowed, and only there; against closed forms and Bayes factors by integration."""

import json
from itertools import pairwise

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.sequential import (
    ConfidenceSequence,
    _t_evidence,
    sequential_bounded_test,
    sequential_sign_interval,
    sequential_sign_test,
    sequential_t_interval,
    sequential_t_test,
)

STUDIES, PEEKS = 1000, 150
UNIT = {"low": 0.0, "high": 1.0}


def ever_missed(sequence: ConfidenceSequence, draw, truth: float, peeks: int = PEEKS) -> float:
    missed = np.zeros(STUDIES, dtype=bool)
    for _ in range(peeks):
        sequence.update(draw())
        low, high = sequence.interval()
        missed |= (truth < low) | (truth > high)
    return float(missed.mean())


def test_a_t_test_repeated_after_every_seed_rejects_too_often_and_the_sequence_does_not():
    """1,000 null studies, looked at after each of 150 seeds: 5 % for the sequence, several times that for the test."""
    rng = np.random.default_rng(0)
    values = 2.0 * rng.normal(size=(STUDIES, PEEKS))
    n = np.arange(1, PEEKS + 1)
    mean = values.cumsum(axis=1) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = np.sqrt((values**2).cumsum(axis=1) / (n - 1) - mean**2 * n / (n - 1))
        rejected = np.abs(mean) * np.sqrt(n) / sd > sps.t.isf(0.025, n - 1)
    assert rejected[:, 1:].any(axis=1).mean() > 0.25
    columns = iter(values.T)
    assert ever_missed(ConfidenceSequence("t"), lambda: next(columns), 0.0) <= 0.05 + 3 * np.sqrt(0.0475 / STUDIES)


@pytest.mark.parametrize(
    ("kind", "settings", "draw", "truth", "peeks"),
    [
        ("gaussian", {"sd": 2.0}, lambda r: r.normal(1, 2, STUDIES), 1.0, PEEKS),
        ("bounded", UNIT, lambda r: r.beta(9, 1, STUDIES), 0.9, 40),
        ("bounded", UNIT, lambda r: (r.random(STUDIES) < 0.1).astype(float), 0.1, 40),
        ("empirical-bernstein", UNIT, lambda r: (r.random(STUDIES) < 0.5).astype(float), 0.5, PEEKS),
        ("t", {"tuned_for": 5}, lambda r: r.normal(1e6, 1, STUDIES), 1e6, PEEKS),
    ],
)
def test_the_mean_is_hardly_ever_missed_at_any_time(kind, settings, draw, truth, peeks):
    rng = np.random.default_rng(1)
    rate = ever_missed(ConfidenceSequence(kind, **settings), lambda: draw(rng), truth, peeks)
    assert rate <= 0.05 + 3 * np.sqrt(0.0475 / STUDIES)


def test_t_inverts_the_bayes_factor_by_integration():
    """At each end E_n = 1/alpha, with E_n integrated numerically over the noncentral t with effect ~ N(0, g)."""
    x = np.random.default_rng(2).normal(1.0, 2.0, 12)
    sequence = ConfidenceSequence("t", alpha=0.1)
    for value in x:
        sequence.update(value)
    g = sequence._rho2()
    for end in sequence.interval():
        t = (x.mean() - end) / (x.std(ddof=1) / np.sqrt(12))
        marginal = integrate.quad(
            lambda d, t=t: sps.nct.pdf(t, 11, d * np.sqrt(12)) * sps.norm.pdf(d, 0, np.sqrt(g)), -6, 6, limit=200
        )[0]
        assert marginal / sps.t.pdf(t, 11) == pytest.approx(10.0, rel=1e-4)


def test_gaussian_inverts_the_normal_mixture():
    x = np.random.default_rng(3).normal(size=30)
    sequence = ConfidenceSequence("gaussian", sd=1.5)
    for value in x:
        sequence.update(value)
    rho = np.sqrt(sequence._rho2()) / 1.5
    for end in sequence.interval():
        s = (x - end).sum()
        mixture = integrate.quad(
            lambda m, s=s: np.exp(m * s - 30 * m**2 * 1.5**2 / 2) * sps.norm.pdf(m, 0, rho), -5, 5, points=[0.0]
        )[0]
        assert mixture == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["bounded", "empirical-bernstein"])
def test_bounded_sequences_close_in_and_scale_with_their_bounds(kind):
    x = np.random.default_rng(4).beta(2, 6, 600)
    unit, percent = ConfidenceSequence(kind, **UNIT), ConfidenceSequence(kind, low=-50, high=50)
    widths = []
    for value in x:
        unit.update(value)
        percent.update(100 * value - 50)
        widths.append(np.diff(unit.interval())[0])
    low, high = unit.interval()
    assert low < 0.25 < high
    assert widths[-1] < 0.1 < 0.5 < widths[9]
    assert percent.interval() == pytest.approx((100 * low - 50, 100 * high - 50), abs=1e-6)


def test_betting_is_tighter_than_bernstein_for_accuracies():
    rng = np.random.default_rng(5)
    sequences = [ConfidenceSequence(k, **UNIT) for k in ("bounded", "empirical-bernstein")]
    for _ in range(60):
        value = rng.beta(40, 4)
        for sequence in sequences:
            sequence.update(value)
    betting, bernstein = (float(np.diff(s.interval())[0]) for s in sequences)
    assert betting < 0.8 * bernstein


def test_the_price_of_peeking_is_about_a_half_more_width():
    rng = np.random.default_rng(6)
    sequence, values = ConfidenceSequence("t", tuned_for=20), rng.normal(size=(20, 400))
    for row in values:
        sequence.update(row)
    fixed = 2 * sps.t.isf(0.025, 19) * values.std(axis=0, ddof=1) / np.sqrt(20)
    low, high = sequence.interval()
    np.testing.assert_allclose((high - low) / fixed, 1.6, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "settings"), [("t", {}), ("gaussian", {"sd": 1.0}), ("bounded", UNIT), ("empirical-bernstein", UNIT)]
)
def test_a_sequence_continues_from_its_state(kind, settings):
    values = np.random.default_rng(7).random(30)
    whole, half = ConfidenceSequence(kind, **settings), ConfidenceSequence(kind, **settings)
    for value in values:
        whole.update(value)
    for value in values[:11]:
        half.update(value)
    state = json.loads(json.dumps(half.state_dict()))
    resumed = ConfidenceSequence(kind, **settings)
    resumed.load_state_dict(state)
    for value in values[11:]:
        resumed.update(value)
    assert resumed.interval() == whole.interval()
    assert resumed.n == 30


def test_before_there_is_anything_to_say_the_interval_is_the_whole_line():
    sequence = ConfidenceSequence("t")
    assert sequence.interval() == (-np.inf, np.inf)
    for _ in range(50):
        sequence.update(0.93)  # seeds that all agree: no idea of the variance
    assert sequence.interval() == (-np.inf, np.inf)
    assert ConfidenceSequence("bounded", low=2, high=3).interval() == (2, 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ConfidenceSequence("normal"), "kind must be one of 't', 'gaussian', 'bounded', 'empirical-bernstein'"),
        (lambda: ConfidenceSequence("t", alpha=5), "alpha must be a finite number above 0 and below 1"),
        (lambda: ConfidenceSequence("t", sd=1.0), "takes no sd and no bounds"),
        (lambda: ConfidenceSequence("gaussian"), "takes sd; it was given none"),
        (lambda: ConfidenceSequence("gaussian", sd=0.0), "sd must be a finite number above 0"),
        (lambda: ConfidenceSequence("bounded"), r"kind 'bounded' takes high and low; it was given none\."),
        (lambda: ConfidenceSequence("t", low=0, high=1), "takes no sd and no bounds"),
        (lambda: ConfidenceSequence("bounded", low=1, high=0), "high must be a finite number above 1"),
        (lambda: ConfidenceSequence("t", tuned_for=0), "at least 1"),
        (lambda: ConfidenceSequence("t").load_state_dict(ConfidenceSequence("t", 0.1).state_dict()), "settings"),
        (lambda: ConfidenceSequence("t").update(np.nan), "not finite"),
        (lambda: ConfidenceSequence("bounded", **UNIT).update(93.0), "percent or fraction"),
        (
            lambda: ConfidenceSequence("t").load_state_dict(ConfidenceSequence("bounded", **UNIT).state_dict()),
            "settings",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        call()


def test_parallel_sequences_keep_their_shape():
    sequence = ConfidenceSequence("t")
    sequence.update([1.0, 2.0])
    with pytest.raises(InvalidInput, match="shape"):
        sequence.update(1.0)


# --- tests that may be repeated after every seed ----------------------------------------------------------------------


def test_a_t_test_repeated_after_every_seed_cheats_and_the_sequential_one_does_not():
    """2,000 null studies of up to 100 seeds, one-sided at 5 %, looked at from the fifth seed on."""
    rng = np.random.default_rng(11)
    x = 3.0 * rng.normal(size=(2000, 100))
    naive = np.zeros(2000, dtype=bool)
    for n in range(5, 101):
        naive |= sps.ttest_1samp(x[:, :n], 0.0, axis=1, alternative="greater").pvalue <= 0.05
    assert naive.mean() > 0.15
    bound = 0.05 + 3 * np.sqrt(0.0475 / 2000)
    for alternative in ("greater", "less"):
        assert 0.005 < (sequential_t_test(x, alternative=alternative) <= 0.05).mean() <= bound
        assert (sequential_sign_test(x[:, :60], alternative=alternative) <= 0.05).mean() <= bound
    # further from the alternative it errs less still, and an effect on the null's edge is the worst case
    assert (sequential_t_test(x - 1.0) <= 0.05).mean() < 0.01
    assert (sequential_t_test(x, rng.normal(5.0, 1.0, size=(2000, 80)), null=-5.0) <= 0.05).mean() <= bound


def test_a_real_effect_stops_early():
    """Of one standard deviation: half of all studies stop by the tenth seed, nine in ten by the twentieth."""
    x = np.random.default_rng(12).normal(1.0, 1.0, size=(1000, 20))
    assert (sequential_t_test(x[:, :10]) <= 0.05).mean() > 0.45
    assert (sequential_t_test(x) <= 0.05).mean() > 0.85
    assert (sequential_t_test(x, alternative="less") <= 0.05).mean() == 0
    assert (sequential_sign_test(x) <= 0.05).mean() > 0.7


def test_one_sided_evidence_is_the_bayes_factor_by_integration():
    """Noncentral t with a half-normal effect, over the central t."""
    x = np.random.default_rng(13).normal(0.4, 2.0, 9)
    t, g, n = x.mean() / (x.std(ddof=1) / 3), 0.7, 9
    for side in (1, -1):
        marginal = integrate.quad(
            lambda d, s=side: sps.nct.pdf(s * t, n - 1, d * 3) * 2 * sps.norm.pdf(d, 0, np.sqrt(g)), 0, 6
        )[0]
        assert _t_evidence(side * x, g)[-1] == pytest.approx(np.log(marginal / sps.t.pdf(t, n - 1)), abs=1e-6)


def test_evidence_has_mean_one_at_the_null_for_every_number_of_seeds():
    x = np.random.default_rng(14).normal(size=(200_000, 4))
    e = np.exp(_t_evidence(x, 0.05))
    np.testing.assert_allclose(e[:, 1:].mean(axis=0), 1.0, atol=0.01)


def test_signs_by_all_orders():
    """Of all 2^12 orders of signs, at most alpha ever reach it, and the capital's mean is 1."""
    signs = 1.0 - 2.0 * ((np.arange(4096)[:, None] >> np.arange(12)) & 1)
    p = sequential_sign_test(signs)
    for alpha in (0.01, 0.05, 0.2):
        assert (p <= alpha).mean() <= alpha
    # k of n positive: the integral of (1 + l)^k (1 - l)^(n - k), which is a sum of incomplete beta functions
    x = [1.0] * 7 + [-1.0] + [1.0] * 2
    capital = [
        integrate.quad(lambda lam, k=k, m=m: (1 + lam) ** k * (1 - lam) ** m, 0, 1)[0] for k, m in ((7, 0), (9, 1))
    ]
    assert sequential_sign_test(x[:7]) == pytest.approx(1 / capital[0])
    assert sequential_sign_test(x) == pytest.approx(1 / max(capital))
    assert sequential_sign_test([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("success", [0.1, 0.5, 0.9])
def test_bets_on_bounded_values_are_fair_however_skewed(success):
    rng = np.random.default_rng(15)
    x = (rng.random((2000, 60)) < success).astype(float)
    bound = 0.05 + 3 * np.sqrt(0.0475 / 2000)
    for alternative in ("greater", "less"):
        p = sequential_bounded_test(x, low=0, high=1, null=success, alternative=alternative)
        assert (p <= 0.05).mean() <= bound
    away = sequential_bounded_test(x, low=0, high=1, null=success + 0.05, alternative="greater")
    assert (away <= 0.05).mean() < 0.02


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(
    x=npst.arrays(np.float64, st.integers(2, 25), elements=st.floats(-100, 100)),
    null=st.floats(-10, 10),
    scale=st.floats(0.1, 10),
)
def test_p_values_never_rise_and_do_not_depend_on_units(x, null, scale):
    for test in (sequential_t_test, sequential_sign_test):
        path = [test(x[:n], null=null) for n in range(1, len(x) + 1)]
        assert all(0 <= p <= 1 for p in path)
        assert all(a >= b for a, b in pairwise(path))
        assert test(-x, null=-null, alternative="less") == pytest.approx(path[-1])
        if np.ptp(x) > 1e-3:
            assert test(scale * (x - null)) == pytest.approx(path[-1], rel=1e-3, abs=1e-9)


def test_parallel_studies_are_each_study():
    x = np.random.default_rng(16).normal(0.5, 1.0, size=(3, 2, 15))
    for test in (sequential_t_test, sequential_sign_test):
        together = test(x)
        assert together.shape == (3, 2)
        assert together[1, 1] == test(x[1, 1])


def test_intervals_are_what_the_tests_do_not_reject():
    x = np.random.default_rng(17).normal(3.0, 2.0, 18)
    low, high = sequential_t_interval(x, 0.9)
    # x is past its most extreme moment here, so the running p value is the current one at the ends
    assert np.exp(-_t_evidence(x - low, 2.0)[-1]) == pytest.approx(0.05)
    assert np.exp(-_t_evidence(high - x, 2.0)[-1]) == pytest.approx(0.05)
    low, high = sequential_sign_interval(x, 0.9)
    assert {low, high} < set(x)
    assert sequential_sign_test(x, null=low - 1e-9) <= 0.05 < sequential_sign_test(x, null=low + 1e-9)
    above = sequential_sign_test(x, null=high + 1e-9, alternative="less")
    assert above <= 0.05 < sequential_sign_test(x, null=high - 1e-9, alternative="less")
    assert sequential_t_interval([1.0, 2.0, 1.5]) == sequential_sign_interval([1.0, 2.0]) == (-np.inf, np.inf)
    assert sequential_t_interval([2.0] * 30) == (-np.inf, np.inf)


def test_an_interval_hardly_ever_misses_at_any_time():
    rng = np.random.default_rng(18)
    missed = 0
    for _ in range(100):
        x = rng.normal(2.0, 3.0, 30)
        ends = [sequential_t_interval(x[:n]) for n in range(5, 31, 5)]
        missed += any(not low <= 2.0 <= high for low, high in ends)
    assert missed / 100 <= 0.05 + 3 * np.sqrt(0.0475 / 100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sequential_t_test([1.0, np.nan]), "x has 1 values that are not finite"),
        (lambda: sequential_t_test([]), r"x is empty; at least one value is needed\."),
        (
            lambda: sequential_t_test([1.0, 2.0], alternative="two-sided"),
            "must be one of 'greater', 'less'",
        ),
        (lambda: sequential_t_test([1.0, 2.0], g=0.0), "g must be a finite number above 0"),
        (lambda: sequential_bounded_test([0.5, 1.5], low=0, high=1, null=0.5), "outside \\[0, 1\\]"),
        (lambda: sequential_bounded_test([0.5], low=0, high=1, null=1.0), "strictly between"),
        (lambda: sequential_t_interval([1.0, 2.0], 95), "level must be a finite number above 0 and below 1"),
        (lambda: sequential_sign_interval([1.0, 2.0], 1.0), "level must be a finite number above 0 and below 1"),
    ],
)
def test_sequential_tests_refuse_bad_input_in_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
