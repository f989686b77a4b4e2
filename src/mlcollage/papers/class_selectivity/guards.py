"""What the regularizer refuses or warns of when it is called: batches, targets and responses it cannot use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mlcollage.data.batches import count_classes
from mlcollage.errors import InvalidInput
from mlcollage.measure.class_means import check_labels
from mlcollage.measure.other_copies import of_another_copy, running_means_of

from .index import is_dense, negative_response

_FEW = 4  # samples per class below which the index is clearly too large


def check_captured(
    kept: Mapping[str, Tensor], targets: Tensor, dense: bool, model: nn.Module, *, attached: bool
) -> None:
    """Activations must be there, with gradients, of the batch that the targets are of."""
    if not kept:
        if not attached:
            raise InvalidInput("the regularizer was removed from the model; attach() puts it back.")
        raise InvalidInput(
            "no activations are there: run the model (itself, not a part of it) once before each call, and choose "
            "layers other than its output, which exclude_output leaves out."
        )
    trains = any(p.requires_grad for p in model.parameters())
    if torch.is_grad_enabled() and trains and not any(h.requires_grad for h in kept.values()):
        raise InvalidInput(
            "the activations were captured without gradients (under torch.no_grad, or of frozen layers only); run "
            "the model with gradients before the term is computed."
        )
    if is_dense(targets) != dense:
        raise InvalidInput(
            f"targets have shape {tuple(targets.shape)}: "
            + ("targets of positions are expected with dense=True." if dense else "use dense=True for them.")
        )
    for name, h in kept.items():
        if h.ndim < 2 or len(h) != len(targets):
            raise InvalidInput(
                f"layer {name!r} gave activations {tuple(h.shape)}, but there are {len(targets)} targets; these "
                "must be those of the batch that the model saw last."
            )


def check_belongs(loss: Tensor, model: nn.Module) -> None:
    """Refuse a loss of another copy of the model, also of one that shares some of its parameters."""
    if of_another_copy([loss], [p for p in model.parameters() if p.requires_grad], running_means_of(model)):
        raise InvalidInput(
            "the loss does not depend on the network that the regularizer reads: make the regularizer for the network "
            "that is trained, not for a copy of it."
        )


def check_targets(
    targets: Tensor, num_classes: int | None, ignore_index: int, *, looking: bool, together: bool
) -> tuple[Tensor, int]:
    """Integer labels as int64, or soft targets as they are, and the number of classes C.

    Parameters
    ----------
    targets
        (N,) or (N, C), with positions (N, ...) or (N, C, ...).
    num_classes
        C, or None: the largest label and one.
    ignore_index
        A label that is left out.
    looking
        Look at the values of labels, for which a GPU makes the host wait.
    together
        Whether class sums are added up over processes, which must agree on C.
    """
    if targets.dtype == torch.bool or targets.is_complex():
        raise InvalidInput(f"targets must be integer labels, or soft targets in a float type, not {targets.dtype}.")
    if targets.is_floating_point():
        if targets.ndim < 2:
            raise InvalidInput(
                f"targets are {targets.dtype} of shape {tuple(targets.shape)}; labels must be integers, and soft "
                "targets (mixup, label smoothing) have shape (N, C)."
            )
        if num_classes is not None and targets.shape[1] != num_classes:
            raise InvalidInput(f"soft targets have {targets.shape[1]} columns, but num_classes={num_classes}.")
        return targets, targets.shape[1]
    if num_classes is None and together:
        raise InvalidInput("with several processes num_classes must be given: batches hold different classes.")
    targets = targets.long()
    classes = num_classes or count_classes([targets], ignore_index)
    if looking:
        check_labels(targets[targets != ignore_index], classes)
    return targets, classes


def check_responses(kept: Mapping[str, Tensor], sums: Tensor, least: Mapping[str, Tensor]) -> None:
    """Responses must be finite and, where ``least`` holds a layer's smallest, not negative."""
    if not bool(sums.detach().sum().isfinite()):  # any response that is not finite shows in its sum
        for name, h in kept.items():
            if not bool(h.detach().isfinite().all()):
                raise InvalidInput(
                    f"layer {name!r} gave NaN or infinite activations; lower the learning rate or alpha."
                )
    for name, value in least.items():
        if name in kept and float(value) < 0:
            raise negative_response(f"layer {name!r}", float(value))


def check_classes(counts: Tensor, min_per_class: int) -> None:
    """Counts (C, 1) or (C, U) must have two classes that are large enough, in every layer."""
    fewest = int((counts >= min_per_class).sum(dim=0).min())
    if fewest < 2:
        raise InvalidInput(
            f"the selectivity index needs at least 2 classes with {min_per_class} samples or more; the batch has "
            f"{fewest}. Use larger or mixed batches, or a memory."
        )


def warn_of_few(counts: Tensor, index: Callable[[Tensor], Tensor], targets: Tensor) -> bool:
    """Warn of batches that overstate selectivity, and say by how much; whether there was reason to.

    Parameters
    ----------
    counts
        (C, 1) samples of each class.
    index
        Gives the indices (U,) with other targets.
    targets
        (N,) or (N, C), which are shuffled.
    """
    typical = float(counts[counts > 0].median())
    if typical >= _FEW:
        return False
    with torch.no_grad():
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).to(targets.device)
        left = float(index(targets[order]).mean())
    warnings.warn(
        f"the median class has {typical:g} samples in this batch, so selectivity is overstated: with the labels "
        f"shuffled the mean index of a unit is still {left:.2f}. Use larger batches, or a memory.",
        UserWarning,
        stacklevel=6,
    )
    return True
