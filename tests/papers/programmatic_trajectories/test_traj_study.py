"""The study of programmatic trajectories: the contract of a study, and users' tracks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlcollage.data import Trajectories
from mlcollage.errors import InvalidInput, MLCollageError
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.papers.programmatic_trajectories import HalfCourtWorld, labeling_function
from mlcollage.papers.programmatic_trajectories.study import STUDY
from mlcollage.papers.programmatic_trajectories.study.experiments import (
    _game,
    on_own_intents,
    on_tracks,
    plays,
)
from mlcollage.testing import study_checks

SLUG = "programmatic_trajectories"
TRACKS = f"{Path(__file__).parent / 'users_tracks.py'}:plays"
SMOKE = STUDY.experiment("plays").settings[Scale.SMOKE]


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    """A table of tracks in meters, with an agent who comes late."""
    x = HalfCourtWorld.draw(20, seed=1, frames=20).x * 0.3048
    n, t, k, _ = x.shape
    i, f, a = (v.ravel() for v in np.meshgrid(range(n), range(t), range(k), indexing="ij"))
    table = pd.DataFrame({"play": i, "frame": f, "player": a, "x": x[..., 0].ravel(), "y": x[..., 1].ravel()})
    table = table[(table["player"] > 0) | (table["frame"] > 4)]
    file = tmp_path_factory.mktemp("tracks") / "game.csv"
    table.to_csv(file, index=False)
    return f"tracks:{file}?id=player&frame=frame&x=x&y=y&sequence=play&window=20&fps=6.25&units=m"


@pytest.mark.parametrize("check", study_checks(SLUG, workload=TRACKS), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_a_csv_of_tracks_runs(csv, tmp_path):
    from mlcollage.lab.running import run_study

    evidence = run_study(SLUG, Scale.SMOKE, workload=csv, store=tmp_path)
    assert not evidence.failures
    assert set(evidence.table["arm"]) >= {"stationary", "window", "no_intents"}
    assert "boids" not in set(evidence.table["experiment"])
    assert np.isfinite(evidence.table["value"]).all()


def run(workload, arm="stationary"):
    settings = on_tracks(SMOKE, workload, Scale.SMOKE)
    return plays(Task(arm, (0,), settings, Scale.SMOKE, workload)).table


def test_one_agent_and_a_court():
    x = HalfCourtWorld.draw(30, seed=1).x[:, :, :1]
    found = run(Trajectories(x, court=(47.0, 50.0)))
    assert "information" not in set(found["metric"])
    assert {"distance_w1", "obeyed", "spread"} <= set(found["metric"])


def test_units_do_not_matter():
    x = HalfCourtWorld.draw(30, seed=1).x
    feet, meters = (run(Trajectories(x * c, court=(47 * c, 50 * c)), "window") for c in (1.0, 0.3048))
    pick = lambda t, m: float(t[t["metric"] == m]["value"].iloc[0])  # noqa: E731
    assert pick(meters, "distance_real") == pytest.approx(0.3048 * pick(feet, "distance_real"), rel=1e-4)
    assert pick(meters, "loglik") == pytest.approx(pick(feet, "loglik") - np.log(0.3048), abs=0.02)


def wide(track):
    """Own intents: which half of a court with its origin far away."""
    return (track[:, 1] > 25 + 5e6).astype(int)


OWN = {
    "function": lambda x: {"labeling": labeling_function(classes=2)(wide)},
    "plain": lambda x: {"labeling": lambda tracks, seen: (tracks[..., 1] > 25 + 5e6).astype(int)},
    "shared": lambda x: {"labeling": labeling_function(classes=2, per_agent=False)(lambda t: wide(t[:, 0]))},
    "array": lambda x: {"intents": (x[..., 1] > 25 + 5e6).astype(int), "n_intents": 3},
    "shared_array": lambda x: {"intents": (x[:, :, 0, 1] > 25 + 5e6).astype(int)},
}


@pytest.mark.parametrize("kind", OWN)
def test_intents_that_come_with_the_tracks_are_used(kind):
    x = HalfCourtWorld.draw(30, seed=1).x.astype(np.float64) + 5e6
    workload = Trajectories(x, fps=6.25, **OWN[kind](x))
    workload.check(kind)
    assert on_tracks(SMOKE, workload, Scale.SMOKE) is None
    task = lambda arm: Task(arm, (0,), on_own_intents(SMOKE, workload, Scale.SMOKE), Scale.SMOKE, workload)  # noqa: E731
    game = _game(task("stationary"))
    want = (x[..., 1] > 25 + 5e6) if "shared" not in kind else (x[:, :, 0, 1] > 25 + 5e6)
    order = np.random.default_rng([22, 0]).permutation(30)
    assert (game.test.intents.numpy() == want[order[:6]][: SMOKE.test]).all()
    assert (game.train.intents.numpy() == want[order[6:]][: SMOKE.train]).all()
    assert game.classes == (3 if kind == "array" else 2)
    assert _game(task("no_intents")).test.intents is None
    found = plays(task("stationary"))
    said = set(found.table["metric"])
    assert ("obeyed" in said) == ("array" not in kind)  # an array says nothing of what is drawn
    assert ("information" in said) == ("shared" not in kind)
    assert np.isfinite(found.table["value"]).all()


def test_a_workload_of_own_intents_runs_and_draws(tmp_path):
    from mlcollage.lab.running import run_study

    file = tmp_path / "mine.py"
    file.write_text(OWN_FILE)
    evidence = run_study(SLUG, Scale.SMOKE, workload=f"{file}:f", store=tmp_path / "store")
    assert not evidence.failures
    assert set(evidence.table["experiment"]) == {"own_intents"}
    assert "window" not in set(evidence.table["arm"])


OWN_FILE = """
from mlcollage.papers.programmatic_trajectories import HalfCourtWorld, labeling_function

@labeling_function(classes=2)
def near(track):
    return ((track - [5.25, 25.0]) ** 2).sum(1) < 225

def f():
    return {"tracks": HalfCourtWorld.draw(20, seed=1, frames=16).x, "fps": 6.25, "labeling": near}
"""


def test_a_labeling_of_another_shape_is_refused():
    x = HalfCourtWorld.draw(20, seed=1, frames=16).x
    for answer, said in ((lambda t, m: t[..., 0], "must return whole numbers"), (lambda t, m: 1 / 0, "ZeroDivision")):
        workload = Trajectories(x, labeling=answer)
        with pytest.raises(MLCollageError, match=said):
            _game(Task("stationary", (0,), on_own_intents(SMOKE, workload, Scale.SMOKE), Scale.SMOKE, workload))


@pytest.mark.parametrize(
    ("shape", "match"), [((8, 20, 2, 2), "needs 16"), ((20, 6, 2, 2), "needs 16"), ((20, 20, 2, 1), "one coordinate")]
)
def test_too_little_is_refused(shape, match):
    with pytest.raises(InvalidInput, match=match):
        on_tracks(SMOKE, Trajectories(np.random.default_rng(0).normal(size=shape).cumsum(1)), Scale.SMOKE)
