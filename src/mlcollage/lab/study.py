"""A paper's study, declared: the claims, how many seeds, and the experiments that measure them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.lab.claim import Claim
from mlcollage.lab.experiment import Experiment
from mlcollage.lab.run import Scale


@dataclass(frozen=True)
class Study:
    """What a paper's ``study/__init__.py`` gives as ``STUDY``.

    Runs, their ids, added seeds, blocks and what is not part of a user's workload follow from it
    (:class:`~mlcollage.lab.bound.BoundStudy`).

    Parameters
    ----------
    claims
        Written before the runs.
    seeds
        How many seeds, 0, 1, and so on, are registered at each scale.
    experiments
        In the order in which their runs start; the longest first keeps all processors busy to the end.
    """

    claims: tuple[Claim, ...]
    seeds: Mapping[Scale, int]
    experiments: tuple[Experiment[Any], ...]

    def __post_init__(self) -> None:
        _refuse_twice("claims with one id", [c.id for c in self.claims])
        # The name is part of the ids of runs.
        _refuse_twice("experiments with one name", [e.name for e in self.experiments])
        if lacking := [str(scale) for scale in Scale if scale not in self.seeds]:
            raise InvalidInput(f"the study does not say how many seeds it has at scale {', '.join(lacking)}; add them.")

    def experiment(self, name: str) -> Experiment[Any]:
        """The experiment of that name."""
        found = next((e for e in self.experiments if e.name == name), None)
        if found is None:
            names = ", ".join(e.name for e in self.experiments)
            raise UnknownName(f"the study has no experiment {name!r}; there are: {names}.")
        return found

    @property
    def headlines(self) -> tuple[Claim, ...]:
        """The claims that tell the paper's story."""
        return tuple(c for c in self.claims if c.headline)


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InvalidInput(f"the study has two {what}, {', '.join(twice)}; rename one.")
