"""Policies: how a pipeline is scored, and which share of its iterations it is given (section 2.2, Table 2)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput


def halving_schedule(
    eta: float = 4.0, min_budget: float = 6.25, max_budget: float = 100.0, *, exact: bool = True
) -> list[tuple[int, float]]:
    r"""Rungs of successive halving: number of pipelines and budget.

    With :math:`s = \lfloor \log_\eta (b_\max / b_\min) \rfloor` rung :math:`i` has :math:`\eta^{s - i}` pipelines and
    the budget :math:`b_\max \eta^{i - s}`. The last rung has the whole budget;
    ``min_budget`` is a lower limit of the first.

    Parameters
    ----------
    eta
        Which share is kept: one in ``eta``.
    min_budget, max_budget
        In percent of the learner's iterations.
    exact
        Whether s is the exact floor. ``False`` takes the logarithm in floating point, as the official code does: for
        eta = 3 from 1 to 243 this loses a rung.

    Examples
    --------
    >>> halving_schedule()
    [(16, 6.25), (4, 25.0), (1, 100.0)]
    >>> halving_schedule(4, 5.0)
    [(16, 6.25), (4, 25.0), (1, 100.0)]
    >>> len(halving_schedule(3, 1, 243)), len(halving_schedule(3, 1, 243, exact=False))
    (6, 5)
    """
    eta = checks.real("eta", eta, above=1)
    max_budget = checks.positive("max_budget", max_budget)
    min_budget = checks.real("min_budget", min_budget, above=0, most=max_budget)
    s = math.floor(math.log(max_budget / min_budget) / math.log(eta))
    if exact:
        while eta ** (s + 1) <= max_budget / min_budget * (1 + 1e-12):
            s += 1
    return [(int(eta ** (s - i)), max_budget * eta ** (i - s)) for i in range(s + 1)]


@dataclass(frozen=True)
class Policy:
    """How pipelines are compared.

    Parameters
    ----------
    evaluation
        ``"holdout"``: a third of the rows is held out. ``"cv"``: cross-validation; predictions of the folds are pooled.
    folds
        Number of folds of a cross-validation; not used with ``"holdout"``.
    allocation
        ``"full"``: every pipeline gets all iterations. ``"sh"``: successive halving.
    eta, min_budget
        Of successive halving, see :func:`halving_schedule`.

    Examples
    --------
    >>> str(Policy("cv", 5, "sh")), Policy.from_official("RF_SH-eta4-i_5CV_iterative_es_if") == Policy("cv", 5, "sh")
    ('5-fold CV, successive halving', True)
    """

    evaluation: Literal["holdout", "cv"] = "holdout"
    folds: int = 5
    allocation: Literal["full", "sh"] = "full"
    eta: float = 4.0
    min_budget: float = 6.25

    def __post_init__(self) -> None:
        checks.choice("evaluation", self.evaluation, ("holdout", "cv"))
        checks.choice("allocation", self.allocation, ("full", "sh"))
        checks.integer("folds", self.folds, least=2)
        halving_schedule(self.eta, self.min_budget)

    @property
    def schedule(self) -> list[tuple[int, float]]:
        """Rungs: number of pipelines and budget in percent."""
        return halving_schedule(self.eta, self.min_budget) if self.allocation == "sh" else [(1, 100.0)]

    @classmethod
    def from_official(cls, name: str) -> Policy:
        """The policy that auto-sklearn's files call so.

        Raises
        ------
        InvalidInput
            If it is no such name.
        """
        found = re.search(r"_(None|SH-eta(\d+)-i)_(holdout|(\d+)CV)_", name)
        if not found:
            raise InvalidInput(f"{name!r} is no policy of auto-sklearn, such as 'RF_SH-eta4-i_5CV_iterative_es_if'.")
        eta = float(found[2] or 4)
        allocation: Literal["full", "sh"] = "full" if found[1] == "None" else "sh"
        if found[3] == "holdout":
            return cls("holdout", allocation=allocation, eta=eta)
        return cls("cv", int(found[4]), allocation, eta)

    def __str__(self) -> str:
        how = "holdout" if self.evaluation == "holdout" else f"{self.folds}-fold CV"
        return f"{how}, {'full budget' if self.allocation == 'full' else 'successive halving'}"


POLICIES = tuple(
    Policy(*how, allocation)
    for allocation in ("full", "sh")
    for how in (("holdout", 5), ("cv", 3), ("cv", 5), ("cv", 10))
)
"""The eight policies, in the order of the official files."""
FIXED_ORDER = tuple(POLICIES[i] for i in (4, 0, 5, 1, 6, 2, 7, 3))
"""The order in which policies are taken at a tie, and where nothing is known: cheap ones first."""
