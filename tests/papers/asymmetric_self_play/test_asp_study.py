"""The study of asymmetric self-play: its contract, its curves, and a user's task."""

import base64
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlcollage.data import GoalTask
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.papers.asymmetric_self_play import ASPConfig, AsymmetricSelfPlay, PlanarPush, disc_holdouts, episode_page
from mlcollage.papers.asymmetric_self_play.holdouts import mixed
from mlcollage.papers.asymmetric_self_play.study import STUDY
from mlcollage.papers.asymmetric_self_play.study.experiments import _trend, on_task, self_play
from mlcollage.testing import study_checks

SLUG = "asymmetric_self_play"
TASK = Path(__file__).with_name("users_task.py")
SMOKE = STUDY.experiment("blocks").settings[Scale.SMOKE]
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("check", study_checks(SLUG, workload=f"{TASK}:mine"), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_arms_of_a_comparison_have_equally_many_steps(smoke_store):
    table = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG)).table
    curves = table[table["metric"] == "success"]
    grids = {arm: tuple(sorted(set(rows["step"]))) for arm, rows in curves.groupby("arm")}
    assert len(set(grids.values())) == 1
    settings = {e.name: e.settings[Scale.QUICK] for e in STUDY.experiments if e.name in ("blocks", "ablations")}
    assert settings["blocks"] == settings["ablations"]


def test_measured_values_are_finite(smoke_store):
    table = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG)).table
    assert np.isfinite(table["value"]).all()
    assert table[table["metric"] == "area"]["value"].between(0, 1).all()


def test_trends_of_a_payoff_matrix():
    rising = np.tile(np.linspace(0, 1, 5), (5, 1))  # later Bobs solve more, all Alices are alike
    assert _trend(rising) == pytest.approx(1.0)
    assert _trend(rising.T) == 0.0
    assert _trend(-rising) == pytest.approx(-1.0)
    assert _trend(np.full((5, 5), np.nan)) == 0.0


def test_direct_training_has_all_hold_out_goals():
    def one(n, generator):
        return torch.zeros(n, 1), torch.zeros(n, 1, 1)

    def other(n, generator):
        return torch.ones(n, 1), torch.ones(n, 1, 1)

    state, goal = mixed({"one": one, "other": other})(400, torch.Generator().manual_seed(0))
    assert torch.equal(state, goal[:, 0])
    assert 150 < float(state.sum()) < 250


def test_a_task_without_holdouts_is_refused_and_its_steps_are_taken():
    task = GoalTask(PlanarPush, {}, name="mine")
    with pytest.raises(InvalidInput, match="holdouts"):
        on_task(SMOKE, task, Scale.QUICK)
    task = GoalTask(PlanarPush, disc_holdouts(PlanarPush()), alice_steps=7, bob_steps=9)
    adapted = on_task(SMOKE, task, Scale.QUICK)
    assert (adapted.alice_steps, adapted.bob_steps) == (7, 9)
    m = self_play(Task("asp", (0,), dataclasses.replace(adapted, steps=200, envs=4), workload=task))
    assert set(m.table["metric"]) >= {"success", "area", "final"}


@pytest.mark.parametrize(
    ("name", "holdouts"),
    [
        ("two_blocks", {"push", "pick", "stack"}),
        ("rotation", {"push", "pick", "flip"}),
        ("tabletop", {"push", "pick", "flip"}),
    ],
)
def test_experiments_of_scale_full_run(name, holdouts):
    experiment = STUDY.experiment(name)
    settings = experiment.settings[Scale.FULL]
    assert settings.steps >= 400_000
    assert Scale.QUICK not in experiment.settings
    small = dataclasses.replace(
        settings, steps=150, envs=3, alice_steps=4, bob_steps=4, goals_seen=3, embed=8, hidden=8
    )
    for arm in experiment.arms:
        m = self_play(Task(arm, (0, 1), small, scale=Scale.FULL))
        table = m.table
        assert set(table[table["metric"] == "final"]["holdout"]) == holdouts
        assert table[table["metric"] == "area"]["value"].between(0, 1).all()


class Drawn(PlanarPush):
    """A world that draws itself, or cannot."""

    able = True

    def frame(self, row):
        if not self.able:
            raise InvalidInput("there is no OpenGL here")
        return np.full((6, 8, 3), int(100 * abs(float(row[0]))), np.uint8)


@pytest.mark.parametrize("able", [True, False])
def test_a_world_s_own_pictures_are_shown_where_it_can_draw(able, tmp_path):
    world = Drawn()
    world.able = able
    game = AsymmetricSelfPlay(world, ASPConfig(envs=4, alice_steps=4, bob_steps=4))
    text = episode_page(game, tmp_path / "episode.html", games=2).read_text("utf-8")
    assert ("data:image/jpeg;base64," in text) == able
    if able:
        turns = json.loads(text.split("const turns = ")[1].split(";\n")[0])
        assert [len(t["frames"][0]) for t in turns] == [5, 5]
        assert all(len(t["frames"][1]) == len(t["bob"]) for t in turns)
        picture = Image.open(io.BytesIO(base64.b64decode(turns[0]["frames"][0][0].split(",")[1])))
        assert picture.size == (8, 6)


def test_an_episode_is_a_page_without_a_network(tmp_path):
    game = AsymmetricSelfPlay(PlanarPush(), ASPConfig(envs=4, alice_steps=4, bob_steps=4), seeds=(0, 1))
    before = game.snapshot()
    text = episode_page(game, tmp_path / "episode.html", games=3, replica=1).read_text("utf-8")
    assert "http" not in text
    assert '"verdict"' in text
    assert all(torch.equal(p, before.bob[name]) for name, p in game.bob.policy.parameters.items())
    assert episode_page(game, tmp_path / "again.html", games=3, replica=1).read_text("utf-8") == text
    with pytest.raises(InvalidInput, match="replica"):
        episode_page(game, tmp_path / "episode.html", replica=2)


def test_the_example_runs(tmp_path):
    script = ROOT / "examples" / "self_play_in_your_environment.py"
    command = [sys.executable, str(script), "--steps", "400", "--page", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "of goals in the corners" in done.stdout
    assert (tmp_path / "page.html").exists()
