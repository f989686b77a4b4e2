"""A network as a graph of aten operators, by ``torch.export``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mlcollage.errors import InvalidInput

# Operators that are kept whole, because a rule exists for them and not for all of their parts.
KEPT = frozenset([
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm", "scaled_dot_product_attention",
    "softmax", "log_softmax", "dropout", "matmul", "embedding", "max_pool1d", "max_pool2d", "max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "pixel_shuffle", "lstm", "gru", "rnn_tanh", "rnn_relu", "silu",
    "gelu", "addmm", "mm", "bmm", "linalg_vector_norm", "prelu", "logsumexp",
])  # fmt: skip


class TracingFailed(InvalidInput):
    """The model has no graph: control flow that depends on data, or an operation that cannot be exported."""


@dataclass
class Graph:
    """An exported network.

    Attributes
    ----------
    module
        The graph of aten operators.
    parameters
        Placeholder name to parameter name, for trainable parameters; frozen ones count as constants.
    outputs
        Names of the nodes that the user sees: the loss, or the outputs where no loss was given.
    inputs
        Names of the placeholders of the user's inputs.
    has_loss
        Whether the graph ends in the loss.
    weights
        The parameters' values by name.
    """

    module: fx.GraphModule
    parameters: dict[str, str]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    has_loss: bool
    weights: Mapping[str, Tensor]


class _Whole(nn.Module):
    """The model, followed by its loss if there is one."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> None:
        super().__init__()
        self.model, self.loss, self.training = model, loss, model.training

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Any:
        out = self.model(*args, **kwargs)
        return out if self.loss is None else self.loss(out, targets)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    targets: Any = None,
) -> Graph:
    """The model's graph in its present mode (training or evaluation), followed by the loss if one is given.

    Raises
    ------
    TracingFailed
        With the reason that ``torch.export`` gives, and the line of the model's code where it gave up.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(_Whole(model, loss), (args, kwargs, targets), strict=False)
            # in aten operators, few enough to have a rule for each
            program = program.run_decompositions(_decompositions())
    except Exception as problem:  # torch.export raises many types; all mean that there is no graph
        raise TracingFailed(f"the model could not be traced: {_reason(problem)}") from problem
    signature = program.graph_signature
    # Every name of a parameter, tied ones included, to the name under which named_parameters lists it
    first = {id(value): name for name, value in model.named_parameters()}
    listed = {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    parameters = {
        placeholder: listed[target.removeprefix("model.")]
        for placeholder, target in signature.inputs_to_parameters.items()
        if listed[target.removeprefix("model.")] in trainable
    }
    outputs = tuple(name for name in signature.user_outputs if isinstance(name, str))  # others are constants
    inputs = tuple(name for name in signature.user_inputs if isinstance(name, str))
    weights = dict(model.named_parameters())
    return Graph(program.graph_module, parameters, outputs, inputs, loss is not None, weights)


def operator_of(node: fx.Node) -> str:
    """Name of a node's operator without namespace, overload and in-place underscore."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1].rstrip("_") if schema is not None else getattr(node.target, "__name__", "")


def shape_of(value: Any) -> Any:
    """Shape of a tensor, list of shapes of several, () of anything else."""
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    return [shape_of(item) for item in value] if isinstance(value, list | tuple) else ()


def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    for operator in list(table):
        schema = getattr(operator, "_schema", None)
        if schema is not None and schema.name.split("::")[-1] in KEPT:
            del table[operator]
    return table


def _reason(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    # the last line of the user's own code in the message
    where = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    text = lines[0] if lines else type(problem).__name__
    return f"{text[:300]} ({where[-1].split('/')[-1]})" if where else text[:300]
