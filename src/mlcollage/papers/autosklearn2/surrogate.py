"""Proposes the next pipeline: expected improvement under a forest (Hutter et al., LION 2011; section 2.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.ensemble import ExtraTreesRegressor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .space import Config, SearchSpace, config_id

FloatArray = NDArray[np.float64]


def log_losses(losses: ArrayLike) -> FloatArray:
    """Losses on a logarithmic scale; one that is not finite counts as the worst finite one."""
    y = np.asarray(losses, np.float64)
    finite = np.isfinite(y)
    y = np.where(finite, y, y[finite].max() if finite.any() else 1.0)
    return np.asarray(np.log(y - min(y.min(), 0.0) + 1e-3 * (np.ptp(y) or 1.0)), np.float64)


class ForestImprovement:
    r"""Proposes configurations from the losses of earlier ones.

    A forest of trees predicts the loss of a configuration, each tree for itself: mean :math:`\mu` and standard
    deviation :math:`\sigma` over trees. The proposal is the one with the largest

    .. math:: \mathrm{EI} = \sigma\,(z \Phi(z) + \varphi(z)), \qquad z = (L_\min - \mu) / \sigma

    among random configurations and neighbors of the best ones; neighbors of the largest EI are tried in turn, as a
    local search. Losses are put on a logarithmic scale first.

    Parameters
    ----------
    space
        Where configurations come from.
    n_random
        Random configurations that are looked at.
    n_local
        Best configurations whose neighbors are looked at.
    trees
        Trees of the forest.

    Examples
    --------
    >>> from mlcollage.papers.autosklearn2.space import Hyperparameter, SearchSpace
    >>> space = SearchSpace((Hyperparameter("x", low=0.0, high=1.0),))
    >>> rng = np.random.default_rng(0)
    >>> tried = [{"x": x} for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    >>> proposal = ForestImprovement(space).propose(tried, [(c["x"] - 0.7) ** 2 for c in tried], rng)
    >>> 0.4 < proposal["x"] < 1.0
    True
    """

    def __init__(self, space: SearchSpace, *, n_random: int = 200, n_local: int = 5, trees: int = 16) -> None:
        self.space = space
        self.n_random = checks.integer("n_random", n_random, least=1)
        self.n_local = checks.integer("n_local", n_local, least=0)
        self.trees = checks.integer("trees", trees, least=2)

    def propose(self, configs: Sequence[Config], losses: ArrayLike, rng: np.random.Generator) -> Config:
        """The most promising configuration that was not tried; a random one if there are fewer than three losses."""
        y = np.asarray(losses, np.float64)
        if len(configs) != len(y):
            raise InvalidInput(f"there are {len(configs)} configurations and {len(y)} losses; they must be as many.")
        if len(y) < 3:
            return self.space.sample(rng)
        forest, best = self._fit(configs, y, rng)
        order = np.argsort(y, kind="stable")[: self.n_local]
        pool = [self.space.sample(rng) for _ in range(self.n_random)]
        pool += [near for k in order for near in self.space.neighbors(configs[k], rng, 12)]
        gain = self._improvement(forest, pool, best)
        for _ in range(3):  # local search around the most promising
            top = pool[int(gain.argmax())]
            near = self.space.neighbors(top, rng, 12)
            pool, gain = [*pool, *near], np.concatenate([gain, self._improvement(forest, near, best)])
        tried = {config_id(c) for c in configs}
        for k in np.argsort(-gain, kind="stable"):
            if config_id(pool[int(k)]) not in tried:
                return pool[int(k)]
        return self.space.sample(rng)

    def rank(
        self, configs: Sequence[Config], losses: ArrayLike, others: Sequence[Config], rng: np.random.Generator
    ) -> int:
        """Number of the most promising of ``others``: for a search among given configurations."""
        forest, best = self._fit(configs, np.asarray(losses, np.float64), rng)
        return int(self._improvement(forest, others, best).argmax())

    def _fit(self, configs: Sequence[Config], y: FloatArray, rng: np.random.Generator) -> tuple[Any, float]:
        x = np.array([self.space.vector(c) for c in configs])
        target = log_losses(y)
        forest = ExtraTreesRegressor(
            self.trees, max_features=5 / 6, bootstrap=True, n_jobs=1, random_state=int(rng.integers(2**31))
        ).fit(x, target)
        return forest, float(target.min())

    def _improvement(self, forest: Any, configs: Sequence[Config], best: float) -> FloatArray:
        x = np.array([self.space.vector(c) for c in configs], np.float32)
        by_tree = np.array([tree.predict(x) for tree in forest.estimators_])
        mean, spread = by_tree.mean(0), by_tree.std(0) + 1e-9
        z = (best - mean) / spread
        return np.asarray(spread * (z * norm.cdf(z) + norm.pdf(z)))
