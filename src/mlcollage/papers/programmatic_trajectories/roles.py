"""Roles of agents that may change places: a fixed order for networks with weights of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.base import BaseEstimator

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .labeling import tracks

__all__ = ["RoleAssigner"]


class RoleAssigner(BaseEstimator):
    r"""Order agents by the role they play, so that slot k always means the same.

    Each role is a normal distribution of places relative to the team's mean. The agents of a sequence get different
    roles, by the assignment (Kuhn-Munkres) with the highest likelihood of all their seen frames; roles and
    assignments are found in turn (Bialkowski et al. 2014; Le et al. 2017 for multi-agent imitation):

    .. math::

        \max_{\pi_n} \sum_k \sum_t \log N(x_{n t k} - \bar x_{n t};\ \mu_{\pi_n(k)}, \Sigma_{\pi_n(k)})

    Fit it on training sequences only.

    Parameters
    ----------
    centered
        Places are relative to the mean of the seen agents of a frame (default); False takes places on the court.
    max_iter
        Rounds at most; the first starts from the order that the agents have.

    Attributes
    ----------
    means_ : ndarray of shape (K, D)
    covariances_ : ndarray of shape (K, D, D)
    log_likelihood_ : list of float
        Mean of a seen frame of an agent, after each round; it never falls.

    Examples
    --------
    >>> spots = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    >>> rng = np.random.default_rng(0)
    >>> x = spots + rng.normal(size=(40, 20, 3, 2))
    >>> mixed = np.stack([s[:, rng.permutation(3)] for s in x])
    >>> made = RoleAssigner().fit_transform(mixed)
    >>> made.mean((0, 1)).std(0).round().tolist() == x.mean((0, 1)).std(0).round().tolist()
    True
    """

    def __init__(self, *, centered: bool = True, max_iter: int = 50) -> None:
        self.centered = centered
        self.max_iter = max_iter

    def fit(self, X: NDArray, y: Any = None, *, mask: NDArray | None = None) -> RoleAssigner:
        """Find roles of tracks (N, T, K, D).

        Raises
        ------
        InvalidInput
            If there are fewer than two agents, or one slot holds no position.
        """
        place, seen = self._places(X, mask)
        n, _, k, d = place.shape
        if k < 2 or not seen.any((0, 1)).all():
            raise InvalidInput(f"roles need two agents at least and positions in each slot; got tracks {place.shape}.")
        rounds = checks.integer("max_iter", self.max_iter, least=1)
        spread = np.cov(place[seen].T).reshape(d, d)
        floor = 1e-6 * np.trace(spread) / d * np.eye(d) + 1e-12 * np.eye(d)
        order = np.tile(np.arange(k), (n, 1))  # the role of each agent
        self.log_likelihood_: list[float] = []
        for _ in range(rounds):
            self._roles(place, seen, order, floor)
            fit = self._fit(place, seen)
            new = _assigned(fit)
            total = float(np.take_along_axis(fit, new[..., None], 2).sum() / seen.sum())
            self.log_likelihood_.append(total)
            if (new == order).all():
                break
            order = new
        return self

    def assign(self, X: NDArray, mask: NDArray | None = None) -> NDArray[np.int64]:
        """The role of each agent of each sequence, (N, K); agents that are never seen get those that are left."""
        if not hasattr(self, "means_"):
            raise InvalidInput("the roles are not fitted; call fit(X) first.")
        place, seen = self._places(X, mask)
        if place.shape[2:] != self.means_.shape:
            raise InvalidInput(f"roles are of {self.means_.shape} agents and coordinates; got tracks {place.shape}.")
        return _assigned(self._fit(place, seen))

    def transform(self, X: NDArray, mask: NDArray | None = None) -> NDArray[np.float64]:
        """Tracks with agents in the order of roles, NaN where they were not seen."""
        roles = self.assign(X, mask)
        x, seen, _ = tracks(X, mask)
        order = np.argsort(roles, 1)  # the agent of each role
        return np.take_along_axis(np.where(seen[..., None], x, np.nan), order[:, None, :, None], 2)

    def fit_transform(self, X: NDArray, y: Any = None, *, mask: NDArray | None = None) -> NDArray[np.float64]:
        """:meth:`fit`, then :meth:`transform`."""
        return self.fit(X, mask=mask).transform(X, mask)

    def _places(self, X: NDArray, mask: NDArray | None) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        x, seen, single = tracks(X, mask)
        if single:
            raise InvalidInput(f"roles are of tracks (N, T, K, D); got {np.shape(X)}.")
        if not self.centered:
            return np.where(seen[..., None], x, 0.0), seen
        there = seen[..., None]
        mean = np.where(there, x, 0.0).sum(2, keepdims=True) / np.maximum(there.sum(2, keepdims=True), 1)
        return np.where(there, x - mean, 0.0), seen

    def _roles(self, place: NDArray, seen: NDArray, order: NDArray, floor: NDArray) -> None:
        """Mean and covariance of each role, of the agents that have it."""
        at = np.argsort(order, 1)
        p, s = np.take_along_axis(place, at[:, None, :, None], 2), np.take_along_axis(seen, at[:, None], 2)
        k, d = p.shape[2:]
        self.means_, self.covariances_ = np.zeros((k, d)), np.zeros((k, d, d))
        for r in range(k):
            points = p[:, :, r][s[:, :, r]]
            points = points if len(points) else place[seen]
            self.means_[r] = points.mean(0)
            away = points - self.means_[r]
            self.covariances_[r] = away.T @ away / len(points) + floor

    def _fit(self, place: NDArray, seen: NDArray) -> NDArray[np.float64]:
        """Log density of each agent's frames by each role, (N, K, K)."""
        out = np.empty((len(place), place.shape[2], len(self.means_)))
        for r, (mean, cov) in enumerate(zip(self.means_, self.covariances_, strict=True)):
            root = np.linalg.cholesky(cov)
            away = np.linalg.solve(root, np.moveaxis(place - mean, -1, 0).reshape(len(mean), -1))
            found = -0.5 * (away**2).sum(0) - np.log(np.diag(root)).sum() - 0.5 * len(mean) * np.log(2 * np.pi)
            out[:, :, r] = np.where(seen, found.reshape(seen.shape), 0.0).sum(1)
        return out


def _assigned(fit: NDArray) -> NDArray[np.int64]:
    return np.stack([linear_sum_assignment(-f)[1] for f in fit])
