r"""Confidence sequences: intervals that hold at all times at once, so that peeking after every seed is allowed.

A confidence sequence :math:`(C_n)` satisfies :math:`\Pr[\exists n : \mu \notin C_n] \le \alpha`; an ordinary interval
only :math:`\Pr[\mu \notin C_n] \le \alpha` for an n fixed beforehand, and a test repeated after every seed rejects
sooner or later. Each kind inverts a non-negative martingale that starts at 1 under :math:`\mu`, which exceeds
:math:`1/\alpha` ever with probability at most :math:`\alpha` (J. Ville, 1939). What it costs is width: about 1.6 times
the fixed interval's where the sequence is tuned, more elsewhere. S. R. Howard, A. Ramdas, J. McAuliffe and
J. Sekhon, Annals of Statistics 2021; A. Gelman and A. Vehtari, JASA 2021, idea 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlcollage.errors import InvalidInput
from mlcollage.stats._values import Floats

__all__ = ["ConfidenceSequence"]

Kind = Literal["t", "gaussian", "bounded", "empirical-bernstein"]
_KINDS = ("t", "gaussian", "bounded", "empirical-bernstein")
_GRID = 1001  # candidate means of the betting sequence; the interval is rounded outward to the grid
_STATE = {
    "t": ("total", "squares", "shift"),
    "gaussian": ("total",),
    "bounded": ("total", "squares", "up", "down"),
    "empirical-bernstein": ("total", "squares", "weight", "weighted", "penalty"),
}


class ConfidenceSequence:
    r"""Anytime-valid interval of a mean, updated value by value.

    ``t``
        Normal values of unknown variance (differences of paired seeds): the t test's Bayes factor with a
        :math:`\mathrm{N}(0, g)` prior on the standardised effect and the right Haar prior on :math:`\sigma`, with
        :math:`\nu = n - 1`,

        .. math:: E_n = (1 + n g)^{-1/2} \left[\frac{1 + t^2/\nu}{1 + t^2/(\nu (1 + n g))}\right]^{n/2},

        a martingale for every :math:`\sigma` (M. F. Perez-Ortiz, T. Lardy, R. de Heide and P. Gruenwald, Annals of
        Statistics 2024; T. L. Lai, Annals of Statistics 1976). Infinite for the first few values, and while all are
        equal.
    ``gaussian``
        Values that are normal, or sub-Gaussian, with known ``sd``: normal mixture (H. Robbins, 1970),

        .. math:: \bar x_n \pm \sigma
            \sqrt{\frac{2 (n \rho^2 + 1)}{n^2 \rho^2} \log \frac{\sqrt{n \rho^2 + 1}}{\alpha}}.

    ``bounded``
        Values in ``[low, high]`` with a constant conditional mean: hedged betting on 1,001 candidate means
        (I. Waudby-Smith and A. Ramdas, JRSS B 2024, sec. 4). The tightest here for accuracies.
    ``empirical-bernstein``
        The same assumption, closed form: predictable plug-in (the same paper, thm. 2). Wider below some hundred values.

    Parameters
    ----------
    kind
        As above.
    alpha
        Probability that the sequence ever misses the mean.
    sd
        Known standard deviation; ``gaussian`` only.
    low, high
        Bounds of the values; ``bounded`` and ``empirical-bernstein`` only.
    tuned_for
        Number of values near which ``gaussian`` and ``t`` are narrowest; the guarantee holds whatever it is. It sets
        :math:`\rho^2`, and g by the same rule.

    Raises
    ------
    InvalidInput
        On a value that is not finite or out of bounds, a change of shape, or settings of another kind.

    Examples
    --------
    >>> sequence = ConfidenceSequence("t", alpha=0.05)
    >>> rng = np.random.default_rng(0)
    >>> while sequence.interval()[0] <= 0:  # stop as soon as the effect is clearly positive: legal
    ...     sequence.update(rng.normal(1.0, 1.0))
    >>> sequence.n
    8
    """

    def __init__(
        self,
        kind: Kind = "t",
        alpha: float = 0.05,
        *,
        sd: float | None = None,
        low: float | None = None,
        high: float | None = None,
        tuned_for: int = 20,
    ) -> None:
        if kind not in _KINDS:
            raise InvalidInput(f"kind {kind!r} is unknown; use one of {', '.join(_KINDS)}.")
        if not 0 < alpha < 1:
            raise InvalidInput(f"alpha={alpha} must lie between 0 and 1, e.g. 0.05.")
        if tuned_for < 1:
            raise InvalidInput(f"tuned_for={tuned_for} must be at least 1 value.")
        if (kind == "gaussian") != (sd is not None) or (sd is not None and not (np.isfinite(sd) and sd > 0)):
            raise InvalidInput(
                f"kind {kind!r} with sd={sd}: 'gaussian' needs a positive sd, the other kinds take none."
            )
        bounds = kind in ("bounded", "empirical-bernstein")
        if bounds != (low is not None) or bounds != (high is not None):
            raise InvalidInput(
                f"kind {kind!r}: 'bounded' and 'empirical-bernstein' need low and high, others take none."
            )
        if low is not None and high is not None and not -np.inf < low < high < np.inf:
            raise InvalidInput(f"bounds must be finite with low < high; they are {low} and {high}.")
        self.kind, self.alpha, self.sd, self.low, self.high, self.tuned_for = kind, alpha, sd, low, high, tuned_for
        self.n = 0
        self._state: dict[str, Floats] = {name: np.zeros(()) for name in _STATE[kind]}

    def update(self, x: npt.ArrayLike) -> None:
        """Take in one new value, or one for each of several parallel sequences (always the same shape)."""
        value = np.asarray(x, dtype=np.float64)
        if not np.isfinite(value).all():
            raise InvalidInput(
                f"value {self.n + 1} is not finite; decide what a failed run counts as, do not leave it out."
            )
        if self.n and value.shape != self._state["total"].shape:
            raise InvalidInput(f"value has shape {value.shape}; the values before it {self._state['total'].shape}.")
        if self.low is not None and self.high is not None:
            if (value < self.low).any() or (value > self.high).any():
                raise InvalidInput(
                    f"value {self.n + 1} lies outside [{self.low:g}, {self.high:g}]; are bounds and values in the same "
                    "units (percent or fraction)?"
                )
            value = (value - self.low) / (self.high - self.low)
        self.n += 1
        {"t": self._add_t, "gaussian": self._add, "bounded": self._bet, "empirical-bernstein": self._plug_in}[
            self.kind
        ](value)

    def interval(self) -> tuple[Floats, Floats]:
        """Low and high end now; floats, or arrays for parallel sequences. All the line before the first value."""
        if self.n == 0:
            wide = (-np.inf, np.inf) if self.low is None or self.high is None else (self.low, self.high)
            return np.float64(wide[0]), np.float64(wide[1])  # type: ignore[return-value]
        if self.kind == "bounded":
            low, high = self._candidates()
        else:
            centre, radius = {"t": self._t, "gaussian": self._gaussian, "empirical-bernstein": self._bernstein}[
                self.kind
            ]()
            low, high = centre - radius, centre + radius
        if self.low is not None and self.high is not None:
            width = self.high - self.low
            low, high = self.low + width * np.maximum(low, 0.0), self.low + width * np.minimum(high, 1.0)
        return low[()], high[()]

    def state_dict(self) -> dict[str, object]:
        """Everything needed to continue, as plain numbers and lists."""
        return {
            "settings": self._settings(),
            "n": self.n,
            **{name: value.tolist() for name, value in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where :meth:`state_dict` was taken, by a sequence with the same settings."""
        if state.get("settings") != self._settings():
            raise InvalidInput(
                f"the state is of a sequence with the settings {state.get('settings')}; this one has "
                f"{self._settings()}."
            )
        if not {"n", *_STATE[self.kind]} <= set(state):
            raise InvalidInput("the state lacks entries; pass what state_dict returned, whole.")
        self.n = int(state["n"])  # type: ignore[call-overload]
        self._state = {name: np.array(state[name], dtype=np.float64) for name in _STATE[self.kind]}

    def _settings(self) -> dict[str, object]:
        names = ("kind", "alpha", "sd", "low", "high", "tuned_for")
        return {name: getattr(self, name) for name in names}

    def _add(self, x: Floats) -> None:
        self._state["total"] = self._state["total"] + x

    def _rho2(self) -> float:
        """The mixture's variance that makes the width at ``tuned_for`` about least (Howard et al. 2021, sec. 3.5)."""
        k = -2 * np.log(self.alpha)
        return float((k + np.log(k + 1)) / self.tuned_for)

    def _gaussian(self) -> tuple[Floats, Floats]:
        n, r = self.n, self.n * self._rho2()
        assert self.sd is not None
        radius = self.sd * np.sqrt(2 * (r + 1) / (n * r) * np.log(np.sqrt(r + 1) / self.alpha))
        return self._state["total"] / n, np.full_like(self._state["total"], radius)

    def _add_t(self, x: Floats) -> None:
        if self.n == 1:  # sums are kept about the first value, which loses no digits
            self._state["shift"], self._state["total"], self._state["squares"] = x, np.zeros_like(x), np.zeros_like(x)
            return
        d = x - self._state["shift"]
        self._state["total"] = self._state["total"] + d
        self._state["squares"] = self._state["squares"] + d**2

    def _t(self) -> tuple[Floats, Floats]:
        r"""Solves E_n = 1/alpha for :math:`a = t^2/\nu`: :math:`(1 + a)/(1 + a/r) = L`, r = 1 + n g."""
        n, r = self.n, 1 + self.n * self._rho2()
        centre = self._state["total"] / n
        log_l = 2 / n * (0.5 * np.log(r) - np.log(self.alpha))
        if n < 2 or log_l >= np.log(r):
            return self._state["shift"] + centre, np.full_like(centre, np.inf)
        big_l = np.exp(log_l)
        a = (big_l - 1) / (1 - big_l / r)
        # t^2 / nu = n (mean - mu)^2 / sum of squares about the mean
        about = np.maximum(self._state["squares"] - n * centre**2, 0.0)
        nothing = about <= 1e-24 * n * (self._state["shift"] ** 2 + centre**2)  # all equal: no idea of the variance
        return self._state["shift"] + centre, np.where(nothing, np.inf, np.sqrt(a * about / n))

    def _moments_before(self) -> tuple[Floats, Floats]:
        """Mean and variance of the values before this one, regularised by one value of 1/2 with variance 1/4."""
        mean = (0.5 + self._state["total"]) / self.n
        return mean, (0.25 + self._state["squares"]) / self.n

    def _remember(self, x: Floats) -> None:
        self._state["total"] = self._state["total"] + x
        mean = (0.5 + self._state["total"]) / (self.n + 1)
        self._state["squares"] = self._state["squares"] + (x - mean) ** 2

    def _plug_in(self, x: Floats) -> None:
        mean, variance = self._moments_before()
        bet = np.minimum(np.sqrt(2 * np.log(2 / self.alpha) / (variance * self.n * np.log(1 + self.n))), 0.5)
        state = self._state
        state["weight"] = state["weight"] + bet
        state["weighted"] = state["weighted"] + bet * x
        state["penalty"] = state["penalty"] + (x - mean) ** 2 * (-np.log1p(-bet) - bet)
        self._remember(x)

    def _bernstein(self) -> tuple[Floats, Floats]:
        state = self._state
        return state["weighted"] / state["weight"], (np.log(2 / self.alpha) + state["penalty"]) / state["weight"]

    def _bet(self, x: Floats) -> None:
        """Log capital of bets that the mean is above, and below, each candidate m; the bets know the past only."""
        _, variance = self._moments_before()
        bet = np.sqrt(2 * np.log(2 / self.alpha) / (variance * self.n * np.log(1 + self.n)))[..., None]
        m = np.linspace(0, 1, _GRID)
        with np.errstate(divide="ignore"):
            up, down = np.minimum(bet, 0.5 / m), np.minimum(bet, 0.5 / (1 - m))
        gain = x[..., None] - m
        self._state["up"] = self._state["up"] + np.log1p(up * gain)
        self._state["down"] = self._state["down"] + np.log1p(-down * gain)
        self._remember(x)

    def _candidates(self) -> tuple[Floats, Floats]:
        """Ends of the candidates whose hedged capital max(K+, K-) / 2 is below 1 / alpha, one step further out."""
        worth = np.maximum(self._state["up"], self._state["down"])
        kept = worth < np.log(2 / self.alpha)
        best = worth.argmin(axis=-1)
        first = np.where(kept.any(axis=-1), kept.argmax(axis=-1), best)
        last = np.where(kept.any(axis=-1), _GRID - 1 - kept[..., ::-1].argmax(axis=-1), best)
        step = 1 / (_GRID - 1)
        return (first - 1) * step, (last + 1) * step
