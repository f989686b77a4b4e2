r"""Losses: PPO's clipped surrogate, and Alice's behavioral cloning, which is the same surrogate with advantage 1."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .inputs import flags, floats, same_shape

Clip = Literal["upper", "two_sided", "none", "log"]

_HIGHEST = 80.0  # of a logarithm of a ratio: above, exp is infinite in float32 and the gradient behind a clip NaN

__all__ = ["PPOTerms", "abc_loss", "clip_share", "masked_mean", "ppo_loss"]


def masked_mean(x: Tensor, mask: Tensor | None = None, dim: int | None = None) -> Tensor:
    """The mean of ``x`` where ``mask`` is True, over all entries or one dimension; 0 where nothing is left.

    Examples
    --------
    >>> float(masked_mean(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, True, False])))
    3.0
    """
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    kept = torch.where(mask, x, torch.zeros_like(x))
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def abc_loss(
    logp_new: Tensor,
    logp_old: Tensor | None,
    mask: Tensor | None = None,
    *,
    eps: float = 0.2,
    clip: Clip = "upper",
    dim: int | None = None,
) -> Tensor:
    r"""Alice behavioral cloning: Bob's clipped imitation of what Alice did on the way to a goal that he missed.

    .. math::

        L_{\text{abc}} = -\operatorname{E}_{(s, g, a) \in D_{BC}} \bigl[ \min(r, 1 + \varepsilon) \bigr], \qquad
        r = \frac{\pi_B(a \mid s, g; \theta)}{\pi_B(a \mid s, g; \theta_{\text{old}})}

    Add :math:`\beta L_{\text{abc}}`, with :math:`\beta = 0.5` in the paper, to the loss of any PPO. At
    :math:`\theta_{\text{old}}` its gradient is that of plain cloning; an action that has become :math:`1 + \varepsilon`
    times as likely pulls no further in this optimization.

    Parameters
    ----------
    logp_new
        (N,): log-probabilities of Alice's actions under Bob's present policy, with the goal that she reached. For
        actions of several heads, the sum over the heads. Of a policy with a memory: in the memory that Bob himself
        would have had on her way, from its beginning; sequences (n, T) are flattened, as their mask is.
    logp_old
        (N,): the same under the policy that Bob acted with when the demonstration was collected; no gradient. Keep it
        in float32 at least.
    mask
        (N,) bool: True for real rows. The mean is over these only, and 0 (not NaN) where there is none.
    eps
        :math:`\varepsilon`, 0.2 in the paper.
    clip
        ``"upper"`` (default): as above, PPO's surrogate with advantage 1. ``"two_sided"``:
        :math:`-\operatorname{E}[\operatorname{clip}(r, 1 - \varepsilon, 1 + \varepsilon)]`, the paper's formula to the
        letter, which has no gradient below :math:`1 - \varepsilon` either: Bob then never learns actions that he has
        become unlikely to take. ``"none"``: :math:`-\operatorname{E}[r]`, the ablation. ``"log"``: plain behavioral
        cloning, :math:`-\operatorname{E}[\log \pi_B]`, which reads no ``logp_old``.
    dim
        None (default) gives one number. ``-1`` gives a mean over the last dimension for each of the others: (R, N) to
        (R,) for R networks trained as one.

    Returns
    -------
    Tensor
        A number, or one for each row.

    Raises
    ------
    InvalidInput
        For shapes that differ, tensors of more dimensions than one without ``dim`` (sum over heads first), half
        precision, a missing ``logp_old``, what is no tensor, masks that are not bool, and settings out of range.

    References
    ----------
    Plappert et al., "Asymmetric self-play for automatic goal discovery in robotic manipulation", 2021,
    arXiv:2101.04882, section 3.3.

    Examples
    --------
    >>> new = torch.tensor([0.5, 1.0, 1.3, 9.0]).log().requires_grad_()
    >>> loss = abc_loss(new, torch.zeros(4), torch.tensor([True, True, True, False]))
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(float(g), 4) for g in new.grad]
    (-0.9, [-0.1667, -0.3333, 0.0, 0.0])
    """
    checks.real("eps", eps, above=0)
    checks.choice("clip", clip, ("upper", "two_sided", "none", "log"))
    if logp_old is None:
        if clip != "log":
            raise InvalidInput(
                "abc_loss needs logp_old, Bob's log-probabilities of Alice's actions when the demonstration was "
                "collected; or take plain cloning, clip='log', which needs none."
            )
        floats(logp_new=logp_new)
        logp_old = logp_new.detach()
    _check_logp(logp_new, logp_old, mask, dim)
    if clip == "log":
        return -masked_mean(logp_new, mask, dim)
    # Zero where masked before exp: an infinite ratio of padding would give NaN gradients through where.
    gap = logp_new - logp_old.detach()
    if mask is not None:
        gap = torch.where(mask, gap, torch.zeros_like(gap))
    r = gap.clamp(max=_HIGHEST).exp()
    if clip == "upper":
        r = r.clamp(max=1 + eps)
    elif clip == "two_sided":
        r = r.clamp(1 - eps, 1 + eps)
    return -masked_mean(r, mask, dim)


class PPOTerms(NamedTuple):
    """The terms of PPO's loss; ``total`` has the weights in it."""

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor


def ppo_loss(
    logp_new: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    *,
    values: Tensor | None = None,
    returns: Tensor | None = None,
    values_old: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 0.2,
    entropy_weight: float = 0.01,
    value_weight: float = 1.0,
    dim: int | None = None,
) -> PPOTerms:
    r"""PPO's loss, as something to add to: no loop, no network, no optimizer.

    .. math::

        L = \operatorname{E} \bigl[ \max(-r \hat A, -\operatorname{clip}(r, 1 - \varepsilon, 1 + \varepsilon) \hat A)
        \bigr] + c_v \tfrac12 \operatorname{E} \bigl[ (V - \hat R)^2 \bigr] - c_e \operatorname{E}[H]

    Parameters
    ----------
    logp_new, logp_old, advantages
        (N,): log-probabilities under the present policy and under the one that acted, and :func:`gae` advantages,
        standardized or not (:func:`standardize_advantages`).
    values, returns
        (N,): the present value estimates and their targets; without them there is no value term.
    values_old
        (N,): the estimates when the data was collected: clips the change of the value by ``eps``.
    entropy
        (N,): entropy of the policy in each row, summed over heads; without it there is no such term.
    mask
        (N,) bool: True for real rows, over which all means are taken.
    eps, entropy_weight, value_weight
        :math:`\varepsilon`, :math:`c_e`, :math:`c_v`: 0.2, 0.01 and 1.0 in the paper.
    dim
        As for :func:`abc_loss`.

    Returns
    -------
    PPOTerms
        ``total``, ``policy``, ``value`` (without its weight) and ``entropy``.

    Raises
    ------
    InvalidInput
        As :func:`abc_loss`; also for ``values`` without ``returns``, and the other way round.

    References
    ----------
    Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347, equations 7 and 9.

    Examples
    --------
    >>> terms = ppo_loss(torch.tensor([0.5, 2.0]).log(), torch.zeros(2), torch.tensor([1.0, 1.0]))
    >>> round(float(terms.total), 4)
    -0.85
    """
    checks.real("eps", eps, above=0)
    checks.real("entropy_weight", entropy_weight)
    checks.real("value_weight", value_weight)
    _check_logp(logp_new, logp_old, mask, dim)
    rows = {"advantages": advantages, "values": values, "returns": returns, "values_old": values_old}
    floats(**rows, entropy=entropy)
    same_shape("logp_new", logp_new.shape, **rows, entropy=entropy)
    if values is None and (returns is not None or values_old is not None):
        raise InvalidInput("returns and values_old are for the value term: give values too, or leave them out.")
    gap, a = logp_new - logp_old.detach(), advantages.detach()
    if mask is not None:
        gap, a = (torch.where(mask, t, torch.zeros_like(t)) for t in (gap, a))
    r = gap.clamp(max=_HIGHEST).exp()
    policy = masked_mean(torch.maximum(-a * r, -a * r.clamp(1 - eps, 1 + eps)), mask, dim)
    zero = torch.zeros_like(policy)
    value = zero if values is None else _value_term(values, returns, values_old, mask, eps, dim)
    spread = zero if entropy is None else masked_mean(entropy, mask, dim)
    return PPOTerms(policy + value_weight * value - entropy_weight * spread, policy, value, spread)


def _value_term(
    values: Tensor, returns: Tensor | None, old: Tensor | None, mask: Tensor | None, eps: float, dim: int | None
) -> Tensor:
    if returns is None:
        raise InvalidInput("values need their targets: give returns, the second result of gae.")
    if mask is not None:  # NaN in padding would come back in the gradient, as 0 * NaN
        values, returns = (torch.where(mask, t, torch.zeros_like(t)) for t in (values, returns))
        old = None if old is None else torch.where(mask, old, torch.zeros_like(old))
    square = (values - returns.detach()).square()
    if old is not None:
        old = old.detach()
        square = torch.maximum(square, (old + (values - old).clamp(-eps, eps) - returns.detach()).square())
    return 0.5 * masked_mean(square, mask, dim)


def clip_share(logp_new: Tensor, logp_old: Tensor, mask: Tensor | None = None, eps: float = 0.2) -> Tensor:
    r"""Share of rows whose ratio lies further than :math:`\varepsilon` from 1: a gauge of how far a policy has moved.

    Examples
    --------
    >>> float(clip_share(torch.tensor([1.0, 1.1, 1.3, 0.7]).log(), torch.zeros(4)))
    0.5
    """
    _check_logp(logp_new, logp_old, mask, -1)
    outside = ((logp_new - logp_old).exp() - 1).abs() > eps
    return masked_mean(outside.to(logp_new.dtype), mask)


def _check_logp(new: Tensor, old: Tensor, mask: Tensor | None, dim: int | None) -> None:
    floats(logp_new=new, logp_old=old)
    if dim not in (None, -1):
        raise InvalidInput(f"dim must be None, for one number, or -1, for a number of each row; it is {dim!r}.")
    if dim is None and new.ndim != 1:
        raise InvalidInput(
            f"log-probabilities have shape {tuple(new.shape)}; expected (N,), one number for each action. Sum over the "
            "heads of an action first: clipping head by head is another loss. Sequences (n, T) and their mask are "
            "flattened, or give dim=-1 for one number of each row."
        )
    flags(mask=mask)
    same_shape("logp_new", new.shape, logp_old=old, mask=mask)
    if old.dtype in (torch.float16, torch.bfloat16):
        raise InvalidInput(
            f"logp_old is {old.dtype}, whose rounding moves ratios by up to 3 % for an unchanged policy; keep it in "
            "float32, also under autocast."
        )
