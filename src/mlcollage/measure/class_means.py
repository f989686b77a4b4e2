"""Mean response of every unit to every class, over data that come in batches, on one process or many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.data.batches import fit_mask
from mlcollage.errors import InvalidInput
from mlcollage.measure.representation import as_samples, masked_mean, resolve_unit_axis

__all__ = ["ClassMeans"]


class ClassMeans:
    r"""Streaming class-conditional means of units.

    .. math:: \mu_{cu} = \frac{\sum_n w_{nc}\, a_{nu}}{\sum_n w_{nc}}, \qquad
              w_{nc} = \mathbb{1}[y_n = c] \text{ or the soft target of sample } n

    Sums are float64 whatever the activations' type, so the order and size of batches do not matter. States are added
    with :meth:`merge`; :meth:`sync` adds those of all processes.

    Parameters
    ----------
    num_classes
        C. Any discrete concept will do: classes, depth bins, segments.
    device
        Where the sums live; by default where the first activations are.
    ignore_index
        Label of samples or pixels to leave out, as in ``torch.nn.CrossEntropyLoss``.

    Attributes
    ----------
    sums
        (C, U) float64, or None before the first update.
    counts
        (C,) float64: samples of each class, or sums of soft targets.

    Examples
    --------
    >>> means = ClassMeans(2)
    >>> means.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
    >>> means.compute()
    tensor([[2., 0.],
            [0., 5.]], dtype=torch.float64)
    """

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None, ignore_index: int = -100) -> None:
        self.num_classes = checks.integer("num_classes", num_classes, least=1)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        self._device = None if device is None else torch.device(device)
        self.sums: Tensor | None = None
        self.counts = torch.zeros(self.num_classes, dtype=torch.float64, device=self._device)

    def update(
        self, acts: Tensor, targets: Tensor, *, unit_axis: int | None = None, mask: Tensor | None = None
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        acts
            (N, U), feature maps (N, U, H, W) or, with ``unit_axis=-1``, tokens (N, T, U), of any float type.
        targets
            Integer labels (N,): feature maps are averaged over space first. Labels per position (N, H, W) or (N, T):
            each position counts as a sample. Soft targets (N, C), or (N, C, H, W) and (N, T, C) per position, in a
            float type: they weigh.
        unit_axis, mask
            As in :func:`~mlcollage.measure.representation.as_samples`.

        Raises
        ------
        InvalidInput
            For targets out of range, shapes that do not fit, and activations that are not finite.
        """
        # (M, U) and labels (M,) or weights (M, C), with M samples or positions
        rows, weights = rows_and_weights(
            acts.detach(), targets, self.num_classes, unit_axis=unit_axis, mask=mask, ignore_index=self.ignore_index
        )
        rows = rows.cpu() if rows.device.type == "mps" else rows  # Apple's GPUs have no float64
        if not bool(rows.isfinite().all()):
            raise InvalidInput(f"{int((~rows.isfinite()).sum())} activations are NaN or infinite; look at the layer.")
        device = self._device or rows.device
        rows = rows.to(device, torch.float64)
        weights = weights.to(device)
        if self.sums is None:
            self.sums = torch.zeros(self.num_classes, rows.shape[1], dtype=torch.float64, device=device)
            self.counts = self.counts.to(device)
        if self.sums.shape[1] != rows.shape[1]:
            raise InvalidInput(f"earlier batches had {self.sums.shape[1]} units, this one has {rows.shape[1]}.")
        if weights.is_floating_point():
            weights = weights.double()
            self.sums += weights.T @ rows  # (C, M) by (M, U)
            self.counts += weights.sum(0)
            return
        keep = weights != self.ignore_index  # (M,)
        if not bool(keep.all()):
            rows, weights = rows[keep], weights[keep]
        check_labels(weights, self.num_classes)
        self.sums.index_add_(0, weights, rows)
        self.counts += torch.bincount(weights, minlength=self.num_classes)

    def merge(self, other: ClassMeans) -> ClassMeans:
        """Add what another state has seen, in place; returns this state."""
        if other.num_classes != self.num_classes:
            raise InvalidInput(f"a state of {other.num_classes} classes cannot be added to one of {self.num_classes}.")
        if other.sums is None:
            return self
        if self.sums is None:
            self.sums, self.counts = other.sums.clone(), other.counts.clone()
            return self
        if other.sums.shape != self.sums.shape:
            raise InvalidInput(
                f"a state of {other.sums.shape[1]} units cannot be added to one of {self.sums.shape[1]}."
            )
        self.sums += other.sums.to(self.sums.device)
        self.counts += other.counts.to(self.counts.device)
        return self

    def sync(self, group: Any = None) -> ClassMeans:
        """The state of all processes of a ``torch.distributed`` group together, as a new one.

        Every process must call it and have seen a batch; each gets the same result. This state stays local, so calling
        it again later counts nothing twice. Without a process group it is a copy.
        """
        total = ClassMeans(self.num_classes, device=self._device, ignore_index=self.ignore_index).merge(self)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return total
        if total.sums is None:
            raise InvalidInput("this process has seen no batch, so the number of units is not known; update it first.")
        # Sums and counts add up, means would not.
        for tensor in (total.sums, total.counts):
            torch.distributed.all_reduce(tensor, group=group)
        return total

    def compute(self) -> Tensor:
        """Means (C, U) in float64; NaN for classes that were not seen."""
        if self.sums is None:
            raise InvalidInput("no batch has been seen; call update first.")
        return self.sums / self.counts[:, None]  # 0 / 0 for a class without samples

    def __repr__(self) -> str:
        units = "no" if self.sums is None else self.sums.shape[1]
        return f"ClassMeans({self.num_classes} classes, {units} units, {float(self.counts.sum()):g} samples)"


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside of 0 to ``num_classes - 1``."""
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise InvalidInput(
            f"targets run from {int(labels.min())} to {int(labels.max())}, but num_classes={num_classes} allows 0 to "
            f"{num_classes - 1}; what is not to be counted is named by ignore_index."
        )


def rows_and_weights(
    acts: Tensor,
    targets: Tensor,
    num_classes: int,
    *,
    unit_axis: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Rows (M, U), and labels (M,) or weights (M, C) for them, as :meth:`ClassMeans.update` takes them; differentiable.

    Rows that the mask leaves out stay, with the label ``ignore_index`` or weights of 0.
    """
    axis = resolve_unit_axis(acts, unit_axis)
    if not acts.is_floating_point():
        raise InvalidInput(f"activations must be floating-point numbers, not {acts.dtype}.")
    soft = targets.is_floating_point()
    if targets.dtype == torch.bool or targets.is_complex():
        raise InvalidInput(f"targets must be integer labels, or soft targets in a float type, not {targets.dtype}.")
    grid = [size for d, size in enumerate(acts.shape) if d not in (0, axis)]  # of positions: (H, W), (T,) or none
    # Soft targets have their classes where the activations have their units.
    dense = [acts.shape[0], *grid]
    if soft:
        dense.insert(axis, num_classes)
    flat = [acts.shape[0], num_classes] if soft else [acts.shape[0]]
    shape = list(targets.shape)
    if grid and shape == dense:
        rows = as_samples(acts, "positions", unit_axis=axis)
        keep = None if mask is None else fit_mask(mask.to(acts.device), grid).flatten()
        # (N, C, H, W) to (N * H * W, C), in the order of the rows
        weights = targets.movedim(axis, -1).flatten(0, -2) if soft else targets.flatten()
    elif shape == flat:
        whole = None if mask is None else fit_mask(mask.to(acts.device), grid)
        rows = (
            as_samples(acts, unit_axis=axis) if whole is None or not grid else masked_mean(acts.movedim(axis, 1), whole)
        )
        weights, keep = targets, None if whole is None else whole.flatten(1).any(1) if grid else whole
    else:
        raise InvalidInput(
            f"targets of shape {tuple(shape)} do not fit activations {tuple(acts.shape)}; expected "
            f"{_either(flat, dense)}{' in a float type' if soft else ' of integers'}."
        )
    if soft:
        if bool((weights < 0).any()) or not bool(weights.isfinite().all()):
            raise InvalidInput("soft targets must be finite and not negative.")
    else:
        weights = weights.long()
    if keep is not None:
        rows = torch.where(keep[:, None], rows, 0.0)  # it may be NaN
        weights = weights * keep[:, None] if soft else weights.masked_fill(~keep, ignore_index)
    return rows, weights


def _either(flat: list[int], dense: list[int]) -> str:
    return f"{tuple(flat)}" if flat == dense else f"{tuple(flat)} or, a target for each position, {tuple(dense)}"
