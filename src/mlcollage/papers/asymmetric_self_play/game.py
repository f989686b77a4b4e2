"""The game: Alice sets goals by acting, Bob tries to reach them, and learns from her where he fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage._users import users_code
from mlcollage.data.goal_tasks import GoalSet, GoalTask, GoalWorld, check_world
from mlcollage.errors import InvalidInput

from .advantages import gae
from .checkpoint import Snapshot, resume_training, save_training
from .config import ASPConfig
from .goals import GoalVerdict, alice_reward, time_rewards, validate_goal
from .heads import outputs_of
from .health import sentences
from .learner import Learner, Rows, trial
from .policy import SetPolicy, SetValue
from .relabel import relabel
from .turns import AliceTurn, BobTurn, alice_turn, bob_turn, drawn, present_of, rows_of

__all__ = ["AsymmetricSelfPlay", "Snapshot", "Turn"]

_ALICE, _BOB = 0, 1


@dataclass
class Turn:
    """What happened in one turn of N games for each of R seeds."""

    start: Tensor  # (R, N, S) Alice's state before the turn
    end: Tensor  # (R, N, S) after it
    goal: Tensor  # (R, N, K, G)
    verdict: Tensor  # (R, N), see GoalVerdict; -1 where there was no Alice
    played: Tensor  # (R, N) bool: Bob played for the goal
    solved: Tensor  # (R, N) bool
    bob_steps: Tensor  # (R, N)
    gauges: dict[str, Tensor] = field(default_factory=dict)  # (R,)


class AsymmetricSelfPlay:
    r"""Alice and Bob, who teach each other to act in a world: no goals, demonstrations or rewards of yours are needed.

    In each turn Alice acts for T steps, and the state that she ends in is a goal :math:`g`, which is thereby known to
    be reachable. Bob tries to reach it from where she began. She earns 5 if he fails, he earns 5 if he does not, and
    where he fails, her steps become demonstrations for him:

    .. math:: L_{\text{Bob}} = L_{\text{PPO}} + \beta L_{\text{abc}}

    Parameters
    ----------
    world
        A :class:`~mlcollage.data.GoalWorld`, or a :class:`~mlcollage.data.GoalTask`, whose world is made. For a
        Gymnasium environment see :class:`GymnasiumWorld`.
    config
        Settings.
    seeds
        Trainings with these seeds run as one stacked model; each learns as it would alone.
    policy, value
        ``policy(robot, features, bins)`` and ``value(robot, features)`` make fresh networks of your own; by default
        :class:`SetPolicy` and :class:`SetValue`. They map rows (n, robot + K * features) to outputs (n, sum(bins)), see
        :func:`sample_actions` for continuous actions, and to values (n, 1), in float32 or float64. A network with a
        memory has an attribute ``memory_size`` and maps sequences (n, T, ...) and memories (n, memory_size) to both, as
        :class:`SetPolicy` with an LSTM. Alice and Bob get networks of their own. Layers that act differently
        in each pass (dropout, batch norm) are refused: ratios of an unchanged policy would not be 1.
    goals
        Train Bob directly, without Alice: on these start states and goals, one a game.
    device
        Where to train; worlds in tensor code follow the device of their states.

    Attributes
    ----------
    alice, bob : Learner
        Policies, values and optimizers.
    steps : Tensor
        (R,) environment steps so far: Alice's and Bob's real ones, without padding.
    history : list of dict
        Gauges of each turn; :meth:`health` gives them as a table.
    last : Turn or None
        The last turn.

    Raises
    ------
    InvalidInput
        For worlds that do not fit (see ``check_world``), networks that Alice and Bob would share, whose outputs have
        other shapes or that have dropout or batch norm, and no seed.
    UserCodeError
        If the world, a network or a set of goals raises something.

    References
    ----------
    Plappert et al., "Asymmetric self-play for automatic goal discovery in robotic manipulation", 2021,
    arXiv:2101.04882, algorithms 1 and 2.

    Examples
    --------
    >>> from mlcollage.papers.asymmetric_self_play import ASPConfig, AsymmetricSelfPlay, Grasp25D, block_holdouts
    >>> game = AsymmetricSelfPlay(Grasp25D(), ASPConfig(envs=8), seeds=(0, 1))
    >>> game.fit(500)
    >>> game.evaluate(block_holdouts(Grasp25D()), n=4).columns.tolist()
    ['seed', 'holdout', 'steps', 'successes', 'n', 'rate', 'low', 'high']
    """

    def __init__(
        self,
        world: GoalWorld | GoalTask,
        config: ASPConfig | None = None,
        *,
        seeds: Sequence[int] = (0,),
        policy: Callable[[int, int, tuple[int, ...]], nn.Module] | None = None,
        value: Callable[[int, int], nn.Module] | None = None,
        goals: GoalSet | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if config is not None and not isinstance(config, ASPConfig):
            raise InvalidInput(f"config must be an ASPConfig, not a {type(config).__name__}: ASPConfig(envs=64), say.")
        several: Any = seeds
        if not isinstance(several, Sequence) or isinstance(several, str) or not len(several):
            raise InvalidInput(f"seeds must be whole numbers, one for each training, such as (0, 1), not {seeds!r}.")
        if isinstance(world, GoalTask):
            self.world: GoalWorld = world.make(world.name)
            config = config or ASPConfig(alice_steps=world.alice_steps, bob_steps=world.bob_steps)
        else:
            check_world(world)
            self.world = world
        self.config = config or ASPConfig()
        self.seeds = tuple(checks.integer("a seed", seed) for seed in seeds)
        try:
            self.goals, self.device = goals, torch.device(device or "cpu")
        except (RuntimeError, TypeError):
            raise InvalidInput(f"device must be one of torch's, such as 'cpu' or 'cuda', not {device!r}.") from None
        self.turns = 0
        self.steps = torch.zeros(len(self.seeds), dtype=torch.long)
        self.history: list[dict[str, Any]] = []
        self.last: Turn | None = None
        self.pool: list[Snapshot] = []
        state = self._initial(0)
        robot, objects = self.world.observe(state[0, :2])
        extra = 2 * self.world.achieved(state[0, :2]).shape[-1]
        c = self.config
        make_policy, make_value = policy or self._policy, value or self._value
        bins = tuple(self.world.bins)
        own = objects.shape[2]
        self.alice, self.bob = (
            Learner(
                partial(make_policy, robot.shape[1], features, choices),
                partial(make_value, robot.shape[1], features),
                choices,
                self.seeds,
                c,
                side,
                self.device,
                stops=len(choices) > len(bins),
            )
            for side, features, choices in (
                (_ALICE, own + extra * c.sees_start, (*bins, 2) if c.stop else bins),
                (_BOB, own + extra, bins),
            )
        )
        _refuse_shared(self.alice, self.bob)
        places = self.world.achieved(state[0, :2])
        seen = (
            rows_of(self.world, state[0, :2], places if c.sees_start else None),
            rows_of(self.world, state[0, :2], places),
        )
        for learner, x in zip((self.alice, self.bob), seen, strict=True):
            _try_networks(learner, x.expand(len(self.seeds), *x.shape))
        r, n = len(self.seeds), self.config.envs
        self._alice_state, self._bob_state = state, state.clone()
        self._goals_set = torch.zeros(r, n, dtype=torch.long, device=self.device)
        self._failed = torch.zeros(r, n, dtype=torch.bool, device=self.device)
        self._over = torch.zeros(r, n, dtype=torch.bool, device=self.device)

    def _policy(self, robot: int, features: int, bins: tuple[int, ...]) -> nn.Module:
        c = self.config
        return SetPolicy(robot, features, bins, embed=c.embed, hidden=c.hidden, lstm=c.lstm)

    def _value(self, robot: int, features: int) -> nn.Module:
        return SetValue(robot, features, embed=self.config.embed, hidden=self.config.hidden, lstm=self.config.lstm)

    def _initial(self, turn: int) -> Tensor:
        """Fresh start states (R, N, S) for this turn, each seed's from draws of its own."""
        with users_code("the world's initial"):
            states = [self.world.initial(self.config.envs, generator(seed, turn, 11)) for seed in self.seeds]
        return torch.stack(states).to(self.device)

    # -- one turn ---------------------------------------------------------------------------------------------------

    def turn(self) -> Turn:
        """Play one turn of every game, and learn from it."""
        with torch.no_grad():
            found = self._direct_turn() if self.goals is not None else self._turn()
        self.last = found
        self.turns += 1
        self.history.append(
            {"turn": self.turns, "steps": self.steps.tolist(), **{k: v.tolist() for k, v in found.gauges.items()}}
        )
        if self.goals is None and self.turns % self.config.snapshot_every == 0:
            self._remember()
        return found

    def _direct_turn(self) -> Turn:
        c, r = self.config, len(self.seeds)
        assert self.goals is not None
        sets = [drawn(self.world, self.goals, c.envs, generator(seed, self.turns, 12), "goals") for seed in self.seeds]
        start, goal = (torch.stack(part).to(self.device) for part in zip(*sets, strict=True))
        playing = torch.ones(r, c.envs, dtype=torch.bool, device=self.device)
        bob = self._bob_plays(start, goal, playing)
        gauges = self._bob_learns(bob, goal, None)
        self.steps += bob.steps.sum(1).cpu()
        gauges["solve_rate"] = bob.solved.float().mean(1)
        verdict = torch.full_like(playing, -1, dtype=torch.long)
        return Turn(start, start, goal, verdict, playing, bob.solved, bob.steps, gauges)

    def _turn(self) -> Turn:
        c = self.config
        self._restart()
        past_alice, past_bob, old = self._past()
        start = self._alice_state
        alice = alice_turn(
            self.world,
            self.alice,
            start,
            c.alice_steps,
            (self.turns,),
            None if old is None else (past_alice, old.alice),
        )
        end = alice.states[-1]
        # A turn that had NaN anywhere teaches nothing, also where its end is finite again.
        whole = torch.isfinite(alice.states).all(-1).all(0) & torch.isfinite(alice.x).all(-1).all(0)
        goal, verdict = self._judge(start, end, whole)
        playable = verdict <= GoalVerdict.OUT_OF_ZONE
        if c.mode == "reverse":  # he is to undo what she did
            goal, self._bob_state = self._achieved(start), end
        playing = playable & ~self._failed
        games = torch.arange(c.envs, device=self.device)
        with_past = (games >= c.envs - past_bob).expand_as(playing)
        limits = self._most - alice.steps if c.stop else None
        bob = self._bob_plays(self._bob_state, goal, playing & ~with_past, limits=limits)
        self._bob_state = bob.states
        solved, bob_steps = bob.solved, bob.steps
        if past_bob and old is not None:
            past = self._bob_plays(self._bob_state, goal, playing & with_past, old.bob, limits=limits)
            self._bob_state = past.states
            solved, bob_steps = solved | past.solved, bob_steps + past.steps
        # What Bob failed at, or was not asked since he failed before; not what a past Bob did.
        wanted = playable & ~with_past & (~solved if c.abc_filter else torch.ones_like(solved))
        demos = self._relabel(alice, goal, wanted)
        gauges = self._bob_learns(bob, goal, demos, alice.steps)
        learned = (games >= past_alice).expand_as(playing) & (
            playable | (c.store_invalid & (verdict != GoalVerdict.INVALID_NOT_FINITE))
        )
        self._goals_set += playable.long()
        if c.learn_alice:
            self._alice_learns(alice, verdict, solved, bob_steps, learned)
        self._failed |= playing & ~solved
        self._over = ~playable | (self._goals_set >= c.goals)
        self._alice_state = end
        self.steps += (bob_steps + alice.steps).sum(1).cpu()
        gauges |= self._gauges(verdict, playing, solved, wanted)
        gauges["alice_steps"] = alice.steps.float().mean(1)
        return Turn(start, end, goal, verdict, playing, solved, bob_steps, gauges)

    def _restart(self) -> None:
        """New games where the old ones are over; the others go on from where each side is."""
        if not bool(self._over.any()):
            return
        fresh = self._initial(self.turns + 1)
        over = self._over[..., None]
        self._alice_state = torch.where(over, fresh, self._alice_state)
        self._bob_state = torch.where(over, fresh, self._bob_state)
        self._goals_set = self._goals_set.masked_fill(self._over, 0)
        self._failed = self._failed & ~self._over

    def _judge(self, start: Tensor, end: Tensor, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Goals (R, N, K, G) and what becomes of them (R, N); turns that are not ``whole`` had NaN on the way."""
        r, n, _ = end.shape
        before, after = start.flatten(0, 1), end.flatten(0, 1)
        goal = self.world.achieved(after)
        verdict = validate_goal(
            self.world.distance(goal, self.world.achieved(before)),
            self.world.thresholds,
            off_table=self.world.off_table(after),
            out_of_zone=self.world.out_of_zone(after),
            present=present_of(self.world, after),
            broken=~torch.isfinite(after).all(-1) | (False if whole is None else ~whole.flatten()),
        )
        return goal.view(r, n, *goal.shape[1:]), verdict.view(r, n)

    def _achieved(self, state: Tensor) -> Tensor:
        """What is achieved, (R, N, K, G), in states (R, N, S)."""
        return self.world.achieved(state.flatten(0, 1)).unflatten(0, state.shape[:2])

    @property
    def _most(self) -> int:
        """Steps of both sides together, at most."""
        return self.config.alice_steps + self.config.bob_steps

    def _bob_plays(
        self,
        state: Tensor,
        goal: Tensor,
        playing: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        limits: Tensor | None = None,
    ) -> BobTurn:
        c = self.config
        # Two Bobs in one turn draw from different streams.
        key = (self.turns, 0 if parameters is None else 1)
        bonus = 5.0 if c.reward == "success" else 0.0
        return bob_turn(
            self.world,
            self.bob,
            state,
            goal,
            playing,
            c.bob_steps if limits is None else self._most,
            key,
            parameters=parameters,
            solved_bonus=bonus,
            limits=limits,
        )

    # -- learning ---------------------------------------------------------------------------------------------------

    def _bob_learns(
        self, bob: BobTurn, goal: Tensor, demos: Rows | None, alice_steps: Tensor | None = None
    ) -> dict[str, Tensor]:
        c = self.config
        r, n = bob.solved.shape
        if not bob.x:  # nobody was asked, or all goals were met before the first step
            x = rows_of(self.world, bob.states[:, 0], goal[:, 0])[:, None]
            with torch.enable_grad():
                return self.bob.update(_nothing(x, self.bob.bins), self.turns, demos)
        lanes = torch.arange(r, device=self.device)[:, None]
        steps = len(bob.x)
        # After a memory, rows of a game beside each other; else the real ones only, step after step.
        rows = _in_games(bob, n) if self.bob.remembers else _in_steps(bob)
        reward, value = bob.reward[:steps].clone(), torch.zeros_like(bob.reward[:steps])
        terminated, truncated = (torch.zeros_like(reward, dtype=torch.bool) for _ in range(2))
        last = (bob.steps - 1).clamp(min=0)[None]  # (1, R, N)
        unsolved = ~bob.solved & (bob.steps > 0)
        # A simulator that gave up has no last observation to go on from.
        goes_on = unsolved & torch.isfinite(bob.states).all(-1) & (c.bob_timeout == "go_on")
        terminated.scatter_(0, last, (bob.solved | (unsolved & ~goes_on))[None])
        truncated.scatter_(0, last, goes_on[None])
        if c.reward == "time":
            own = torch.full_like(bob.steps, c.alice_steps) if alice_steps is None else alice_steps
            reward = torch.zeros_like(reward).scatter_(0, last, self._time(own, bob.steps, bob.solved)[1][None])
        final = torch.zeros_like(reward)
        after: Tensor | None = None
        if c.bob_timeout == "go_on":
            after = rows_of(self.world, bob.states.flatten(0, 1), goal.flatten(0, 1)).view(r, n, -1)
        if self.bob.remembers:
            value, at_end = self._remembered_values(self.bob, rows.x, steps, after, bob.steps)
            final = at_end.expand_as(reward)
        else:
            parts = self.bob.values(rows.x).split([v.shape[1] for v in bob.x], 1)
            for t, (part, (games, _)) in enumerate(zip(parts, bob.row_of, strict=True)):
                value[t][lanes, games] = part
            if after is not None:
                final = self.bob.values(after).expand_as(reward)
        advantages, returns = gae(
            reward, value, terminated, truncated=truncated, final_values=final, gamma=c.gamma, lam=c.lam
        )
        if self.bob.remembers:
            taken = [a.permute(1, 2, 0).flatten(1) for a in (advantages, returns)]
        else:
            taken = [
                torch.cat([a[t][lanes, games] for t, (games, _) in enumerate(bob.row_of)], 1)
                for a in (advantages, returns)
            ]
        rows.advantages, rows.returns = taken
        with torch.enable_grad():
            return self.bob.update(rows, self.turns, demos)

    @staticmethod
    def _remembered_values(
        learner: Learner, x: Tensor, steps: int, after: Tensor | None, taken: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values (T, R, N) of rows (R, N T, F), and (R, N) of the observations after the last ones that were taken."""
        sequences = x.unflatten(1, (-1, steps))
        wide = torch.cat((sequences, torch.zeros_like(sequences[:, :, :1])), 2)
        lanes, games = torch.arange(len(x), device=x.device)[:, None], torch.arange(wide.shape[1], device=x.device)
        if after is not None:
            wide[lanes, games, taken] = after
        values = learner.values(_finite_rows(wide.flatten(1, 2)), steps + 1).unflatten(1, (-1, steps + 1))
        return values[:, :, :-1].permute(2, 0, 1), values[lanes, games, taken]

    def _alice_learns(
        self, alice: AliceTurn, verdict: Tensor, solved: Tensor, bob_steps: Tensor, learned: Tensor
    ) -> None:
        c = self.config
        steps, r, n = alice.logp.shape
        remembers = self.alice.remembers
        order = (1, 2, 0) if remembers else (1, 0, 2)  # rows of a game beside each other, or those of a step

        def flat(t: Tensor) -> Tensor:
            return t.permute(*order, *range(3, t.ndim)).flatten(1, 2)

        x = flat(alice.x)  # (R, T N, F)
        last = (alice.rows - 1)[None]
        number = torch.arange(steps, device=self.device)[:, None, None]
        within = number < alice.rows  # (T, R, N): not after she has ended her turn
        reward = torch.zeros_like(alice.logp)
        earned = alice_reward(verdict, solved)
        if c.reward == "time":
            playable = verdict <= GoalVerdict.OUT_OF_ZONE
            earned = torch.where(playable, self._time(alice.steps, bob_steps, solved)[0], torch.zeros_like(earned))
        reward.scatter_(0, last, earned.to(reward.dtype)[None])
        goes_on, terminated = (torch.zeros_like(reward, dtype=torch.bool) for _ in range(2))
        final, after = torch.zeros_like(reward), None
        open_ = torch.zeros_like(learned)
        if c.turn_end == "go_on":
            open_ = (verdict <= GoalVerdict.OUT_OF_ZONE) & (self._goals_set < c.goals)
            start = self._achieved(alice.states[0]).flatten(0, 1) if c.sees_start else None
            after = rows_of(self.world, alice.states[-1].flatten(0, 1), start).view(r, n, -1)
        goes_on.scatter_(0, last, open_[None])
        terminated.scatter_(0, last, ~open_[None])
        if remembers:
            value, at_end = self._remembered_values(self.alice, x, steps, after, alice.rows)
            final = at_end.expand_as(reward)
        else:
            value = self.alice.values(x).view(r, steps, n).transpose(0, 1)
            if after is not None:
                final = self.alice.values(after).expand_as(reward)
        advantages, returns = gae(
            reward, value, terminated, truncated=goes_on, final_values=final, gamma=c.gamma, lam=c.lam
        )
        mask = flat(learned & within)
        rows = Rows(x, flat(alice.index), flat(alice.logp), mask, flat(advantages), flat(returns))
        rows.steps = steps if remembers else 1
        with torch.enable_grad():
            self.alice.update(rows, self.turns)

    def _time(self, alice_steps: Tensor, bob_steps: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
        return time_rewards(alice_steps, bob_steps, solved, most=self._most, scale=self.config.time_scale)

    def _relabel(self, alice: AliceTurn, goal: Tensor, wanted: Tensor) -> Rows | None:
        """Alice's steps as Bob would see them, with the goal that she reached and his log-probabilities now.

        A Bob with a memory goes along with her from its beginning: his own memory, and not hers.
        """
        if not self.config.beta or not bool(wanted.any()):
            return None
        index = alice.index[..., : len(self.bob.bins)]
        found = relabel(
            self.world, alice.states, index, goal, wanted, lengths=alice.steps if self.config.stop else None
        )
        x, choice, mask = found
        steps = len(index) if self.bob.remembers else 1
        if self.bob.remembers:  # rows of a game beside each other
            x, choice, mask = (t.unflatten(1, (steps, -1)).transpose(1, 2).flatten(1, 2) for t in found)
        logp, _ = self.bob.logp(self.bob.outputs(x, steps), choice)
        return Rows(x, choice, logp, mask, steps=steps)

    # -- opponents of the past --------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The policies of both sides as they are now."""
        return Snapshot(tuple(self.steps.tolist()), self.alice.snapshot(), self.bob.snapshot())

    def _remember(self) -> None:
        self.pool.append(self.snapshot())
        if len(self.pool) > self.config.snapshots:
            del self.pool[1::2]  # thinned out evenly, the first one kept

    def _past(self) -> tuple[int, int, Snapshot | None]:
        """Numbers of games with a past Alice (the first ones) and with a past Bob (the last ones), and who plays."""
        c = self.config
        games = round(c.past_opponent * c.envs / 2)
        if not self.pool or not games:
            return 0, 0, None
        block = self.turns // c.goals  # the same opponent for as many turns as a game has goals
        choice = [int(torch.randint(len(self.pool), (1,), generator=generator(s, block, 13))) for s in self.seeds]
        picked = [
            {
                name: torch.stack([side(self.pool[i])[name][r] for r, i in enumerate(choice)])
                for name in side(self.pool[0])
            }
            for side in (lambda s: s.alice, lambda s: s.bob)
        ]
        return games, games, Snapshot(tuple(self.steps.tolist()), *picked)

    # -- what came of it --------------------------------------------------------------------------------------------

    def fit(self, steps: int, callbacks: Sequence[Callable[[AsymmetricSelfPlay], object]] = ()) -> None:
        """Play and learn until every seed has had this many environment steps.

        Parameters
        ----------
        steps
            Environment steps of a seed, Alice's and Bob's together.
        callbacks
            Called with this object after each turn.

        Raises
        ------
        InvalidInput
            If no goal was valid in the first 20 turns, or all given goals are reached before the first step: nothing
            can be learned then.
        """
        checks.integer("steps", steps, least=1)
        idle = 0  # turns in a row in which a training took no step
        while int(self.steps.min()) < steps:
            before = self.steps.clone()
            self.turn()
            for callback in callbacks:
                callback(self)
            idle = idle + 1 if bool((self.steps == before).any()) else 0
            if idle == 20:
                raise InvalidInput(
                    "all given goals are reached before Bob's first step, for 20 turns: there is nothing to learn. "
                    f"Draw goals further than the thresholds {tuple(self.world.thresholds)} from their starts."
                )
            found = (sum(h["valid"]) + sum(h["out_of_zone"]) for h in self.history if "valid" in h)
            if self.turns == 20 and self.goals is None and not any(found):
                raise InvalidInput(
                    f"0 valid goals in {20 * self.config.envs * len(self.seeds):,} turns; a valid goal needs an object "
                    f"that moves by {max(self.world.thresholds):g} or more and stays on the table. Give Alice more "
                    f"than {self.config.alice_steps} steps, or look at the world's units."
                )

    def evaluate(
        self, holdouts: Mapping[str, GoalSet], n: int = 256, *, seed: int = 0, greedy: bool = False
    ) -> pd.DataFrame:
        """Bob's share of hold-out goals reached; nothing is learned, and no step is counted.

        Parameters
        ----------
        holdouts
            Sets of goals by name.
        n
            Goals of each.
        seed
            Which goals: the same for all seeds of the training, and none of those that it could see.
        greedy
            Take the likeliest action instead of drawing one.

        Returns
        -------
        pandas.DataFrame
            A row for each seed and set: ``rate`` and its 95 % Wilson interval over goals.

        Raises
        ------
        InvalidInput
            For sets that are not functions, or whose states and goals do not fit the world or hold NaN.
        """
        checks.integer("n", n, least=1)
        if not isinstance(holdouts, Mapping):
            raise InvalidInput(f"holdouts must map names to sets of goals, not be a {type(holdouts).__name__}.")
        rows = []
        for number, (name, goals) in enumerate(holdouts.items()):
            found = self.attempt(goals, n, key=(seed, number), greedy=greedy, name=f"holdout {name!r}")
            for s, steps, won in zip(self.seeds, self.steps.tolist(), found.solved.sum(1).tolist(), strict=True):
                low, high = binomtest(won, n).proportion_ci(0.95, "wilson")
                rows.append((s, name, steps, won, n, won / n, low, high))
        return pd.DataFrame(rows, columns=["seed", "holdout", "steps", "successes", "n", "rate", "low", "high"])

    def attempt(
        self, goals: GoalSet, n: int, *, key: Sequence[int] = (0,), greedy: bool = False, name: str = "goals"
    ) -> BobTurn:
        """Bob's attempts at n goals of a set, the same goals for each seed; ``name`` is what refusals call the set."""
        with torch.no_grad():
            given = drawn(self.world, goals, n, generator(*key, 14), name)
            start, goal = (t.to(self.device).expand(len(self.seeds), *t.shape) for t in given)
            playing = torch.ones(len(self.seeds), n, dtype=torch.bool, device=self.device)
            return bob_turn(
                self.world, self.bob, start.clone(), goal, playing, self.config.bob_steps, (*key, 15), greedy=greedy
            )

    def payoff_matrix(self, snapshots: Sequence[Snapshot], n: int = 128, *, seed: int = 0) -> np.ndarray:
        """Bob's share of goals reached, for every Alice against every Bob of the snapshots.

        Parameters
        ----------
        snapshots
            As :meth:`snapshot` gives them, in order of time.
        n
            Games of a pair, of one goal each, from the same start states.
        seed
            Which start states.

        Returns
        -------
        numpy.ndarray
            (R, A, B): rows are Alices, columns are Bobs. NaN where an Alice set no valid goal.

        Raises
        ------
        InvalidInput
            For fewer than two snapshots, and snapshots of other seeds or networks.
        """
        checks.integer("n", n, least=1)
        if len(snapshots) < 2:
            raise InvalidInput(f"a payoff matrix needs two snapshots or more; there are {len(snapshots)}.")
        own = self.snapshot()
        for number, past in enumerate(snapshots):
            for side in ("alice", "bob"):
                shapes = [{k: v.shape for k, v in getattr(s, side).items()} for s in (own, past)]
                if shapes[0] != shapes[1]:
                    raise InvalidInput(
                        f"snapshot {number} is of another game: {side}'s networks have other shapes, or another "
                        "number of seeds. Take snapshots of this game, or of one with the same networks and seeds."
                    )
        c, r = self.config, len(self.seeds)
        out = np.full((r, len(snapshots), len(snapshots)), np.nan)
        with torch.no_grad():
            start = self.world.initial(n, generator(seed, 16)).to(self.device).expand(r, n, -1).contiguous()
            for i, of_alice in enumerate(snapshots):
                turn = alice_turn(self.world, self.alice, start, c.alice_steps, (seed, 17), (n, of_alice.alice))
                goal, verdict = self._judge(start, turn.states[-1])
                playing = verdict <= GoalVerdict.OUT_OF_ZONE
                for j, of_bob in enumerate(snapshots):
                    key = (seed, 18)
                    bob = bob_turn(self.world, self.bob, start, goal, playing, c.bob_steps, key, parameters=of_bob.bob)
                    count = playing.sum(1)
                    rate = (bob.solved & playing).sum(1) / count.clamp(min=1)
                    out[:, i, j] = torch.where(count > 0, rate, torch.full_like(rate, torch.nan)).cpu().numpy()
        return out

    def health(self) -> pd.DataFrame:
        """Gauges of all turns: one row for each turn and seed.

        ``valid``, ``out_of_zone``, ``unmoved``, ``off_table``, ``not_finite`` count goals; ``solve_rate`` is over those
        that Bob played for, ``demos`` counts turns that were cloned; ``entropy``, ``clip_share`` and ``first_ratio``
        (largest distance of a ratio from 1 in the first minibatch, which should be nearly 0) are of Bob's policy.
        """
        rows = [
            {"seed": seed, "turn": h["turn"], **{k: v[r] for k, v in h.items() if isinstance(v, list)}}
            for h in self.history
            for r, seed in enumerate(self.seeds)
        ]
        return pd.DataFrame(rows)

    def diagnosis(self, last: int = 20) -> list[str]:
        """What is wrong with the training, in sentences: an empty list where nothing is.

        Looks at the last turns: no valid goal, a Bob who solves all or nothing, an Alice who does not learn, policies
        that have become deterministic, move too far in an update or act differently each time, and broken simulations.

        Parameters
        ----------
        last
            Turns to look at, 20 by default.

        Examples
        --------
        >>> from mlcollage.papers.asymmetric_self_play import ASPConfig, AsymmetricSelfPlay, PlanarPush
        >>> game = AsymmetricSelfPlay(PlanarPush(), ASPConfig(envs=8, alice_steps=1, bob_steps=1))
        >>> _ = game.turn()
        >>> print(game.diagnosis()[0])
        seed 0: 0 valid goals in the last 8 games; give Alice more than 1 steps, or look at the world's units.
        """
        return sentences(self.history[-checks.integer("last", last, least=1) :], self.seeds, self.config, self.bob.bins)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the whole training as one safetensors file: :meth:`resume` goes on from it, to the same numbers.

        Networks, optimizers, snapshots, states of all games, counters and history. Nothing in it is pickled. What was
        in the file before stays until the new one is complete.

        Examples
        --------
        >>> import tempfile
        >>> from mlcollage.papers.asymmetric_self_play import ASPConfig, AsymmetricSelfPlay, PlanarPush
        >>> game, again = (AsymmetricSelfPlay(PlanarPush(), ASPConfig(envs=8)) for _ in range(2))
        >>> _ = game.turn()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again.resume(game.save(folder + "/training.safetensors"))
        >>> torch.equal(game.turn().end, again.turn().end)
        True
        """
        return save_training(self, path)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file of :meth:`save`, in a game that was made with the same world, settings, seeds and networks.

        Raises
        ------
        MissingFile
            If there is none.
        InvalidInput
            If it is damaged, or of another game: the sentence names what differs. The game is then left as it is.
        """
        resume_training(self, path)

    def _gauges(self, verdict: Tensor, playing: Tensor, solved: Tensor, cloned: Tensor) -> dict[str, Tensor]:
        names = ("valid", "out_of_zone", "unmoved", "off_table", "not_finite")
        found = {name: (verdict == v).sum(1) for name, v in zip(names, GoalVerdict, strict=True)}
        count = playing.sum(1)
        rate = (solved & playing).sum(1) / count.clamp(min=1)
        found["solve_rate"] = torch.where(count > 0, rate, torch.full_like(rate, torch.nan))
        found["demos"] = cloned.sum(1) if self.config.beta else torch.zeros_like(count)
        return found


def _nothing(x: Tensor, bins: Sequence[int]) -> Rows:
    """A row of padding for each seed, in the shape of these observations (R, 1, F)."""
    zero = x.new_zeros(len(x), 1)
    index = zero[..., None].expand(-1, 1, len(bins))
    return Rows(x, index if 0 in bins else index.long(), zero, zero.bool(), zero, zero)


def _in_steps(bob: BobTurn) -> Rows:
    """Bob's rows as they were played: (R, M, ...), step after step, without those of finished games."""
    x, index, logp = (torch.cat(part, 1) for part in (bob.x, bob.index, bob.logp))
    return Rows(x, index, logp, torch.cat([real for _, real in bob.row_of], 1))


def _in_games(bob: BobTurn, n: int) -> Rows:
    """Bob's rows of a game beside each other, (R, N T, ...), padded to the longest turn."""
    steps, r = len(bob.x), len(bob.solved)
    lanes = torch.arange(r, device=bob.solved.device)[:, None]
    mask = torch.zeros(r, n, steps, dtype=torch.bool, device=bob.solved.device)
    wide = [part[0].new_zeros(r, n, steps, *part[0].shape[2:]) for part in (bob.x, bob.index, bob.logp)]
    for t, (games, real) in enumerate(bob.row_of):
        mask[lanes, games, t] = real
        for dense, part in zip(wide, (bob.x, bob.index, bob.logp), strict=True):
            dense[lanes, games, t] = part[t]
    x, index, logp = (dense.flatten(1, 2) for dense in wide)
    return Rows(_finite_rows(x), index, logp, mask.flatten(1), steps=steps)


def _finite_rows(x: Tensor) -> Tensor:
    """Rows with NaN as zeros: no row is learned from, and a memory must not carry it on."""
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), x, torch.zeros_like(x))


def _try_networks(learner: Learner, x: Tensor) -> None:
    """Refuse networks whose outputs do not fit, before the first turn."""
    name = ("Alice", "Bob")[learner.side]
    for what, replicas, width in (("policy", learner.policy, outputs_of(learner.bins)), ("value", learner.value, 1)):
        for layer, module in replicas._model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm):
                raise InvalidInput(
                    f"{name}'s {what} has a {type(module).__name__}, {layer!r}, which acts differently in each pass: "
                    "ratios of an unchanged policy would not be 1. Leave it out, or take layer norm."
                )
        kinds = {p.dtype for p in replicas.parameters.values()} - {torch.float32, torch.float64}
        if kinds:
            raise InvalidInput(f"{name}'s {what} is in {kinds.pop()}; networks train in float32 or float64.")
        with users_code(f"{name}'s {what}"), torch.no_grad():
            out = trial(replicas, x.to(replicas._device))
        if not isinstance(out, Tensor) or out.shape != (*x.shape[:2], width):
            shape = tuple(out.shape[1:]) if isinstance(out, Tensor) else type(out).__name__
            raise InvalidInput(f"{name}'s {what} gives {shape} for {x.shape[1]} rows; expected {(x.shape[1], width)}.")
        if not bool(torch.isfinite(out).all()):
            raise InvalidInput(f"{name}'s {what} gives NaN or infinity for finite rows, before any training.")


def _refuse_shared(alice: Learner, bob: Learner) -> None:
    """Alice and Bob learn from each other only by playing; a network of both would be pulled both ways."""
    modules = [{id(m) for m in side.policy._model.modules()} for side in (alice, bob)]
    if modules[0] & modules[1]:
        raise InvalidInput("policy gives Alice and Bob the same network, or parts of it; make fresh ones at each call.")
