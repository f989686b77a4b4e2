"""Generalized advantage estimates over steps that end by themselves, are cut by a limit, or go on."""

from __future__ import annotations

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .inputs import flags, floats

__all__ = ["gae", "standardize_advantages"]


def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    *,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 0.998,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns of steps in order of time.

    .. math::

        \hat A_t = \delta_t + \gamma \lambda \, c_t \hat A_{t+1}, \qquad
        \delta_t = r_t + \gamma v_{t+1} - V(s_t), \qquad
        \hat R_t = \hat A_t + V(s_t)

    where :math:`c_t = 0` after a step that ended an episode in either way, else 1, and :math:`v_{t+1}` is 0 after a
    terminated step, ``final_values[t]`` after a truncated one, else :math:`V(s_{t+1})`. A step with both flags is
    terminated.

    Parameters
    ----------
    rewards, values
        (T, ...): :math:`r_t` of the step taken at t, and :math:`V(s_t)` of the observation before it.
    terminated
        (T, ...) bool: the action at t ended the episode (not: observation t begins one).
    truncated
        (T, ...) bool: the action at t was the last that a limit allowed.
    final_values
        (T, ...): where truncated, the value of the true last observation, before any reset. Elsewhere not read.
    next_value
        (...): value of the observation after the last row; 0 by default, for episodes that all end in the rows.
    gamma, lam
        :math:`\gamma` in (0, 1] and :math:`\lambda` in [0, 1]; the paper's 0.998 and 0.95.

    Returns
    -------
    tuple of Tensor
        Advantages and returns, (T, ...). Rows after an episode's end hold nothing of it.

    Raises
    ------
    InvalidInput
        For shapes that differ, flags that are not bool, no step at all, truncated steps without
        ``final_values``, and numbers out of range.

    References
    ----------
    Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", ICLR 2016,
    arXiv:1506.02438, equation 16.

    Examples
    --------
    >>> r, v = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.4, 0.3])
    >>> cut = torch.tensor([False, False, True])
    >>> advantages, _ = gae(r, v, torch.zeros(3, dtype=torch.bool), truncated=cut,
    ...                     final_values=torch.full((3,), 0.7), gamma=0.9, lam=0.8)
    >>> [round(float(a), 6) for a in advantages]
    [0.455872, 0.8276, 1.33]
    """
    checks.real("gamma", gamma, above=0, most=1)
    checks.probability("lam", lam, inside=False)
    floats(rewards=rewards, values=values, final_values=final_values, next_value=next_value)
    flags(terminated=terminated, truncated=truncated)
    if not rewards.ndim or not len(rewards):
        raise InvalidInput(f"rewards have shape {tuple(rewards.shape)}; steps come first: (T, environments).")
    if next_value is not None and next_value.shape != rewards.shape[1:]:
        raise InvalidInput(f"next_value has shape {tuple(next_value.shape)}; expected {tuple(rewards.shape[1:])}.")
    _same_shapes(rewards, values=values, terminated=terminated, truncated=truncated, final_values=final_values)
    if truncated is not None and final_values is None:
        raise InvalidInput(
            "truncated steps go on from the value of their last observation: give it as final_values, or count a time "
            "limit as the end by adding these flags to terminated."
        )
    ended = terminated
    cut = torch.zeros_like(ended) if truncated is None else truncated & ~ended
    after = torch.zeros_like(values[0]) if next_value is None else next_value
    advantage = torch.zeros_like(values[0])
    advantages = torch.empty_like(values)
    for t in range(len(rewards) - 1, -1, -1):
        following = torch.where(ended[t], torch.zeros_like(after), after)
        if final_values is not None:
            following = torch.where(cut[t], final_values[t], following)
        delta = rewards[t] + gamma * following - values[t]
        # NaN in rows beyond an end (padding) must not come back as 0 * NaN.
        carried = torch.where(ended[t] | cut[t], torch.zeros_like(advantage), advantage)
        advantage = delta + gamma * lam * carried
        advantages[t], after = advantage, values[t]
    return advantages, advantages + values


def standardize_advantages(advantages: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Advantages of mean 0 and (unbiased) standard deviation 1 along the last dimension, over real rows only.

    Parameters
    ----------
    advantages
        (..., N).
    mask
        (..., N) bool, True for real rows; padding becomes 0.
    eps
        Added to the standard deviation.

    Returns
    -------
    Tensor
        (..., N). With fewer than two real rows there is no deviation, and these stay as they are.

    Examples
    --------
    >>> real = torch.tensor([True, True, True, False, False])
    >>> standardize_advantages(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]), real).tolist()
    [-1.0, 0.0, 1.0, 0.0, 0.0]
    """
    if mask is None:
        mask = torch.ones_like(advantages, dtype=torch.bool)
    floats(advantages=advantages)
    flags(mask=mask)
    _same_shapes(advantages, mask=mask)
    w = mask.to(advantages.dtype)
    a = torch.where(mask, advantages, torch.zeros_like(advantages))
    count = w.sum(-1, keepdim=True)
    centered = (a - a.sum(-1, keepdim=True) / count.clamp(min=1)) * w
    deviation = (centered.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(mask & (count > 1), centered / (deviation + eps), a)


def _same_shapes(like: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.shape != like.shape:
            raise InvalidInput(
                f"{name} has shape {tuple(value.shape)}, but there are rows of shape {tuple(like.shape)}; steps come "
                "first: (T, environments)."
            )
