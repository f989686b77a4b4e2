"""Statistics of tracks, and how real and generated ones differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .labeling import ABSTAIN, LabelingFunction, tracks

__all__ = [
    "best_of_n",
    "collision_rate",
    "distance",
    "intent_calibration",
    "intent_information",
    "nearest_distance",
    "out_of_bounds",
    "speed",
    "two_sample_auc",
    "wasserstein",
]


def speed(X: NDArray, fps: float | None = None) -> NDArray[np.float64]:
    """Mean speed of each sequence, (N,), of tracks (N, T, K, D): in units a step, or a second with ``fps``.

    Steps with an end that is not finite do not count; compare speeds at equal frame rates only.

    Examples
    --------
    >>> x = np.zeros((1, 3, 1, 2))
    >>> x[0, :, 0, 0] = 0, 3, 6
    >>> speed(x).tolist(), speed(x, fps=10).tolist(), distance(x).tolist()
    ([3.0], [30.0], [6.0])
    """
    step, fps = _steps(X), None if fps is None else checks.positive("fps", fps)
    with np.errstate(invalid="ignore"):
        return np.nansum(step, (1, 2)) / np.isfinite(step).sum((1, 2)) * (1.0 if fps is None else fps)


def distance(X: NDArray) -> NDArray[np.float64]:
    """Length of the path, averaged over agents, of each sequence, (N,); gaps add nothing."""
    step = _steps(X)
    there = np.isfinite(step).any(1)
    return np.nansum(step, (1, 2)) / np.maximum(there.sum(-1), 1)


def _steps(X: NDArray) -> NDArray[np.float64]:
    x, seen, _ = tracks(X)
    if x.shape[1] < 2:
        raise InvalidInput(f"a speed needs two frames at least; got tracks {x.shape}.")
    x = np.where(seen[..., None], x, np.nan)
    step: NDArray[np.float64] = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    return step


def out_of_bounds(X: NDArray, court: tuple[float, float] = (94.0, 50.0), *, any_player: bool = False) -> NDArray:
    """Share of positions outside of [0, length] x [0, width] of each sequence, (N,).

    Parameters
    ----------
    X
        Tracks (N, T, K, 2); positions that are not finite do not count.
    court
        Length and width.
    any_player
        Share of frames with any player outside, as the official code counts; otherwise of all players' frames.

    Examples
    --------
    >>> x = np.array([[[[1.0, 1.0], [1.0, 51.0]], [[1.0, 1.0], [1.0, 50.0]]]])
    >>> out_of_bounds(x).tolist(), out_of_bounds(x, any_player=True).tolist()
    ([0.25], [0.5])
    """
    x, seen, _ = tracks(X)
    if x.shape[-1] != 2 or len(court) != 2:
        raise InvalidInput(f"tracks must be (N, T, K, 2) and court (length, width); got {x.shape} and {court!r}.")
    outside = ((x < 0) | (x > np.array([checks.positive("court", side) for side in court]))).any(-1) & seen
    if any_player:
        return outside.any(2).mean(1)
    return outside.sum((1, 2)) / np.maximum(seen.sum((1, 2)), 1)


def nearest_distance(X: NDArray) -> NDArray[np.float64]:
    """Distance of each agent to the nearest other, (N, T, K); NaN where there is none.

    Examples
    --------
    >>> nearest_distance(np.array([[[[0.0, 0], [3, 4], [0, 1]]]])).round(2).tolist()
    [[[1.0, 4.24, 1.0]]]
    """
    x, seen, _ = tracks(X)
    if x.shape[2] < 2:
        raise InvalidInput("a nearest other needs two agents at least.")
    away = np.empty(seen.shape)
    for n in range(0, len(x), 512):  # blocks keep the (N, T, K, K) distances small
        part, there = x[n : n + 512], seen[n : n + 512]
        square = ((part[:, :, :, None] - part[:, :, None]) ** 2).sum(-1)
        k = square.shape[-1]
        square[..., np.arange(k), np.arange(k)] = np.inf
        square = np.where(there[:, :, None] & there[..., None], square, np.inf)
        away[n : n + 512] = np.sqrt(square.min(-1))
    return np.where(np.isfinite(away), away, np.nan)


def collision_rate(X: NDArray, radius: float) -> NDArray[np.float64]:
    """Share of agents' frames with another agent nearer than ``radius``, of each sequence, (N,)."""
    near = nearest_distance(X)
    there = np.isfinite(near)
    hit = (near < checks.positive("radius", radius)) & there
    return hit.sum((1, 2)) / np.maximum(there.sum((1, 2)), 1)


def wasserstein(real: NDArray, generated: NDArray) -> float:
    """1-Wasserstein distance between the values of a statistic, in its unit; values that are NaN do not count.

    Raises
    ------
    InvalidInput
        If one side has no value, or an infinite one.

    Examples
    --------
    >>> wasserstein(np.array([0.0, 1.0]), np.array([2.0, 3.0]))
    2.0
    """
    sides = [np.asarray(v, dtype=np.float64).ravel() for v in (real, generated)]
    sides = [v[~np.isnan(v)] for v in sides]
    for name, v in zip(("real", "generated"), sides, strict=True):
        if not len(v) or not np.isfinite(v).all():
            raise InvalidInput(f"{name} must have a finite value at least, and no infinite one; got {len(v)} values.")
    return float(wasserstein_distance(*sides))


def intent_calibration(
    X: NDArray, commanded: NDArray, function: LabelingFunction, *, fps: float | None = None
) -> tuple[float, float]:
    """How often rollouts do what was commanded, and how often they would if commands were exchanged.

    Parameters
    ----------
    X
        Rollouts (N, T, K, D).
    commanded
        Intents (N, T, K) or (N, T); -1 does not count.
    function
        Labels the rollouts.
    fps
        Passed to ``function``.

    Returns
    -------
    obeyed, permuted
        Share of frames in which the label of the rollout is the commanded intent, and the mean of this share over all
        exchanges of commands between two rollouts: what one would see if commands had no influence.

    Examples
    --------
    >>> from mlcollage.papers.programmatic_trajectories import GridIntent
    >>> x = np.array([[[[1.0, 1.0]]], [[[44.0, 49.0]]]])
    >>> intent_calibration(x, np.array([[0], [89]]), GridIntent())
    (1.0, 0.0)
    """
    labels = function(X, fps=fps)
    want = np.asarray(commanded)
    want = np.broadcast_to(want[..., None], labels.shape) if want.ndim == labels.ndim - 1 else want
    if want.shape != labels.shape or len(want) < 2:
        raise InvalidInput(f"commands must be {labels.shape} of two rollouts at least; got {want.shape}.")
    counts = (want != ABSTAIN) & (labels != ABSTAIN)
    obeyed = float((counts & (labels == want)).sum() / max(counts.sum(), 1))
    hits = total = 0
    for shift in range(1, len(want)):
        other = np.roll(want, shift, axis=0)
        valid = (other != ABSTAIN) & (labels != ABSTAIN)
        hits += int((valid & (labels == other)).sum())
        total += int(valid.sum())
        if shift == 64:  # enough of them
            break
    return obeyed, hits / max(total, 1)


def intent_information(intents: NDArray, classes: int) -> float:
    """Mutual information of the intents of two agents, in nats, averaged over pairs and corrected for chance.

    Parameters
    ----------
    intents
        Intents at one moment of each sequence, (N, K), or at several, (N, T, K).
    classes
        How many there are.

    Returns
    -------
    information
        Mean over pairs of agents of the plug-in estimate, minus its mean after one agent's sequences were exchanged.

    Examples
    --------
    >>> g = np.random.default_rng(0).integers(4, size=(4000, 1))
    >>> round(intent_information(np.hstack([g, g]), 4), 1)
    1.4
    """
    g = np.asarray(intents)
    g = g[:, None] if g.ndim == 2 else g
    if g.ndim != 3 or g.shape[-1] < 2 or len(g) < 2:
        raise InvalidInput(f"intents must be (N, K) or (N, T, K) of two agents at least; got {np.shape(intents)}.")
    checks.integer("classes", classes, least=2)
    if g.dtype.kind not in "iu" or g.max() >= classes:
        raise InvalidInput(f"intents must be whole numbers below {classes}; got {g.dtype} up to {g.max()}.")
    rng = np.random.default_rng(0)
    found = []
    for a in range(g.shape[-1]):
        for b in range(a):
            shuffled = [_information(g[..., a], g[rng.permutation(len(g)), :, b], classes) for _ in range(2)]
            found.append(_information(g[..., a], g[..., b], classes) - np.mean(shuffled))
    return float(np.mean(found))


def _information(a: NDArray, b: NDArray, classes: int) -> float:
    keep = (a >= 0) & (b >= 0)
    table = np.bincount(a[keep] * classes + b[keep], minlength=classes**2).reshape(classes, classes) / max(
        keep.sum(), 1
    )
    outer = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    some = table > 0
    return float((table[some] * np.log(table[some] / outer[some])).sum())


def best_of_n(samples: NDArray, truth: NDArray, mask: NDArray | None = None) -> dict[str, float]:
    """Displacement errors of the best of several predictions.

    Parameters
    ----------
    samples
        Predictions (n, B, T, K, D).
    truth
        What happened, (B, T, K, D).
    mask
        True where it counts, (B, T, K); the final error is taken at each agent's last frame that counts.

    Returns
    -------
    errors
        ``min_ade`` and ``min_fde``, mean and final displacement with the best sample for each agent, and
        ``min_scene_ade`` and ``min_scene_fde``, with one best sample for all agents of a scene; averaged over agents,
        then scenes. Agents that never count are left out.

    Examples
    --------
    >>> truth = np.zeros((1, 1, 2, 1))
    >>> samples = np.array([[1.0, 3.0], [3.0, 1.0]])[:, None, None, :, None]
    >>> found = best_of_n(samples, truth)
    >>> found["min_ade"], found["min_scene_ade"]
    (1.0, 2.0)
    """
    samples, truth = np.asarray(samples, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if samples.ndim != 5 or samples.shape[1:] != truth.shape:
        raise InvalidInput(f"samples must be (n, *{truth.shape}); got {samples.shape}.")
    counts = np.isfinite(truth).all(-1)
    if mask is not None:
        given = np.asarray(mask, dtype=bool)
        if given.shape != counts.shape:
            raise InvalidInput(f"the mask must be {counts.shape}; got {given.shape}.")
        counts = counts & given
    if not np.isfinite(samples[:, counts]).all():
        raise InvalidInput("samples are not finite where the truth counts; leave these agents out with mask.")
    error = np.where(counts, np.linalg.norm(samples - np.nan_to_num(truth), axis=-1), 0.0)  # (n, B, T, K)
    valid = counts.sum(1)
    ade = error.sum(2) / np.maximum(valid, 1)
    last = counts.shape[1] - 1 - counts[:, ::-1].argmax(1)  # (B, K)
    fde = np.take_along_axis(error, last[None, :, None], 2)[:, :, 0]
    here = valid > 0
    scenes = here.any(1)
    if not scenes.any():
        raise InvalidInput("no frame counts: mask or truth leave nothing.")
    share = here / np.maximum(here.sum(1, keepdims=True), 1)
    mean = lambda v: (v * share).sum(-1)  # noqa: E731
    return {
        "min_ade": float(mean(ade.min(0))[scenes].mean()),
        "min_fde": float(mean(fde.min(0))[scenes].mean()),
        "min_scene_ade": float(mean(ade).min(0)[scenes].mean()),
        "min_scene_fde": float(mean(fde).min(0)[scenes].mean()),
    }


def two_sample_auc(real: NDArray, generated: NDArray, *, folds: int = 4, random_state: int = 0) -> float:
    """Area under the curve of a held-out classifier that tells real tracks from generated ones: 0.5 is as good as real.

    A stand-in for human judges, not a replacement: it sees what judges may not, and the other way round.

    Parameters
    ----------
    real, generated
        Tracks (N, T, K, D) and (M, T, K, D).
    folds
        Each part is judged by a classifier trained on the others.
    random_state
        Of the folds and trees.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(80, 6, 2, 2)).cumsum(1)
    >>> two_sample_auc(x[:40], x[40:] * 5) > 0.8
    True
    """
    shapes = np.shape(real), np.shape(generated)
    least = min(len(real), len(generated))
    if any(len(v) != 4 for v in shapes) or shapes[0][1:] != shapes[1][1:]:
        raise InvalidInput(f"real and generated must be (N, T, K, D) and (M, T, K, D); got {shapes[0]}, {shapes[1]}.")
    if checks.integer("folds", folds, least=2) > least:
        raise InvalidInput(f"{folds} folds need as many tracks of each kind; got {shapes[0][0]} and {shapes[1][0]}.")
    features = np.concatenate([_features(real), _features(generated)])
    y = np.repeat([0, 1], [len(real), len(generated)])
    model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=8, random_state=random_state)
    split = StratifiedKFold(folds, shuffle=True, random_state=random_state)
    p = cross_val_predict(model, features, y, cv=split, method="predict_proba")[:, 1]
    return float(roc_auc_score(y, p))


def _features(X: NDArray) -> NDArray[Any]:
    """Of each sequence: positions at five moments, paths between them, and distances to the nearest other.

    Coarse on purpose: frame by frame the noise of any model is told from that of a camera at once.
    """
    x = np.asarray(X, dtype=np.float64)
    n, t = x.shape[:2]
    at = np.linspace(0, t - 1, min(t, 5)).round().astype(int)
    few = x[:, at]
    parts = [few, np.linalg.norm(np.diff(few, axis=1), axis=-1)]
    if x.shape[2] > 1:
        parts.append(nearest_distance(few))
    return np.concatenate([p.reshape(n, -1) for p in parts], 1)
