"""The selector: weights, votes, ties and fallback of the official code, and a plain transcription."""

import numpy as np
import pytest
from sklearn.tree import DecisionTreeClassifier

from mlcollage.errors import InvalidInput
from mlcollage.papers.autosklearn2 import PolicySelector
from mlcollage.papers.autosklearn2.selector import count_votes

NORMALIZATIONS = ("all", "all1", "binary", "binary1", "y", "rank", "None")


def fitted(d, **settings):
    selector = PolicySelector(order=d["fixed_order"].tolist(), **settings)
    return selector.fit(d["meta_features"], d["losses"], d["minima"], d["maxima"])


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_weights_and_majorities_are_the_official_ones(official, how):
    d = official("selector")
    selector = fitted(d, max_depth=0, normalization=how.lower() if how == "None" else how)
    np.testing.assert_allclose(selector.weights_, d[f"weights_{how}"], atol=1e-14)
    assert selector._models == d[f"majority_{how}"].tolist()
    np.testing.assert_array_equal(selector.predict_proba(d["test_meta_features"]), d[f"votes_majority_{how}"])


def test_a_task_beyond_all_others_gets_the_first_policy(official):
    d = official("selector")
    selector = fitted(d, max_depth=0)
    np.testing.assert_array_equal(selector.is_fallback(d["test_meta_features"]), d["is_fallback"])
    chosen = selector.predict(d["test_meta_features"])[d["is_fallback"]]
    assert set(chosen) == {int(d["fixed_order"][0])}


def test_votes_of_forests_are_the_official_ones(official):
    d = official("selector")
    settings = {"max_depth": 2, "min_samples_leaf": 6, "min_samples_split": 8, "max_features": 2}
    for seed in (0, 1):
        votes = fitted(d, n_estimators=3, random_state=seed, **settings).predict_proba(d["test_meta_features"])
        free = d["tree_seed_free"]
        np.testing.assert_allclose(votes[free], d["tree_votes"][free], atol=1e-14)


@pytest.mark.parametrize("voting", ["hard", "soft"])
def test_ties_are_broken_as_in_the_official_code(official, voting):
    d = official("selector")
    votes = d["vote_labels"] if voting == "hard" else d["vote_probabilities"]
    found = count_votes(d["vote_labels"], votes, d["fixed_order"].tolist())
    np.testing.assert_allclose(found, d[f"vote_{voting}"], atol=1e-14)


def test_one_tree_of_a_pair_is_a_weighted_tree():
    rng = np.random.default_rng(0)
    x = rng.lognormal(3, 1, (70, 2))
    losses = rng.random((70, 2))
    settings = {"max_depth": 3, "min_samples_leaf": 4, "min_samples_split": 8}
    selector = PolicySelector(1, max_features=2, normalization="none", random_state=0, **settings).fit(x, losses)
    tree = DecisionTreeClassifier(random_state=0, **settings).fit(x, losses[:, 0] < losses[:, 1])
    assert (
        np.mean(selector.predict(x) == np.where(tree.predict(x), 0, 1)) > 0.95
    )  # equal splits may be taken differently


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PolicySelector().predict([[1, 2]]), "not fitted"),
        (lambda: PolicySelector().fit([[1, 2, 3]], [[0.1, 0.2]]), r"expected \(tasks, 2\)"),
        (lambda: PolicySelector(order=[0, 0]).fit([[1, 2]], [[0.1, 0.2]]), "every number from 0 to 1"),
        (lambda: PolicySelector(normalization="max"), "normalization must be one of"),
        (lambda: PolicySelector().fit([[1, np.nan]], [[0.1, 0.2]]), "missing or infinite"),
        (lambda: PolicySelector().fit(np.empty((0, 2)), np.empty((0, 3))), "one task at least"),
        (lambda: PolicySelector().fit([[1, 2]], [[np.inf, 0.2]]), "losses must be finite"),
        (lambda: PolicySelector().fit([[1, 2]], [[np.nan, np.nan]]), "every task needs one"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
