r"""What warm-up is made of: the step size by dual averaging, the covariance of the positions, and the windows of Stan.

:mod:`mlcollage.infer.warmup` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcollage._checks import probability
from mlcollage.errors import InvalidInput
from mlcollage.infer.density import LogDensity, State
from mlcollage.infer.metric import Metric


@dataclass
class DualAveraging:
    r"""Nesterov's dual averaging of the log step size towards an acceptance rate.

    With :math:`\bar H_t` the running mean of :math:`\delta - \alpha_t`,

    .. math::
        \bar H_t = \Big(1 - \frac{1}{t + t_0}\Big) \bar H_{t-1} + \frac{1}{t + t_0} (\delta - \alpha_t)

        \log \epsilon_t = \mu - \frac{\sqrt t}{\gamma} \bar H_t

        \log \bar\epsilon_t = t^{-\kappa} \log \epsilon_t + (1 - t^{-\kappa}) \log \bar\epsilon_{t-1}

    with :math:`\mu = \log 10\epsilon_0`. M. D. Hoffman and A. Gelman, "The No-U-Turn Sampler", JMLR 2014,
    section 3.2.1.

    Parameters
    ----------
    first
        :math:`\epsilon_0`, one per group, (groups,).
    target
        :math:`\delta`, in (0, 1).
    gamma, t0, kappa
        The paper's .05, 10, .75.

    Examples
    --------
    >>> rule = DualAveraging(torch.tensor([1.0]), target=0.8)
    >>> for _ in range(5000):  # acceptance exp(-step): the fixed point is -log(.8) = .223
    ...     rule.update(torch.exp(-rule.step_size))
    >>> round(float(rule.averaged), 2)
    0.22
    """

    first: Tensor
    target: float = 0.8
    gamma: float = 0.05
    t0: float = 10.0
    kappa: float = 0.75

    def __post_init__(self) -> None:
        probability("target", self.target)
        # all (groups,), in the logarithm of the step size
        self._mu = (10 * self.first).log()
        self._error = torch.zeros_like(self.first)
        self._log_step = self.first.log()
        self._log_averaged = torch.zeros_like(self.first)
        self._t = 0

    def update(self, accept: Tensor) -> None:
        """Take in the mean acceptance probability of each group, (groups,)."""
        self._t += 1
        # early errors weigh little (t0); the step size reacts at once, and what is kept is a slow average of it
        weight = 1 / (self._t + self.t0)
        self._error = self._error.lerp((self.target - accept).to(self._error), weight)
        self._log_step = self._mu.sub(self._error, alpha=self._t**0.5 / self.gamma)
        self._log_averaged = self._log_averaged.lerp(self._log_step, self._t**-self.kappa)

    @property
    def step_size(self) -> Tensor:
        """The step size to try next, (groups,)."""
        return self._log_step.exp()

    @property
    def averaged(self) -> Tensor:
        """The step size to keep when adaptation ends, (groups,)."""
        return self._log_averaged.exp() if self._t else self.first

    def state_dict(self) -> dict[str, Any]:
        """Where the recursion stands."""
        logs = {"error": self._error, "log_step": self._log_step, "averaged": self._log_averaged}
        return {"first": self.first, "t": self._t, **logs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.first = state["first"]
        self._mu = (10 * self.first).log()
        self._error, self._log_step, self._log_averaged = state["error"], state["log_step"], state["averaged"]
        self._t = int(state["t"])


_BLOCK, _BLOCK_NUMBERS = 64, 2**18  # draws that are taken in at once, and at most how many numbers they are


class RunningVariance:
    r"""Running variance or covariance of the positions of each chain; groups of chains are merged when asked.

    Moments are merged by Chan's formula, :math:`M_2 = M_2^a + M_2^b + \delta \delta^\top n_a n_b / (n_a + n_b)`, so
    nothing cancels. Draws wait until there are 64 and are merged as one block: for small positions the time goes
    into the number of operations, not into their size.

    Parameters
    ----------
    dense
        The covariance, (dim, dim) a chain, in place of the variances.

    Examples
    --------
    >>> running, x = RunningVariance(), torch.randn(50, 4, 3, dtype=torch.float64)
    >>> for row in x:
    ...     running.update(row)
    >>> torch.allclose(running.variance(), x.reshape(200, 3).var(dim=0))
    True
    """

    def __init__(self, dense: bool = False):
        self.dense = dense
        self.count = 0  # draws taken in, with those that wait
        self._merged = 0  # of them, how many are in the moments
        self._moments: tuple[Tensor, Tensor] | None = None  # (chains, dim) and (chains, dim[, dim])
        self._waiting: Tensor | None = None  # (block, chains, dim)
        self._rows: tuple[Tensor, ...] = ()  # of it

    def _square(self, x: Tensor) -> Tensor:
        return x[:, :, None] * x[:, None, :] if self.dense else x.square()

    def update(self, position: Tensor) -> None:
        """Take in one draw of every chain, (chains, dim)."""
        if self._waiting is None:
            block = min(max(_BLOCK_NUMBERS // position.numel(), 1), _BLOCK)
            self._waiting = position.new_empty((block, *position.shape), dtype=torch.float64)
            self._rows = self._waiting.unbind()
        self._rows[self.count - self._merged].copy_(position)
        self.count += 1
        if self.count - self._merged == len(self._rows):
            self._merge()

    def _merge(self) -> None:
        """Take the draws that wait into the moments."""
        n, k = self._merged, self.count - self._merged
        if self._waiting is None or not k:
            return
        x = self._waiting[:k]
        mean = x.mean(dim=0)
        off = x - mean
        if self.dense:
            m2 = off.permute(1, 2, 0) @ off.transpose(0, 1)  # (chains, dim, k) @ (chains, k, dim)
        else:
            m2 = off.square().sum(dim=0)
        if self._moments is not None:
            before, m2_before = self._moments
            delta = mean - before
            mean = before + delta * (k / self.count)
            m2 = m2_before + m2 + self._square(delta) * (n * k / self.count)
        self._moments, self._merged = (mean, m2), self.count

    def _both(self) -> tuple[Tensor, Tensor]:
        """Mean and sum of squares within each chain, over all draws."""
        self._merge()
        if self._moments is None:
            raise InvalidInput("no draw was taken in yet.")
        return self._moments

    @property
    def mean(self) -> Tensor:
        """Mean of each chain, (chains, dim)."""
        return self._both()[0]

    def draws(self, pooled: bool = True, chains: Tensor | None = None) -> int:
        """How many draws a variance rests on."""
        if not self.count or not pooled:
            return self.count
        return self.count * (len(self.mean) if chains is None else int(chains.sum()))

    def variance(self, pooled: bool = True, chains: Tensor | None = None) -> Tensor:
        """Unbiased variance, (groups, dim), or covariance, (groups, dim, dim).

        Parameters
        ----------
        pooled
            Over all draws of all chains, one group; otherwise of each chain.
        chains
            (chains,) bool, which of them are pooled; by default all.
        """
        n = self.draws(pooled, chains)
        if n < 2:
            raise InvalidInput(f"a variance needs at least two draws; {n} were taken in.")
        mean, m2 = self._both()
        if not pooled:
            return m2 / (n - 1)
        mean, m2 = (mean, m2) if chains is None else (mean[chains], m2[chains])
        # within chains, and between their means
        between = self._square(mean - mean.mean(dim=0)).sum(dim=0, keepdim=True)
        return (m2.sum(dim=0, keepdim=True) + self.count * between) / (n - 1)

    def within(self, pooled: bool = True, chains: Tensor | None = None) -> Tensor:
        """Sum of squares within chains, (groups, dim[, dim])."""
        m2 = self._both()[1]
        if not pooled:
            return m2
        return (m2 if chains is None else m2[chains]).sum(dim=0, keepdim=True)

    def inverse_mass(self, pooled: bool = True, chains: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """The variance shrunk as in Stan, ``(n * variance + 5 * few) / (n + 5)``, with ``few`` 1e-3.

        Parameters
        ----------
        pooled, chains
            See :meth:`variance`.
        before
            (groups, dim), the variances so far: ``few`` is not more than these, or small scales would be lost.
        """
        n, variance = self.draws(pooled, chains), self.variance(pooled, chains)
        few = torch.full_like(variance[:, 0] if self.dense else variance, 1e-3)
        few = few if before is None else torch.minimum(few, before.to(few))
        return (n * variance + 5 * (torch.diag_embed(few) if self.dense else few)) / (n + 5)

    def diagonal(self) -> RunningVariance:
        """The same draws, without what is off the diagonal."""
        if not self.dense:
            return self
        made = RunningVariance()
        mean, m2 = self._both()
        made.count = made._merged = self.count
        made._moments = (mean, m2.diagonal(dim1=1, dim2=2))
        return made

    def state_dict(self) -> dict[str, Any]:
        """Count, moments, and the draws that wait, for the same rounding."""
        state: dict[str, Any] = {"count": self.count}
        if self._moments is not None:
            state |= {"mean": self._moments[0], "m2": self._moments[1]}
        if self._waiting is not None:
            state["waiting"] = self._waiting[: self.count - self._merged].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        waiting = state.get("waiting", ())
        self._moments = (state["mean"], state["m2"]) if "mean" in state else None
        self.count = self._merged = int(state["count"]) - len(waiting)
        self._waiting = None
        for position in waiting:
            self.update(position)


def first_inverse_mass(positions: Tensor, gradients: Tensor, before: Tensor) -> Tensor:
    r"""A first :math:`M^{-1}` from how the gradient changes where the chains went.

    Of a Gaussian with covariance :math:`\Sigma`, gradients change by :math:`-\Sigma^{-1}` times the change of
    position, so that the scatters X of positions and G of gradients over the same draws satisfy
    :math:`\Sigma G \Sigma = X` however little of the posterior was seen; the solution is the geometric mean
    of X and :math:`G^{-1}`, for a diagonal :math:`\sqrt{X / G}`. A. Seyboldt et al., "If only my posterior
    were normal: introducing Fisher HMC", 2026, and the sampler nutpie.

    Parameters
    ----------
    positions, gradients
        Sums of squares (groups, dim), or (groups, dim, dim).
    before
        (groups, dim), what is kept in dimensions that did not move.

    Examples
    --------
    A Gaussian of which only the corner that draws span by chance was seen:

    >>> covariance = torch.tensor([[1.0, 0.9], [0.9, 4.0]], dtype=torch.float64)
    >>> x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    >>> g = -x @ torch.linalg.inv(covariance)
    >>> first_inverse_mass((x.T @ x)[None], (g.T @ g)[None], torch.ones(1, 2))[0].round(decimals=3).tolist()
    [[1.0, 0.9], [0.9, 4.0]]
    """
    dense = positions.ndim == 3
    x, g = (v.diagonal(dim1=1, dim2=2) if dense else v for v in (positions, gradients))
    scale = (x / g).sqrt()
    moved = (scale > 0) & scale.isfinite()
    scale = torch.where(moved, scale, before.to(scale))
    if not dense or not bool(moved.all()):
        return scale
    # in units in which the diagonal is that of both, each with a trace of dim
    unit = scale.sqrt()  # (groups, dim)
    outer, dim = unit[:, :, None] * unit[:, None, :], x.shape[1]
    a, b = positions / outer, gradients * outer
    a, b = (v * (dim / v.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]) for v in (a, b))
    (values, vectors), few = torch.linalg.eigh(b), 1e-10  # below it directions were not seen
    root = values.clamp(min=few).sqrt()
    half, back = (vectors * r[:, None, :] @ vectors.mT for r in (root, 1 / root))
    inner, axes = torch.linalg.eigh(half @ a @ half)
    middle = (axes * inner.clamp(min=few**2).sqrt()[:, None, :]) @ axes.mT
    mean = back @ middle @ back
    # the constants of proportion of a and b: diagonals agree in the geometric mean
    ratio = (positions.diagonal(dim1=1, dim2=2) / unit.square()).sum(dim=1)
    ratio = ratio / (gradients.diagonal(dim1=1, dim2=2) * unit.square()).sum(dim=1)
    return outer * (mean + mean.mT) / 2 * ratio.sqrt()[:, None, None]


def mass_windows(warmup: int) -> list[range]:
    """Stretches of warm-up at whose ends the mass is learned anew, as in Stan: each twice as long as the one before.

    The first iterations find the bulk, 75 of them, the last 50 settle the step size for the final mass, and the first
    window has 25. Where these do not fit, 15 % and 20 % are for the two ends (Stan leaves 10 % for the last, too few
    to settle a step size) and the rest is one window; less than 20 iterations are too few to learn a mass from.

    Examples
    --------
    >>> [len(window) for window in mass_windows(1000)], mass_windows(1000)[-1].stop, mass_windows(10)
    ([25, 50, 100, 200, 500], 950, [])
    """
    if warmup < 20:
        return []
    begin, last, width = 75, 50, 25
    if begin + width + last > warmup:
        begin, last = max(int(0.15 * warmup), 5), max(int(0.2 * warmup), 5)
        width = warmup - begin - last
    windows, end = [], warmup - last
    while begin < end:
        # one that leaves no space for the next, twice as long, takes all that is left
        stop = begin + width if begin + 3 * width <= end else end
        windows.append(range(begin, stop))
        begin, width = stop, 2 * width
    return windows


def check_step_size(step_size: float | Tensor, position: Tensor) -> Tensor:
    """A step size as (groups,), on the chains' device."""
    step = torch.as_tensor(step_size, dtype=position.dtype, device=position.device).reshape(-1)
    if len(step) not in (1, len(position)) or not bool((step > 0).all() and step.isfinite().all()):
        raise InvalidInput(f"step_size={step_size} must be positive and finite: one number, or one per chain.")
    return step


_LEAPS, _LEAP = 200, 100  # of a start, and leapfrog steps of one


def approach(density: LogDensity, state: State) -> State:
    """The chains' starts, without those from which warm-up would not find the bulk.

    At a log-density of -1e100 no step size conserves the energy to within 1: a Metropolis test sees rounding, dual
    averaging follows it, and the chain freezes. So each chain first falls from rest, by leapfrog steps that are right
    where it is, stays where the log-density was highest, and falls again while that gains 100 + 10 dim and a tenth of
    the log-density. In the bulk it varies by about sqrt(dim / 2): chains that start there, or near it, stay put.
    """
    step = state.log_prob.new_ones(len(state.position), dtype=torch.float64)
    enough = 100 + 10 * state.position.shape[1]
    for _ in range(_LEAPS):
        step = _falling_step(density, state, step)
        eps, here, best = step[:, None].to(state.position), state, state
        p = 0.5 * eps * here.gradient  # (chains, dim), from rest
        for _ in range(_LEAP):
            before = here.log_prob
            here = density.state(here.position + eps * p)
            p = p + eps * here.gradient
            best = here.where((here.log_prob > best.log_prob) & here.gradient.isfinite().all(dim=1), best)
            if not bool((here.log_prob > before + enough).any()):  # all are over the hill, or on the plain
                break
        far = best.log_prob > state.log_prob + enough + 0.1 * state.log_prob.abs()
        if not bool(far.any()):
            return state
        state = best.where(far, state)
    return state


def _falling_step(density: LogDensity, state: State, guess: Tensor) -> Tensor:
    """A step size of each chain, (chains,), after which a step from rest gains half of what the gradient says.

    Or more: doubled while that holds, halved until it does; unlike energies it can be told at any height.
    """

    def holds(step: Tensor) -> Tensor:
        there = state.position + 0.5 * step[:, None].square().to(state.position) * state.gradient
        said = (state.gradient * (there - state.position)).sum(dim=1)  # zero for a step that rounding undoes
        return density(there)[0] - state.log_prob >= 0.5 * said

    step, done, rising = guess, torch.zeros_like(guess, dtype=torch.bool), holds(guess)
    for _ in range(1000):
        trial = torch.where(done, step, torch.where(rising, 2 * step, step / 2))
        right = holds(trial)
        step = torch.where(done | (rising & ~right), step, trial)
        done |= rising != right
        if bool(done.all()):
            break
    return step


def one_step(
    density: LogDensity, state: State, metric: Metric, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Acceptance probabilities, (chains,), of one leapfrog step by its size, (groups,), with momenta drawn here."""
    p0 = metric.draw(state.position, generator)
    before = state.log_prob.double() - metric.kinetic(p0)

    def accept(step: Tensor) -> Tensor:
        eps = step[:, None].to(p0.dtype)  # (groups, 1) beside positions (chains, dim)
        half = p0 + 0.5 * eps * state.gradient
        value, gradient = density(state.position + eps * metric.velocity(half))
        after = value.double() - metric.kinetic(half + 0.5 * eps * gradient)
        return (after - before).nan_to_num(nan=-torch.inf, posinf=-torch.inf).clamp(max=0).exp()

    return accept


def first_step_size(accept: Callable[[Tensor], Tensor], guess: Tensor) -> Tensor:
    """A step size, (groups,), at which one leapfrog step is accepted about 80 % of the time.

    Doubled or halved from ``guess``, (groups,), until acceptance crosses .8 (Hoffman and Gelman 2014, algorithm 4),
    with one draw of the momentum for all tries: ``accept`` is from :func:`one_step`.
    """

    def high(step: Tensor) -> Tensor:
        chance = accept(step)
        return (chance.mean(dim=0, keepdim=True) if len(guess) == 1 else chance) > 0.8

    # all groups at once, (groups,): each goes on in its direction until it has crossed .8
    step, done, rising = guess, torch.zeros_like(guess, dtype=torch.bool), high(guess)
    for _ in range(1000):  # a bad start may have a log-density of -1e120: all that float64 can hold is tried
        trial = torch.where(done, step, torch.where(rising, 2 * step, step / 2))
        right = high(trial)
        step = torch.where(done | (rising & ~right), step, trial)
        done |= rising != right
        if bool(done.all()):
            return step
    raise InvalidInput(
        "no step size fits: one leapfrog step is accepted at every size (the density is flat or improper), or at none "
        "(log_prob and its gradient do not belong together); check log_prob, or give step_size."
    )
