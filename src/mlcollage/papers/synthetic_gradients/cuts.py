"""Where a network is cut: tensors inside what a module returns, paths that go around a cut, in any model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure.layer_tap import hookable
from mlcollage.nn.init import seeded
from mlcollage.train.loop import evaluating


@dataclass(frozen=True)
class Place:
    """A cut as it was found on the example: the module's path, and the shape of what it returns."""

    name: str
    example: Tensor
    gradient: bool

    @property
    def key(self) -> str:
        """The path as a key of an ``nn.ModuleDict``, which takes no dots."""
        return self.name.replace(".", "/")


def call(model: nn.Module, x: Any) -> Any:
    """The model on a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def open_output(output: Any, where: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The one tensor that carries gradient in what a module returned, and how to put another in its place.

    Integer tensors, None and numbers pass through unchanged.
    """
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            raise InvalidInput(f"the cut {where!r} returns {output.dtype}, which carries no gradient; cut elsewhere.")
        return output, lambda t: t
    parts: dict[Any, Any]
    if isinstance(output, Mapping):
        parts = dict(output)
    elif isinstance(output, list | tuple):
        parts = dict(enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        parts = {f.name: getattr(output, f.name) for f in fields(output)}
    else:
        raise InvalidInput(
            f"the cut {where!r} returns {type(output).__name__}; a tensor, or a tuple or dict, is needed."
        )
    floating = [k for k, v in parts.items() if isinstance(v, Tensor) and v.is_floating_point()]
    carrying = [k for k in floating if parts[k].requires_grad] or floating
    if len(carrying) != 1:
        raise InvalidInput(
            f"the cut {where!r} returns {len(carrying)} tensors that carry gradient ({carrying}); cut at a module that "
            "returns one."
        )
    key = carrying[0]

    def put(t: Tensor) -> Any:
        if isinstance(output, Mapping):
            try:
                return type(output)({**parts, key: t})  # type: ignore[call-arg]
            except TypeError:
                return {**parts, key: t}
        if isinstance(output, list | tuple):
            items = [t if i == key else v for i, v in enumerate(output)]
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        return replace(output, **{key: t})

    return parts[key], put


def find_places(model: nn.Module, cuts: Sequence[str], example: Any) -> list[Place]:
    """The cuts in the order in which they run on an example, with what they return.

    Raises
    ------
    UnknownName
        For a path that no module has.
    InvalidInput
        For a compiled model, a module that runs twice or not at all, and cuts inside each other.
    """
    if hookable(model, "decouple") is not model:
        raise InvalidInput(
            f"{type(model).__name__} averages gradients in one backward pass through the whole network, and a network "
            "that is cut has one for each part: give the network inside it (model.module), and train on one device."
        )
    modules = dict(model.named_modules())
    if not cuts or len(set(cuts)) != len(cuts):
        raise InvalidInput(f"cuts must name at least one module, and none twice; got {list(cuts)}.")
    for cut in cuts:
        if cut not in modules or not cut:
            some = ", ".join([n for n in modules if n][:12])
            raise UnknownName(f"the model has no module {cut!r} to cut behind; it has {some or 'none'}.")
        for other in cuts:
            if other != cut and cut.startswith(other + "."):
                raise InvalidInput(f"the cut {cut!r} lies inside the cut {other!r}; name one of them.")
    found: list[Place] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if any(p.name == name for p in found):
                raise InvalidInput(
                    f"the module {name!r} runs more than once in a forward pass, so a cut behind it is none: cut at "
                    "one that runs once."
                )
            tensor, _ = open_output(output, name)
            found.append(Place(name, tensor.detach(), tensor.requires_grad))

        return hook

    handles = [modules[cut].register_forward_hook(note(cut)) for cut in cuts]
    try:
        with evaluating(model), seeded(0):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [cut for cut in cuts if cut not in {p.name for p in found}]:
        raise InvalidInput(f"the module {missing[0]!r} did not run on the example, so nothing can be cut behind it.")
    return found


def refuse_paths_around(loss: Tensor, below: Sequence[tuple[str, Tensor]], outputs: Mapping[Any, str]) -> None:
    """Refuse gradient that reaches a lower part on another way than through its cut; name the tensor it goes by.

    Parameters
    ----------
    loss
        The loss, of a forward pass in which each cut started a graph of its own.
    below
        Names of the cuts, and the tensors that arrived there.
    outputs
        Names of modules by the graph nodes of what they returned.
    """
    above = _nodes(loss)
    for name, tensor in reversed(below):
        nodes = _nodes(tensor)
        shared = [node for node in above if node in nodes and not _is_leaf(node)]
        if shared:
            known = next((outputs[node] for node in shared if node in outputs), None)
            what = f"the output of {known!r}" if known else f"a tensor made by {shared[0].name()}"
            raise InvalidInput(
                f"{what} reaches the loss around the cut {name!r} (a skip connection, or a loss inside), so the parts "
                "are coupled: cut where everything goes through one module, or say allow_paths=True to let it carry "
                "its true gradient besides."
            )
        above |= nodes


def refuse_reentrant(parts: Sequence[Tensor]) -> None:
    """Refuse reentrant checkpointing in parts whose input shall have no gradient: they would not be trained."""
    for part in parts:
        if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(part)):
            raise InvalidInput(
                "reentrant checkpointing trains a part only if its input has a gradient, which train_every spares: say "
                "use_reentrant=False to torch.utils.checkpoint, or train_every=1."
            )


def _nodes(tensor: Tensor) -> dict[Any, None]:
    """All nodes of a tensor's graph, nearest first."""
    seen: dict[Any, None] = {}
    stack = [] if tensor.grad_fn is None else [tensor.grad_fn]
    while stack:
        nearer = []
        for node in stack:
            if node not in seen:
                seen[node] = None
                nearer += [n for n, _ in node.next_functions if n is not None]
        stack = nearer
    return seen


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")  # a parameter: sharing it is no path of activations


def name_outputs(model: nn.Module, names: dict[Any, str]) -> list[Any]:
    """Hooks that fill ``names`` with module paths by graph node; the caller removes them."""

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                names.setdefault(output.grad_fn, name)

        return hook

    return [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n]


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, where checkpointing runs modules again."""
    return torch._C._current_graph_task_id() != -1


def warn_once(done: set[str], key: str, message: str) -> None:
    """A warning that comes once for each object."""
    if key not in done:
        done.add(key)
        warnings.warn(message, stacklevel=3)
