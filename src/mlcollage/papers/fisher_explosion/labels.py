"""The labels that a penalty's gradients are taken for, and what can be wrong with logits and labels."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput

__all__ = ["SOURCES", "check_alike", "check_logits", "check_true_labels", "derive", "sample_labels", "stream"]

SOURCES = ("model", "true", "uniform")


def derive(seed: int, *key: int) -> int:
    """A seed that depends on the seed and the key (rank, step, ...) only.

    Drawing each step's labels from a stream of its own is what lets a resumed training go on with the same numbers.
    """
    state = seed & 0xFFFFFFFFFFFFFFFF
    for number in key:  # rounds of splitmix64
        state = (state * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return state & 0x7FFFFFFFFFFFFFFF


def stream(seed: int, *key: int) -> torch.Generator:
    """A generator on the CPU, seeded by :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *key))


@torch.no_grad()
def sample_labels(logits: Tensor, source: str, generator: torch.Generator) -> Tensor:
    r"""Labels :math:`\hat y_i \sim p_\theta(\cdot \mid x_i)`, or uniform over the classes.

    Drawn by inverting the distribution function at uniform numbers of the generator, so that the same generator gives
    the same labels on every device.

    Parameters
    ----------
    logits
        Shape (B, C).
    source
        ``"model"`` or ``"uniform"``.
    generator
        On any device.

    Returns
    -------
    Tensor
        Class numbers (B,), int64, on the logits' device.

    Examples
    --------
    >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    >>> sample_labels(logits, "model", torch.Generator().manual_seed(0)).tolist()
    [0, 1]
    """
    b, classes = logits.shape
    u = torch.rand(b, 1, generator=generator, device=generator.device, dtype=torch.float64).to(logits.device)
    if source == "uniform":
        return (u[:, 0] * classes).long().clamp_(max=classes - 1)
    # Cumulative sums of many classes want double precision; devices without it get single.
    kind = torch.float32 if logits.device.type == "mps" else torch.float64
    below = logits.to(kind).softmax(-1).cumsum(-1) < u.to(kind)
    return below.sum(-1).clamp_(max=classes - 1)


def check_logits(logits: Tensor, *, first: bool) -> None:
    """Refuse what cannot be the logits (B, C) of a batch; the dearer checks only on the ``first`` active step."""
    if not isinstance(logits, Tensor):
        raise InvalidInput(
            f"logits must be a tensor (B, C), not {type(logits).__name__}; from a Hugging Face model pass .logits."
        )
    if logits.ndim != 2:
        raise InvalidInput(
            f"logits must have shape (B, C), but have {tuple(logits.shape)}; flatten tokens or pixels into the batch, "
            "as in logits.reshape(-1, C)."
        )
    b, classes = logits.shape
    if classes < 2:
        raise InvalidInput(
            f"logits of shape {tuple(logits.shape)} have one class, whose probability is always 1 and Tr(F) always 0; "
            "give a binary classifier two logits, as in torch.cat([torch.zeros_like(z), z], 1)."
        )
    if b == 0:
        raise InvalidInput("the batch is empty; skip the step.")
    if not logits.is_floating_point():
        raise InvalidInput(f"logits must be floating point numbers, not {logits.dtype}.")
    values = logits.detach()
    if not bool(values.isfinite().all()):
        raise InvalidInput(
            f"{int((~values.isfinite()).sum())} of {values.numel()} logits are NaN or infinite; lower the learning "
            "rate or alpha, or look for such values in the data."
        )
    if first and bool((values >= 0).all()):
        sums = values.double().sum(-1)
        if bool((sums - 1).abs().max() < (1e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-4)):
            raise InvalidInput(
                "every row of the logits is non-negative and sums to 1: these are probabilities; pass the values "
                "before the softmax."
            )


def check_true_labels(y: Tensor | None, logits: Tensor) -> Tensor:
    """The data set's labels (B,), or a sentence on why these cannot be used."""
    b, classes = logits.shape
    if y is None:
        raise InvalidInput("labels='true' penalizes the gradient at the data set's labels; pass them as y.")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim != 1:
        shape = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InvalidInput(
            f"y must hold one class number a sample, integers (B,), not {shape}; soft and multi-label targets have no "
            "single class: use labels='model', which needs no y."
        )
    if len(y) != b:
        raise InvalidInput(f"y holds {len(y)} labels for {b} rows of logits; give one for each.")
    low, high = int(y.min()), int(y.max())
    if low < 0:
        raise InvalidInput(
            f"y holds the label {low}; rows to ignore (ignore_index) must be left out of logits and y, as in "
            "keep = y >= 0; penalty(logits[keep], y=y[keep])."
        )
    if high >= classes:
        raise InvalidInput(f"y holds the label {high}, but there are {classes} classes, counted from 0.")
    return y.to(logits.device).long()


def check_alike(name: str, value: str, known: tuple[str, ...]) -> str:
    """One of the known words."""
    if value not in known:
        raise InvalidInput(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, known))}.")
    return value
