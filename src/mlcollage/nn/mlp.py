"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mlcollage.errors import UnknownName
from mlcollage.nn._parts import as_size, as_sizes, check_input, keep, make_activation

__all__ = ["MLP"]


class _Hidden(nn.Module):
    """Linear map, normalization, nonlinearity."""

    def __init__(self, inputs: int, outputs: int, norm: str | None, activation: str) -> None:
        super().__init__()
        # Batch norm takes the mean off again, so a bias before it would never have a gradient.
        self.linear = nn.Linear(inputs, outputs, bias=norm != "batch")
        self.norm = _vector_norm(norm, outputs)
        self.activation = activation
        self.add_module(activation, make_activation(activation))

    def forward(self, x: Tensor, record: dict[str, Tensor] | None = None, name: str = "") -> Tensor:
        x = keep(record, f"{name}.linear", self.linear(x))
        if self.norm is not None:
            x = keep(record, f"{name}.norm", self.norm(x))
        return keep(record, f"{name}.{self.activation}", self.get_submodule(self.activation)(x))


def _vector_norm(kind: str | None, width: int) -> nn.Module | None:
    if kind is None:
        return None
    if kind == "batch":
        return nn.BatchNorm1d(width)
    if kind == "layer":
        return nn.LayerNorm(width)
    raise UnknownName(f"norm {kind!r} is not known for an MLP; choose 'batch', 'layer' or None.")


class MLP(nn.Module):
    """Fully connected network; inputs of any shape are flattened.

    Parameters
    ----------
    in_shape
        Shape of one sample, such as ``(1, 28, 28)`` or ``(64,)``.
    num_classes
        Number of logits.
    widths
        Units of each hidden layer; ``()`` is a linear classifier.
    norm
        None, ``"batch"`` or ``"layer"``, between the linear map and the nonlinearity.
    activation
        ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, ``"elu"`` or ``"leaky_relu"``.

    Raises
    ------
    InvalidInput
        For a shape, width or number of classes that is not a positive whole number, and for inputs of another shape.
    UnknownName
        For an unknown norm or activation.

    Notes
    -----
    Activations, in order of execution: ``hidden1.linear``, ``hidden1.norm`` (if there is one), ``hidden1.relu``
    (named after the nonlinearity), ..., ``logits``. All but the last are also the paths of the modules that made them.

    Examples
    --------
    >>> import torch
    >>> model = MLP((1, 28, 28), 10, widths=(32,))
    >>> logits, acts = model(torch.zeros(4, 1, 28, 28), activations=True)
    >>> {name: tuple(a.shape) for name, a in acts.items()}
    {'hidden1.linear': (4, 32), 'hidden1.relu': (4, 32), 'logits': (4, 10)}
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        widths: Sequence[int] = (128, 128),
        *,
        norm: str | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.in_shape = as_sizes(in_shape, "in_shape")
        self.num_classes = as_size(num_classes, "num_classes")
        sizes = (math.prod(self.in_shape), *as_sizes(widths, "widths", empty=True))
        self.depth = len(sizes) - 1
        for i in range(self.depth):
            self.add_module(f"hidden{i + 1}", _Hidden(sizes[i], sizes[i + 1], norm, activation))
        self.head = nn.Linear(sizes[-1], self.num_classes)

    def forward(self, x: Tensor, activations: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits (batch, classes) of x (batch, *in_shape); with ``activations=True`` also the activations by name."""
        check_input(x, self.in_shape)
        record: dict[str, Tensor] | None = {} if activations else None
        x = x.flatten(1)
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"hidden{i}")(x, record, f"hidden{i}")
        logits = keep(record, "logits", self.head(x))
        return logits if record is None else (logits, record)
