"""Self-play and its rivals at equally many environment steps: success on hold-out goals, payoffs, replays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from mlcollage._random import generator
from mlcollage.data import GoalSet, GoalTask, GoalWorld
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task

from ..certificate import certify, coverage_entropy
from ..checkpoint import Snapshot
from ..config import ASPConfig
from ..game import AsymmetricSelfPlay, Turn
from ..goals import GoalVerdict
from ..grasp import Grasp25D
from ..grasp_turn import GraspAndTurn
from ..holdouts import block_holdouts, disc_holdouts, mixed
from ..mujoco_tabletop import MujocoTabletop, tabletop_holdouts
from ..planar import PlanarPush

MAIN: Mapping[str, Mapping[str, Any]] = {"asp": {}, "no_abc": {"beta": 0.0}, "direct": {}}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "random_alice": {"learn_alice": False},
    "time": {"reward": "time"},
    "single_goal": {"goals": 1},
    "no_clip": {"abc_clip": "none"},
    "no_filter": {"abc_filter": False},
}
LOOKS = 10  # evaluations in a training
AIR = 0.05  # meters above the table from which a goal is in the air


@dataclass(frozen=True)
class SelfPlay:
    """A training of all seeds of one arm as one stacked model."""

    world: str = "blocks"  # blocks, two blocks, turning block, discs, tabletop (MuJoCo), or the user's task
    steps: int = 180_000  # environment steps of a seed, Alice's and Bob's together
    envs: int = 128  # games at the same time, for each seed
    alice_steps: int = 12  # of Alice for a goal
    bob_steps: int = 24  # of Bob for a goal, at most
    lr: float = 2e-3  # of Adam
    embed: int = 32  # units for each object
    hidden: int = 64  # units after the maximum
    goals_seen: int = 128  # hold-out goals of each set, at each look
    marks: int = 5  # moments whose Alices and Bobs meet in the payoff matrix
    pairs: int = 64  # games of each pair


@dataclass(frozen=True)
class Replay:
    """Random actions taken twice."""

    games: int = 32  # courses
    steps: int = 20  # steps of each


def on_task(s: SelfPlay, task: GoalTask, scale: Scale) -> SelfPlay:
    """The task's own numbers of steps."""
    if not task.holdouts:
        raise InvalidInput(f"{task.name} has no holdouts; the study needs sets of goals to judge Bob by.")
    return dataclasses.replace(s, world="the task", alice_steps=task.alice_steps, bob_steps=task.bob_steps)


def _place(task: Task[SelfPlay]) -> tuple[GoalWorld, Mapping[str, GoalSet]]:
    """The world of a run, and its hold-out goals."""
    if task.workload is not None:
        return task.workload.make(task.workload.name), task.workload.holdouts
    if task.settings.world == "discs":
        discs = PlanarPush()
        return discs, disc_holdouts(discs)
    if task.settings.world == "tabletop":
        boxes = MujocoTabletop()
        return boxes, tabletop_holdouts(boxes)
    several = 2 if task.settings.world == "two blocks" else 1
    blocks = GraspAndTurn() if task.settings.world == "turning block" else Grasp25D(several)
    return blocks, block_holdouts(blocks)


def _game(task: Task[SelfPlay], world: GoalWorld, holdouts: Mapping[str, GoalSet]) -> AsymmetricSelfPlay:
    s = task.settings
    kind = task.arm
    for world_ in ("discs_", "two_", "turn_", "mujoco_"):
        kind = kind.removeprefix(world_)
    # Table 1 of the paper gives invalid goals a reward of 0; Alice learns from them, or she would not learn to avoid
    # them where a random policy seldom moves anything.
    config = ASPConfig(
        alice_steps=s.alice_steps,
        bob_steps=s.bob_steps,
        envs=s.envs,
        lr=s.lr,
        embed=(s.embed,),
        hidden=(s.hidden,),
        store_invalid=True,
        **{**MAIN, **ABLATIONS}[kind],
    )
    goals = mixed(dict(holdouts)) if kind == "direct" else None
    return AsymmetricSelfPlay(world, config, seeds=task.seeds, goals=goals, device=task.device)


def self_play(task: Task[SelfPlay]) -> Measurements:
    """Train one arm; curves of success on hold-out goals over steps, and what became of Alice's goals."""
    m, s = Measurements(), task.settings
    world, holdouts = _place(task)
    game = _game(task, world, holdouts)
    curves = _Curves(game, holdouts, s)
    marks: list[Snapshot] = []
    films: list[Turn] = []

    def look(game: AsymmetricSelfPlay) -> None:
        done = int(game.steps.min())
        curves.look(done)
        if task.arm == "asp" and done >= s.steps * len(marks) / (s.marks - 1):
            marks.append(game.snapshot())
        # The first turn, and one at each later mark.
        if task.arm == "asp" and game.last is not None and done >= s.steps * len(films) / (s.marks - 1):
            films.append(game.last)

    look(game)
    game.fit(s.steps, callbacks=[look])
    curves.look(s.steps, last=True)
    curves.record(m)
    if task.arm != "direct" and game.goals is None and world.thresholds:
        _record_goals(m, game, films)
    if task.arm == "asp":
        _record_payoff(m, game, [*marks[: s.marks - 1], game.snapshot()], s)
        if 0 in task.seeds and task.workload is None:
            _record_film(m, films, task.seeds.index(0))
    return m


class _Curves:
    """Success on hold-out goals at looks during a training."""

    def __init__(self, game: AsymmetricSelfPlay, holdouts: Mapping[str, GoalSet], s: SelfPlay) -> None:
        self.game, self.holdouts, self.s = game, holdouts, s
        self.steps: list[NDArray[np.float64]] = []  # (looks, R)
        self.rates: list[NDArray[np.float64]] = []  # (looks, R, sets)

    def look(self, done: int, *, last: bool = False) -> None:
        if done < self.s.steps * len(self.steps) / LOOKS and not last:
            return
        table = self.game.evaluate(self.holdouts, self.s.goals_seen, seed=1)
        rates = table.pivot(index="seed", columns="holdout", values="rate").loc[list(self.game.seeds)]
        self.steps.append(self.game.steps.numpy().astype(float))
        self.rates.append(rates[list(self.holdouts)].to_numpy())

    def record(self, m: Measurements) -> None:
        """Curves on a common grid of steps: equally many for all arms."""
        grid = np.linspace(0, self.s.steps, LOOKS + 1)
        steps, rates = np.stack(self.steps), np.stack(self.rates)
        for r, seed in enumerate(self.game.seeds):
            each = {n: np.interp(grid, steps[:, r], rates[:, r, k]) for k, n in enumerate(self.holdouts)}
            curve = np.mean(list(each.values()), axis=0)
            for at, value in zip(grid, curve, strict=True):
                m.add("success", value, step=int(at), seed=seed)
            for name, values in each.items():
                m.add("final", values[-1], seed=seed, holdout=name)
            m.add("area", np.trapezoid(curve, grid) / grid[-1], seed=seed)
            m.add("drawdown", (np.maximum.accumulate(curve) - curve).max(), seed=seed)


def _record_goals(m: Measurements, game: AsymmetricSelfPlay, films: list[Turn]) -> None:
    """Shares of the course of a training, in its first and its last quarter."""
    health = game.health()
    for seed in game.seeds:
        own = health[health["seed"] == seed]
        quarter = max(1, len(own) // 4)
        m.add("solved_last", float(np.nan_to_num(own["solve_rate"].tail(quarter).mean())), seed=seed)
        m.add("valid_last", float(own["valid"].tail(quarter).mean() / game.config.envs), seed=seed)
    for part, turn in enumerate(films):
        for r, seed in enumerate(game.seeds):
            valid = turn.verdict[r] <= GoalVerdict.OUT_OF_ZONE
            goals = turn.goal[r][valid]
            if len(goals):
                m.add("coverage", coverage_entropy(goals, max(game.world.thresholds)), seed=seed, part=part)
            if isinstance(game.world, Grasp25D):
                m.add("air", _air(goals), seed=seed, part=part)


def _air(goals: Tensor) -> float:
    return float((goals[..., 2] > AIR).any(-1).float().mean()) if len(goals) else 0.0


def _record_payoff(m: Measurements, game: AsymmetricSelfPlay, marks: list[Snapshot], s: SelfPlay) -> None:
    """Every Alice against every Bob, and how success goes with the training of each."""
    payoff = game.payoff_matrix(marks, s.pairs)  # (R, A, B)
    m.array("payoff", payoff.astype(np.float64))
    for r, seed in enumerate(game.seeds):
        m.add("alice_trend", _trend(payoff[r].T), seed=seed)
        m.add("bob_trend", _trend(payoff[r]), seed=seed)


def _trend(rows: NDArray[np.float64]) -> float:
    """Mean rank correlation along rows with their order; a row without any change counts as 0."""
    found = []
    for row in rows:
        kept = np.isfinite(row)
        flat = kept.sum() < 3 or np.ptp(row[kept]) == 0
        found.append(0.0 if flat else float(spearmanr(np.flatnonzero(kept), row[kept]).statistic))
    return float(np.mean(found))


def _record_film(m: Measurements, films: list[Turn], r: int, shown: int = 12) -> None:
    """Start and end of Alice's first valid goals, at each mark: (marks, shown, 2, S), padded with NaN."""
    size = films[0].start.shape[-1]
    film = np.full((len(films), shown, 2, size), np.nan)
    for k, turn in enumerate(films):
        games = (turn.verdict[r] == GoalVerdict.VALID).nonzero().squeeze(-1)[:shown]
        film[k, : len(games), 0] = turn.start[r, games].cpu().numpy()
        film[k, : len(games), 1] = turn.end[r, games].cpu().numpy()
    m.array("film", film)


def measure_replays(task: Task[Replay]) -> Measurements:
    """Random courses taken twice in each world: the largest deviation, in thresholds."""
    m, s = Measurements(), task.settings
    worlds: tuple[GoalWorld, ...] = (Grasp25D(2), PlanarPush(2))
    deviation = [certify(world, games=s.games, steps=s.steps, seed=task.seed).deviation for world in worlds]
    m.add("deviation", max(deviation))
    # The start states of different seeds are different ones.
    first = torch.stack([Grasp25D().initial(4, generator(seed, 11)) for seed in (task.seed, task.seed + 1)])
    m.add("same_starts", float((first[0] == first[1]).all(-1).float().mean()))
    return m
