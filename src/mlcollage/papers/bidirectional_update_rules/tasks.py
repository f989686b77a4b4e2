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
    ways
        Each learner gets so many classes, drawn at random and numbered anew; default: all.
    features
        Each learner gets so many random projections of the inputs, with unit deviation; default: the inputs.

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

    def __init__(
        self,
        X: ArrayLike | Tensor,
        y: ArrayLike | Tensor,
        *,
        classes: int | None = None,
        ways: int | None = None,
        features: int | None = None,
    ) -> None:
        try:
            self.X, labels = torch.as_tensor(X, dtype=torch.float32), torch.as_tensor(y)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise InvalidInput(f"X and y must be arrays of numbers, y of classes from 0: {error}") from error
        self.y = labels.long()
        if labels.dtype.is_floating_point and not bool((self.y == labels).all()):
            raise InvalidInput("y must hold classes from 0 as whole numbers; it has fractions, or NaN.")
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
        self._all, self.ways, self.features = self.classes, ways, features
        if ways is not None:
            self.classes = checks.integer("ways", ways, least=2, most=self._all)
        if features is not None:
            self.X = self.X.flatten(1)
        self.input_shape = (
            tuple(self.X.shape[1:]) if features is None else (checks.integer("features", features, least=1),)
        )

    def sample(self, n_tasks: int, n_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As :meth:`TaskDistribution.sample`; rows of one batch differ, unless the set is large or too small."""
        n, draws = len(self.y), n_tasks * n_steps
        shape = n_tasks, n_steps, batch
        if self.ways is not None:
            return self._few_classes(shape, generator)
        if batch <= n and draws * n <= _KEYS:
            # the largest of random keys: distinct rows, for all batches at once
            index = torch.rand(draws, n, generator=generator).topk(batch, dim=1).indices
        else:
            index = torch.randint(n, (draws, batch), generator=generator)
        return self._rows(index.reshape(shape), generator), self.y[index].reshape(shape)

    def _few_classes(self, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows, with replacement, of a few classes for each learner."""
        assert self.ways is not None
        order = torch.rand(shape[0], self._all, generator=generator).argsort(1)[:, : self.ways]  # (tasks, ways)
        numbers = torch.full((shape[0], self._all), -1).scatter(1, order, torch.arange(self.ways).expand_as(order))
        there = numbers[:, self.y]  # (tasks, n), -1 where a row is of another class
        index = torch.multinomial((there >= 0).float(), shape[1] * shape[2], replacement=True, generator=generator)
        return self._rows(index.reshape(shape), generator), there.gather(1, index).reshape(shape)

    def _rows(self, index: Tensor, generator: torch.Generator) -> Tensor:
        x = self.X[index]
        if self.features is None:
            return x
        d = self.X.shape[1]
        seen = x.flatten(1, 2) @ torch.randn(
            len(index), d, self.features, generator=generator
        )  # (tasks, rows, features)
        seen = (seen - seen.mean(1, keepdim=True)) / (seen.std(1, keepdim=True) + 1e-6)
        return seen.reshape(*index.shape, self.features)


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
