"""Several labeling functions at once, and a table of what each of them does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

from .labeling import ABSTAIN, LabelingFunction, as_labels, tracks

__all__ = ["LFAnalysis", "LFApplier"]


class LFApplier:
    """Apply several labeling functions to the same tracks.

    Parameters
    ----------
    functions
        Labeling functions with the same classes; or any object with ``name`` and a call from a track to labels (a
        Snorkel labeling function), for which ``classes`` is needed.
    classes
        Number of labels; by default that of the functions.

    Raises
    ------
    InvalidInput
        If there is none, two have one name, or their classes differ.

    Examples
    --------
    >>> from mlcollage.papers.programmatic_trajectories import Stationary, Window
    >>> L = LFApplier([Stationary(fps=6.25), Window(2)]).apply(np.ones((1, 4, 3, 2)))
    >>> L.shape
    (1, 4, 3, 2)
    """

    def __init__(self, functions: Sequence[Any], classes: int | None = None) -> None:
        self.functions = list(functions)
        if not self.functions:
            raise InvalidInput("give at least one labeling function.")
        self.names = [str(getattr(f, "name", f"function {i}")) for i, f in enumerate(self.functions)]
        if len(set(self.names)) < len(self.names):
            raise InvalidInput(f"labeling functions must have different names; got {', '.join(self.names)}.")
        found = {int(c) for f in self.functions if (c := getattr(f, "classes", classes)) is not None}
        if len(found) != 1 or (classes is not None and found != {classes}):
            raise InvalidInput(f"labeling functions must have the same classes; got {sorted(found)}: give classes.")
        (self.classes,) = found

    def apply(self, X: NDArray, mask: NDArray | None = None, fps: float | None = None) -> NDArray[np.int64]:
        """Labels (N, T, K, functions) of tracks (N, T, K, D); ``mask`` and ``fps`` as the functions take them."""
        x, seen, _ = tracks(X, mask)
        return np.stack([self._one(f, n, x, seen, fps) for f, n in zip(self.functions, self.names, strict=True)], -1)

    def _one(self, f: Any, name: str, x: NDArray, seen: NDArray, fps: float | None) -> NDArray[np.int64]:
        if isinstance(f, LabelingFunction):
            return f(x, seen, fps)
        n, t, k, _ = x.shape
        out = np.empty((n, t, k), dtype=np.int64)
        for i in range(n):
            for a in range(k):
                where = f"labeling function {name} on track {i}, agent {a}"
                out[i, :, a] = as_labels(f(x[i, :, a]), t, self.classes, where)
        return np.where(seen, out, ABSTAIN)


class LFAnalysis:
    """What labeling functions do: classes, coverage, overlaps, conflicts and, with true labels, accuracy.

    Parameters
    ----------
    L
        Labels (N, T, K, functions), as :class:`LFApplier` gives them.
    names
        Of the functions; numbers by default.

    Examples
    --------
    >>> L = np.array([[0, 0], [1, -1], [1, 0]])[None, :, None]
    >>> LFAnalysis(L).summary()["conflicts"].round(2).tolist()
    [0.33, 0.33]
    """

    def __init__(self, L: NDArray, names: Sequence[str] | None = None) -> None:
        self.L = votes(L)
        self.names = [str(j) for j in range(self.L.shape[-1])] if names is None else list(names)
        if len(self.names) != self.L.shape[-1]:
            raise InvalidInput(f"{self.L.shape[-1]} functions need as many names; got {len(self.names)}.")

    def summary(self, Y: NDArray | None = None) -> pd.DataFrame:
        """One row a function; shares are of all frames of all agents.

        Parameters
        ----------
        Y
            True labels (N, T, K), if they are known; -1 where they are not.

        Returns
        -------
        table
            ``classes`` (how many it uses), ``coverage`` (it does not abstain), ``overlaps`` (another one does not
            either), ``conflicts`` (another one says something else), ``changes`` (mean number of changes in a track),
            and with ``Y`` ``accuracy`` where it does not abstain, ``correct`` of all frames with a true label, and
            ``counted``, the number of frames that accuracy was taken over.
        """
        L = self.L.reshape(-1, self.L.shape[-1])
        said = L != ABSTAIN
        rows = []
        for j in range(L.shape[1]):
            others = np.arange(L.shape[1]) != j
            both = said[:, [j]] & said[:, others]
            differ = both & (L[:, [j]] != L[:, others])
            steps = self.L[..., j]
            changed = (steps[:, 1:] != steps[:, :-1]).sum() / (steps.shape[0] * steps.shape[2])
            row = {
                "classes": len(np.unique(L[said[:, j], j])),
                "coverage": said[:, j].mean(),
                "overlaps": both.any(1).mean(),
                "conflicts": differ.any(1).mean(),
                "changes": changed,
            }
            if Y is not None:
                row |= self._against(np.asarray(Y), j)
            rows.append(row)
        return pd.DataFrame(rows, index=pd.Index(self.names, name="function"))

    def _against(self, Y: NDArray, j: int) -> dict[str, float]:
        if Y.shape != self.L.shape[:-1]:
            raise InvalidInput(f"true labels must be {self.L.shape[:-1]}; got {Y.shape}.")
        known = Y != ABSTAIN
        counted = known & (self.L[..., j] != ABSTAIN)
        right = float((counted & (self.L[..., j] == Y)).sum())
        return {
            "accuracy": right / counted.sum() if counted.any() else np.nan,
            "correct": right / known.sum() if known.any() else np.nan,
            "counted": int(counted.sum()),
        }


def votes(L: Any) -> NDArray[np.int64]:
    """Labels (N, T, K, functions) in whole numbers.

    Raises
    ------
    InvalidInput
        If the rank is another, or they are no labels.
    """
    L = np.asarray(L)
    if L.ndim != 4 or 0 in L.shape:
        raise InvalidInput(f"labels must be (N, T, K, functions), as LFApplier gives them; got {L.shape}.")
    if L.dtype.kind not in "iub" or L.min() < ABSTAIN:
        raise InvalidInput(f"labels must be whole numbers, {ABSTAIN} for none; got {L.dtype} from {L.min()}.")
    return L.astype(np.int64)
