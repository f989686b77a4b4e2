"""A multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.nn._parts import Block, Network, Record, as_sizes, make_activation


class _Hidden(Block):
    """Linear map, normalization, nonlinearity."""

    def __init__(self, inputs: int, outputs: int, norm: str | None, activation: str) -> None:
        super().__init__()
        # Batch norm takes the mean off again, so a bias before it would never have a gradient.
        self.linear = nn.Linear(inputs, outputs, bias=norm != "batch")
        self.norm = None if norm is None else _NORMS[norm](outputs)
        self.add_module(activation, make_activation(activation))


_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(Network):
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
        super().__init__(as_sizes("in_shape", in_shape), num_classes)
        if norm is not None:
            checks.choice("norm, if not None,", norm, _NORMS)
        # Inputs of each linear map, from the flattened sample to the head.
        sizes = (math.prod(self.in_shape), *as_sizes("widths", widths, empty=True))
        self.depth = len(sizes) - 1
        for i in range(self.depth):
            self.add_module(f"hidden{i + 1}", _Hidden(sizes[i], sizes[i + 1], norm, activation))
        self.head = nn.Linear(sizes[-1], self.num_classes)

    def features(self, x: Tensor, record: Record = None) -> Tensor:
        """Output of the last hidden layer, (batch, widths[-1])."""
        return super().features(x.flatten(1), record)  # (batch, product of in_shape)
