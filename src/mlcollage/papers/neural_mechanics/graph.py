"""Symmetries read off a network's graph: an algebra of degrees for scale and rescale, of shifts for translation.

``torch.export`` gives the graph of aten operators. Every operator puts linear equations on the degrees of its inputs,
outputs and parameters; the null space of all equations is the space of the network's diagonal symmetries, of which each
channel of a hidden layer, each normalized weight, each pair of a rotary embedding is one. Residual connections, shared
weights, grouped heads and flattened feature maps need no case of their own: they are equations like the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics import _products  # noqa: F401  (its rules enter the table)
from mlcollage.papers.neural_mechanics._degrees import Degree, Part, Solution
from mlcollage.papers.neural_mechanics._families import Slot, families
from mlcollage.papers.neural_mechanics._rules import DECOMPOSE_NOT, VALUES_UNSEEN, Value, Walk, apply_rule
from mlcollage.papers.neural_mechanics._shifts import translations
from mlcollage.papers.neural_mechanics.symmetry import SymmetrySet

__all__ = ["Graph", "TracingFailed", "structural_symmetries", "trace"]

CONVOLUTIONS = {f"conv{k}d" for k in (1, 2, 3)} | {f"conv_transpose{k}d" for k in (1, 2, 3)} | {"convolution"}
LARGEST_ELEMENTWISE = 1 << 18  # a parameter that is only added or multiplied gets one unknown per entry up to here


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
    has_loss
        Whether the graph ends in the loss.
    """

    module: fx.GraphModule
    parameters: dict[str, str]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    has_loss: bool


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Tensor:
        return self.loss(self.model(*args, **kwargs), targets)


class _Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)


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
    wrapped: nn.Module = _Plain(model) if loss is None else _WithLoss(model, loss)
    inputs = (args, kwargs) if loss is None else (args, kwargs, targets)
    wrapped.training = model.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(wrapped, inputs, strict=False)
            program = program.run_decompositions(_table())
    except Exception as problem:  # torch.export raises many types; all mean that there is no graph
        raise TracingFailed(f"the model could not be traced: {_reason(problem)}") from problem
    signature = program.graph_signature
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    canonical = _canonical_names(model)
    parameters = {}
    for placeholder, target in signature.inputs_to_parameters.items():
        name = canonical[target.removeprefix("model.")]
        if name in trainable:
            parameters[placeholder] = name
    outputs = tuple(str(name) for name in signature.user_outputs if isinstance(name, str))
    inputs_ = tuple(str(name) for name in signature.user_inputs if isinstance(name, str))
    return Graph(program.graph_module, parameters, outputs, inputs_, loss is not None)


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter, tied ones included, to the name under which ``named_parameters`` lists it."""
    first = {id(value): name for name, value in model.named_parameters()}
    return {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}


def _table() -> Any:
    table = torch.export.default_decompositions()
    for operator in list(table):
        schema = getattr(operator, "_schema", None)
        if schema is not None and schema.name.split("::")[-1] in DECOMPOSE_NOT:
            del table[operator]
    return table


def _reason(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    where = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    text = lines[0] if lines else type(problem).__name__
    return f"{text[:300]} ({where[-1].split('/')[-1]})" if where else text[:300]


def structural_symmetries(graph: Graph) -> SymmetrySet:
    """Translation, scale, rescale and matrix symmetries of a traced network, not yet confirmed by numbers."""
    walk = Walk()
    slots = _parameters(graph, walk)
    env: dict[str, Any] = {placeholder: value for placeholder, (value, _) in slots.items()}
    _interpret(graph.module, env, walk)
    for name in graph.outputs:
        walk.fix(env.get(name))
    for value, _ in slots.values():
        _pin(value, walk)
    solution: Solution = walk.system.solve()
    listed = [slot for _, several in slots.values() for slot in several]
    found = families(listed, solution, walk)
    shifted, notes = translations(graph)
    unhandled = [
        *(
            f"operator {name} at {site or 'the top'}: no rule, what enters it was held fixed"
            for name, site in walk.opaque.items()
        ),
        *(f"{site or 'the top'}: too many equations, what enters it was held fixed" for site in walk.system.given_up),
        *(
            f"{site}: a batch norm in evaluation mode has no scale law; call model.train() first"
            for site in dict.fromkeys(walk.frozen_norms)
        ),
        *notes,
    ]
    return SymmetrySet((*shifted, *found.symmetries), tuple(dict.fromkeys([*unhandled, *found.notes])))


# --- the walk -------------------------------------------------------------------------------------------------------


def _site(node: fx.Node) -> str:
    """The module in whose forward the node was made."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return "" if path == "model" else path.removeprefix("model.")


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return [_shape(item) for item in value]
    return ()


def _interpret(module: fx.GraphModule, env: dict[str, Any], walk: Walk) -> Any:
    """Walk the nodes in order; `env` holds the values of the placeholders and receives the others."""
    result: Any = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.name not in env:
                env[node.name] = _constant(node)
        elif node.op == "get_attr":
            target = module.get_submodule(node.target) if hasattr(module, node.target) else None
            env[node.name] = target if isinstance(target, fx.GraphModule) else Value(())
        elif node.op == "output":
            result = fx.node.map_arg(node.args[0], lambda n: env[n.name])
        else:
            walk.site = _site(node)
            env[node.name] = _call(node, env, walk)
    return result


def _constant(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return Value(tuple(int(size) for size in value.shape)) if isinstance(value, Tensor) else value


def _call(node: fx.Node, env: dict[str, Any], walk: Walk) -> Any:
    args: Any = fx.node.map_arg(node.args, lambda n: env[n.name])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env[n.name])
    target: Any = node.target
    if getattr(target, "__name__", "") == "getitem":
        return args[0][args[1]] if isinstance(args[0], list | tuple) else args[0]
    inner = [value for value in args if isinstance(value, fx.GraphModule)]
    if inner:  # a region such as torch.no_grad() or autocast, kept as a graph of its own
        return _enter(inner, args, node, walk)
    if not hasattr(target, "_schema"):
        walk.fix(args, *kwargs.values())
        return _shape(node.meta.get("val"))
    value = node.meta.get("val")
    if not isinstance(value, Tensor | list | tuple):
        if _operator(node) not in VALUES_UNSEEN:
            walk.fix(args)
        return value
    return apply_rule(walk, target, _shape(value), args, kwargs)


def _enter(inner: list[fx.GraphModule], args: Any, node: fx.Node, walk: Walk) -> Any:
    values = [value for value in args if isinstance(value, Value)]
    names = [n.name for n in inner[0].graph.nodes if n.op == "placeholder"]
    if len(inner) == 1 and len(names) == len(values):
        return _interpret(inner[0], dict(zip(names, values, strict=True)), walk)
    walk.fix(args)
    walk.opaque.setdefault(str(node.target), walk.site)
    shapes = _shape(node.meta.get("val"))
    return [Value(tuple(s), live=True) for s in shapes] if isinstance(shapes, list) else Value(shapes, live=True)


# --- parameters -----------------------------------------------------------------------------------------------------


def _parameters(graph: Graph, walk: Walk) -> dict[str, tuple[Value, list[Slot]]]:
    """Unknown degrees of every parameter: a sum over its axes, as its first use reads them."""
    out: dict[str, tuple[Value, list[Slot]]] = {}
    by_name: dict[str, tuple[Value, list[Slot]]] = {}
    for node in graph.module.graph.nodes:
        name = graph.parameters.get(node.name) if node.op == "placeholder" else None
        if name is None:
            continue
        if name not in by_name:
            shape = tuple(int(size) for size in node.meta["val"].shape)
            parts = _unknowns(walk, node, shape)
            by_name[name] = Value(shape, parts, name, True), [Slot(name, shape, part.ids) for part in parts]
            out[node.name] = by_name[name]
        else:  # tied: one parameter under two placeholders
            out[node.name] = by_name[name][0], []
    return out


def _pin(value: Value, walk: Walk) -> None:
    """A sum over axes is defined up to constants moved between them; fix them where no product has."""
    if value.root in walk.used:
        return
    for part in value.degree[1:]:
        ids = part.ids
        for axis in part.axes - value.degree[0].axes:
            ids = ids.take([0], axis)
        walk.system.vanish((Part(1.0, ids),))


def _unknowns(walk: Walk, node: fx.Node, shape: tuple[int, ...]) -> Degree:
    rank = len(shape)
    sizes = [axis for axis in range(rank) if shape[axis] > 1]
    if len(sizes) <= 1:
        return (Part(1.0, walk.system.fresh(shape)),)
    user = next((u for u in node.users if _operator(u) in CONVOLUTIONS and len(u.args) > 1 and u.args[1] is node), None)
    if user is not None:
        return _convolution_unknowns(walk, user, shape)
    if all(_operator(u) in ("add", "mul", "sub", "expand", "cat") for u in node.users) and (
        np.prod(shape) <= LARGEST_ELEMENTWISE
    ):
        return (Part(1.0, walk.system.fresh(shape)),)
    if rank == 2:
        return tuple(Part(1.0, walk.system.fresh([shape[k] if k == axis else 1 for k in range(2)])) for axis in (0, 1))
    pairs = [{sizes[0], axis} for axis in sizes[1:]]
    return tuple(Part(1.0, walk.system.fresh([shape[k] if k in pair else 1 for k in range(rank)])) for pair in pairs)


def _operator(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else ""


def _convolution_unknowns(walk: Walk, user: fx.Node, shape: tuple[int, ...]) -> Degree:
    """One unknown per output channel, and one per input channel of each group."""
    operator = _operator(user)
    position = 8 if operator == "convolution" else 6
    groups = _argument(user, position, "groups", 1)
    ones = (1,) * (len(shape) - 2)
    first, second = shape[:2]
    lead = walk.system.fresh((first, 1, *ones))
    if second == 1:  # depthwise: the output channel says it all
        return (Part(1.0, lead),)
    other = walk.system.fresh((groups, 1, second))
    joint = np.broadcast_to(other, (groups, first // groups, second)).reshape(first, second, *ones)
    if groups == 1:
        joint = other.reshape(1, second, *ones)
    return Part(1.0, lead), Part(1.0, np.ascontiguousarray(joint))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
