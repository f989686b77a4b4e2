r"""Average effects of a treatment that was not randomized by design: adjustment, weighting, and both at once.

Units :math:`i` have covariates :math:`x_i`, a treatment :math:`a_i \in \{0, 1\}` and an outcome :math:`y_i`, the
potential outcome :math:`y_i(a_i)`. The estimand is the average effect :math:`\mathrm{E}[y(1) - y(0)]`. It is
identified if nothing but :math:`x` moves both treatment and outcome (no unobserved confounding), if every unit could
have had either treatment (overlap), and if :math:`x` was measured before the treatment could change it. No data set
shows the first and the last; :mod:`mlcollage.stats.sensitivity` asks how wrong they would have to be.

A. Gelman and A. Vehtari, "What are the most important statistical ideas of the past 50 years?", JASA 2021, idea 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats as sps
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from mlcollage._checks import choice, integer, probability
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, pair, sample, tail
from mlcollage.stats.bootstrap import t_interval

Method = Literal["aipw", "ipw", "regression", "naive"]
_MANY_CLIPPED = 0.05  # share of clipped propensities that is warned of


@dataclass(frozen=True)
class Effect:
    """An average effect, in the units of the outcome.

    Attributes
    ----------
    ate
        Estimate of E[y(1) - y(0)].
    se
        Its standard error.
    ci
        Two-sided interval at the requested level.
    """

    ate: float
    se: float
    ci: tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Whether both treatments were possible for every kind of unit.

    Attributes
    ----------
    lowest, highest
        Range of the propensities before clipping.
    clipped
        How many propensities lay outside the clipping range.
    treated, control
        Units in each arm.
    effective_treated, effective_control
        Effective sample sizes (sum w)^2 / sum w^2 of the weights 1/e and 1/(1 - e): how many equally weighted units
        the weighted arm is worth.
    """

    lowest: float
    highest: float
    clipped: int
    treated: int
    control: int
    effective_treated: float
    effective_control: float


def _arms(a: npt.ArrayLike, n: int) -> npt.NDArray[np.bool_]:
    raw = np.asarray(a)
    if raw.shape != (n,):
        raise InvalidInput(f"a has shape {raw.shape}, y {n} values; one treatment per unit was expected.")
    if raw.dtype.kind not in "biuf" or not np.isin(raw, (0, 1)).all():
        raise InvalidInput(f"treatment must be 0 or 1 (or bool); got {sorted(set(raw.tolist()), key=str)[:5]}.")
    treated = raw.astype(bool)
    for name, count in (("treated", treated.sum()), ("control", (~treated).sum())):
        if count < 2:
            raise InvalidInput(f"{count} {name} unit(s); at least 2 in each arm are needed for a standard error.")
    return treated


def _covariates(X: npt.ArrayLike, treated: npt.NDArray[np.bool_]) -> Floats:
    try:
        x = np.asarray(X, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput("X must be numeric; encode categories as numbers (one-hot) first.") from error
    if x.ndim != 2 or len(x) != len(treated):
        raise InvalidInput(f"X has shape {x.shape}; ({len(treated)}, covariates) was expected.")
    if not np.isfinite(x).all():
        raise InvalidInput(f"X has {(~np.isfinite(x)).sum()} values that are not finite; impute them first.")
    for j, column in enumerate(x.T):
        low, high = column[treated], column[~treated]
        if np.ptp(low) == np.ptp(high) == 0 and low[0] != high[0]:  # constant in each arm, and different
            raise InvalidInput(f"column {j} of X is the treatment itself; covariates must come before the treatment.")
    return x


def _propensities(e: npt.ArrayLike, n: int) -> Floats:
    p = np.asarray(e, dtype=np.float64)
    if p.shape != (n,):
        raise InvalidInput(f"propensities have shape {p.shape}; one per unit, ({n},), was expected.")
    if not ((p > 0) & (p < 1)).all():
        raise InvalidInput(
            f"{int((~((p > 0) & (p < 1))).sum())} propensities are not inside (0, 1): these units could have had one "
            "treatment only (no overlap). Clip them, or leave such units out and say so."
        )
    return p


def _from_influence(estimate: float, influence: Floats, level: float) -> Effect:
    """An estimate that is a mean of ``influence`` (n,) in large samples, with its normal interval."""
    se = float(influence.std(ddof=1) / np.sqrt(len(influence)))
    half = float(sps.norm.isf(tail(level))) * se
    return Effect(estimate, se, (estimate - half, estimate + half))


def regression_adjustment(
    X: npt.ArrayLike, a: npt.ArrayLike, y: npt.ArrayLike, *, errors: Literal["HC2", "HC3"] = "HC2", level: float = 0.95
) -> Effect:
    r"""Lin's regression adjustment: least squares with centered covariates and their products with the treatment.

    .. math:: y \sim \alpha + \tau a + (x - \bar x)^\top \beta + a (x - \bar x)^\top \gamma, \qquad
        \widehat{\operatorname{Cov}} = D^+ \operatorname{diag}\Big(\frac{r_i^2}{(1 - h_i)^k}\Big) D^{+\top},

    with design :math:`D`, residuals :math:`r`, leverages :math:`h`; k = 1 is HC2, k = 2 HC3. In a randomized study
    :math:`\hat\tau` is consistent however wrong the model, and never less precise than the difference of means in
    large samples. Without randomization it is right only if the outcome is linear in x in both arms. The error is
    that of the average effect over *these* units. W. Lin, Annals of Applied Statistics 2013, sec. 4.

    Parameters
    ----------
    X
        Covariates, shape ``(n, p)``; p may be 0, which gives the difference of means with Welch's error.
    a, y
        Treatment (0 or 1) and outcome, shape ``(n,)``.
    errors
        HC2 (unbiased if the noise is homoscedastic) or HC3 (conservative, for few units).
    level
        Coverage of the interval, from Student's t with n - 2p - 2 degrees of freedom.

    Raises
    ------
    InvalidInput
        If covariates are collinear or constant, n <= 2p + 2, or a unit is fitted exactly (leverage 1).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, a = rng.normal(size=(200, 2)), np.arange(200) % 2
    >>> y = 0.5 * a + x @ [2.0, -1.0] + 0.1 * rng.normal(size=200)
    >>> effect = regression_adjustment(x, a, y)
    >>> round(effect.ate, 1), effect.se < 0.02
    (0.5, True)
    """
    outcome = sample(y, "y")
    treated = _arms(a, len(outcome))
    x, miss = _covariates(X, treated), tail(level)
    choice("errors", errors, ("HC2", "HC3"))
    centered = x - x.mean(axis=0)  # so that the treatment's coefficient is the effect at the average unit
    design = np.column_stack([np.ones(len(x)), treated, centered, treated[:, None] * centered])  # (n, 2p + 2)
    n, k = design.shape
    if n <= k or np.linalg.matrix_rank(design) < k:
        raise InvalidInput(
            f"{n} units cannot fit {k} coefficients: leave out constant, collinear or surplus covariates."
        )
    inverse = np.linalg.pinv(design)  # (2p + 2, n); its second row makes the effect of the outcomes
    residual = outcome - design @ (inverse @ outcome)
    slack = 1 - np.einsum("ij,ji->i", design, inverse)  # one minus leverages, the diagonal of design @ inverse
    if slack.min() < 1e-9:
        raise InvalidInput(f"unit {int(slack.argmin())} is fitted exactly (leverage 1), so its error is unknown.")
    variance = inverse[1] ** 2 @ (residual**2 / slack ** (1 if errors == "HC2" else 2))
    ate, se = float(inverse[1] @ outcome), float(np.sqrt(variance))
    half = float(sps.t.isf(miss, n - k)) * se
    return Effect(ate, se, (ate - half, ate + half))


def hajek(a: npt.ArrayLike, y: npt.ArrayLike, propensity: npt.ArrayLike, *, level: float = 0.95) -> Effect:
    r"""Inverse probability weighting with normalized weights.

    .. math:: \hat\tau = \mu_1 - \mu_0, \quad \mu_1 = \frac{\sum_i a_i y_i / e_i}{\sum_i a_i / e_i}, \quad
        \mu_0 = \frac{\sum_i (1 - a_i) y_i / (1 - e_i)}{\sum_i (1 - a_i) / (1 - e_i)}.

    The error is the sandwich of the two ratios with :math:`e` taken as known; where e was estimated by maximum
    likelihood that is conservative. J. Hajek, in "Foundations of Statistical Inference", 1971; K. Hirano, G. Imbens
    and G. Ridder, Econometrica 2003.

    Parameters
    ----------
    a, y
        Treatment (0 or 1) and outcome, shape ``(n,)``.
    propensity
        :math:`e_i = \Pr(a_i = 1 \mid x_i)`, inside (0, 1).

    Examples
    --------
    >>> effect = hajek([1, 1, 0, 0], [3.0, 2.0, 1.0, 2.0], [0.8, 0.4, 0.4, 0.8])
    >>> round(effect.ate, 3)  # (3/0.8 + 2/0.4) / (1/0.8 + 1/0.4) - (1/0.6 + 2/0.2) / (1/0.6 + 1/0.2)
    0.583
    """
    outcome = sample(y, "y")
    treated, e = _arms(a, len(outcome)), _propensities(propensity, len(outcome))
    w1, w0 = treated / e, ~treated / (1 - e)  # zero in the other arm
    mu1, mu0 = w1 @ outcome / w1.sum(), w0 @ outcome / w0.sum()
    # the two ratios, linearized: weights relative to their mean, times distances from the arm's mean
    influence = w1 * (outcome - mu1) / w1.mean() - w0 * (outcome - mu0) / w0.mean()
    return _from_influence(float(mu1 - mu0), influence, level)


def aipw(
    a: npt.ArrayLike,
    y: npt.ArrayLike,
    propensity: npt.ArrayLike,
    outcome_treated: npt.ArrayLike,
    outcome_control: npt.ArrayLike,
    *,
    level: float = 0.95,
) -> Effect:
    r"""Augmented inverse probability weighting: right if either the propensity or the outcome model is.

    .. math:: \phi_i = m_1(x_i) - m_0(x_i) + \frac{a_i (y_i - m_1(x_i))}{e_i}
        - \frac{(1 - a_i) (y_i - m_0(x_i))}{1 - e_i}, \qquad \hat\tau = \bar\phi, \quad
        \operatorname{se} = \operatorname{sd}(\phi) / \sqrt n.

    J. Robins, A. Rotnitzky and L. P. Zhao, JASA 1994. Predictions must come from other units than the one they are
    for; :class:`AverageEffect` sees to that. With logged probabilities of an adaptive allocation it also removes the
    bias of the arms' plain means.

    Parameters
    ----------
    a, y
        Treatment (0 or 1) and outcome, shape ``(n,)``.
    propensity
        :math:`e_i`, inside (0, 1).
    outcome_treated, outcome_control
        :math:`m_1(x_i)` and :math:`m_0(x_i)`: the predicted outcome of each unit under both treatments.

    Examples
    --------
    >>> effect = aipw([1, 0, 1, 0], [3.0, 1.0, 2.0, 2.0], [0.5] * 4, [2.0] * 4, [1.0] * 4)
    >>> effect.ate
    1.0
    """
    observed = sample(y, "y")
    treated, e = _arms(a, len(observed)), _propensities(propensity, len(observed))
    m1 = pair(outcome_treated, observed, ("outcome_treated", "y"))[0]
    m0 = pair(outcome_control, observed, ("outcome_control", "y"))[0]
    phi = m1 - m0 + treated * (observed - m1) / e - ~treated * (observed - m0) / (1 - e)
    return _from_influence(float(phi.mean()), phi, level)


@dataclass(eq=False, repr=False)
class AverageEffect(BaseEstimator):
    r"""Average effect of a binary treatment from observed units, with scikit-learn models inside.

    The units are cut into ``folds`` parts, each with the same share of treated units. For each part the propensity
    model is fitted on all other units, the outcome model on the other treated and on the other control units, and both
    predict for the part (cross-fitting), so that flexible models cost no bias by over-fitting. V. Chernozhukov et al.,
    "Double/debiased machine learning", Econometrics Journal 2018, sec. 3 and 5.1.

    Parameters
    ----------
    outcome
        Regressor of y on X, or classifier if y is 0 or 1. Default: ridge on standardized squares and products.
    propensity
        Classifier of a on X with ``predict_proba``. Default: logistic regression on squares and products.
    method
        ``aipw`` (:func:`aipw`), ``ipw`` (:func:`hajek`, no outcome model), ``regression``
        (:func:`regression_adjustment`, neither model is used) or ``naive`` (difference of means, X is not used).
        ``ipw`` is not cross-fitted: a logistic regression fitted to all units balances their covariates, and held-out
        propensities do not (at n = 1000 on the problem of the tests: bias +.01 against -.10). Give it a model with few
        parameters; flexible ones belong in ``aipw``.
    folds
        Parts of the cross-fitting; twice as many units are needed in each arm.
    clip
        Propensities are moved into this range. More than one in twenty outside it is warned of.
    random_state
        Seed of the folds.
    level
        Coverage of the interval.

    Attributes
    ----------
    ate_, se_, ci_
        Estimate, standard error and interval, in the units of y.
    overlap_
        :class:`Overlap`, or None where no propensity is used.
    propensity_
        Fitted or given propensities after clipping, shape ``(n,)``, or None.

    Examples
    --------
    Treated units have larger x, and so larger outcomes; the effect is 1:

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(1000, 1))
    >>> a = rng.random(1000) < 1 / (1 + np.exp(-x[:, 0]))
    >>> y = a + 2 * x[:, 0] + rng.normal(size=1000)
    >>> naive, both = (AverageEffect(method=m).fit(x, a, y) for m in ("naive", "aipw"))
    >>> naive.ate_ > 2, abs(both.ate_ - 1) < 3 * both.se_
    (True, True)
    """

    outcome: Any = None
    propensity: Any = None
    method: Method = "aipw"
    folds: int = 5
    clip: tuple[float, float] = (0.01, 0.99)
    random_state: int = 0
    level: float = 0.95

    def fit(
        self, X: npt.ArrayLike, a: npt.ArrayLike, y: npt.ArrayLike, *, known_propensity: npt.ArrayLike | None = None
    ) -> Self:
        """Estimate the effect.

        Parameters
        ----------
        X
            Covariates measured before the treatment, shape ``(n, p)``.
        a
            Treatment, 0 or 1, shape ``(n,)``.
        y
            Outcome, shape ``(n,)``.
        known_propensity
            Probabilities of treatment that are known (a designed or logged allocation), shape ``(n,)``; replaces the
            propensity model.

        Raises
        ------
        InvalidInput
            If the treatment is not binary, an arm is too small, X holds the treatment, or there is no overlap.
        """
        observed = sample(y, "y")
        treated = _arms(a, len(observed))
        x = _covariates(X, treated)
        self._check(treated)
        self.overlap_: Overlap | None = None
        self.propensity_: Floats | None = None
        effect = self._adjusted(x, treated, observed, known_propensity)
        self.ate_, self.se_, self.ci_ = effect.ate, effect.se, effect.ci
        return self

    def _adjusted(self, x: Floats, treated: npt.NDArray[np.bool_], y: Floats, known: npt.ArrayLike | None) -> Effect:
        if self.method == "naive":
            low, high = t_interval(y[treated], self.level, y=y[~treated])
            variance = y[treated].var(ddof=1) / treated.sum() + y[~treated].var(ddof=1) / (~treated).sum()
            return Effect((low + high) / 2, float(np.sqrt(variance)), (low, high))
        if self.method == "regression":
            return regression_adjustment(x, treated, y, level=self.level)
        everyone = np.arange(len(y))
        folds = [(everyone, everyone)]  # (units to fit on, units to predict for)
        if self.method == "aipw":
            split = StratifiedKFold(self.folds, shuffle=True, random_state=self.random_state)
            folds = list(split.split(x, treated))
        # propensities (n,), each predicted by a model that has not seen its unit
        e = np.empty(len(y)) if known is None else _propensities(known, len(y))
        if known is None:
            model = _default_propensity() if self.propensity is None else self.propensity
            for rest, part in folds:
                e[part] = _probability(clone(model).fit(x[rest], treated[rest]), x[part], "propensity")
        self.propensity_, self.overlap_ = self._clipped(e, treated)
        if self.method == "ipw":
            return hajek(treated, y, self.propensity_, level=self.level)
        # outcomes under treatment and under control, (n,) each, for units of both arms
        m1, m0 = np.empty(len(y)), np.empty(len(y))
        model = _default_outcome() if self.outcome is None else self.outcome
        for rest, part in folds:
            for predicted, arm in ((m1, treated), (m0, ~treated)):
                units = rest[arm[rest]]  # of the other folds, and of this arm
                predicted[part] = _expectation(clone(model), x[units], y[units], x[part])
        return aipw(treated, y, self.propensity_, m1, m0, level=self.level)

    def _clipped(self, e: Floats, treated: npt.NDArray[np.bool_]) -> tuple[Floats, Overlap]:
        low, high = self.clip
        clipped = np.clip(e, low, high)
        moved = int(np.count_nonzero(clipped != e))
        used = _propensities(clipped, len(e))
        if moved > _MANY_CLIPPED * len(e):
            warnings.warn(
                f"{moved} of {len(e)} propensities lie outside {self.clip}: the arms hardly overlap, and the estimate "
                "leans on the outcome model and on few units; see overlap_.",
                stacklevel=4,
            )
        # effective sizes (sum w)^2 / sum w^2 of both arms
        sizes = [float(w.sum() ** 2 / (w**2).sum()) for w in (1 / used[treated], 1 / (1 - used[~treated]))]
        return used, Overlap(float(e.min()), float(e.max()), moved, int(treated.sum()), int((~treated).sum()), *sizes)

    def _check(self, treated: npt.NDArray[np.bool_]) -> None:
        probability("level", self.level), choice("method", self.method, get_args(Method))
        low, high = self.clip
        if not 0 <= low < high <= 1:
            raise InvalidInput(f"clip={self.clip} must satisfy 0 <= low < high <= 1, e.g. (0.01, 0.99).")
        if self.method != "aipw":
            return
        least, smaller = 2 * integer("folds", self.folds, least=2), int(min(treated.sum(), (~treated).sum()))
        if smaller < least:
            raise InvalidInput(
                f"the smaller arm has {smaller} units; {self.method} with {self.folds} folds needs {least}: "
                "use fewer folds, or method='regression'."
            )


def _default_outcome() -> Any:
    # Interactions and squares catch most confounding that a line misses; the penalty is chosen by leave-one-out.
    return make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False), RidgeCV(np.logspace(-3, 3, 13)))


def _default_propensity() -> Any:
    return make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False), LogisticRegression(max_iter=1000))


def _probability(model: Any, x: Floats, name: str) -> Floats:
    if not hasattr(model, "predict_proba"):
        raise InvalidInput(f"the {name} model {type(model).__name__} has no predict_proba; pass a classifier that has.")
    return np.asarray(model.predict_proba(x)[:, 1], dtype=np.float64)


def _expectation(model: Any, x: Floats, y: Floats, at: Floats) -> Floats:
    """E[y | x] at new points; of a 0/1 outcome the probability, if the model is a classifier."""
    if not is_classifier(model):
        return np.asarray(model.fit(x, y).predict(at), dtype=np.float64)
    if not np.isin(y, (0, 1)).all():
        raise InvalidInput("the outcome model is a classifier, but y has values other than 0 and 1; pass a regressor.")
    if len(np.unique(y)) == 1:  # scikit-learn's classifiers refuse a single class
        return np.full(len(at), y[0])
    return _probability(model.fit(x, y), at, "outcome")
