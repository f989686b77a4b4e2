"""Sweeps, leaks, throughput, the recommender and the classifier."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.vit_training import (
    PresetRecommender,
    Sweep,
    ViTClassifier,
    augreg_space,
    find_leaks,
    judge_recommender,
    measure_throughput,
    published_sweep,
)


def score(config, budget, seed):
    if config["lr"] == 1.0:
        raise RuntimeError("diverged")
    if config["lr"] == 0.5:
        return {"final_val": float("nan")}
    return {"final_val": config["lr"] * budget / 100 + seed / 1000}


def test_every_configuration_and_seed_is_a_row_and_failures_cost_only_themselves():
    sweep = Sweep({"lr": [0.1, 0.2, 0.5, 1.0], "wd": [0.03, 0.1]}, 100, seeds=(0, 1))
    table = sweep.run(score)
    assert len(table) == 16
    good = table[table["error"] == ""]
    assert sorted(good["final_val"].round(6)) == sorted([0.1, 0.101, 0.2, 0.201] * 2)
    assert table.set_index("lr").loc[1.0, "error"].unique().tolist() == ["RuntimeError: diverged"]
    assert table.set_index("lr").loc[0.5, "error"].unique().tolist() == ["final_val is nan"]


def test_processes_give_the_same_table():
    sweep = {"space": {"lr": [0.1, 0.2, 1.0]}, "budget": 10}
    here, there = Sweep(**sweep).run(score), Sweep(**sweep, workers=2).run(score)
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"))
    with pytest.raises(InvalidInput, match="define it at the top of a module"):
        Sweep(**sweep, workers=2).run(lambda config, budget, seed: {"final_val": 0.0})


def test_stacked_runs_are_called_once_for_each_architecture():
    calls = []

    def many(configs, budget, seeds):
        calls.append({c["width"] for c in configs})
        return [{"final_val": c["lr"] + s} for c, s in zip(configs, seeds, strict=True)]

    space = {"width": [16, 32], "lr": [0.1, 0.2]}
    table = Sweep(space, 5, backend="stacked", apart=("width",), seeds=(0, 1)).run(many)
    assert calls == [{16}, {32}]
    assert np.allclose(table["final_val"], table["lr"] + table["seed"])


def test_halving_finds_the_best_for_less():
    lrs = np.linspace(0.01, 0.4, 27).round(3).tolist()
    table = Sweep({"lr": lrs}, 90, halving=3).run(score)
    assert table.loc[table["final_val"].idxmax(), "lr"] == 0.4
    assert table["budget"].sum() < 27 * 90 / 2
    assert set(table["budget"]) == {10, 30, 90}
    assert (table["rung"] == 0).sum() == 27


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sweep([{"lr": 1}, {"lr": 1}], 5), "is there twice"),
        (lambda: Sweep({"lr": []}, 5), "at least one configuration"),
        (lambda: Sweep({"lr": [1]}, 5, seeds=(0, 0)), "repeats one"),
        (lambda: Sweep({"seed": [1]}, 5), "must not have the name 'seed'"),
        (lambda: Sweep({"lr": [1]}, 0), "budget"),
        (lambda: Sweep({"lr": [1]}, 9, halving=3, backend="stacked"), "stacked model cannot"),
        (lambda: Sweep({"lr": [1.0]}, 5).run(score), "no run has a finite"),
        (lambda: Sweep({"lr": [0.1]}, 5, metric="loss").run(score), "gave no 'loss'"),
    ],
)
def test_bad_sweeps_are_explained(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_the_space_of_the_paper_has_28_settings():
    space = augreg_space("index_csv")
    assert len({tuple(c.items()) for c in space}) == 28
    assert {c["aug"] for c in space} == {"none", "light0", "light1", "medium1", "medium2", "strong1", "strong2"}


def test_copies_and_near_copies_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    train, new = rng.normal(size=(2, 300, 1, 8, 8)).astype(np.float32)
    val = np.concatenate([train[:5], 2 * train[5:10] + 1, train[10:15] + 0.01 * new[:5], new[:20]])
    report = find_leaks(train, val, block=64)
    assert report.exact.sum() == 5
    assert report.leaked[:15].all()
    assert not report.leaked[15:].any()
    assert report.nearest[:15].tolist() == list(range(15))
    best = np.corrcoef(val[20].ravel(), train.reshape(300, -1))[0, 1:].max()
    assert report.similarity[20] == pytest.approx(best, abs=1e-5)
    with pytest.raises(InvalidInput, match="rows of the same shape"):
        find_leaks(train, val.reshape(-1, 64))


class Sleeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.modes, self.sizes = [], []

    def forward(self, x):
        self.modes.append(self.training)
        self.sizes.append(len(x))
        time.sleep(0.01)
        return x


def test_throughput_counts_images_in_evaluation_mode_after_a_warm_up():
    model = Sleeper().train()
    found = measure_throughput(model, (2,), batch=20, repeats=3, warmup=2)
    assert 200 < found.images_per_second <= 2000
    assert model.sizes == [20] * 5
    assert not any(model.modes)
    assert model.training
    assert "images/s" in str(found)


def test_the_recommender_beats_one_preset_for_all_on_models_that_it_has_not_seen():
    table = published_sweep()
    assert len(table) == 252
    lost = judge_recommender(table[table["model"].isin(["Ti/16", "S/16", "B/32", "B/16", "L/16"])]).mean(
        numeric_only=True
    )
    assert lost["recommender"] < min(lost["always_medium1"], lost["always_medium1_plain"])
    assert lost["none"] > lost["recommender"]


def test_the_recommender_says_where_it_knows_nothing():
    some = published_sweep().query("model in ['Ti/16', 'B/16', 'L/16']")
    advice = PresetRecommender(some).recommend(images=1_281_167, epochs=300, params=86e6)
    assert advice["best_probability"].sum() == pytest.approx(1)
    assert advice["gain"].is_monotonic_decreasing
    assert advice.iloc[0]["augmentation"] != "none"
    with pytest.warns(UserWarning, match="add a sweep of your own"):
        PresetRecommender(some).recommend(images=300, epochs=100, params=1e5)
    with pytest.raises(InvalidInput, match="no AugReg at all"):
        PresetRecommender(some).recommend(images=1e6, epochs=10, params=1e6, stage="finetune")
    with pytest.raises(InvalidInput, match="no column 'params'"):
        PresetRecommender(some.drop(columns="params"))


def small(**kwargs):
    return ViTClassifier(**{"steps": 60, "width": 16, "depth": 1, "random_state": 0, **kwargs})


def test_it_is_a_scikit_learn_classifier():
    check_estimator(small(steps=100, learning_rate=5e-3))


def test_images_by_their_axes_and_labels_of_any_kind():
    X, y = load_digits(return_X_y=True)
    images, names = (X * 15).astype(np.uint8).reshape(-1, 8, 8), np.array([f"digit {k}" for k in y])
    model = small(steps=150).fit(images[:800], names[:800])
    assert model.shape_ == (1, 8, 8)
    assert model.score(images[800:], names[800:]) > 0.6
    assert model.train_score_ == pytest.approx((model.predict(images[:800]) == names[:800]).mean())
    augmented = small(augreg="light2", dropout=0.1).fit(images[:200], names[:200])
    assert augmented.model_.block1.drop.p == 0.1
    again = small(augreg="light2", dropout=0.1).fit(images[:200], names[:200])
    assert np.array_equal(again.predict_proba(images), augmented.predict_proba(images))


@pytest.mark.parametrize(
    ("X", "kwargs", "message"),
    [
        (np.zeros((6, 8, 8)), {"augreg": "light2"}, "RandAugment, which needs images of type uint8"),
        (np.zeros((6, 32, 32, 3)), {}, "channels last"),
        (np.zeros((6, 64)), {"image_shape": (1, 8, 9)}, "has 72 numbers; a row has 64"),
        (np.zeros((6, 64)), {"image_shape": (8, 8)}, "image_shape must be"),
        (np.zeros((6, 64)), {"augreg": "medium3"}, "did you mean"),
        (np.zeros((6, 64)), {"steps": 0}, "steps"),
    ],
)
def test_bad_inputs_are_explained(X, kwargs, message):
    with pytest.raises(InvalidInput, match=message):
        small(**kwargs).fit(X, np.arange(6) % 2)
