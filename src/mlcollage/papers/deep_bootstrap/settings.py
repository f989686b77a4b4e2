"""What the framework is asked for, in the types that training uses, and all that is refused before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.data import DataWorld
from mlcollage.errors import InvalidInput
from mlcollage.train import Schedule, cosine
from mlcollage.train.loop import Loss

from .result import RULES, Rule
from .worlds import FiniteAsIdeal

WHOLE = int | np.integer  # Python's and numpy's whole numbers


def as_sizes(n: int | Sequence[int], world: DataWorld, steps: int, batch_size: int) -> tuple[int, ...]:
    """Sample sizes, ascending; each must hold a batch and be seen once, and a finite world must last."""
    sizes = tuple(sorted({checks.integer("n", v, least=1) for v in ((n,) if isinstance(n, WHOLE) else n)}))
    if not sizes:
        raise InvalidInput("n is empty; give at least one sample size.")
    needed = steps * batch_size  # samples of the Ideal World
    if sizes[0] < batch_size:
        raise InvalidInput(f"n={sizes[0]} is less than a batch of {batch_size}; lower batch_size or raise n.")
    if sizes[-1] > needed:
        raise InvalidInput(
            f"{steps} steps of batch {batch_size} see {needed} samples, less than one epoch of n={sizes[-1]}; use at "
            f"least {-(-sizes[-1] // batch_size)} steps or a smaller n."
        )
    if isinstance(world, FiniteAsIdeal) and world.past_one_pass == "raise" and needed > world.stream_size:
        raise InvalidInput(
            f"the finite Ideal World has {world.stream_size} samples for {steps} steps of batch {batch_size}, which "
            f"need {needed}; use at most {world.stream_size // batch_size} steps, or past_one_pass='warn'."
        )
    return sizes


def as_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds themselves, or 0, 1, ... where their number is given."""
    if isinstance(seeds, WHOLE):
        return tuple(range(checks.integer("seeds", seeds, least=1)))
    found = tuple(checks.integer("a seed", seed, least=0) for seed in seeds)
    if not found or len(set(found)) < len(found):
        raise InvalidInput(f"seeds={found} must hold at least one seed, and each only once.")
    return found


def as_schedule(schedule: Any, total: int) -> Schedule | None:
    """A function of the step that covers all steps, or None."""
    if schedule is None:
        return None
    if schedule == "cosine":
        return cosine(total)
    if isinstance(schedule, str) or not callable(schedule):
        raise InvalidInput(
            f"schedule must be one function of the step, 'cosine' or None, but is a {type(schedule).__name__} "
            f"({schedule!r}): both worlds need the same schedule, whatever n."
        )
    try:  # a schedule that ends early would only fail at the end of the training
        float(schedule(0)), float(schedule(total - 1))
    except Exception as reason:
        raise InvalidInput(
            f"schedule could not be evaluated at the steps 0 and {total - 1} ({reason}); both worlds need the same "
            "schedule, a function from the 0-based step to a factor that covers all steps."
        ) from reason
    return cast(Schedule, schedule)


def log_steps(steps: int, count: int = 24) -> tuple[int, ...]:
    """About ``count`` logarithmically spaced steps from 1 to ``steps``, and 0.

    Examples
    --------
    >>> log_steps(100, 5)
    (0, 1, 3, 10, 32, 100)
    """
    return (0, *sorted({round(float(s)) for s in np.geomspace(1, steps, max(count, 2))}))


def as_grid(eval_at: str | int | Sequence[int], total: int) -> tuple[int, ...]:
    """Steps at which worlds are evaluated, the first (0) and the last among them."""
    if isinstance(eval_at, str):
        checks.choice("eval_at", eval_at, ("log",))
        return log_steps(total)
    if isinstance(eval_at, WHOLE):
        return log_steps(total, checks.integer("eval_at", eval_at, least=1))
    wanted = (checks.integer("a step of eval_at", step, least=0, most=total) for step in eval_at)
    return tuple(sorted({0, total, *wanted}))


def as_stop(stop: Any, num_classes: int) -> tuple[str, float] | None:
    """Rule and threshold at which a Real World stops, or None for the whole budget."""
    if stop is None:
        return None
    name, threshold = (stop, None) if isinstance(stop, str) else stop
    rule = cast(Rule, checks.choice("the rule of stop", name, ("train_error", "train_loss")))
    if rule == "train_error" and num_classes == 0:
        raise InvalidInput("a regression has no train error to stop at; use stop='train_loss'.")
    return rule, float(RULES[rule] if threshold is None else threshold)


def as_device(device: str | torch.device) -> torch.device:
    """A torch device; ``"auto"`` is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise InvalidInput(f"device={device!r} is not known to torch; use 'auto', 'cpu' or 'cuda'.") from None


def loss_function(loss: str | Loss, num_classes: int) -> Loss:
    """The training loss as a function of outputs and targets."""
    if callable(loss):
        # outputs (b, 1) against targets (b,) would be broadcast to all pairs
        return loss if num_classes else lambda outputs, y: loss(outputs.reshape(y.shape), y)
    if loss == "cross_entropy":
        if num_classes == 0:
            raise InvalidInput("loss='cross_entropy' needs classes, but num_classes is 0; use 'mse' or a function.")
        return F.cross_entropy
    if loss == "mse":
        return _squared_error if num_classes == 0 else _one_hot_squared_error
    raise InvalidInput(f"loss={loss!r} is not known; use 'cross_entropy', 'mse' or a function of (outputs, targets).")


def loss_name(loss: str | Loss) -> str:
    """The loss in a word, for the settings of a result."""
    loss = loss if isinstance(loss, str) else getattr(loss, "func", loss)  # of functools.partial
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)


def _one_hot_squared_error(logits: Tensor, y: Tensor) -> Tensor:
    # (b, K); a comparison instead of F.one_hot, which looks at the values and so cannot be mapped over replicas.
    one_hot = (y.unsqueeze(-1) == torch.arange(logits.shape[-1], device=y.device)).to(logits.dtype)
    return F.mse_loss(logits, one_hot)


def _squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(outputs.reshape(y.shape), y)  # (b, 1) or (b,)


def check_world(world: Any) -> None:
    """The world must have the methods and attributes of a :class:`~mlcollage.data.world.DataWorld`."""
    if not isinstance(world, DataWorld):
        raise InvalidInput(
            f"{type(world).__name__} is no data world: it needs batch(), fixed(), num_classes and shape; wrap a "
            "finite dataset in FiniteAsIdeal."
        )


def check_labels(y: Tensor, num_classes: int) -> None:
    """Labels must be integers from 0 to ``num_classes - 1``; a world with ``num_classes == 0`` is a regression."""
    if num_classes == 0:
        if not y.is_floating_point():
            raise InvalidInput(f"with num_classes=0 (regression) targets must be floating point, not {y.dtype}.")
    elif y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise InvalidInput(
            f"the world has num_classes={num_classes}, so labels must be integers from 0 to {num_classes - 1}; "
            f"got {y.dtype} from {y.min().item():g} to {y.max().item():g}."
        )


def check_outputs(outputs: Any, batch: int, num_classes: int, model: nn.Module) -> None:
    """The network must give ``(batch, num_classes)`` logits; in a regression one number per sample."""
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if num_classes and shape != (batch, num_classes):
        raise InvalidInput(
            f"{type(model).__name__} gives {shape} for {batch} samples; the world's {num_classes} classes "
            f"need {(batch, num_classes)}."
        )
    if not num_classes and (not isinstance(outputs, Tensor) or outputs.numel() != batch):
        raise InvalidInput(f"{type(model).__name__} gives {shape} for {batch} samples; one number each is needed.")


def check_batch_norm(model: nn.Module, batch_size: int) -> None:
    """BatchNorm has no variance to divide by in a batch of one."""
    if batch_size == 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise InvalidInput(f"{type(model).__name__} has BatchNorm layers, which need a batch_size of at least 2.")
