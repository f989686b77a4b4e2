"""One training loop, an iterator over steps: a probe is code in the loop body.

::

    for step in steps(model, epochs(x, y, 128, generator=0), optimizer, schedule=cosine(2000), max_steps=2000):
        if step.number % 100 == 0:
            print(step.number, float(step.loss), evaluate(model, x_test, y_test, accuracy))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded
from mlcollage.nn.wrapped import inputs_of
from mlcollage.train.schedules import Schedule

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """What one update saw and did.

    Parameters
    ----------
    number
        1 for the first update.
    loss
        Loss of the batch before the update, detached, shape ().
    lr
        Learning rate of the update (of the optimizer's first parameter group).
    x, y
        The batch, on the model's device.
    logits
        The model's output for it, before the update, detached.
    """

    number: int
    loss: Tensor
    lr: float
    x: Tensor
    y: Tensor
    logits: Tensor


def steps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    loss: Loss = F.cross_entropy,
    schedule: Schedule | None = None,
    max_steps: int | None = None,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    start: int = 0,
    check_every: int = 1,
) -> Iterator[Step]:
    r"""Train; each item is one update, and is yielded after it.

    Update number :math:`t + 1` is the optimizer's, with gradient :math:`\nabla L(f_\theta(x), y)`, clipped if asked,
    and learning rate :math:`\mathrm{lr} \cdot \mathrm{schedule}(t)`. The model is put in training mode when the loop
    starts and is left in the mode the loop body leaves it in (:func:`evaluate` and :func:`predict` restore it).

    Parameters
    ----------
    model
        Any network, also a compiled one; batches are moved to the device of its parameters.
    batches
        Pairs of inputs and targets: :func:`epochs`, a ``DataLoader``, a generator.
    optimizer
        Any ``torch.optim.Optimizer`` over the model's parameters, also one that calls the loss several times in a step
        (LBFGS). Its learning rates are the base rates.
    loss
        From the model's output and the targets to a scalar.
    schedule
        Factor on the base learning rate at 0-based step t; see :mod:`mlcollage.train.schedules`. The base rate is
        kept in the optimizer's groups as ``initial_lr``, where torch's schedulers keep it.
    max_steps
        Number of the last update; without it, until the batches or the loop body end it.
    clip_norm
        Scale the gradient down to this Euclidean norm if it is longer.
    autocast
        ``torch.bfloat16`` runs model and loss under ``torch.autocast``; parameters keep their type.
    seed
        Seeds what the model itself draws (dropout), afresh in each step: the same seed gives the same numbers,
        whatever the loop body draws in between, and the global random state is left as it was.
    start
        Updates done before, when resuming: numbers and schedule go on from there.
    check_every
        Look for a non-finite loss every so many updates. 1 stops before the update that would spoil the weights; on
        a GPU a larger number lets the host run ahead, and the error still names the step.

    Yields
    ------
    Step

    Raises
    ------
    InvalidInput
        For a loss that is not finite or not a scalar, and for arguments or batches that cannot be used.

    Examples
    --------
    >>> from mlcollage.nn.init import build
    >>> from mlcollage.nn.mlp import MLP
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(64, 5, generator=g)
    >>> y = (x[:, 0] > 0).long()
    >>> model = build(lambda: MLP((5,), 2, (16,)), seed=0)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> losses = [float(s.loss) for s in steps(model, epochs(x, y, 32, generator=0), optimizer, max_steps=30)]
    >>> losses[-1] < 0.5 * losses[0], evaluate(model, x, y, accuracy) > 0.9
    (True, True)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInput(f"optimizer must be a torch.optim.Optimizer, not a {type(optimizer).__name__}.")
    device = _device(model)
    _check_settings(autocast, clip_norm, check_every)
    # The base rate stays known when the loop is entered again with an optimizer whose rate a schedule has changed.
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    again = needs_closure(optimizer)
    unchecked: list[Tensor] = []  # losses that were not looked at yet: reading one waits for the device
    model.train()
    for t, batch in enumerate(batches, start):
        if max_steps is not None and t >= max_steps:
            return
        x, y = (inputs_of(model, part) for part in _pair(batch, device, t + 1))
        _set_rate(optimizer, schedule, t)
        # A stream of its own for each step: what the loop body draws, or where a run was resumed, changes nothing.
        with seeded(seed, t), _autocast(device, autocast):
            logits = tensor_of(model, model(x))
            value = loss(logits, y)
        if value.ndim:
            raise InvalidInput(f"the loss must be one number, but has shape {tuple(value.shape)}; return its mean.")
        unchecked.append(value.detach())
        if len(unchecked) == check_every:
            _check_finite(unchecked, t + 1, clip_norm)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        if again:

            def closure(x: Tensor = x, y: Tensor = y, t: int = t) -> float:
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad(), seeded(seed, t), _autocast(device, autocast):
                    here = loss(model(x), y)
                here.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, clip_norm)
                return float(here.detach())

            optimizer.step(closure)
        else:
            optimizer.step()
        yield Step(t + 1, value.detach(), float(optimizer.param_groups[0]["lr"]), x, y, logits.detach())
        if max_steps is not None and t + 1 >= max_steps:  # before the next batch is drawn
            break
    if unchecked:  # the rest of the last period
        _check_finite(unchecked, t + 1, clip_norm)


def epochs(
    x: Tensor,
    y: Tensor,
    batch_size: int,
    *,
    generator: torch.Generator | int,
    drop_last: bool = True,
    augment: Augment | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless minibatches, reshuffled at the start of every epoch; each sample comes once per epoch.

    Parameters
    ----------
    x, y
        All inputs (n, ...) and targets (n, ...), on any device; batches are taken there.
    batch_size
        Samples in a batch.
    generator
        Draws the order, and is handed to ``augment``; an int seeds a fresh one on the CPU.
    drop_last
        Leave out the last samples of an epoch (others each time) if they do not fill a batch; False yields them as
        a smaller batch.
    augment
        Called as ``augment(x_batch, generator)``; returns the inputs to train on.

    Yields
    ------
    tuple of Tensor
        Inputs (batch_size, ...) and targets (batch_size, ...).

    Raises
    ------
    InvalidInput
        If x and y differ in length, are empty, or do not fill one batch although ``drop_last``.

    Examples
    --------
    >>> x = torch.arange(4.0)
    >>> batches = epochs(x, x.long(), 2, generator=0)
    >>> sorted(int(v) for _ in range(2) for v in next(batches)[1])
    [0, 1, 2, 3]
    """
    n = _same_length(x, y)
    batch_size = checks.integer("batch_size", batch_size, least=1)
    if n < 1 or (drop_last and n < batch_size):
        raise InvalidInput(
            f"{n} samples do not fill one batch of {batch_size}; use a batch_size between 1 and {n}"
            + (", or drop_last=False." if drop_last and n else ".")
        )
    if isinstance(generator, int | np.integer):
        generator = torch.Generator().manual_seed(int(generator))
    return _shuffled(x, y, batch_size, generator, n - n % batch_size if drop_last else n, augment)


def _shuffled(
    x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator, end: int, augment: Augment | None
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        # Drawn where the generator is, so that the order does not depend on where the data are.
        order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
        for i in range(0, end, batch_size):
            index = order[i : i + batch_size]
            inputs = x[index]  # (batch_size, ...)
            yield (inputs if augment is None else augment(inputs, generator)), y[index.to(y.device)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on leaving, every module is put back into the mode it was in.

    Modules that were in evaluation mode on purpose (a frozen batch norm) stay there, which ``model.train()`` would
    undo.
    """
    modes = [(m, m.training) for m in model.modules()]  # each its own: they need not agree with the model's
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def predict(model: nn.Module, x: Tensor, batch_size: int = 1024) -> Tensor:
    """The model's outputs for all of x, in evaluation mode and without gradients; the mode is restored.

    Parameters
    ----------
    model
        Maps a batch to a tensor with the batch first.
    x
        Inputs (n, ...); moved to the model's device one batch at a time.
    batch_size
        How many at once.

    Returns
    -------
    Tensor
        Outputs (n, ...), on the model's device.

    Examples
    --------
    >>> tuple(predict(nn.Linear(3, 2), torch.zeros(5, 3), batch_size=2).shape)
    (5, 2)
    """
    batch_size = checks.integer("batch_size", batch_size, least=1)
    x = inputs_of(model, x)
    if len(x) == 0:
        raise InvalidInput("predict needs at least one sample, but x is empty.")
    device = _device(model)
    with evaluating(model), torch.no_grad():
        return torch.cat([tensor_of(model, model(part.to(device, non_blocking=True))) for part in x.split(batch_size)])


def evaluate(model: nn.Module, x: Tensor, y: Tensor, fn: Callable[[Tensor, Tensor], T], batch_size: int = 1024) -> T:
    """``fn(outputs, y)`` over the whole set at once, so that it is exact for any metric, not only for means.

    Parameters
    ----------
    model, x, batch_size
        As for :func:`predict`.
    y
        Targets (n, ...).
    fn
        From the outputs of all samples and all targets to anything: :func:`accuracy`, a loss, a calibration error.

    Examples
    --------
    >>> model = nn.Identity()
    >>> evaluate(model, torch.eye(3), torch.tensor([0, 1, 1]), accuracy)
    0.6666...
    """
    _same_length(x, y)
    outputs = predict(model, x, batch_size)
    with torch.no_grad():
        return fn(outputs, y.to(outputs.device))


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of samples whose largest logit is that of their label; logits (n, classes), y (n,) -> [0, 1]."""
    return float((logits.argmax(-1) == y).double().mean())


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step calls the loss itself, perhaps several times, as LBFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def tensor_of(model: nn.Module, outputs: Any) -> Tensor:
    """A model's outputs, if they are a tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    raise InvalidInput(
        f"{type(model).__name__} returns a {type(outputs).__name__}; one tensor is needed: return the logits alone."
    )


def _same_length(x: Tensor, y: Tensor) -> int:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise InvalidInput(f"{name} must be a tensor, not a {type(value).__name__}; give torch.as_tensor({name}).")
    if len(x) != len(y):
        raise InvalidInput(f"x holds {len(x)} samples but y holds {len(y)}; they must be of the same length.")
    return len(x)


def _device(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer is; None for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):  # the first one, if there is any
        return tensor.device
    return None


def _pair(batch: object, device: torch.device | None, number: int) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
        raise InvalidInput(
            f"batch {number} must be a pair of tensors (inputs, targets), not a {type(batch).__name__}"
            + (f" of {len(batch)}." if isinstance(batch, tuple | list) else ".")
        )
    x, y = batch
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule | None, t: int) -> None:
    if schedule is None:
        return
    factor = checks.real(f"the schedule's factor at step {t}", float(schedule(t)), least=0)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _autocast(device: torch.device | None, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None or device is None else torch.autocast(device.type, dtype=dtype)


def _check_settings(autocast: torch.dtype | None, clip_norm: float | None, check_every: int) -> None:
    if autocast not in (None, torch.bfloat16):
        # float16 gradients underflow unless the loss is scaled, which this loop does not do.
        raise InvalidInput(f"autocast must be torch.bfloat16 or None, not {autocast}: float16 would need loss scaling.")
    if clip_norm is not None:
        checks.positive("clip_norm", clip_norm)
    checks.integer("check_every", check_every, least=1)


def _check_finite(losses: list[Tensor], last: int, clip_norm: float | None) -> None:
    """Raise if any of the losses up to step ``last`` is not finite; empties the list."""
    finite = torch.stack(losses).isfinite().tolist()  # one transfer from the device for all of them
    if not all(finite):
        number = last - len(losses) + 1 + finite.index(False)
        clip = ", clip the gradient (clip_norm)" if clip_norm is None else ""
        raise InvalidInput(
            f"the loss became {float(losses[number - 1 - last])} at step {number}; lower the learning rate, "
            f"warm it up{clip}, or look for non-finite values in the data."
        )
    losses.clear()
