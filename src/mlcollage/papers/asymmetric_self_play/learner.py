"""A learner: policy and value networks of R seeds, trained as one stacked model by PPO, with or without cloning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput
from mlcollage.train.replicas import Replicas

from .advantages import standardize_advantages
from .config import ASPConfig
from .heads import Actions, action_logp, sample_actions, stacked_logp
from .loss import abc_loss, clip_share, ppo_loss
from .policy import SetPolicy, SetValue

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
    steps: int = 1  # rows that follow each other in one game, and are never separated: T with a memory


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
    stops
        The last head ends the turn, and the others do not matter where it does.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import SetPolicy, SetValue
    >>> learner = Learner(lambda: SetPolicy(2, 3, (3,)), lambda: SetValue(2, 3), (3,), (0, 1), ASPConfig(), 0)
    >>> learner.act(torch.zeros(2, 7, 5))[0].shape, learner.values(torch.zeros(2, 7, 5)).shape
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
        *,
        stops: bool = False,
    ) -> None:
        self.bins, self.seeds, self.config, self.side, self.stops = tuple(bins), tuple(seeds), config, side, stops
        self.policy, self.value = (
            Replicas(
                make,
                [derive(seed, side, part) for seed in seeds],
                optimizer=torch.optim.Adam,
                lr=config.lr,
                device=device,
                stacked=None,
                eps=1e-5,
                fused=True,
            )
            for part, make in enumerate((policy, value))
        )

    @property
    def remembers(self) -> bool:
        """Whether a network has a memory, so that steps of a game must stay together."""
        return bool(memory_of(self.policy) or memory_of(self.value))

    def act(
        self, x: Tensor, memory: Tensor | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (R, m, outputs) of rows (R, m, F), and the memories (R, m, size) after this step.

        Of the present policies, or of a snapshot's ``parameters``.
        """
        with torch.no_grad():
            if not memory_of(self.policy):
                return _run(self.policy, x, parameters=parameters), None
            if memory is None:
                memory = x.new_zeros(*x.shape[:2], memory_of(self.policy))
            out, after = _run(self.policy, x[:, :, None], memory, parameters=parameters)
            return out[:, :, 0], after

    def outputs(self, x: Tensor, steps: int = 1) -> Tensor:
        """Logits (R, M, outputs) of rows (R, M, F), where ``steps`` of them follow each other in a game."""
        return _sequences(self.policy, x, steps)

    def values(self, x: Tensor, steps: int = 1) -> Tensor:
        """Values (R, M) of rows (R, M, F)."""
        with torch.no_grad():
            return _sequences(self.value, x, steps).squeeze(-1)

    def sample(self, logits: Tensor, noise: Tensor | None) -> Actions:
        """Draw actions; where one ends the turn, its log-probability is that of ending it."""
        found = sample_actions(logits, self.bins, noise)
        return Actions(found.choice, self.logp(logits, found.choice)[0]) if self.stops else found

    def logp(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of actions."""
        if not self.stops:
            return stacked_logp(logits, index, self.bins)
        moves, stop = self._split(logits)
        logp, entropy = action_logp(moves, index[..., :-1], self.bins[:-1])
        ends = index[..., -1:].long()
        of_stop, spread = action_logp(stop, ends, self.bins[-1:])
        stays = stop.softmax(-1)[..., 0]  # only then does the rest matter
        return of_stop + torch.where(ends[..., 0] == 1, torch.zeros_like(logp), logp), spread + stays * entropy

    def _split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the other heads, and the two of the one that ends a turn; spreads stand at the end."""
        at = sum(b or 1 for b in self.bins[:-1])
        return torch.cat((logits[..., :at], logits[..., at + 2 :]), -1), logits[..., at : at + 2]

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
            batches = self._minibatches(rows, turn, epoch, 0)
            cloned = [None] * c.minibatches if demos is None else self._minibatches(demos, turn, epoch, 1)
            for number, (chosen, demo) in enumerate(zip(batches, cloned, strict=True)):
                last = epoch == c.epochs - 1 and number == c.minibatches - 1
                found = self._step(rows, chosen, demos, demo, first=not gauges, last=last)
                gauges = {**gauges, **found}
        return gauges

    def _step(
        self,
        rows: Rows,
        chosen: tuple[Tensor, Tensor],
        demos: Rows | None,
        demo: tuple[Tensor, Tensor] | None,
        *,
        first: bool,
        last: bool,
    ) -> dict[str, Tensor]:
        """One update on one minibatch."""
        c, (at, mask) = self.config, chosen
        x, index, old, a = (_taken(t, at) for t in (rows.x, rows.index, rows.logp, rows.advantages))
        x = _clean(x, mask)
        found: dict[str, Tensor] = {}

        def objective() -> Tensor:
            logp, entropy = self.logp(self.outputs(x, rows.steps), index)
            terms = ppo_loss(
                logp, old, a, entropy=entropy, mask=mask, eps=c.clip, entropy_weight=c.entropy_weight, dim=-1
            )
            if first or last:
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
            gap = _sequences(self.value, x, rows.steps).squeeze(-1) - returns
            square = torch.where(mask, gap, torch.zeros_like(gap)).square().sum(-1)
            return c.value_weight * 0.5 * square / mask.sum(-1).clamp(min=1)

        self.value.update(value_objective, clip_norm=c.max_norm)
        return found

    def _cloning(self, demos: Rows, at: Tensor, mask: Tensor) -> Tensor:
        x, index, old = (_taken(t, at) for t in (demos.x, demos.index, demos.logp))
        logp, _ = self.logp(self.outputs(_clean(x, mask), demos.steps), index)
        return abc_loss(logp, old, mask, eps=self.config.eps, clip=self.config.abc_clip, dim=-1)

    def _minibatches(self, rows: Rows, turn: int, epoch: int, what: int) -> list[tuple[Tensor, Tensor]]:
        """Indices (R, b) of real rows in random order, cut in parts, and which of them are no padding.

        With a memory whole games are drawn, with all of their steps. Each seed's order and sizes depend on its own rows
        only, so that it learns as it would alone.
        """
        t = rows.steps
        parts: list[list[Tensor]] = [[] for _ in range(self.config.minibatches)]
        for seed, mask in zip(self.seeds, rows.mask, strict=True):
            games = (mask if t == 1 else mask.view(-1, t).any(1)).nonzero().squeeze(-1)
            order = torch.randperm(len(games), generator=generator(seed, self.side, turn, 7, epoch, what))
            for k, part in enumerate(games[order.to(games.device)].tensor_split(self.config.minibatches)):
                parts[k].append(part)
        found = [_padded(part) for part in parts]
        if t == 1:
            return found
        return [
            (wide := _steps_of(at, t), real.repeat_interleave(t, 1) & rows.mask.gather(1, wide)) for at, real in found
        ]


def memory_of(replicas: Replicas) -> int:
    """Numbers that a network remembers from step to step, by its own account; 0 for networks without a memory.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import SetValue
    >>> memory_of(Replicas(lambda: SetValue(2, 3, lstm=4), (0,), lr=0.1))
    8
    """
    return int(getattr(replicas._model, "memory_size", 0))


def _run(replicas: Replicas, *args: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Any:
    """Outputs (R, ...) of R networks for inputs (R, ...); those of this paper are products of stacked matrices."""
    model = replicas._model
    if isinstance(model, SetPolicy | SetValue) and type(model) in (SetPolicy, SetValue):  # no class of a user's
        return model.stacked({**replicas.parameters, **(parameters or {})}, *args)
    return replicas(*args, in_dim=0, parameters=parameters)


def trial(replicas: Replicas, x: Tensor) -> Any:
    """Outputs (R, n, O) of rows (R, n, F), each read by itself, or whatever a network of a user's gives for them.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import SetValue
    >>> trial(Replicas(lambda: SetValue(2, 3, lstm=4), (0,), lr=0.1), torch.zeros(1, 7, 5)).shape
    torch.Size([1, 7, 1])
    """
    if not memory_of(replicas):
        return _run(replicas, x)
    found = _run(replicas, x[:, :, None], x.new_zeros(*x.shape[:2], memory_of(replicas)))
    if not isinstance(found, tuple) or len(found) != 2 or found[1].shape != (*x.shape[:2], memory_of(replicas)):
        raise InvalidInput(
            "a network with a memory gives outputs (n, T, ...) and the memory (n, memory_size) after them; "
            f"{type(replicas._model).__name__} does not."
        )
    return found[0].squeeze(2)


def _sequences(replicas: Replicas, x: Tensor, steps: int) -> Tensor:
    """Outputs (R, M, O) of rows (R, M, F); a network with a memory reads ``steps`` of them after each other."""
    if not memory_of(replicas):
        found: Tensor = _run(replicas, x)
        return found
    sequences = x.unflatten(1, (-1, steps))
    empty = x.new_zeros(*sequences.shape[:2], memory_of(replicas))
    out, _ = _run(replicas, sequences, empty)
    return out.flatten(1, 2)


def _steps_of(games: Tensor, steps: int) -> Tensor:
    """Rows (R, b * steps) of games (R, b)."""
    return (games[..., None] * steps + torch.arange(steps, device=games.device)).flatten(1)


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
    return x if bool(mask.all()) else torch.where(mask[..., None], x, torch.zeros_like(x))


def _each(f: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    return torch.stack([f(*parts) for parts in zip(*stacked, strict=True)])
