"""Confidence sequences: peeking is allowed, and only there; against closed forms and Bayes factors by integration."""

import json

import numpy as np
import pytest
from scipy import integrate
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.stats.sequential import ConfidenceSequence

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
        (lambda: ConfidenceSequence("normal"), "is unknown"),
        (lambda: ConfidenceSequence("t", alpha=5), "between 0 and 1"),
        (lambda: ConfidenceSequence("t", sd=1.0), "take none"),
        (lambda: ConfidenceSequence("gaussian"), "positive sd"),
        (lambda: ConfidenceSequence("gaussian", sd=0.0), "positive sd"),
        (lambda: ConfidenceSequence("bounded"), "need low and high"),
        (lambda: ConfidenceSequence("t", low=0, high=1), "take none"),
        (lambda: ConfidenceSequence("bounded", low=1, high=0), "low < high"),
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
