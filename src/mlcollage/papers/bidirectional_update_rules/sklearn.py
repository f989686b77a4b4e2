"""A scikit-learn classifier that learns by a genome."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.infer import tensor_file

from .genome import Genome, GenomeSettings, as_genome
from .health import LearningHealth, say
from .network import BlurNetwork, Weights

Array = NDArray[Any]
_KIND = "BlurClassifier"
_TRIED = 1000  # rows that a network is tried on
_RECENT = 256  # rows that partial_fit keeps for the statistics of predictions
_HORIZON = 40  # steps, of a genome that does not say how many it was trained for


class BlurClassifier(ClassifierMixin, BaseEstimator):
    """A dense network trained by a learned update rule, in a few steps and without gradients.

    Parameters
    ----------
    genome
        A :class:`Genome`, a file, or the name of one that comes with the package.
    hidden_layer_sizes
        Neurons of the hidden layers; a number stands for one layer.
    max_steps
        Steps of learning in ``fit``, one batch each; default: those that the genome was trained for, which is where it
        is best. Beyond them accuracy may fall.
    batch_size
        Rows of a step; a smaller set is one batch. A last batch of a single row joins the one before.
    keep_best
        Whether ``fit`` tries the network on up to 1,000 training rows after steps 1, 2, 3, 4, 5, 6, 7, 8, 10, 12 and so
        on, and keeps the synapses that did best: rules have no loss that would have to fall, and may overshoot.
    standardize
        Whether features get zero mean and unit deviation, by the rows of ``fit`` or of the first ``partial_fit``.
    random_state
        Of initial synapses and of the order of rows.

    Attributes
    ----------
    classes_
        Labels, sorted.
    network_
        The :class:`BlurNetwork`.
    best_step_
        The step of ``fit`` whose synapses were kept.
    history_
        Share of right predictions on each batch before it was learned from.
    health_
        A :class:`~mlcollage.papers.bidirectional_update_rules.health.LearningHealth` since the last ``fit``: accuracy
        at first, at its peak and at last, saturated and dead units, and advice, of which there is a warning too.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Notes
    -----
    Predictions are normalized by statistics of the training rows, so that a row's does not depend on the others; of the
    last 256 rows or more in ``partial_fit``, which keeps (and saves) these.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> model = BlurClassifier("digits-2s", max_steps=20, random_state=0).fit(X[::2], y[::2])
    >>> bool(model.score(X[1::2], y[1::2]) > 0.8)
    True
    """

    def __init__(
        self,
        genome: Genome | str | os.PathLike[str] = "digits-2s",
        hidden_layer_sizes: int | tuple[int, ...] = (32,),
        *,
        max_steps: int | None = None,
        batch_size: int = 64,
        keep_best: bool = True,
        standardize: bool = True,
        random_state: Any = None,
    ) -> None:
        self.genome = genome
        self.hidden_layer_sizes = hidden_layer_sizes
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.keep_best = keep_best
        self.standardize = standardize
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Learn anew from rows (n, features) with labels of any kind (n,).

        Raises
        ------
        InvalidInput
            If there are fewer than two classes, or too few rows for statistics.
        """
        X, y = self._checked(X, y, reset=True)
        checks.integer("batch_size", self.batch_size, least=1)
        rng = check_random_state(self.random_state)
        self._begin(X, unique_labels(y), rng)
        steps = self.max_steps
        if steps is None:
            steps = int(self.network_.card.get("horizon", _HORIZON))
        x, labels = self._tensors(X), self._encoded(y)
        parts: list[Array] = []
        tried = rng.permutation(len(X))[:_TRIED]
        best, check, kept = -1.0, 1, self.network_.weights
        for step in range(1, checks.integer("max_steps", steps, least=1) + 1):
            if not parts:
                parts = _batches(rng.permutation(len(X)), self.batch_size)
            rows = parts.pop(0)
            self.history_.append(self.network_.learn(x[rows], labels[rows]).accuracy)
            if step == steps or (self.keep_best and step >= check):
                check = max(step + 1, int(1.25 * step))
                self.network_.calibrate(x[tried])
                accuracy = float((self.network_(x[tried]).argmax(1) == labels[tried]).float().mean())
                if accuracy > best or not self.keep_best:
                    best, self.best_step_ = accuracy, step
                    kept = Weights(*(tuple(w.clone() for w in part) for part in self.network_.weights))
        self.network_.weights = kept
        self._finish(x, kept=self.keep_best)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """One pass over more rows, in batches, from where learning stands.

        A batch of few rows is a whole step on their mean: collect some tens of rows, of all classes, before each call.

        Parameters
        ----------
        X, y
            Rows and labels.
        classes
            All labels that will ever come; needed at the first call.

        Raises
        ------
        InvalidInput
            If ``classes`` is missing at the first call, differs later, or lacks a label of ``y``.
        """
        first = not hasattr(self, "network_")
        if first and classes is None:
            raise InvalidInput(
                "classes must be given at the first call of partial_fit: all labels that will ever come."
            )
        X, y = self._checked(X, y, reset=first)
        if first:
            self._begin(X, unique_labels(classes), check_random_state(self.random_state))
        elif classes is not None and not np.array_equal(unique_labels(classes), self.classes_):
            raise InvalidInput(
                f"classes={unique_labels(classes).tolist()} differ from the first call's {self.classes_.tolist()}."
            )
        labels = self._encoded(y)
        x = self._tensors(X)
        for rows in _batches(np.arange(len(X)), self.batch_size):
            self.history_.append(self.network_.learn(x[rows], labels[rows]).accuracy)
        self._finish(x)
        return self

    def decision_function(self, X: Any) -> Array:
        """Logits (n, classes); of two classes, the difference, (n,)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Array:
        """Softmax of the logits, (n, classes). They rank classes; the rule knows no loss that would calibrate them."""
        return np.asarray(torch.softmax(torch.from_numpy(self._logits(X)), dim=1).numpy())

    def predict(self, X: Any) -> Array:
        """The class with the largest logit, (n,)."""
        best = self._logits(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    # ------------------------------------------------------------------ inside

    def _checked(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        X, y = validate_data(self, X, y, reset=reset, dtype=np.float64)
        check_classification_targets(y)
        return X, y

    def _begin(self, X: Array, classes: Array, rng: np.random.RandomState) -> None:
        genome = as_genome(self.genome)
        if genome.settings.norm != "none" and len(X) < 2:
            raise InvalidInput(
                "one sample (n_samples = 1) has no statistics; give at least 2, or a genome with norm='none'."
            )
        if len(classes) < 2:
            raise InvalidInput(f"a classifier needs at least two classes; y has one class: {classes[0]}.")
        self.classes_ = classes
        self.center_, spread = X.mean(axis=0), X.std(axis=0)
        # a feature that does not vary here would be blown up by rounding
        self.spread_ = np.where(spread > 1e-9 * (1 + np.abs(self.center_)), spread, 1.0)
        self.network_ = self._network(genome, seed=int(rng.randint(np.iinfo(np.int32).max)))
        self._told = set[str]()
        self.history_: list[float] = []
        self._recent = torch.zeros(0, X.shape[1])

    def _network(self, genome: Genome, seed: int = 0) -> BlurNetwork:
        hidden = self.hidden_layer_sizes
        hidden = (int(hidden),) if isinstance(hidden, int | np.integer) else tuple(hidden)
        network = BlurNetwork((self.n_features_in_, *hidden, len(self.classes_)), genome, seed=seed)
        network._told = None  # advice is given once, when learning has ended
        return network

    def _finish(self, x: torch.Tensor, *, kept: bool = False) -> None:
        """Statistics for predictions, and the health."""
        recent = x if len(x) >= _RECENT else torch.cat([self._recent, x])[-_RECENT:]
        self._recent = recent[-_RECENT:]
        self.network_.calibrate(recent)
        self.health_ = self.network_.health(kept=kept)
        say(self.health_.advice, self._told)

    def _tensors(self, X: Array) -> torch.Tensor:
        if self.standardize:
            # clipped: in partial_fit, later rows may be far from the first ones
            X = np.clip((X - self.center_) / self.spread_, -1e4, 1e4)
        return torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))

    def _encoded(self, y: Array) -> torch.Tensor:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise InvalidInput(f"y has the label {unknown[0]}, which is not among classes {self.classes_.tolist()}.")
        return torch.from_numpy(np.searchsorted(self.classes_, y).astype(np.int64))

    def _logits(self, X: Any) -> Array:
        check_is_fitted(self, "network_")
        X = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.inference_mode():
            return np.asarray(self.network_(self._tensors(X)).numpy())

    # ------------------------------------------------------------------ disk

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the fitted classifier to a safetensors file, its genome included."""
        check_is_fitted(self, "network_")
        labels = self.classes_
        if labels.dtype == object and not all(isinstance(label, str) for label in labels):
            raise InvalidInput("only labels that are numbers, booleans or strings can be saved.")
        genome = self.network_.genome
        return tensor_file.save(
            path,
            _KIND,
            {
                "classes": labels.tolist(), "kind": labels.dtype.str, "history": self.history_, "card": genome.card,
                "settings": vars(genome.settings), "numbers": genome.numbers, "state": dict(self.network_.state_dict()),
                "center": torch.from_numpy(self.center_), "spread": torch.from_numpy(self.spread_),
                "hidden": [layer.outputs for layer in self.network_.path.layers[:-1]], "recent": self._recent,
                "health": asdict(self.health_), "batch_size": self.batch_size, "max_steps": self.max_steps,
                "standardize": self.standardize, "keep_best": self.keep_best,
                "names": [str(n) for n in getattr(self, "feature_names_in_", ())],
            },
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        MissingFile, InvalidInput
            If there is no such file, or it is damaged or holds something else.
        """
        f = tensor_file.load(path, _KIND)
        genome = Genome(GenomeSettings(**f["settings"]), f["numbers"], f["card"])[0]
        own = {name: f[name] for name in ("batch_size", "max_steps", "standardize", "keep_best")}
        model = cls(genome, tuple(f["hidden"]), **own)
        model.classes_ = np.array(f["classes"], dtype=f["kind"])
        model.center_, model.spread_ = f["center"].numpy(), f["spread"].numpy()
        model.n_features_in_, model.history_ = len(model.center_), list(f["history"])
        if f["names"]:
            model.feature_names_in_ = np.array(f["names"], dtype=object)
        model.health_ = LearningHealth(**{**f["health"], "advice": tuple(f["health"]["advice"])})
        model._recent, model._told = f["recent"], set[str]()
        model.network_ = model._network(genome)
        model.network_.load_state_dict(f["state"])
        return model


def _batches(order: Array, size: int) -> list[Array]:
    """Parts of an order; a last single row joins the part before it."""
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    if len(parts) > 1 and len(parts[-1]) < 2:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts
