r"""Search over configurations: Hyperband, asynchronous halving, and Bayesian optimization by expected improvement.

Ask for a trial, train it, tell its value. :class:`~mlcollage.stats.bandits.SuccessiveHalving` needs to be told how
much a small budget says; :class:`Hyperband` tries several answers; :class:`AsynchronousHalving` never lets a worker
wait; :class:`ExpectedImprovement` learns from every value where to look next. The best of many tried values is
biased upward: measure the winner again on fresh seeds. A. Gelman and A. Vehtari, JASA 2021, idea 6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special
from scipy.stats import qmc

from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats
from mlcollage.stats.bandits import SuccessiveHalving, Trial

__all__ = ["AsynchronousHalving", "ExpectedImprovement", "Hyperband", "expected_improvement"]

Draw = Callable[[np.random.Generator], Any]
_CANDIDATES = 1024  # quasi-random points among which expected improvement looks before it climbs
_CLIMBS = 5


def _check_budgets(eta: int, min_r: int, max_r: int) -> None:
    if eta < 2 or int(eta) != eta:
        raise InvalidInput(f"eta={eta} must be a whole number of at least 2.")
    if not 1 <= min_r <= max_r // eta:
        raise InvalidInput(f"min_r={min_r} and max_r={max_r}: 1 <= min_r <= max_r / eta is needed for two rungs.")


class Hyperband:
    r"""Hyperband: successive halving with many cheap starts, with few dear ones, and with all between.

    With :math:`s_{\max} = \lfloor \log_\eta (R / r_{\min}) \rfloor`, bracket :math:`s = s_{\max}, \dots, 0` halves

    .. math:: n_s = \left\lceil \frac{s_{\max} + 1}{s + 1}\, \eta^s \right\rceil \text{ configurations from resource }
        \lfloor R \eta^{-s} \rfloor,

    so every bracket costs about the same, and the last is random search at full resource. L. Li et al., JMLR 2018,
    algorithm 1.

    Parameters
    ----------
    draw
        ``draw(generator)`` gives a configuration.
    eta, min_r, max_r, maximize
        As in :class:`~mlcollage.stats.bandits.SuccessiveHalving`; R is ``max_r``.
    rng
        Seed or generator; the same seed and values give the same trials.

    Examples
    --------
    >>> search = Hyperband(lambda rng: rng.uniform(-1, 1), eta=3, max_r=27, rng=0)
    >>> while (trial := search.ask()) is not None:
    ...     search.tell(trial, -abs(trial.config - 0.5) - 0.1 / trial.resource)
    >>> round(search.best.config, 1), search.brackets
    (0.5, [(27, 1), (12, 3), (6, 9), (4, 27)])
    """

    def __init__(
        self,
        draw: Draw,
        eta: int = 3,
        min_r: int = 1,
        max_r: int = 27,
        *,
        maximize: bool = True,
        rng: np.random.Generator | int = 0,
    ) -> None:
        _check_budgets(eta, min_r, max_r)
        generator, most = np.random.default_rng(rng), 0
        while min_r * eta ** (most + 1) <= max_r:
            most += 1
        self.maximize = maximize
        self.brackets = [(math.ceil((most + 1) / (s + 1) * eta**s), max_r // eta**s) for s in range(most, -1, -1)]
        """Configurations and first resource of each bracket."""
        self._halvings = [
            SuccessiveHalving._from([draw(generator) for _ in range(n)], eta, r, max_r, maximize)
            for n, r in self.brackets
        ]
        self._offsets = np.cumsum([0, *(n for n, _ in self.brackets)]).tolist()

    @property
    def finished(self) -> bool:
        """Whether all brackets are complete."""
        return all(h.finished for h in self._halvings)

    @property
    def spent(self) -> int:
        """Resources of all values told, each rung trained from scratch."""
        return sum(h.spent for h in self._halvings)

    @property
    def best(self) -> Trial:
        """Best configuration at the highest resource of any bracket."""
        found: list[tuple[int, float, Trial]] = []
        for h, offset in zip(self._halvings, self._offsets, strict=False):
            if any(v is not None for v in h._rungs[0].values()):
                t = h.best
                value = h._value(t)
                found.append((t.resource, _signed(value, self.maximize), Trial(t.index + offset, t.config, t.resource)))
        if not found:
            raise InvalidInput("no value has been told yet; ask for trials and tell their values first.")
        return max(found, key=lambda f: f[:2])[2]

    def ask(self) -> Trial | None:
        """The next trial of the first bracket that has one; None when finished, or while values are awaited."""
        for h, offset in zip(self._halvings, self._offsets, strict=False):
            if (t := h.ask()) is not None:
                return Trial(t.index + offset, t.config, t.resource)
        return None

    def tell(self, trial: Trial, value: float) -> None:
        """Report the value of a trial; NaN says that the run failed."""
        k = int(np.searchsorted(self._offsets, trial.index, side="right")) - 1
        if not 0 <= k < len(self._halvings):
            raise InvalidInput(f"configuration {trial.index} does not exist; tell the trials that ask gave.")
        self._halvings[k].tell(Trial(trial.index - self._offsets[k], trial.config, trial.resource), value)


def _signed(value: float, maximize: bool) -> float:
    return -math.inf if math.isnan(value) else value if maximize else -value


class AsynchronousHalving:
    r"""Asynchronous successive halving (ASHA): a configuration goes up as soon as it is among its rung's best.

    Asked for a trial, look from the top rung down for a configuration among the best
    :math:`\lfloor |\text{rung}| / \eta \rfloor` of those told there that has not gone up yet; if there is none, start a
    new one at the bottom. No worker waits for another, at the price of some wrong promotions. L. Li et al., MLSys 2020,
    algorithm 2.

    Parameters
    ----------
    draw, eta, min_r, max_r, maximize, rng
        As in :class:`Hyperband`.

    Examples
    --------
    >>> search = AsynchronousHalving(lambda rng: rng.uniform(-1, 1), eta=3, max_r=9, rng=0)
    >>> for _ in range(60):  # it never ends by itself
    ...     trial = search.ask()
    ...     search.tell(trial, -abs(trial.config - 0.5))
    >>> round(search.best.config, 1), [len(rung) for rung in search.rungs]
    (0.5, [42, 13, 5])
    """

    def __init__(
        self,
        draw: Draw,
        eta: int = 3,
        min_r: int = 1,
        max_r: int = 27,
        *,
        maximize: bool = True,
        rng: np.random.Generator | int = 0,
    ) -> None:
        _check_budgets(eta, min_r, max_r)
        self.draw, self.eta, self.min_r, self.max_r, self.maximize = draw, int(eta), int(min_r), int(max_r), maximize
        self._rng = np.random.default_rng(rng)
        self.configs: list[Any] = []
        count = 1
        while min_r * eta**count <= max_r:
            count += 1
        self.rungs: list[dict[int, float]] = [{} for _ in range(count)]
        """Values told, by configuration, of each rung."""
        self._raised: list[set[int]] = [set() for _ in range(count)]
        self._out: set[tuple[int, int]] = set()

    @property
    def spent(self) -> int:
        """Resources of all values told, each rung trained from scratch."""
        return sum(self._resource(k) * len(rung) for k, rung in enumerate(self.rungs))

    @property
    def best(self) -> Trial:
        """Best configuration of the highest rung with a value."""
        for k in reversed(range(len(self.rungs))):
            if self.rungs[k]:
                i = self._ranked(k)[0]
                return Trial(i, self.configs[i], self._resource(k))
        raise InvalidInput("no value has been told yet; ask for trials and tell their values first.")

    def ask(self) -> Trial:
        """A promotion if there is one, else a new configuration."""
        for k in reversed(range(len(self.rungs) - 1)):
            best = self._ranked(k)[: len(self.rungs[k]) // self.eta]
            for i in best:
                if i not in self._raised[k] and not math.isnan(self.rungs[k][i]):
                    self._raised[k].add(i)
                    return self._start(i, k + 1)
        self.configs.append(self.draw(self._rng))
        return self._start(len(self.configs) - 1, 0)

    def tell(self, trial: Trial, value: float) -> None:
        """Report the value of a trial, in any order. NaN says that the run failed: it ranks last and never goes up."""
        if (trial.index, trial.resource) not in self._out:
            raise InvalidInput(
                f"configuration {trial.index} at resource {trial.resource} was not asked for, or was told before."
            )
        self._out.remove((trial.index, trial.resource))
        self.rungs[[self._resource(k) for k in range(len(self.rungs))].index(trial.resource)][trial.index] = float(
            value
        )

    def _start(self, index: int, rung: int) -> Trial:
        self._out.add((index, self._resource(rung)))
        return Trial(index, self.configs[index], self._resource(rung))

    def _resource(self, rung: int) -> int:
        return self.min_r * self.eta**rung

    def _ranked(self, rung: int) -> list[int]:
        told = self.rungs[rung]
        return sorted(told, key=lambda i: -_signed(told[i], self.maximize))


def expected_improvement(mean: npt.ArrayLike, sd: npt.ArrayLike, best: float, *, maximize: bool = True) -> Floats:
    r"""Expected improvement over the best value so far, for normal beliefs.

    .. math:: \mathrm{E}[\max(f - f^*, 0)] = (\mu - f^*) \Phi(z) + \sigma \varphi(z), \qquad z = (\mu - f^*) / \sigma.

    D. Jones, M. Schonlau and W. Welch, Journal of Global Optimization 1998, eq. 15.

    Parameters
    ----------
    mean, sd
        Of the belief at each point; ``sd`` not negative. Same shape.
    best
        :math:`f^*`.
    maximize
        Whether larger is better; if not, the improvement is downwards.

    Examples
    --------
    >>> expected_improvement([0.0, 1.0], [1.0, 0.0], best=0.0).round(3).tolist()
    [0.399, 1.0]
    """
    mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(sd, dtype=np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and (sigma >= 0).all() and np.isfinite(best)):
        raise InvalidInput("means, standard deviations and the best value must be finite, and no sd negative.")
    gain = mu - best if maximize else best - mu
    safe = np.where(sigma > 0, sigma, 1.0)
    z = gain / safe
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.where(sigma > 0, gain * special.ndtr(z) + safe * density, np.maximum(gain, 0.0))


class ExpectedImprovement:
    r"""Bayesian optimization: a Gaussian process over a box, asked where it expects the largest improvement.

    The process has a Matérn-5/2 kernel with a length scale per dimension and a noise term, fitted by marginal likelihood
    (scikit-learn) to standardized values. Points asked for and not told yet count as told with their predicted mean,
    so that several workers are sent to different places. J. Snoek, H. Larochelle and R. Adams, NeurIPS 2012.

    Parameters
    ----------
    bounds
        (low, high) of each dimension; give logarithms of what spans orders of magnitude.
    start
        Points of a Sobol sequence before the process is first fitted; default ``max(4, 2 d)``.
    maximize
        Whether larger values are better.
    rng
        Seed or generator.

    Examples
    --------
    >>> search = ExpectedImprovement([(-2.0, 2.0)], maximize=False, rng=0)
    >>> for _ in range(12):
    ...     x = search.ask()
    ...     search.tell(x, float((x[0] - 0.3) ** 2))
    >>> bool(abs(search.best[0][0] - 0.3) < 0.05)
    True
    """

    def __init__(
        self,
        bounds: Sequence[tuple[float, float]],
        *,
        start: int | None = None,
        maximize: bool = True,
        rng: np.random.Generator | int = 0,
    ) -> None:
        box = np.asarray(bounds, dtype=np.float64)
        if box.ndim != 2 or box.shape[1:] != (2,) or not len(box) or not (np.isfinite(box).all()):
            raise InvalidInput(f"bounds={bounds!r} must be pairs (low, high) of finite numbers, one per dimension.")
        if not (box[:, 0] < box[:, 1]).all():
            raise InvalidInput(f"bounds={bounds!r}: every low must be below its high.")
        if start is not None and start < 2:
            raise InvalidInput(f"start={start} must be at least 2 points.")
        self.box, self.maximize = box, maximize
        self.start = max(4, 2 * len(box)) if start is None else start
        generator = np.random.default_rng(rng)
        self._sobol = qmc.Sobol(len(box), rng=generator)
        self._seed = int(generator.integers(2**31))
        self._asked: list[Floats] = []  # unit cube, not told yet
        self._x: list[Floats] = []
        self._y: list[float] = []

    @property
    def best(self) -> tuple[Floats, float]:
        """Best point told so far and its value."""
        told = [i for i, y in enumerate(self._y) if math.isfinite(y)]
        if not told:
            raise InvalidInput("no finite value has been told yet; ask for points and tell their values first.")
        i = max(told, key=lambda i: _signed(self._y[i], self.maximize))
        return self._outside(self._x[i]), self._y[i]

    def ask(self) -> Floats:
        """The next point, shape ``(d,)``."""
        if len(self._x) + len(self._asked) < self.start or np.isfinite(self._y).sum() < 2:
            u = self._sobol.random(1)[0]
        else:
            u = self._improve()
        self._asked.append(u)
        return self._outside(u)

    def tell(self, x: npt.ArrayLike, value: float) -> None:
        """Report the value of a point, asked for or not. A value that is not finite counts as the worst one seen."""
        point = np.asarray(x, dtype=np.float64)
        low, width = self.box[:, 0], self.box[:, 1] - self.box[:, 0]
        if point.shape != low.shape or not ((point >= low) & (point <= low + width)).all():
            raise InvalidInput(f"x={x!r} must be a point of shape {low.shape} inside the bounds.")
        u = (point - low) / width
        self._asked = [a for a in self._asked if not np.allclose(a, u, atol=1e-9)]
        self._x.append(u)
        self._y.append(float(value))

    def _outside(self, u: Floats) -> Floats:
        return np.clip(self.box[:, 0] + u * (self.box[:, 1] - self.box[:, 0]), self.box[:, 0], self.box[:, 1])

    def _improve(self) -> Floats:
        x, y = np.array(self._x), np.array([_signed(v, self.maximize) for v in self._y])
        worst = y[np.isfinite(y)].min()
        y = np.where(np.isfinite(y), y, worst)
        y = (y - y.mean()) / (y.std() or 1.0)
        model = self._fit(x, y)
        if self._asked:
            pending = np.array(self._asked)
            x, y = np.vstack([x, pending]), np.concatenate([y, model.predict(pending)])
            model.optimizer = None
            model.set_params(kernel=model.kernel_).fit(x, y)
        best = float(model.predict(x).max())  # of the belief: with noise, the largest value is a lucky one

        def loss(u: Floats) -> Floats:
            mean, sd = model.predict(np.atleast_2d(u), return_std=True)
            return -expected_improvement(mean, sd, best)

        candidates = qmc.Sobol(x.shape[1], rng=self._seed + len(x)).random(_CANDIDATES)
        order = np.argsort(loss(candidates))[:_CLIMBS]
        climbed = [
            optimize.minimize(
                lambda u: float(loss(u)[0]), candidates[i], bounds=[(0, 1)] * x.shape[1], method="L-BFGS-B"
            )
            for i in order
        ]
        return np.clip(min(climbed, key=lambda r: float(r.fun)).x, 0.0, 1.0)

    def _fit(self, x: Floats, y: Floats) -> Any:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(x.shape[1], 0.3), (0.02, 10.0), nu=2.5)
        model = GaussianProcessRegressor(
            kernel + WhiteKernel(1e-3, (1e-8, 1.0)), n_restarts_optimizer=1, random_state=self._seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is an answer too
            return model.fit(x, y)
