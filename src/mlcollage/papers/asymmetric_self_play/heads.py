"""Heads of a policy: categorical ones for choices, Gaussian ones for continuous dimensions of the action."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .inputs import same_shape

__all__ = ["Actions", "action_logp", "checked_bins", "outputs_of", "sample_actions", "stacked_logp"]

_LOG_2PI = math.log(2 * math.pi)


class _Categorical(torch.autograd.Function):
    """Log-probabilities and entropies (...) of choices (..., D) under logits (..., D, bins), summed over heads.

    The same numbers as by single operations, in fewer passes over many short rows.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        log_all = _log_softmax(logits)
        p = log_all.exp()
        spread = -(p * log_all).sum(-1)  # (..., D)
        ctx.save_for_backward(p, log_all, spread, index)
        return _chosen(log_all, index), spread.sum(-1)

    @staticmethod
    def backward(ctx: Any, of_logp: Tensor, of_entropy: Tensor) -> tuple[Tensor, None]:
        p, log_all, spread, index = ctx.saved_tensors
        of_logp, of_entropy = of_logp[..., None, None], of_entropy[..., None, None]
        # d logp = onehot - p; dH = -p (log p + H)
        grad = (log_all + spread[..., None]).mul_(of_entropy).add_(of_logp).mul_(p).neg_()
        grad.scatter_add_(-1, index[..., None], of_logp.expand(*index.shape, 1).contiguous())
        return grad, None


class Actions(NamedTuple):
    """Actions (..., D) and their log-probabilities (...), summed over the D heads."""

    choice: Tensor
    logp: Tensor


def outputs_of(bins: Sequence[int]) -> int:
    """Outputs that a policy needs: one for each choice, two (mean, log-standard deviation) for a continuous dimension.

    Examples
    --------
    >>> outputs_of((5, 5)), outputs_of((0, 0, 3))
    (10, 7)
    """
    return sum(b or 2 for b in bins)


def checked_bins(bins: Any) -> tuple[int, ...]:
    """Choices of each dimension of an action: 2 at least, or 0 for a continuous one.

    Examples
    --------
    >>> checked_bins([5, 0])
    (5, 0)
    """
    if not isinstance(bins, Sequence) or isinstance(bins, str) or not len(bins):
        raise InvalidInput(f"bins must be the choices of each dimension of the action, such as (5, 5), not {bins!r}.")
    if 1 in bins:
        raise InvalidInput(f"bins {tuple(bins)} have a dimension of one choice; take 2 or more, or 0 for continuous.")
    return tuple(checks.integer("bins", b, least=0) for b in bins)


def sample_actions(logits: Tensor, bins: Sequence[int], noise: Tensor | None = None) -> Actions:
    r"""Draw an action for each row of a policy's outputs.

    .. math::

        a_d = \operatorname{argmax}(\ell_d - \log(-\log u)) \quad \text{or} \quad
        a_d = \mu_d + \sigma_d \sqrt{-2 \log u} \, \cos(2 \pi u')

    Parameters
    ----------
    logits
        (..., outputs): logits of each categorical head, or the mean of each continuous one (``bins`` of 0), in order;
        then the log-standard deviations of the continuous ones. Their number is the sum of ``bins``, where 0 counts 2.
    bins
        Choices of each head; 0 for a Gaussian.
    noise
        Uniform numbers in [0, 1) of the shape of the logits; None takes the likeliest action.

    Returns
    -------
    Actions
        (..., D), and log-probabilities (...). Whole numbers; floating-point ones if any head is continuous, which are
        not bounded: keep what was drawn, and clip only what goes to the world.

    Raises
    ------
    InvalidInput
        For outputs of another number, and noise of another shape.

    Examples
    --------
    >>> sample_actions(torch.tensor([[0.0, 9.0, 1.0, 0.0, 0.0]]), (2, 3)).choice.tolist()
    [[1, 0]]
    >>> sample_actions(torch.tensor([[0.3, -1.0]]), (0,)).choice
    tensor([[0.3000]])
    """
    _check_outputs(logits, bins)
    same_shape("logits", logits.shape, noise=noise)
    u = None if noise is None else noise.clamp(1e-7, 1 - 1e-7)
    if _alike(bins) and bins[0]:  # one operation for all heads
        shape = (len(bins), bins[0])
        scores = logits if u is None else logits - (-u.log()).log()
        choice = scores.unflatten(-1, shape).argmax(-1)
        return Actions(choice, _chosen(_log_softmax(logits.unflatten(-1, shape)), choice))
    parts, spread = _parts(logits, bins)
    noises = [None] * len(bins) if u is None else _parts(u, bins)[0]
    angles = None if u is None else _parts(u, bins)[1]
    drawn: list[Tensor] = []
    number = 0  # of continuous heads so far
    for part, own, b in zip(parts, noises, bins, strict=True):
        if b:
            drawn.append((part if own is None else part - (-own.log()).log()).argmax(-1))
            continue
        value = part.squeeze(-1)
        if own is not None and angles is not None:
            normal = (-2 * own.squeeze(-1).log()).sqrt() * (2 * math.pi * angles[..., number]).cos()
            value = value + spread[..., number].exp() * normal
        number += 1
        drawn.append(value)
    choice = torch.stack([d.to(logits.dtype) if 0 in bins else d for d in drawn], -1)
    return Actions(choice, action_logp(logits, choice, bins)[0])


def action_logp(logits: Tensor, index: Tensor, bins: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""Log-probability and entropy (...) of actions (..., D) under a policy's outputs, summed over heads.

    .. math::

        \log \pi(a) = \sum_d \log \operatorname{softmax}(\ell_d)_{a_d} \quad \text{or} \quad
        \log \pi(a) = -\sum_d \Bigl[ \tfrac12 \Bigl( \frac{a_d - \mu_d}{\sigma_d} \Bigr)^2
        + \log \sigma_d + \tfrac12 \log 2 \pi \Bigr]

    Logits of minus infinity are choices that a mask forbids: they add nothing to the entropy, and get no gradient.

    Parameters
    ----------
    logits, bins
        As for :func:`sample_actions`.
    index
        (..., D): whole numbers, or floating-point ones if any head is continuous, as they were drawn.

    Raises
    ------
    InvalidInput
        For outputs of another number, and actions of another shape or kind.

    Examples
    --------
    >>> logp, entropy = action_logp(torch.zeros(1, 4), torch.tensor([[0, 1]]), (2, 2))
    >>> round(float(logp), 4), round(float(entropy), 4)
    (-1.3863, 1.3863)
    >>> round(float(action_logp(torch.zeros(1, 2), torch.tensor([[1.8]]), (0,))[0]), 4)
    -2.5389
    """
    _check_outputs(logits, bins)
    continuous = 0 in bins
    if index.shape != (*logits.shape[:-1], len(bins)) or index.is_floating_point() != continuous:
        kind = "floating-point" if continuous else "whole"
        raise InvalidInput(
            f"actions are {index.dtype} {tuple(index.shape)}; expected {kind} numbers "
            f"{(*logits.shape[:-1], len(bins))}, one for each head."
        )
    if _alike(bins) and bins[0]:  # one operation for all heads
        part = _log_softmax(logits.unflatten(-1, (len(bins), bins[0])))  # (..., D, bins)
        return _chosen(part, index), -(part.exp() * part).sum((-1, -2))
    parts, spread = _parts(logits, bins)
    logp = entropy = torch.zeros(logits.shape[:-1], dtype=logits.dtype, device=logits.device)
    number = 0
    for d, (part, b) in enumerate(zip(parts, bins, strict=True)):
        if b:
            log_all = _log_softmax(part)
            logp = logp + log_all.gather(-1, index[..., d : d + 1].long()).squeeze(-1)
            entropy = entropy - (log_all.exp() * log_all).sum(-1)
            continue
        log_sigma = spread[..., number]
        away = (index[..., d] - part.squeeze(-1)) * (-log_sigma).exp()
        logp = logp - 0.5 * away.square() - log_sigma - 0.5 * _LOG_2PI
        entropy = entropy + log_sigma + 0.5 + 0.5 * _LOG_2PI
        number += 1
    return logp, entropy


def stacked_logp(logits: Tensor, index: Tensor, bins: Sequence[int]) -> tuple[Tensor, Tensor]:
    """:func:`action_logp` for a learner's own steps: faster, and differentiable once.

    Examples
    --------
    >>> logp, entropy = stacked_logp(torch.zeros(1, 4), torch.tensor([[0, 1]]), (2, 2))
    >>> round(float(logp), 4), round(float(entropy), 4)
    (-1.3863, 1.3863)
    """
    if not _alike(bins) or not bins[0]:
        return action_logp(logits, index, bins)
    logp, entropy = _Categorical.apply(logits.unflatten(-1, (len(bins), bins[0])), index)
    return logp, entropy


def _alike(bins: Sequence[int]) -> bool:
    return len(set(bins)) == 1


def _parts(outputs: Tensor, bins: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outputs of each head, and what stands at the end, one for each continuous head."""
    sizes = [b or 1 for b in bins]
    return outputs[..., : sum(sizes)].split(sizes, -1), outputs[..., sum(sizes) :]


def _chosen(log_all: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities (...) of choices (..., D), of those (..., D, bins) of all."""
    return log_all.gather(-1, index[..., None]).squeeze(-1).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities; the lowest number for choices of probability 0, since 0 times minus infinity is NaN."""
    logp = logits.log_softmax(-1)
    return logp.masked_fill(logp == -torch.inf, torch.finfo(logp.dtype).min)


def _check_outputs(logits: Tensor, bins: Sequence[int]) -> None:
    if not logits.ndim or not len(bins) or logits.shape[-1] != outputs_of(bins):
        raise InvalidInput(
            f"logits have shape {tuple(logits.shape)}; expected (..., {outputs_of(bins)}) for bins {tuple(bins)}, one "
            "for each choice of each head, and a mean and a log-standard deviation for each continuous one."
        )
