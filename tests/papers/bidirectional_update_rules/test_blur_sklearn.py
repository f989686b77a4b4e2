"""The scikit-learn classifier: scikit-learn's own checks, labels of every kind, streams, files."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.papers.bidirectional_update_rules import BlurClassifier, Genome


@parametrize_with_checks([BlurClassifier(random_state=0)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def iris():
    X, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return X[order], y[order]


@pytest.mark.parametrize(
    "names", [[3, 7, 9], [-1, 0, 1], ["a", "b", "c"], [0.0, 1.0, 2.0]], ids=["3,7,9", "-1,0,1", "words", "floats"]
)
def test_labels_of_any_kind_give_the_same_network(iris, names):
    X, y = iris
    plain = BlurClassifier(max_steps=5, random_state=0).fit(X, y)
    named = BlurClassifier(max_steps=5, random_state=0).fit(X, np.array(names)[y])
    assert np.array_equal(plain.decision_function(X), named.decision_function(X))
    assert np.array_equal(np.array(names)[plain.predict(X)], named.predict(X))


def test_two_classes_and_booleans():
    X, y = load_breast_cancer(return_X_y=True)
    model = BlurClassifier(random_state=0, max_steps=10).fit(X, y.astype(bool))
    assert model.decision_function(X).shape == (len(X),)
    assert model.predict(X).dtype == bool
    assert model.score(X, y.astype(bool)) > 0.85


def test_a_stream_in_parts(iris):
    X, y = iris
    model = BlurClassifier(random_state=0)
    for start in range(0, 150, 30):
        model.partial_fit(X[start : start + 30], y[start : start + 30], classes=[0, 1, 2])
    assert model.score(X, y) > 0.6
    with pytest.raises(InvalidInput, match="label 5"):
        model.partial_fit(X[:10], np.full(10, 5))
    with pytest.raises(InvalidInput, match="differ"):
        model.partial_fit(X[:10], y[:10], classes=[0, 1])
    with pytest.raises(InvalidInput, match="first call"):
        BlurClassifier().partial_fit(X, y)


def test_a_class_that_comes_late(iris):
    X, y = iris
    early = y < 2
    model = BlurClassifier(random_state=0).partial_fit(X[early], y[early], classes=[0, 1, 2])
    for _ in range(5):
        model.partial_fit(X, y)
    assert set(model.predict(X)) == {0, 1, 2}


def test_a_row_does_not_depend_on_its_company(iris):
    X, y = iris
    model = BlurClassifier(random_state=0).fit(X, y)
    alone = np.concatenate([model.decision_function(X[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, model.decision_function(X[:20]), rtol=1e-4, atol=1e-4)
    one_class = model.decision_function(X[y == 0])
    np.testing.assert_allclose(one_class, model.decision_function(X)[y == 0], rtol=1e-4, atol=1e-4)


def test_the_last_row_of_all_is_not_a_batch_of_its_own(iris):
    X, y = iris
    model = BlurClassifier(random_state=0, batch_size=49, max_steps=4).fit(X[:99], y[:99])  # 49, 49 and 1
    assert len(model.history_) == 4


def test_the_best_step_is_kept(iris):
    X, y = iris
    scores = [BlurClassifier(max_steps=t, keep_best=False, random_state=0).fit(X, y).score(X, y) for t in range(1, 9)]
    best = BlurClassifier(max_steps=8, random_state=0).fit(X, y)
    assert best.score(X, y) == max(scores)
    assert best.best_step_ == int(np.argmax(scores)) + 1
    assert BlurClassifier(max_steps=8, keep_best=False, random_state=0).fit(X, y).best_step_ == 8


def test_too_little_is_refused(iris):
    X, y = iris
    with pytest.raises(ValueError, match="sample"):
        BlurClassifier().fit(X[:1], y[:1])
    with pytest.raises(InvalidInput, match="two classes"):
        BlurClassifier().fit(X[y == 0], y[y == 0])
    with pytest.raises(TypeError):
        BlurClassifier().fit(X, y, sample_weight=np.ones(150))
    with pytest.raises(ValueError, match="dim 3"):
        BlurClassifier().fit(X, np.eye(3)[y][:, :, None])
    with pytest.raises(ValueError, match="max_steps"):
        BlurClassifier(max_steps=0).fit(X, y)


def test_backprop_by_the_classifier_points_the_right_way():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 100)
    X = rng.normal(size=(200, 2)) + np.where(y == 0, -2, 2)[:, None]
    genome = Genome.backprop(learning_rate=0.1)
    assert BlurClassifier(genome, hidden_layer_sizes=(), max_steps=10, random_state=0).fit(X, y).score(X, y) > 0.9


def test_saved_and_read_again(tmp_path, iris):
    X, y = iris
    names = np.array(["setosa", "versicolor", "virginica"])
    model = BlurClassifier(random_state=0, max_steps=6, hidden_layer_sizes=(7, 5)).fit(X, names[y])
    again = BlurClassifier.load(model.save(tmp_path / "model.safetensors"))
    assert np.array_equal(model.decision_function(X), again.decision_function(X))
    assert np.array_equal(model.predict(X), again.predict(X))
    model.partial_fit(X, names[y]), again.partial_fit(X, names[y])
    assert np.array_equal(model.decision_function(X), again.decision_function(X))
    with pytest.raises(MissingFile):
        BlurClassifier.load(tmp_path / "other.safetensors")


def test_in_a_pipeline_and_in_any_units(iris):
    X, y = iris
    a = BlurClassifier(random_state=0).fit(X, y)
    b = make_pipeline(MinMaxScaler(), BlurClassifier(random_state=0)).fit(X, y)
    np.testing.assert_allclose(a.predict_proba(X), b.predict_proba(X), atol=1e-3)
    np.testing.assert_allclose(a.predict_proba(X).sum(axis=1), 1, rtol=1e-5)
