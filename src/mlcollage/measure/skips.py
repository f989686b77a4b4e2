r"""Skip connections of any model: how much they carry, and what the network is without one.

A residual sum is :math:`z' = z + f(z)`. Its ratio is :math:`\lVert z \rVert / \lVert f(z) \rVert`, for each token, or
each place of a feature map, over its units (Raghu et al. 2021, section 5). The sums are found in the functions that a
forward pass calls: two tensors of one shape are added, and one of them was made of the other by layers with weights.

* The branch is what is added: with its scale (LayerScale) and, where it is normalized after the layer, the norm.
* Where the shape changes, the skip is the projection: the way with fewer layers.
* Two branches on one input (parallel blocks) give two ratios to that input.
* In-place sums are measured before they overwrite anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure._module_stack import ModuleStack, in_backward
from mlcollage.measure.layer_tap import hookable
from mlcollage.measure.units import UnitAxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ResidualSum", "SkipRatios", "remove_skip", "residual_sums", "skip_ratio"]

Floats = npt.NDArray[np.float64]
Kind = Literal["identity", "projection", "parallel"]


@dataclass(frozen=True)
class ResidualSum:
    """One residual sum of a model.

    Parameters
    ----------
    name
        Path of the module that adds, with ``#1`` and so on for its later sums.
    module
        That path alone.
    number
        Which of the sums of two tensors of one shape in a call of the module it is, from 0.
    branch
        Which of the two tensors is f(z), 0 or 1.
    kind
        ``"identity"``, ``"projection"``, or ``"parallel"`` for a further branch on the input of the sum before.
    shape
        Of the sum.
    """

    name: str
    module: str
    number: int
    branch: int
    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SkipRatios:
    """Norms of skips over norms of branches; made by :func:`skip_ratio`.

    Parameters
    ----------
    sums
        The residual sums, in the order in which they ran.
    ratios
        By name, (examples, *places): infinite where the branch is zero, NaN where both are.
    per_example
        Names of sums whose unit axis is not known, so that there is one ratio for all units and places of an example.
    ambiguous
        Names of modules with sums of which neither way could be told to be the skip; they are left out.
    """

    sums: tuple[ResidualSum, ...]
    ratios: Mapping[str, Floats]
    per_example: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sums."""
        return tuple(s.name for s in self.sums)

    def per_place(self, name: str) -> Floats:
        """Medians over examples, (*places,): for tokens one number each, the class token's first."""
        if name not in self.ratios:
            raise UnknownName(f"there is no residual sum {name!r}; there are {', '.join(self.names)}.")
        found: Floats = np.median(self.ratios[name], axis=0)
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One line per sum: ``name``, ``kind``, ``median``, ``mean`` (of finite ones), ``infinite`` (their number)."""
        lines = []
        for s in self.sums:
            r = self.ratios[s.name]
            finite = r[np.isfinite(r)]
            mean = float(finite.mean()) if finite.size else float("nan")
            median = float(np.median(r[~np.isnan(r)])) if (~np.isnan(r)).any() else float("nan")
            lines.append((s.name, s.kind, median, mean, int(np.isinf(r).sum())))
        return pd.DataFrame(lines, columns=["name", "kind", "median", "mean", "infinite"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the median ratio of each sum in the order of execution."""
        from matplotlib.figure import Figure  # not pyplot, which would keep the figure

        ax = Figure(layout="constrained").subplots() if ax is None else ax
        table = self.to_dataframe()
        ax.plot(np.arange(1, len(table) + 1), table["median"], "o-", markersize=4)
        ax.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
        ax.set_xlabel("residual sum, in the order of execution")
        ax.set_ylabel("norm of the skip over norm of the branch")
        return ax


def skip_ratio(model: nn.Module, data: Any, *, batch_size: int = 256) -> SkipRatios:
    """Ratios of all residual sums of a model.

    Parameters
    ----------
    model
        Any module; run in evaluation mode, which is put back.
    data
        (n, ...) inputs, or a tuple of arguments or dict of named ones, each with n examples.
    batch_size
        Examples at a time.

    Returns
    -------
    SkipRatios

    Raises
    ------
    InvalidInput
        If the model has no residual sum that can be seen.

    Examples
    --------
    >>> from mlcollage.nn import ViT
    >>> found = skip_ratio(ViT((1, 28, 28), 10, patch_size=7, dim=32, depth=2), torch.rand(8, 1, 28, 28))
    >>> found.names, found.ratios["block1"].shape
    (('block1', 'block1#1', 'block2', 'block2#1'), (8, 17))
    """
    checks.integer("batch_size", batch_size, least=1)
    parts: dict[str, list[Floats]] = {}
    sums: dict[str, ResidualSum] = {}
    coarse: set[str] = set()
    watch = _Residuals(hookable(model, "skip_ratio"))
    for args, kwargs in _batches(data, batch_size):
        watch.run(args, kwargs)
        for found, ratio, whole in watch.found:
            sums.setdefault(found.name, found)
            parts.setdefault(found.name, []).append(ratio.cpu().double().numpy())
            coarse |= {found.name} if whole else set()
    if not sums:
        raise InvalidInput(
            f"no sum of an input and of what layers made of it was seen in {type(model).__name__}: it has no skip "
            "connections, or adds them in compiled code."
        )
    return SkipRatios(
        tuple(sums.values()),
        {name: np.concatenate(p) for name, p in parts.items()},
        tuple(name for name in sums if name in coarse),
        tuple(dict.fromkeys(watch.ambiguous)),
    )


def residual_sums(model: nn.Module, x: Any) -> tuple[ResidualSum, ...]:
    """The residual sums of a model, from one forward pass.

    Parameters
    ----------
    model
        Any module.
    x
        A batch of inputs: a tensor, a tuple of arguments or a dict of named ones.

    Examples
    --------
    >>> from mlcollage.nn import ResNet
    >>> [(s.name, s.kind) for s in residual_sums(ResNet((1, 8, 8), 3, width=4), torch.rand(2, 1, 8, 8))]
    [('block1', 'identity'), ('block2', 'projection'), ('block3', 'projection')]
    """
    watch = _Residuals(hookable(model, "residual_sums"))
    watch.run(*_arguments(x))
    return tuple(found for found, _, _ in watch.found)


@contextmanager
def remove_skip(model: nn.Module, block: str | Iterable[str], example: Any) -> Iterator[tuple[ResidualSum, ...]]:
    r"""A context in which residual sums of a block give the branch alone: :math:`z' = f(z)`.

    Works in training too, and leaves nothing behind. With the paper, train a fresh network inside of it to see what
    the skip is for (section 5).

    Parameters
    ----------
    model
        Any module.
    block
        Path of a block, all of whose sums lose their skip, or the name of a single sum; or several.
    example
        A small batch of inputs, from which the sums are found.

    Yields
    ------
    tuple of ResidualSum
        Those that were changed.

    Raises
    ------
    UnknownName
        If there is no residual sum in a block of this name.

    Examples
    --------
    >>> from mlcollage.nn import ViT
    >>> model, x = ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=2).eval(), torch.rand(2, 1, 8, 8)
    >>> before = model(x)
    >>> with remove_skip(model, "block2", x) as changed:
    ...     without = model(x)
    >>> [s.name for s in changed], torch.equal(before, model(x)), torch.allclose(before, without)
    (['block2', 'block2#1'], True, False)
    """
    known = [s for s in residual_sums(model, example) if s.kind != "parallel"]
    wanted = [block] if isinstance(block, str) else list(block)
    chosen: list[ResidualSum] = []
    for name in wanted:
        found = [s for s in known if name in (s.name, s.module) or s.module.startswith(f"{name}.")]
        if "#" in name:
            found = [s for s in known if s.name == name]
        if not found:
            raise UnknownName(
                f"there is no residual sum in {name!r}; there are {', '.join(s.name for s in known) or 'none'}."
            )
        chosen += found
    with _Without(hookable(model, "remove_skip"), chosen):
        yield tuple(chosen)


class _Without(TorchFunctionMode):
    """Gives the branch in place of chosen sums."""

    def __init__(self, model: nn.Module, chosen: Iterable[ResidualSum]) -> None:
        super().__init__()
        self._stack = ModuleStack(model)
        self._chosen = {(s.module, s.number): s.branch for s in chosen}

    def __enter__(self) -> _Without:
        self._stack.open()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ADDS and self._stack.inside and (pair := _added(args, kwargs)) is not None:
            branch = self._chosen.get((self._stack.inside[-1], _count(self._stack)))
            if branch is not None:
                return pair[branch] * pair[2] if branch == 1 and pair[2] != 1 else pair[branch]
        return func(*args, **kwargs)


@dataclass
class _Node:
    """A function that was called: numbers of the nodes that it read, and whether it has weights."""

    parents: tuple[int, ...]
    learned: bool
    func: Any
    skip: int | None = None  # of a residual sum, the node of its skip
    norms: Tensor | None = None  # of that skip


@dataclass
class _Found:
    skip: int
    branch: int  # operand
    kind: Kind
    norms: Tensor | None = None


class _Residuals(UnitAxes):
    """Follows what is made of the inputs, and measures sums of a tensor and of what layers made of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ambiguous: list[str] = []
        self._stack = ModuleStack(model)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One forward pass in evaluation mode; :attr:`found` then has (sum, ratios, whether they are of examples)."""
        self.found: list[tuple[ResidualSum, Tensor, bool]] = []
        self._nodes: list[_Node] = []
        self._of = WeakTensorKeyDictionary()
        self._calls: dict[str, int] = {}
        modes = [(m, m.training) for m in self.model.modules()]
        self._stack.open()
        try:
            self.model.eval()
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._add(value, _Node((), False, None))
            with torch.no_grad(), self:
                self.model(*args, **kwargs)
        finally:
            self._stack.close()
            for module, mode in modes:
                module.training = mode

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        parents = tuple(self._of[t] for t in given if t in self._of)
        sum_of = self._look(func, args, kwargs) if parents else None
        versions = [(t, None if t.is_inference() else t._version) for t in given]
        out = super().__torch_function__(func, types, args, kwargs)
        if not parents or func in _QUIET:
            return out
        learned = func in _LEARNED or any(isinstance(t, nn.Parameter) for t in given)
        for made in pytree.tree_leaves(out):
            if not isinstance(made, Tensor):
                continue
            same = [version for t, version in versions if t is made]
            if same and same[0] is not None and same[0] == made._version:
                continue  # dropout in evaluation gives its input
            node = _Node(parents, learned, func)
            if sum_of is not None:
                node.skip, node.norms = sum_of.skip, sum_of.norms
            self._add(made, node)
        return out

    def _add(self, t: Tensor, node: _Node) -> None:
        self._of[t] = len(self._nodes)
        self._nodes.append(node)

    def _look(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Found | None:
        """Measure a sum, before it may overwrite what it adds."""
        pair = _added(args, kwargs) if func in _ADDS and self._stack.inside else None
        if pair is None or in_backward():
            return None
        number, module = _count(self._stack), self._stack.inside[-1]
        a, b = (self._of.get(t) for t in pair[:2])
        # A bias or a position embedding is not made of the inputs.
        if a is None or b is None or a == b or not pair[0].is_floating_point() or pair[0].ndim < 2:
            return None
        found = self._judge(a, b, module)
        if found is None:
            return None
        skip, branch = (pair[1], pair[0]) if found.branch == 0 else (pair[0], pair[1])
        axis = next((k for k in (self.of(branch), self.of(skip)) if k), None)
        axis = 1 if axis is None and branch.ndim == 2 else axis
        scale = abs(pair[2]) if found.branch == 1 else 1.0
        if found.norms is None:
            found.norms = _norms(skip, axis) * (1.0 if found.branch == 1 else abs(pair[2]))
        ratio = found.norms / (_norms(branch, axis) * scale)
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        name = f"{module}#{call}" if call else module
        shape = tuple(branch.shape)
        self.found.append((ResidualSum(name, module, number, found.branch, found.kind, shape), ratio, axis is None))
        return found

    def _judge(self, a: int, b: int, module: str) -> _Found | None:
        for skip, branch, operand in ((a, b, 1), (b, a, 0)):
            if self._made_by_layers(skip, branch):
                return _Found(skip, operand, "identity")
        for summed, branch, operand in ((a, b, 1), (b, a, 0)):  # x + f(x) + g(x)
            before = self._nodes[summed]
            if before.skip is not None and self._made_by_layers(before.skip, branch):
                return _Found(before.skip, operand, "parallel", before.norms)
        ways = self._ways(a, b)
        if ways is None:
            return None
        layers = [sum(self._nodes[n].learned for n in way) for way in ways]
        if max(layers) == 0:
            return None
        simple = [all(self._nodes[n].func in _SHORT for n in way) for way in ways]
        if layers[0] == layers[1] or not simple[layers[0] > layers[1]]:
            if all(simple) or layers[0] == layers[1]:
                self.ambiguous.append(module)
            return None
        operand = int(layers[1] > layers[0])  # the longer way is the branch
        return _Found((a, b)[1 - operand], operand, "projection")

    def _before(self, node: int, last: int) -> list[int]:
        """What a node was made of, itself included, back to the number ``last``, in order."""
        seen, queue = {node}, [node]
        while queue:
            for parent in self._nodes[queue.pop()].parents:
                if parent >= last and parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        return sorted(seen)

    def _between(self, first: int, node: int) -> list[int]:
        """Nodes through which ``node`` was made of ``first``; empty if it was not."""
        made = {first}
        for n in self._before(node, first):
            if any(parent in made for parent in self._nodes[n].parents):
                made.add(n)
        return sorted(made - {first}) if node in made and node != first else []

    def _made_by_layers(self, first: int, node: int) -> bool:
        return first < node and any(self._nodes[n].learned for n in self._between(first, node))

    def _ways(self, a: int, b: int) -> tuple[list[int], list[int]] | None:
        """The two ways from the last node that both were made of."""
        common = set(self._before(a, 0)) & set(self._before(b, 0))
        if not common:
            return None
        return self._between(max(common), a), self._between(max(common), b)


def _norms(x: Tensor, axis: int | None) -> Tensor:
    """Over the units, (examples, *places), or over all of each example."""
    x = x.detach().double() if x.device.type != "mps" else x.detach().float()
    return x.flatten(1).norm(dim=1) if axis is None else x.norm(dim=axis)


def _added(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, float] | None:
    """The two tensors of one shape that are added, and the factor of the second."""
    a = args[0] if args else kwargs.get("input")
    b = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return a, b, float(kwargs.get("alpha", 1))
    return None


def _count(stack: ModuleStack) -> int:
    """The number of this sum in the call of the module that runs."""
    number = stack.counts[-1]["sums"]
    stack.counts[-1]["sums"] += 1
    return number


def _arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def _batches(data: Any, size: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    args, kwargs = _arguments(data)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not tensors or not len(tensors[0]):
        raise InvalidInput("the data must be tensors with at least one example, (n, ...).")
    n = len(tensors[0])

    def cut(v: Any, start: int) -> Any:
        return v[start : start + size] if isinstance(v, Tensor) and len(v) == n else v

    for start in range(0, n, size):
        yield tuple(cut(v, start) for v in args), {k: cut(v, start) for k, v in kwargs.items()}


def _named(names: str, *homes: Any) -> set[Any]:
    return {getattr(home, name) for home in homes for name in names.split() if hasattr(home, name)}


_ADDS = _named("add add_ __add__ __radd__ __iadd__", torch, Tensor) | {operator.add, operator.iadd}
_LEARNED = _named("linear conv1d conv2d conv3d embedding bilinear", F, torch) | {F.multi_head_attention_forward}
# The ways that shortcuts take.
_SHORT = _named(
    "linear conv1d conv2d conv3d batch_norm group_norm layer_norm instance_norm rms_norm avg_pool1d avg_pool2d "
    "max_pool2d adaptive_avg_pool2d pad dropout __getitem__ cat permute transpose reshape view flatten contiguous "
    "interpolate",
    F,
    torch,
    Tensor,
)
_QUIET = _named("size dim numel is_floating_point __len__", Tensor)
