"""A trained network with its data and its untrained twin, made ready for instruments; the user's own is not touched."""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from mlcollage import _checks as checks
from mlcollage import _random
from mlcollage._users import users_code
from mlcollage.data.batches import DataBatch, batches_of
from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.measure import LayerTap, LayerUnits, as_samples
from mlcollage.nn.wrapped import logits_of, unwrap

Task = Literal["classification", "binary", "regression", "other"]
TASKS = ("classification", "binary", "regression", "other")
Output = int | str | Callable[[Any], Tensor] | None
Loss = Callable[[Any, Any], Tensor]
MOST_TEST, MOST_TRAIN = 1000, 4000
MOST_LAYERS = 24
_LAYERS_OF_WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish, nn.SELU, nn.PReLU)


@dataclass(frozen=True, eq=False)
class Examples:
    """Some examples in memory, as the network is called with them.

    Parameters
    ----------
    batch
        All of them as one batch, on the network's device.
    size
        How many.
    """

    batch: DataBatch
    size: int

    @property
    def x(self) -> Any:
        """A tensor, or a dict or tuple of inputs."""
        return self.batch.x

    @property
    def y(self) -> Any:
        """Targets, or None."""
        return self.batch.y

    def take(self, rows: Tensor | int) -> Examples:
        """The examples of these numbers, or the first so many."""
        index = torch.arange(min(rows, self.size)) if isinstance(rows, int) else rows

        def part(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == self.size:
                return value[index.to(value.device)]
            return value

        b = self.batch
        taken = dataclasses.replace(
            b,
            args=tuple(part(v) for v in b.args),
            kwargs={k: part(v) for k, v in b.kwargs.items()},
            y=part(b.y),
            mask=part(b.mask),
        )
        return Examples(taken, len(index))

    def parts(self, size: int) -> Iterator[Examples]:
        """A few at a time."""
        for start in range(0, self.size, size):
            yield self.take(torch.arange(start, min(start + size, self.size)))


class _Chosen(nn.Module):
    """The network, of whose outputs one is taken."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The chosen output."""
        return choose(self.model(*args, **kwargs), self.output)


def choose(given: Any, output: Output) -> Tensor:
    """The output of a model that its user means."""
    if output is None:
        return logits_of(given)
    found: Any
    if callable(output):
        found = output(given)
    else:
        try:
            found = given[output]
        except (KeyError, IndexError, TypeError):
            found = getattr(given, str(output), None)
    if not isinstance(found, Tensor):
        raise InvalidInput(
            f"output={output!r} names no tensor of what the model returns ({type(given).__name__}); give its number, "
            "its name or a function."
        )
    return found


@dataclass(eq=False)
class Subject:
    """A network that instruments can look at; made by :func:`prepare`.

    Parameters
    ----------
    name
        What it is called.
    model
        A copy of the trained network, in evaluation mode.
    test
        The examples that it is looked at with.
    train
        Examples that it was trained on, or None.
    untrained
        A copy of its untrained twin, or None.
    task
        ``"classification"`` (a logit for each class), ``"binary"`` (one logit), ``"regression"``, or ``"other"``.
    output
        Which of several outputs is meant.
    loss
        ``loss(output, y)``, the mean over examples, or None.
    layers
        Names of the layers that are read one by one, in the order of modules.
    rectified
        Whether their negative responses are cut where a response must not be negative.
    seed
        Of everything that instruments draw.
    notes
        What was decided, in sentences.
    """

    name: str
    model: nn.Module
    test: Examples
    train: Examples | None = None
    untrained: nn.Module | None = None
    task: Task = "other"
    output: Output = None
    loss: Loss | None = None
    layers: tuple[str, ...] = ()
    rectified: bool = False
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    forward: float = 1e-3  # seconds for one example
    backward: float = 3e-3
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> int:
        """How many numbers the network has."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def asked(self) -> nn.Module:
        """The network as instruments call it that need one tensor of outputs."""
        return self.model if self.output is None else _Chosen(self.model, self.output)

    def loss_fn(self, output: Any, y: Any) -> Tensor:
        """The mean loss, of what the network returned."""
        assert self.loss is not None
        return self.loss(choose(output, None if isinstance(output, Tensor) else self.output), y)

    @cached_property
    def outputs(self) -> Tensor | str:
        """Outputs for the test examples, (n, ...) float64 on the CPU; or why there are none."""
        try:
            return torch.cat([self._run(part).double().cpu() for part in self.test.parts(128)])
        except InvalidInput as error:
            return str(error)

    def _run(self, part: Examples) -> Tensor:
        with torch.no_grad(), users_code("the network on its data"):
            found = choose(self.model(*part.batch.args, **part.batch.kwargs), self.output)
        if len(found) != part.size:
            raise InvalidInput(f"the model gives {len(found)} outputs for {part.size} examples; expected as many.")
        return found

    @cached_property
    def gives_probabilities(self) -> bool:
        """Whether the outputs are probabilities already."""
        z = self.outputs
        if isinstance(z, str) or self.task != "classification":
            return False
        return bool(z.min() >= 0) and float((z.sum(1) - 1).abs().max()) < 1e-3

    def probabilities(self) -> npt.NDArray[np.float64]:
        """Class probabilities for the test examples, (n, classes)."""
        z = self.outputs
        assert isinstance(z, Tensor)
        if self.task == "binary":
            p = z.reshape(len(z)).sigmoid()
            return torch.stack([1 - p, p], 1).numpy()
        return (z if self.gives_probabilities else z.softmax(1)).numpy()

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Classes of the test examples, (n,)."""
        return self.test.y.reshape(self.test.size).long().cpu().numpy()

    @cached_property
    def classes(self) -> int:
        """How many classes there are; 0 if the task has none."""
        z = self.outputs
        if isinstance(z, str) or self.task not in ("classification", "binary"):
            return 0
        return 2 if self.task == "binary" else int(z.shape[1])

    def lacks(self, need: str) -> str:
        """Why a need is not met, or nothing."""
        if need == "outputs" and isinstance(self.outputs, str):
            return f"{self.outputs[:1].upper()}{self.outputs[1:]} Say with output= which is meant."
        if need == "labels" and self.test.y is None:
            return "The data have no targets."
        if need == "probabilities" and not self.classes:
            why = f"the task is {self.task!r}" if not isinstance(self.outputs, str) else self.outputs
            return f"It asks for classes and their probabilities, and there are none: {why}"
        if need == "untrained" and self.untrained is None:
            return "It compares with the untrained network, which was not given; give it as 'untrained'."
        if need == "train" and self.train is None:
            return "It needs training examples, which were not given; give them as 'train'."
        return ""

    def features(self, which: str) -> tuple[dict[str, Tensor], list[str]]:
        """What each layer makes of the examples ``"test"`` or ``"train"``, (n, units) on the CPU, and what was skipped.

        Positions are averaged over. At most 1,000 examples.
        """
        if which in self._kept:
            return self._kept[which]
        examples = (self.test if which == "test" else self.train) or self.test
        examples = examples.take(MOST_TEST)
        units = LayerUnits(self.model, list(self.layers))
        found: dict[str, list[Tensor]] = {}
        skipped: dict[str, str] = {}

        def keep(name: str, h: Tensor) -> None:
            if name in skipped:
                return
            try:
                rows = units(name, h)
                if rows is None or not h.is_floating_point():
                    return
                mask = part.batch.mask
                mask = mask if mask is not None and rows.ndim > 2 and mask.shape[1:] == rows.shape[2:] else None
                values = as_samples(rows, "mean", unit_axis=1, mask=mask)
                if len(values) != part.size:
                    raise InvalidInput(f"{len(values)} rows for {part.size} examples")
                found.setdefault(name, []).append(values.double().cpu())
            except InvalidInput as error:
                skipped[name] = str(error)

        with LayerTap(self.model, list(self.layers), consume=keep), torch.no_grad():
            for part in examples.parts(128):
                units.look(*part.batch.args, **part.batch.kwargs)
                self.model(*part.batch.args, **part.batch.kwargs)
        whole = {name: torch.cat(v) for name, v in found.items() if name not in skipped}
        notes = [f"Layer {name} was skipped: {why}" for name, why in skipped.items()]
        self._kept[which] = whole, notes
        return whole, notes


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python are put back on leaving; inside, torch's start from the seed."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (whatever the user's code draws from)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def prepare(
    model: nn.Module,
    data: Any,
    untrained: nn.Module | None = None,
    *,
    output: Output = None,
    loss: Loss | None = None,
    task: str | None = None,
    layers: Any = None,
    name: str = "",
    seed: int = 0,
    max_examples: int = MOST_TEST,
) -> Subject:
    """Make a network ready for the instruments: it is copied, and some of its data are read.

    Parameters are those of :func:`mlcollage.portrait`.

    Raises
    ------
    InvalidInput
        For what is no network, data that are no examples of it, and an untrained twin with other parameters.
    """
    checks.integer("seed", seed, least=0)
    checks.integer("max_examples", max_examples, least=16)
    if task is not None:
        checks.choice("task", task, TASKS)
    own = _copied(model, "model")
    twin = None if untrained is None else _copied(untrained, "untrained")
    _check_twin(own, twin)
    notes: list[str] = []
    if not any(p.requires_grad for p in own.parameters()):
        own.requires_grad_(True)
        notes.append("All parameters were frozen; the curvature is that of all of them.")
    test, train = _split(data, own, max_examples, seed, notes)
    subject = Subject(
        name or type(model).__name__, own, test, train, twin, output=output, seed=seed, notes=notes, loss=loss
    )
    _decide_task(subject, task)
    subject.layers, subject.rectified = _layers(own, layers, notes)
    _clock(subject)
    return subject


def _copied(model: Any, what: str) -> nn.Module:
    inner = unwrap(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise InvalidInput(f"{what} is scripted, and its layers cannot be looked into; give the module itself.")
    with users_code(f"copying the network given as {what} (copy.deepcopy)"):
        return copy.deepcopy(inner).eval()


def _check_twin(model: nn.Module, twin: nn.Module | None) -> None:
    if twin is None:
        return
    here, there = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, twin))
    if here != there:
        odd = next(iter(n for n in {**here, **there} if here.get(n) != there.get(n)))
        raise InvalidInput(
            f"the untrained network has other parameters than the trained one (such as {odd}: {there.get(odd)} and "
            f"{here.get(odd)}); give the same architecture before training."
        )
    if all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)):
        raise InvalidInput(
            "the untrained network has the same numbers as the trained one: keep copy.deepcopy(model) before training."
        )


# --- data -------------------------------------------------------------------------------------------------------------


def _split(data: Any, model: nn.Module, most: int, seed: int, notes: list[str]) -> tuple[Examples, Examples | None]:
    """Test and training examples, in memory."""
    test, train = data, None
    if isinstance(data, Mapping) and set(data) <= {"train", "test"} and "test" in data:
        test, train = data["test"], data.get("train")
    elif not isinstance(data, Tensor | Dataset | Mapping) and hasattr(data, "test") and hasattr(data, "train"):
        test, train = data.test, data.train  # a workload
    fitted = max(MOST_TRAIN, most)
    if train is not None:
        return _gather(test, model, most, seed, "test"), _gather(train, model, fitted, seed, "train")
    found = _gather(test, model, most + fitted, seed, "data")
    if found.y is None or found.size < 64:
        return found.take(most), None
    half = found.size // 2
    notes.append(
        "One set of data was given: half of it is used where an instrument must fit (probes, a posterior), the other "
        "half where it measures. If the network was trained on them, accuracy and calibration are those of training."
    )
    return found.take(torch.arange(half, found.size)).take(most), found.take(half)


def _gather(data: Any, model: nn.Module, most: int, seed: int, what: str) -> Examples:
    """At most so many examples: random ones of what is in memory or can be indexed, the first of a loader."""
    data = _tensors(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        with users_code(f"the length of {what}"):
            count = len(data)
        if count > most:
            data = Subset(data, _random.permutation(count, seed, 1)[:most].tolist())
    whole = not isinstance(data, Dataset | DataLoader)
    batches: list[DataBatch] = []
    have = 0
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with users_code(f"reading {what}"):
        for batch in batches_of(data, batch_size=256, targets=False):
            batches.append(batch)
            have += _count(batch)
            if have >= most and not (whole and isinstance(data, tuple | Tensor | Mapping)):
                break
    if not batches or not have:
        raise InvalidInput(f"{what} holds no examples.")
    batch = _joined(batches, what).to(device)
    with users_code(f"{what} for the network"):
        batch = batch.check(model)
    examples = Examples(batch, have)
    if have > most:
        rows = _random.permutation(have, seed, 1)[:most] if whole else torch.arange(most)
        examples = examples.take(rows.sort().values)
    for value in (*batch.args, *batch.kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise InvalidInput(f"inputs of {what} hold NaN or infinity; clean them first.")
    return examples


def _tensors(data: Any) -> Any:
    """Arrays as tensors, also in a pair or a dict."""
    if isinstance(data, np.ndarray):
        return torch.as_tensor(data)
    if isinstance(data, tuple):
        return tuple(_tensors(v) for v in data)
    if isinstance(data, list) and len(data) == 2 and all(isinstance(v, np.ndarray | Tensor) for v in data):
        return tuple(_tensors(v) for v in data)
    if type(data) is dict:
        return {k: _tensors(v) for k, v in data.items()}
    return data


def _count(batch: DataBatch) -> int:
    first = next((v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
    if first is None:
        raise InvalidInput("a batch has no tensor with examples in front.")
    return len(first)


def _joined(batches: list[DataBatch], what: str) -> DataBatch:
    first = batches[0]
    padded = "attention_mask" in first.kwargs

    def join(values: list[Any]) -> Any:
        if not all(isinstance(v, Tensor) and v.ndim for v in values):
            return values[0]
        longest = max(v.shape[1] if v.ndim > 1 else 0 for v in values)
        if padded and values[0].ndim == 2 and not values[0].is_floating_point():  # tokens of several lengths
            values = [F.pad(v, (0, longest - v.shape[1])) for v in values]
        if len({tuple(v.shape[1:]) for v in values}) > 1:
            sizes = sorted({tuple(v.shape[1:]) for v in values})
            raise InvalidInput(f"examples of {what} have several shapes ({sizes[0]}, {sizes[1]}); give them one.")
        return torch.cat(values)

    y = None if first.y is None else join([b.y for b in batches])
    return dataclasses.replace(
        first,
        args=tuple(join([b.args[i] for b in batches]) for i in range(len(first.args))),
        kwargs={k: join([b.kwargs[k] for b in batches]) for k in first.kwargs},
        y=y,
        mask=None if first.mask is None else join([b.mask for b in batches]),
    )


# --- what is asked of it ----------------------------------------------------------------------------------------------


def _decide_task(subject: Subject, given: str | None) -> None:
    z, y, n = subject.outputs, subject.test.y, subject.test.size
    if isinstance(z, str):
        subject.notes.append(f"{z[:1].upper()}{z[1:]} What needs outputs is left out; say which with output=.")
        return
    if not bool(z.isfinite().all()):
        raise InvalidInput("the network's outputs hold NaN or infinity on these data; it has no portrait.")
    task, said = _inferred(z, y, n)
    subject.task = task if given is None else given  # type: ignore[assignment]
    if given is None:
        subject.notes.append(f"Read as {task}: {said}; task= says otherwise.")
    flat = (n,), (n, 1)
    one = tuple(z.shape) in flat
    if subject.task == "classification" and (z.ndim != 2 or y is None or tuple(y.shape) not in flat):
        raise InvalidInput(f"classification needs logits (n, classes) and labels (n,); the outputs are {_sizes(z, y)}.")
    if subject.task == "binary" and (not one or y is None or y.numel() != n):
        raise InvalidInput(f"a binary task needs one logit for each example; the outputs are {_sizes(z, y)}.")
    if subject.task == "regression" and (y is None or z.numel() != y.numel()):
        raise InvalidInput(f"a regression needs outputs shaped as the targets; the outputs are {_sizes(z, y)}.")
    if subject.task in ("classification", "binary"):
        top = int(z.shape[1]) if subject.task == "classification" else 2
        for part in (subject.test, subject.train):
            if part is not None and part.y is not None and not 0 <= int(part.y.min()) <= int(part.y.max()) < top:
                raise InvalidInput(
                    f"labels run from {int(part.y.min())} to {int(part.y.max())}, and the network has {top} classes; "
                    "give labels from 0 on."
                )
    if subject.loss is None:
        subject.loss = _LOSSES.get(subject.task)
        if subject.gives_probabilities:
            subject.loss = _of_probabilities
            subject.notes.append("The outputs are probabilities: the loss is the negative logarithm of the label's.")


def _sizes(z: Tensor, y: Any) -> str:
    return f"{tuple(z.shape)} and the targets {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"


def _inferred(z: Tensor, y: Any, n: int) -> tuple[Task, str]:
    """The task that outputs and targets look like, and why."""
    if not isinstance(y, Tensor):
        return "other", "there are no targets"
    seen = _sizes(z, y)
    single = z.numel() == n
    yes_no = bool(((y == 0) | (y == 1)).all())
    if z.ndim == 2 and z.shape[1] > 1 and y.numel() == n and not y.is_floating_point():
        return "classification", f"outputs are {seen}, whole numbers"
    if single and y.numel() == n and yes_no:
        return "binary", f"outputs are {seen}, which are 0 or 1"
    if z.numel() == y.numel() and (y.is_floating_point() or single):
        return "regression", f"outputs are {seen}"
    return "other", f"outputs are {seen}"


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y.reshape(len(z)).long())


def _yes_no(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z.reshape(len(z)), y.reshape(len(z)).to(z.dtype))


def _squared(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y.reshape(z.shape).to(z.dtype))


def _of_probabilities(p: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(p.clamp_min(torch.finfo(p.dtype).tiny).log(), y.reshape(len(p)).long())


_LOSSES: dict[str, Loss] = {"classification": _cross_entropy, "binary": _yes_no, "regression": _squared}


def _layers(model: nn.Module, given: Any, notes: list[str]) -> tuple[tuple[str, ...], bool]:
    """Names of the layers that are read one by one, and whether their responses may be negative."""
    from mlcollage.measure import layers_of

    if given is not None:
        names = list(layers_of(model, given))
        rectified = not all(isinstance(model.get_submodule(n), nn.ReLU | nn.ReLU6) for n in names)
        return tuple(names), rectified
    modules = dict(model.named_modules())
    relus = [n for n, m in modules.items() if n and isinstance(m, nn.ReLU | nn.ReLU6)]
    others = [n for n, m in modules.items() if n and (isinstance(m, _ACTIVATIONS) or "Activation" in type(m).__name__)]
    weights = [n for n, m in modules.items() if n and isinstance(m, _LAYERS_OF_WEIGHTS)]
    names, kind = (relus, "ReLUs") if relus else (others, "activations") if others else (weights, "layers of weights")
    if len(names) > MOST_LAYERS:
        every = np.unique(np.linspace(0, len(names) - 1, MOST_LAYERS).round().astype(int))
        notes.append(f"Of {len(names)} {kind}, {len(every)} are read one by one, evenly over the depth.")
        names = [names[i] for i in every]
    elif names:
        notes.append(f"Read layer by layer: its {len(names)} {kind}; layers= says otherwise.")
    return tuple(names), not relus


def _clock(subject: Subject) -> None:
    """Seconds for an example, forwards and backwards."""
    part = subject.test.take(min(64, subject.test.size))

    def forward() -> Any:
        return subject.model(*part.batch.args, **part.batch.kwargs)

    with users_code("the network on its data"):
        with torch.no_grad():
            forward()
            start = time.perf_counter()
            forward()
            subject.forward = (time.perf_counter() - start) / part.size
        subject.backward = 3 * subject.forward
        if isinstance(subject.outputs, Tensor):
            start = time.perf_counter()
            try:
                total = choose(forward(), subject.output).float().sum()
                wanted = [p for p in subject.model.parameters() if p.requires_grad]
                torch.autograd.grad(total, wanted, allow_unused=True)
                subject.backward = (time.perf_counter() - start) / part.size
            except (RuntimeError, MLCollageError):  # no gradient: the instruments that need one will say so
                pass
