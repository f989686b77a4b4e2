r"""Simulation as a check of inference: calibration of posteriors on simulated truths, and predictive checks on data.

Simulation-based calibration: draw :math:`\tilde\theta` from the prior, y from the model given it, and L posterior
draws given y. If the sampler is right the rank of :math:`\tilde\theta` among the draws is uniform on 0..L, for every
quantity, so rank every quantity: a mean alone misses bugs in a variance, and only a quantity that depends on the data
(the log likelihood) sees a posterior that ignores them. S. Talts et al., arXiv 1804.06788; M. Modrak et al.,
Bayesian Analysis 2023; A. Gelman and A. Vehtari, JASA 2021, idea 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats as sps

from mlcollage._checks import integer, probability
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, Rng, finite, table
from mlcollage.stats.adaptive import holm

Ints = npt.NDArray[np.int64]
_POINTS = 100  # at most, at which an ECDF is compared with its band
_SIMULATED = 4000  # uniform samples behind a band: the miss rate of a 95 % band is known to 0.3 points


@dataclass(frozen=True)
class EcdfBand:
    """Simultaneous band of the ECDF of a uniform sample.

    Attributes
    ----------
    z
        Points in (0, 1), shape ``(K,)``.
    lower, upper
        The band, as shares of the sample; subtract ``z`` for the ECDF-difference plot.
    pointwise
        Coverage at each point that makes the coverage at all points ``level``.
    null
        Smallest pointwise two-sided p value of each simulated uniform sample, sorted.
    """

    z: Floats
    lower: Floats
    upper: Floats
    pointwise: float
    null: Floats


@dataclass(frozen=True)
class SBCResult:
    """Tests of the ranks of q quantities, and their ECDF at K points.

    Attributes
    ----------
    names
        Of the quantities.
    p_values
        Chi-square test of uniform ranks, shape ``(q,)``.
    ecdf_p_values
        Of the largest pointwise deviation of the ECDF, shape ``(q,)``; sees smooth departures the bins miss.
    ecdf
        Share of simulations with rank / n_ranks below ``band.z``, shape ``(q, K)``.
    band
        The simultaneous band of each.
    """

    names: tuple[str, ...]
    p_values: Floats
    ecdf_p_values: Floats
    ecdf: Floats
    band: EcdfBand

    @property
    def difference(self) -> Floats:
        """ECDF minus uniform, shape ``(q, K)``; humps above 0 say the draws lie too high."""
        return self.ecdf - self.band.z

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Whether the whole ECDF of a quantity lies in its band, shape ``(q,)``."""
        within = (self.ecdf >= self.band.lower) & (self.ecdf <= self.band.upper)
        return np.asarray(within.all(axis=1))

    def passed(self, alpha: float = 0.01) -> bool:
        """Whether no test rejects at ``alpha`` after Holm's correction over both tests of all quantities."""
        return bool((holm(np.concatenate([self.p_values, self.ecdf_p_values])) > alpha).all())


def sbc_ranks(truth: npt.ArrayLike, draws: npt.ArrayLike, rng: Rng = 0) -> Ints:
    r"""Rank of each truth among its posterior draws, :math:`\#\{l : \theta_l < \tilde\theta\}`, ties broken at random.

    Parameters
    ----------
    truth
        Simulated from the prior, shape ``(n_sims,)`` or ``(n_sims, q)``.
    draws
        L posterior draws for each simulated data set, about independent (thin to ESS of about L), shape
        ``(n_sims, L)`` or ``(n_sims, L, q)``.
    rng
        Generator or seed, for ties.

    Returns
    -------
    ndarray
        Ranks in 0..L, shape ``(n_sims, q)``.

    Examples
    --------
    >>> sbc_ranks([0.5, 2.0], [[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]]).ravel().tolist()
    [2, 3]
    """
    t, d = np.asarray(truth, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    if t.ndim == 1:  # one quantity
        t, d = t[:, None], d[..., None]
    if t.ndim != 2 or d.ndim != 3 or (d.shape[0], d.shape[2]) != t.shape or d.shape[1] < 1:
        raise InvalidInput(
            f"truth has shape {np.shape(truth)} and draws {np.shape(draws)}; (n_sims, q) and (n_sims, L, q) were "
            "expected."
        )
    if np.isnan(t).any() or np.isnan(d).any():
        raise InvalidInput("truth or draws hold NaN: a failed fit has no rank; mend or report it, do not drop it.")
    below, ties = (d < t[:, None]).sum(axis=1), (d == t[:, None]).sum(axis=1)  # over the L draws: (n_sims, q)
    return below + np.random.default_rng(rng).integers(0, ties + 1)


def ecdf_band(n: int, n_ranks: int, level: float = 0.95, rng: Rng = 0) -> EcdfBand:
    r"""Simultaneous band of the ECDF of n uniform values on ``n_ranks`` ranks.

    At each point z the count below is :math:`\mathrm{Binomial}(n, z)`. The pointwise coverage that makes the coverage
    at all points ``level`` is a quantile, over simulated uniform samples, of the smallest pointwise p value
    (T. Saeilynoja, P.-C. Buerkner and A. Vehtari, Statistics and Computing 2022, sec. 2.2).

    Parameters
    ----------
    n
        Sample size (simulations).
    n_ranks
        Number of possible ranks, L + 1 for L draws.
    level
        Simultaneous coverage.
    rng
        Generator or seed.

    Examples
    --------
    >>> band = ecdf_band(200, 100)
    >>> bool((band.lower < band.z).all() and (band.z < band.upper).all()), band.pointwise > 0.98
    (True, True)
    """
    integer("n", n, least=1), integer("n_ranks", n_ranks, least=2), probability("level", level)
    z = _cuts(n_ranks) / n_ranks  # (K,)
    steps = np.diff(np.concatenate([[0.0], z, [1.0]]))
    # counts below each point of simulated uniform samples, (_SIMULATED, K): sums of multinomial cells
    counts = np.random.default_rng(rng).multinomial(n, steps, _SIMULATED)[:, :-1].cumsum(axis=1)
    null = np.sort(_smallest_p(counts, n, z))
    # a sample leaves the band somewhere if its smallest p value is below gamma
    gamma = float(np.quantile(null, 1 - level, method="lower"))
    low, high = sps.binom.ppf(gamma / 2, n, z), sps.binom.isf(gamma / 2, n, z)
    return EcdfBand(z, low / n, high / n, 1 - gamma, null)


def _cuts(n_ranks: int) -> Ints:
    """Ranks below which counts are compared: all inner boundaries, or a hundred of them spread evenly."""
    return np.unique(np.linspace(0, n_ranks, min(n_ranks, _POINTS) + 1).round().astype(np.int64))[1:-1]


def _smallest_p(counts: Ints, n: int, z: Floats) -> Floats:
    """Smallest over points of the two-sided binomial p value, for each row of counts ``(rows, K)``."""
    below = sps.binom.cdf(np.arange(-1, n + 1)[:, None], n, z)  # row k: P(count <= k - 1)
    points = np.arange(len(z))
    two_sided = 2 * np.minimum(below[counts + 1, points], 1 - below[counts, points])
    return np.minimum(two_sided, 1.0).min(axis=1)


def sbc_uniformity(
    ranks: npt.ArrayLike | Mapping[str, npt.ArrayLike], n_ranks: int, *, level: float = 0.95, rng: Rng = 0
) -> SBCResult:
    r"""Are the ranks of simulation-based calibration uniform? Chi-square test and simultaneous ECDF band.

    .. math:: \chi^2 = \sum_b \frac{(O_b - E_b)^2}{E_b}, \qquad
        \hat F(z) - z \in [\,l(z) - z,\; u(z) - z\,] \text{ for all } z.

    Parameters
    ----------
    ranks
        In 0..n_ranks - 1, shape ``(n_sims,)`` or ``(n_sims, q)``, or a mapping of names to ``(n_sims,)``.
    n_ranks
        Number of possible ranks: L + 1 for L draws.
    level
        Simultaneous coverage of the band.
    rng
        Generator or seed of the band's simulation.

    Raises
    ------
    InvalidInput
        On ranks out of range or not whole, or fewer than 20 simulations.

    Examples
    --------
    A sampler whose posterior is too narrow leaves the truth at the ends:

    >>> rng = np.random.default_rng(0)
    >>> truth = rng.normal(size=500)
    >>> right, narrow = (sd * rng.normal(size=(500, 99)) for sd in (1.0, 0.7))
    >>> result = sbc_uniformity({"right": sbc_ranks(truth, right)[:, 0], "narrow": sbc_ranks(truth, narrow)[:, 0]}, 100)
    >>> result.inside.tolist(), bool(result.p_values[1] < 1e-6)
    ([True, False], True)
    """
    names, found = _named_ranks(ranks, n_ranks)
    n = len(found)
    band = ecdf_band(n, n_ranks, level, rng)
    counts = np.stack([(found < cut).sum(axis=0) for cut in _cuts(n_ranks)], axis=1)  # (q, K)
    # the p value of a smallest p value: its rank among those of uniform samples, equal ones against it
    ecdf_p = (1 + np.searchsorted(band.null, _smallest_p(counts, n, band.z) * (1 + 1e-12), "right")) / (
        1 + len(band.null)
    )
    return SBCResult(names, _chi_square(found, n_ranks), ecdf_p, counts / n, band)


def _named_ranks(ranks: npt.ArrayLike | Mapping[str, npt.ArrayLike], n_ranks: int) -> tuple[tuple[str, ...], Ints]:
    if isinstance(ranks, Mapping):
        if len({np.shape(r) for r in ranks.values()}) != 1:
            raise InvalidInput(f"ranks of {', '.join(ranks)} differ in number; one (n_sims,) for each name is needed.")
        names, given = tuple(ranks), np.stack([np.asarray(r) for r in ranks.values()], axis=-1)
    else:
        given = np.asarray(ranks)
        given = given[:, None] if given.ndim == 1 else given
        names = tuple(f"quantity {i}" for i in range(given.shape[-1]))
    values = table(given, "ranks", "simulations, quantities", rows=20)  # fewer show nothing about uniformity
    if (values != np.floor(values)).any() or (values < 0).any() or (values >= n_ranks).any():
        raise InvalidInput(f"ranks must be whole numbers in 0..{n_ranks - 1} (n_ranks is L + 1 for L draws).")
    return names, values.astype(np.int64)


def _chi_square(ranks: Ints, n_ranks: int) -> Floats:
    """Over at most 20 bins of about equal width with at least five expected; bins know how many ranks they hold."""
    bins = max(2, min(20, n_ranks, len(ranks) // 5))
    # bins of nearly equal width: what each is expected to hold is counted, not assumed equal
    bin_of = np.arange(n_ranks) * bins // n_ranks
    expected = np.bincount(bin_of, minlength=bins) * len(ranks) / n_ranks
    return np.array([sps.chisquare(np.bincount(bin_of[c], minlength=bins), expected).pvalue for c in ranks.T])


@dataclass(frozen=True)
class PredictiveCheck:
    """Statistics of n observations beside those of S replicates of them.

    Attributes
    ----------
    observed
        Statistics of the data, by name.
    replicated
        Of each replicate, by name, shape ``(S,)``.
    p_values
        P(replicated >= observed), ties counting half: near 0 or 1 the model does not make such data.
    pit
        Probability integral transform of each observation, shape ``(n,)``: about uniform if predictions are calibrated.
    """

    observed: dict[str, float]
    replicated: dict[str, Floats]
    p_values: dict[str, float]
    pit: Floats

    def flagged(self, alpha: float = 0.05) -> list[str]:
        """Statistics whose p value lies within alpha / 2 of 0 or 1."""
        return [name for name, p in self.p_values.items() if min(p, 1 - p) < alpha / 2]

    def pit_uniformity(self) -> SBCResult:
        """Whether the PIT values are uniform, with the band; for independent observations not used in the fit.

        On the data of the fit the values are too central, the more so the more parameters there are.
        """
        n_ranks = len(next(iter(self.replicated.values()))) + 1
        return sbc_uniformity({"pit": np.minimum((self.pit * n_ranks).astype(np.int64), n_ranks - 1)}, n_ranks)


def posterior_predictive_check(
    replicates: npt.ArrayLike,
    observed: npt.ArrayLike,
    stats: Mapping[str, Callable[[Floats], float]] | Sequence[Callable[[Floats], float]],
    *,
    rng: Rng = 0,
) -> PredictiveCheck:
    r"""Do data simulated from the fitted model look like the data?

    .. math:: p_T = \Pr[T(y^{\mathrm{rep}}) \ge T(y) \mid y], \qquad
        \mathrm{PIT}_i = \frac{\#\{s : y^s_i < y_i\} + U_i (1 + \#\{s : y^s_i = y_i\})}{S + 1}.

    Choose statistics the model was not fitted to: a normal model always reproduces the mean and the variance. The p
    value of a statistic that was fitted is near 1/2 whatever the data, so a check can only be failed. A. Gelman,
    X.-L. Meng and H. Stern, Statistica Sinica 1996.

    Parameters
    ----------
    replicates
        Simulated data sets, one per posterior draw, shape ``(S, n)``.
    observed
        The data, shape ``(n,)``.
    stats
        Named functions of a data set ``(n,)``; a sequence takes the functions' names.
    rng
        Generator or seed of U.

    Raises
    ------
    InvalidInput
        If the shapes do not fit, a value is not finite, or a statistic is not one finite number.

    Examples
    --------
    A normal model of data with a heavy tail: the standard deviation fits, the largest value does not.

    >>> rng = np.random.default_rng(1)
    >>> y = rng.standard_t(2, size=200)
    >>> rep = rng.normal(y.mean(), y.std(), (500, 200))
    >>> check = posterior_predictive_check(rep, y, {"sd": np.std, "largest": lambda v: np.abs(v).max()})
    >>> check.flagged()
    ['largest']
    """
    y, rep = finite(observed, "observed"), table(replicates, "replicates", "S, n", rows=2)
    if rep.shape[1:] != y.shape:
        raise InvalidInput(f"replicates have shape {rep.shape} and observed {y.shape}; (S, n) and (n,) were expected.")
    named = dict(stats) if isinstance(stats, Mapping) else {getattr(s, "__name__", str(s)): s for s in stats}
    if not named or len(named) != len(stats):
        raise InvalidInput("stats must hold one or more functions with different names; pass a mapping to name them.")
    # statistics of the data, and (S,) of the replicates
    seen = {name: _number(stat, y, name) for name, stat in named.items()}
    made = {name: np.array([_number(stat, r, name) for r in rep]) for name, stat in named.items()}
    p_values = {name: float(np.mean(made[name] > t) + 0.5 * np.mean(made[name] == t)) for name, t in seen.items()}
    below, ties = (rep < y).sum(axis=0), (rep == y).sum(axis=0)  # over the S replicates: (n,)
    pit = (below + np.random.default_rng(rng).random(len(y)) * (1 + ties)) / (len(rep) + 1)
    return PredictiveCheck(seen, made, p_values, pit)


def _number(stat: Callable[[Floats], float], data: Floats, name: str) -> float:
    value = np.asarray(stat(data), dtype=np.float64)
    if value.shape != () or not np.isfinite(value):
        raise InvalidInput(f"statistic {name!r} gave {value!r}; one finite number for a data set was expected.")
    return float(value)
