"""What is run and what is claimed of asymmetric self-play (Plappert et al., 2021).

Claims, margins, grids and settings were written before the runs with the study's seeds; the paper's page says which
choices followed pilots with other seeds. All arms of a comparison have equally many environment steps. A user's
:class:`~mlcollage.data.GoalTask` is trained by self-play, by self-play without cloning and directly on its hold-out
goals; what is about blocks and discs is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcollage.data import GoalTask
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import ABLATIONS, MAIN, Replay, SelfPlay, measure_replays, on_task, self_play

_SMOKE: Mapping[str, Any] = {"steps": 1200, "envs": 16, "goals_seen": 8, "marks": 3, "pairs": 8}
_FULL: Mapping[str, Any] = {"steps": 1_000_000, "envs": 512, "alice_steps": 20, "bob_steps": 40, "lr": 1e-3}
_PAPER: Mapping[str, Any] = {**_FULL, "steps": 20_000_000, "envs": 4096, "embed": 256, "hidden": 256}


def _settings(**own: Any) -> dict[Scale, SelfPlay]:
    return {
        Scale.SMOKE: SelfPlay(**{**own, **_SMOKE}),
        Scale.QUICK: SelfPlay(**own),
        Scale.FULL: SelfPlay(**{**own, **_FULL}),
        Scale.PAPER: SelfPlay(**{**own, **_PAPER}),
    }


def _large(**own: Any) -> dict[Scale, SelfPlay]:
    """Settings of the scales that a world needs in which nothing is learned within minutes."""
    return {scale: SelfPlay(**{**own, **more, **own}) for scale, more in ((Scale.FULL, _FULL), (Scale.PAPER, _PAPER))}


# MuJoCo makes some thousand control steps a second and core, the other worlds some hundred thousand.
_SLOW: Mapping[str, Any] = {"world": "tabletop", "envs": 64, "alice_steps": 25, "bob_steps": 50, "goals_seen": 64}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 4, Scale.FULL: 8, Scale.PAPER: 8},
    experiments=(
        Experiment(
            "blocks",
            self_play,
            arms=tuple(MAIN),
            settings=_settings(),
            block=None,
            workloads=(GoalTask,),
            adapt=on_task,
            version=2,
        ),
        Experiment("ablations", self_play, arms=tuple(ABLATIONS), settings=_settings(), block=None, version=2),
        Experiment(
            "discs",
            self_play,
            arms=("discs_asp", "discs_no_abc", "discs_direct"),
            settings=_settings(world="discs", steps=270_000),
            block=None,
            version=2,
        ),
        Experiment(
            "two_blocks", self_play, arms=("two_asp", "two_no_abc"), settings=_large(world="two blocks"), block=None
        ),
        Experiment(
            "rotation", self_play, arms=("turn_asp", "turn_no_abc"), settings=_large(world="turning block"), block=None
        ),
        Experiment(
            "tabletop",
            self_play,
            arms=("mujoco_asp", "mujoco_no_abc"),
            settings=_large(**_SLOW, steps=400_000),
            block=None,
        ),
        Experiment("replays", measure_replays, arms=("replay",), settings={scale: Replay() for scale in Scale}),
    ),
)
