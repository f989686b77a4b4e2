"""What a synthesizer knows of a sample besides its activation, and the number that a mean loss divides by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

Kind = Literal["labels", "values", "none"]
LossFn = Callable[[Any, Any], Tensor]
Divisor = float | Literal["samples", "sum"] | Callable[[Any], float] | None

_COUNTED = 10  # batches whose values standardize a context of floats


class Given(NamedTuple):
    """What synthesizers are told of a batch.

    Parameters
    ----------
    context
        (B, C) or (B, T, C); None: none.
    rows
        Which rows count, (B,) or (B, T); None: all.
    below
        Where every target is a label from 0 to below it; 0: not known.
    """

    context: Tensor | None
    rows: Tensor | None
    below: int = 0


class Context(nn.Module):
    """Targets as a synthesizer reads them.

    Parameters
    ----------
    kind
        ``"labels"``: class indices (B,), (B, 1) or (B, T) of any integer type, ``ignore_index`` allowed, become
        one-hot; soft and multi-hot labels (B, C) stay, as do integers (B, C) of 0 and 1 only. ``"values"``: numbers
        (B,) or (B, d), standardized by the mean and deviation of the first ten batches, then held. ``"none"``: no
        context.
    dim
        C, or d.
    ignore_index
        The label of rows without one: their context is zero, and no synthesizer is trained on them or used for them.

    Examples
    --------
    >>> given = Context("labels", 3)(torch.tensor([2, -100]))
    >>> given.context.tolist(), given.rows.tolist()
    ([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [True, False])
    """

    center: Tensor
    spread: Tensor
    batches: Tensor

    def __init__(self, kind: Kind = "labels", dim: int = 0, ignore_index: int = -100) -> None:
        super().__init__()
        self.kind: Kind = checks.choice("context", kind, ("labels", "values", "none"))
        self.dim = 0 if kind == "none" else checks.integer("the context's number of classes or values", dim, least=1)
        self.ignore_index = ignore_index
        if kind == "values":  # buffers, so that a resumed training goes on with the same units
            for name in ("center", "spread"):
                self.register_buffer(name, torch.zeros(dim, dtype=torch.float64))
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, y: Any) -> Given:
        """Read one batch's targets."""
        if self.kind == "none" or y is None:
            if self.dim:
                raise InvalidInput(
                    "the synthesizers take the targets as context; give y, or make them with context='none'."
                )
            return Given(None, self._rows(y))
        if not isinstance(y, Tensor):
            raise InvalidInput(f"targets must be a tensor, not {type(y).__name__}; give context='none' for others.")
        return self._labels(y) if self.kind == "labels" else self._values(y)

    def _rows(self, y: Any) -> Tensor | None:
        if isinstance(y, Tensor) and not y.is_floating_point() and y.ndim in (1, 2):
            rows = y != self.ignore_index
            return rows if not bool(rows.all()) else None
        return None

    def _labels(self, y: Tensor) -> Given:
        if y.is_floating_point():  # soft labels, mixup, multi-hot
            if y.shape[-1] != self.dim or y.ndim < 2:
                raise InvalidInput(
                    f"soft labels of shape {tuple(y.shape)} do not have {self.dim} classes; say context='values' if "
                    "these targets are numbers."
                )
            rows = ~y.isnan().any(-1)
            return Given(torch.where(rows[..., None], y, 0.0), None if bool(rows.all()) else rows)
        if y.ndim == 2 and y.shape[1] == self.dim and self.dim > 1 and int(y.max()) <= 1 and int(y.min()) >= 0:
            return Given(y.float(), None)  # multi-hot integers
        y = y.long()
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        one_hot = torch.zeros(*y.shape, self.dim, device=y.device, dtype=torch.float32)
        if _within(y, self.dim) and not 0 <= self.ignore_index < self.dim:  # all labels count
            return Given(one_hot.scatter_(-1, y[..., None], 1.0), None, self.dim)
        rows = y != self.ignore_index
        if not _within(seen := y[rows], self.dim):
            raise InvalidInput(
                f"labels reach from {int(seen.min())} to {int(seen.max())}, but the synthesizers were made for "
                f"{self.dim} classes (0 to {self.dim - 1}; ignore_index is {self.ignore_index})."
            )
        one_hot.scatter_(-1, torch.where(rows, y, 0)[..., None], rows[..., None].float())
        return Given(one_hot, None if bool(rows.all()) else rows)

    def _values(self, y: Tensor) -> Given:
        values = (y if y.ndim > 1 else y[:, None]).double()
        if values.shape[-1] != self.dim:
            raise InvalidInput(f"targets of shape {tuple(y.shape)} do not hold {self.dim} values each.")
        rows = values.isfinite().all(-1)
        seen = values[rows]
        if self.training and int(self.batches) < _COUNTED and len(seen):
            k = int(self.batches)
            mean, deviation = seen.mean(0), seen.std(0, unbiased=False)
            self.center.mul_(k / (k + 1)).add_(mean / (k + 1))
            self.spread.mul_(k / (k + 1)).add_(deviation / (k + 1))
            self.batches += 1
        spread = torch.where(self.spread > 0, self.spread, 1.0)
        context = torch.where(rows[..., None], (values - self.center) / spread, 0.0).float()
        return Given(context, None if bool(rows.all()) else rows)


def _within(y: Tensor, classes: int) -> bool:
    low, high = torch.aminmax(y) if y.numel() else (0, 0)
    return int(low) >= 0 and int(high) < classes


_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss, F.nll_loss: nn.NLLLoss, F.mse_loss: nn.MSELoss, F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss, F.huber_loss: nn.HuberLoss, F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss, F.poisson_nll_loss: nn.PoissonNLLLoss,
}  # fmt: skip
_OF_LABELS = (nn.CrossEntropyLoss, nn.NLLLoss)


def divisor_of(loss_fn: LossFn | None, y: Any, divisor: Divisor = None, *, below: int = 0) -> float:
    """The number that a loss divides the sum over samples by, so that times it a gradient is that of one sample.

    Parameters
    ----------
    loss_fn
        ``torch.nn.CrossEntropyLoss(...)``, ``torch.nn.functional.mse_loss`` and so on, also in ``functools.partial``:
        the divisor is read from them. Of cross-entropy it is the number of labels that are not ignored, or the sum of
        their class weights; of elementwise losses the number of targets; of ``reduction="sum"`` 1.
    y
        The batch's targets.
    divisor
        For losses that cannot be read: a number, ``"samples"`` (the batch size), ``"sum"`` (1), or a function of y.
    below
        If all targets are known to be labels from 0 to below this number, none is looked at where the loss ignores
        none of these.

    Raises
    ------
    InvalidInput
        For a loss that is neither known nor described.

    Examples
    --------
    >>> divisor_of(F.cross_entropy, torch.tensor([0, 1, -100]))
    2.0
    >>> divisor_of(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), torch.tensor([0, 0, 0, 1]))
    6.0
    """
    if divisor is not None:
        if callable(divisor):
            return checks.positive("the divisor", divisor(y))
        if divisor == "sum":
            return 1.0
        return float(len(y)) if divisor == "samples" else checks.positive("divisor", divisor)
    plain = type(loss_fn) is nn.CrossEntropyLoss and loss_fn.reduction == "mean" and loss_fn.weight is None
    if below and plain and not 0 <= loss_fn.ignore_index < below:  # type: ignore[union-attr]
        return float(y.numel())
    kind, settings = _read(loss_fn)
    if kind is None:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise InvalidInput(
            f"how the loss {name!r} averages cannot be read, and a synthesizer must learn gradients of single samples: "
            "say divisor='samples' for a mean over the batch, 'sum' for a sum, or give a number or a function of y."
        )
    reduction = settings.get("reduction", "mean")
    if reduction == "none":
        raise InvalidInput("the loss has reduction='none'; it must give one number: use 'mean' or 'sum'.")
    if reduction == "sum":
        return 1.0
    if not isinstance(y, Tensor):
        raise InvalidInput(
            f"what the loss divides by is read from targets that are a tensor, not {type(y).__name__}: convert them, "
            "or say divisor."
        )
    if kind not in _OF_LABELS or y.is_floating_point():
        per = 1 if kind not in _OF_LABELS else y.shape[1]  # class probabilities (N, C, ...)
        return float(y.numel()) / per
    counted = y != settings.get("ignore_index", -100)
    weight = settings.get("weight")
    total = float(counted.sum() if weight is None else weight[y[counted]].sum())
    return total if total > 0 else 1.0  # no label at all: every gradient is zero or NaN, whatever it is divided by


def unlabelled(loss_fn: LossFn | None, y: Any) -> bool:
    """Whether every label of a batch is one that torch's cross-entropy ignores, so that its mean is of nothing."""
    kind, settings = _read(loss_fn)
    if kind not in _OF_LABELS or y.is_floating_point() or not y.numel():
        return False
    return not bool((y != settings.get("ignore_index", -100)).any())


def losses_of_samples(loss_fn: LossFn | None, output: Any, y: Any) -> Tensor:
    """Losses (B,) of single samples; of more than one target each, their mean.

    Raises
    ------
    InvalidInput
        For a loss of the user's own, which gives one number only.
    """
    kind, settings = _read(loss_fn)
    if kind is None:
        raise InvalidInput(
            "credit='critic' predicts the losses of single samples, which only torch's own losses "
            "(nn.CrossEntropyLoss, F.mse_loss, ...) give."
        )
    with torch.no_grad():
        losses: Tensor = kind(**{**settings, "reduction": "none"})(output, y)
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


@cache
def _settings(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind).parameters)


def _read(loss_fn: Any) -> tuple[type[nn.Module] | None, dict[str, Any]]:
    if type(loss_fn) in _FUNCTIONS.values():
        kind: Any = type(loss_fn)
        return kind, {n: getattr(loss_fn, n) for n in _settings(kind) if hasattr(loss_fn, n)}
    given: dict[str, Any] = {}
    while isinstance(loss_fn, partial):
        given = {**loss_fn.keywords, **given}
        loss_fn = loss_fn.func
    return (_FUNCTIONS[loss_fn], given) if loss_fn in _FUNCTIONS else (None, {})
