r"""Models with more parameters than data: their effective size, shrinkage, and error outside the sample.

Ridge, lasso and elastic net are scikit-learn's. Here are the effective degrees of freedom of a ridge, the bench on
which the double descent of interpolating fits can be watched, and leave-one-out predictive accuracy by Pareto-smoothed
importance sampling. :mod:`mlcollage.stats.horseshoe` has the horseshoe prior.

A. Gelman and A. Vehtari, "What are the most important statistical ideas of the past 50 years?", JASA 2021, idea 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import brentq
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from mlcollage._checks import integer, positive, real
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, Rng, finite, table

# a grid that reaches from no shrinkage to nearly nothing left, for features of unit scale
_PENALTIES = tuple(float(p) for p in np.logspace(-4, 2, 13))


def effective_degrees_of_freedom(X: npt.ArrayLike, penalty: float) -> float:
    r"""How many parameters a ridge fit is worth.

    .. math:: \operatorname{df}(\lambda) = \operatorname{tr}\big(X (X^\top X + \lambda I)^{-1} X^\top\big)
        = \sum_i \frac{s_i^2}{s_i^2 + \lambda},

    with s the singular values of X: the rank at :math:`\lambda = 0`, falling to 0. T. Hastie, R. Tibshirani and
    J. Friedman, "The Elements of Statistical Learning", 2009, eq. 3.50. Center X first if the model has an intercept
    that is not penalized, and count one more.

    Parameters
    ----------
    X
        Design, shape ``(n, p)``.
    penalty
        :math:`\lambda \ge 0`, scikit-learn's ``alpha`` of ``Ridge``.

    Examples
    --------
    >>> effective_degrees_of_freedom([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1.0)
    1.4
    """
    squares = _spectrum(X)
    return float((squares / (squares + real("penalty", penalty, least=0))).sum())


def _spectrum(X: npt.ArrayLike) -> Floats:
    """Squared singular values above rounding."""
    x = table(X, "X", "units, columns")
    s = np.linalg.svd(x, compute_uv=False)
    return s[s > s[0] * max(x.shape) * np.finfo(float).eps] ** 2


def penalty_for(X: npt.ArrayLike, degrees_of_freedom: float) -> float:
    """Ridge penalty at which the fit has the wanted :func:`effective_degrees_of_freedom`.

    Examples
    --------
    >>> round(penalty_for([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1.4), 6)
    1.0
    """
    squares = _spectrum(X)
    rank = len(squares)
    real("degrees_of_freedom", degrees_of_freedom, above=0, most=rank)
    if degrees_of_freedom == rank:
        return 0.0

    def excess(log_penalty: float) -> float:
        return float((squares / (squares + np.exp(log_penalty))).sum()) - degrees_of_freedom

    # df > rank s_min / (s_min + l) and df < sum(s) / l bracket the penalty
    low = np.log(squares[-1] * (rank / degrees_of_freedom - 1)) - 1e-9
    high = np.log(squares.sum() / degrees_of_freedom) + 1e-9
    return float(np.exp(brentq(excess, low, high, xtol=1e-13)))


def _relu_features(x: Floats, weights: Floats, offsets: Floats) -> Floats:
    # sqrt(2 / P) makes the expected squared norm of the features that of x
    return np.maximum(x @ weights + offsets, 0) * np.sqrt(2 / weights.shape[1])


@dataclass(eq=False, repr=False)
class RandomReLURegressor(RegressorMixin, BaseEstimator):
    r"""Least squares, of least norm where many fit, on random ReLU features.

    .. math:: f(x) = \bar y + \sqrt{2/P}\,\max(0, x^\top W + c)\, \beta, \qquad
        \beta = \Phi^\top (\Phi \Phi^\top + \lambda I)^{+} (y - \bar y),

    with columns of W drawn from :math:`N(0, I/d)` and c from :math:`N(0, \text{bias}^2)`. At :math:`\lambda = 0` and
    P >= n it interpolates the data; its test error peaks at P = n and falls again beyond, the double descent of
    M. Belkin et al., PNAS 2019.

    Parameters
    ----------
    features
        P.
    penalty
        :math:`\lambda \ge 0`.
    bias
        Scale of the offsets c; 0 suits centered inputs of many dimensions.
    random_state
        Seed of W and c.

    Attributes
    ----------
    coef_
        :math:`\beta`, shape ``(features,)``.
    effective_df_
        :func:`effective_degrees_of_freedom` of the features at the penalty.

    Examples
    --------
    >>> x, y, x_test, truth = noisy_line(rng=0)
    >>> model = RandomReLURegressor(features=1000).fit(x, y)
    >>> bool(np.allclose(model.predict(x), y)), bool(np.mean((model.predict(x_test) - truth) ** 2) < 0.5)
    (True, True)
    """

    features: int = 1000
    penalty: float = 0.0
    bias: float = 0.0
    random_state: int = 0

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Draw the features and solve for the coefficients."""
        x, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        integer("features", self.features, least=1), real("penalty", self.penalty, least=0)
        self.weights_, self.offsets_ = _draw(x.shape[1], self.features, self.bias, self.random_state)
        fit = _Spectral.of(_relu_features(x, self.weights_, self.offsets_), target)
        self.intercept_ = fit.mean
        self.coef_ = fit.coefficients(self.penalty)
        self.effective_df_ = float(fit.shrinkage(self.penalty).sum())
        return self

    def predict(self, X: npt.ArrayLike) -> Floats:
        """Predictions, shape ``(n,)``."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        return self.intercept_ + _relu_features(x, self.weights_, self.offsets_) @ self.coef_


def _draw(d: int, features: int, bias: float, seed: int) -> tuple[Floats, Floats]:
    # Streams of their own: the caller's data may come from default_rng(seed), which [seed, 0] would repeat. Rows are
    # features, so that a wider model begins with the features of a narrower one.
    weights = np.random.default_rng([seed, 31]).normal(size=(features, d)).T / np.sqrt(d)
    return weights, bias * np.random.default_rng([seed, 32]).normal(size=features)


@dataclass(frozen=True)
class _Spectral:
    """A ridge problem in the singular basis of its design, so that every penalty costs one product."""

    u: Floats
    s: Floats
    vt: Floats
    y: Floats
    mean: float

    @classmethod
    def of(cls, design: Floats, y: Floats) -> Self:
        u, s, vt = np.linalg.svd(design, full_matrices=False)  # (n, k), (k,), (k, p)
        keep = s > s[0] * max(design.shape) * np.finfo(float).eps
        mean = float(y.mean())
        return cls(u[:, keep], s[keep], vt[keep], y - mean, mean)

    def shrinkage(self, penalty: float) -> Floats:
        return self.s**2 / (self.s**2 + penalty)

    def coefficients(self, penalty: float) -> Floats:
        # (p,): in the singular basis each direction is shrunk by itself
        return self.vt.T @ (self.shrinkage(penalty) / self.s * (self.u.T @ self.y))

    def leave_one_out(self, penalty: float) -> float:
        """Mean squared leave-one-out error, the mean of y held: residuals over one minus leverages."""
        shrunken = self.u * self.shrinkage(penalty)
        residual = self.y - shrunken @ (self.u.T @ self.y)
        slack = 1 - (shrunken * self.u).sum(axis=1)
        return float(np.mean((residual / np.maximum(slack, 1e-12)) ** 2))


def noisy_line(
    n: int = 100, d: int = 30, noise: float = 0.5, *, n_test: int = 1000, rng: Rng = 0
) -> tuple[Floats, Floats, Floats, Floats]:
    r"""A linear problem: :math:`x \sim N(0, I_d)`, :math:`y = x^\top \beta + \text{noise} \cdot \epsilon`.

    :math:`\beta` is a random direction of length 1, so predicting 0 has error 1.

    Returns
    -------
    X, y, X_test, truth
        Shapes ``(n, d)``, ``(n,)``, ``(n_test, d)``, ``(n_test,)``; ``truth`` has no noise.

    Examples
    --------
    >>> [v.shape for v in noisy_line()]
    [(100, 30), (100,), (1000, 30), (1000,)]
    """
    for name, value in (("n", n), ("d", d), ("n_test", n_test)):
        integer(name, value, least=1)
    real("noise", noise, least=0)
    generator = np.random.default_rng(rng)
    beta = generator.normal(size=d)
    beta /= np.linalg.norm(beta)
    x, x_test = generator.normal(size=(n, d)), generator.normal(size=(n_test, d))
    return x, x @ beta + noise * generator.normal(size=n), x_test, x_test @ beta


def double_descent(
    X: npt.ArrayLike,
    y: npt.ArrayLike,
    X_test: npt.ArrayLike,
    y_test: npt.ArrayLike,
    *,
    features: Sequence[int] = (10, 30, 60, 100, 160, 300, 1000, 3000),
    penalties: Sequence[float] = _PENALTIES,
    bias: float = 0.0,
    random_state: int = 0,
) -> pd.DataFrame:
    """Test error of :class:`RandomReLURegressor` over its number of features, without and with a tuned ridge.

    Without a penalty the error peaks where features and training units are equal in number; the ridge, whose penalty
    is chosen by leave-one-out on the training data alone, has no peak (P. Nakkiran et al., "Optimal regularization
    can mitigate double descent", ICLR 2021).

    Parameters
    ----------
    X, y, X_test, y_test
        Training and test data.
    features
        Numbers of features to fit.
    penalties
        Grid of the ridge, all positive.
    bias, random_state
        As in :class:`RandomReLURegressor`.

    Returns
    -------
    DataFrame
        A row for each number of features: ``features``, ``min_norm`` and ``ridge`` (mean squared test errors),
        ``penalty`` (the chosen one) and ``ridge_df`` (effective degrees of freedom).

    Examples
    --------
    >>> curve = double_descent(*noisy_line(rng=0), features=[30, 100, 1000])
    >>> peak = curve.loc[curve["features"] == 100, "min_norm"].item()
    >>> bool(peak > 10 * curve["min_norm"].min()), bool(peak > 10 * curve["ridge"].max())
    (True, True)
    """
    x, x_test = table(X, "X", "units, columns"), table(X_test, "X_test", "units, columns")
    target, truth = finite(y, "y"), finite(y_test, "y_test")
    if target.shape != (len(x),) or truth.shape != (len(x_test),) or x.shape[1] != x_test.shape[1]:
        raise InvalidInput(f"X {x.shape}, y {target.shape}, X_test {x_test.shape}, y_test {truth.shape} do not match.")
    if not features or min(features) < 1 or not penalties or not min(penalties) > 0:
        raise InvalidInput("features must be positive whole numbers and penalties positive; both at least one.")
    rows = []
    for p in features:
        weights, offsets = _draw(x.shape[1], p, bias, random_state)
        fit = _Spectral.of(_relu_features(x, weights, offsets), target)
        best = min(penalties, key=fit.leave_one_out)
        # test features (test units, p), with the mean of the training outcomes added back
        held_out = _relu_features(x_test, weights, offsets)
        errors = [
            float(np.mean((fit.mean + held_out @ fit.coefficients(penalty) - truth) ** 2)) for penalty in (0.0, best)
        ]
        rows.append((p, *errors, float(best), float(fit.shrinkage(best).sum())))
    return pd.DataFrame(rows, columns=["features", "min_norm", "ridge", "penalty", "ridge_df"])


@dataclass(frozen=True)
class Loo:
    """Leave-one-out predictive accuracy.

    Attributes
    ----------
    elpd, se
        Expected log predictive density of the observed units and its standard error, in nats.
    p
        Effective number of parameters: how much better the fit is on the units it has seen.
    pointwise, pareto_k
        Each unit's part, and its Pareto shape; above 0.7 the unit is so influential that its part is not reliable.
    """

    elpd: float
    se: float
    p: float
    pointwise: Floats
    pareto_k: Floats

    @property
    def unreliable(self) -> list[int]:
        """Positions of the units with a Pareto shape above 0.7: refit without each of them."""
        return [int(i) for i in np.flatnonzero(self.pareto_k > 0.7)]

    def difference(self, other: Loo) -> tuple[float, float]:
        """Elpd minus the other model's on the same units, and the standard error of that paired difference."""
        if len(self.pointwise) != len(other.pointwise):
            raise InvalidInput(f"{len(self.pointwise)} and {len(other.pointwise)} units: compare on the same data.")
        d = self.pointwise - other.pointwise
        return float(d.sum()), float(np.sqrt(len(d)) * d.std(ddof=1))


def psis_loo(log_likelihood: npt.ArrayLike, *, relative_efficiency: float = 1.0) -> Loo:
    r"""Leave-one-out predictive accuracy by Pareto-smoothed importance sampling (ArviZ).

    .. math:: \widehat{\text{elpd}} = \sum_i \log \frac{\sum_s w_i^s\, p(y_i \mid \theta^s)}{\sum_s w_i^s},
        \qquad w_i^s \propto 1 / p(y_i \mid \theta^s), \text{ tail smoothed}.

    A. Vehtari, A. Gelman and J. Gabry, Statistics and Computing 2017.

    Parameters
    ----------
    log_likelihood
        :math:`\log p(y_i \mid \theta^s)`, shape ``(chains, draws, units)``, at least 2 units.
    relative_efficiency
        Effective over actual number of draws; it sets how long a tail is smoothed.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y, mu = rng.normal(size=20), rng.normal(0, 20**-0.5, size=(4, 500, 1))
    >>> loo = psis_loo(-0.5 * (y - mu) ** 2 - 0.5 * np.log(2 * np.pi))
    >>> bool(-40 < loo.elpd < -15), loo.unreliable
    (True, [])
    """
    values = finite(log_likelihood, "log_likelihood")  # minus infinity: some draw gives a unit no chance at all
    if values.ndim != 3 or values.shape[2] < 2 or values.shape[0] * values.shape[1] < 100:
        raise InvalidInput(
            f"log_likelihood has shape {values.shape}; (chains, draws, units) with 2 units and 100 draws or more was "
            "expected. Do not sum over units."
        )
    positive("relative_efficiency", relative_efficiency)
    import arviz as az  # takes two seconds, and only this function needs it

    groups: dict[str, Any] = {"posterior": {"unused": values[..., 0]}, "log_likelihood": {"y": values}}
    old = "InferenceData" in vars(az)  # at 1.0 ArviZ changed what it takes and how it calls the parts of its result
    r = az.loo(az.from_dict(**groups) if old else az.from_dict(groups), pointwise=True, reff=relative_efficiency)
    elpd, p, each = (r.elpd_loo, r.p_loo, r.loo_i) if old else (r.elpd, r.p, r.elpd_i)
    return Loo(float(elpd), float(r.se), float(p), np.asarray(each), np.asarray(r.pareto_k))
