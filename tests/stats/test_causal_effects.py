"""Average effects from observed units: closed forms, statsmodels, and simulations whose effect is known."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.svm import LinearSVC

from mlcollage.errors import InvalidInput
from mlcollage.stats.causal_effects import AverageEffect, aipw, hajek, regression_adjustment


def confounded(rng, n=1000):
    """The dossier's problem: effect 1, confounded through x1 and the product of x1 and x2."""
    x = rng.normal(size=(n, 3))
    e = 1 / (1 + np.exp(-(0.8 * x[:, 0] - 0.6 * x[:, 1] + 0.4 * x[:, 0] * x[:, 1])))
    a = rng.random(n) < e
    return x, a.astype(int), a + 2 * x[:, 0] + x[:, 1] ** 2 + rng.normal(size=n), e


@pytest.mark.parametrize("errors", ["HC2", "HC3"])
def test_regression_adjustment_equals_statsmodels(errors):
    x, a, y, _ = confounded(np.random.default_rng(0), 80)
    xc = x - x.mean(axis=0)
    fit = sm.OLS(y, np.column_stack([np.ones(80), a, xc, a[:, None] * xc])).fit(cov_type=errors, use_t=True)
    ours = regression_adjustment(x, a, y, errors=errors, level=0.9)
    assert ours.ate == pytest.approx(fit.params[1])
    assert ours.se == pytest.approx(fit.bse[1])
    assert ours.ci == pytest.approx(tuple(fit.conf_int(0.1)[1]))


def test_without_covariates_it_is_welch():
    rng = np.random.default_rng(1)
    a, y = np.repeat([0, 1], [12, 7]), rng.normal(size=19)
    naive = AverageEffect(method="naive").fit(np.empty((19, 0)), a, y)
    lin = regression_adjustment(np.empty((19, 0)), a, y)
    interval = sps.ttest_ind(y[a == 1], y[a == 0], equal_var=False).confidence_interval(0.95)
    assert naive.ci_ == pytest.approx((interval.low, interval.high))
    assert naive.ate_ == pytest.approx(lin.ate) == pytest.approx(y[a == 1].mean() - y[a == 0].mean())
    assert naive.se_ == pytest.approx(lin.se)  # HC2 of two means is Welch's


def test_adjustment_is_more_precise_in_a_randomized_study():
    rng = np.random.default_rng(2)
    x, a = rng.normal(size=(300, 1)), rng.permutation(300) % 2
    y = 0.3 * a + 2 * x[:, 0] + rng.normal(size=300)
    assert regression_adjustment(x, a, y).se < 0.6 * AverageEffect(method="naive").fit(x, a, y).se_


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(6, 30), e=st.floats(0.1, 0.9))
def test_constant_propensity_weights_nothing(seed, n, e):
    rng = np.random.default_rng(seed)
    a, y = np.arange(n) % 2, rng.normal(size=n)
    difference = y[a == 1].mean() - y[a == 0].mean()
    assert hajek(a, y, np.full(n, e)).ate == pytest.approx(difference)
    # and AIPW whose outcome models are the arms' means is the difference of means, whatever the propensity
    m1, m0 = np.full(n, y[a == 1].mean()), np.full(n, y[a == 0].mean())
    assert aipw(a, y, np.full(n, e), m1, m0).ate == pytest.approx(difference)


def test_hajek_is_invariant_to_shifts_and_aipw_without_a_model_is_horvitz_thompson():
    rng = np.random.default_rng(3)
    _, a, y, e = confounded(rng, 200)
    assert hajek(a, y + 100, e).ate == pytest.approx(hajek(a, y, e).ate)
    zeros = np.zeros(200)
    assert aipw(a, y, e, zeros, zeros).ate == pytest.approx(np.mean(a * y / e - (1 - a) * y / (1 - e)))


def test_hajek_error_equals_weighted_least_squares_sandwich():
    rng = np.random.default_rng(4)
    _, a, y, e = confounded(rng, 300)
    weights = np.where(a, 1 / e, 1 / (1 - e))
    fit = sm.WLS(y, sm.add_constant(a), weights=weights).fit(cov_type="HC0")
    ours = hajek(a, y, e)
    assert ours.ate == pytest.approx(fit.params[1])
    assert ours.se == pytest.approx(fit.bse[1] * np.sqrt(300 / 299))


def estimates(method, repeats=40, **models):
    rng = np.random.default_rng(5)
    found = []
    for _ in range(repeats):
        x, a, y, _ = confounded(rng)
        fit = AverageEffect(method=method, **models).fit(x, a, y)
        found.append((fit.ate_, fit.se_, fit.ci_[0] <= 1 <= fit.ci_[1]))
    ate, se, covered = np.array(found, dtype=float).T
    return ate.mean() - 1, ate.std(ddof=1) / np.sqrt(repeats), ate.std(ddof=1), se.mean(), covered.mean()


def test_naive_contrast_is_biased_and_aipw_is_not():
    bias, mcse, *_ = estimates("naive")
    assert 1.2 < bias < 1.5  # measured by the dossier: +1.343
    assert bias > 10 * mcse
    bias, mcse, spread, se, covered = estimates("aipw")
    assert abs(bias) < 3 * mcse
    assert spread < 0.12
    assert se == pytest.approx(spread, rel=0.35)
    assert covered >= 0.85


def test_weighting_removes_the_bias_at_the_price_of_variance():
    bias, mcse, spread, se, _ = estimates("ipw")
    assert abs(bias) < 3 * mcse  # measured by the dossier: +.015, sd .13
    assert 0.1 < spread < 0.17
    assert se > spread  # conservative: the propensity was estimated


def test_either_model_may_be_wrong_but_not_both():
    blind = LogisticRegression(C=1e-9)  # one propensity for all
    line = LinearRegression()
    wrong_propensity, mcse, *_ = estimates("aipw", propensity=blind)
    assert abs(wrong_propensity) < 3 * mcse
    wrong_outcome, mcse, *_ = estimates("aipw", outcome=line)
    assert abs(wrong_outcome) < 3 * mcse
    wrong_weights, mcse, *_ = estimates("ipw", propensity=blind)
    assert wrong_weights > 10 * mcse


def test_flexible_models_are_cross_fitted():
    """A forest that fits its own units perfectly would leave no residual, and an error far too small."""
    x, a, y, _ = confounded(np.random.default_rng(6), 400)
    forest = RandomForestRegressor(20, min_samples_leaf=1, random_state=0)
    fit = AverageEffect(outcome=forest).fit(x, a, y)
    assert 0.08 < fit.se_ < 0.35
    assert abs(fit.ate_ - 1) < 4 * fit.se_


def test_known_propensities_correct_an_adaptive_allocation():
    """The better-looking arm is pulled more often; plain means are biased down, logged probabilities are not."""
    plain, weighted = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sums, counts, log = np.zeros(2), np.zeros(2), []
        for t in range(60):
            e = 0.5 if t < 2 else (0.9 if sums[1] / max(counts[1], 1) > sums[0] / max(counts[0], 1) else 0.1)
            arm = t if t < 2 else int(rng.random() < e)
            reward = rng.normal()
            sums[arm] += reward
            counts[arm] += 1
            log.append((arm, reward, e))
        a, y, e = np.array(log[2:]).T
        if min(a.sum(), len(a) - a.sum()) < 2:
            continue
        zeros = np.zeros(len(a))
        weighted.append(np.mean(a * y / e))
        plain.append(y[a == 1].mean())
        assert np.isfinite(aipw(a, y, e, zeros, zeros).ate)
    assert np.mean(plain) < -3 * np.std(plain) / np.sqrt(len(plain))
    assert abs(np.mean(weighted)) < 3 * np.std(weighted) / np.sqrt(len(weighted))


def test_known_propensities_replace_the_model():
    x, a, y, e = confounded(np.random.default_rng(7))
    fit = AverageEffect(method="ipw").fit(x, a, y, known_propensity=e)
    np.testing.assert_allclose(fit.propensity_, np.clip(e, 0.01, 0.99))
    assert fit.ate_ == pytest.approx(hajek(a, y, np.clip(e, 0.01, 0.99)).ate)


def test_a_classifier_predicts_the_probability_of_a_binary_outcome():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(2000, 1))
    a = (rng.random(2000) < 1 / (1 + np.exp(-x[:, 0]))).astype(int)
    risk = 1 / (1 + np.exp(-(x[:, 0] + a - 1)))
    truth = np.mean(1 / (1 + np.exp(-x[:, 0])) - 1 / (1 + np.exp(-(x[:, 0] - 1))))
    fit = AverageEffect(outcome=LogisticRegression()).fit(x, a, (rng.random(2000) < risk).astype(int))
    assert abs(fit.ate_ - truth) < 3 * fit.se_
    assert fit.se_ < 0.03
    with pytest.raises(InvalidInput, match="classifier, but y has values other"):
        AverageEffect(outcome=LogisticRegression()).fit(x, a, rng.normal(size=2000))


def test_overlap_is_reported():
    x, a, y, e = confounded(np.random.default_rng(9))
    fit = AverageEffect(clip=(0, 1)).fit(x, a, y, known_propensity=e)
    w1, w0 = 1 / e[a == 1], 1 / (1 - e[a == 0])
    assert (fit.overlap_.lowest, fit.overlap_.highest) == (e.min(), e.max())
    assert (fit.overlap_.treated, fit.overlap_.control) == (a.sum(), (1 - a).sum())
    assert fit.overlap_.effective_treated == pytest.approx(w1.sum() ** 2 / (w1**2).sum())
    assert fit.overlap_.effective_control == pytest.approx(w0.sum() ** 2 / (w0**2).sum())
    assert fit.overlap_.effective_treated < fit.overlap_.treated
    assert AverageEffect(method="naive").fit(x, a, y).overlap_ is None


def test_poor_overlap_is_said():
    rng = np.random.default_rng(10)
    x = rng.normal(size=(400, 1))
    a = (rng.random(400) < 1 / (1 + np.exp(-8 * x[:, 0]))).astype(int)
    with pytest.warns(UserWarning, match="hardly overlap"):
        fit = AverageEffect().fit(x, a, x[:, 0] + a)
    assert fit.overlap_.clipped > 20
    with pytest.raises(InvalidInput, match="no overlap"):
        hajek(a, x[:, 0], a.astype(float))


def test_same_seed_same_numbers_and_data_frames_work():
    x, a, y, _ = confounded(np.random.default_rng(11), 300)
    one = AverageEffect(random_state=3).fit(x, a, y)
    two = AverageEffect(random_state=3).fit(pd.DataFrame(x, columns=list("abc")), pd.Series(a == 1), pd.Series(y))
    assert (one.ate_, one.se_) == (two.ate_, two.se_)
    assert AverageEffect(random_state=4).fit(x, a, y).ate_ != one.ate_
    assert AverageEffect(folds=3).get_params()["folds"] == 3


X, A, Y, E = confounded(np.random.default_rng(12), 40)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, (X, A + 1, Y), "treatment must be 0 or 1"),
        ({}, (X, np.where(A, "on", "off"), Y), "treatment must be 0 or 1"),
        ({}, (X, np.zeros(40), Y), "0 treated unit"),
        ({}, (X, np.ones(40), Y), "0 control unit"),
        ({}, (X, A[:-1], Y), "one treatment per unit"),
        ({}, (X[:-1], A, Y), "covariates\\) was expected"),
        ({}, (np.where(X > 2, np.nan, X), A, Y), "impute"),
        ({}, ([["a"]] * 40, A, Y), "must be numeric"),
        ({}, (np.column_stack([X, 5 - 2 * A]), A, Y), "column 3 of X is the treatment itself"),
        ({}, (X, A, np.where(Y > 2, np.nan, Y)), "not finite"),
        ({"method": "magic"}, (X, A, Y), "method must be one of 'aipw', 'ipw', 'regression', 'naive'"),
        ({"folds": 1}, (X, A, Y), "at least 2"),
        ({"folds": 15}, (X, A, Y), "use fewer folds"),
        ({"clip": (0.9, 0.1)}, (X, A, Y), "clip="),
        ({"level": 95}, (X, A, Y), "level must be a finite number above 0 and below 1"),
        ({"propensity": LinearSVC()}, (X, A, Y), "predict_proba"),
        ({"method": "regression"}, (np.column_stack([X, X[:, 0]]), A, Y), "collinear"),
        ({"method": "regression"}, (np.column_stack([X, np.ones(40)]), A, Y), "collinear"),
    ],
)
def test_bad_input_is_named(settings, data, message):
    with pytest.raises(InvalidInput, match=message):
        AverageEffect(**settings).fit(*data)


def test_bad_propensities_and_predictions_are_named():
    with pytest.raises(InvalidInput, match="one per unit"):
        AverageEffect().fit(X, A, Y, known_propensity=E[:5])
    with pytest.raises(InvalidInput, match=r"outcome_treated has 5 values and y 40; they belong together one by one\."):
        aipw(A, Y, E, E[:5], E)
    with pytest.raises(InvalidInput, match="HC1"):
        regression_adjustment(X, A, Y, errors="HC1")
    spike = np.zeros((40, 1))
    spike[[np.flatnonzero(A)[0], np.flatnonzero(A == 0)[0]]] = 1
    with pytest.raises(InvalidInput, match="leverage 1"):
        regression_adjustment(spike, A, Y)
