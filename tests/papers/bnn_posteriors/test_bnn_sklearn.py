"""The scikit-learn facade keeps scikit-learn's contract, and samples what BayesianNetwork samples."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.bnn_posteriors.hmc import HMC
from mlcollage.papers.bnn_posteriors.network import BayesianNetwork
from mlcollage.papers.bnn_posteriors.priors import StudentTPrior
from mlcollage.papers.bnn_posteriors.sklearn import HMCClassifier, HMCRegressor

SHORT = HMC(chains=2, draws=8, burn_in=3, warmup=10, jitter=0.2)
TINY = {"hidden_layer_sizes": (6,), "method": SHORT, "random_state": 0}


ESTIMATORS = {"classifier": HMCClassifier(**TINY), "regressor": HMCRegressor(min_noise=0.2, **TINY)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_contract_of_scikit_learn_holds(name):
    results = check_estimator(ESTIMATORS[name], on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert failed == {}
    assert sum(r["status"] == "passed" for r in results) > 40


def test_it_samples_what_a_bayesian_network_samples():
    X, y = load_iris(return_X_y=True)
    words = np.array(["setosa", "versicolor", "virginica"])[y]
    facade = HMCClassifier(**TINY).fit(X, words)
    Z = torch.from_numpy((X - X.mean(0)) / X.std(0))
    np.testing.assert_allclose(facade.mean_, X.mean(0))
    posterior = facade.posterior_
    assert posterior.params.dtype == torch.float64
    assert posterior.params.shape[:2] == (2, 8)
    np.testing.assert_allclose(facade.predict_proba(X), posterior.predict_proba(Z).numpy())
    assert set(facade.predict(X)) <= set(words)
    assert facade.score(X, words) > 0.9
    again = BayesianNetwork(posterior.network.module, prior=posterior.network.prior)
    density = again.log_density(Z, torch.from_numpy(y))
    torch.testing.assert_close(density(posterior.params[:, -1])[0], posterior.sample_stats["lp"][:, -1])


def test_the_same_seed_gives_the_same_draws_whatever_was_drawn_before():
    X, y = load_wine(return_X_y=True)
    torch.manual_seed(1)
    a = HMCClassifier(**TINY).fit(X, y).predict_proba(X)
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002 (that it does not matter is the point)
    b, c = (HMCClassifier(**{**TINY, "random_state": s}).fit(X, y).predict_proba(X) for s in (0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


def test_a_network_of_the_users_own_in_a_pipeline():
    seen = []

    def net(features, outputs):
        seen.append((features, outputs))
        return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, outputs))

    X, y = load_iris(return_X_y=True)
    method = replace(SHORT, trajectory_length=0.5)
    model = HMCClassifier(net, prior=StudentTPrior(5.0, 0.4), method=method, standardize=False, random_state=0)
    scores = cross_val_score(make_pipeline(StandardScaler(), clone(model)), X, y, cv=2)
    assert scores.min() > 0.8
    assert set(seen) == {(4, 3)}


def test_a_regressor_says_how_sure_it_is():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, size=(60, 1))
    y = 100 + 30 * (np.sin(2 * x[:, 0]) + 0.1 * rng.normal(size=60))
    method = HMC(chains=2, draws=25, warmup=20, jitter=0.2)
    shape = {"hidden_layer_sizes": (15,), "activation": "tanh", "prior": 1.0}
    model = HMCRegressor(noise=3.0, method=method, random_state=0, **shape).fit(x, y)
    grid = np.linspace(-2, 2, 50)[:, None]
    mean, std = model.predict(grid, return_std=True)
    truth = 100 + 30 * np.sin(2 * grid[:, 0])
    assert np.abs(mean - truth).mean() < 4
    assert std.min() > 3.0  # the noise is part of it
    far = model.predict(np.array([[-6.0], [6.0]]), return_std=True)[1]
    assert far.min() > 1.5 * std.max()
    np.testing.assert_array_equal(model.predict(grid), mean)


def test_fitted_estimators_can_be_pickled():
    X, y = load_iris(return_X_y=True)
    model = HMCClassifier(**TINY).fit(X, y)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 (written here)
    np.testing.assert_array_equal(again.predict_proba(X[:5]), model.predict_proba(X[:5]))


X, Y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2


@pytest.mark.parametrize(
    ("estimator", "y", "says"),
    [
        (HMCClassifier(**TINY), np.zeros(20), "y has one class only"),
        (HMCClassifier(module=3), Y, r"module is int; a function of \(n_features, n_outputs\)"),
        (HMCClassifier(module=nn.Linear(3, 2)), Y, r"module is Linear; a function of \(n_features"),
        (HMCClassifier(module=lambda f, k: nn.Linear(f, k + 1)), Y, r"maps \(1, 3\) to \(1, 3\); \(1, 2\)"),
        (HMCClassifier(prior=-1.0), Y, "variance must be a finite number above 0, not -1.0"),
        (HMCClassifier(method="hmc"), Y, "method is 'hmc'; pass an object"),
        (HMCClassifier(activation="rleu"), Y, "activation must be .* not 'rleu'"),
        (HMCRegressor(min_noise=1.0), Y, "min_noise must be .* not 1.0"),
        (HMCRegressor(noise=-0.1), Y, "noise must be a finite number above 0, not -0.1"),
    ],
)
def test_bad_settings_get_one_sentence(estimator, y, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        estimator.fit(X, y)
    assert "\n" not in str(caught.value)
