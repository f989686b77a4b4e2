r"""From features to what a network reads: base predictions :math:`p_0` as logits, and side information :math:`z`.

Side information is always the online-standardized sample :math:`s = (x - \bar x) / (\hat\sigma_x + o)` with Welford's
running mean and deviation, the sample included. The official MNIST example has the offset :math:`o = 1` on pixels
from 0 to 255; with the default :math:`o = 0` results do not depend on the features' units. A value far outside of what
came before it counts as a bounded number of deviations, so that a broken sensor's one wrong reading cannot make
everything else look alike. Base predictions are :math:`\sigma(s)`, or the sample rescaled to [0, 1], or the
probabilities of any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from . import _kernels
from ._gates import writable

Array = NDArray[Any]
BasePredictor = str | Callable[[Array], Array] | Any
_SAME = 1e-3  # difference of probabilities that another version or machine may make


def check_base_predictor(predictor: BasePredictor) -> None:
    """Refuse what is neither a known name, nor callable, nor a fitted estimator with ``predict_proba``."""
    if isinstance(predictor, str):
        checks.choice("base_predictor", predictor, ("standardize", "minmax"))
    elif hasattr(predictor, "predict_proba"):
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted

        try:
            check_is_fitted(predictor)
        except NotFittedError as error:
            raise InvalidInput(
                f"base_predictor {type(predictor).__name__} is not fitted: fit it on data of its own first, and wrap "
                "it in sklearn.frozen.FrozenEstimator so that it stays fitted when this estimator is cloned."
            ) from error
    elif not callable(predictor):
        raise InvalidInput(
            "base_predictor must be 'standardize', 'minmax', a callable X -> probabilities, or a fitted estimator with "
            f"predict_proba; got {type(predictor).__name__}."
        )


def kind_of(predictor: BasePredictor) -> str:
    """The name, or the class: of a method its object's, of a frozen estimator the one within."""
    if isinstance(predictor, str):
        return predictor
    owner: Any = getattr(predictor, "__self__", predictor)
    if type(owner).__name__ == "FrozenEstimator":
        owner = owner.estimator
    return type(owner).__name__


def bounds(max_deviation: float | None, memory: int | None) -> tuple[float, float]:
    """Both as the loops take them, checked; None, no bound, is infinity."""
    return (
        np.inf if max_deviation is None else checks.positive("max_deviation", max_deviation),
        np.inf if memory is None else float(checks.integer("memory", memory, least=2)),
    )


class Inputs:
    """Online standardization and base predictions, with their running state.

    Parameters
    ----------
    n_features : int
        Width of a sample.
    predictor : str, callable or estimator
        See :func:`check_base_predictor`.
    offset : float
        Added to the standard deviation; where both are 0 the feature is 0.
    bias, limit : float
        Logit of the layers' bias, and largest logit of a base prediction.
    dtype : numpy dtype
        Of the arrays made.
    max_deviation : float or None, default 10
        Bound of a standardized value, and of what moves the moments (:func:`_kernels._take_in`). None is no bound.
    memory : int or None, default None
        Samples that the running moments remember.
    """

    def __init__(
        self,
        n_features: int,
        predictor: BasePredictor,
        offset: float,
        bias: float,
        limit: float,
        dtype: Any,
        max_deviation: float | None = 10.0,
        memory: int | None = None,
    ) -> None:
        check_base_predictor(predictor)
        self.most, self.memory = bounds(max_deviation, memory)
        self.offset = checks.real("std_offset", offset, least=0)
        self.predictor, self.bias, self.limit, self.dtype = predictor, bias, limit, np.dtype(dtype)
        self.moments = np.zeros((3, n_features))  # counts, running means, and sums of squared deviations
        self.n_base: int | None = n_features if isinstance(predictor, str) else None

    def __call__(self, x: Array, *, learn: bool) -> tuple[Array, Array]:
        """``base (n, 1 + n_base)`` and ``side (n, n_features)``; ``learn`` updates the moments; NaN is missing."""
        n, d = x.shape
        base, side = np.empty((n, d + 1), self.dtype), np.empty((n, d), self.dtype)
        x = np.require(x, np.float64, ["C", "W"])  # a read-only array would be a type of its own to the compiler
        within = (self.offset, self.limit, self.bias, self.most, self.memory)
        _kernels.standardize(x, self.moments, learn, *within, base, side)
        if isinstance(self.predictor, str) and self.predictor == "standardize":
            return base, side  # logit(sigmoid(s)) = s: the standardized sample is its own base logit
        p = self._probabilities(x)
        base = np.empty((n, p.shape[1] + 1), self.dtype)
        base[:, 0] = self.bias
        base[:, 1:] = np.clip(logit(p), -self.limit, self.limit)
        return base, side

    def _probabilities(self, x: Array) -> Array:
        if isinstance(self.predictor, str):
            low = x.min(axis=1, keepdims=True)  # (n, 1): each sample is rescaled by itself
            span = x.max(axis=1, keepdims=True) - low
            return np.where(span > 0, (x - low) / np.where(span > 0, span, 1), 0.5)
        call = getattr(self.predictor, "predict_proba", self.predictor)
        p = np.asarray(call(x), np.float64)
        p = p[:, None] if p.ndim == 1 else p  # (n, predictions)
        if p.ndim != 2 or len(p) != len(x):
            raise InvalidInput(
                f"base_predictor returned shape {p.shape} for {len(x)} samples; expected ({len(x)}, n_predictions)."
            )
        if self.n_base is None:
            self.n_base = p.shape[1]
        if p.shape[1] != self.n_base:
            raise InvalidInput(
                f"base_predictor returned {p.shape[1]} predictions per sample, but {self.n_base} at the first call."
            )
        if not np.isfinite(p).all() or p.min() < 0 or p.max() > 1:
            raise InvalidInput("base_predictor returned values outside [0, 1]; it must return probabilities.")
        return p

    def probe(self, x: Array) -> int:
        """Number of base predictions, found by trying one sample if it is not known yet."""
        if self.n_base is None:
            self._probabilities(np.ascontiguousarray(x[:1], np.float64))
        assert self.n_base is not None
        return self.n_base

    def widen(self, extra: int) -> None:
        """Append ``extra`` features."""
        self.moments = np.pad(self.moments, ((0, 0), (0, extra)))
        self.n_base = self.moments.shape[1]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(writable(state))

    def state(self) -> dict[str, Array]:
        """The running moments, and what tells the base predictor from another one."""
        state = {"inputs.moments": self.moments, "inputs.n_base": np.array(self.n_base)}
        state["inputs.predictor"] = np.array(kind_of(self.predictor))
        return state if isinstance(self.predictor, str) else state | {"inputs.answer": self._answer()}

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Set the running moments to a saved :meth:`state`."""
        self.moments = arrays["inputs.moments"].copy()
        self.n_base = int(arrays["inputs.n_base"])

    def _answer(self) -> Array:
        """What the base predictor, an object, says at the mean of what was seen, (n_base,)."""
        call: Any = getattr(self.predictor, "predict_proba", self.predictor)
        return np.asarray(call(self.moments[1:2].copy()), np.float64).reshape(-1)

    def check_same(self, arrays: Mapping[str, Array]) -> None:
        """Refuse a base predictor that is not the one that a saved :meth:`state`, restored here, was made with.

        Files of before its kind was kept say only how many predictions it makes.
        """
        known = "inputs.predictor" in arrays
        was, now = str(arrays["inputs.predictor"]) if known else "", kind_of(self.predictor)
        again = "pass the one that the file was saved with, load(path, base_predictor=...)."
        if known and was != now:
            raise InvalidInput(f"base_predictor is {now!r}, and the file was saved with {was!r}: {again}")
        if isinstance(self.predictor, str):
            return
        try:
            answer = self._answer()
        except Exception as error:
            raise InvalidInput(
                f"base_predictor {now} cannot predict a sample of the file's {self.moments.shape[1]} features "
                f"({error}): {again}"
            ) from error
        if len(answer) != self.n_base:
            raise InvalidInput(
                f"base_predictor {now} makes {len(answer)} predictions per sample, and the file was saved with "
                f"{self.n_base}: {again}"
            )
        if not known:
            warnings.warn(
                f"The file does not say what its base_predictor was: only that {now} makes as many predictions was "
                "checked; save it again to keep more.",
                UserWarning,
                stacklevel=3,
            )
        elif not np.allclose(answer, arrays["inputs.answer"], rtol=0, atol=_SAME, equal_nan=True):
            far = float(np.nanmax(np.abs(answer - arrays["inputs.answer"])))
            raise InvalidInput(
                f"base_predictor {now} gives other probabilities than when the file was saved (by up to {far:.2g} at "
                f"the mean of the data), as one that was fitted again does: {again}"
            )
