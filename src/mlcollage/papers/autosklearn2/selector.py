"""Picks a policy for a task that is known by its numbers of rows and columns only (section 4, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.ensemble import RandomForestClassifier

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .official import OfficialSelectorData

FloatArray = NDArray[np.float64]
Normalization = Literal["all", "all1", "binary", "binary1", "y", "rank", "none"]
_NORMALIZATIONS = ("all", "all1", "binary", "binary1", "y", "rank", "none")


class PolicySelector:
    r"""Pairwise forests that vote for a policy.

    For each pair i < j a random forest learns whether :math:`L_i < L_j` from the numbers of columns and rows; a task
    weighs :math:`|\tilde L_i - \tilde L_j|`, the difference of normalized losses. Each forest votes for one of its
    pair. Policies that lead together vote again among themselves, until that changes nothing; then a fixed order
    decides. For a task that is larger than every known one (no known task has at least as many columns and rows), the
    first of that order is taken.

    Parameters
    ----------
    n_estimators
        Trees of each forest.
    max_depth
        0: the weighted majority, whatever the task.
    min_samples_leaf, min_samples_split, max_features, bootstrap
        Of the trees. The defaults are those of the official selector for balanced error.
    normalization
        What losses are divided by for the weights: the range of all policies (``"all"``), of the pair (``"binary"``),
        of the losses themselves (``"y"``); ``"all1"`` and ``"binary1"`` take 1 for the largest loss; ``"rank"``:
        difference of ranks; ``"none"``: every task weighs 1.
    voting
        ``"hard"``: a vote each; ``"soft"``: the forest's probability.
    order
        Numbers of the policies, the first to be taken first; as they are numbered by default.
    random_state
        Seeds the forests.

    Attributes
    ----------
    n_policies_ : int
        Number of policies.
    weights_ : ndarray of shape (pairs, tasks)
        Weights of the tasks; NaN where a policy of the pair has no loss.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> size = np.column_stack([rng.integers(5, 50, 80), rng.integers(100, 10_000, 80)])
    >>> small = size[:, 1] < 2000
    >>> losses = np.column_stack([np.where(small, 0.2, 0.3), np.where(small, 0.3, 0.2)])
    >>> selector = PolicySelector(20, max_features=2, random_state=0).fit(size, losses)
    >>> selector.predict([[10, 500], [10, 9000], [1000, 10**6]]).tolist()
    [0, 1, 0]
    >>> selector.is_fallback([[1000, 10**6]]).tolist()
    [True]
    """

    def __init__(
        self,
        n_estimators: int = 500,
        *,
        max_depth: int | None = 6,
        min_samples_leaf: int = 9,
        min_samples_split: int = 19,
        max_features: int = 1,
        bootstrap: bool = False,
        normalization: Normalization = "y",
        voting: Literal["hard", "soft"] = "hard",
        order: Sequence[int] | None = None,
        random_state: Any = 0,
    ) -> None:
        self.n_estimators = checks.integer("n_estimators", n_estimators, least=1)
        self.max_depth = max_depth
        self.min_samples_leaf = min_samples_leaf
        self.min_samples_split = min_samples_split
        self.max_features = max_features
        self.bootstrap = bootstrap
        self.normalization = checks.choice("normalization", normalization, _NORMALIZATIONS)
        self.voting = checks.choice("voting", voting, ("hard", "soft"))
        self.order = order
        self.random_state = random_state

    @classmethod
    def of_official(cls, data: OfficialSelectorData, **changes: Any) -> Self:
        """Fit on the official data with the official settings; ``changes`` replace some of them.

        Examples
        --------
        >>> from mlcollage.papers.autosklearn2.shipped import official_selector_data
        >>> data = official_selector_data()
        >>> selector = PolicySelector.of_official(data, n_estimators=20)
        >>> str(data.policies[selector.predict([[10, 300]])[0]])
        '10-fold CV, full budget'
        """
        c = data.configuration
        given: dict[str, Any] = {
            "max_depth": int(c["max_depth"]),
            "min_samples_leaf": int(c["min_samples_leaf"]),
            "min_samples_split": int(c["min_samples_split"]),
            "max_features": int(c["max_features"]),
            "bootstrap": c["bootstrap"] in (True, "True"),
            "normalization": "none" if c["normalization"] == "None" else c["normalization"],
            "voting": c["prediction"],
            "order": data.order,
        }
        return cls(**{**given, **changes}).fit(data.meta_features, data.losses, data.minima, data.maxima)

    def fit(
        self,
        meta_features: ArrayLike,
        losses: ArrayLike,
        minima: ArrayLike | None = None,
        maxima: ArrayLike | None = None,
    ) -> Self:
        """Learn from tasks.

        Parameters
        ----------
        meta_features
            ``(tasks, 2)``: numbers of columns and rows.
        losses
            ``(tasks, policies)``; NaN where a policy failed.
        minima, maxima
            The same shape: smallest and largest loss seen under each policy, for the normalizations ``all`` and
            ``binary``; the losses themselves by default.
        """
        x, y = np.asarray(meta_features, np.float64), np.asarray(losses, np.float64)
        if x.ndim != 2 or x.shape[1] != 2 or y.ndim != 2 or len(x) != len(y) or y.shape[1] < 2:
            raise InvalidInput(
                f"meta_features are {x.shape} and losses {y.shape}; expected (tasks, 2) and (tasks, policies), two "
                "policies at least."
            )
        if not np.isfinite(x).all():
            raise InvalidInput("meta_features have missing or infinite values; give columns and rows of every task.")
        if len(x) == 0 or (x < 0).any():
            raise InvalidInput("meta_features must be numbers of columns and rows of one task at least.")
        if np.isinf(y).any() or np.isnan(y).all(1).any():
            raise InvalidInput("losses must be finite, NaN where a policy failed, and every task needs one at least.")
        self.n_policies_ = y.shape[1]
        self._order = list(range(self.n_policies_)) if self.order is None else [int(k) for k in self.order]
        if sorted(self._order) != list(range(self.n_policies_)):
            raise InvalidInput(f"order must hold every number from 0 to {self.n_policies_ - 1} once, not {self.order}.")
        if self.normalization == "rank":  # a policy that failed shares the last rank
            y = np.where(np.isnan(y), np.nanmax(y, axis=1, keepdims=True), y)
        low = y if minima is None else np.asarray(minima, np.float64)
        high = y if maxima is None else np.asarray(maxima, np.float64)
        self._known = x
        self.pairs_ = list(combinations(range(self.n_policies_), 2))
        self.weights_ = np.array([self._weights(y, low, high, i, j) for i, j in self.pairs_])
        seeds = np.random.default_rng(self.random_state).integers(2**31, size=len(self.pairs_))
        self._models = [
            self._model(x, y[:, i], y[:, j], w, int(seed))
            for (i, j), w, seed in zip(self.pairs_, self.weights_, seeds, strict=True)
        ]
        return self

    def _weights(self, y: FloatArray, low: FloatArray, high: FloatArray, i: int, j: int) -> FloatArray:
        """How much each task counts for a pair."""
        how, pair = self.normalization, [i, j]
        gone = np.isnan(y[:, i]) | np.isnan(y[:, j])
        if how == "none":
            weights = np.ones(len(y))
        elif how == "rank":
            ranks = rankdata(y, axis=1)
            weights = np.abs(ranks[:, i] - ranks[:, j])
        else:
            if how == "y":
                low, high, columns = y, y, list(range(y.shape[1]))
            else:
                columns = pair if how.startswith("binary") else list(range(y.shape[1]))
            least = np.nanmin(low[:, columns], axis=1)
            most = np.ones(len(y)) if how.endswith("1") else np.nanmax(high[:, columns], axis=1)
            span = most - least
            weights = np.abs(y[:, i] - y[:, j]) / np.where(span == 0, 1.0, span)
        return np.where(gone, np.nan, weights)

    def _model(self, x: FloatArray, a: FloatArray, b: FloatArray, weights: FloatArray, seed: int) -> Any:
        """A forest, or the constant 0 or 1: whether the first policy of the pair wins."""
        kept = ~np.isnan(weights)
        wins, w = (a < b)[kept], weights[kept]
        if not len(wins) or len(np.unique(wins)) == 1:
            return int(wins[0]) if len(wins) else 0
        if self.max_depth == 0:
            return int(w[wins].sum() > w[~wins].sum())
        return RandomForestClassifier(
            self.n_estimators,
            max_depth=self.max_depth,
            min_samples_leaf=self.min_samples_leaf,
            min_samples_split=self.min_samples_split,
            max_features=self.max_features,
            bootstrap=self.bootstrap,
            random_state=seed,
        ).fit(x[kept], wins.astype(np.int64), sample_weight=w)

    def is_fallback(self, meta_features: ArrayLike) -> NDArray[np.bool_]:
        """Whether a task is larger than every known one, so that nothing is known about it."""
        x = np.asarray(meta_features, np.float64)
        return np.asarray([not (self._known >= row).all(axis=1).any() for row in x], bool)

    def predict_proba(self, meta_features: ArrayLike) -> FloatArray:
        """Shares of the votes ``(tasks, policies)``; for a fallback they only show the order."""
        x = self._checked(meta_features)
        labels, odds = np.zeros((len(self.pairs_), len(x)), np.int64), np.zeros((len(self.pairs_), len(x)))
        for k, model in enumerate(self._models):
            if isinstance(model, int):
                labels[k], odds[k] = model, model
            else:
                odds[k] = model.predict_proba(x)[:, 1]
                labels[k] = model.predict(x)
        found = count_votes(labels, odds if self.voting == "soft" else labels, self._order)
        fallback = self.is_fallback(x)
        shares = np.arange(self.n_policies_ - 1, -1, -1) / len(self.pairs_)
        for policy, share in zip(self._order, shares, strict=True):
            found[fallback, policy] = share
        return found

    def predict(self, meta_features: ArrayLike) -> NDArray[np.int64]:
        """Number of the policy for each task."""
        return self.predict_proba(meta_features).argmax(1)

    def _checked(self, meta_features: ArrayLike) -> FloatArray:
        if not hasattr(self, "n_policies_"):
            raise InvalidInput("the selector is not fitted; call fit(meta_features, losses) first.")
        x = np.asarray(meta_features, np.float64)
        if x.ndim != 2 or x.shape[1] != 2 or not np.isfinite(x).all():
            raise InvalidInput(f"meta_features must be finite numbers (tasks, 2): columns and rows; got {x.shape}.")
        return x


def count_votes(labels: NDArray[np.int64], votes: ArrayLike, order: Sequence[int]) -> FloatArray:
    """Shares of votes, ties resolved (Algorithm 2).

    Parameters
    ----------
    labels
        ``(pairs, tasks)``: 1 where the first policy of the pair wins. Pairs are (0, 1), (0, 2), ..., as
        ``itertools.combinations`` gives them.
    votes
        The same shape: what the first policy gets, from 0 to 1; the second gets the rest. ``labels``, or probabilities.
    order
        Which policy wins where a tie stays.

    Returns
    -------
    ndarray of shape (tasks, policies)
        TableRows sum to 1.

    Examples
    --------
    >>> labels = np.array([[1], [0], [1]])  # 0 beats 1, 2 beats 0, 1 beats 2: all tied
    >>> count_votes(labels, labels, [2, 0, 1]).round(2).tolist()
    [[0.29, 0.29, 0.43]]
    """
    first = np.asarray(votes, np.float64)
    pairs = list(combinations(range(len(order)), 2))
    count = np.zeros((labels.shape[1], len(order)))
    for (i, j), vote in zip(pairs, first, strict=True):
        count[:, i] += vote
        count[:, j] += 1 - vote
    for row, wins in zip(count, labels.T, strict=True):
        tied = np.flatnonzero(row == row.max())
        while len(tied) > 1:
            for (i, j), won in zip(pairs, wins, strict=True):
                if i in tied and j in tied:
                    row[i if won else j] += 1
            still = np.flatnonzero(row == row.max())
            if len(still) == len(tied):  # voting again would change nothing
                row[next(k for k in order if k in still)] += 1
                break
            tied = still
    return count / count.sum(1, keepdims=True)
