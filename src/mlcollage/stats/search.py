r"""Search over configurations: halving in rungs, Hyperband, and Bayesian optimization by expected improvement.

Ask for a trial, train it, tell its value. :class:`SuccessiveHalving` finds the best of many configurations when a
small budget already says something, and needs to be told how much; :class:`Hyperband` tries several answers;
:class:`AsynchronousHalving` never lets a worker wait; :class:`ExpectedImprovement` learns from every value where to
look next. The best of many tried values is biased upward: measure the winner again on fresh seeds. A. Gelman and
A. Vehtari, JASA 2021, idea 6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special
from scipy.stats import qmc

from mlcollage._checks import integer, real
from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats, Rng, finite

Draw = Callable[[np.random.Generator], Any]
_CANDIDATES = 1024  # quasi-random points among which expected improvement looks before it climbs
_CLIMBS = 5


@dataclass(frozen=True)
class Trial:
    """A configuration and how much to spend on it: its ``index``, the ``config`` itself, and the ``resource``."""

    index: int
    config: Any
    resource: int


class Halving:
    """What searches by halving share: configurations, values told, and trials asked for and not told yet.

    Rung k is trained with the resource ``min_r * eta**k``.

    Attributes
    ----------
    configs : dict
        Configurations by their index.
    rungs : list of dict
        Values told, by configuration, of each rung.
    """

    def __init__(
        self, configs: Iterable[Any], eta: int, min_r: int, max_r: int, maximize: bool, *, first: int = 0
    ) -> None:
        self.configs = dict(enumerate(configs, first))
        self.eta, self.min_r, self.max_r, self.maximize = eta, min_r, max_r, maximize
        self.rungs: list[dict[int, float]] = [{}]
        self._out: dict[tuple[int, int], int] = {}  # rung of each trial that is out, by index and resource

    @property
    def spent(self) -> int:
        """Resources of all values told, each rung trained from scratch."""
        return sum(self._resource(k) * len(rung) for k, rung in enumerate(self.rungs))

    @property
    def best(self) -> Trial:
        """Best configuration of the highest rung with a value."""
        return _best([self])

    def tell(self, trial: Trial, value: float) -> None:
        """Report the value of a trial, in any order. NaN says that the run failed: it ranks last, and is kept."""
        rung = self._out.pop((trial.index, trial.resource), None)
        if rung is None:
            raise InvalidInput(f"trial {trial.index} at resource {trial.resource} was not asked for, or told before.")
        self.rungs[rung][trial.index] = float(value)

    def _start(self, index: int, rung: int) -> Trial:
        trial = Trial(index, self.configs[index], self._resource(rung))
        self._out[index, trial.resource] = rung
        return trial

    def _resource(self, rung: int) -> int:
        return self.min_r * self.eta**rung

    def _ranked(self, rung: int) -> list[int]:
        """Configurations told on a rung: best first, failed runs last, ties in the order given."""
        told = self.rungs[rung]
        return sorted(told, key=lambda i: (-_signed(told[i], self.maximize), i))


def _best(searches: Sequence[Halving]) -> Trial:
    """The best value at the highest resource of any search."""
    leaders = []
    for search in searches:
        for k, rung in enumerate(search.rungs):
            if rung:
                i = search._ranked(k)[0]
                trial = Trial(i, search.configs[i], search._resource(k))
                leaders.append((trial.resource, _signed(rung[i], search.maximize), trial))
    if not leaders:
        raise InvalidInput("no value has been told yet; ask for trials and tell their values first.")
    return max(leaders, key=lambda leader: leader[:2])[2]


def _signed(value: float, maximize: bool) -> float:
    """Larger is better; a failed run is worst."""
    return -math.inf if math.isnan(value) else value if maximize else -value


def _rungs(eta: int, min_r: int, max_r: int) -> int:
    """How many rungs the budgets allow, at least two: resources min_r, eta min_r, ... up to max_r."""
    integer("eta", eta, least=2), integer("min_r", min_r, least=1), integer("max_r", max_r, least=1)
    count = 0
    while min_r * eta**count <= max_r:
        count += 1
    if count < 2:
        raise InvalidInput(f"min_r={min_r} and max_r={max_r}: min_r <= max_r / eta is needed for two rungs.")
    return count


class SuccessiveHalving(Halving):
    r"""Successive halving: all configurations on a small budget, the best 1/eta on eta times as much, and so on.

    Rung k runs :math:`\lfloor n \eta^{-k} \rfloor` configurations on :math:`r_{\min} \eta^k`, up to ``max_r`` or until
    one is left, so every rung costs about the same. K. Jamieson and A. Talwalkar, AISTATS 2016; L. Li et al.,
    JMLR 2018.

    Parameters
    ----------
    configs
        Candidates, at least ``eta``; anything.
    eta
        Keep one in this many, at least 2.
    min_r, max_r
        Least and most to spend on a configuration (epochs, seeds, training samples).
    maximize
        Whether larger values are better.

    Raises
    ------
    InvalidInput
        On fewer configurations than eta, budgets that leave a single rung, or a value for a trial not asked for.

    Examples
    --------
    >>> search = SuccessiveHalving([0.001, 0.01, 0.1, 1.0], eta=2, min_r=1, max_r=4)
    >>> while (trial := search.ask()) is not None:
    ...     search.tell(trial, -abs(trial.config - 0.1))  # train trial.config for trial.resource epochs
    >>> search.best.config, search.spent
    (0.1, 12)
    """

    def __init__(
        self, configs: Iterable[Any], eta: int = 3, min_r: int = 1, max_r: int = 27, *, maximize: bool = True
    ) -> None:
        _rungs(eta, min_r, max_r)
        super().__init__(configs, eta, min_r, max_r, maximize)
        if len(self.configs) < eta:
            raise InvalidInput(f"{len(self.configs)} configurations are fewer than eta={eta}; give more.")
        self._members = list(self.configs)  # of the present rung

    @property
    def resource(self) -> int:
        """What a configuration of the present rung is given."""
        return self._resource(len(self.rungs) - 1)

    @property
    def finished(self) -> bool:
        """Whether the last rung is complete."""
        return len(self.rungs[-1]) == len(self._members) and not self._survivors()

    def ask(self) -> Trial | None:
        """The next trial; None when finished, or while the values of all trials of a rung are awaited."""
        if len(self.rungs[-1]) == len(self._members) and (survivors := self._survivors()):
            self._members = survivors
            self.rungs.append({})
        for i in self._members:
            if i not in self.rungs[-1] and (i, self.resource) not in self._out:
                return self._start(i, len(self.rungs) - 1)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Values told so far, as plain lists; trials asked for and not yet told are forgotten and asked for again."""
        rungs = [list(map(list, rung.items())) for rung in self.rungs]
        return {"settings": self._settings(), "members": self._members, "rungs": rungs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, with the same configurations and settings."""
        if state.get("settings") != self._settings():
            raise InvalidInput(f"the state has the settings {state.get('settings')}; here they are {self._settings()}.")
        self.rungs = [{int(i): float(value) for i, value in rung} for rung in state["rungs"]]
        self._members, self._out = list(state["members"]), {}

    def _settings(self) -> dict[str, Any]:
        names = ("eta", "min_r", "max_r", "maximize")
        return {"configs": len(self.configs), **{name: getattr(self, name) for name in names}}

    def _survivors(self) -> list[int]:
        """Who goes up from the present rung; nobody from the last."""
        keep = len(self.configs) // self.eta ** len(self.rungs)  # 0 where too few are left
        return [] if self._resource(len(self.rungs)) > self.max_r else self._ranked(len(self.rungs) - 1)[:keep]


class _Bracket(SuccessiveHalving):
    """A bracket of Hyperband, whose last one has a single rung; indices begin at ``first``."""

    def __init__(self, configs: list[Any], eta: int, min_r: int, max_r: int, maximize: bool, first: int) -> None:
        Halving.__init__(self, configs, eta, min_r, max_r, maximize, first=first)
        self._members = list(self.configs)


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
        As in :class:`SuccessiveHalving`; R is ``max_r``.
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
        self, draw: Draw, eta: int = 3, min_r: int = 1, max_r: int = 27, *, maximize: bool = True, rng: Rng = 0
    ) -> None:
        generator, count = np.random.default_rng(rng), _rungs(eta, min_r, max_r)
        self.brackets = [(math.ceil(count / (s + 1) * eta**s), max_r // eta**s) for s in reversed(range(count))]
        """Configurations and first resource of each bracket."""
        self._halvings: list[_Bracket] = []
        for n, r in self.brackets:
            first = sum(len(h.configs) for h in self._halvings)
            configs = [draw(generator) for _ in range(n)]
            self._halvings.append(_Bracket(configs, eta, r, max_r, maximize, first))

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
        return _best(self._halvings)

    def ask(self) -> Trial | None:
        """The next trial of the first bracket that has one; None when finished, or while values are awaited."""
        return next((trial for h in self._halvings if (trial := h.ask()) is not None), None)

    def tell(self, trial: Trial, value: float) -> None:
        """Report the value of a trial; NaN says that the run failed."""
        own = next((h for h in self._halvings if trial.index in h.configs), self._halvings[0])
        own.tell(trial, value)


class AsynchronousHalving(Halving):
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
        self, draw: Draw, eta: int = 3, min_r: int = 1, max_r: int = 27, *, maximize: bool = True, rng: Rng = 0
    ) -> None:
        count = _rungs(eta, min_r, max_r)
        super().__init__((), eta, min_r, max_r, maximize)
        self.draw, self._rng = draw, np.random.default_rng(rng)
        self.rungs = [{} for _ in range(count)]
        self._raised: list[set[int]] = [set() for _ in range(count)]  # who has gone up from each rung

    def ask(self) -> Trial:
        """A promotion if there is one, else a new configuration; a failed run never goes up."""
        for k in reversed(range(len(self.rungs) - 1)):
            for i in self._ranked(k)[: len(self.rungs[k]) // self.eta]:
                if i not in self._raised[k] and not math.isnan(self.rungs[k][i]):
                    self._raised[k].add(i)
                    return self._start(i, k + 1)
        new = len(self.configs)
        self.configs[new] = self.draw(self._rng)
        return self._start(new, 0)


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
    mu, sigma, best = finite(mean, "mean"), finite(sd, "sd"), real("best", best)
    if (sigma < 0).any():
        raise InvalidInput("sd is negative somewhere; standard deviations are needed.")
    gain = mu - best if maximize else best - mu
    safe = np.where(sigma > 0, sigma, 1.0)  # a sure belief improves by its gain, if that is positive
    z = gain / safe
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.where(sigma > 0, gain * special.ndtr(z) + safe * density, np.maximum(gain, 0.0))


class ExpectedImprovement:
    r"""Bayesian optimization: a Gaussian process over a box, asked where it expects the largest improvement.

    The process has a Matérn-5/2 kernel with a length scale per dimension and a noise term, fitted by marginal
    likelihood (scikit-learn) to standardized values. Points asked for and not told yet count as told with their
    predicted mean, so that several workers are sent to different places. J. Snoek, H. Larochelle and R. Adams,
    NeurIPS 2012.

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
        self, bounds: Sequence[tuple[float, float]], *, start: int | None = None, maximize: bool = True, rng: Rng = 0
    ) -> None:
        box = finite(bounds, "bounds")
        if box.ndim != 2 or box.shape[1] != 2 or not (box[:, 0] < box[:, 1]).all():
            raise InvalidInput(f"bounds={bounds!r} must be pairs (low, high) with low < high, one per dimension.")
        self.box, self.maximize = box, maximize  # (d, 2)
        self.start = max(4, 2 * len(box)) if start is None else integer("start", start, least=2)
        generator = np.random.default_rng(rng)
        self._sobol = qmc.Sobol(len(box), rng=generator)
        self._seed = int(generator.integers(2**31))
        # points in the unit cube, (d,) each: asked for and not told yet, and told with their values
        self._asked: list[Floats] = []
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
        u = (point - low) / width  # in the unit cube
        # a point that was out has come in, up to rounding on the way to the user and back
        self._asked = [a for a in self._asked if not np.allclose(a, u, atol=1e-9)]
        self._x.append(u)
        self._y.append(float(value))

    def _outside(self, u: Floats) -> Floats:
        return np.clip(self.box[:, 0] + u * (self.box[:, 1] - self.box[:, 0]), self.box[:, 0], self.box[:, 1])

    def _improve(self) -> Floats:
        # points told (n, d) and their values (n,), larger being better from here on
        x, y = np.array(self._x), np.array([_signed(v, self.maximize) for v in self._y])
        worst = y[np.isfinite(y)].min()
        y = np.where(np.isfinite(y), y, worst)  # a failed run is as bad as the worst that ended
        y = (y - y.mean()) / (y.std() or 1.0)
        model = self._fit(x, y)
        if self._asked:  # points that are out count as told with their predicted mean, under the kernel found so far
            pending = np.array(self._asked)
            x, y = np.vstack([x, pending]), np.concatenate([y, model.predict(pending)])
            model.optimizer = None
            model.set_params(kernel=model.kernel_).fit(x, y)
        best = float(model.predict(x).max())  # of the belief: with noise, the largest value is a lucky one

        def loss(u: Floats) -> Floats:
            mean, sd = model.predict(np.atleast_2d(u), return_std=True)
            return -expected_improvement(mean, sd, best)

        # look widely, then climb from the best few
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
