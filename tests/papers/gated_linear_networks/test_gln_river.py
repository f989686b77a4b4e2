"""The river adapter: river's own checks, dicts of any features, classes at any time."""

import pickle

import numpy as np
import pandas as pd
import pytest
from river import checks, datasets

from mlcollage.errors import InvalidInput
from mlcollage.papers.gated_linear_networks.river import RiverGLN

CHECKS = list(checks.yield_checks(RiverGLN()))


@pytest.mark.parametrize("check", CHECKS, ids=[f"{i}-{c.__name__}" for i, c in enumerate(CHECKS)])
def test_rivers_own_checks(check):
    check(RiverGLN())


def test_learns_phishing_in_one_pass():
    model, hits = RiverGLN(), []
    for x, y in datasets.Phishing():
        hits.append(model.predict_one(x) == y)
        model.learn_one(x, y)
    assert np.mean(hits[250:]) > 0.85


def test_before_the_first_sample_and_after_new_classes():
    model = RiverGLN()
    assert model.predict_proba_one({"a": 1.0}) == {}
    assert model.predict_one({"a": 1.0}) is None
    model.learn_one({"a": 1.0}, "x")
    assert model.predict_proba_one({"a": 2.0}) == {"x": 1.0}
    model.learn_one({"a": 2.0, "color": "red", "flag": True}, "y")
    assert set(model.predict_proba_one({"color": "blue", "unknown": 3})) == {"x", "y"}
    assert "color=red" in model._columns


def test_strings_are_one_hot_and_missing_features_count_as_their_mean():
    rng = np.random.default_rng(0)
    model, hits = RiverGLN(), []
    for _ in range(400):
        color = rng.choice(["red", "green", "blue"])
        x = {"color": str(color), "noise": rng.normal()} | ({"more": rng.normal()} if rng.random() < 0.5 else {})
        hits.append(model.predict_one(x) == (color == "red"))
        model.learn_one(x, bool(color == "red"))
    assert np.mean(hits[-150:]) > 0.9


def test_samples_without_features_may_come_first():
    model = RiverGLN()
    for x, y in (({}, "a"), ({}, "b"), ({"f": 1.0}, "a"), ({"f": -1.0}, "b")):
        model.learn_one(x, y)
    assert set(model.predict_proba_one({"f": 2.0})) == {"a", "b"}


def test_a_pickled_model_continues_as_the_original():
    data = list(datasets.Phishing().take(300))
    model = RiverGLN()
    for x, y in data[:150]:
        model.learn_one(x, y)
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301 - river's own way of saving; nothing comes from disk
    for x, y in data[150:]:
        assert model.predict_proba_one(x) == copy.predict_proba_one(x)
        model.learn_one(x, y)
        copy.learn_one(x, y)


@pytest.mark.parametrize("dataset", [datasets.Phishing, datasets.ImageSegments])
def test_mini_batches_give_the_network_that_single_samples_give_bit_for_bit(dataset):
    """Strings, missing values, classes and features that appear inside a batch are the same as one row at a time."""
    rng = np.random.default_rng(0)
    data = []
    for i, (x, y) in enumerate(dataset().take(200)):
        x = {k: v for k, v in x.items() if rng.random() < 0.9}
        x |= {"late": float(rng.normal())} if i > 90 else {}
        data.append((x | {"color": str(rng.choice(["red", "green", "blue"][: 2 + (i > 120)]))}, y))
    one, many, frame = RiverGLN(), RiverGLN(), pd.DataFrame([x for x, _ in data])
    labels = pd.Series([y for _, y in data], index=frame.index)
    for x, y in data:
        one.learn_one(x, y)
    for start, stop in ((0, 1), (1, 60), (60, 150), (150, 200)):
        many.learn_many(frame[start:stop], labels[start:stop])
    told = many.predict_proba_many(frame[::-1])
    assert told.index.equals(frame.index[::-1])
    for (x, _), (_, row) in zip(data[::-1], told.iterrows(), strict=True):
        assert one.predict_proba_one(x) == row.to_dict()
    assert many.predict_many(frame).tolist() == [one.predict_one(x) for x, _ in data]
    one.learn_one(*data[0])
    many.learn_many(frame[:1], labels[:1])
    assert one.predict_proba_one(data[3][0]) == many.predict_proba_one(data[3][0])


def test_one_wrong_reading_does_not_ruin_a_feature_and_old_samples_fade():
    rng, models = np.random.default_rng(0), (RiverGLN(), RiverGLN(max_deviation=None), RiverGLN(memory=50))
    for t in range(600):
        value = 1e6 if t == 200 else rng.normal() + (20 if t > 300 else 0)
        for model in models:
            model.learn_one({"a": value}, t % 2)
    bounded, plain, short = (model._inputs.moments[:, 0] for model in models)
    assert np.sqrt(bounded[2] / bounded[0]) < 20
    assert np.sqrt(plain[2] / plain[0]) > 1e4
    assert short[0] == 50
    assert short[1] == pytest.approx(20, abs=0.5)


def test_a_bad_batch_is_refused_before_anything_is_learned():
    model, frame = RiverGLN(), pd.DataFrame({"a": [1.0, 2.0, np.inf], "b": ["x", None, "y"]})
    with pytest.raises(InvalidInput, match="'a'"):
        model.learn_many(frame, pd.Series([1, 0, 1]))
    with pytest.raises(InvalidInput, match="3 and 2"):
        model.learn_many(frame, pd.Series([1, 0]))
    assert model.classes == []
    assert model.predict_proba_many(frame[:2]).shape == (2, 0)
    assert model.predict_proba_one({"a": 1.0}) == {}


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA, pd.NaT])
def test_a_missing_label_is_no_class(missing):
    """Each NaN differs from every other, so that each would have got networks of its own."""
    model, table = RiverGLN(hidden_layer_sizes=(2,)), pd.DataFrame({"a": [1.0, 2.0, 3.0]})
    model.learn_many(table, pd.Series(["p", "q", ("r", None)]))  # a tuple is a label
    before = model.predict_proba_one({"a": 1.5})
    with pytest.raises(InvalidInput, match="A label is missing"):
        model.learn_many(table, pd.Series(["p", "s", missing], dtype=object))
    with pytest.raises(InvalidInput, match="A label is missing"):
        model.learn_one({"a": 1.0}, missing)
    assert model.predict_proba_one({"a": 1.5}) == before


def test_bad_features_are_named():
    with pytest.raises(InvalidInput, match="'a'"):
        RiverGLN().learn_one({"a": float("nan")}, 1)
    with pytest.raises(InvalidInput, match="'b'"):
        RiverGLN().learn_one({"b": None}, 1)
    with pytest.raises(InvalidInput, match="learning_rate"):
        RiverGLN(learning_rate=0)
