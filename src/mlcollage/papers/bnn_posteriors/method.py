r"""What the ways to a posterior share: settings that are checked when they are made, and what ``run`` is given.

A :class:`Method` is a frozen dataclass of settings with a function :meth:`Method.run` from a :class:`Target` to a
:class:`~mlcollage.papers.bnn_posteriors.posterior.Posterior`. ``BayesianNetwork.fit`` makes the target. All chains,
members or draws of a method are one batch: there is no Python loop over them. The same seed gives the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from mlcollage._checks import choice, integer, positive, probability, real
from mlcollage.errors import InvalidInput

from .density import PosteriorDensity
from .function import NetworkFunction
from .posterior import Posterior

Progress = Callable[[int, int], None]
Init = Tensor | str | Callable[[], nn.Module]

# types of settings that say their range; Method checks it
CountFrom0 = Annotated[int, partial(integer, least=0)]
CountFrom1 = Annotated[int, partial(integer, least=1)]
Positive = Annotated[float, positive]
NotNegative = Annotated[float, partial(real, least=0)]
Probability = Annotated[float, probability]
Share = Annotated[float, partial(real, least=0, below=1)]


@dataclass(frozen=True, eq=False)
class Target:
    """What a method samples or approximates.

    Attributes
    ----------
    network : NetworkFunction
        The network as a function of its parameters; with its layout, likelihood and prior.
    density : PosteriorDensity
        The log-posterior at positions (chains, P), and its gradient, at temperature 1.
    starts : callable
        ``starts(n)`` draws n first positions, (n, P), from ``generator``.
    generator : torch.Generator
        All random numbers come from it.
    progress : callable or None
        To be called as ``progress(steps done, steps in all)``.
    seed : int
        What ``generator`` was seeded with, for the record.
    marks : callable
        A :func:`~mlcollage.papers.bnn_posteriors.fingerprint.fingerprint` of each thing that defines density and run.
    """

    network: NetworkFunction
    density: PosteriorDensity
    starts: Callable[[int], Tensor]
    generator: torch.Generator
    progress: Progress | None = None
    seed: int = 0
    marks: Callable[[], dict[str, str]] = dict

    def posterior(self, method: Method, params: Tensor | None, info: dict[str, Any], **kept: Any) -> Posterior:
        """A result: draws (chain, draw, P) and what was found on the way, with the method's settings beside it."""
        # what was found on the way goes before what was asked for, such as a step size
        info = {**method.settings(), "generator": self.seed, "backend": self.density.backend.name, **info}
        return Posterior(
            self.network.layout, method.name, params, info=info, network=self.network,
            target_shape=self.density.target_shape, data=(self.density.x, self.density.given_y), **kept,
        )  # fmt: skip


class Method(ABC):
    """Settings of one way to a posterior. Subclasses are frozen dataclasses, and refuse settings out of range.

    A method of your own needs a ``name`` and :meth:`run`:

    >>> @dataclass(frozen=True, kw_only=True)
    ... class PriorDraws(Method):
    ...     name = "prior"
    ...     draws: CountFrom1 = 10
    ...
    ...     def run(self, target: Target) -> Posterior:
    ...         return target.posterior(self, target.density.prior.sample(self.draws, target.generator)[None], {})
    >>> PriorDraws(draws=5).settings()
    {'draws': 5}
    >>> PriorDraws(draws=0)
    Traceback (most recent call last):
    mlcollage.errors.InvalidInput: draws must be a whole number of at least 1, not 0.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        # with the ranges that annotations carry
        hints = get_type_hints(type(self), include_extras=True)
        # frozen, so set by way of object; a numpy number becomes Python's, which JSON knows
        for field in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), hints[field.name]))

    @abstractmethod
    def run(self, target: Target) -> Posterior:
        """Sample or approximate the posterior."""

    def settings(self) -> dict[str, Any]:
        """The settings that are numbers or words, or None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, int | float | str | NoneType)}


def check_method(method: Any) -> Method:
    """The method, or a sentence that says what to pass."""
    if isinstance(method, Method):
        return method
    what, example = repr(method), "HMC(chains=4, draws=100)"
    if isinstance(method, type):
        what = f"the class {method.__name__}"
        example = f"{method.__name__}()" if issubclass(method, Method) else example
    raise InvalidInput(f"method is {what}; pass an object with its settings, such as {example}.")


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value in the type that its annotation asks for: a range, some words, or anything."""
    # the members of a union, or the one type
    options = (hint,) if get_origin(hint) in (Annotated, Literal) else get_args(hint)
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    ranges = [option.__metadata__[0] for option in options if get_origin(option) is Annotated]
    if (value is None and NoneType in options) or (isinstance(value, str) and value in words):
        return value
    if ranges:
        return ranges[0](name, value)
    # where a word is one of several types, only a word is looked up
    return choice(name, value, words) if words and (isinstance(value, str) or len(options) == 1) else value
