"""Bayesian neural networks as scikit-learn estimators, sampled by Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from mlcollage._checks import positive, real
from mlcollage.errors import InvalidInput
from mlcollage.nn import MLP, build

from .hmc import HMC
from .likelihoods import CategoricalLikelihood, GaussianLikelihood, Likelihood
from .method import Method
from .network import BayesianNetwork
from .priors import GaussianPrior, Prior

Make = Callable[[int, int], nn.Module]


@dataclass(eq=False, repr=False)
class _HMC(BaseEstimator):
    """What classifier and regressor share: scaling, the network, the sampler's settings."""

    module: Make | None = None
    _: KW_ONLY
    hidden_layer_sizes: Sequence[int] = (50, 50)
    activation: str = "relu"
    prior: float | Prior = 0.2
    method: Method | None = None
    standardize: bool = True
    batch_size: int | None = None
    device: str | torch.device = "cpu"
    random_state: Any = None

    def _network(self, features: int, outputs: int, seed: int) -> nn.Module:
        if isinstance(self.module, nn.Module) or not (self.module is None or callable(self.module)):
            what = type(self.module).__name__
            raise InvalidInput(f"module is {what}; a function of (n_features, n_outputs) to a network is needed.")

        def make() -> nn.Module:
            if self.module is not None:
                return self.module(features, outputs)
            return MLP((features,), outputs, tuple(self.hidden_layer_sizes), activation=self.activation)

        network = build(make, seed).to(self.device, torch.float64)
        with torch.no_grad():
            made = network(torch.zeros(1, features, dtype=torch.float64, device=self.device))
        if not isinstance(made, Tensor) or made.shape != (1, outputs):
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise InvalidInput(f"the module maps (1, {features}) to {found}; (1, {outputs}) is needed.")
        return network

    def _sample(self, X: NDArray, y: NDArray, outputs: int, likelihood: Likelihood) -> None:
        prior = self.prior if isinstance(self.prior, Prior) else GaussianPrior(self.prior)
        seeds = check_random_state(self.random_state).randint(np.iinfo(np.int32).max, size=2)
        self.mean_ = X.mean(axis=0) if self.standardize else np.zeros(X.shape[1])
        # a feature that is constant up to rounding keeps its scale
        spread = X.std(axis=0) if self.standardize else np.ones(X.shape[1])
        self.scale_ = np.where(spread > 1e-12 * np.maximum(1, np.abs(self.mean_)), spread, 1.0)
        module = self._network(X.shape[1], outputs, int(seeds[0]))
        network = BayesianNetwork(module, likelihood, prior, backend="untimed")  # a clock would change the last bits
        method = HMC(jitter=0.2) if self.method is None else self.method
        self.posterior_ = network.fit(self._scaled(X), torch.from_numpy(y), method, generator=int(seeds[1]))

    def _scaled(self, X: NDArray) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def _inputs(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        return self._scaled(validate_data(self, X, dtype=np.float64, reset=False))


class HMCClassifier(ClassifierMixin, _HMC):
    r"""Classifier that averages the predictions of networks drawn from their posterior.

    .. math:: p(y \mid x, D) = \frac{1}{M} \sum_m \mathrm{softmax}(f(x, w_m))_y, \qquad w_m \sim p(w \mid D)

    by full-batch Hamiltonian Monte Carlo (P. Izmailov et al., ICML 2021), for tables of some hundreds or thousands of
    rows: an iteration takes tens or hundreds of gradients of all data.

    Parameters
    ----------
    module : callable, default None
        ``module(n_features, n_outputs)`` makes your network, from (n, n_features) to (n, n_outputs) logits. It is
        sampled in float64. None: an MLP.
    hidden_layer_sizes : sequence of int, default (50, 50)
        Of the MLP.
    activation : str, default "relu"
        Of the MLP: ``"relu"``, ``"tanh"``, ``"silu"``, ``"gelu"``, ``"elu"`` or ``"leaky_relu"``.
    prior : float or Prior, default 0.2
        Variance of a Gaussian prior on every parameter, or a prior.
    method : HMC or another Method, default None
        How the posterior is sampled; None: ``HMC(jitter=0.2)``.
    standardize : bool, default True
        Whether to bring each feature to mean 0 and deviation 1; a prior on weights supposes something like it.
    batch_size : int, default None
        Rows per pass when predicting; None: all.
    device : str or torch.device, default "cpu"
        Where the network and its draws are; anything double precision works on, such as ``"cuda"``.
    random_state : int, RandomState or None, default None
        Seeds network and sampler.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels, sorted.
    n_features_in_ : int
        Width of a sample.
    posterior_ : Posterior
        The draws, and ``posterior_.function_rhat(...)`` says whether the chains agree; ``posterior_.network`` is the
        network, of standardized inputs.
    mean_, scale_ : ndarray of shape (n_features,)
        What inputs are standardized by.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import train_test_split
    >>> X, X_test, y, y_test = train_test_split(*load_iris(return_X_y=True), random_state=0)
    >>> method = HMC(draws=30, warmup=20, jitter=0.2)
    >>> model = HMCClassifier(hidden_layer_sizes=(8,), method=method, random_state=0).fit(X, y)
    >>> model.predict_proba(X_test).shape, model.score(X_test, y_test) > 0.9
    ((38, 3), True)
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Sample the posterior.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training rows.
        y : array-like of shape (n_samples,)
            Their labels.

        Returns
        -------
        HMCClassifier
            Itself.
        """
        rows, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InvalidInput(f"y has one class only ({self.classes_[0]!r}); two or more classes are needed.")
        self._sample(rows, codes.astype(np.int64), len(self.classes_), CategoricalLikelihood())
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Class probabilities, averaged over all draws.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of ``classes_``.
        """
        inputs = self._inputs(X)  # refuses what was not fitted
        return self.posterior_.predict_proba(inputs, self.batch_size).cpu().numpy()

    def predict(self, X: ArrayLike) -> NDArray:
        """Most probable labels.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        best = self.predict_proba(X).argmax(axis=1)  # refuses what was not fitted
        return self.classes_[best]


@dataclass(eq=False, repr=False)
class HMCRegressor(RegressorMixin, _HMC):
    r"""Regressor that averages the predictions of networks drawn from their posterior.

    Targets are standardized; given x and weights they are Gaussian, with mean and spread from the network, or with a
    known spread. The prediction is the mean of the mixture over all draws, its standard deviation includes the noise.
    P. Izmailov et al., ICML 2021.

    Parameters
    ----------
    module : callable, default None
        ``module(n_features, n_outputs)`` makes your network; ``n_outputs`` is 2 (mean, and what softplus turns into the
        spread), or 1 where ``noise`` is given. None: an MLP.
    noise : float, default None
        Standard deviation of the noise in the units of y, if it is known.
    min_noise : float, default 0.05
        Smallest standard deviation that the network may give, over that of y. Without it, data without noise would
        have a posterior too narrow to move in.
    hidden_layer_sizes, activation, prior, method, standardize, batch_size, device, random_state
        As in :class:`HMCClassifier`; the MLP has one hidden layer of 50 units by default, as in the paper.

    Attributes
    ----------
    n_features_in_ : int
        Width of a sample.
    posterior_ : Posterior
        The draws, of a network of standardized inputs and targets.
    mean_, scale_ : ndarray of shape (n_features,)
        What inputs are standardized by.
    y_mean_, y_scale_ : float
        What targets are standardized by.

    Examples
    --------
    >>> x = np.linspace(-2, 2, 40)[:, None]
    >>> y = np.sin(2 * x[:, 0]) + 0.1 * np.random.default_rng(0).normal(size=40)
    >>> method = HMC(chains=2, draws=20, warmup=20, jitter=0.2)
    >>> model = HMCRegressor(
    ...     noise=0.1, hidden_layer_sizes=(20,), activation="tanh", prior=1.0, method=method, random_state=0
    ... ).fit(x, y)
    >>> mean, std = model.predict(x, return_std=True)
    >>> model.score(x, y) > 0.9, mean.shape, std.shape
    (True, (40,), (40,))
    """

    _: KW_ONLY
    noise: float | None = None
    min_noise: float = 0.05
    hidden_layer_sizes: Sequence[int] = (50,)

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Sample the posterior.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training rows.
        y : array-like of shape (n_samples,)
            Their values. A column, (n_samples, 1), is taken too, with scikit-learn's warning; predictions are then
            columns.

        Returns
        -------
        HMCRegressor
            Itself.
        """
        rows, values = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        values, self._column = values.astype(np.float64), np.asarray(y).ndim == 2
        spread = float(values.std())
        self.y_mean_ = float(values.mean())
        self.y_scale_ = spread if spread > 1e-12 * max(1.0, abs(self.y_mean_)) else 1.0
        # in units of standardized targets, as the network sees them
        floor = real("min_noise", self.min_noise, least=0, below=1)
        noise = None if self.noise is None else positive("noise", self.noise) / self.y_scale_
        likelihood = GaussianLikelihood(noise, floor=floor)
        self._sample(rows, (values - self.y_mean_) / self.y_scale_, 2 if self.noise is None else 1, likelihood)
        return self

    def predict(
        self, X: ArrayLike, return_std: bool = False
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Predictive mean, and standard deviation if asked for.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.
        return_std : bool, default False
            Whether to return the standard deviation too.

        Returns
        -------
        ndarray of shape (n_samples,), or two of them
        """
        inputs = self._inputs(X)
        # of standardized targets
        mean, variance = self.posterior_.predict_moments(inputs, self.batch_size)
        prediction = self.y_mean_ + self._as_given(mean)
        return (prediction, self._as_given(variance.sqrt())) if return_std else prediction

    def predict_quantiles(self, X: ArrayLike, q: float | Sequence[float]) -> NDArray[np.float64]:
        """Quantiles of new targets, noise included, with ``q`` between 0 and 1: (0.05, 0.95) for a 90 % interval.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.
        q : float or sequence of float
            Probabilities.

        Returns
        -------
        ndarray of shape (n_samples,), or (n_probabilities, n_samples) for a sequence
        """
        inputs = self._inputs(X)
        return self.y_mean_ + self._as_given(self.posterior_.predict_quantiles(inputs, q, self.batch_size))

    def _as_given(self, values: Tensor) -> NDArray[np.float64]:
        """In the units and the shape of the training targets."""
        scaled = self.y_scale_ * values.cpu().numpy()
        return scaled[..., None] if self._column else scaled
