"""Alpha over training: schedules, and a controller that holds a level of selectivity instead of an alpha."""

from __future__ import annotations

from collections.abc import Callable

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .regularizer import SelectivityRegularizer


def alpha_schedule(alpha: float, *, warmup: int = 0, start: int = 0, stop: int | None = None) -> Callable[[int], float]:
    r"""Alpha as a function of the training step: off, then a linear warm-up, then constant, then off again.

    .. math:: \alpha(t) = \alpha \min\!\left(1, \frac{t - t_0 + 1}{w}\right), \qquad t_0 \le t < t_1

    A strong negative alpha from the first step can stop learning altogether; a warm-up of an epoch or so avoids it.

    Parameters
    ----------
    alpha
        The final value; negative discourages selectivity.
    warmup
        Steps w of the ramp; 0 has none.
    start, stop
        First step :math:`t_0` with the penalty, and first step :math:`t_1` without it again (None: never).

    Raises
    ------
    InvalidInput
        For an alpha that is not finite, or steps that are negative or out of order.

    Examples
    --------
    >>> ramp = alpha_schedule(-4.0, warmup=4, start=1, stop=7)
    >>> [ramp(t) for t in range(8)]
    [0.0, -1.0, -2.0, -3.0, -4.0, -4.0, -4.0, 0.0]
    """
    alpha = checks.real("alpha", alpha)
    warmup, start = checks.integer("warmup", warmup, least=0), checks.integer("start", start, least=0)
    if stop is not None:
        checks.integer("stop", stop, least=start + 1)

    def schedule(step: int) -> float:
        if step < start or (stop is not None and step >= stop):
            return 0.0
        return alpha * min(1.0, (step - start + 1) / warmup) if warmup else alpha

    return schedule


class SelectivityController:
    r"""Holds the mean selectivity at a target by changing alpha: people ask for a level, not for an alpha.

    A proportional-integral loop on the smoothed error :math:`e_t = \mathrm{SI}^* - \mathrm{SI}_t`:

    .. math:: \alpha_t = \mathrm{clip}\big(K_p e_t + K_i \sum_{s \le t} e_s,\; \alpha_{\min}, \alpha_{\max}\big)

    The sum stops growing while alpha is at a limit, so that it does not overshoot afterwards.

    Parameters
    ----------
    regularizer
        Whose ``alpha`` is set.
    target
        :math:`\mathrm{SI}^*` in [0, 1].
    gain, integral
        :math:`K_p` and :math:`K_i`. The defaults suit class means of some tens of samples and hundreds of steps.
    limits
        :math:`(\alpha_{\min}, \alpha_{\max})`.
    smoothing
        Share of the earlier value in the exponential mean of the measured index, in [0, 1).

    Examples
    --------
    ::

        penalty = SelectivityRegularizer(model, alpha=0.0)
        control = SelectivityController(penalty, target=0.1)
        for x, y in batches:
            loss = F.cross_entropy(model(x), y) + penalty(y)
            ...
            control.step()
    """

    def __init__(
        self,
        regularizer: SelectivityRegularizer,
        target: float,
        *,
        gain: float = 5.0,
        integral: float = 0.2,
        limits: tuple[float, float] = (-20.0, 20.0),
        smoothing: float = 0.8,
    ) -> None:
        self.regularizer = regularizer
        self.target = checks.probability("target", target, inside=False)
        self.gain, self.integral = checks.real("gain", gain, least=0), checks.positive("integral", integral)
        low = checks.real("limits[0]", limits[0])
        self.limits = low, checks.real("limits[1]", limits[1], above=low)
        self.smoothing = checks.real("smoothing", smoothing, least=0, below=1)
        self.measured: float | None = None
        self._sum = 0.0

    def step(self, measured: float | None = None) -> float:
        """Set the next alpha; call it after each update.

        Parameters
        ----------
        measured
            The present mean selectivity, e.g. of a validation set. Default: that of the last batch, which is biased
            upwards when a class has few samples in it.

        Returns
        -------
        float
            The new alpha.
        """
        last = self.regularizer.last
        if measured is None and not last:
            raise InvalidInput("the regularizer has not been called yet; step after the first batch, or give a value.")
        value = checks.real("measured", sum(last.values()) / len(last) if measured is None else measured)
        # A batch is noisy, so smooth it; a value that is given counts as it is.
        s = self.smoothing if self.measured is not None and measured is None else 0.0
        self.measured = s * (self.measured or 0.0) + (1 - s) * value
        error = self.target - self.measured
        low, high = self.limits
        wanted = self.gain * error + self.integral * (self._sum + error)
        # Anti-windup: at a limit the sum only changes if that leads back inside.
        if low <= wanted <= high or (wanted > high) != (error > 0):
            self._sum += error
        self.regularizer.alpha = alpha = min(max(wanted, low), high)
        return alpha

    def state_dict(self) -> dict[str, float | None]:
        """The loop's memory, for checkpoints."""
        return {"sum": self._sum, "measured": self.measured}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Counterpart of :meth:`state_dict`."""
        self._sum, self.measured = float(state["sum"] or 0.0), state["measured"]
