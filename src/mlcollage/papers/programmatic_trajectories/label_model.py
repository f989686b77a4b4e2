"""One label out of several functions' votes: majority, Dawid-Skene, and Dawid-Skene along a Markov chain."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .applier import votes
from .labeling import ABSTAIN

__all__ = ["SequenceLabelModel"]

_METHODS = ("majority", "dawid-skene", "hmm")


class SequenceLabelModel(BaseEstimator):
    r"""Combine the votes of noisy labeling functions into one label a frame and agent.

    Function j is right with probability :math:`\alpha_j`, and otherwise says any other of the C classes equally often;
    where it abstains it says nothing (Dawid and Skene's model with one accuracy for each function):

    .. math::

        p(y, L) = \pi_y \prod_j \alpha_j^{[L_j = y]} \left(\frac{1 - \alpha_j}{C - 1}\right)^{[L_j \ne y]}

    Accuracies and class shares are found by EM. ``"hmm"`` adds that labels last, with exact sums over all label
    sequences by the forward-backward algorithm:

    .. math::

        p(y_t \mid y_{t-1}) = \rho\,[y_t = y_{t-1}] + (1 - \rho)\,\pi_{y_t}

    Parameters
    ----------
    method
        ``"majority"``, ``"dawid-skene"`` or ``"hmm"``.
    n_classes
        C; by default one more than the largest vote.
    ties
        Of the majority: ``"abstain"`` (default) or ``"lowest"`` class.
    keep_unanimous
        What all functions that speak agree on stands, whatever the model thinks (default).
    max_iter, tol
        EM ends after so many rounds, or when the log-likelihood of a vote rises by less.

    Attributes
    ----------
    accuracy_ : ndarray of shape (functions,)
        :math:`\alpha`.
    class_share_ : ndarray of shape (C,)
        :math:`\pi`.
    stay_ : float
        :math:`\rho`, of ``"hmm"``.
    log_likelihood_ : list of float
        Of the votes, after each round.

    Examples
    --------
    >>> L = np.array([[0, 0, 1], [1, 1, 1], [-1, 0, 0]])[None, :, None]
    >>> SequenceLabelModel("majority").fit(L).predict(L)[0, :, 0].tolist()
    [0, 1, 0]
    """

    def __init__(
        self,
        method: str = "dawid-skene",
        n_classes: int | None = None,
        *,
        ties: str = "abstain",
        keep_unanimous: bool = True,
        max_iter: int = 100,
        tol: float = 1e-7,
    ) -> None:
        self.method = method
        self.n_classes = n_classes
        self.ties = ties
        self.keep_unanimous = keep_unanimous
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, L: NDArray, y: Any = None) -> SequenceLabelModel:
        """Learn accuracies from votes (N, T, K, functions) alone.

        Raises
        ------
        InvalidInput
            If votes are no labels, all functions abstain everywhere, or a vote is beyond ``n_classes``.
        """
        checks.choice("method", self.method, _METHODS)
        checks.choice("ties", self.ties, ("abstain", "lowest"))
        L = self._votes(L)
        if not (L != ABSTAIN).any():
            raise InvalidInput("all labeling functions abstain everywhere; look at LFAnalysis(L).summary().")
        c = self.classes_ = int(L.max()) + 1 if self.n_classes is None else self.n_classes
        self.classes_ = c = max(c, 2)
        if L.max() >= c:
            raise InvalidInput(f"a vote is {int(L.max())}; n_classes is {c}.")
        self.accuracy_ = np.full(L.shape[-1], 0.75)
        self.class_share_ = np.full(c, 1 / c)
        self.stay_, self.log_likelihood_ = 0.9, []
        if self.method == "majority":
            return self
        said = (L != ABSTAIN).any(-1)
        for _ in range(self.max_iter):
            post, kept, loglik = self._posterior(L)
            self.log_likelihood_.append(loglik / said.sum())
            self._maximize(L, post, kept)
            if len(self.log_likelihood_) > 1 and np.diff(self.log_likelihood_[-2:])[0] < self.tol:
                break
        return self

    def _votes(self, L: NDArray) -> NDArray[np.int64]:
        return votes(L)

    def _maximize(self, L: NDArray, post: NDArray, kept: tuple[float, float, NDArray] | None) -> None:
        """Accuracies, class shares and the chance to stay that fit the posterior best; one vote of a prior each."""
        for j in range(L.shape[-1]):
            said = L[..., j] != ABSTAIN
            right = np.take_along_axis(post, np.maximum(L[..., [j]], 0), -1)[..., 0]
            # One pseudo-vote of accuracy 3/4 keeps functions that rarely speak away from 0 and 1.
            self.accuracy_[j] = ((right * said).sum() + 0.75) / (said.sum() + 1)
        if kept is None:
            spoken = (L != ABSTAIN).any(-1)
            share = post[spoken].sum(0) + 1 / self.classes_
        else:
            stayed, steps, fresh = kept
            self.stay_ = (stayed + 0.9) / (steps + 1)
            share = fresh + 1 / self.classes_
        self.class_share_ = share / share.sum()

    def _emission(self, L: NDArray) -> NDArray:
        """Log p(votes of a frame | class), (N, T, K, C)."""
        out = np.zeros((*L.shape[:-1], self.classes_))
        for j, alpha in enumerate(self.accuracy_):
            alpha = float(np.clip(alpha, 1e-6, 1 - 1e-6))
            right, wrong = np.log(alpha), np.log((1 - alpha) / (self.classes_ - 1))
            said = L[..., j] != ABSTAIN
            out += np.where(said, wrong, 0.0)[..., None]
            index = np.maximum(L[..., [j]], 0)
            at = np.take_along_axis(out, index, -1) + np.where(said, right - wrong, 0.0)[..., None]
            np.put_along_axis(out, index, at, -1)
        return out

    def _posterior(self, L: NDArray) -> tuple[NDArray, tuple[float, float, NDArray] | None, float]:
        """p(class | all votes), (N, T, K, C); expected stays, steps and fresh draws of a chain; log-likelihood."""
        e = self._emission(L)
        if self.method != "hmm":
            joint = e + np.log(self.class_share_)
            top = joint.max(-1, keepdims=True)
            p = np.exp(joint - top)
            total = p.sum(-1, keepdims=True)
            spoken = (L != ABSTAIN).any(-1)
            return p / total, None, float((np.log(total) + top)[..., 0][spoken].sum())
        return self._chain(e)

    def _chain(self, e: NDArray) -> tuple[NDArray, tuple[float, float, NDArray], float]:
        """Forward-backward over frames; the transition is a mixture of staying and a fresh draw, so O(C) a frame."""
        n, t, k, c = e.shape
        top = e.max(-1, keepdims=True)
        b, pi, rho = np.exp(e - top), self.class_share_, self.stay_
        ahead, norm = np.empty_like(b), np.empty((n, t, k, 1))
        for s in range(t):
            before = pi if s == 0 else rho * ahead[:, s - 1] + (1 - rho) * pi
            a = before * b[:, s]
            norm[:, s] = a.sum(-1, keepdims=True)
            ahead[:, s] = a / norm[:, s]
        back, post = np.ones((n, k, c)), np.empty_like(b)
        stayed, fresh = 0.0, np.zeros(c)
        for s in range(t - 1, -1, -1):
            post[:, s] = ahead[:, s] * back
            seen = b[:, s] * back / norm[:, s]  # of the class at s: what it and the later frames say
            if s == 0:
                fresh += (pi * seen).sum((0, 1))
                break
            stayed += float((rho * ahead[:, s - 1] * seen).sum())
            fresh += ((1 - rho) * pi * seen).sum((0, 1))
            back = rho * seen + (1 - rho) * (pi * seen).sum(-1, keepdims=True)
        loglik = float((np.log(norm) + top).sum())
        return post, (stayed, float(n * k * (t - 1)), fresh), loglik

    def predict_proba(self, L: NDArray) -> NDArray[np.float64]:
        """Probabilities (N, T, K, C) of the classes; of the majority, shares of votes, and all equal without any."""
        L = self._fitted(L)
        if self.method == "majority":
            counts = self._counts(L)
            total = counts.sum(-1, keepdims=True)
            return np.where(total > 0, counts / np.maximum(total, 1), 1 / self.classes_)
        return self._posterior(L)[0]

    def predict(self, L: NDArray) -> NDArray[np.int64]:
        """Labels (N, T, K); abstains where no function speaks (``"hmm"`` fills such gaps) and at ties of a majority."""
        L = self._fitted(L)
        p = self.predict_proba(L)
        best = p.argmax(-1)
        said = L != ABSTAIN
        if self.method == "majority" and self.ties == "abstain":
            tied = (p >= p.max(-1, keepdims=True) - 1e-12).sum(-1) > 1
            best = np.where(tied, ABSTAIN, best)
        if self.method != "hmm":
            best = np.where(said.any(-1), best, ABSTAIN)
        if self.keep_unanimous:
            low = np.where(said, L, np.iinfo(np.int64).max).min(-1)
            high = L.max(-1)
            best = np.where(said.any(-1) & (low == high), high, best)
        return best

    def _fitted(self, L: NDArray) -> NDArray[np.int64]:
        if not hasattr(self, "accuracy_"):
            raise InvalidInput("the label model is not fitted; call fit(L) first.")
        L = self._votes(L)
        if L.shape[-1] != len(self.accuracy_) or L.max() >= self.classes_:
            raise InvalidInput(
                f"the label model was fitted on {len(self.accuracy_)} functions and {self.classes_} classes; got "
                f"votes of {L.shape[-1]} functions up to class {int(L.max())}."
            )
        return L

    def _counts(self, L: NDArray) -> NDArray[np.float64]:
        out = np.zeros((*L.shape[:-1], self.classes_))
        for j in range(L.shape[-1]):
            index = np.maximum(L[..., [j]], 0)
            at = np.take_along_axis(out, index, -1) + (L[..., [j]] != ABSTAIN)
            np.put_along_axis(out, index, at, -1)
        return out
