"""Speed of self-play: steps with learning, seeds stacked, and the world beside the same one in Gymnasium's vector API.

``mlcollage bench asymmetric_self_play`` prints the table. Times are CPU seconds of one thread, taken in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mlcollage._random import generator
from mlcollage.papers.asymmetric_self_play import (
    ASPConfig,
    AsymmetricSelfPlay,
    GoalReachingEnv,
    Grasp25D,
    MujocoTabletop,
    block_holdouts,
)

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio; ratios are over the first row of each group."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_learning(quick), *_million(quick), *_worlds(quick), *_tabletop(quick)]
    finally:
        torch.set_num_threads(before)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _learning(quick: bool) -> list[Row]:
    """Turns of one seed and of four as one stacked model, both sides learning, in turns."""
    config = ASPConfig(envs=128, alice_steps=12, bob_steps=24, store_invalid=True, embed=(32,))
    games = {r: AsymmetricSelfPlay(Grasp25D(), config, seeds=range(r)) for r in (1, 4)}
    spent = dict.fromkeys(games, 0.0)
    for game in games.values():
        game.turn()  # what happens once
    first = {r: int(game.steps.sum()) for r, game in games.items()}
    for _ in range(6 if quick else 40):
        for r, game in games.items():
            spent[r] += _seconds(game.turn)
    rate = {r: (int(game.steps.sum()) - first[r]) / spent[r] for r, game in games.items()}
    return [
        _row("one seed", "self-play with learning", rate[1], "steps/s"),
        _row("four seeds stacked", "with learning, all seeds together", rate[4], "steps/s", rate[4] / rate[1]),
        _row("four seeds stacked", "time of the same turns, over one seed's", spent[4] / spent[1], "x"),
    ]


_TRAINING = """
import sys, time
import torch
from mlcollage.papers.asymmetric_self_play import ASPConfig, AsymmetricSelfPlay, Grasp25D
torch.set_num_threads(1)
config = ASPConfig(envs=256, alice_steps=12, bob_steps=24, store_invalid=True, embed=(32,), lr=2e-3)
seeds = [int(s) for s in sys.argv[2:]]
game = AsymmetricSelfPlay(Grasp25D(), config, seeds=seeds)
start = time.process_time()
game.fit(int(sys.argv[1]))
print(time.process_time() - start, int(game.steps.sum()))
"""


def _million(quick: bool) -> list[Row]:
    """Four seeds, both sides learning, as two processes of two stacked seeds: a million steps of all together.

    CPU seconds of the longer one: on two cores that nobody else uses, this is what one waits.
    """
    each = 25_000 if quick else 250_000
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _TRAINING, str(each), *seeds],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seeds in (("0", "1"), ("2", "3"))
    ]
    found = [process.communicate()[0].split() for process in started]
    spent, steps = max(float(f[0]) for f in found), sum(int(f[1]) for f in found)
    return [
        _row(
            f"two processes of two stacked seeds, {steps:,} steps",
            "a million steps with learning: CPU seconds of the longer process",
            spent * 1e6 / steps,
            "s",
        )
    ]


def _worlds(quick: bool) -> list[Row]:
    """Steps of the world in tensor code, against the same world behind Gymnasium's vector API."""
    import gymnasium

    world, n, steps = Grasp25D(), 256, 20 if quick else 100
    state = world.initial(n, generator(0))
    actions = torch.randint(5, (steps, n, 4), generator=generator(1))

    def ours() -> None:
        now = state
        for action in actions:
            now = world.step(now, action)

    copies = 32
    goals = block_holdouts(world)["push"]
    envs = gymnasium.vector.SyncVectorEnv([lambda: GoalReachingEnv(world, goals, steps + 1)] * copies)
    envs.reset(seed=0)

    def theirs() -> None:
        for action in actions:
            envs.step(np.asarray(action[:copies]))

    ours()
    fast, slow = n * steps / _seconds(ours), copies * steps / _seconds(theirs)
    return [
        _row("gymnasium SyncVectorEnv", f"the same world, {copies} copies", slow, "steps/s"),
        _row("Grasp25D", f"{n} rows in one tensor", fast, "steps/s", fast / slow),
    ]


def _tabletop(quick: bool) -> list[Row]:
    """Control steps (20 physics steps) of MuJoCo's boxes on one thread, under random actions."""
    rows = []
    for boxes in (1, 2, 8):
        world = MujocoTabletop(boxes, threads=1)
        state, count = world.initial(32, generator(0)), 5 if quick else 25
        actions = torch.randint(11, (count, 32, 5), generator=generator(1))

        def steps(world: MujocoTabletop = world, now: torch.Tensor = state, actions: torch.Tensor = actions) -> None:
            for action in actions:
                now = world.step(now, action)

        rows.append(_row("MujocoTabletop", f"{boxes} boxes, one thread", 32 * count / _seconds(steps), "steps/s"))
    return rows
