"""Where a genome is trained: distributions of small learning tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

_KEYS = 4_000_000  # random keys drawn at once


@runtime_checkable
class TaskDistribution(Protocol):
    """Draws batches of labeled rows for many learners at once.

    Attributes
    ----------
    input_shape
        Shape of one input.
    classes
        Number of classes.
    """

    input_shape: tuple[int, ...]
    classes: int

    def sample(self, n_tasks: int, n_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (n_tasks, n_steps, batch, *input_shape) and labels (n_tasks, n_steps, batch), from 0."""
        ...


class ArrayTasks:
    """Batches drawn from one labeled set.

    Parameters
    ----------
    X
        Inputs (n, ...), best standardized.
    y
        Labels from 0.
    classes
        How many there are; default: as many as ``y`` shows.

    Raises
    ------
    InvalidInput
        If inputs and labels do not fit each other or are not finite.

    Examples
    --------
    >>> tasks = ArrayTasks(torch.randn(30, 4), torch.arange(30) % 3)
    >>> x, y = tasks.sample(2, 5, 8, torch.Generator().manual_seed(0))
    >>> x.shape, y.shape
    (torch.Size([2, 5, 8, 4]), torch.Size([2, 5, 8]))
    """

    def __init__(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor, *, classes: int | None = None) -> None:
        self.X = torch.as_tensor(X, dtype=torch.float32)
        self.y = torch.as_tensor(y).long()
        if self.X.ndim < 2 or self.y.shape != self.X.shape[:1] or not len(self.y):
            raise InvalidInput(
                f"X must be (n, features) or (n, channels, height, width) and y (n,); got {tuple(self.X.shape)} and "
                f"{tuple(self.y.shape)}."
            )
        if not bool(torch.isfinite(self.X).all()):
            raise InvalidInput("X has values that are not finite; replace them first.")
        self.classes = int(self.y.max()) + 1 if classes is None else checks.integer("classes", classes, least=2)
        if int(self.y.min()) < 0 or int(self.y.max()) >= self.classes:
            raise InvalidInput(f"y must hold classes from 0 to {self.classes - 1}; it has {self.y.unique().tolist()}.")
        self.input_shape = tuple(self.X.shape[1:])

    def sample(self, n_tasks: int, n_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As :meth:`TaskDistribution.sample`; rows of one batch differ, unless the set is large or too small."""
        n, draws = len(self.y), n_tasks * n_steps
        if batch <= n and draws * n <= _KEYS:
            # the largest of random keys: distinct rows, for all batches at once
            index = torch.rand(draws, n, generator=generator).topk(batch, dim=1).indices
        else:
            index = torch.randint(n, (draws, batch), generator=generator)
        x = self.X[index].reshape(n_tasks, n_steps, batch, *self.input_shape)
        return x, self.y[index].reshape(n_tasks, n_steps, batch)


def _xor(x: Tensor) -> Tensor:
    return (x[..., 0] * x[..., 1] > 0).long()


def _and(x: Tensor) -> Tensor:
    return ((x[..., 0] > 0) & (x[..., 1] > 0)).long()


def _circle(radius: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x.square().sum(-1) < radius**2).long()


def _pie(x: Tensor) -> Tensor:
    return ((torch.atan2(x[..., 1], x[..., 0]) / (2 * np.pi) * 5).floor().long() % 5).clamp(0, 4)


def _cross(x: Tensor) -> Tensor:
    return (x.abs().min(-1).values < 0.25).long()


def _triangle(x: Tensor) -> Tensor:
    return ((x[..., 1] > -0.5) & (x[..., 1] < 0.8 - 1.6 * x[..., 0].abs())).long()


TOYS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "xor": (2, _xor),
    "and": (2, _and),
    "circle": (2, _circle(0.7)),
    "small_circle": (2, _circle(0.45)),
    "pie": (5, _pie),
    "cross": (2, _cross),
    "triangle": (2, _triangle),
}
"""Functions on the square [-1, 1]², after the paper's toy tasks, with their number of classes."""


class ToyTasks:
    """Functions of two numbers on [-1, 1]²; each learner gets one of them, turned by an angle of its own.

    Parameters
    ----------
    names
        Some of :data:`TOYS`.
    turn
        Whether the square is turned at random for each learner.

    Examples
    --------
    >>> x, y = ToyTasks(("xor", "circle")).sample(4, 2, 16, torch.Generator().manual_seed(0))
    >>> tuple(x.shape), int(y.max())
    ((4, 2, 16, 2), 1)
    """

    input_shape: tuple[int, ...] = (2,)

    def __init__(self, names: Sequence[str] = ("xor", "and", "circle", "small_circle"), *, turn: bool = True) -> None:
        if not names:
            raise InvalidInput(f"names is empty; choose of {', '.join(TOYS)}.")
        self.names = [checks.choice("each of names", name, TOYS) for name in names]
        self.turn = turn
        self.classes = max(TOYS[name][0] for name in names)

    def sample(self, n_tasks: int, n_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As :meth:`TaskDistribution.sample`."""
        x = 2 * torch.rand(n_tasks, n_steps, batch, 2, generator=generator) - 1
        which = torch.randint(len(self.names), (n_tasks,), generator=generator)
        y = torch.stack([TOYS[self.names[int(w)]][1](x[i]) for i, w in enumerate(which)])
        if self.turn:
            angle = 2 * np.pi * torch.rand(n_tasks, generator=generator)
            c, s = angle.cos(), angle.sin()
            turned = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)  # (tasks, 2, 2)
            x = torch.einsum("tsbi,tij->tsbj", x, turned)
        return x * 3**0.5, y  # unit deviation
