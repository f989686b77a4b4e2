"""Networks over a set of objects: each object is embedded by itself, and the largest embedding of each unit is kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .inputs import same_shape

__all__ = ["Actions", "SetPolicy", "SetValue", "action_logp", "sample_actions"]


class _SetNetwork(nn.Module):
    """Rows of ``[robot | object 1 | object 2 ...]``, each object beginning with 1 (there) or 0 (padding)."""

    def __init__(self, robot: int, features: int, outputs: int, *, embed: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        self.robot = checks.integer("robot", robot, least=0)
        self.features = checks.integer("features", features, least=2)
        wide, deep = widths("embed", embed), widths("hidden", hidden)
        self.embed = _mlp([features - 1, *wide])
        self.body = _mlp([robot + wide[-1], *deep])
        self.head = nn.Linear([robot + wide[-1], *deep][-1], outputs)
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # starts near the uniform policy, and near value 0
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n, outputs) of rows (n, robot + K * features), for any number K of objects."""
        if (x.shape[-1] - self.robot) % self.features or x.shape[-1] <= self.robot:
            raise InvalidInput(
                f"rows have {x.shape[-1]} numbers; expected {self.robot} of the robot and {self.features} for each "
                "object."
            )
        robot, objects = self._parts(x)
        there = objects[..., :1] > 0.5  # (n, K, 1)
        # Padding may hold anything, also NaN, whose gradient of 0 would be NaN. Zeros are put into the whole row, which
        # keeps it in one piece: products of other strides round in another way.
        kept = torch.where(there, objects, torch.zeros_like(objects))
        robot, objects = self._parts(torch.cat((robot, kept.flatten(-2)), -1))
        e = self.embed(objects[..., 1:])  # (n, K, width)
        # Padding must not win the maximum: values of tanh lie above -2.
        e = torch.where(there, e, torch.full_like(e, -2.0)).amax(-2)
        return self.head(self.body(torch.cat((robot, e), -1)))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.robot], x[..., self.robot :].unflatten(-1, (-1, self.features))


def widths(name: str, value: Any) -> tuple[int, ...]:
    """Widths of layers: whole numbers of 1 at least; ``embed`` needs one, ``hidden`` may be empty.

    Examples
    --------
    >>> widths("embed", [64, 32])
    (64, 32)
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or (name == "embed" and not value):
        raise InvalidInput(f"{name} must be the widths of its layers, such as (64,), not {value!r}.")
    return tuple(checks.integer(name, w, least=1) for w in value)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers)


class SetPolicy(_SetNetwork):
    r"""A policy over any number of objects in any order, with one categorical head for each dimension of the action.

    .. math::

        \pi(a \mid s) = \prod_d \operatorname{softmax}(\ell_d)_{a_d}, \qquad
        \ell = W h\bigl(\text{robot}, \max_k e(\text{object}_k)\bigr)

    Parameters
    ----------
    robot
        Numbers of the robot at the head of each row.
    features
        Numbers of each object, of which the first says whether it is there (1) or padding (0).
    bins
        Choices of each dimension of the action.
    embed, hidden
        Widths of the layers for each object, and after the maximum. The paper gives none; 64 each by default.

    Raises
    ------
    InvalidInput
        For sizes that are no positive whole numbers, and rows whose length does not fit.

    Notes
    -----
    Rows (n, robot + K * features) give logits (n, sum(bins)); :func:`sample_actions` and :func:`action_logp` read them.
    A network trained on two objects takes three. Exchanging objects, and adding padding, changes nothing, to the last
    bit.

    Examples
    --------
    >>> policy = SetPolicy(3, 4, bins=(5, 5))
    >>> policy(torch.ones(7, 3 + 2 * 4)).shape, policy(torch.ones(7, 3 + 3 * 4)).shape
    (torch.Size([7, 10]), torch.Size([7, 10]))
    """

    def __init__(
        self,
        robot: int,
        features: int,
        bins: Sequence[int],
        *,
        embed: Sequence[int] = (64,),
        hidden: Sequence[int] = (64,),
    ) -> None:
        self.bins = _bins(bins)
        bins_ = self.bins
        super().__init__(robot, features, sum(bins_), embed=embed, hidden=hidden)


def _bins(bins: Any) -> tuple[int, ...]:
    if not isinstance(bins, Sequence) or isinstance(bins, str) or not len(bins):
        raise InvalidInput(f"bins must be the choices of each dimension of the action, such as (5, 5), not {bins!r}.")
    return tuple(checks.integer("bins", b, least=2) for b in bins)


class SetValue(_SetNetwork):
    """The value of a state: the same network as :class:`SetPolicy`, with weights of its own and one output, (n, 1).

    Parameters
    ----------
    robot, features, embed, hidden
        As for :class:`SetPolicy`.

    Examples
    --------
    >>> SetValue(3, 4)(torch.ones(7, 11)).shape
    torch.Size([7, 1])
    """

    def __init__(
        self, robot: int, features: int, *, embed: Sequence[int] = (64,), hidden: Sequence[int] = (64,)
    ) -> None:
        super().__init__(robot, features, 1, embed=embed, hidden=hidden)


class Actions(NamedTuple):
    """Actions (..., D) and their log-probabilities (...), summed over the D heads."""

    choice: Tensor
    logp: Tensor


def sample_actions(logits: Tensor, bins: Sequence[int], noise: Tensor | None = None) -> Actions:
    r"""Draw an action for each row of logits: :math:`a_d = \operatorname{argmax}(\ell_d - \log(-\log u))`.

    Parameters
    ----------
    logits
        (..., sum(bins)).
    bins
        Choices of each head.
    noise
        Uniform numbers u in [0, 1) of the shape of the logits; None takes the likeliest action.

    Returns
    -------
    Actions
        Whole numbers (..., D), and log-probabilities (...).

    Raises
    ------
    InvalidInput
        For logits that are not (..., sum(bins)), and noise of another shape.

    Examples
    --------
    >>> sample_actions(torch.tensor([[0.0, 9.0, 1.0, 0.0, 0.0]]), (2, 3)).choice.tolist()
    [[1, 0]]
    """
    _check_logits(logits, bins)
    same_shape("logits", logits.shape, noise=noise)
    scores = logits if noise is None else logits - (-noise.clamp(1e-7, 1 - 1e-7).log()).log()
    index = torch.stack([part.argmax(-1) for part in scores.split(list(bins), -1)], -1)
    return Actions(index, action_logp(logits, index, bins)[0])


def action_logp(logits: Tensor, index: Tensor, bins: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (...) of actions (..., D) under logits (..., sum(bins)), summed over heads.

    Logits of minus infinity are choices that a mask forbids: they add nothing to the entropy, and get no gradient.

    Raises
    ------
    InvalidInput
        For logits that are not (..., sum(bins)), and actions that are not whole numbers (..., D).

    Examples
    --------
    >>> logp, entropy = action_logp(torch.zeros(1, 4), torch.tensor([[0, 1]]), (2, 2))
    >>> round(float(logp), 4), round(float(entropy), 4)
    (-1.3863, 1.3863)
    """
    _check_logits(logits, bins)
    if index.shape != (*logits.shape[:-1], len(bins)) or index.is_floating_point():
        raise InvalidInput(
            f"actions are {index.dtype} {tuple(index.shape)}; expected whole numbers "
            f"{(*logits.shape[:-1], len(bins))}, one for each head."
        )
    if len(set(bins)) == 1:  # one operation for all heads
        part = _finite(logits.unflatten(-1, (len(bins), bins[0])).log_softmax(-1))  # (..., D, bins)
        logp = part.gather(-1, index[..., None]).squeeze(-1).sum(-1)
        return logp, -(part.exp() * part).sum((-1, -2))
    logp = entropy = torch.zeros(logits.shape[:-1], dtype=logits.dtype, device=logits.device)
    for d, head in enumerate(logits.split(list(bins), -1)):
        log_all = _finite(head.log_softmax(-1))
        logp = logp + log_all.gather(-1, index[..., d : d + 1]).squeeze(-1)
        entropy = entropy - (log_all.exp() * log_all).sum(-1)
    return logp, entropy


def _finite(logp: Tensor) -> Tensor:
    """The lowest number for choices of probability 0, since 0 times minus infinity is NaN."""
    return logp.masked_fill(logp == -torch.inf, torch.finfo(logp.dtype).min)


def _check_logits(logits: Tensor, bins: Sequence[int]) -> None:
    if not logits.ndim or not len(bins) or logits.shape[-1] != sum(bins):
        raise InvalidInput(
            f"logits have shape {tuple(logits.shape)}; expected (..., {sum(bins)}) for bins {tuple(bins)}, one for "
            "each choice of each head."
        )
