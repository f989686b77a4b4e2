"""Symmetries read off a network's graph: an algebra of degrees for scale and rescale, of shifts for translation.

Every operator puts linear equations on the degrees of its inputs, outputs and parameters; the null space of all
equations is the space of the network's diagonal symmetries, of which each channel of a hidden layer, each normalized
weight, each pair of a rotary embedding is one. Residual connections, shared weights, grouped heads and flattened
feature maps need no case of their own: they are equations like the others.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, fx

from ..symmetry import SymmetrySet
from . import pointwise  # noqa: F401  (its rules enter the table)
from .degrees import NONE, Degree, Part
from .families import Slot, families
from .laws import as_symmetry, by_layer
from .names import unique_names
from .products import CONVOLUTIONS
from .tracing import Graph, operator_of, shape_of
from .walk import VALUES_UNSEEN, Convolution, Value, Walk

LARGEST_ELEMENTWISE = 1 << 18  # a parameter that is only added or multiplied gets one unknown per entry up to here


def structural_symmetries(graph: Graph) -> SymmetrySet:
    """Translation, scale, rescale and matrix symmetries of a traced network, not yet confirmed by numbers."""
    walk = Walk(weights=graph.weights)
    values, slots = _parameters(graph, walk)
    env: dict[str, Any] = dict(values)
    _interpret(graph.module, env, walk)
    walk.fix(*(env.get(name) for name in graph.outputs))
    for value in values.values():
        _pin(value, walk)
    solution = walk.system.solve()
    # The same shift of all rows is there twice, once as the shift of any row.
    twice = [(a.ids, b.ids) for a, b in pairwise(slots) if b.what == "common"]
    solution = solution.with_zero(np.concatenate([b[np.isin(a, solution.free)] for a, b in twice] or [NONE]))
    notes: list[str] = []
    found = [law for family in families(slots, solution, walk) if (law := as_symmetry(family, notes)) is not None]
    given_up = [
        f"{site or 'the top'}: too many equations, what enters it was held fixed" for site in walk.system.given_up
    ]
    if not graph.has_loss:
        notes.append("no loss was given: the translation symmetry of the last layer was not looked for")
    unhandled = tuple(dict.fromkeys([*walk.notes, *given_up, *notes]))
    return SymmetrySet(unique_names(by_layer(found)), unhandled)


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
    """Unknowns of every parameter, by placeholder; its degree is a sum over its axes, as its first use reads them."""
    nodes: dict[str, list[fx.Node]] = {}  # tied: one parameter under several placeholders
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and node.name in graph.parameters and node.users:
            nodes.setdefault(graph.parameters[node.name], []).append(node)
    values: dict[str, Value] = {}
    slots: list[Slot] = []
    for name, own in nodes.items():
        shape = shape_of(own[0].meta["val"])
        degree = _unknowns(walk, own[0], shape)
        shifts = _shifts(walk, name, shape, own)
        slots += [*(Slot(name, shape, part.ids) for part in degree), *shifts]
        shift = tuple(Part(1.0, slot.ids[None], -1 if slot.free else 0, slot.labels) for slot in shifts)
        values |= {node.name: Value(shape, degree, name, shift, key=walk.number(("parameter", name))) for node in own}
    return values, slots


def _shifts(walk: Walk, name: str, shape: tuple[int, ...], nodes: list[fx.Node]) -> list[Slot]:
    """Unknown shifts of a parameter: one for each entry along the axes that its uses keep.

    Along an axis that is summed over, or picked from, any shift is like any other: there the carrier differs. A second
    array of unknowns stands for shifts that are the same all along it, which some sums do not change.
    """
    wide = {axis for axis, size in enumerate(shape) if size > 1}
    uses = [use for node in nodes for user in node.users if (use := _use(node, user)) is not None]
    kept, summed, padding = max(uses, key=lambda use: use[1] == "picked", default=(None, "", -1))
    if kept is None:
        kept = wide if math.prod(shape) <= LARGEST_ELEMENTWISE else {len(shape) - 1}
    free = tuple(sorted(wide - kept))
    unknowns = [size if axis in kept else 1 for axis, size in enumerate(shape)]
    if not free:
        return [Slot(name, shape, walk.system.fresh(unknowns), "shift")]
    out = [Slot(name, shape, walk.system.fresh(unknowns), "shift", free, padding)]
    if summed != "convolved" and padding < 0:  # a padding row is never shifted
        out.append(Slot(name, shape, walk.system.fresh(unknowns), "common"))
    return out


def _use(node: fx.Node, user: fx.Node) -> tuple[set[int], str, int] | None:
    """Of a product with a parameter: the axes that are left of it, how the others go, and a padding row."""
    operator, args = operator_of(user), user.args
    rank, place = len(shape_of(node.meta["val"])), next((k for k, x in enumerate(args) if x is node), -1)
    everything = set(range(rank))
    if operator == "embedding" and place == 0:
        padding = args[2] if len(args) > 2 else -1
        return {1}, "picked", padding if isinstance(padding, int) else -1
    if operator in CONVOLUTIONS and place == 1:
        options = Convolution.of(operator, args, user.kwargs)
        return ({0} if not options.transposed else {1} if options.groups == 1 else {0, 1}), "convolved", -1
    if operator in ("matmul", "mm", "bmm", "addmm") and rank > 1 and place >= 0:
        if place == len(args) - 1:
            return everything - {rank - 2}, "summed", -1
        return (everything - {rank - 1}, "summed", -1) if place == len(args) - 2 else None
    if rank == 2 and (operator in ("lstm", "gru", "rnn_tanh", "rnn_relu") or (operator == "linear" and place == 1)):
        return {0}, "summed", -1
    return None


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
    groups = Convolution.of(operator_of(user), user.args, user.kwargs).groups
    first, second, ones = *shape[:2], (1,) * (len(shape) - 2)
    lead = Part(1.0, walk.system.fresh((first, 1, *ones)))
    if second == 1:  # depthwise: the output channel says it all
        return (lead,)
    other = walk.system.fresh((groups, 1, second))  # by group and input channel within it
    joint = np.broadcast_to(other, (groups, first // groups, second)).reshape(first, second, *ones)
    return lead, Part(1.0, other.reshape(1, second, *ones) if groups == 1 else np.ascontiguousarray(joint))
