"""What the estimators share: the settings as they were fitted, inputs, sample weights, files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self, TypedDict

import numpy as np
from joblib import effective_n_jobs  # type: ignore[import-untyped]
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, validate_data

from mlcollage._npz import load_arrays, save_arrays
from mlcollage.errors import InvalidInput

from ._inputs import Inputs
from ._settings import check_rate, step_sizes
from .gaussian import GaussianNetwork
from .network import GatedNetwork

Array = NDArray[Any]
_BLOCK = 4096  # samples whose inputs are held at once
_WINDOW = 500  # samples whose losses are averaged in the record of learning
_NETWORK_SETTINGS = {
    "context_bias_scale",
    "context_dim",
    "dtype",
    "eps",
    "gradient",
    "layer_bias",
    "max_variance",
    "min_variance",
    "step_limit",
    "tables",
    "weight_clip",
    "weight_init",
}


class StepOptions(TypedDict, total=False):
    """What ``fit`` takes besides the data.

    ``sample_weight`` scales the step of each sample; samples of weight 0 are left out altogether.
    """

    sample_weight: ArrayLike | None


def only_weight(options: Any) -> ArrayLike | None:
    """The only option of ``fit``; others are refused as Python refuses unknown keywords."""
    unknown = sorted(set(options) - {"sample_weight"})
    if unknown:
        raise TypeError(f"fit() got an unexpected keyword argument {unknown[0]!r}; it takes sample_weight.")
    return options.get("sample_weight")


def step_factors(weight: ArrayLike | None, X: Array) -> tuple[Array | None, Array]:
    """Sample weights as factors on the step sizes, checked, and the numbers of the samples that are learned from."""
    if weight is None:
        return None, np.arange(len(X))
    if not np.asarray(weight, np.float64).any():
        raise InvalidInput("All sample weights are zero; at least one sample must have a weight > 0.")
    factors = np.asarray(_check_sample_weight(weight, X, dtype=np.float64, ensure_non_negative=True))
    return factors, np.flatnonzero(factors > 0)


def blocks(n: int) -> Iterator[slice]:
    """``n`` samples, a block at a time."""
    return (slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))


@dataclass(frozen=True)
class Health:
    """How learning goes, from the loss of each sample before it was learned from (in nats, means over 500 samples)."""

    samples: int  # learned from so far
    step_size: float  # of the next sample
    recent_loss: float  # of the last full window; NaN before there is one
    best_loss: float  # of the best window
    advice: str  # empty if nothing is amiss


@dataclass(eq=False, repr=False, kw_only=True)
class OnlineEstimator(BaseEstimator):
    """An online learner with gated linear networks inside.

    It works with the settings that it had when learning began, ``settings_``: changing a parameter of a fitted
    estimator has no effect before it is fitted anew. Only ``n_jobs``, on which no result depends, is read each time.
    """

    weight_clip: float = 200.0
    context_bias_scale: float = 0.05
    weight_init: str = "mean"
    gradient: str = "paper"
    tables: str = "auto"
    memory: int | None = None
    dtype: Any = "float32"
    random_state: Any = None

    # Set by learning, so that scikit-learn, which takes each argument of __init__ for a parameter, does not see them.
    settings_: SimpleNamespace = field(init=False)
    network_: Any = field(init=False)
    _inputs_: Any = field(init=False)

    # ------------------------------------------------------------------ learning

    def _begin(self, X: Array | None = None) -> np.random.RandomState:
        """Take the settings as they are now, and build untrained networks; ``X`` shows what the samples are like."""
        # Lists are copied: one that is changed in place must not change a fitted model.
        given = self.get_params(deep=False).items()
        settings = SimpleNamespace(**{name: tuple(v) if isinstance(v, list) else v for name, v in given})
        check_rate(settings.learning_rate, self._initial_rate(settings))
        rng = check_random_state(settings.random_state)
        seed = self._seed(settings, rng)
        # A setting that is refused here leaves what was fitted before as it was.
        self.network_, self._inputs_ = self._build(settings, seed, X)
        self.settings_, self._seed_, self.t_ = settings, seed, 0
        self._losses_ = np.zeros((1, 3))  # of each window of samples: how many, sum, sum of squares
        return rng

    def _build(self, settings: SimpleNamespace, seed: int, X: Array | None) -> tuple[GatedNetwork, Inputs | None]:
        """The networks without heads, and what makes their inputs."""
        raise NotImplementedError

    def _network(
        self, kind: type[GatedNetwork], settings: SimpleNamespace, seed: int, sizes: Sequence[int], **more: Any
    ) -> Any:
        """A network that reads the features; the settings that are its own are passed on."""
        own = {name: value for name, value in vars(settings).items() if name in _NETWORK_SETTINGS}
        width = self.n_features_in_
        return kind(sizes, width, width, seed=seed, **own, **more)

    def _seed(self, settings: SimpleNamespace, rng: np.random.RandomState) -> int:
        return int(rng.randint(np.iinfo(np.int32).max))

    def _initial_rate(self, settings: SimpleNamespace) -> float:
        return settings.learning_rate_init

    def _steps(self, base: Array, side: Array, targets: Array, **more: Any) -> Array:
        """Learn from samples, one after the other; what was predicted before each."""
        settings, network = self.settings_, self.network_
        learned: Array = (network.run if isinstance(network, GaussianNetwork) else network.learn)(
            *(base, side, targets),
            rate=settings.learning_rate,
            initial_rate=self._initial_rate(settings),
            memory=getattr(settings, "memory", None),
            **more,
        )
        self.t_ += len(base)
        return learned

    def _passes(
        self, X: Array, y: Array, factors: Array | None, order: Array, rng: np.random.RandomState, passes: int
    ) -> None:
        for _ in range(passes):
            if self.settings_.shuffle:
                rng.shuffle(order)
            self._learn(X, y, factors, order)

    def _learn(self, X: Array, y: Array, factors: Array | None, order: Array) -> Any:
        """Learn from the samples ``X[order]``."""
        raise NotImplementedError

    def _note(self, losses: Array) -> None:
        """Take the losses of samples, from before each was learned from, into the record."""
        while len(losses):
            now, losses = np.split(losses, [int(_WINDOW - self._losses_[-1, 0])])
            self._losses_[-1] += len(now), now.sum(), np.square(now).sum()
            if self._losses_[-1, 0] == _WINDOW:
                self._losses_ = np.vstack([self._losses_, np.zeros(3)])

    def health(self) -> Health:
        """Whether the stream is still followed: the recent progressive loss beside the best one, and the step size.

        Where the recent loss is worse by more than five standard errors, ``advice`` says what can be done. The default
        schedule of step sizes falls like 1 / t, and cannot follow a change late in a long stream.
        """
        self._check_fitted()
        settings, steps = self.settings_, max(self.network_.steps, default=0)
        rates = [
            float(
                step_sizes(settings.learning_rate, at, 1, initial=self._initial_rate(settings), memory=settings.memory)[
                    0
                ]
            )
            for at in (1, steps + 1)
        ]
        full = self._losses_[:-1]  # (windows, 3)
        if not len(full):
            return Health(self.t_, rates[1], np.nan, np.nan, "")
        means = full[:, 1] / _WINDOW
        errors = np.sqrt(np.maximum(full[:, 2] / _WINDOW - means**2, 0) / _WINDOW)
        best = int(means.argmin())
        recent, advice = float(means[-1]), ""
        if recent - means[best] > 5 * np.hypot(errors[-1], errors[best]):
            advice = (
                f"The last {_WINDOW} samples are predicted worse ({recent:.3g} nats) than samples "
                f"{best * _WINDOW + 1} to {(best + 1) * _WINDOW} were ({means[best]:.3g}): the stream may have changed."
                f" The step size is {rates[1]:.2g} now and was {rates[0]:.2g} at first; memory=5000, or a constant "
                "learning_rate, keeps it."
            )
        return Health(self.t_, rates[1], recent, float(means[best]), advice)

    # ------------------------------------------------------------------ prediction

    def _check_fitted(self) -> None:
        if not hasattr(self, "network_"):
            raise NotFittedError(f"This {type(self).__name__} has learned nothing yet: call fit or partial_fit first.")

    @property
    def _jobs(self) -> int:
        return int(effective_n_jobs(self.n_jobs))

    def _read(self, X: Array, *, learn: bool = False) -> tuple[Array, Array]:
        """Base predictions and side information of samples; ``learn`` updates the running moments."""
        return self._inputs_(X, learn=learn)

    def _validated(self, X: Any) -> Array:
        return np.asarray(validate_data(self, as_array(X), reset=False, dtype=(np.float64, np.float32)))

    def _map(self, X: Any, compute: Callable[[Array, Array], Array]) -> Array:
        """What ``compute`` makes of base predictions and side information, block by block."""
        self._check_fitted()
        X = self._validated(X)
        return np.concatenate([compute(*self._read(X[part])) for part in blocks(len(X))])

    # ------------------------------------------------------------------ disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimator to an ``.npz`` file without pickle; :meth:`load` continues from it bit for bit."""
        self._check_fitted()
        numbers = {"seed": self._seed_, "t": self.t_, "n_features": self.n_features_in_, "losses": self._losses_}
        arrays = {name: np.array(value) for name, value in numbers.items()} | self.network_.state() | self._state()
        if hasattr(self, "feature_names_in_"):
            arrays["features"] = self.feature_names_in_.astype(str)
        save_arrays(path, type(self).__name__, vars(self.settings_), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **params: Any) -> Self:
        """Read what :meth:`save` wrote. Parameters that were objects (a callable, an estimator) are passed again.

        Raises
        ------
        MissingFile
            There is no such file.
        InvalidInput
            The file is damaged or of another kind, or a parameter must be passed, or ``base_predictor`` is not what
            the file was saved with: another class, number of predictions, or other predictions at the data's mean.

        Warns
        -----
        UserWarning
            The file is of before this was kept, so that only the number of predictions was compared.
        """
        settings, arrays = load_arrays(path, cls.__name__, params)
        model = cls(**settings)
        model.settings_ = SimpleNamespace(**settings)
        model.n_features_in_, model.t_, model._seed_ = (int(arrays[name]) for name in ("n_features", "t", "seed"))
        model._losses_ = arrays["losses"]
        if "features" in arrays:
            model.feature_names_in_ = arrays["features"].astype(object)
        model.network_, model._inputs_ = model._build(model.settings_, model._seed_, None)
        model._restore(arrays)
        model.network_.restore(arrays)
        if model._inputs_ is not None:
            model._inputs_.check_same(arrays)
        return model

    def _state(self) -> dict[str, Array]:
        """What learning changes besides the networks."""
        return {} if self._inputs_ is None else self._inputs_.state()

    def _restore(self, arrays: Mapping[str, Array]) -> None:
        """Set it to a saved :meth:`_state`."""
        if self._inputs_ is not None:
            self._inputs_.restore(arrays)


def as_array(X: Any) -> Any:
    """A torch tensor of any device and floating type, with or without a graph, as an array; others as they are."""
    if not (hasattr(X, "detach") and hasattr(X, "is_meta")):
        return X
    if X.is_meta:
        raise InvalidInput("X is a tensor on the meta device, which has no numbers; give one with data.")
    plain = X.detach().cpu()
    return (plain.double() if plain.is_floating_point() else plain).numpy()
