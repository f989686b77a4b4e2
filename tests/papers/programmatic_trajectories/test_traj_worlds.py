"""Boids, the half-court and the statistics: the official numbers, truths that are known, and chance levels."""

import time

import numpy as np
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.papers.programmatic_trajectories import (
    BoidsWorld,
    GridIntent,
    HalfCourtWorld,
    LFAnalysis,
    LFApplier,
    Stationary,
    Window,
    best_of_n,
    boids_step,
    collision_rate,
    distance,
    friendly_label,
    intent_calibration,
    intent_information,
    nearest_distance,
    out_of_bounds,
    speed,
    two_sample_auc,
    wasserstein,
)


def test_boids_move_as_the_official_ones(official):
    d = official("boids")
    pos, vel = d["pos"][:, 0], d["vel"][:, 0]
    for s in range(d["boost"].shape[1]):
        pos, vel = boids_step(pos, vel, d["behavior"], d["boost"][:, s])
        assert np.abs(pos - d["pos"][:, s + 1]).max() < 1e-12
        assert np.abs(vel - d["vel"][:, s + 1]).max() < 1e-12


def test_statistics_are_the_official_ones(official):
    d = official("domain_statistics")
    x = d["feet"].reshape(12, 20, 5, 2)
    assert np.allclose(speed(x), d["speed_per_seq"], atol=1e-12)
    assert np.allclose(distance(x), d["distance_per_seq"], atol=1e-12)
    assert np.array_equal(out_of_bounds(x, any_player=True), d["oob_per_seq"])
    assert (out_of_bounds(x) <= out_of_bounds(x, any_player=True)).all()


def test_boids_are_two_groups_that_the_label_tells_apart():
    start = time.process_time()
    world = BoidsWorld.draw(1024, seed=0)
    assert time.process_time() - start < 4  # 4,096 take about a second on an idle core
    near = nearest_distance(world.x[:, -20:]).mean((1, 2))
    assert near[world.friendly == 1].mean() == pytest.approx(0.149, abs=0.01)
    assert near[world.friendly == 0].mean() == pytest.approx(1.078, abs=0.01)
    assert (friendly_label()(world.x)[..., 0] == world.labels()).all()
    assert np.array_equal(BoidsWorld.draw(3, seed=5).x, BoidsWorld.draw(3, seed=5).x)
    assert not np.array_equal(BoidsWorld.draw(3, seed=5).x, BoidsWorld.draw(3, seed=6).x)


def test_plays_have_the_statistics_of_the_papers_data():
    plays = HalfCourtWorld.draw(1000, seed=3)
    assert speed(plays.x).mean() == pytest.approx(0.77, abs=0.05)
    assert distance(plays.x).mean() == pytest.approx(37.8, abs=2.5)
    assert 0.005 < out_of_bounds(plays.x, any_player=True).mean() < 0.04
    L = LFApplier([Stationary(), Window(25), Window(50)]).apply(plays.x, fps=plays.fps)
    accuracy = LFAnalysis(L, ["stationary", "25", "50"]).summary(plays.intents())["accuracy"]
    assert accuracy["stationary"] > 0.75
    assert accuracy["stationary"] > accuracy["25"] + 0.2 > accuracy["50"] + 0.2
    assert intent_information(plays.intents()[:, 25], 90) > 0.3
    assert plays.mirrored.mean() == pytest.approx(0.5, abs=0.06)


def test_gaps_and_rates():
    x = np.zeros((1, 4, 1, 2))
    x[0, :, 0, 0] = 0, 1, np.nan, 5
    assert speed(x).tolist() == [1.0]
    assert distance(x).tolist() == [1.0]
    assert speed(x, fps=25).tolist() == [25.0]
    assert np.isnan(nearest_distance(np.concatenate([x, x + np.nan], 2))).all()
    assert collision_rate(np.zeros((1, 2, 2, 2)), 0.1).tolist() == [1.0]
    with pytest.raises(InvalidInput, match="two frames"):
        speed(x[:, :1])
    with pytest.raises(InvalidInput, match="two agents"):
        nearest_distance(x)


def test_information_of_known_tables():
    rng = np.random.default_rng(0)
    a = rng.integers(2, size=(20_000, 1))
    noisy = np.where(rng.random(a.shape) < 0.1, 1 - a, a)
    want = np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1)
    assert intent_information(np.hstack([a, noisy]), 2) == pytest.approx(want, abs=0.01)
    apart = rng.integers(30, size=(2000, 2))
    assert abs(intent_information(apart, 30)) < 0.02  # the plug-in estimate alone is 0.2 too high
    with pytest.raises(InvalidInput, match="two agents"):
        intent_information(a, 2)


def test_calibration_and_chance():
    rng = np.random.default_rng(0)
    want = rng.integers(90, size=(60, 1, 3))
    at = GridIntent().centers()[np.broadcast_to(want, (60, 4, 3))]
    obeyed, chance = intent_calibration(at, np.broadcast_to(want, (60, 4, 3)), GridIntent())
    assert obeyed == 1
    assert chance < 0.03
    assert intent_calibration(at, np.full((60, 4, 3), -1), GridIntent())[0] == 0
    with pytest.raises(InvalidInput, match="commands must be"):
        intent_calibration(at, want[:2], GridIntent())


def test_best_of_n_by_agent_and_by_scene():
    truth = np.zeros((1, 2, 2, 2))
    samples = np.zeros((2, 1, 2, 2, 2))
    samples[0, 0, :, :, 0] = [[1, 3], [1, 3]]
    samples[1, 0, :, :, 0] = [[3, 1], [3, 1]]
    found = best_of_n(samples, truth)
    assert [found[k] for k in ("min_ade", "min_fde", "min_scene_ade", "min_scene_fde")] == [1, 1, 2, 2]
    # The final error is that of the last frame that counts.
    samples[:, 0, 1] += 100
    found = best_of_n(samples, truth, np.array([[[True, True], [False, False]]]))
    assert found["min_fde"] == 1
    with pytest.raises(InvalidInput, match="samples must be"):
        best_of_n(samples[0], truth)
    with pytest.raises(InvalidInput, match="no frame counts"):
        best_of_n(samples, truth, np.zeros((1, 2, 2), bool))


def test_the_stand_in_for_judges():
    plays = HalfCourtWorld.draw(120, seed=1).x
    assert two_sample_auc(plays[:60], plays[60:]) == pytest.approx(0.5, abs=0.16)
    farther = plays[60:, :1] + 2 * (plays[60:] - plays[60:, :1])
    assert two_sample_auc(plays[:60], farther) > 0.9
    # Noise of single frames is left to the likelihood.
    noisy = plays[60:] + np.random.default_rng(0).normal(0, 0.5, plays[60:].shape)
    assert two_sample_auc(plays[:60], noisy) < 0.75
    assert wasserstein(speed(plays), speed(plays)) == 0


def test_statistics_refuse_what_they_cannot_count():
    x = np.random.default_rng(0).uniform(0, 40, (9, 6, 2, 2))
    for call, said in (
        (lambda: speed(x, 0), "fps must be"),
        (lambda: out_of_bounds(x, (0, 50)), "court must be"),
        (lambda: out_of_bounds(np.zeros((2, 3, 2, 3))), "court"),
        (lambda: wasserstein(np.array([np.nan]), x), "real must have a finite value"),
        (lambda: wasserstein(x, np.array([np.inf])), "generated must have"),
        (lambda: intent_information(np.array([[1, 5]] * 9), 3), "whole numbers below 3"),
        (lambda: best_of_n(x[None] * np.nan, x), "not finite where the truth counts"),
        (lambda: best_of_n(x[None], x, np.ones((9, 6))), "mask must be"),
        (lambda: two_sample_auc(x, x[:, :4]), "must be"),
        (lambda: two_sample_auc(x[:2], x[:2]), "4 folds need"),
        (lambda: boids_step(x[:, 0], x[:, 0], np.ones(2), np.ones((9, 2))), "shapes must be"),
        (lambda: BoidsWorld.draw(2, seed=-1), "seed must be"),
        (lambda: HalfCourtWorld.draw(2, seed=1.5), "seed must be"),
    ):
        with pytest.raises(InvalidInput, match=said):
            call()
    assert wasserstein(np.array([0.0, np.nan, 1.0]), np.array([2.0, 3.0])) == 2.0
