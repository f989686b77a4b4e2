r"""How good, how calibrated and how alike predictive distributions are.

All functions take class probabilities :math:`p` of shape (N, K), as tensors or arrays, and return floats computed in
float64. :func:`agreement` and :func:`total_variation` compare two predictive distributions (P. Izmailov, S. Vikram,
M. D. Hoffman and A. G. Wilson, "What Are Bayesian Neural Network Posteriors Really Like?", ICML 2021, section 2);
:func:`ece`, :func:`nll` and :func:`brier` compare one with labels; :func:`auroc_ood` asks whether a score tells foreign
inputs from familiar ones. :func:`jackknife` gives a metric of a Bayesian model average its Monte-Carlo error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

Floats = npt.NDArray[np.float64]
Probabilities = Tensor | npt.ArrayLike
Strategy = Literal["uniform", "quantile"]
_SUM = 1e-2  # how far a row may be from 1: bfloat16 softmax outputs are off by some thousandths


def _array(values: Probabilities) -> npt.NDArray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.double() if values.dtype.is_floating_point else values).numpy()  # numpy knows no bfloat16


def _probabilities(values: Probabilities, name: str = "p", ndim: int = 2) -> Floats:
    """Probabilities (..., K) as float64, each row summing to 1 within rounding, and made to exactly."""
    p = _array(values)
    shape = {2: "(N, K)", 3: "(members, N, K)", 4: "(chains, draws, N, K)"}[ndim]
    if p.ndim != ndim or 0 in p.shape or p.shape[-1] < 2 or p.dtype.kind not in "fiub":
        raise InvalidInput(
            f"{name} is {p.dtype} of shape {p.shape}; class probabilities {shape} with at least two classes are "
            "needed: give a binary output as the pair (1 - p, p)."
        )
    p = p.astype(np.float64)
    if not np.isfinite(p).all():
        raise InvalidInput(f"{int((~np.isfinite(p)).sum())} values of {name} are NaN or infinite.")
    total = p.sum(axis=-1, keepdims=True)  # (..., 1)
    if p.min() < 0 or np.abs(total - 1).max() > _SUM:
        raise InvalidInput(
            f"{name} has values from {p.min():.3g} and rows that sum to {total.min():.3g} .. {total.max():.3g}; "
            "probabilities are needed: apply softmax to logits first."
        )
    return np.asarray(p / total)


def _labels(values: Probabilities, p: Floats, name: str = "y") -> npt.NDArray[np.int64]:
    y = _array(values)
    if y.ndim == 2 and y.shape[1] == 1:  # a column, as data frames give
        y = y[:, 0]
    if y.shape != (len(p),) or y.dtype.kind not in "iub":
        raise InvalidInput(
            f"{name} is {y.dtype} of shape {y.shape}; whole-number classes of shape ({len(p)},) are needed, one per "
            "input."
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise InvalidInput(
            f"{name} holds {y.min()} .. {y.max()}; the classes of p are 0 .. {p.shape[1] - 1}: leave "
            "out rows without a class, such as p[y != -100] for ignored targets."
        )
    return y.astype(np.int64)


def _pair(p: Probabilities, q: Probabilities) -> tuple[Floats, Floats]:
    a, b = _probabilities(p, "p"), _probabilities(q, "q")
    if a.shape != b.shape:
        raise InvalidInput(f"p has shape {a.shape} and q {b.shape}; both must predict the same inputs and classes.")
    return a, b


def agreement(p: Probabilities, q: Probabilities) -> float:
    r"""Share of inputs for which two predictive distributions name the same class.

    .. math:: \frac{1}{N} \sum_n 1[\arg\max_k p_{nk} = \arg\max_k q_{nk}]

    Parameters
    ----------
    p, q
        Probabilities, (N, K). Of equal largest ones the first counts.

    Returns
    -------
    float
        In [0, 1]; 1 where every top class agrees.

    Examples
    --------
    >>> agreement([[0.9, 0.1], [0.4, 0.6]], [[0.6, 0.4], [0.7, 0.3]])
    0.5
    """
    a, b = _pair(p, q)
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def total_variation(p: Probabilities, q: Probabilities) -> float:
    r"""Mean total-variation distance of two predictive distributions.

    .. math:: \frac{1}{N} \sum_n \frac{1}{2} \sum_k |p_{nk} - q_{nk}|

    Parameters
    ----------
    p, q
        Probabilities, (N, K).

    Returns
    -------
    float
        In [0, 1]. Of two averages over few draws it is never 0: compare with the distance of two independent
        runs of the same sampler.

    Examples
    --------
    >>> round(total_variation([[0.9, 0.1], [0.4, 0.6]], [[0.6, 0.4], [0.4, 0.6]]), 3)
    0.15
    """
    a, b = _pair(p, q)
    return float(0.5 * np.abs(a - b).sum(axis=1).mean())


def accuracy(p: Probabilities, y: Probabilities) -> float:
    """Share of inputs whose most probable class is the label.

    Examples
    --------
    >>> accuracy([[0.9, 0.1], [0.4, 0.6]], [0, 0])
    0.5
    """
    a = _probabilities(p)
    return float((a.argmax(axis=1) == _labels(y, a)).mean())


def nll(p: Probabilities, y: Probabilities) -> float:
    r"""Mean negative log-likelihood, :math:`-\frac{1}{N} \sum_n \log p_{n y_n}`, in nats.

    Infinite if a label had probability zero: that is what the model said. Softmax in float32 reaches zero at a
    difference of logits of about 104; average in the log domain
    (:func:`mlcollage.infer.ensemble.mix_logits`) to keep such probabilities.

    Examples
    --------
    >>> round(nll([[0.9, 0.1], [0.4, 0.6]], [0, 1]), 4)
    0.3081
    """
    a = _probabilities(p)
    with np.errstate(divide="ignore"):  # log 0, which is meant
        return float(-np.log(a[np.arange(len(a)), _labels(y, a)]).mean())


def brier(p: Probabilities, y: Probabilities) -> float:
    r"""Brier score, :math:`\frac{1}{N} \sum_n \sum_k (p_{nk} - 1[y_n = k])^2`, in [0, 2].

    Brier's own sum over all classes; for two classes it is twice scikit-learn's ``brier_score_loss``.

    Examples
    --------
    >>> round(brier([[0.9, 0.1], [0.4, 0.6]], [0, 1]), 3)
    0.17
    """
    a = _probabilities(p)
    hit = np.eye(a.shape[1])[_labels(y, a)]  # (N, K), one-hot
    return float(np.square(a - hit).sum(axis=1).mean())


class CalibrationCurve(NamedTuple):
    """Confidence and accuracy by bins of confidence; empty bins are left out.

    Attributes
    ----------
    confidence, accuracy
        Mean confidence and share of right answers in each bin.
    weight
        Share of the samples in each bin; sums to 1.
    edges
        (bins + 1,) of all bins, empty ones too.
    """

    confidence: Floats
    accuracy: Floats
    weight: Floats
    edges: Floats


def calibration_curve(
    p: Probabilities, y: Probabilities, n_bins: int = 20, strategy: Strategy = "uniform"
) -> CalibrationCurve:
    """Confidence against accuracy.

    The confidence of a prediction is its largest probability. A bin is closed on the right, and the first also on the
    left, so every sample is in exactly one: also those at an edge, and those of confidence exactly 1.

    Parameters
    ----------
    p
        Probabilities, (N, K).
    y
        Labels, (N,).
    n_bins
        Number of bins.
    strategy
        ``"uniform"``: bins of equal width on [0, 1]. ``"quantile"``: edges at the quantiles of the confidences, for
        bins of about equal mass; equal confidences stay in one bin, so that saturated networks get fewer bins.

    Returns
    -------
    CalibrationCurve

    Raises
    ------
    InvalidInput
        For what are no probabilities or labels, and settings out of range.

    Examples
    --------
    >>> curve = calibration_curve([[1.0, 0.0], [1.0, 0.0], [0.4, 0.6], [0.3, 0.7]], [0, 1, 1, 1], n_bins=2)
    >>> curve.confidence.round(3).tolist(), curve.accuracy.tolist(), curve.weight.tolist()
    ([0.825], [0.75], [1.0])
    """
    a = _probabilities(p)
    labels = _labels(y, a)
    n_bins = checks.integer("n_bins", n_bins, least=1)
    checks.choice("strategy", strategy, ("uniform", "quantile"))
    confidence = a.max(axis=1)
    if strategy == "uniform":
        edges = np.linspace(0.0, 1.0, n_bins + 1)
    else:  # equal confidences give equal quantiles, of which one is kept
        inner = np.unique(np.quantile(confidence, np.arange(1, n_bins) / n_bins))
        edges = np.concatenate([[confidence.min()], inner[inner < confidence.max()], [confidence.max()]])
    # Inner edges only: whatever is at or beyond the outer ones by rounding belongs to the first or the last bin.
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    # Per bin, (bins,): samples, and below the means of confidence and of right answers in bins that have any.
    count = np.bincount(place, minlength=len(edges) - 1)
    there = count > 0
    right = (a.argmax(axis=1) == labels).astype(np.float64)
    means = [np.bincount(place, weights=v, minlength=len(count))[there] / count[there] for v in (confidence, right)]
    return CalibrationCurve(means[0], means[1], count[there] / len(a), edges)


def ece(
    p: Probabilities,
    y: Probabilities,
    n_bins: int = 20,
    strategy: Strategy = "uniform",
    *,
    side: Literal["both", "over", "under"] = "both",
) -> float:
    r"""Expected calibration error: how far confidence and accuracy are apart, bin by bin.

    .. math:: \sum_b \frac{n_b}{N} \, |\mathrm{conf}_b - \mathrm{acc}_b|

    C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    Every sample counts exactly once. (The code published with Izmailov et al. 2021 takes both edges of a bin as open,
    so that samples at an edge, above all those of confidence 1, count nowhere.)

    Parameters
    ----------
    p, y, n_bins, strategy
        See :func:`calibration_curve`.
    side
        ``"over"`` adds up only bins that are more confident than accurate, ``"under"`` only the others; the two add up
        to ``"both"``, and their difference is :func:`confidence_gap`.

    Returns
    -------
    float
        In [0, 1]. It is biased upwards with few samples per bin, so compare only values of equal N and ``n_bins``.

    Examples
    --------
    >>> p = [[1.0, 0.0], [1.0, 0.0], [0.4, 0.6], [0.4, 0.6]]
    >>> ece(p, [0, 1, 1, 1]), ece(p, [0, 1, 1, 1], side="over"), ece(p, [0, 1, 1, 1], side="under")
    (0.45, 0.25, 0.2)
    """
    checks.choice("side", side, ("both", "over", "under"))
    curve = calibration_curve(p, y, n_bins, strategy)
    gap = curve.confidence - curve.accuracy
    part = np.abs(gap) if side == "both" else np.maximum(gap if side == "over" else -gap, 0)
    return float((curve.weight * part).sum())


def confidence_gap(p: Probabilities, y: Probabilities) -> float:
    """Mean confidence minus accuracy: positive for over-confident predictions, negative for under-confident ones.

    The signed version of :func:`ece`; in it the bins cancel, whatever they are.

    Examples
    --------
    >>> round(confidence_gap([[1.0, 0.0], [1.0, 0.0], [0.4, 0.6], [0.4, 0.6]], [0, 1, 1, 1]), 3)
    0.05
    """
    a = _probabilities(p)
    return float(a.max(axis=1).mean()) - accuracy(a, y)


def predictive_entropy(p: Probabilities) -> Floats:
    r"""Entropy of each prediction, :math:`-\sum_k p_{nk} \log p_{nk}` in nats, (N,): 0 to log K.

    Examples
    --------
    >>> predictive_entropy([[0.5, 0.5], [1.0, 0.0]]).round(4).tolist()
    [0.6931, 0.0]
    """
    return _entropy(_probabilities(p))


def mutual_information(members: Probabilities) -> Floats:
    r"""How much the members' disagreement adds to the entropy of their mixture, (N,), in nats.

    .. math:: H\Big[\frac{1}{M} \sum_m p^{(m)}\Big] - \frac{1}{M} \sum_m H\big[p^{(m)}\big] \ge 0

    The epistemic part of the predictive entropy (N. Houlsby, F. Huszár, Z. Ghahramani and M. Lengyel, "Bayesian Active
    Learning for Classification and Preference Learning", 2011, section 2).

    Parameters
    ----------
    members
        Probabilities of networks or posterior draws, (members, N, K).

    Examples
    --------
    >>> mutual_information([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]).round(4).tolist()
    [0.6931, 0.0]
    """
    p = _probabilities(members, "members", ndim=3)
    return np.maximum(_entropy(p.mean(axis=0)) - _entropy(p).mean(axis=0), 0.0)


def _entropy(p: Floats) -> Floats:
    # p log p is 0 at p = 0; the zero added at the end makes -0.0 a plain 0.0.
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)) + 0.0


def auroc_ood(scores_in: Probabilities, scores_out: Probabilities) -> float:
    """Area under the ROC curve of telling foreign inputs from familiar ones by a score.

    The probability that a random foreign input has the higher score, ties counting half; by
    :func:`sklearn.metrics.roc_auc_score`.

    Parameters
    ----------
    scores_in, scores_out
        Scores of inputs like the training data and of others, (N,) and (M,): higher should mean more foreign, as for
        :func:`predictive_entropy`.

    Raises
    ------
    InvalidInput
        For scores that are empty, not one per sample, or not finite.

    Examples
    --------
    >>> auroc_ood([0.1, 0.2, 0.3], [0.25, 0.9, 1.5])
    0.888...
    """
    from sklearn.metrics import roc_auc_score

    parts = []
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        s = _array(scores)
        if s.ndim != 1 or len(s) == 0 or s.dtype.kind not in "fiub" or not np.isfinite(s).all():
            raise InvalidInput(f"{name} is {s.dtype} of shape {s.shape}; finite numbers (N,) are needed, one each.")
        parts.append(s.astype(np.float64))
    # Labels of the two-class problem: 1 is foreign.
    foreign = np.concatenate([np.zeros(len(parts[0])), np.ones(len(parts[1]))])
    return float(roc_auc_score(foreign, np.concatenate(parts)))


class MonteCarlo(NamedTuple):
    """A metric of an average over draws, and how far finitely many draws may have moved it.

    Attributes
    ----------
    value
        The metric of the average over all draws.
    se
        Its Monte-Carlo standard error.
    bias
        The jackknife's estimate of its Monte-Carlo bias: ``value - bias`` is what endless draws are expected to give.
    groups
        Number of groups of draws behind it.
    """

    value: float
    se: float
    bias: float
    groups: int


def jackknife(
    metric: Callable[[Floats], float],
    draws: Probabilities,
    over: Literal["chains", "draws"] | None = None,
    *,
    blocks: int = 10,
) -> MonteCarlo:
    r"""A metric of a Bayesian model average, with its Monte-Carlo error by leaving out groups of draws.

    With :math:`\hat\theta` the metric of the average over all draws and :math:`\hat\theta_{-g}` that without group g of
    G, where :math:`\bar\theta` is the mean of the latter,

    .. math:: \mathrm{se}^2 = \frac{G - 1}{G} \sum_g (\hat\theta_{-g} - \bar\theta)^2, \qquad
        \mathrm{bias} = (G - 1) (\bar\theta - \hat\theta).

    Whole chains are left out, since draws of one chain depend on each other; with fewer than four chains (of more than
    one draw), blocks of consecutive draws, cut from every chain at the same place. The latter is too small where a
    block is not much longer than the autocorrelation, or where chains have not mixed.

    Parameters
    ----------
    metric
        Probabilities (N, K), an average over draws, to a number, such as ``lambda p: total_variation(p, other)``.
    draws
        Probabilities by draw, (chains, draws, N, K).
    over
        ``"chains"``, ``"draws"`` (blocks), or None for the rule above.
    blocks
        Number of blocks of draws; fewer if there are fewer draws.

    Returns
    -------
    MonteCarlo

    Raises
    ------
    InvalidInput
        If there are not two groups to compare.

    Examples
    --------
    >>> p = np.random.default_rng(0).dirichlet([1.0, 1.0], size=(4, 100, 30))  # 4 chains, 100 draws, 30 inputs
    >>> result = jackknife(lambda mean: total_variation(mean, np.full((30, 2), 0.5)), p)
    >>> result.groups, bool(result.bias > 0)  # noise keeps distributions apart
    (4, True)
    """
    p = _probabilities(draws, "draws", ndim=4)
    if over is not None:
        checks.choice("over, if not None,", over, ("chains", "draws"))
    chains, length = p.shape[:2]
    # Sums over the draws of each group, (groups, N, K), and how many draws they are.
    if over == "chains" or (over is None and (chains >= 4 or length < 2)):
        groups, sizes = p.sum(axis=1), np.full(chains, length)
    else:
        blocks = min(checks.integer("blocks", blocks, least=2), length)
        lengths = np.array([len(part) for part in np.array_split(np.arange(length), blocks)])  # as equal as can be
        groups, sizes = np.add.reduceat(p.sum(axis=0), lengths.cumsum() - lengths, axis=0), chains * lengths
    if len(groups) < 2:
        raise InvalidInput(
            f"there are {chains} chain(s) of {length} draw(s); two groups of draws are needed to see how much they "
            "differ."
        )
    total, n = groups.sum(axis=0), int(sizes.sum())  # (N, K), and the number of all draws
    value = float(metric(total / n))
    # The metric of the average over all draws but those of group g, (groups,).
    without = np.array([float(metric((total - g) / (n - k))) for g, k in zip(groups, sizes, strict=True)])
    count = len(groups)
    se = float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))
    return MonteCarlo(value, se, float((count - 1) * (without.mean() - value)), count)
