"""Calibration: every sample counts once, also at the edges; metrics equal peers'; Monte-Carlo errors are right."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve as sklearn_curve
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from mlcollage.errors import InvalidInput
from mlcollage.measure.calibration import (
    accuracy,
    agreement,
    auroc_ood,
    brier,
    calibration_curve,
    confidence_gap,
    ece,
    jackknife,
    mutual_information,
    nll,
    predictive_entropy,
    total_variation,
)


def predictions(n=400, k=4, seed=0, sharp=1.0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(k, 1 / sharp), size=n)
    return p, rng.integers(0, k, n)


def pairs(confidence):
    """Two-class predictions of these confidences, all for class 0."""
    c = np.asarray(confidence, dtype=np.float64)
    return np.stack([c, 1 - c], axis=1)


def strict_bins(p, y, edges):
    """Bins open on both sides, as in the code published with the paper; also how many samples were counted."""
    confidence, right = p.max(1), p.argmax(1) == y
    error, counted = 0.0, 0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence < high)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
            counted += int(inside.sum())
    return error, counted


@pytest.mark.parametrize("n_bins", [1, 7, 15, 20])
def test_uniform_bins_equal_sklearn_s_and_torchmetrics(n_bins):
    p, y = predictions()
    curve = calibration_curve(p, y, n_bins)
    right, confidence = sklearn_curve(p.argmax(1) == y, p.max(1), n_bins=n_bins)
    np.testing.assert_allclose(curve.confidence, confidence)
    np.testing.assert_allclose(curve.accuracy, right)
    theirs = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(y), num_classes=4, n_bins=n_bins)
    assert ece(p, y, n_bins) == pytest.approx(float(theirs), abs=1e-6)


def test_quantile_bins_equal_brute_force_over_sorted_confidences():
    p, y = predictions(n=400)
    order = np.argsort(p.max(1))
    expected = 0.0
    for part in np.array_split(order, 20):  # no ties here, and 20 divides 400
        expected += len(part) / 400 * abs(p.max(1)[part].mean() - (p.argmax(1) == y)[part].mean())
    assert ece(p, y, 20, "quantile") == pytest.approx(expected, abs=1e-12)
    assert np.allclose(calibration_curve(p, y, 20, "quantile").weight, 1 / 20)


def test_saturated_confidences_count_where_open_bins_drop_them():
    """Half the predictions are certain and half of those wrong: an error of .25 that open bins do not see at all."""
    p, y = pairs([1.0] * 50 + [0.7] * 50), np.array([0] * 25 + [1] * 25 + [0] * 35 + [1] * 15)
    for edges in (np.linspace(0, 1, 21), np.sort(p.max(1))[::5]):
        lost, counted = strict_bins(p, y, edges)
        assert counted <= 50
        assert lost < 0.02
    for strategy in ("uniform", "quantile"):
        assert ece(p, y, 20, strategy) == pytest.approx(0.5 * 0.5)
        assert calibration_curve(p, y, 20, strategy).weight.sum() == 1
    certain = pairs([1.0] * 10)
    assert strict_bins(certain, np.ones(10), np.linspace(0, 1, 21)) == (0.0, 0)
    assert ece(certain, np.ones(10, dtype=int)) == ece(certain, np.ones(10, dtype=int), strategy="quantile") == 1.0


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.integers(10, 20).map(lambda i: i / 20), st.floats(0.5, 1.0)), min_size=1, max_size=60),
    st.integers(1, 25),
    st.sampled_from(["uniform", "quantile"]),
    st.integers(0, 1000),
)
def test_every_sample_counts_exactly_once(confidences, n_bins, strategy, seed):
    """Also where confidences are equal to bin edges, tied or saturated."""
    p = pairs(confidences)
    y = np.random.default_rng(seed).integers(0, 2, len(p))
    curve = calibration_curve(p, y, n_bins, strategy)
    assert curve.weight.sum() == pytest.approx(1)
    assert curve.weight @ curve.accuracy == pytest.approx(accuracy(p, y))
    assert curve.weight @ curve.confidence == pytest.approx(p.max(1).mean())
    assert len(curve.weight) <= n_bins
    over, under = ece(p, y, n_bins, strategy, side="over"), ece(p, y, n_bins, strategy, side="under")
    assert ece(p, y, n_bins, strategy) == pytest.approx(over + under)
    assert confidence_gap(p, y) == pytest.approx(over - under)
    order = np.random.default_rng(seed).permutation(len(p))
    assert ece(p[order], y[order], n_bins, strategy) == pytest.approx(over + under)


def test_over_and_under_confidence_have_their_sign():
    y = np.array([0] * 8 + [1] * 2)
    assert confidence_gap(pairs([0.95] * 10), y) == pytest.approx(0.15)
    assert confidence_gap(pairs([0.6] * 10), y) == pytest.approx(-0.2)
    assert ece(pairs([0.6] * 10), y, side="under") == pytest.approx(0.2)
    assert ece(pairs([0.6] * 10), y, side="over") == 0


def test_scores_equal_sklearn_s():
    p, y = predictions()
    assert nll(p, y) == pytest.approx(log_loss(y, p))
    assert brier(p[:, :2] / p[:, :2].sum(1, keepdims=True), y % 2) == pytest.approx(
        2 * brier_score_loss(y % 2, p[:, 1] / p[:, :2].sum(1))
    )
    expected = np.mean([sum((p[i, k] - (y[i] == k)) ** 2 for k in range(4)) for i in range(len(p))])
    assert brier(p, y) == pytest.approx(expected)
    assert nll(pairs([1.0]), [1]) == math.inf


def test_agreement_and_total_variation_equal_loops():
    (p, _), (q, _) = predictions(seed=1), predictions(seed=2)
    loops = [(p[i].argmax() == q[i].argmax(), sum(abs(p[i, k] - q[i, k]) for k in range(4)) / 2) for i in range(400)]
    assert agreement(p, q) == pytest.approx(np.mean([a for a, _ in loops]))
    assert total_variation(p, q) == pytest.approx(np.mean([d for _, d in loops]))
    assert (agreement(p, p), total_variation(p, p)) == (1.0, 0.0)
    assert total_variation(pairs([1.0]), pairs([0.0])) == 1.0


def test_auroc_is_the_chance_that_a_foreign_input_scores_higher():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 50), rng.integers(3, 12, 70)
    wins = np.mean([(j > i) + 0.5 * (j == i) for i in a for j in b])
    assert auroc_ood(a, torch.from_numpy(b)) == pytest.approx(wins)


def test_entropy_splits_into_noise_and_disagreement():
    members = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, 20))
    total = -(members.mean(0) * np.log(members.mean(0))).sum(-1)
    noise = -(members * np.log(members)).sum(-1).mean(0)
    np.testing.assert_allclose(predictive_entropy(members.mean(0)), total)
    np.testing.assert_allclose(mutual_information(members), total - noise)
    assert np.abs(mutual_information(np.repeat(members[:1], 4, axis=0))).max() < 1e-12
    assert predictive_entropy(np.full((1, 8), 1 / 8))[0] == pytest.approx(math.log(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_any_precision_are_taken(dtype):
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1).to(dtype).requires_grad_()
    y = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(1))
    exact = torch.nn.functional.cross_entropy(logits.double(), y)
    assert nll(p, y) == pytest.approx(float(exact), rel=2e-2 if dtype is torch.bfloat16 else 1e-5)
    assert ece(p, y[:, None]) == ece(p, y.int())


def test_the_jackknife_of_a_mean_is_its_textbook_error():
    """For a linear metric: the standard error of the mean over chains or blocks, and no bias."""
    p = np.random.default_rng(0).dirichlet(np.ones(3), size=(5, 40, 7))
    by_chain = jackknife(lambda mean: mean[:, 0].mean(), p)
    per_chain = p[..., 0].mean(axis=(1, 2))
    assert by_chain.groups == 5
    assert by_chain.value == pytest.approx(per_chain.mean())
    assert by_chain.se == pytest.approx(per_chain.std(ddof=1) / math.sqrt(5))
    assert by_chain.bias == pytest.approx(0, abs=1e-12)
    by_block = jackknife(lambda mean: mean[:, 0].mean(), p, over="draws", blocks=8)
    per_block = p[..., 0].reshape(5, 8, 5, 7).mean(axis=(0, 2, 3))
    assert by_block.groups == 8
    assert by_block.se == pytest.approx(per_block.std(ddof=1) / math.sqrt(8))
    assert jackknife(lambda mean: 0.0, p[:2]).groups == 10
    assert jackknife(lambda mean: 0.0, p[:2, :1]).groups == 2
    assert jackknife(lambda mean: mean.mean(), p[:2, :7], blocks=3).value == pytest.approx(1 / 3)


def test_the_jackknife_knows_the_error_and_bias_of_a_curved_metric():
    """Squared distance of a mean of independent draws from its expectation: variance of the mean is the bias."""
    rng, spread, bias, values = np.random.default_rng(1), [], [], []
    for _ in range(300):
        first = rng.uniform(size=(8, 5, 1))
        result = jackknife(lambda mean: float(mean[0, 0] ** 2), np.stack([first, 1 - first], axis=-1))
        spread.append(result.se)
        bias.append(result.bias)
        values.append(result.value)
    assert np.mean(bias) == pytest.approx(1 / 12 / 40, rel=0.1)  # E mean^2 - (E mean)^2
    assert np.sqrt(np.mean(np.square(spread))) == pytest.approx(np.std(values), rel=0.15)


P, Y = pairs([0.5, 0.6]), [0, 1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nll(np.log(P), Y), "apply softmax to logits first"),
        (lambda: nll(P * 2, Y), r"rows that sum to 2 \.\. 2"),
        (lambda: nll([0.2, 0.8], [0]), r"shape \(2,\); class probabilities \(N, K\)"),
        (lambda: nll([[0.2], [0.8]], [0, 0]), r"the pair \(1 - p, p\)"),
        (lambda: nll(np.zeros((0, 2)), []), r"shape \(0, 2\)"),
        (lambda: nll([["a", "b"]], [0]), "class probabilities"),
        (lambda: nll(P + np.array([[np.nan, 0]]), Y), "2 values of p are NaN"),
        (lambda: nll(P, [0.0, 1.0]), "y is float64 .*whole-number classes"),
        (lambda: nll(P, [0]), r"shape \(1,\); whole-number classes of shape \(2,\)"),
        (lambda: ece(P, [0, 2]), r"y holds 0 \.\. 2; the classes of p are 0 \.\. 1"),
        (lambda: accuracy(P, [-1, 0]), r"y holds -1 \.\. 0"),
        (lambda: ece(P, Y, 0), "n_bins must be a whole number of at least 1, not 0"),
        (lambda: ece(P, Y, 2.5), "n_bins must be .*, not 2.5"),
        (lambda: ece(P, Y, strategy="equal"), "strategy must be one of .*, not 'equal'"),
        (lambda: ece(P, Y, side="left"), "side must be one of .*, not 'left'"),
        (lambda: agreement(P, P[:1]), r"p has shape \(2, 2\) and q \(1, 2\)"),
        (lambda: auroc_ood([], [1.0]), r"scores_in is float64 of shape \(0,\)"),
        (lambda: auroc_ood([1.0], [math.nan]), "scores_out is"),
        (lambda: mutual_information(P), r"\(members, N, K\)"),
        (lambda: jackknife(np.mean, P), r"\(chains, draws, N, K\)"),
        (lambda: jackknife(np.mean, P[None, None]), r"1 chain\(s\) of 1 draw\(s\)"),
        (lambda: jackknife(np.mean, P[None, None], over="seeds"), "over, if not None, must be one of .*, not 'seeds'"),
        (
            lambda: jackknife(np.mean, P[None, None].repeat(4, 1), blocks=1),
            "blocks must be .*, not 1",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
