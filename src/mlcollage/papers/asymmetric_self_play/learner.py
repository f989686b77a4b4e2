"""A learner: policy and value networks of R seeds, trained as one stacked model by PPO, with or without cloning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput
from mlcollage.train.replicas import Replicas

from .advantages import standardize_advantages
from .config import ASPConfig
from .loss import abc_loss, clip_share, ppo_loss
from .policy import action_logp

__all__ = ["Learner", "Rows"]


@dataclass
class Rows:
    """Steps to learn from, for each of R seeds, padded to the same number M: a row is real where ``mask`` is True."""

    x: Tensor  # (R, M, F) observations
    index: Tensor  # (R, M, D) actions
    logp: Tensor  # (R, M) under the policy that acted, or Bob's for demonstrations
    mask: Tensor  # (R, M) bool
    advantages: Tensor | None = None  # (R, M)
    returns: Tensor | None = None  # (R, M)


class Learner:
    """Policy and value of one side, R seeds stacked.

    Parameters
    ----------
    policy, value
        Make fresh networks: rows to logits, and rows to one number.
    bins
        Choices of each dimension of the action.
    seeds
        One for each of the R pairs of networks.
    config
        The settings of learning.
    side
        0 for Alice and 1 for Bob: their networks and draws are independent.
    device
        Where to train.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import SetPolicy, SetValue
    >>> learner = Learner(lambda: SetPolicy(2, 3, (3,)), lambda: SetValue(2, 3), (3,), (0, 1), ASPConfig(), 0)
    >>> learner.logits(torch.zeros(2, 7, 5)).shape, learner.values(torch.zeros(2, 7, 5)).shape
    (torch.Size([2, 7, 3]), torch.Size([2, 7]))
    """

    def __init__(
        self,
        policy: Callable[[], nn.Module],
        value: Callable[[], nn.Module],
        bins: Sequence[int],
        seeds: Sequence[int],
        config: ASPConfig,
        side: int,
        device: torch.device | str | None = None,
    ) -> None:
        self.bins, self.seeds, self.config, self.side = tuple(bins), tuple(seeds), config, side
        self.policy, self.value = (
            Replicas(
                make,
                [derive(seed, side, part) for seed in seeds],
                optimizer=torch.optim.Adam,
                lr=config.lr,
                device=device,
                stacked=None,
                eps=1e-5,
            )
            for part, make in enumerate((policy, value))
        )

    def logits(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (R, m, bins) of rows (R, m, F), of the present policies or of a snapshot's ``parameters``."""
        with torch.no_grad():
            return self.policy(x, in_dim=0, parameters=parameters)

    def values(self, x: Tensor) -> Tensor:
        """Values (R, m) of rows (R, m, F)."""
        with torch.no_grad():
            return self.value(x, in_dim=0).squeeze(-1)

    def snapshot(self) -> dict[str, Tensor]:
        """The policies' parameters (R, ...) as they are now; copies, which no later update touches."""
        return {name: p.detach().clone() for name, p in self.policy.parameters.items()}

    def update(self, rows: Rows, turn: int, demos: Rows | None = None) -> dict[str, Tensor]:
        """PPO on the rows of a turn, with the cloning term on demonstrations; gauges (R,) by name.

        A seed that has no row has a gradient of 0 and goes on with Adam's momentum alone, stacked as alone.
        """
        c = self.config
        assert rows.advantages is not None
        for what, numbers in (("log-probabilities", rows.logp), ("advantages", rows.advantages)):
            if bool((rows.mask & ~torch.isfinite(numbers)).any()):
                side = ("Alice", "Bob")[self.side]
                raise InvalidInput(
                    f"{side}'s {what} are NaN or infinite in turn {turn + 1}, for finite observations: a network has "
                    "diverged, or a reward is not finite. Take a smaller lr, or look at the networks."
                )
        rows.advantages = standardize_advantages(rows.advantages, rows.mask)
        demos = None if demos is None or not c.beta or not bool(demos.mask.any()) else demos
        gauges: dict[str, Tensor] = {}
        for epoch in range(c.epochs):
            batches = self._minibatches(rows.mask, turn, epoch, 0)
            cloned = [None] * c.minibatches if demos is None else self._minibatches(demos.mask, turn, epoch, 1)
            for chosen, demo in zip(batches, cloned, strict=True):
                gauges = self._step(rows, chosen, demos, demo, first=not gauges, gauges=gauges)
        return gauges

    def _step(
        self,
        rows: Rows,
        chosen: tuple[Tensor, Tensor],
        demos: Rows | None,
        demo: tuple[Tensor, Tensor] | None,
        *,
        first: bool,
        gauges: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """One update on one minibatch."""
        c, (at, mask) = self.config, chosen
        x, index, old, a = (_taken(t, at) for t in (rows.x, rows.index, rows.logp, rows.advantages))
        x = _clean(x, mask)
        found: dict[str, Tensor] = {}

        def objective() -> Tensor:
            logp, entropy = action_logp(self.policy(x, in_dim=0), index, self.bins)
            terms = ppo_loss(
                logp, old, a, entropy=entropy, mask=mask, eps=c.clip, entropy_weight=c.entropy_weight, dim=-1
            )
            found["entropy"] = terms.entropy.detach()
            found["clip_share"] = _each(clip_share, logp.detach(), old, mask)
            if first:
                found["first_ratio"] = ((logp.detach() - old).exp() - 1).abs().masked_fill(~mask, 0).amax(-1)
            loss = terms.total
            if demos is not None and demo is not None:
                loss = loss + c.beta * self._cloning(demos, *demo)
            return loss

        self.policy.update(objective, clip_norm=c.max_norm)
        returns = _taken(rows.returns, at)

        def value_objective() -> Tensor:
            gap = self.value(x, in_dim=0).squeeze(-1) - returns
            square = torch.where(mask, gap, torch.zeros_like(gap)).square().sum(-1)
            return c.value_weight * 0.5 * square / mask.sum(-1).clamp(min=1)

        self.value.update(value_objective, clip_norm=c.max_norm)
        return {**gauges, **found}

    def _cloning(self, demos: Rows, at: Tensor, mask: Tensor) -> Tensor:
        x, index, old = (_taken(t, at) for t in (demos.x, demos.index, demos.logp))
        logp, _ = action_logp(self.policy(_clean(x, mask), in_dim=0), index, self.bins)
        return abc_loss(logp, old, mask, eps=self.config.eps, clip=self.config.abc_clip, dim=-1)

    def _minibatches(self, mask: Tensor, turn: int, epoch: int, what: int) -> list[tuple[Tensor, Tensor]]:
        """Indices (R, b) of real rows in random order, cut in parts, and which of them are no padding.

        Each seed's order and sizes depend on its own rows only, so that it learns as it would alone.
        """
        parts: list[list[Tensor]] = [[] for _ in range(self.config.minibatches)]
        for seed, real in zip(self.seeds, mask, strict=True):
            rows = real.nonzero().squeeze(-1)
            order = torch.randperm(len(rows), generator=generator(seed, self.side, turn, 7, epoch, what))
            for k, part in enumerate(rows[order.to(rows.device)].tensor_split(self.config.minibatches)):
                parts[k].append(part)
        return [_padded(part) for part in parts]


def _padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    most = max(1, *(len(p) for p in parts))  # a row of padding where there is none
    at = torch.stack([torch.cat((p, p.new_zeros(most - len(p)))) for p in parts])
    sizes = torch.tensor([len(p) for p in parts], device=at.device)
    return at, torch.arange(most, device=at.device) < sizes[:, None]


def _taken(t: Tensor | None, at: Tensor) -> Tensor:
    """Rows ``at`` (R, b) of (R, M, ...)."""
    assert t is not None
    return t.gather(1, at) if t.ndim == 2 else t[torch.arange(len(t), device=t.device)[:, None], at]


def _clean(x: Tensor, mask: Tensor) -> Tensor:
    """Padding as zeros: it may repeat a row with NaN, whose gradient of 0 would be NaN."""
    return torch.where(mask[..., None], x, torch.zeros_like(x))


def _each(f: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    return torch.stack([f(*parts) for parts in zip(*stacked, strict=True)])
