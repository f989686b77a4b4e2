"""Dissimilarity matrices against scipy, their similarity against numbers by hand, probes against ridge regression."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from mlcollage.errors import InvalidInput
from mlcollage.measure import layer_probes, rdm, rdm_similarity

FOUR = [[1.0, 2, 3], [2, 4, 6], [3, 2, 1], [1, 0, 0]]
OTHERS = [[1.0, 0, 2], [0, 1, 1], [2, 2, 0], [3, 0, 1]]


@pytest.mark.parametrize("metric", ["correlation", "euclidean", "cosine"])
def test_a_matrix_is_scipys(metric):
    x = np.random.default_rng(0).normal(size=(20, 7))
    np.testing.assert_allclose(rdm(x, metric), squareform(pdist(x, metric)), atol=1e-12)


def test_a_large_offset_does_no_harm():
    x = np.random.default_rng(0).normal(size=(20, 7)).astype(np.float32)
    shifted = (x + np.float32(1e5)).astype(np.float64)
    np.testing.assert_allclose(rdm(shifted), squareform(pdist(shifted, "correlation")), atol=1e-9)


def test_collinear_rows_have_no_distance_at_all():
    x = np.random.default_rng(0).normal(size=(1, 50)) * np.arange(1, 6)[:, None] / 3
    assert (rdm(x) == 0).all()


def test_a_constant_row_is_counted_and_left_out():
    rows = [*FOUR, [5.0, 5, 5]]
    with pytest.warns(UserWarning, match="1 of 5 rows are constant"):
        d = rdm(rows)
    assert d[4, :4].isnan().all()
    others = [*OTHERS, [1.0, 2, 9]]
    assert rdm_similarity(d, rdm(others)) == pytest.approx(rdm_similarity(rdm(FOUR), rdm(OTHERS)))


def test_similarity_is_over_the_upper_triangle():
    a, b = rdm(FOUR), rdm(OTHERS)
    assert rdm_similarity(a, b) == pytest.approx(0.569384, abs=1e-6)
    i, j = np.triu_indices(4, 1)
    assert rdm_similarity(a, b, "spearman") == pytest.approx(spearmanr(a[i, j], b[i, j])[0])


def test_matrices_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match="one size"):
        rdm_similarity(torch.zeros(3, 3), torch.zeros(4, 4))
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        rdm([[1.0, float("nan")], [1.0, 2.0]])


@pytest.mark.parametrize("features", [5, 80])  # fewer and more than samples
def test_a_probe_is_ridge_regression(features):
    rng = np.random.default_rng(1)
    y, y_test = rng.integers(3, size=60), rng.integers(3, size=40)
    centers = rng.normal(size=(3, features))
    x, x_test = (centers[t] + 2 * rng.normal(size=(len(t), features)) for t in (y, y_test))
    scale = np.sqrt(np.square(x - x.mean(0)).mean())
    model = Ridge(alpha=0.05 * 60).fit((x - x.mean(0)) / scale, np.eye(3)[y])
    expected = (model.predict((x_test - x.mean(0)) / scale).argmax(1) == y_test).mean()
    assert layer_probes({"a": x}, y, {"a": x_test}, y_test, ridge=0.05)["a"] == expected


def test_a_single_class_has_no_probe():
    with pytest.raises(InvalidInput, match="two classes"):
        layer_probes({"a": np.eye(3)}, [0, 0, 0], {"a": np.eye(3)}, [0, 0, 0])
