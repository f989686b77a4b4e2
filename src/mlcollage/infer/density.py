r"""A log-density over a batch of chains, its gradient, and where the chains stand.

Every sampler takes ``log_prob``, a function of positions ``(chains, dim)``. It returns either

* a tensor ``(chains,)``: one log-density per chain, unnormalized; the gradient is then taken by one backward pass
  through the sum, which is exact since no chain enters another's density; or
* a pair ``(log_prob, gradient)`` of shapes ``(chains,)`` and ``(chains, dim)``: a gradient by hand, which for small
  networks is faster than autograd. It is called without recording a graph. If the function is an object that also has
  a method ``gradient(position)``, samplers call that one where they need no value, which is everywhere in a trajectory
  but at its end; it may return a buffer that its next call overwrites.

In float32 with many observations, return ``log_prob`` in float64 (sum in float64): a Metropolis test subtracts two
values of size :math:`10^5` to see a difference of size 1, and samplers keep that difference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcollage._checks import positive
from mlcollage.errors import InvalidInput

LogProb = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]  # (chains, dim) to (chains,), or with (chains, dim)
Generator = torch.Generator | int  # a generator, or a seed of one


@dataclass(frozen=True)
class State:
    """Where the chains are.

    Attributes
    ----------
    position : Tensor
        (chains, dim).
    log_prob : Tensor
        (chains,), divided by the temperature.
    gradient : Tensor
        (chains, dim), of ``log_prob``.
    """

    position: Tensor
    log_prob: Tensor
    gradient: Tensor

    def where(self, mask: Tensor, other: State) -> State:
        """These chains where ``mask`` (chains,) holds, the others elsewhere."""
        return State(
            torch.where(mask[:, None], self.position, other.position),
            torch.where(mask, self.log_prob, other.log_prob),
            torch.where(mask[:, None], self.gradient, other.gradient),
        )


class LogDensity:
    r"""A user's ``log_prob`` as a function to value and gradient, both divided by the temperature.

    .. math:: x \mapsto \Big(\frac{1}{T} \log p(x),\; \frac{1}{T} \nabla \log p(x)\Big)

    Parameters
    ----------
    log_prob
        See the module's text.
    temperature
        :math:`T > 0`; 1 is the density itself, less than 1 a sharper ("cold") one.

    Raises
    ------
    InvalidInput
        If the temperature is not positive, or what ``log_prob`` returns has another shape than promised.

    Examples
    --------
    >>> density = LogDensity(lambda x: -0.5 * x.square().sum(dim=1), temperature=0.5)
    >>> value, gradient = density(torch.tensor([[1.0, 2.0]]))
    >>> value.tolist(), gradient.tolist()
    ([-5.0], [[-2.0, -4.0]])
    """

    def __init__(self, log_prob: LogProb, temperature: float = 1.0):
        if not callable(log_prob):
            raise InvalidInput(
                f"log_prob is {type(log_prob).__name__}; a function of positions (chains, dim) is needed."
            )
        self.log_prob = log_prob
        self.temperature = positive("temperature", temperature)
        self._by_hand: bool | None = None  # whether log_prob brings its gradient: known after the first call

    @classmethod
    def of(cls, log_prob: LogProb | LogDensity) -> LogDensity:
        """A function as a density; one that is a density already stays as it is."""
        return log_prob if isinstance(log_prob, LogDensity) else cls(log_prob)

    def _check(self, position: Tensor, value: Any, gradient: Any) -> None:
        chains = len(position)
        if not isinstance(value, Tensor) or value.shape != (chains,):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(
                f"log_prob returned {found} for positions {tuple(position.shape)}; one value per chain, shape "
                f"({chains},), is needed: sum over the last dimension, not over chains."
            )
        if gradient is not None and (not isinstance(gradient, Tensor) or gradient.shape != position.shape):
            found = f"shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else type(gradient).__name__
            raise InvalidInput(f"log_prob returned a gradient of {found}; {tuple(position.shape)} is needed.")

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Value ``(chains,)`` and gradient ``(chains, dim)`` at ``position``, detached."""
        if self._by_hand is None:  # the first call finds out what the function returns
            with torch.no_grad():
                self._by_hand = isinstance(self.log_prob(position), tuple)
        if self._by_hand:  # nothing to record
            with torch.no_grad():
                value, gradient = self.log_prob(position)
            self._check(position, value, gradient)
        else:
            with torch.enable_grad():  # chains do not interact, so the gradient of the sum is that of each
                leaf = position.detach().requires_grad_(True)  # shares memory, takes no copy
                value = self.log_prob(leaf)
                self._check(position, value, None)
                assert isinstance(value, Tensor)
                if not value.requires_grad:
                    raise InvalidInput(
                        "log_prob does not depend on the position as far as autograd sees (a constant, or detached "
                        "on the way); compute it in torch operations, or return (log_prob, gradient)."
                    )
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            value = value.detach()
        if self.temperature != 1.0:  # most runs are at 1, and save two divisions
            value, gradient = value / self.temperature, gradient / self.temperature
        return value, gradient

    def gradient(self, position: Tensor) -> Tensor:
        """The gradient alone, (chains, dim), possibly in a buffer that the next call overwrites."""
        by_hand = getattr(self.log_prob, "gradient", None)
        if by_hand is None:
            return self(position)[1]
        with torch.no_grad():
            gradient: Tensor = by_hand(position)
        if not isinstance(gradient, Tensor) or gradient.shape != position.shape:  # a value of the right shape, to check
            self._check(position, position.new_empty(len(position)), gradient)
        return gradient if self.temperature == 1.0 else gradient / self.temperature

    def state(self, position: Tensor) -> State:
        """The state at ``position``, which is evaluated here."""
        return State(position, *self(position))


def start(density: LogDensity, init: Tensor | Any) -> State:
    """The first state of a run, with the checks a run needs.

    Parameters
    ----------
    density
        What is sampled.
    init
        Positions ``(chains, dim)``, a floating tensor, or an array, which becomes float64.

    Raises
    ------
    InvalidInput
        If ``init`` has another shape or type, or log-density or gradient are not finite at some chain's start.
    """
    position = init if isinstance(init, Tensor) else torch.as_tensor(init, dtype=torch.float64)
    if position.ndim != 2 or 0 in position.shape:
        raise InvalidInput(
            f"init has shape {tuple(position.shape)}; (chains, dim) is needed, a row for each chain, with at least one "
            "of each."
        )
    if not position.dtype.is_floating_point or position.dtype in (torch.float16, torch.bfloat16):
        raise InvalidInput(f"init is {position.dtype}; float64 or float32 is needed, or energies lose their digits.")
    position = position.detach().clone()  # samplers never write to what the user holds
    bad = ~position.isfinite().all(dim=1)
    if bad.any():
        raise InvalidInput(f"init is not finite in {_chains(bad)}.")
    state = density.state(position)
    for what, bad in (
        ("log_prob", ~state.log_prob.isfinite()),
        ("the gradient of log_prob", ~state.gradient.isfinite().all(dim=1)),
    ):
        if bad.any():
            first = int(bad.nonzero()[0, 0])  # one chain is shown, up to four numbers of it
            values = ", ".join(f"{v:.3g}" for v in position[first, :4].tolist())
            raise InvalidInput(
                f"{what} is not finite at the start of {_chains(bad)} (chain {first} starts at [{values}"
                f"{', ...' if position.shape[1] > 4 else ''}]); start inside the support, and transform constrained "
                "parameters to the real line."
            )
    return state


def _chains(bad: Tensor) -> str:
    names: Sequence[int] = bad.nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"chain{'s' if len(names) > 1 else ''} {shown} ({len(names)} of {len(bad)})"


def torch_generator(generator: Generator, device: torch.device | None = None) -> torch.Generator:
    """A generator on ``device`` (None: wherever the given one is, or the CPU): the given one, or one from a seed.

    Examples
    --------
    >>> a, b = (torch.rand(2, generator=torch_generator(7)) for _ in range(2))
    >>> bool((a == b).all())
    True
    """
    if isinstance(generator, torch.Generator):
        if device is not None and generator.device.type != device.type:
            raise InvalidInput(f"the generator is on {generator.device} but the chains are on {device}; make it there.")
        return generator
    if not isinstance(generator, int) or isinstance(generator, bool):
        raise InvalidInput(f"generator is {type(generator).__name__}; a torch.Generator or an integer seed is needed.")
    return torch.Generator("cpu" if device is None else device).manual_seed(generator)


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, with the type and on the device of ``like``."""
    return torch.randn(*shape, dtype=like.dtype, device=like.device, generator=generator)
