"""Batches as data loaders give them: inputs, targets and which positions count, read in one place for all."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mlcollage.errors import InvalidInput

Parts = Sequence[str] | Mapping[str, str] | Callable[[Any], Any] | None
TARGETS = ("labels", "label", "label_ids", "targets", "target", "y")
_EXAMPLE = "parts=('x', 'mask', 'y')"


@dataclass(frozen=True)
class DataBatch:
    """One batch, read.

    Parameters
    ----------
    args, kwargs
        What the model is called with.
    y
        Targets, or None.
    mask
        (N, T), (N, H, W) or (N,), true for positions (samples) that count; None: all do.
    implied
        Whether the mask is one only by the name of an input of the model.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    y: Any = None
    mask: Tensor | None = None
    implied: bool = False

    @property
    def x(self) -> Any:
        """The inputs as instruments take them: a tensor, a tuple of arguments or a dict of named ones."""
        if self.args and self.kwargs:
            raise InvalidInput("some inputs of the batch are named and some are not: name all of them, with parts=.")
        return self.kwargs or (self.args[0] if len(self.args) == 1 else self.args)

    def to(self, device: torch.device | str | None) -> DataBatch:
        """The batch on a device; None leaves it where it is."""
        if device is None:
            return self
        moved = {name: _moved(getattr(self, name), device) for name in ("args", "kwargs", "y", "mask")}
        return dataclasses.replace(self, **moved)

    def check(self, model: nn.Module) -> DataBatch:
        """The batch for this model, floating-point inputs in its type; named ones that it does not take are refused."""
        taken = inspect.signature(model.forward).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            for name in self.kwargs:
                if name not in taken:
                    raise InvalidInput(
                        f"the model does not take the batch's part {name!r} (it takes {', '.join(taken) or 'nothing'})"
                        f": say what it is with parts={{{name!r}: 'x'}}, 'y' or 'mask', or leave it out with '_'."
                    )
        self.check_mask(model)
        args = tuple(in_type_of(model, part) for part in self.args)
        return dataclasses.replace(self, args=args, kwargs={k: in_type_of(model, v) for k, v in self.kwargs.items()})

    def check_mask(self, model: nn.Module) -> DataBatch:
        """Refuse a mask of one of several sequences, where the batch does not say that it is the one that counts."""
        names = mask_inputs(model)
        if self.implied and len(names) > 1 and self.mask is not None and not bool((self.mask != 0).all()):
            raise InvalidInput(
                f"the model takes masks of several sequences ({', '.join(names)}), and whose positions are to be "
                f"counted cannot be told: say it with parts={{{names[0]!r}: '{names[0]}+mask'}}, or count all "
                f"positions with '{names[0]}+_'."
            )
        return self


def mask_inputs(model: nn.Module) -> list[str]:
    """Names of the model's inputs that are masks, each of a sequence of its own."""
    return [name for name in inspect.signature(model.forward).parameters if _is_mask(name)]


def _is_mask(name: str) -> bool:
    padding = name.endswith("key_padding_mask") and not name.startswith("memory")  # which is that of the source
    return padding or name in ("attention_mask", "decoder_attention_mask")


def read_batch(batch: Any, parts: Parts = None, *, targets: bool = True) -> DataBatch:
    """Inputs, targets and mask of one batch.

    A pair is (inputs, targets), where inputs may be a dict of named ones or a tuple of arguments. The parts of a dict
    (or of any mapping, such as a ``BatchEncoding``, of a dataclass or named tuple) go by their names: ``labels``,
    ``label``, ``targets``, ``target`` or ``y`` are targets; ``x`` is the input; ``mask`` says which positions count;
    ``attention_mask`` does so and is given to the model too, as are ``decoder_attention_mask`` and
    ``..._key_padding_mask`` (true where padding is); all others are named arguments of the model. More than two parts
    without names are refused, and so are masks of two sequences.

    Parameters
    ----------
    batch
        What a loader gives.
    parts
        Names of the parts of a tuple, in order, such as ``("x", "mask", "y")``; or, of parts with names, what some of
        them are, such as ``{"pixels": "x", "idx": "_"}``. ``"_"`` leaves a part out; ``"labels+y"`` uses one twice, as
        the model's argument ``labels`` and as targets; ``"attention_mask+_"`` is given to the model and no more. Or a
        function that makes of a batch what is read as above.
    targets
        Whether targets are needed.

    Raises
    ------
    InvalidInput
        For parts that nobody would use, missing inputs or targets, and things that are no batch.

    Examples
    --------
    >>> ids, mask, y = torch.ones(4, 7, dtype=torch.long), torch.ones(4, 7), torch.zeros(4)
    >>> read = read_batch((ids, mask, y), ("input_ids", "attention_mask", "y"))
    >>> list(read.kwargs), read.y.shape, read.mask.shape
    (['input_ids', 'attention_mask'], torch.Size([4]), torch.Size([4, 7]))
    """
    if callable(parts):
        batch, parts = parts(batch), None
    if isinstance(batch, DataBatch):
        return batch
    named = _named(batch)
    if named is not None:
        if isinstance(parts, Sequence):
            names = ", ".join(named)
            raise InvalidInput(f"the batch's parts have names ({names}): say what they are with parts={{name: 'x'}}.")
        return _by_use(named, {**{name: name for name in named}, **(parts or {})}, targets)
    items = list(batch) if isinstance(batch, list | tuple) else [batch]
    if parts is not None:
        if isinstance(parts, str | Mapping) or len(parts) != len(items):
            raise InvalidInput(
                f"parts must name the {len(items)} parts of the batch, such as {_EXAMPLE}, not {parts!r}."
            )
        return _by_use(dict(enumerate(items)), dict(enumerate(parts)), targets)
    if len(items) > 2:
        raise InvalidInput(
            f"a batch has {len(items)} parts, of which only inputs and targets would be used: name them, such as "
            f"{_EXAMPLE}, with '_' for what is to be left out."
        )
    if not items or not isinstance(items[0], Tensor | Mapping | tuple | list):
        what = type(batch).__name__ + (f" of {type(items[0]).__name__}" if items and items[0] is not batch else "")
        raise InvalidInput(f"a batch must be inputs, a pair (inputs, targets) or a dict of named parts, not {what}.")
    x, y = items[0], items[1] if len(items) == 2 else None
    if isinstance(x, Mapping):
        read = _by_use(x, {name: name for name in x}, False)
    else:
        read = DataBatch((x,) if isinstance(x, Tensor) else tuple(x))
    if y is not None and read.y is not None:
        raise InvalidInput("the batch has targets twice, among its named inputs and beside them: leave one out.")
    if targets and y is None and read.y is None:
        raise InvalidInput("a batch must be a pair (inputs, targets), or a dict with 'labels': targets are needed.")
    return dataclasses.replace(read, y=read.y if y is None else y)


def batches_of(
    data: Any, parts: Parts = None, *, batch_size: int | None = 512, dim: int = 0, targets: bool = True
) -> Iterator[DataBatch]:
    """Batches from a loader, or from whole data: a tensor, a pair, a dict, or a map-style dataset.

    Parameters
    ----------
    data
        An iterable of batches; or inputs, a tuple of parts or a dict of named ones, which are cut into batches; or a
        ``torch.utils.data.Dataset``, or a ``datasets.Dataset`` of Hugging Face.
    parts, targets
        As for :func:`read_batch`.
    batch_size
        Examples at once, where data are not batched; None for all.
    dim
        Dimension of the examples in unnamed inputs; targets have them in front.

    Examples
    --------
    >>> [len(batch.y) for batch in batches_of((torch.ones(5, 3), torch.zeros(5)), batch_size=2)]
    [2, 2, 1]
    """
    if isinstance(data, Dataset) and not isinstance(data, Iterable):
        # a generator of its own, since a loader draws a seed for its workers even if it has none
        data = DataLoader(data, batch_size=batch_size, generator=torch.Generator())
    elif type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "with_format"):
        # of Hugging Face; left to itself it gives lists, and one example after the other
        tensors = data if data.format["type"] == "torch" else data.with_format("torch")
        size = len(tensors) if batch_size is None else batch_size
        data = DataLoader(tensors, batch_size=size, generator=torch.Generator())
    first, last = (data[0], data[-1]) if isinstance(data, tuple | list) and data else (None, None)
    # A list of tensors may be batches of inputs, and one of dicts is batches; a tuple is the parts of whole data.
    pair = isinstance(data, tuple) or (targets and len(data) == 2) if first is not None else False
    parted = pair and isinstance(first, Tensor | Mapping) and not isinstance(last, Mapping)
    whole = isinstance(data, Tensor | DataBatch) or _named(data) is not None or parted
    if whole:
        yield from _cut(read_batch(data, parts, targets=targets), batch_size, dim)
    elif isinstance(data, Iterable):
        for batch in data:
            found = read_batch(batch, parts, targets=targets)
            if isinstance(found.y, Tensor) and found.y.ndim == 0:
                raise InvalidInput(
                    "the data come as single examples and not as batches, since the targets are a single number: give "
                    "the DataLoader a batch_size, or pass its data set."
                )
            yield found
    else:
        raise InvalidInput(
            f"data is {type(data).__name__}: a tensor, a pair (x, y), a dict of named parts or an iterable of batches "
            "is needed."
        )


def in_type_of(model: nn.Module, value: Any) -> Any:
    """A float64 tensor, which numpy makes of everything, in the type of a model's parameters; any for a float64 one."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(kinds) != 1:  # a model of several types knows itself what its layers take
        return value
    (kind,) = kinds
    return value.to(kind) if torch.float64 in (value.dtype, kind) else value


def count_classes(labels: Iterable[Tensor], ignore_index: int = -100) -> int:
    """The largest label and one; a label 255 far beyond all others is not counted as a class but asked about.

    Examples
    --------
    >>> count_classes([torch.tensor([0, 2, -100])])
    3
    """
    seen: set[int] = set()
    for y in labels:
        seen |= {int(v) for v in y.unique() if int(v) != ignore_index}
    top = sorted(seen)[-2:]
    if len(top) == 2 and top[1] == 255 and top[0] < 250:
        raise InvalidInput(
            f"labels run to {top[0]}, but for one that is 255, which usually means void: give ignore_index=255, or "
            "num_classes=256 if it is a class."
        )
    return max(seen, default=-1) + 1


def fit_mask(mask: Tensor, grid: Sequence[int], what: str = "the layer") -> Tensor:
    """A mask (N, ...) of positions for those of a layer, by nearest neighbor where one grid divides the other.

    Parameters
    ----------
    mask
        (N, T) or (N, H, W); (N,) leaves out whole samples.
    grid
        Positions of the layer: (T,), (H, W); none: a sample counts if any of its positions does.
    what
        Names the layer at the head of the sentence.
    """
    mask = mask != 0
    if not grid:
        return mask.flatten(1).any(1) if mask.ndim > 1 else mask
    if mask.ndim == 1:
        return mask.reshape(-1, *(1,) * len(grid)).expand(-1, *grid)
    there = tuple(mask.shape[1:])
    if len(there) != len(grid) or any(max(a, b) % min(a, b) for a, b in zip(there, grid, strict=True)):
        raise InvalidInput(
            f"{what} has positions {tuple(grid)}, to which the mask's {there} do not fit: choose other layers, or "
            "count all positions, such as with parts={'attention_mask': 'attention_mask+_'}."
        )
    for axis, (new, old) in enumerate(zip(grid, there, strict=True), start=1):
        if new != old:
            mask = mask.index_select(axis, torch.arange(new, device=mask.device) * old // new)
    return mask


def _named(batch: Any) -> dict[str, Any] | None:
    """The parts of something whose parts have names; a named tuple of two is a pair."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return None if len(batch) == 2 else dict(zip(batch._fields, batch, strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return None


def _by_use(parts: Mapping[Any, Any], uses: Mapping[Any, str], targets: bool) -> DataBatch:
    """The batch of these parts, each for the use of the same key."""
    unknown = [key for key in uses if key not in parts]
    if unknown:
        raise InvalidInput(f"parts names {unknown[0]!r}; the batch has {', '.join(map(str, parts))}.")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    found: dict[str, list[Any]] = {"y": [], "mask": []}
    implied = False
    for key, value in parts.items():
        use = "y" if uses[key] in TARGETS else uses[key]
        if _is_mask(use) and value is not None:
            use, implied = f"{use}+mask", True
        for one in use.split("+") if value is not None else ():
            if one == "x":
                args.append(value)
            elif one in found:
                padding = one == "mask" and use.endswith("key_padding_mask+mask")  # true where padding is
                found[one].append(value == 0 if padding else value)
            elif one != "_":
                kwargs[one] = value
    names = ", ".join(map(str, parts))
    for use, values in found.items():
        if len(values) > 1:
            raise InvalidInput(
                f"{len(values)} of the batch's parts ({names}) are its {use}: leave out others with '_'"
                + (", or give them to the model only with parts={name: 'name+_'}." if use == "mask" else ".")
            )
    if targets and not found["y"]:
        raise InvalidInput(
            f"none of the batch's parts ({names}) is called labels, targets or y: say which it is with "
            "parts={name: 'y'}."
        )
    y, mask = (values[0] if values else None for values in found.values())
    return DataBatch(tuple(args), kwargs, y, mask, implied)


def _cut(batch: DataBatch, size: int | None, dim: int) -> Iterator[DataBatch]:
    """Whole data, a few examples at a time."""
    tensors = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
    where = dim if batch.args else 0
    if not tensors or tensors[0].ndim <= where:
        raise InvalidInput(f"data is a single number or has no dimension {where}: inputs (N, ...) are needed.")
    count = tensors[0].shape[where]
    size = size or max(count, 1)
    beside = [v for v in (batch.y, batch.mask) if isinstance(v, Tensor)]
    if any(v.ndim == 0 or len(v) != count for v in beside):
        raise InvalidInput(f"there are {count} inputs and {len(beside[0])} targets; expected as many.")

    def part(value: Any, start: int, axis: int) -> Any:
        if isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == count:
            return value.narrow(axis, start, min(size, count - start))
        return value

    for start in range(0, count, size):
        args, kwargs = batch.args, batch.kwargs
        yield DataBatch(
            tuple(part(v, start, where) for v in args),
            {name: part(v, start, where) for name, v in kwargs.items()},
            part(batch.y, start, 0),
            part(batch.mask, start, 0),
            batch.implied,
        )


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(v, device) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(v, device) for v in value)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
