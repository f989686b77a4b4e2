"""Comparing the layers of any two networks on the same examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, Subset

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.data import DataBatch, batches_of
from mlcollage.data.batches import in_type_of
from mlcollage.errors import InvalidInput
from mlcollage.measure import LayerTap, MinibatchCKA
from mlcollage.measure.cka import Estimator, Kernel
from mlcollage.measure.layer_tap import Layers, hookable
from mlcollage.train import evaluating

from .comparison import ComparisonHealth, LayerComparison

Transform = Callable[[Any], Any]
ALL = "?*"  # every module but the model itself
_PROBE = 8  # examples of the passes in which axes are found


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Any,
    *,
    layers_a: Layers = ALL,
    layers_b: Layers = ALL,
    transform_a: Transform | None = None,
    transform_b: Transform | None = None,
    batch_size: int = 256,
    max_examples: int | None = None,
    kernel: Kernel = "linear",
    estimator: Estimator = "unbiased",
    permutations: int = 0,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> LayerComparison:
    r"""CKA of all pairs of layers of two networks, and of each with itself, in one pass over the data.

    Both networks see the same batch, and features are dropped as soon as their kernel is made.

    Parameters
    ----------
    model_a, model_b
        Any modules: of this package, of Hugging Face, your own. They run in evaluation mode, which is put back; the
        same module twice is a check (the maps must agree).
    data
        Inputs, (inputs, labels), a dict of named inputs, or a data set, which are put in one random order by ``seed``;
        or a loader, which is read once, as it is.
    layers_a, layers_b
        As for :class:`~mlcollage.measure.LayerTap`. By default all modules; one that hands on what a part of it made is
        counted once.
    transform_a, transform_b
        What each network wants done with the inputs of a batch (its own mean, deviation and size), if they differ.
    batch_size
        Examples at a time, at least 4.
    max_examples
        At most so many.
    kernel, estimator, permutations
        As for :class:`~mlcollage.measure.MinibatchCKA`.
    seed
        Of the order and of the permutations.
    labels
        What the two are called in pictures; by default their classes.

    Returns
    -------
    LayerComparison

    Raises
    ------
    InvalidInput
        If a network gives other features for the same inputs (masking or dropout that is always on), all layers are
        skipped, no batch has four examples, or values are not finite.

    Warns
    -----
    UserWarning
        For examples that were dropped or repeated, batches with far fewer classes than the data, layers that do not
        vary.

    Notes
    -----
    Which axis of a layer's output holds the examples is found by running eight examples and then seven. Rows that hold
    several for each example, as the windows of a Swin transformer do, are folded if they belong to the examples in
    order; CKA does not see in which order features stand. What follows no example is skipped, and
    ``LayerComparison.health.skipped`` says why.

    Examples
    --------
    >>> from mlcollage.nn import ResNet, ViT
    >>> vit, cnn = ViT((1, 8, 8), 3, patch_size=4, dim=16, depth=2), ResNet((1, 8, 8), 3, width=4)
    >>> found = compare(vit, cnn, torch.rand(64, 1, 8, 8), batch_size=16)
    >>> found.cross.matrix.shape == (len(found.a.names_a), len(found.b.names_a)), found.health.batches
    (True, 4)
    """
    checks.integer("batch_size", batch_size, least=4)
    if max_examples is not None:
        checks.integer("max_examples", max_examples, least=4)
    maps = MinibatchCKA(estimator=estimator, kernel=kernel, permutations=permutations, seed=seed)
    sides = [
        _Side("a", model_a, layers_a, transform_a, maps.consume),
        _Side("b", model_b, layers_b, transform_b, maps.consume_other),
    ]
    reader = _Reader(data, batch_size, max_examples, seed)
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(evaluating(side.model))
        stack.enter_context(torch.no_grad())
        for batch in reader:
            for side in sides:
                side.look(batch)
            for side in sides:
                side.run(batch)
            maps.end_batch()
    if not reader.used:
        raise InvalidInput(
            f"no batch had the four examples that {estimator} HSIC needs; the data had {reader.dropped} and "
            f"{reader.repeated} copies of them."
        )
    reader.complain()
    result = maps.compute()
    names = tuple(labels) if labels is not None else (type(model_a).__name__, type(model_b).__name__)
    if len(names) != 2:
        raise InvalidInput(f"labels must be two names, not {names}.")
    shares = sorted(((s, n) for n, s in result.largest_share.items()), reverse=True)
    health = ComparisonHealth(
        examples=reader.used,
        batches=len(result.sizes),
        dropped=reader.dropped,
        repeated=reader.repeated,
        classes_per_batch=reader.classes,
        batch_axis={k: v for side in sides for k, v in side.elsewhere.items()},
        windows={k: v for side in sides for k, v in side.windows.items()},
        skipped={**{k: v for side in sides for k, v in side.skipped.items()}, **result.skipped},
        constant=result.constant,
        negative=int((result.matrix < 0).sum()),
        largest_share=shares[0] if shares else (0.0, ""),
        precision=tuple(sorted({d for side in sides for d in side.dtypes})),
    )
    return LayerComparison(result, health, *names)


class _Side:
    """One of the two networks: which layers are read, and on which axis each has the examples."""

    def __init__(
        self, key: str, model: nn.Module, layers: Layers, transform: Transform | None, consume: Callable[..., None]
    ) -> None:
        self.key, self.model, self.layers = key, hookable(model, "compare"), layers
        self._transform, self._consume = transform, consume
        self._axes: dict[str, tuple[int, int]] | None = None  # axis of the examples, and rows of each
        self.elsewhere: dict[str, int] = {}
        self.windows: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self.dtypes: set[str] = set()
        tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
        self._device = None if tensor is None else tensor.device

    def call(self, batch: DataBatch) -> Any:
        """Run the network on a batch, as it wants it."""
        args, kwargs = batch.args, batch.kwargs
        if self._transform is not None:
            if kwargs or len(args) != 1:
                raise InvalidInput("a transform takes one tensor; named inputs must be made for each model beforehand.")
            args = (self._transform(args[0]),)
        args, kwargs = pytree.tree_map(self._place, (tuple(args), kwargs))
        return self.model(*args, **kwargs)

    def _place(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = in_type_of(self.model, value)
        return value if self._device is None else value.to(self._device)

    def look(self, batch: DataBatch) -> None:
        """Find the axes, once, by running some examples and one fewer."""
        if self._axes is not None:
            return
        size = min(_size(batch), _PROBE)
        more, aliases = self._probe(_rows(batch, torch.arange(size)))
        fewer, _ = self._probe(_rows(batch, torch.arange(size - 1)))
        again, _ = self._probe(_rows(batch, torch.arange(size)))
        self._axes = {}
        for name, value in more.items():
            if name in aliases:
                continue
            found = _axis_of(value, fewer.get(name), size)
            if isinstance(found, str):
                self.skipped[f"{self.key}:{name}"] = found
                continue
            if value.is_floating_point() and not _near(value, again[name]):
                raise InvalidInput(
                    f"layer {name!r} of network {self.key} gives other features for the same inputs in evaluation mode "
                    "(masking, patch dropout, dropout that is always on): switch its randomness off."
                )
            axis, rows = found
            self._axes[name] = found
            self.dtypes.add(str(value.dtype).removeprefix("torch."))
            if axis:
                self.elsewhere[f"{self.key}:{name}"] = axis
            if rows > 1:
                self.windows[f"{self.key}:{name}"] = rows
        if not self._axes:
            reasons = "; ".join(f"{k} {v}" for k, v in list(self.skipped.items())[:3])
            raise InvalidInput(f"no layer of network {self.key} has an output for each example: {reasons}.")

    def _probe(self, batch: DataBatch) -> tuple[dict[str, Tensor], set[str]]:
        found: dict[str, Tensor] = {}
        aliases: set[str] = set()
        last: list[tuple[Tensor, int | None]] = []

        def keep(name: str, value: Tensor) -> None:
            version = None if value.is_inference() else value._version
            same = bool(last) and _same(last[0][0], value) and last[0][1] == version
            if same:
                aliases.add(name)
            last[:] = [(value, version)]
            found[name] = value.clone() if not value.is_nested else value

        with LayerTap(self.model, self.layers, consume=keep):
            self.call(batch)
        return found, aliases

    def run(self, batch: DataBatch) -> None:
        """Give the kernels of all layers what they need of a batch."""
        n = _size(batch)
        axes = self._axes or {}

        def take(name: str, value: Tensor) -> None:
            if name not in axes:
                return
            axis, rows = axes[name]
            if value.shape[axis] != n * rows:
                raise InvalidInput(
                    f"layer {name!r} of network {self.key} gave {tuple(value.shape)} for {n} examples, and {rows} rows "
                    f"for each on axis {axis} at first: give inputs of one size."
                )
            value = value.movedim(axis, 0)
            self._consume(name, value.unflatten(0, (n, rows)) if rows > 1 else value)

        with LayerTap(self.model, self.layers, consume=take):
            self.call(batch)


class _Reader:
    """Batches of at least four different examples, and what was left out of them."""

    def __init__(self, data: Any, size: int, most: int | None, seed: int) -> None:
        self._data, self._size, self._most = _shuffled(data, seed), size, most
        self.used = self.dropped = self.repeated = 0
        self._classes: list[int] = []
        self._sizes: list[int] = []
        self._seen: set[int] = set()

    def __iter__(self) -> Iterator[DataBatch]:
        for read in batches_of(self._data, batch_size=self._size, targets=False):
            n = _size(read)
            if self._most is not None and self.used + n > self._most:
                n = self._most - self.used
            keep = _different(read, n)
            self.repeated += n - len(keep)
            if len(keep) < 4:
                self.dropped += len(keep)
            else:
                self.used += len(keep)
                self._count(read, keep)
                yield read if len(keep) == _size(read) else _rows(read, keep)
            if self._most is not None and self.used + 4 > self._most:
                return

    @property
    def classes(self) -> tuple[float, int]:
        """Mean number of classes in a batch, and of all."""
        return (float(np.mean(self._classes)) if self._classes else float("nan"), len(self._seen))

    def complain(self) -> None:
        """Warn of what was left out, and of batches that are sorted by class."""
        if self.dropped:
            warnings.warn(
                f"{self.dropped} examples were dropped, in batches of fewer than four.", UserWarning, stacklevel=3
            )
        if self.repeated:
            warnings.warn(
                f"{self.repeated} examples are equal to another of their batch and were left out: copies make HSIC "
                "biased.",
                UserWarning,
                stacklevel=3,
            )
        per_batch, total = self.classes
        if len(self._classes) > 1:
            expected = np.mean([total * (1 - (1 - 1 / total) ** n) for n in self._sizes])
            if per_batch < 0.5 * expected:
                warnings.warn(
                    f"batches hold {per_batch:.1f} of {total} classes on average, so the data are sorted by class and "
                    "the maps speak of differences within classes: shuffle the loader.",
                    UserWarning,
                    stacklevel=3,
                )

    def _count(self, read: DataBatch, keep: Tensor) -> None:
        y = read.y
        if isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point() and len(y) == _size(read):
            present = set(y.cpu()[keep].tolist())
            self._seen |= present
            self._classes.append(len(present))
            self._sizes.append(len(keep))


def _shuffled(data: Any, seed: int) -> Any:
    """Whole data in one random order; loaders and other iterables as they are."""
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        return Subset(data, torch.randperm(len(data), generator=generator(seed)).tolist())
    whole = isinstance(data, Tensor) or (
        isinstance(data, tuple | list | dict)
        and bool(data)
        and all(isinstance(v, Tensor | np.ndarray) for v in (data.values() if isinstance(data, dict) else data))
        and len({len(v) for v in (data.values() if isinstance(data, dict) else data)}) == 1
        and not isinstance(data, list)
    )
    if isinstance(data, np.ndarray):
        data, whole = torch.from_numpy(data), True
    if not whole:
        return data
    parts = pytree.tree_map(lambda v: torch.as_tensor(v), data)
    first = next(iter(pytree.tree_leaves(parts)))
    order = torch.randperm(len(first), generator=generator(seed))
    return pytree.tree_map(lambda v: v[order], parts)


def _size(batch: DataBatch) -> int:
    for value in (*batch.args, *batch.kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise InvalidInput("a batch has no tensor with examples along its first axis.")


def _rows(batch: DataBatch, keep: Tensor) -> DataBatch:
    n = _size(batch)

    def cut(v: Any) -> Any:
        return v[keep.to(v.device)] if isinstance(v, Tensor) and v.ndim and len(v) == n else v

    args, kwargs, y = pytree.tree_map(cut, (batch.args, batch.kwargs, batch.y))
    return DataBatch(tuple(args), kwargs, y)


def _different(batch: DataBatch, n: int) -> Tensor:
    """The first of each of the equal examples among the first n."""
    parts = [v[:n].detach().cpu().flatten(1) for v in (*batch.args, *batch.kwargs.values()) if _holds(v, n)]
    seen: dict[bytes, int] = {}
    for i in range(n):
        seen.setdefault(b"".join(np.ascontiguousarray(_plain(p[i])).tobytes() for p in parts), i)
    return torch.tensor(sorted(seen.values()) if parts else range(n), dtype=torch.long)


def _holds(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) >= n


def _plain(row: Tensor) -> np.ndarray[Any, Any]:
    return row.float().numpy() if row.dtype == torch.bfloat16 else row.numpy()


def _axis_of(more: Tensor, fewer: Tensor | None, size: int) -> tuple[int, int] | str:
    """The axis that has k rows for each example, and k; or why there is none."""
    if more.is_nested:
        return "is a nested tensor, whose examples have different lengths"
    if fewer is None or more.ndim != fewer.ndim:
        return "is not called for every number of examples"
    changed = [k for k in range(more.ndim) if more.shape[k] != fewer.shape[k]]
    if len(changed) != 1:
        return f"gives {tuple(more.shape)} for {size} examples, where no axis counts them"
    axis = changed[0]
    rows, rest = divmod(more.shape[axis], size)
    if rest or fewer.shape[axis] != rows * (size - 1):
        return f"gives {tuple(more.shape)} for {size} examples, where no axis counts them"
    # The rows of the first examples must be what they are without the last one.
    if rows > 1 and not _near(more.narrow(axis, 0, fewer.shape[axis]), fewer):
        return f"gives {rows} rows for each example, whose order is not that of the examples"
    return axis, rows


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    scale = float(a.abs().nan_to_num(posinf=0).max()) if a.numel() else 0.0
    loose = 1e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return torch.allclose(a, b, rtol=loose, atol=loose * scale, equal_nan=True)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_nested or b.is_nested:
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
