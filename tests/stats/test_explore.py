"""Plots draw what was computed, where they are told; the numbers behind them have independent truths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import _pylab_helpers
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy import stats as sps
from statsmodels.stats.proportion import proportion_confint

from mlcollage.errors import InvalidInput
from mlcollage.stats.explore import (
    cd_diagram,
    coverage,
    critical_difference,
    ecdf,
    forest,
    lineup,
    lineup_p_value,
    sbc_ecdf,
    slope,
)
from mlcollage.stats.robust import mad
from mlcollage.stats.simulation import ecdf_band, sbc_uniformity

SCHOOLS = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
ERRORS = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


@pytest.fixture
def ax():
    yield Figure().subplots()
    assert not _pylab_helpers.Gcf.figs, "a plot went through pyplot's global state"


def texts(ax):
    return [t.get_text() for t in ax.texts]


def segments(ax):
    return [s for c in ax.collections if isinstance(c, LineCollection) for s in c.get_segments()]


def test_forest_draws_every_row_from_the_top(ax):
    intervals = np.c_[SCHOOLS - 2 * ERRORS, SCHOOLS + 2 * ERRORS]
    forest(ax, list("ABCDEFGH"), SCHOOLS, intervals, shrunken=SCHOOLS / 3 + 5)
    assert [t.get_text() for t in ax.get_yticklabels()] == list("ABCDEFGH")
    assert ax.yaxis_inverted()
    drawn = np.array([s[:, 0] for s in segments(ax)])
    np.testing.assert_allclose(drawn, intervals)
    arrows = [a for a in ax.texts if a.arrow_patch]
    assert [a.xy[0] for a in arrows] == pytest.approx(SCHOOLS / 3 + 5)
    assert [a.xyann[0] for a in arrows] == pytest.approx(SCHOOLS)
    low, high = ax.get_xlim()
    assert low < intervals.min()
    assert high > intervals.max()


def test_forest_survives_infinite_ends(ax):
    forest(ax, ["two seeds"], [1.0], [[-np.inf, np.inf]], null=None)
    assert np.isfinite(ax.get_xlim()).all()
    assert np.isfinite(segments(ax)[0]).all()


def test_slope_joins_the_same_seed(ax):
    control, treatment = [1.0, 2.0, 3.0], [2.0, 1.5, 3.0]
    assert slope(ax, control, treatment, labels=("old", "new")) == 1
    lines = ax.get_lines()
    assert [tuple(line.get_ydata()) for line in lines[:3]] == list(zip(control, treatment, strict=True))
    assert [line.get_linestyle() for line in lines[:3]] == ["-", "--", "-"]  # a fall is not told by color alone
    assert tuple(lines[3].get_ydata()) == pytest.approx((2.0, 6.5 / 3))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["old", "new"]


def test_ecdf_is_the_empirical_distribution(ax):
    x = np.random.default_rng(0).normal(size=17).round(1)
    ecdf(ax, {"a": x, "b": x + 1})
    steps, share = ax.get_lines()[0].get_data()
    for at, height in zip(steps, share, strict=True):
        assert height <= sps.ecdf(x).cdf.evaluate(at) + 1e-12
    assert share[-1] == 1.0
    assert [line.get_label() for line in ax.get_lines()] == ["a", "b"]


def test_the_ecdf_band_holds_the_whole_truth(ax):
    n = 20
    x = np.sort(np.random.default_rng(1).random(n))
    ecdf(ax, {"x": x})
    path = ax.collections[0].get_paths()[0].vertices
    half = path[np.isclose(path[:, 0], x[9])][:, 1].max() - 10 / n
    assert 0.03 < sps.kstwo.sf(half, n) <= 0.05  # Kolmogorov's exact distribution: it misses at most one in twenty
    assert path[:, 1].min() == 0
    assert path[:, 1].max() == 1


def test_critical_difference_is_demsars():
    """Table 6 and figure 1 of Demsar 2006: AUC of four variants of C4.5 on fourteen data sets."""
    auc = np.array(
        [
            [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
            [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
            [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
            [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
            [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
        ]
    )  # fmt: skip
    result = critical_difference(auc)
    assert result.ranks == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=0.001)
    assert result.difference == pytest.approx(1.25, abs=0.005)  # q = 2.569, the paper's
    at_ten = critical_difference(auc, alpha=0.10)
    assert at_ten.difference == pytest.approx(1.12, abs=0.005)
    # at .10 the paper finds C4.5 worse than the two variants that tune m; cf alone is not told apart
    assert {frozenset(g) for g in at_ten.groups} == {frozenset({3, 1, 2}), frozenset({2, 0})}
    assert result.p_value == pytest.approx(sps.friedmanchisquare(*auc.T).pvalue)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12), k=st.integers(3, 6))
def test_groups_are_the_largest_sets_that_do_not_differ(seed, n, k):
    scores = np.random.default_rng(seed).integers(0, 4, (n, k)) + np.arange(k)
    result = critical_difference(scores)
    close = [
        frozenset(c)
        for size in range(2, k + 1)
        for c in itertools.combinations(range(k), size)
        if np.ptp(result.ranks[list(c)]) <= result.difference
    ]
    largest = {c for c in close if not any(c < other for other in close)}
    # methods of equal rank at the edge make several largest sets; ours are intervals of the order
    assert {frozenset(g) for g in result.groups} == largest
    flipped = critical_difference(-scores, higher_is_better=False)
    np.testing.assert_allclose(flipped.ranks, result.ranks)


def test_no_differences_at_all():
    result = critical_difference(np.ones((4, 3)))
    assert result.p_value == 1.0
    assert result.groups == ((0, 1, 2),)


def test_cd_diagram_names_methods_beside_their_ranks(ax):
    scores = np.random.default_rng(2).normal([0, 0.2, 0.4, 2, 3], size=(12, 5))
    result = cd_diagram(ax, scores, list("abcde"))
    for name, rank in zip("abcde", result.ranks, strict=True):
        assert f"{name} ({rank:.2f})" in texts(ax)
    assert f"CD {result.difference:.2f}" in texts(ax)
    bars = [line for line in ax.get_lines() if line.get_linewidth() == 4]
    assert len(bars) == len(result.groups)
    figure = ax.figure
    figure.draw_without_rendering()
    frame = figure.bbox
    for text in ax.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1


def stays_inside(n, band):
    """Exact chance that an ECDF of n uniform values stays in a band: a Markov chain of binomial steps."""
    mass, states, z = np.array([1.0]), np.array([0]), 0.0
    for point, low, high in zip(band.z, np.rint(band.lower * n), np.rint(band.upper * n), strict=True):
        following = np.arange(int(low), int(high) + 1)
        share = (point - z) / (1 - z)
        mass = sps.binom.pmf(following[:, None] - states, n - states, share) @ mass
        states, z = following, point
    return mass.sum()


@pytest.mark.parametrize(("n", "n_ranks"), [(60, 10), (200, 50)])
def test_the_calibration_band_has_its_level(n, n_ranks):
    assert stays_inside(n, ecdf_band(n, n_ranks, 0.95)) == pytest.approx(0.95, abs=0.02)


def test_sbc_ecdf_draws_ranks_against_their_band(ax):
    rng = np.random.default_rng(3)
    ranks = {"mu": rng.integers(0, 100, 400), "tau": np.rint(99 * rng.beta(1.6, 1, 400))}
    result = sbc_uniformity(ranks, 100)
    assert sbc_ecdf(ax, result) == {"mu": True, "tau": False}
    lines = {line.get_label(): line.get_data() for line in ax.get_lines()}
    z, difference = lines["tau"]
    at = [np.mean(ranks["tau"] < 100 * point - 1e-9) - point for point in z]
    np.testing.assert_allclose(difference, at, atol=1e-12)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((result.band.upper - z).max())


def test_coverage_has_wilson_intervals(ax):
    hits = {"percentile": [835, 911, 926], "t": [940, 964, 941]}
    found = coverage(ax, [5, 10, 30], hits, 1000)
    for name, counts in hits.items():
        expected = np.column_stack(proportion_confint(np.array(counts), 1000, method="wilson"))
        np.testing.assert_allclose(found[name], expected)
    assert ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["5", "10", "30"]
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_allclose(lines["t"].get_ydata(), np.array(hits["t"]) / 1000)


def show(data, null_fn, n=20, rng=0):
    figure = Figure()
    return figure, lineup(lambda ax, x: ax.plot(np.sort(x), "."), null_fn, n, data=data, figure=figure, rng=rng)


def test_the_real_panel_is_hidden_among_nulls():
    data = np.arange(10.0)
    figure, shown = show(data, lambda rng: rng.normal(size=10), n=7)
    assert len(figure.axes) == len(shown.panels) == shown.n == 7
    drawn = [ax.get_lines()[0].get_ydata() for ax in figure.axes]
    assert [ax.get_title() for ax in figure.axes] == list("1234567")
    matches = [i + 1 for i, y in enumerate(drawn) if np.array_equal(y, data)]
    assert matches == [shown.position]
    assert show(data, lambda rng: rng.normal(size=10), n=7)[1].position == shown.position
    positions = {show(data, lambda rng: rng.normal(size=10), n=7, rng=s)[1].position for s in range(30)}
    assert positions == set(range(1, 8))


def test_a_statistic_finds_a_planted_crash_and_keeps_its_level():
    """Twenty seeds, one crashed, against normal nulls of the same median and MAD."""
    rng = np.random.default_rng(4)

    def detected(crash, seed):
        x = rng.normal(size=20)
        x[0] -= crash
        _, shown = show(x, lambda g: g.normal(np.median(x), mad(x), 20), rng=seed)
        return shown.p_value(lambda v: abs(v - np.median(v)).max()) <= 1 / 20

    assert np.mean([detected(6.0, s) for s in range(8)]) > 0.8
    assert np.mean([detected(0.0, s) for s in range(8)]) < 0.4


def test_p_values_of_viewers():
    assert lineup_p_value(1, 1) == pytest.approx(0.05)
    assert lineup_p_value(0, 5) == 1.0
    assert lineup_p_value(3, 4, n=10) == pytest.approx(4 * 0.1**3 * 0.9 + 0.1**4)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda ax: forest(ax, ["a"], [1.0, 2.0], [[0, 2], [1, 3]]), "do not match"),
        (lambda ax: forest(ax, ["a"], [5.0], [[0, 2]]), "inside its interval"),
        (
            lambda ax: forest(ax, ["a"], [1.0], [[0, 2]], shrunken=[1.0, 2.0]),
            r"shrunken has 2 values and estimates 1; they belong together one by one\.",
        ),
        (
            lambda ax: slope(ax, [1.0, 2.0], [1.0]),
            r"control has 2 values and treatment 1; they belong together one by one\.",
        ),
        (lambda ax: slope(ax, [1.0, np.nan], [1.0, 2.0]), "not finite"),
        (lambda ax: ecdf(ax, {}), "samples is empty"),
        (lambda ax: ecdf(ax, {"a": [1.0]}, band=2), "band must be a finite number above 0 and below 1"),
        (lambda ax: ecdf(ax, {"a": [1.0], "b": [2.0]}, colors=["k"]), "1 colors were given for 2 lines"),
        (
            lambda ax: critical_difference(np.ones((4, 2))),
            r"scores has shape \(4, 2\); \(data sets, methods\) with at least \(2, 3\) was expected\.",
        ),
        (
            lambda ax: critical_difference([[1.0, 2.0, np.nan]] * 3),
            r"scores has 3 values that are not finite \(positions 2, 5, 8\);",
        ),
        (lambda ax: critical_difference(np.eye(3), alpha=1), "alpha must be a finite number above 0 and below 1"),
        (lambda ax: cd_diagram(ax, np.eye(3), ["a"]), "1 names were given for 3 methods"),
        (lambda ax: coverage(ax, [0, 5], {"t": [1, 2]}, 10), "must be positive"),
        (lambda ax: coverage(ax, [5, 10], {"t": [0.9, 0.95]}, 100), "not shares"),
        (lambda ax: coverage(ax, [5, 10], {"t": [9, 10, 10]}, 10), "2 whole numbers"),
        (lambda ax: show([1.0], lambda rng: [1.0], n=1), "at least 2"),
        (lambda ax: lineup(print, print, data=0, figure=ax.figure), "needs an empty one"),
        (lambda ax: show([1.0], lambda rng: [1.0])[1].p_value(lambda x: np.nan), "not finite"),
        (lambda ax: lineup_p_value(3, 2), "found must be a whole number of at least 0 and at most 2"),
    ],
)
def test_bad_input_is_named(ax, draw, message):
    with pytest.raises(InvalidInput, match=message):
        draw(ax)
