r"""Whether a run can be trusted, chain by chain: acceptance, divergences, and R-hat of what was drawn.

R-hat here is the split one, of the draws and of their distances from the mean (which sees chains of unequal spread),

.. math:: \hat R = \sqrt{\frac{n - 1}{n} + \frac{B}{n W}},

with the variance W within half chains of n draws and B / n that of their means: one pass over all quantities at once,
so that every run can afford it. :func:`mlcollage.infer.rhat` also normalizes by ranks, for reports.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STUCK = 0.05  # mean acceptance below which a chain hardly moves
LONG = 256  # steps of a trajectory that the sampler chose, above which its cost is to be known
CONVERGED = 1.01  # R-hat above which chains disagree, as in Vehtari et al. 2021


class Unhealthy(UserWarning):
    """What samplers warn with when a run cannot be trusted."""


@dataclass(frozen=True)
class Health:
    """How a run went.

    Attributes
    ----------
    accept : Tensor or None
        (chains,), mean acceptance probability; None for methods without a Metropolis test.
    divergences : Tensor or None
        (chains,), draws with a divergence.
    rhat : mapping of str to Tensor
        Of dimensions, log-density or predictions, by what they are (in the singular), (quantities,) each; nothing where
        chains sample densities of their own, empty tensors where there are less than 4 draws.
    draws : int
        Draws of each chain.
    step_size : float
        Mean step size; not a number where there is none.
    remedy : str
        What to do where chains hardly move.
    nonfinite : int
        Draws, of all chains, at which the energy was infinite or not a number.
    steps : float
        Mean leapfrog steps of an iteration where the sampler chose how many; not a number otherwise.
    """

    accept: Tensor | None
    divergences: Tensor | None
    rhat: Mapping[str, Tensor]
    draws: int
    step_size: float = float("nan")
    remedy: str = "warm up longer, or give a smaller step_size, or None to adapt it"
    nonfinite: int = 0
    steps: float = float("nan")

    def sentences(self) -> list[str]:
        """What is wrong, a sentence each; none where nothing was found."""
        said = []
        stuck = torch.zeros(0, dtype=torch.bool) if self.accept is None else self.accept < STUCK
        if self.accept is not None and bool(stuck.any()):
            rate = float(self.accept[stuck].mean())
            at = "" if self.step_size != self.step_size else f", at step size {self.step_size:.3g}"
            said.append(
                f"only {rate:.1%} of the proposals were accepted{at}, in {_chains(stuck)}, which hardly moved; "
                f"{self.remedy}."
            )
        if self.divergences is not None and bool((self.divergences > 0).any()):
            said.append(
                f"{int(self.divergences.sum())} of {self.draws * len(self.divergences)} draws diverged, in "
                f"{_chains(self.divergences > 0)}: parts of the posterior are too steep for the step size and may be "
                "missing; raise target_accept, or write the model in other parameters."
            )
        if self.nonfinite:
            said.append(
                f"in {self.nonfinite} of these log_prob or its gradient was not finite: where parameters are bounded, "
                "sample unbounded ones instead (a logarithm or logit, with the term of the Jacobian)."
            )
        if self.steps > LONG:  # not where it is not a number
            said.append(
                f"an iteration took {self.steps:.0f} leapfrog steps on average, of size {self.step_size:.3g}, since "
                "trajectories were slow to turn: if log_prob is cut off or jumps somewhere, which its gradient does "
                "not show, take infer.hmc with steps=(3, 9) or write the model without that; otherwise bring the "
                "parameters to one scale."
            )
        apart = [_apart(what, rhat) for what, rhat in self.rhat.items() if bool((rhat > CONVERGED).any())]
        if apart:
            said.append(
                f"R-hat is {', and '.join(apart)}: the chains do not agree yet; draw more, or look for several modes."
            )
        return said


def split_rhat(draws: Tensor) -> Tensor:
    """R-hat of draws (chains, draws, ...), (quantities,): the larger one of the draws' and of their distances'.

    Quantities that never vary are left out of account (1).

    Examples
    --------
    >>> x = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0))
    >>> x[0, :, 1] += 3
    >>> [round(v, 1) for v in split_rhat(x).tolist()]
    [1.0, 1.7]
    """
    x = draws.detach().flatten(2).double() if draws.ndim > 2 else draws.detach().double()[:, :, None]
    n = x.shape[1] // 2
    if n < 2:
        return x.new_empty(0)
    halves = torch.cat([x[:, :n], x[:, -n:]])  # (2 chains, n, quantities)
    found = _rhat(halves)
    distances = (halves - halves.mean(dim=(0, 1))).abs_()
    return torch.maximum(found, _rhat(distances))


def _rhat(halves: Tensor) -> Tensor:
    n = halves.shape[1]
    # two passes are a third of the time of var_mean; from the first draw, so that what stands still has variance zero
    off = halves - halves[:, :1]
    mean = off.mean(dim=1)  # (2 chains, quantities)
    variance = off.sub_(mean[:, None]).square_().sum(dim=1) / (n - 1)
    mean = mean + halves[:, 0]
    within, between = variance.mean(dim=0), mean.var(dim=0)
    ratio = (n - 1) / n + between / within
    # nothing varies within any half: chains that agree are one point, those that do not are frozen apart
    still = within <= torch.finfo(halves.dtype).eps ** 2 * mean.square().mean(dim=0)
    return torch.where(still, torch.where(between > within, torch.inf, 1.0), ratio.sqrt())


def outside() -> int:
    """The ``stacklevel`` for a warning of whoever calls this, so that it points at the first line outside mlcollage.

    Lines of a study or a command are all inside: then the line is the outermost one.
    """
    house = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith(house) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level


def warn_of(health: Health) -> None:
    """One warning with all that is wrong, at the user's line; nothing otherwise."""
    said = health.sentences()
    if said:
        text = " ".join(s[0].upper() + s[1:] if i else s for i, s in enumerate(said))
        warnings.warn(text, Unhealthy, stacklevel=outside())


def _apart(what: str, rhat: Tensor) -> str:
    worst = int(rhat.argmax())
    if len(rhat) == 1:
        return f"{float(rhat[0]):.3g} for the {what}"
    count = int((rhat > CONVERGED).sum())
    return f"above {CONVERGED} in {count} of {len(rhat)} {what}s, and {float(rhat[worst]):.3g} in {what} {worst}"


def _chains(bad: Tensor) -> str:
    which: Sequence[int] = bad.nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
    return f"chain{'s' if len(which) > 1 else ''} {shown} ({len(which)} of {len(bad)})"
