"""CCA, SVCCA and PWCCA against a generalized eigenproblem, scikit-learn and their invariances."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA

from mlcollage.errors import InvalidInput
from mlcollage.measure.cca import cca, components_for, factor, pairwise, pwcca, svcca


def pair(seed=0, n=300, p=6, q=4, shared=3, noise=0.7):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, shared))
    x = z @ rng.normal(size=(shared, p)) + noise * rng.normal(size=(n, p)) + rng.normal(size=p)
    y = z @ rng.normal(size=(shared, q)) + noise * rng.normal(size=(n, q)) + rng.normal(size=q)
    return x, y


def by_eigenvalues(x, y):
    """rho^2 as eigenvalues of Sxy Syy^-1 Syx against Sxx."""
    x, y = x - x.mean(0), y - y.mean(0)
    sxx, syy, sxy = x.T @ x, y.T @ y, x.T @ y
    values = scipy.linalg.eigh(sxy @ np.linalg.solve(syy, sxy.T), sxx, eigvals_only=True)[::-1]
    return np.sqrt(values.clip(0, 1))[: min(x.shape[1], y.shape[1])]


@pytest.mark.parametrize(("p", "q"), [(6, 4), (4, 6), (5, 5), (1, 3)])
def test_coefficients_solve_the_generalized_eigenproblem(p, q):
    x, y = pair(p=p, q=q)
    np.testing.assert_allclose(cca(x, y).coefs, by_eigenvalues(x, y), atol=1e-10)


def test_coefficients_are_those_of_scikit_learn():
    x, y = pair()
    theirs = CCA(n_components=4, max_iter=10_000, tol=1e-12).fit(x, y)
    u, v = theirs.transform(x, y)
    expected = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(4)]
    np.testing.assert_allclose(cca(x, y).coefs, expected, atol=1e-5)


def test_directions_give_orthonormal_variates_that_correlate_in_pairs_only():
    x, y = pair()
    x = np.c_[x, np.full(len(x), 5.0)]
    result = cca(x, y)
    u, v = (x - x.mean(0)) @ result.x_dirs, (y - y.mean(0)) @ result.y_dirs
    np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(v.T @ v, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(u.T @ v, np.diag(result.coefs), atol=1e-10)
    assert result.dropped == (1, 0)
    assert (result.x_dirs[-1] == 0).all()
    assert result.similarity + result.distance == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-6, 6), st.floats(-6, 6))
def test_nothing_changes_under_invertible_affine_maps_of_either_side(seed, log_a, log_b):
    x, y = pair(seed)
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=(k, k)) + 3 * np.eye(k) for k in (6, 4)]
    moved = cca(10**log_a * x @ maps[0] + 100, 10**log_b * y @ maps[1] - 7)
    np.testing.assert_allclose(moved.coefs, cca(x, y).coefs, atol=1e-7)


def test_units_of_single_features_do_not_matter():
    """Scales 20 orders apart: covariance matrices would lose the small ones."""
    x, y = pair()
    scales = 10.0 ** np.array([-160, 150, 0, 5, -5, 10])
    np.testing.assert_allclose(cca(x * scales, y).coefs, cca(x, y).coefs, atol=1e-9)


def test_dependent_features_add_nothing_and_constant_ones_are_counted():
    x, y = pair()
    more = np.c_[x, x @ np.ones((6, 3)), np.zeros(300), np.full(300, 1e6)]
    result = cca(more, y)
    assert result.ranks == (6, 4)
    assert result.dropped == (2, 0)
    np.testing.assert_allclose(result.coefs, cca(x, y).coefs, atol=1e-8)


def test_float32_activations_with_a_large_mean_keep_their_features():
    x, y = pair(n=2000)
    single = torch.tensor(x + 500, dtype=torch.float32)
    constant = torch.full((2000, 1), 0.1, dtype=torch.float32)
    result = cca(torch.cat([single, constant], 1), torch.tensor(y, dtype=torch.float32))
    assert result.dropped == (1, 0)
    assert result.ranks == (6, 4)
    np.testing.assert_allclose(result.coefs, cca(x, y).coefs, atol=1e-3)
    copy = torch.cat([single, single[:, :2] * 3], 1)  # equal up to the rounding of float32
    assert factor(copy).rank == 6


def test_svcca_is_cca_of_principal_components():
    x, y = pair(noise=0.1)
    x, y = x - x.mean(0), y - y.mean(0)

    def reduced(a):
        u, s, _ = np.linalg.svd(a, full_matrices=False)
        k = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.9)) + 1
        return u[:, :k] * s[:k]

    ours, theirs = svcca(x, y, 0.9), cca(reduced(x), reduced(y))
    assert ours.ranks == (reduced(x).shape[1], reduced(y).shape[1])
    assert ours.ranks[0] < 6
    np.testing.assert_allclose(ours.coefs, theirs.coefs, atol=1e-10)
    np.testing.assert_allclose(svcca(x, y, 1.0).coefs, cca(x, y).coefs, atol=1e-10)
    variates = x @ ours.x_dirs
    np.testing.assert_allclose(variates.T @ variates, np.eye(variates.shape[1]), atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_pwcca_weighs_by_projections_on_the_side_that_is_named(shape):
    x, y = pair(p=shape[0], q=shape[1])
    plain = cca(x, y)
    for side, (data, dirs) in {"x": (x, plain.x_dirs), "y": (y, plain.y_dirs)}.items():
        centered = data - data.mean(0)
        alpha = np.abs((centered @ dirs).T @ centered).sum(1)
        alpha /= alpha.sum()
        result = pwcca(x, y, side)
        np.testing.assert_allclose(result.weights, alpha, atol=1e-10)
        assert result.similarity == pytest.approx(float(alpha @ plain.coefs), abs=1e-10)
    smaller = "x" if shape[0] <= shape[1] else "y"
    assert pwcca(x, y, "min").similarity == pwcca(x, y, smaller).similarity
    assert pwcca(x, y, "x").similarity == pytest.approx(pwcca(y, x, "y").similarity, abs=1e-10)


def test_pwcca_is_unmoved_by_rotations_of_the_other_side_only():
    x, y = pair()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    assert pwcca(x, y @ rotation).similarity == pytest.approx(pwcca(x, y).similarity, abs=1e-10)


@pytest.mark.parametrize("method", ["cca", "svcca", "pwcca"])
def test_all_pairs_cost_one_factorization_a_layer(monkeypatch, method):
    made = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda a: (made.append(1), qr(a))[1])
    layers = {f"layer{i}": pair(i, n=80)[0] for i in range(4)}
    table = pairwise(layers, method=method, variance=0.9)
    assert len(made) == 4
    single = {"cca": cca, "svcca": lambda a, b: svcca(a, b, 0.9), "pwcca": pwcca}[method]
    for a in layers:
        for b in layers:
            assert table.loc[a, b] == pytest.approx(single(layers[a], layers[b]).similarity, abs=1e-9)
    assert np.allclose(np.diag(table), 1)
    other = pairwise(layers, {"y": pair(9, n=80)[1]}, method=method, variance=0.9)
    assert other.shape == (4, 1)


def test_a_factor_serves_in_place_of_the_data():
    x, y = pair()
    fx = factor(x)
    np.testing.assert_allclose(cca(fx, y).coefs, cca(x, y).coefs, atol=1e-12)
    centered = x - x.mean(0)
    np.testing.assert_allclose((fx.basis @ fx.coordinates).numpy(), centered, atol=1e-10)
    np.testing.assert_allclose(centered @ fx.whitener.numpy(), fx.basis.numpy(), atol=1e-10)
    assert fx.samples == 300


def test_svd_that_does_not_converge_falls_back_on_the_slower_driver(monkeypatch):
    x, y = pair()
    expected = cca(x, y)

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    np.testing.assert_allclose(cca(x, y).coefs, expected.coefs, atol=1e-12)


def test_bad_input_gets_one_sentence():
    x, y = pair()
    with pytest.raises(InvalidInput, match=r"need more samples than features \(n=5, p=6 of X\); pool or reduce"):
        cca(x[:5], y[:5])
    with pytest.raises(InvalidInput, match="X has 300 samples and Y has 299"):
        cca(x, y[1:])
    with pytest.raises(InvalidInput, match="all 2 features of Y are constant"):
        cca(x, np.ones((300, 2)))
    with pytest.raises(InvalidInput, match="1 values that are NaN or infinite"):
        cca(np.where(np.arange(6) + np.arange(300)[:, None] == 0, np.nan, x), y)
    with pytest.raises(InvalidInput, match="a matrix"):
        cca(np.zeros((4, 3, 2)), y)
    with pytest.raises(InvalidInput, match="at least two samples"):
        cca(x[:1], y[:1])
    with pytest.raises(InvalidInput, match=r"variance must be .* above 0 and at most 1, not 0"):
        svcca(x, y, 0)
    with pytest.raises(InvalidInput, match=r"weights must be one of .*, not 'z'"):
        pwcca(x, y, "z")
    with pytest.raises(InvalidInput, match=r"method must be one of .*, not 'pca'"):
        pairwise({"a": x}, method="pca")
    with pytest.raises(InvalidInput, match="no layers"):
        pairwise({})


def test_too_few_samples_for_two_ranks_is_said():
    x, y = pair(n=9)
    with pytest.warns(UserWarning, match="1 whatever the data"):
        assert cca(x, y).coefs[0] == pytest.approx(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cca(*pair(n=40))


def test_the_users_tensor_is_left_alone():
    x = torch.tensor(pair()[0], requires_grad=True)
    before = x.detach().clone()
    factor(x)
    assert torch.equal(x, before)
    assert x.grad is None
    assert components_for(torch.tensor([3.0, 4.0, 0.0]), 1.0) == 2
