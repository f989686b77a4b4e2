"""The estimator and the two pages: contracts, commands that are obeyed, blinding, and known strengths."""

import itertools
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone

from mlcollage.errors import InvalidInput
from mlcollage.papers.programmatic_trajectories import (
    BoidsWorld,
    GridIntent,
    HalfCourtWorld,
    MacroTrajectoryModel,
    MacroVRNN,
    RoleAssigner,
    Stationary,
    Window,
    bradley_terry,
    friendly_label,
    play_page,
    rating_page,
)

PLAYS = HalfCourtWorld.draw(40, seed=2)
SMALL = {"hidden": 8, "rnn": 8, "z": 2, "max_iter": 6, "window": 10}


def test_the_estimator_is_a_contract():
    model = MacroTrajectoryModel(Stationary(), fps=PLAYS.fps, **SMALL)
    state = torch.random.get_rng_state()
    one, two = clone(model).fit(PLAYS.x), clone(model).fit(PLAYS.x)
    assert one.loss_curve_ == two.loss_curve_
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.isfinite(one.score(PLAYS.x[:5], n_particles=2))
    x = one.sample(PLAYS.x[:3, :10], 5, n=2)
    assert x.shape == (2, 3, 15, 5, 2)
    assert np.allclose(x[:, :, :10], PLAYS.x[:3, :10], atol=1e-5)
    assert np.array_equal(x, one.sample(PLAYS.x[:3, :10], 5, n=2))
    assert not np.array_equal(x, one.sample(PLAYS.x[:3, :10], 5, n=2, seed=1))
    p = one.predict_proba(PLAYS.x[:3, :10])
    assert p.shape == (3, 5, 90)
    assert np.allclose(p.sum(-1), 1)
    assert one.label_report_["coverage"] == 1.0
    assert one.label_report_["repeat-last accuracy"] > 0.8


def test_shared_intents_missing_agents_and_separate_weights():
    flocks = BoidsWorld.draw(30, seed=0)
    x = flocks.x.copy()
    x[:3, 20:, 2] = np.nan
    model = MacroTrajectoryModel(friendly_label(), shared_intent=True, **SMALL).fit(x)
    assert model.predict_proba(x[:4, :10]).shape == (4, 2)
    assert np.isnan(model.sample(x[:1], 3)[0, 0, -1, 2]).all()
    given = MacroTrajectoryModel(agent_params="separate", **SMALL).fit(PLAYS.x, Window(25)(PLAYS.x))
    assert given.model_.n_intents <= 90
    assert np.isfinite(given.score(PLAYS.x[:4], Window(25)(PLAYS.x[:4]), n_particles=2))


@pytest.mark.parametrize(
    ("model", "x", "labels", "match"),
    [
        (MacroTrajectoryModel(), PLAYS.x, None, "give intents"),
        (MacroTrajectoryModel(), PLAYS.x, np.full((40, 50, 5), -1), "all macro-intents are -1"),
        (MacroTrajectoryModel(), PLAYS.x, np.zeros((40, 50), int), "whole numbers"),
        (MacroTrajectoryModel(Window(3)), PLAYS.x[:, :1], None, "two frames"),
        (MacroTrajectoryModel(Window(3), shared_intent=True), PLAYS.x, None, "labels each agent"),
        (MacroTrajectoryModel(Window(3)), np.ones((4, 9, 2, 2)), None, "no agent moves"),
        (MacroTrajectoryModel(Stationary()), PLAYS.x, None, "frame rate"),
    ],
)
def test_refusals(model, x, labels, match):
    with pytest.raises(InvalidInput, match=match):
        model.fit(x, labels)


def test_not_fitted():
    with pytest.raises(InvalidInput, match="call fit"):
        MacroTrajectoryModel().score(PLAYS.x)


def data_of(file):
    text = file.read_text("utf-8")
    assert "http" not in text.replace("http-equiv", "")  # nothing is loaded from elsewhere
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_play_page_holds_the_rollouts(tmp_path):
    model, grid = MacroVRNN(5, 90, z=2, hidden=6, rnn=5), GridIntent()
    burn = torch.from_numpy(PLAYS.x[0, :8])
    play_page(tmp_path / "a.html", model, burn, 6, agent=2, choices=[5, 80], grid=grid)
    text, data = data_of(tmp_path / "a.html")
    assert "Send player 3" in text
    assert len(data["versions"]) == 3
    for version, cell in zip(data["versions"][1:], (5, 80), strict=True):
        assert [g[2] for g in version["intents"][7:]] == [cell] * 6
        assert np.allclose(np.array(version["play"])[:8], PLAYS.x[0, :8], atol=0.01)
    draw = torch.Generator().manual_seed(0)
    x, _ = model.sample(burn, 6, history=grid, generator=draw)
    assert np.allclose(np.array(data["versions"][0]["play"]), x[0, 0].numpy(), atol=0.01)
    with pytest.raises(InvalidInput, match="agent"):
        play_page(tmp_path / "b.html", model, burn, 6, agent=5, choices=[5], grid=grid)
    with pytest.raises(InvalidInput, match="choices"):
        play_page(tmp_path / "b.html", model, burn, 6, agent=1, choices=[90], grid=grid)
    with pytest.raises(InvalidInput, match="grid's 30 cells"):
        play_page(tmp_path / "b.html", model, burn, 6, agent=1, choices=[1], grid=GridIntent(9.0))


def test_the_rating_page_is_blinded(tmp_path):
    sources = {"secret ours": PLAYS.x[:6], "secret rival": PLAYS.x[6:12], "secret real": PLAYS.x[12:18]}
    key = rating_page(tmp_path / "judge.html", sources, pairs=30, seed=4)
    text, data = data_of(tmp_path / "judge.html")
    assert "secret" not in text
    assert len(data["pairs"]) == len(key) == 30
    assert (key["left"] != key["right"]).all()
    row = key.iloc[7]
    shown = np.array(data["pairs"][7][0])
    assert np.allclose(shown, sources[row["left"]][row["sequence"]], atol=0.01)
    # Each source is on either side about as often.
    assert 5 < (key["left"] == "secret ours").sum() < 16
    with pytest.raises(InvalidInput, match="two sources"):
        rating_page(tmp_path / "judge.html", {"a": PLAYS.x})


def test_bradley_terry_finds_known_strengths(tmp_path):
    rng = np.random.default_rng(0)
    truth = {"a": 1.0, "b": 0.0, "c": -1.0}
    rows, answers = [], []
    for i in range(3000):
        left, right = rng.choice(list(truth), 2, replace=False)
        rows.append({"pair": i, "left": left, "right": right, "sequence": 0})
        better = rng.random() < 1 / (1 + np.exp(truth[right] - truth[left]))
        answers.append({"pair": i, "answer": "left" if better else "right"})
    key = pd.DataFrame(rows)
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(answers))
    found = bradley_terry(file, key, draws=40)
    assert found.index.tolist() == ["a", "b", "c"]
    for name, strength in truth.items():
        assert found.loc[name, "strength"] == pytest.approx(strength, abs=0.15)
        assert found.loc[name, "low"] < strength + 0.1
        assert found.loc[name, "high"] > strength - 0.1
    always = bradley_terry([{"pair": i, "answer": "left"} for i in key[key["left"] == "a"]["pair"]], key, draws=10)
    assert np.isfinite(always["strength"]).all()
    for wrong in ({"pair": -1, "answer": "left"}, {"pair": 0, "answer": "middle"}, "left"):
        with pytest.raises(InvalidInput, match="an answer has"):
            bradley_terry([wrong], key)
    with pytest.raises(InvalidInput, match="no answers"):
        bradley_terry([], key)


def test_tracks_in_another_unit_are_refused():
    plays = HalfCourtWorld.draw(20, seed=0)
    model = MacroTrajectoryModel(Stationary(), fps=plays.fps, hidden=4, rnn=4, max_iter=2)
    for factor in (10.0, 0.01):  # pixels, or a unit square, on a grid in feet
        with pytest.raises(InvalidInput, match="give tracks and grid in one unit"):
            model.fit(plays.x * factor)
    with pytest.raises(InvalidInput, match="labeling must be a labeling function"):
        MacroTrajectoryModel(3).fit(plays.x)
    with pytest.raises(InvalidInput, match="batch_size must be"):
        MacroTrajectoryModel(Stationary(), fps=plays.fps, batch_size=0).fit(plays.x)


def test_the_example_runs(tmp_path, capsys):
    file = Path(__file__).parents[3] / "examples/steer_a_play.py"
    found = runpy.run_path(str(file))["main"](max_iter=2, page=tmp_path / "play.html")
    assert set(found) == {"sent", "free"}
    assert all(0 < feet < 200 for feet in found.values())
    assert "<script" in (tmp_path / "play.html").read_text("utf-8")
    assert "sent: player 1 ends" in capsys.readouterr().out


def test_health_is_reported_and_warned_of():
    x = PLAYS.x[:20]
    labels = Stationary(fps=PLAYS.fps)(x)
    model = MacroTrajectoryModel(**SMALL).fit(x, labels)
    health = model.health_
    share = np.unique(labels[:, :-1], return_counts=True)[1] / labels[:, :-1].size
    assert health["label entropy"] == pytest.approx(-(share * np.log(share)).sum())
    batch = torch.from_numpy(x), torch.from_numpy(labels)
    with torch.no_grad():
        nats = float(model.model_.intent_nll(batch).sum()) / labels[:, :-1].size
    assert health["macro"] == pytest.approx(nats, rel=1e-5)
    assert health["at floor"] == 0.0
    assert {"kl", "active", "gain"} <= set(health)
    parked = x.copy()
    parked[:, :, 1:] = parked[:1, :1, 1:]  # four of five stand still
    with pytest.warns(RuntimeWarning, match="below twice the floor"):
        MacroTrajectoryModel(**SMALL | {"max_iter": 150, "learning_rate": 2e-2}).fit(parked, labels)


def test_a_training_that_was_killed_goes_on(tmp_path):
    whole = MacroTrajectoryModel(Stationary(), fps=PLAYS.fps, **SMALL).fit(PLAYS.x)
    file = tmp_path / "training.safetensors"
    options = SMALL | {"checkpoint": file, "checkpoint_every": 2}
    model, calls, step = MacroTrajectoryModel(Stationary(), fps=PLAYS.fps, **options), [], torch.optim.Adam.step

    def stop(*args, **more):
        calls.append(1)
        if len(calls) == 6:  # in the sixth update, two after the last file
            raise KeyboardInterrupt
        return step(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            model.fit(PLAYS.x)
    assert file.exists()
    again = MacroTrajectoryModel(Stationary(), fps=PLAYS.fps, **options).fit(PLAYS.x)
    assert again.loss_curve_ == whole.loss_curve_
    for a, b in zip(again.model_.parameters(), whole.model_.parameters(), strict=True):
        assert torch.equal(a, b)
    done = MacroTrajectoryModel(Stationary(), fps=PLAYS.fps, **options).fit(PLAYS.x)  # nothing is left to do
    assert done.loss_curve_ == whole.loss_curve_
    for change, said in (
        ({"hidden": 9}, "hidden is 8 there and 9 here"),
        ({"labeling": Window(5, GridIntent(9.0))}, "macro-intents is 90 there and 30 here"),
        ({"labeling": Window(5)}, "labels is"),
    ):
        with pytest.raises(InvalidInput, match=said):
            clone(model).set_params(**change).fit(PLAYS.x)
    with pytest.raises(InvalidInput, match="tracks is"):
        clone(model).fit(PLAYS.x * 0.99)


def test_tracks_far_from_their_origin():
    far = np.array([448_262.0, 5_411_932.0])
    x = PLAYS.x.astype(np.float64)
    labels = Stationary(fps=PLAYS.fps)(x)
    near = MacroTrajectoryModel(**SMALL).fit(x, labels)
    there = MacroTrajectoryModel(**SMALL).fit(x + far, labels)
    assert near.loss_curve_ == pytest.approx(there.loss_curve_, rel=1e-4)
    made = there.sample(x[:3, :10] + far, 5)
    assert made.dtype == np.float64
    assert np.array_equal(made[0, :, :10], x[:3, :10] + far)
    assert np.abs(made - far - near.sample(x[:3, :10], 5)).max() < 0.05
    with pytest.raises(InvalidInput, match=r"its last digit is 0\.5"):
        MacroTrajectoryModel(**SMALL).fit((x + far).astype(np.float32), labels)


def test_roles_are_found_and_beat_no_other_order():
    rng = np.random.default_rng(0)
    spots = np.array([[0.0, 0.0], [8.0, 1.0], [0.0, 9.0], [9.0, 9.0]])
    x = spots + rng.normal(0, 1.5, (60, 25, 4, 2)) + rng.normal(0, 20, (60, 1, 1, 2))  # the team stands anywhere
    orders = np.stack([rng.permutation(4) for _ in range(60)])
    mixed = np.take_along_axis(x, orders[:, None, :, None], 2)
    mixed[0, :10, 2] = np.nan
    roles = RoleAssigner().fit(mixed[:40])
    assert (np.diff(roles.log_likelihood_) > -1e-9).all()
    found = roles.transform(mixed)
    # All sequences have one order, whichever it is: the same permutation takes each back to the truth.
    held = roles.assign(mixed)
    which = np.array([[orders[n][np.flatnonzero(held[n] == r)[0]] for r in range(4)] for n in range(60)])
    assert (which == which[0]).all()
    assert np.array_equal(found[1:], x[1:][:, :, which[0]])
    # Brute force over the orders of one sequence.
    place, seen = roles._places(mixed[7:8], None)
    fit = roles._fit(place, seen)[0]
    best = max(itertools.permutations(range(4)), key=lambda p: fit[range(4), p].sum())
    assert held[7].tolist() == list(best)
    with pytest.raises(InvalidInput, match="call fit"):
        RoleAssigner().assign(mixed)
    with pytest.raises(InvalidInput, match="two agents"):
        RoleAssigner().fit(mixed[:, :, :1])
    with pytest.raises(InvalidInput, match="roles are of"):
        roles.transform(mixed[:, :, :3])
