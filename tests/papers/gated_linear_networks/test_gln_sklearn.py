"""The classifier as scikit-learn, streams, disks and careless users see it."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine, make_classification
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.papers.gated_linear_networks import GLNClassifier, GLNDensity, GLNRegressor

SMALL = {"hidden_layer_sizes": (6, 4), "context_dim": 3, "random_state": 0}


@pytest.mark.parametrize("estimator", [GLNClassifier(), GLNRegressor()])
def test_scikit_learns_own_checks(estimator):
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    assert len(results) > 45
    assert [(r["check_name"], str(r["exception"])) for r in results if r["status"] == "failed"] == []


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return X[order] / 16, y[order]


def same(one, other, X):
    return all(np.array_equal(getattr(one, f)(X), getattr(other, f)(X)) for f in ("predict_proba", "context_counts"))


def test_one_pass_beats_one_pass_of_a_linear_model_on_digits(digits):
    X, y = digits
    ours = GLNClassifier(learning_rate=0.03, random_state=0).fit(X[:1257], y[:1257])
    scaler = StandardScaler().fit(X[:1257])
    linear = SGDClassifier(loss="log_loss", max_iter=1, tol=None, random_state=0)
    linear.fit(scaler.transform(X[:1257]), y[:1257])
    assert ours.score(X[1257:], y[1257:]) > 0.94
    assert ours.score(X[1257:], y[1257:]) > linear.score(scaler.transform(X[1257:]), y[1257:]) + 0.01


@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_chunks_equal_one_fit_bit_for_bit(digits, tables):
    X, y = digits
    model = {"tables": tables, **SMALL}
    whole = GLNClassifier(**model).fit(X[:600], y[:600])
    parts = GLNClassifier(**model)
    for start, stop in ((0, 1), (1, 3), (3, 290), (290, 600)):
        parts.partial_fit(X[start:stop], y[start:stop], classes=range(10))
    assert same(whole, parts, X[600:])
    assert whole.t_ == parts.t_ == 600


def test_threads_do_not_change_results(digits):
    X, y = digits
    one, many = (GLNClassifier(n_jobs=jobs, **SMALL).fit(X[:500], y[:500]) for jobs in (1, 4))
    assert same(one, many, X[500:])


@pytest.mark.parametrize("labels", [np.arange(10), np.array(list("abcdefghij")), np.array(list("abcdefghij"), object)])
@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_a_saved_stream_continues_bit_for_bit(digits, tmp_path, labels, tables):
    X, y = digits[0], labels[digits[1]]
    model = {"tables": tables, **SMALL}
    whole = GLNClassifier(**model).fit(X[:400], y[:400])
    half = GLNClassifier(**model).partial_fit(X[:200], y[:200], classes=np.unique(y))
    half.save(tmp_path / "half.npz")
    resumed = GLNClassifier.load(tmp_path / "half.npz")
    assert resumed.classes_.dtype == half.classes_.dtype
    resumed.partial_fit(X[200:400], y[200:400])
    assert same(whole, resumed, X[400:])
    assert np.array_equal(whole.predict(X), resumed.predict(X))
    with np.load(tmp_path / "half.npz", allow_pickle=False) as file:
        assert json.loads(str(file["header"]))["params"]["context_dim"] == 3


@pytest.mark.parametrize("kind", [GLNClassifier, GLNRegressor, GLNDensity])
def test_settings_changed_after_fit_wait_for_the_next_fit(digits, tmp_path, kind):
    """A fitted model predicts, continues and is saved with the settings that it was fitted with."""
    X, y = digits[0] > 0.5, digits[1]
    settings = {"hidden_layer_sizes": (6, 4), "context_dim": 3, "learning_rate": 0.02, "random_state": 0}
    first = {"classes": range(10)} if kind is GLNClassifier else {}

    def fitted():
        return kind(**settings).partial_fit(X[:200], y[:200], **first)

    def told(model):
        if kind is GLNDensity:
            return [model.score_samples(X[400:])]
        return [model.predict(X[400:]), model.context_counts(X[400:]), *map(np.ravel, model.layer_predictions(X[400:]))]

    changed = {"hidden_layer_sizes": (2,), "context_dim": 5, "learning_rate": 1.0, "learning_rate_init": 3.0}
    changed |= {"gradient": "official", "weight_clip": 0.1, "dtype": "float32", "random_state": 7}
    changed |= {"min_probability": 0.3} if kind is GLNDensity else {"std_offset": 9.0, "max_deviation": 1.0}
    changed |= {"memory": 2}
    changed |= {"aggregator": "mean", "base_predictor": "minmax", "eps": 0.3} if kind is GLNClassifier else {}
    changed |= {"min_variance": 1.0, "step_limit": None} if kind is GLNRegressor else {}
    model, twin = fitted().set_params(**changed), fitted()
    model.save(tmp_path / "model.npz")
    loaded = kind.load(tmp_path / "model.npz")
    assert loaded.get_params() == twin.get_params()
    for _ in range(2):
        for one, other, third in zip(told(model), told(twin), told(loaded), strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(third, other)
        for each in (model, twin, loaded):
            each.partial_fit(X[200:400], y[200:400])
    with pytest.raises(InvalidInput, match="gradient"):
        model.set_params(gradient="none").fit(X, y)
    for one, other in zip(told(model), told(twin), strict=True):  # a refused fit leaves the model as it was
        np.testing.assert_array_equal(one, other)
    model.set_params(**changed).fit(X[:200], y[:200])
    fresh = kind(**model.get_params()).fit(X[:200], y[:200])
    for one, other in zip(told(model), told(fresh), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(told(model)[0]) != len(told(twin)[0]) or not np.array_equal(told(model)[-1], told(twin)[-1])


def test_files_that_cannot_be_read_are_named(tmp_path, digits):
    with pytest.raises(MissingFile, match="no file"):
        GLNClassifier.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InvalidInput, match="damaged"):
        GLNClassifier.load(tmp_path / "bad.npz")
    X, y = digits
    GLNClassifier(**SMALL).fit(X[:50], y[:50]).save(tmp_path / "c.npz")
    with pytest.raises(InvalidInput, match="GLNRegressor"):
        GLNRegressor.load(tmp_path / "c.npz")
    whole = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match="damaged"):
        GLNClassifier.load(tmp_path / "cut.npz")
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_objects_among_the_parameters_are_passed_again(tmp_path, digits):
    X, y = digits
    model = GLNClassifier(learning_rate=half_rate, **SMALL).fit(X[:50], y[:50])
    model.save(tmp_path / "m.npz")
    with pytest.raises(InvalidInput, match="learning_rate"):
        GLNClassifier.load(tmp_path / "m.npz")
    again = GLNClassifier.load(tmp_path / "m.npz", learning_rate=half_rate)
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))


def thirds(Z):
    return np.full((len(Z), 3), 1 / 3)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_file_takes_only_the_base_predictor_that_it_was_saved_with(tmp_path, digits):
    X, y = digits
    good, refit, fewer = (
        LogisticRegression(max_iter=20).fit(X[part], y[part] % classes)
        for part, classes in ((slice(300), 10), (slice(300, 450), 10), (slice(300), 3))
    )
    model = GLNClassifier(base_predictor=good, **SMALL).fit(X[300:400], y[300:400])
    path = tmp_path / "m.npz"
    model.save(path)
    for same_one in (good, FrozenEstimator(good), good.predict_proba):
        again = GLNClassifier.load(path, base_predictor=same_one)
        assert np.array_equal(again.predict_proba(X[400:]), model.predict_proba(X[400:]))
    narrow = LogisticRegression(max_iter=20).fit(X[:300, :5], y[:300])
    for other, says in (
        ("minmax", "is 'minmax', and the file was saved with 'LogisticRegression'"),
        (thirds, "is 'function', and the file was saved with 'LogisticRegression'"),
        (fewer, "LogisticRegression makes 3 predictions per sample, and the file was saved with 10"),
        (narrow, "cannot predict a sample of the file's 64 features"),
        (refit, "gives other probabilities than when the file was saved"),
    ):
        with pytest.raises(InvalidInput, match=says):
            GLNClassifier.load(path, base_predictor=other)
    GLNClassifier(**SMALL).fit(X[:50], y[:50]).save(tmp_path / "plain.npz")
    with pytest.raises(InvalidInput, match="is 'minmax', and the file was saved with 'standardize'"):
        GLNClassifier.load(tmp_path / "plain.npz", base_predictor="minmax")


def test_an_older_file_says_how_many_predictions_it_takes(tmp_path, digits):
    X, y = digits
    model = GLNClassifier(base_predictor=thirds, **SMALL).fit(X[:50], y[:50])
    model.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as file:
        np.savez(tmp_path / "old.npz", **{n: file[n] for n in file.files if n[7:] not in ("predictor", "answer")})
    with pytest.warns(UserWarning, match="does not say what its base_predictor was") as said:
        again = GLNClassifier.load(tmp_path / "old.npz", base_predictor=thirds)
    assert said[0].filename == __file__
    assert np.array_equal(again.predict(X), model.predict(X))
    with pytest.raises(InvalidInput, match="makes 2 predictions per sample, and the file was saved with 3"):
        GLNClassifier.load(tmp_path / "old.npz", base_predictor=lambda Z: thirds(Z)[:, :2])


def half_rate(t):
    return 0.5 / t


def test_progressive_predictions_are_those_from_before_each_sample(digits):
    X, y = digits
    model = GLNClassifier(**SMALL)
    progressive = model.progressive_predict(X[:40], y[:40])
    other = GLNClassifier(**SMALL)
    for i in range(40):
        one = other.progressive_predict(X[i : i + 1], y[i : i + 1], classes=np.unique(y[:40]) if i == 0 else None)
        assert np.array_equal(progressive[i : i + 1], one)
    np.testing.assert_allclose(progressive.sum(axis=1), 1)
    np.testing.assert_allclose(progressive[0], 1 / 10, atol=0.06)
    assert same(model, other, X[:50])


def test_a_class_may_appear_mid_stream_and_the_cut_of_the_stream_does_not_matter(digits):
    X, y = digits
    order = np.concatenate([np.flatnonzero(y != 7)[:300], np.arange(300, 800)])
    X, y = X[order], np.array([f"digit {k}" for k in y[order]])
    grown = GLNClassifier(**SMALL).partial_fit(X, y, grow=True)
    pieces = GLNClassifier(**SMALL)
    for start in range(0, len(X), 90):
        pieces.partial_fit(X[start : start + 90], y[start : start + 90], grow=True)
    assert grown.classes_.tolist() == sorted(set(y))
    assert same(grown, pieces, X)
    assert grown.score(X[-300:], y[-300:]) > 0.8
    late = grown._head_[list(grown.classes_).index("digit 7")]
    assert grown.network_.steps[late] == len(X) - int(np.argmax(y == "digit 7"))


def test_labels_that_were_not_announced_are_refused(digits):
    X, y = digits
    with pytest.raises(InvalidInput, match="classes="):
        GLNClassifier().partial_fit(X[:5], y[:5])
    model = GLNClassifier(**SMALL).partial_fit(X[:5], np.array([0, 1, 0, 1, 0]), classes=[0, 1])
    with pytest.raises(InvalidInput, match=r"Label .*7.* not in classes \[0, 1\].*grow=True"):
        model.partial_fit(X[:1], [7])
    model.partial_fit(X[:2], [7, 0], classes=[0, 1, 7])
    assert model.classes_.tolist() == [0, 1, 7]


def test_weights_scale_the_step_and_zero_leaves_out(digits):
    X, y = digits
    weight = np.ones(300)
    assert same(
        GLNClassifier(**SMALL).fit(X[:300], y[:300]),
        GLNClassifier(**SMALL).fit(X[:300], y[:300], sample_weight=weight),
        X,
    )
    doubled = GLNClassifier(learning_rate=0.01, **SMALL).fit(X[:300], y[:300], sample_weight=2 * weight)
    assert same(doubled, GLNClassifier(learning_rate=0.02, **SMALL).fit(X[:300], y[:300]), X)
    weight[::3] = 0
    kept = weight > 0
    left_out = GLNClassifier(**SMALL).fit(X[:300], y[:300], sample_weight=weight)
    assert same(left_out, GLNClassifier(**SMALL).fit(X[:300][kept], y[:300][kept]), X)
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        GLNClassifier().fit(X[:3], y[:3], sample_weight=[-1, 1, 1])
    with pytest.raises(TypeError, match="unexpected keyword"):
        GLNClassifier().fit(X[:3], y[:3], weights=[1, 1, 1])


def test_units_of_the_features_do_not_matter(digits):
    X, y = digits
    factor = 2.0 ** np.random.default_rng(0).integers(-6, 7, X.shape[1])
    one = GLNClassifier(**SMALL).fit(X[:400], y[:400])
    other = GLNClassifier(**SMALL).fit(X[:400] * factor, y[:400])
    assert np.array_equal(one.predict_proba(X), other.predict_proba(X * factor))


@pytest.mark.parametrize("kind", [GLNClassifier, GLNRegressor])
@pytest.mark.parametrize("factor", [0.001, 1000.0, -1000.0])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_units_and_origins_of_the_features_change_nothing_that_matters(kind, factor, shift):
    """Constant features count for nothing, whatever their value."""
    X, y = load_wine(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = np.hstack([X, np.full((len(X), 2), [0.1, 0.0])])[order], y[order]
    scaled = factor * X + shift * factor
    if factor < 0:  # a mirrored feature sees other regions: mirror the others instead
        X = -X
    settings = {"dtype": "float64", **SMALL}
    one, other = kind(**settings).fit(X[:130], y[:130]), kind(**settings).fit(scaled[:130], y[:130])
    told = (m.predict_proba(Z) if kind is GLNClassifier else m.predict(Z) for m, Z in ((one, X), (other, scaled)))
    np.testing.assert_allclose(*told, rtol=0, atol=1e-6)
    without = kind(**settings).fit(X[:130, :-2], y[:130])
    assert abs(one.score(X[130:], y[130:]) - without.score(X[130:, :-2], y[130:])) < 0.15


def glitched(X, size, rows=(300,)):
    """The same samples, but at some rows the features are ``size`` times too large."""
    X = X.copy()
    X[list(rows)] *= size
    return X


@pytest.mark.parametrize("size", [1e6, -1e9, 1e100])
def test_one_wrong_reading_does_not_ruin_the_features(digits, size):
    """Before, 0.96 became 0.44: the running deviation had become so large that all other values looked alike."""
    X, y = digits
    settings = {"learning_rate": 0.03, "random_state": 0}
    clean = GLNClassifier(**settings).fit(X[:1200], y[:1200]).score(X[1200:], y[1200:])
    harmed = GLNClassifier(**settings).fit(glitched(X, size)[:1200], y[:1200]).score(X[1200:], y[1200:])
    ruined = GLNClassifier(max_deviation=None, **settings).fit(glitched(X, size)[:1200], y[:1200])
    assert harmed > clean - 0.02
    assert ruined.score(X[1200:], y[1200:]) < clean - 0.15


def test_moments_without_wrong_readings_are_those_of_numpy():
    X = np.random.default_rng(0).standard_t(5, size=(3000, 4)) * [1, 10, 0.1, 5] + [0, 3, 100, -7]
    X[:, 3] *= np.random.default_rng(1).random(3000) < 0.01  # rare, far away, and no error
    count, mean, square = GLNClassifier(**SMALL).fit(X, X[:, 0] > 0)._inputs_.moments
    np.testing.assert_allclose(count, 3000)
    assert np.abs((mean - X.mean(axis=0)) / X.std(axis=0)).max() < 0.02
    np.testing.assert_allclose(np.sqrt(square / count), X.std(axis=0), rtol=0.2)
    np.testing.assert_allclose(np.sqrt(square / count)[:3], X.std(axis=0)[:3], rtol=1e-3)


def test_the_moments_remember_as_many_samples_as_they_are_told_to():
    X = np.random.default_rng(0).normal(size=(4000, 2))
    X[2000:] = 5 * X[2000:] + 40
    inputs = GLNClassifier(memory=200, **SMALL).fit(X, X[:, 0] > 20)._inputs_
    weights = (1 - 1 / 200) ** np.arange(4000)[::-1]
    mean = (weights[:, None] * X).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(inputs.moments[1], mean, rtol=1e-3)
    deviation = np.sqrt((weights[:, None] * (X - mean) ** 2).sum(axis=0) / weights.sum())
    np.testing.assert_allclose(np.sqrt(inputs.moments[2] / inputs.moments[0]), deviation, rtol=0.05)


def test_the_default_schedule_does_not_follow_a_late_change_and_a_memory_does(tmp_path):
    """Labels follow another rule in the second half; health says so."""
    rng = np.random.default_rng(0)
    X, rules = rng.normal(size=(60_000, 10)), rng.normal(size=(2, 10))
    y = np.where(np.arange(60_000) < 30_000, X @ rules[0] > 0, X @ rules[1] > 0)
    accuracy, models = {}, {}
    for memory in (None, 1000):
        model = models[memory] = GLNClassifier((8, 4), memory=memory, random_state=0)
        before = (model.progressive_predict(X[:30_000], y[:30_000]).argmax(axis=1) == y[:30_000])[-5000:].mean()
        assert before > 0.97
        assert model.health().advice == ""
        model.partial_fit(X[30_000:32_000], y[30_000:32_000])
        accuracy[memory] = (model.progressive_predict(X[32_000:], y[32_000:]).argmax(axis=1) == y[32_000:]).mean()
    assert accuracy[1000] > accuracy[None] + 0.07
    told = models[None].health()
    assert told.samples == 60_000
    assert told.step_size == pytest.approx(100 / 60_001)
    assert told.recent_loss > 1.5 * told.best_loss
    assert "memory=5000" in told.advice
    assert models[1000].health().step_size == 0.01
    models[None].save(tmp_path / "m.npz")
    assert GLNClassifier.load(tmp_path / "m.npz").health() == told


def test_any_models_probabilities_are_base_predictions(digits):
    X, y = digits
    linear = LogisticRegression(max_iter=500).fit(X[:300], y[:300])
    stacked = GLNClassifier(base_predictor=FrozenEstimator(linear), **SMALL)
    assert clone(stacked).fit(X[300:900], y[300:900]).score(X[900:], y[900:]) > 0.85
    called = GLNClassifier(base_predictor=linear.predict_proba, **SMALL).fit(X[300:900], y[300:900])
    assert np.array_equal(called.predict(X), stacked.fit(X[300:900], y[300:900]).predict(X))
    assert called.saliency(X[:2]).shape == (2, 10, 11)
    rescaled = GLNClassifier(base_predictor="minmax", **SMALL).fit(X[:900], y[:900])
    low, high = X[:4].min(axis=1, keepdims=True), X[:4].max(axis=1, keepdims=True)
    p = np.clip((X[:4] - low) / (high - low), 0.01, 0.99)
    np.testing.assert_allclose(rescaled.base_logits(X[:4])[:, 1:], np.log(p / (1 - p)), atol=1e-5)


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("raw", "base_predictor"),
        (3, "base_predictor"),
        (LogisticRegression(), "not fitted"),
        (lambda X: X * 0 + 2, "outside"),
        (lambda X: np.full(X.shape, np.nan), "outside"),
        (lambda X: np.full((3, 3, 3), 0.5), "shape"),
    ],
)
def test_base_predictors_that_do_not_predict_are_refused(digits, predictor, message):
    with pytest.raises(InvalidInput, match=message):
        GLNClassifier(base_predictor=predictor, **SMALL).fit(*(a[:20] for a in digits))


def test_base_predictors_that_change_their_width_are_refused(digits):
    X, y = digits
    model = GLNClassifier(base_predictor=lambda Z: np.full((len(Z), 2 if len(Z) < 10 else 3), 0.5), **SMALL)
    with pytest.raises(InvalidInput, match="3 predictions per sample, but 2"):
        model.fit(X[:20], y[:20])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "adam"}, "learning_rate"),
        ({"learning_rate_init": 0}, "learning_rate_init"),
        ({"eps": 0.6}, "eps"),
        ({"context_dim": -2}, "context_dim"),
        ({"hidden_layer_sizes": (), "aggregator": "mean"}, "ayer sizes"),
        ({"hidden_layer_sizes": (0,)}, "ayer sizes"),
        ({"hidden_layer_sizes": 50}, "ayer sizes"),
        ({"n_passes": 0}, "n_passes"),
        ({"std_offset": -1}, "std_offset"),
        ({"max_deviation": 0}, "max_deviation"),
        ({"memory": 1}, "memory"),
        ({"dtype": "int8"}, "dtype"),
        ({"aggregator": "vote"}, "aggregator"),
    ],
)
def test_settings_that_cannot_be_used_are_named(digits, settings, message):
    with pytest.raises(InvalidInput, match=message):
        GLNClassifier(**settings).fit(*(a[:20] for a in digits))


def test_no_hidden_layer_many_passes_shuffling_and_other_types_of_input(digits):
    X, y = digits
    assert GLNClassifier(hidden_layer_sizes=(), context_dim=0, random_state=0).fit(X, y).score(X, y) > 0.8
    once = GLNClassifier(**SMALL).fit(X[:500], y[:500]).score(X[:500], y[:500])
    often = GLNClassifier(n_passes=5, shuffle=True, **SMALL).fit(X[:500], y[:500])
    assert often.t_ == 2500
    assert often.score(X[:500], y[:500]) > once
    mean = GLNClassifier(aggregator="mean", dtype="float64", **SMALL).fit(X[:900], y[:900])
    assert mean.score(X[900:], y[900:]) > 0.8
    for kind in (bool, np.int64, object):
        assert GLNClassifier(**SMALL).fit((X[:100] > 0.5).astype(kind), y[:100]).predict_proba(X[:3] > 0.5).shape == (
            3,
            10,
        )


def test_constant_columns_and_single_classes_do_no_harm(digits):
    X, y = digits
    X = np.hstack([X, np.ones((len(X), 3))])
    model = GLNClassifier(**SMALL).fit(X[:400], y[:400])
    X[:, -1] = 50.0
    assert np.isfinite(model.predict_proba(X)).all()
    one = GLNClassifier(**SMALL).fit(X[:10], ["only"] * 10)
    assert set(one.predict(X[:5])) == {"only"}
    assert np.array_equal(one.predict_proba(X[:5]), np.ones((5, 1)))


def test_looking_inside(digits):
    X, y = digits
    model = GLNClassifier(dtype="float64", **SMALL).fit(X[:700], y[:700])
    layers = model.layer_predictions(X[:9])
    assert [p.shape for p in layers] == [(9, 10, 6), (9, 10, 4), (9, 10, 1)]
    assert all(p.min() >= 0.01 - 1e-12 and p.max() <= 0.99 + 1e-12 for p in layers)
    saliency, base, out = model.saliency(X), model.base_logits(X), model.decision_function(X)
    residual = np.abs(np.einsum("nkd,nd->nk", saliency, base) - out)
    free = ~model.clip_active(X)
    assert free.any()
    assert residual[free].max() < 1e-10
    assert np.abs(np.einsum("nkd,nd->nk", model.saliency(X, clipped="constant"), base) - out).max() < 1e-10
    assert model.context_counts(X[:9]).shape == (9, 10, 11)
    mixed = np.random.default_rng(0).permutation(X.shape[1])
    assert model.context_counts(X[:700]).mean() > model.context_counts(X[:700, mixed]).mean()
    with pytest.raises(InvalidInput, match="clipped"):
        model.saliency(X, clipped="yes")


def test_probabilities_are_the_ratio_of_the_networks_outputs():
    X, y = make_classification(300, n_classes=3, n_informative=5, random_state=0)
    model = GLNClassifier(dtype="float64", **SMALL).fit(X, y)
    q = 1 / (1 + np.exp(-model.decision_function(X)))
    np.testing.assert_allclose(model.predict_proba(X), q / q.sum(axis=1, keepdims=True), atol=1e-12)
    binary = GLNClassifier(dtype="float64", **SMALL).fit(X, y > 0)
    p = binary.predict_proba(X)
    np.testing.assert_allclose(binary.decision_function(X), np.log(p[:, 1] / p[:, 0]), atol=1e-10)
    assert np.array_equal(binary.predict(X), binary.decision_function(X) > 0)


def test_works_in_cross_validation(digits):
    X, y = digits
    scores = cross_val_score(GLNClassifier(learning_rate=0.03, **SMALL), X[:600], y[:600], cv=3)
    assert scores.min() > 0.75


def test_torch_tensors_are_taken_and_those_without_numbers_refused():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 3)).round(1), np.arange(40) % 2
    expected = GLNClassifier(random_state=0).fit(X, y).predict_proba(X)
    for tensor in (torch.tensor(X), torch.tensor(X, requires_grad=True)):
        np.testing.assert_array_equal(GLNClassifier(random_state=0).fit(tensor, y).predict_proba(tensor), expected)
    half = torch.tensor(X).bfloat16()
    found = GLNClassifier(random_state=0).fit(half, y).predict_proba(half)
    exact = half.double().numpy()
    np.testing.assert_array_equal(found, GLNClassifier(random_state=0).fit(exact, y).predict_proba(exact))
    with pytest.raises(InvalidInput, match="meta device"):
        GLNClassifier().fit(half.to("meta"), y)
