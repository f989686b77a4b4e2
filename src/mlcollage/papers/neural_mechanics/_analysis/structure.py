"""Symmetries read off a network's graph: an algebra of degrees for scale and rescale, of shifts for translation.

Every operator puts linear equations on the degrees of its inputs, outputs and parameters; the null space of all
equations is the space of the network's diagonal symmetries, of which each channel of a hidden layer, each normalized
weight, each pair of a rotary embedding is one. Residual connections, shared weights, grouped heads and flattened
feature maps need no case of their own: they are equations like the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, fx

from ..symmetry import SymmetrySet
from . import pointwise  # noqa: F401  (its rules enter the table)
from .degrees import Degree, Part
from .families import Slot, families
from .laws import as_symmetry
from .names import unique_names
from .products import CONVOLUTIONS
from .shifts import translations
from .tracing import Graph, operator_of, shape_of
from .walk import VALUES_UNSEEN, Value, Walk, convolution_groups

LARGEST_ELEMENTWISE = 1 << 18  # a parameter that is only added or multiplied gets one unknown per entry up to here


def structural_symmetries(graph: Graph) -> SymmetrySet:
    """Translation, scale, rescale and matrix symmetries of a traced network, not yet confirmed by numbers."""
    walk = Walk()
    values, slots = _parameters(graph, walk)
    env: dict[str, Any] = dict(values)
    _interpret(graph.module, env, walk)
    walk.fix(*(env.get(name) for name in graph.outputs))
    for value in values.values():
        _pin(value, walk)
    shifted, notes = translations(graph)
    diagonal_only: list[str] = []
    found = [as_symmetry(family, diagonal_only) for family in families(slots, walk.system.solve(), walk)]
    given_up = [
        f"{site or 'the top'}: too many equations, what enters it was held fixed" for site in walk.system.given_up
    ]
    unhandled = tuple(dict.fromkeys([*walk.notes, *given_up, *notes, *diagonal_only]))
    return SymmetrySet((*shifted, *unique_names(found)), unhandled)


# --- the walk -------------------------------------------------------------------------------------------------------


def _interpret(module: fx.GraphModule, env: dict[str, Any], walk: Walk) -> Any:
    """Walk the nodes in order; `env` holds the values of the placeholders and receives the others."""
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.name not in env:
                constant = node.meta.get("val")
                env[node.name] = Value(shape_of(constant)) if isinstance(constant, Tensor) else constant
        elif node.op == "get_attr":
            # a graph of its own, or a constant tensor
            target = module.get_submodule(node.target) if hasattr(module, node.target) else None
            env[node.name] = target if isinstance(target, fx.GraphModule) else Value(())
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: env[n.name])
        else:
            walk.site = _site(node)
            env[node.name] = _call(node, env, walk)
    return None


def _site(node: fx.Node) -> str:
    """The module in whose forward the node was made."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path == "model" else path.removeprefix("model.")


def _call(node: fx.Node, env: dict[str, Any], walk: Walk) -> Any:
    args: Any = fx.node.map_arg(node.args, lambda n: env[n.name])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env[n.name])
    name, result = operator_of(node), node.meta.get("val")
    if name == "getitem":
        return args[0][args[1]] if isinstance(args[0], list | tuple) else args[0]
    inner = [value for value in args if isinstance(value, fx.GraphModule)]
    if inner:  # a region such as torch.no_grad() or autocast, kept as a graph of its own
        return _enter(inner, args, node, walk)
    if not hasattr(node.target, "_schema"):  # Python arithmetic on sizes
        walk.fix(args, *kwargs.values())
        return shape_of(result)
    if not isinstance(result, Tensor | list | tuple):  # a number read off a tensor
        if name not in VALUES_UNSEEN:
            walk.fix(args)
        return result
    return walk.call(node.target, name, shape_of(result), args, kwargs)


def _enter(inner: list[fx.GraphModule], args: Any, node: fx.Node, walk: Walk) -> Any:
    values = [value for value in args if isinstance(value, Value)]
    names = [n.name for n in inner[0].graph.nodes if n.op == "placeholder"]
    if len(inner) == 1 and len(names) == len(values):
        return _interpret(inner[0], dict(zip(names, values, strict=True)), walk)
    walk.fix(args)
    walk.hold_fixed(str(node.target))
    shapes = shape_of(node.meta.get("val"))
    return [Value(tuple(s)) for s in shapes] if isinstance(shapes, list) else Value(shapes)


# --- parameters -----------------------------------------------------------------------------------------------------


def _parameters(graph: Graph, walk: Walk) -> tuple[dict[str, Value], list[Slot]]:
    """Unknown degrees of every parameter, by placeholder: a sum over its axes, as its first use reads them."""
    values: dict[str, Value] = {}
    slots: list[Slot] = []
    by_name: dict[str, Value] = {}  # tied: one parameter under two placeholders
    for node in graph.module.graph.nodes:
        name = graph.parameters.get(node.name) if node.op == "placeholder" else None
        if name is None:
            continue
        if name not in by_name:
            shape = shape_of(node.meta["val"])
            by_name[name] = Value(shape, _unknowns(walk, node, shape), name)
            slots += [Slot(name, shape, part.ids) for part in by_name[name].degree]
        values[node.name] = by_name[name]
    return values, slots


def _pin(value: Value, walk: Walk) -> None:
    """A sum over axes is defined up to constants moved between them; fix them where no product has."""
    if value.root in walk.used:
        return
    for part in value.degree[1:]:
        ids = part.ids
        for axis in part.axes - value.degree[0].axes:
            ids = ids.take([0], axis)
        walk.equal((Part(1.0, ids),))


def _unknowns(walk: Walk, node: fx.Node, shape: tuple[int, ...]) -> Degree:
    def along(*axes: int) -> Part:
        """New unknowns that differ along these axes."""
        return Part(1.0, walk.system.fresh([size if axis in axes else 1 for axis, size in enumerate(shape)]))

    wide = [axis for axis, size in enumerate(shape) if size > 1]
    kernel_of = [u for u in node.users if operator_of(u) in CONVOLUTIONS and len(u.args) > 1 and u.args[1] is node]
    if kernel_of and len(wide) > 1:
        return _convolution_unknowns(walk, kernel_of[0], shape)
    # Biases and gains are read entry by entry, the weights of products as a sum over their axes.
    entrywise = all(operator_of(u) in ("add", "mul", "sub", "expand", "cat") for u in node.users)
    if len(wide) <= 1 or (entrywise and np.prod(shape) <= LARGEST_ELEMENTWISE):
        return (along(*wide),)
    if len(shape) == 2:
        return along(0), along(1)
    return tuple(along(wide[0], axis) for axis in wide[1:])


def _convolution_unknowns(walk: Walk, user: fx.Node, shape: tuple[int, ...]) -> Degree:
    """One unknown per output channel, and one per input channel of each group."""
    groups = convolution_groups(operator_of(user), user.args, user.kwargs)
    first, second, ones = *shape[:2], (1,) * (len(shape) - 2)
    lead = Part(1.0, walk.system.fresh((first, 1, *ones)))
    if second == 1:  # depthwise: the output channel says it all
        return (lead,)
    other = walk.system.fresh((groups, 1, second))  # by group and input channel within it
    joint = np.broadcast_to(other, (groups, first // groups, second)).reshape(first, second, *ones)
    return lead, Part(1.0, other.reshape(1, second, *ones) if groups == 1 else np.ascontiguousarray(joint))
