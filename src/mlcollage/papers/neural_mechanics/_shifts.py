"""Translation symmetries: which constant shifts of an activation the rest of the network, or the loss, does not see.

Read backwards from the operations that forget a shift. A softmax forgets what is constant along its axis, layer norm
what is constant over the normalized axes, batch norm what is constant over examples and space. A node's shift is
forgotten if every one of its users forgets it; the pattern is the set of axes along which the shift must be constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from mlcollage.papers.neural_mechanics._degrees import _axis_groups
from mlcollage.papers.neural_mechanics._families import module_of
from mlcollage.papers.neural_mechanics._rules import VALUES_UNSEEN
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, Term

if TYPE_CHECKING:
    from mlcollage.papers.neural_mechanics.graph import Graph

__all__ = ["translations"]

Pattern = frozenset[int]  # axes along which the shift is constant
Rule = Callable[["_Back", fx.Node, fx.Node, Pattern | None], Pattern | None]


class _Back:
    """Patterns of the nodes of one graph, last node first."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.patterns: dict[str, Pattern | None] = {}
        for node in reversed(graph.module.graph.nodes):
            if node.op in ("call_function", "placeholder"):
                self.patterns[node.name] = self._of(node)

    def _of(self, node: fx.Node) -> Pattern | None:
        if node.name in self.graph.outputs or shape(node) is None:
            return None
        seen: Pattern = frozenset()
        absorbed = False
        for user in node.users:
            if user.op == "output" or operator(user) in VALUES_UNSEEN:  # buffers written back are not seen by the loss
                continue
            pattern = _through(self, node, user)
            if pattern is None:
                return None
            seen, absorbed = seen | pattern, True
        return seen if absorbed else None


def shape(node: Any) -> tuple[int, ...] | None:
    """Shape of the tensor a node holds, None if it holds none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        value = value[0]
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def operator(node: fx.Node) -> str:
    """Name of a node's operator without namespace, overload and in-place underscore."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.name.split("::")[-1] in VALUES_UNSEEN:
        return str(schema.name.split("::")[-1])
    return schema.name.split("::")[-1].rstrip("_") if schema is not None else getattr(node.target, "__name__", "")


def _through(back: _Back, node: fx.Node, user: fx.Node) -> Pattern | None:
    """Pattern that `user` demands of a shift of `node`; None if it sees every shift."""
    name = operator(user)
    if name in ABSORBERS:
        return ABSORBERS[name](back, node, user, None)
    after = back.patterns.get(user.name)
    if name in PASSERS and after is not None:
        return PASSERS[name](back, node, user, after)
    return None


def _rank(node: fx.Node) -> int:
    return len(shape(node) or ())


def _only_first(node: fx.Node, user: fx.Node) -> bool:
    """The node is the operator's first tensor and none of its others."""
    return user.args[0] is node and user.all_input_nodes.count(node) == 1 and node not in user.args[1:]


def _softmax(back: _Back, node: fx.Node, user: fx.Node, _: Pattern | None) -> Pattern | None:
    dim = user.args[1]
    return frozenset({int(dim) % max(_rank(node), 1)}) if isinstance(dim, int) else None


def _layer_norm(back: _Back, node: fx.Node, user: fx.Node, _: Pattern | None) -> Pattern | None:
    if not _only_first(node, user):
        return None
    normalized: Any = user.args[1]
    rank = _rank(node)
    return frozenset(range(rank - len(normalized), rank))


def _group_norm(back: _Back, node: fx.Node, user: fx.Node, _: Pattern | None) -> Pattern | None:
    return frozenset(range(1, _rank(node))) if _only_first(node, user) else None


def _batch_norm(back: _Back, node: fx.Node, user: fx.Node, _: Pattern | None) -> Pattern | None:
    flags = [value for value in user.args[3:] if isinstance(value, bool)]
    training = "with_update" in operator(user) or bool(flags and flags[0])
    if not _only_first(node, user) or not training:
        return None
    return frozenset(axis for axis in range(_rank(node)) if axis != 1)


def _instance_norm(back: _Back, node: fx.Node, user: fx.Node, _: Pattern | None) -> Pattern | None:
    use_stats = user.args[5] if len(user.args) > 5 else True
    return frozenset(range(2, _rank(node))) if _only_first(node, user) and use_stats else None


def _attention_key(back: _Back, node: fx.Node, user: fx.Node, _: Pattern | None) -> Pattern | None:
    """A shift of all keys alike shifts every score of a query alike; queries and values are seen."""
    if user.args[1] is not node or user.args[0] is node or user.args[2] is node:
        return None
    return frozenset({_rank(node) - 2})


ABSORBERS: dict[str, Rule] = {
    "softmax": _softmax,
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    "log_softmax": _softmax,
    "_log_softmax": _softmax,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_functional": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_batch_norm_with_update_functional": _batch_norm,
    "scaled_dot_product_attention": _attention_key,
}


def _same(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return after


def _scaled(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A product with a number, or with a constant that does not change along the pattern's axes."""
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node):
        return after if user.args[0] is node or operator(user) == "mul" else None
    size = shape(other)
    if size is None or _depends(back, other) or (operator(user) == "div" and user.args[0] is not node):
        return None
    rank = _rank(user)
    pad = rank - len(size)
    varying = {axis + pad for axis, n in enumerate(size) if n > 1}
    return None if varying & after or _rank(node) != rank else after


def _depends(back: _Back, node: fx.Node) -> bool:
    """Whether a node is computed from parameters or inputs."""
    if node.op == "placeholder":
        return node.name in back.graph.parameters or node.name in back.graph.inputs
    return any(_depends(back, parent) for parent in node.all_input_nodes)


def _broadcast(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """An addend: along axes where it is broadcast its shift is constant anyway."""
    size = shape(node) or ()
    pad = _rank(user) - len(size)
    return frozenset(axis - pad for axis in after if axis >= pad and size[axis - pad] > 1)


def _added(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    if user.args[0] is user.args[1] and operator(user) == "sub":
        return None
    return _broadcast(back, node, user, after)


def _masked(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """Entries replaced by minus infinity, which no softmax sees."""
    return after if user.args[0] is node and user.args[2] == float("-inf") else None


def _dropout(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return after if not user.args[2] or not user.args[1] else None


def _reshaped(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """Runs of axes that are merged or split must be constant as a whole, or free as a whole."""
    out: set[int] = set()
    before_shape, after_shape = shape(node) or (), shape(user) or ()
    for before, behind in _axis_groups(before_shape, after_shape):
        real = [axis for axis in behind if after_shape[axis] > 1]
        constant = [axis for axis in real if axis in after]
        if constant and len(constant) < len(real):
            out |= set(before)  # constant over the whole run is enough
        elif constant:
            out |= set(before)
    return frozenset(axis for axis in out if before_shape[axis] > 1)


def _permuted(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    rank = _rank(node)
    name = operator(user)
    if name == "permute":
        dims: Any = user.args[1]
        order = [int(axis) % rank for axis in dims]
    elif name == "t":
        order = list(reversed(range(rank)))
    else:
        a, b = (int(axis) % rank for axis in user.args[1:3])  # type: ignore[arg-type]
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
    return frozenset(order[axis] for axis in after)


def _expanded(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return _broadcast(back, node, user, after)


def _selected(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    axis = int(user.args[1]) % _rank(node)  # type: ignore[arg-type]
    return frozenset(k if k < axis else k + 1 for k in after)


def _sliced(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return after


def _joined(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    dim = int(user.args[1]) if len(user.args) > 1 else 0  # type: ignore[arg-type]
    return None if dim % _rank(user) in after else after


def _averaged(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A mean over some axes; the shift may vary along them."""
    rank = _rank(node)
    dims: Any = user.args[1] if len(user.args) > 1 else list(range(rank))
    dims = [int(axis) % rank for axis in ([dims] if isinstance(dims, int) else dims or range(rank))]
    keepdim = bool(user.args[2]) if len(user.args) > 2 else bool(user.kwargs.get("keepdim"))
    left = list(range(rank)) if keepdim else [axis for axis in range(rank) if axis not in dims]
    return frozenset(left[axis] for axis in after if left[axis] not in dims)


def _pooled(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    return after


def _linear(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """The weight, if the shift of the output may be any function of the input but is constant over the outputs."""
    last = _rank(user) - 1
    if len(user.args) > 2 and user.args[2] is node:
        return frozenset({0}) if last in after else frozenset()
    if user.args[1] is not node or user.args[0] is node:
        return None
    return frozenset({0}) if after <= {last} and after else frozenset() if not after else None


def _convolved(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    channel = 1 if _rank(user) == len(shape(user.args[1]) or ()) else 0
    if len(user.args) > 2 and user.args[2] is node:
        return frozenset({0}) if channel in after else frozenset()
    if user.args[1] is not node or user.args[0] is node or "transpose" in operator(user):
        return None
    groups = user.args[6] if len(user.args) > 6 else 1
    return frozenset({0}) if after == {channel} and groups == 1 else None


def _product(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """A factor of a matrix product: its own free axis may be the pattern, no axis of the other factor."""
    rank = _rank(user)
    left = user.args[0] is node
    if user.args[0] is user.args[1] or rank < 2 or _rank(node) < 2:
        return None
    own, mine = (rank - 2, _rank(node) - 2) if left else (rank - 1, _rank(node) - 1)
    return frozenset({mine}) if after == {own} else None


def _added_product(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """Bias + A B: the bias like an addend, A and B like factors."""
    if user.args[0] is node:
        return _broadcast(back, node, user, after) if node not in user.args[1:] else None
    if user.args[1] is user.args[2]:
        return None
    own, mine = (_rank(user) - 2, 0) if user.args[1] is node else (_rank(user) - 1, 1)
    return frozenset({mine}) if after == {own} else None


def _embedded(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    last = _rank(user) - 1
    return (frozenset({1}) if after else frozenset()) if user.args[0] is node and after <= {last} else None


def _taken(back: _Back, node: fx.Node, user: fx.Node, after: Pattern) -> Pattern | None:
    """The first output of an operator with several."""
    return after if user.args[1] == 0 and shape(user) == shape(node) else None


PASSERS: dict[str, Any] = {
    **dict.fromkeys(["clone", "_to_copy", "to", "alias", "detach", "contiguous", "neg", "positive"], _same),
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"], _reshaped),
    **dict.fromkeys(["permute", "transpose", "t", "swapaxes"], _permuted),
    **dict.fromkeys(["add", "sub"], _added),
    **dict.fromkeys(["mul", "div"], _scaled),
    **dict.fromkeys(["dropout", "native_dropout"], _dropout),
    **dict.fromkeys(["slice", "narrow"], _sliced),
    **dict.fromkeys([f"conv{k}d" for k in (1, 2, 3)], _convolved),
    **dict.fromkeys([f"avg_pool{k}d" for k in (1, 2, 3)], _pooled),
    **dict.fromkeys(["matmul", "mm", "bmm"], _product),
    "masked_fill": _masked,
    "expand": _expanded,
    "select": _selected,
    "cat": _joined,
    "addmm": _added_product,
    "mean": _averaged,
    "sum": _averaged,
    "getitem": _taken,
    "linear": _linear,
    "embedding": _embedded,
}


def translations(graph: Graph) -> tuple[list[Symmetry], list[str]]:
    """Translation symmetries of a graph, weight and bias of one layer together, with notes."""
    back = _Back(graph)
    terms: dict[str, list[tuple[Term, int]]] = {}
    uses: dict[str, list[fx.Node]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and node.name in graph.parameters:
            uses.setdefault(graph.parameters[node.name], []).append(node)
    for name, nodes in uses.items():
        patterns = [back.patterns[node.name] for node in nodes if node.users]
        if not patterns or any(pattern is None for pattern in patterns):
            continue
        constant = frozenset().union(*(pattern for pattern in patterns if pattern is not None))
        size = shape(nodes[0]) or ()
        keep = tuple(axis for axis in range(len(size)) if axis not in constant)
        count = 1
        for axis in keep:
            count *= size[axis]
        term = Term(name, 1, keep=keep[0] if len(keep) == 1 else keep or None)
        terms.setdefault(module_of(name), []).append((term, count))
    notes = (
        [] if graph.has_loss else ["no loss was given: the translation symmetry of the last layer was not looked for"]
    )
    return [_joined_family(owner, members) for owner, members in terms.items()], notes


def _joined_family(owner: str, members: Sequence[tuple[Term, int]]) -> Symmetry:
    """[W | b] of one layer as one family: the laws of the weight, then those of the bias."""
    if len(members) == 1:
        return Symmetry("translation", f"translation:{owner}", (members[0][0],), members[0][1])
    placed, start = [], 0
    for term, count in members:
        placed.append(Term(term.parameter, 1, keep=term.keep, laws=tuple(range(start, start + count))))
        start += count
    return Symmetry("translation", f"translation:{owner}", tuple(placed), start)
