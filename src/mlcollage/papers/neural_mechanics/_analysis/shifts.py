"""Translation symmetries: which constant shifts of an activation the rest of the network, or the loss, does not see.

Read backwards from the operations that forget a shift. A softmax forgets what is constant along its axis, layer norm
what is constant over the normalized axes, batch norm what is constant over examples and space. A node's shift is
forgotten if every one of its users forgets it; the pattern is the set of axes along which the shift must be constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from ..symmetry import Symmetry
from ..term import Term, as_keep
from .degrees import axis_groups
from .names import law_name, module_of
from .tracing import Graph, operator_of, shape_of
from .walk import VALUES_UNSEEN, batch_statistics, convolution_groups, statistics_axes

Pattern = frozenset[int]  # axes along which the shift is constant
Absorber = Callable[[fx.Node, fx.Node], Pattern | None]  # (node, user) -> what the user demands; None: it sees shifts
Passer = Callable[[fx.Node, fx.Node, Pattern], Pattern | None]  # the same, given the pattern of the user's result


def translations(graph: Graph) -> tuple[list[Symmetry], list[str]]:
    """Translation symmetries of a graph, weight and bias of one layer together, with notes."""
    patterns = _patterns(graph)
    uses: dict[str, list[fx.Node]] = {}  # a tied parameter has several placeholders, not all of them in use
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and node.name in graph.parameters:
            uses.setdefault(graph.parameters[node.name], []).append(node)
    layers: dict[str, list[tuple[str, tuple[int, ...], int]]] = {}  # module -> parameter, kept axes, number of laws
    for name, nodes in uses.items():
        used, shape = [node for node in nodes if node.users], _shape(nodes[0]) or ()
        constant = _union(patterns[node.name] for node in used)
        if used and constant is not None:
            keep = tuple(axis for axis in range(len(shape)) if axis not in constant)
            layers.setdefault(module_of(name), []).append((name, keep, math.prod(shape[axis] for axis in keep)))
    found = []
    for members in layers.values():
        terms, start = [], 0
        for name, keep, count in members:  # [W | b] as one family: the laws of the weight, then those of the bias
            laws = tuple(range(start, start + count)) if len(members) > 1 else None
            terms.append(Term(name, 1, keep=as_keep(keep), laws=laws))
            start += count
        found.append(Symmetry("translation", law_name("translation", [(members[0][0], 1)]), tuple(terms), start))
    no_loss = "no loss was given: the translation symmetry of the last layer was not looked for"
    return found, [] if graph.has_loss else [no_loss]


def _patterns(graph: Graph) -> dict[str, Pattern | None]:
    """The pattern of every node, last node first; None where a shift is seen."""
    out: dict[str, Pattern | None] = {}
    live = _live(graph)
    for node in reversed(graph.module.graph.nodes):
        if node.op not in ("call_function", "placeholder"):
            continue
        demands: list[Pattern | None] = []
        for user in node.users:
            name, after = operator_of(user), out.get(user.name)
            if user.op == "output" or name in VALUES_UNSEEN:  # buffers written back are not seen by the loss
                continue
            if name in ABSORBERS:
                demands.append(ABSORBERS[name](node, user))
            elif name in ("mul", "div") and after is not None:
                demands.append(_scaled(node, user, after, live))
            else:
                demands.append(PASSERS[name](node, user, after) if name in PASSERS and after is not None else None)
        absorbed = bool(demands) and node.name not in graph.outputs and _shape(node) is not None
        out[node.name] = _union(demands) if absorbed else None
    return out


def _union(patterns: Iterable[Pattern | None]) -> Pattern | None:
    out: Pattern = frozenset()
    for pattern in patterns:
        if pattern is None:
            return None
        out |= pattern
    return out


def _live(graph: Graph) -> set[fx.Node]:
    """The nodes that are computed from parameters or inputs."""
    given = {*graph.parameters, *graph.inputs}
    live: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.name in given if node.op == "placeholder" else any(parent in live for parent in node.all_input_nodes):
            live.add(node)
    return live


def _shape(node: Any) -> tuple[int, ...] | None:
    """Shape of the (first) tensor that a node holds, None if it holds none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return tuple(shape_of(value)) if isinstance(value, Tensor) else None


def _rank(node: Any) -> int:
    return len(_shape(node) or ())


# --- operators that forget a shift ----------------------------------------------------------------------------------


def _softmax(node: fx.Node, user: fx.Node) -> Pattern | None:
    dim = user.args[1]
    return frozenset({dim % max(_rank(node), 1)}) if isinstance(dim, int) else None


def _norm(node: fx.Node, user: fx.Node) -> Pattern | None:
    """Norms, by the axes over which their statistics are taken; their gain and bias are seen."""
    if user.args[0] is not node or node in user.args[1:]:
        return None
    rank, name, args = _rank(node), operator_of(user), user.args
    if name == "layer_norm":
        normalized: Any = args[1]
        return frozenset(range(rank - len(normalized), rank))
    if name == "group_norm":
        return frozenset(range(1, rank))
    return frozenset(statistics_axes(name, rank)) if batch_statistics(name, args[3:]) else None


def _attention_key(node: fx.Node, user: fx.Node) -> Pattern | None:
    """A shift of all keys alike shifts every score of a query alike; queries and values are seen."""
    if user.args[1] is not node or user.args[0] is node or user.args[2] is node:
        return None
    return frozenset({_rank(node) - 2})  # the axis of tokens, of (..., tokens, features)


ABSORBERS: dict[str, Absorber] = {
    **dict.fromkeys(["softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"], _softmax),
    **dict.fromkeys(["layer_norm", "group_norm", "instance_norm", "batch_norm"], _norm),
    **dict.fromkeys(["_native_batch_norm_legit_functional", "_native_batch_norm_legit"], _norm),
    **dict.fromkeys(["_batch_norm_with_update_functional"], _norm),
    "scaled_dot_product_attention": _attention_key,
}


# --- operators that hand a shift on ---------------------------------------------------------------------------------


def _same(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return after


def _scaled(node: fx.Node, user: fx.Node, after: Pattern, live: set[fx.Node]) -> Pattern | None:
    """A product with a number, or with a constant that does not change along the pattern's axes."""
    first = user.args[0] is node
    if operator_of(user) == "div" and not first:
        return None
    other = user.args[1] if first else user.args[0]
    if not isinstance(other, fx.Node):
        return after
    size, rank = _shape(other), _rank(user)
    if size is None or other in live or _rank(node) != rank:
        return None
    return None if any(n > 1 and axis + rank - len(size) in after for axis, n in enumerate(size)) else after


def _broadcast(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """An addend: along axes where it is broadcast its shift is constant anyway."""
    if operator_of(user) == "sub" and user.args[0] is user.args[1]:
        return None
    size = _shape(node) or ()
    pad = _rank(user) - len(size)
    return frozenset(axis - pad for axis in after if axis >= pad and size[axis - pad] > 1)


def _masked(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """Entries replaced by minus infinity, which no softmax sees."""
    return after if user.args[0] is node and user.args[2] == float("-inf") else None


def _dropout(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return after if not user.args[2] or not user.args[1] else None


def _reshaped(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A run of axes that are merged or split must be constant as a whole if any of its real axes must be."""
    out: set[int] = set()
    size, new = _shape(node) or (), _shape(user) or ()
    for before, behind in axis_groups(size, new):
        if any(axis in after and new[axis] > 1 for axis in behind):
            out |= {axis for axis in before if size[axis] > 1}
    return frozenset(out)


def _permuted(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    rank, name = _rank(node), operator_of(user)
    order = list(range(rank))
    if name == "permute":
        dims: Any = user.args[1]
        order = [int(axis) % rank for axis in dims]
    elif name == "t":
        order.reverse()
    else:
        a, b = (int(axis) % rank for axis in user.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    return frozenset(order[axis] for axis in after)


def _selected(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    axis = int(user.args[1]) % _rank(node)  # type: ignore[arg-type]
    return frozenset(k if k < axis else k + 1 for k in after)  # the selected axis is gone from the result


def _joined(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    dim: Any = user.args[1] if len(user.args) > 1 else 0
    # along the joined axis only some entries would be shifted
    return None if dim % _rank(user) in after else after


def _averaged(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A mean over some axes; the shift may vary along them."""
    rank = _rank(node)
    dims: Any = user.args[1] if len(user.args) > 1 else None  # none given, or none listed: all axes
    summed = {axis % rank for axis in ([dims] if isinstance(dims, int) else dims or range(rank))}
    keepdim = bool(user.args[2]) if len(user.args) > 2 else bool(user.kwargs.get("keepdim"))
    left = [axis for axis in range(rank) if keepdim or axis not in summed]
    # `left` names the axes of the input that the result still has
    return frozenset(left[axis] for axis in after if left[axis] not in summed)


def _layer(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A linear layer or convolution, by its weight or bias.

    The shift of the output may be any function of the input if it is constant over the outputs.
    """
    name = operator_of(user)
    batched = _rank(user) == _rank(user.args[1])
    channel = _rank(user) - 1 if name == "linear" else 1 if batched else 0
    if len(user.args) > 2 and user.args[2] is node:
        return frozenset({0}) if channel in after else frozenset()
    if user.args[1] is not node or user.args[0] is node:
        return None
    if name == "linear" and not after:
        return after
    grouped = name != "linear" and convolution_groups(name, user.args, user.kwargs) != 1
    return frozenset({0}) if after == {channel} and not grouped else None


def _product(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A factor of a matrix product: its own free axis may be the pattern, no axis of the other factor.

    The bias of addmm, which comes first, is like an addend.
    """
    factors = user.args[-2:] if operator_of(user) == "addmm" else user.args[:2]
    if operator_of(user) == "addmm" and user.args[0] is node:
        return _broadcast(node, user, after) if node not in factors else None
    rank, own = _rank(user), _rank(node)
    if factors[0] is factors[1] or rank < 2 or own < 2:
        return None
    back = 2 if factors[0] is node else 1  # the rows of the first factor, the columns of the second
    return frozenset({own - back}) if after == {rank - back} else None


def _embedded(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    last = _rank(user) - 1
    return (frozenset({1}) if after else frozenset()) if user.args[0] is node and after <= {last} else None


def _taken(node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """The first output of an operator with several."""
    return after if user.args[1] == 0 and _shape(user) == _shape(node) else None


PASSERS: dict[str, Passer] = {
    **dict.fromkeys(["clone", "_to_copy", "to", "alias", "detach", "contiguous", "neg", "positive"], _same),
    **dict.fromkeys(["slice", "narrow", *(f"avg_pool{k}d" for k in (1, 2, 3))], _same),
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"], _reshaped),
    **dict.fromkeys(["permute", "transpose", "t", "swapaxes"], _permuted),
    **dict.fromkeys(["add", "sub", "expand"], _broadcast),
    **dict.fromkeys(["dropout", "native_dropout"], _dropout),
    **dict.fromkeys(["linear", *(f"conv{k}d" for k in (1, 2, 3))], _layer),
    **dict.fromkeys(["matmul", "mm", "bmm", "addmm"], _product),
    **dict.fromkeys(["mean", "sum"], _averaged),
    "masked_fill": _masked,
    "select": _selected,
    "cat": _joined,
    "getitem": _taken,
    "embedding": _embedded,
}
