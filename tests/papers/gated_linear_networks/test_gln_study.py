"""The study of gated linear networks: the contract of a study, its data, and the baselines are what they say."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.papers.gated_linear_networks.study import relatives
from mlcollage.papers.gated_linear_networks.study.data import Split, classification_data
from mlcollage.papers.gated_linear_networks.study.experiments import Forget, Stream, forget, stream
from mlcollage.papers.gated_linear_networks.study.models import LinearBandit, OnlineMLP, Rival, grid
from mlcollage.testing import study_checks

SLUG = "gated_linear_networks"


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


def test_every_claim_due_at_quick_is_computed(smoke_store):
    evidence = as_if(BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG)), Scale.QUICK)
    assert np.isfinite(evidence.table["value"]).all()
    for verdict in BoundStudy(SLUG, Scale.QUICK).judge(evidence).values():
        assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        assert verdict.seeds == 2
        if verdict.claim.id == "C5":
            assert verdict.status == "supported", "the read-out is an identity, at any size"


@pytest.mark.parametrize("kind", ["function", "npz", "csv"])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind):
    """A model of the user's is not used here: the study compares online learners of its own on the user's data."""
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.experiment for r in evidence.runs} == {"stream", "forget"}
    assert {r.settings["data"] for r in evidence.runs} == {"workload"}
    verdicts = BoundStudy(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    outside = {k for k, v in verdicts.items() if v.reason == "not part of this workload"}
    assert outside == {"C4", "C7", "C8", "C9", "C9b", "C9c", "C10", "C11"}
    assert all(verdicts[k].estimate is not None for k in ("C1", "C1b", "C2", "C3", "C3b", "C3c", "C3d", "C3e", "C6"))
    assert verdicts["C5"].status == "supported"
    own = BoundStudy(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


def test_the_read_out_is_linear_for_two_classes_too():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 4)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int64)
    workload = Labeled.from_arrays(X[:300], y[:300], X[300:], y[300:], 2)
    task = Task("gln", (0,), Stream(train=150, test=60, hidden=(4, 2)), workload=workload)
    table = stream(task).table.set_index("metric")["value"]
    assert table["linearity_residual"] < 1e-10
    assert table["linearity_share"] > 0.5


def test_data_of_a_run_is_seeded_cut_and_in_natural_units():
    X, y, X_test, y_test, offset = classification_data(3, 100, 40)
    for a, b in zip((X, y, X_test, y_test), classification_data(3, 100, 40)[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    assert X.shape == (100, 64)
    assert X_test.shape == (40, 64)
    assert (X.min(), X.max(), offset) == (0, 255, 1)
    assert not np.array_equal(classification_data(4, 100, 40)[0], X)


# --- the baselines against independent truths -----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("hidden", [0, 6])
def test_the_online_mlp_is_torch_autograd(hidden, optimizer):
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(40, 5)), rng.integers(3, size=40)
    ours = OnlineMLP(5, 3, hidden=hidden, lr=0.05, optimizer=optimizer, seed=2)
    layers = [torch.nn.Linear(i, o, dtype=torch.float64) for i, o in ([(5, 3)] if not hidden else [(5, 6), (6, 3)])]
    start, where = ours.theta.copy(), 0
    for layer in layers:
        for p in layer.parameters():
            p.data = torch.from_numpy(start[where : where + p.numel()].copy()).reshape(p.shape)
            where += p.numel()
    network = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())][:-1])
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    step = make(network.parameters(), lr=0.05)
    expected = []
    for x, label in zip(torch.from_numpy(X), torch.from_numpy(y), strict=True):
        logits = network(x)
        expected.append(logits.detach().numpy().copy())
        step.zero_grad()
        torch.nn.functional.cross_entropy(logits, label).backward()
        step.step()
    # In two calls: the moments of Adam and its count of steps go on.
    predicted = np.concatenate([ours.learn(X[:15], y[:15]), ours.learn(X[15:], y[15:])])
    np.testing.assert_allclose(predicted, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(ours.decision_function(X), network(torch.from_numpy(X)).detach().numpy(), rtol=1e-9)
    weights = np.concatenate([p.detach().numpy().ravel() for p in network.parameters()])
    np.testing.assert_allclose(ours.theta, weights, rtol=1e-9, atol=1e-11)


def as_torch(model):
    """The same network with autograd, and its parameters in the order of ``theta``."""
    n = model.n_inputs, model.hidden, model.n_classes
    layers = [torch.nn.Linear(i, o, dtype=torch.float64) for i, o in itertools.pairwise([k for k in n if k])]
    parameters = [p for layer in layers for p in layer.parameters()]
    torch.nn.utils.vector_to_parameters(torch.from_numpy(model.theta.copy()), parameters)
    return torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())][:-1]), parameters


@pytest.mark.parametrize("hidden", [0, 6])
def test_elastic_weights_are_pulled_by_the_fisher_information(hidden):
    """F in expectation over the model's labels, by autograd; then one step of the loss with its penalty."""
    rng = np.random.default_rng(4)
    X, y = rng.normal(size=(30, 5)), rng.integers(3, size=30)
    model = OnlineMLP(5, 3, hidden=hidden, lr=0.05, elastic=7.0, seed=2)
    model.learn(X, y)
    network, parameters = as_torch(model)
    expected = np.zeros_like(model.theta)
    for x in torch.from_numpy(X):
        p = network(x).softmax(dim=0)
        for c in range(3):
            slope = torch.autograd.grad(p[c].log(), parameters, retain_graph=True)
            expected += float(p[c]) * torch.cat([g.ravel() for g in slope]).numpy() ** 2 / len(X)
    model.consolidate(X)
    np.testing.assert_allclose(model.pull, 7 * expected, rtol=1e-9, atol=1e-12)
    anchor, pull = model.theta.copy(), model.pull.copy()
    model.learn(X[:5], y[:5])
    start = model.theta.copy()
    network, parameters = as_torch(model)
    loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(X[6])), torch.tensor(y[6]))
    slope = torch.cat([g.ravel() for g in torch.autograd.grad(loss, parameters)]).numpy()
    model.learn(X[6:7], y[6:7])
    # An implicit step: the penalty's slope is taken where the step ends.
    np.testing.assert_allclose(
        model.theta, start - 0.05 * (slope + pull * (model.theta - anchor)), rtol=1e-9, atol=1e-12
    )
    assert np.abs(model.theta - start).max() > 1e-4


def test_dropout_leaves_out_hidden_units_and_keeps_the_mean():
    X, y = np.random.default_rng(0).normal(size=(1, 5)), np.array([1])
    told, still = [], 0
    for seed in range(400):
        model = OnlineMLP(5, 3, hidden=6, lr=1.0, dropout=0.5, seed=2)
        model.rng = np.random.default_rng(seed)
        before = model.theta.copy()
        told.append(model.learn(X, y)[0])
        still += (model.theta != before)[30:36].sum()  # the hidden units' biases
    np.testing.assert_allclose(
        np.mean(told, axis=0), OnlineMLP(5, 3, hidden=6, seed=2).decision_function(X)[0], atol=0.2
    )
    active = (OnlineMLP(5, 3, hidden=6, seed=2)._forward(X)[0] > 0).sum()
    assert abs(still / 400 - active / 2) < 0.25


def test_replay_keeps_a_uniform_choice_and_follows_each_sample_by_kept_ones():
    X = np.arange(300.0)[:, None]
    split = Split(X, np.arange(300) % 2, X, np.arange(300) % 2)
    places = []
    for seed in range(30):
        model = Rival(split, seed, hidden=4, replay=20, again=3)
        stream = list(model._with_replays(X, split.y))
        assert len(stream) == 300 + 3 * 299
        assert [x[0] for x, _ in stream[:1] + stream[1::4]] == X[:, 0].tolist()
        places += [x[0] for x, _ in model.buffer]
        assert len(model.buffer) == 20
    assert abs(np.mean(places) - 149.5) < 15
    assert model.kept == model.model.theta.size + 20 * 2


@pytest.mark.parametrize("factor", [0.001, 1000.0])
def test_units_of_a_tables_features_do_not_change_the_study(factor):
    """Before, 0.001 turned accuracies of 0.76 into 0.58, 0.34 and 0.33: tables were taken for pixels."""
    X, y = load_wine(return_X_y=True)
    X = np.hstack([X, np.ones((len(X), 1))]).astype(np.float32)  # and a constant feature
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order], y[order]

    def accuracies(X):
        workload = Labeled.from_arrays(X[:120], y[:120], X[120:], y[120:], 3)
        found = {}
        for arm in ("gln", "mlp", "linear"):
            table = stream(Task(arm, (0,), Stream(train=120, test=58, hidden=(4, 2)), workload=workload)).table
            found[arm] = float(table.loc[table["metric"] == "accuracy", "value"].iloc[0])
        return found

    one, other = accuracies(X), accuracies(factor * X)
    assert min(one.values()) > 0.7
    for arm, value in one.items():
        assert other[arm] == pytest.approx(value, abs=0.04), arm


def test_images_are_brought_to_the_range_of_pixels_and_tables_are_left_alone():
    rng = np.random.default_rng(0)
    x, y = rng.random((60, 1, 5, 5)).astype(np.float32), np.arange(60) % 2
    for images in (x, 40 * x - 7):
        found = classification_data(
            0, 40, 20, workload=Labeled.from_arrays(images[:40], y[:40], images[40:], y[40:], 2)
        )
        assert found.offset == 1
        np.testing.assert_allclose([found.X.min(), found.X.max()], [0, 255], atol=1e-3)
    flat = x.reshape(60, 25) / 255
    found = classification_data(0, 40, 20, workload=Labeled.from_arrays(flat[:40], y[:40], flat[40:], y[40:], 2))
    assert found.offset == 0
    np.testing.assert_array_equal(np.sort(found.X.ravel()), np.sort(flat[:40].ravel()))


def test_permuted_features_are_standardized_before_they_trade_places(monkeypatch):
    """Afterwards, a lively pixel in the place of a dead one was a hundred times too large for the rivals."""
    seen = []
    monkeypatch.setattr(Rival, "scores", lambda self, X: seen.append(X) or np.zeros((len(X), 10)))
    forget(Task("mlp", (0,), Forget(train=60, test=30, tasks=3)))
    assert max(np.abs(x).max() for x in seen) < 15
    first, *others = (np.sort(x, axis=None) for x in seen[-3:])
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_the_online_mlp_refuses_other_optimizers():
    with pytest.raises(InvalidInput, match="'sgd', 'adam'"):
        OnlineMLP(2, 2, optimizer="lbfgs")


def test_linucb_is_ridge_regression_in_closed_form():
    rng = np.random.default_rng(3)
    policy = LinearBandit(3, 4, alpha=0.7, seed=0)
    Z, actions, rewards = rng.normal(size=(60, 4)), rng.integers(3, size=60), rng.normal(size=60)
    for z, a, r in zip(Z, actions, rewards, strict=True):
        policy.update(z, int(a), float(r))
    scores, z = [], rng.normal(size=4)
    for a in range(3):
        own = actions == a
        A = np.eye(4) + Z[own].T @ Z[own]
        theta = np.linalg.solve(A, Z[own].T @ rewards[own])
        np.testing.assert_allclose(policy.theta[a], theta, atol=1e-12)
        scores.append(theta @ z + 0.7 * np.sqrt(z @ np.linalg.solve(A, z)))
    assert policy.select(z) == int(np.argmax(scores))


def test_epsilon_greedy_explores_as_often_as_it_says():
    policy = LinearBandit(4, 2, epsilon=0.4, seed=1)
    z = np.array([1.0, 0.5])
    for _ in range(50):
        policy.update(z, 2, 1.0)
    played = np.array([policy.select(z) for _ in range(4000)])
    assert abs((played == 2).mean() - (0.6 + 0.4 / 4)) < 0.03
    greedy = LinearBandit(4, 2, seed=1)
    assert len({greedy.select(z) for _ in range(100)}) == 4, "ties are broken at random"


def test_the_best_fixed_weights_are_those_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 3))
    y = (rng.uniform(size=300) < 1 / (1 + np.exp(-X @ [1.0, -2.0, 0.5]))).astype(float)
    peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(X, y)
    logits = X @ peer.coef_[0]
    expected = float((np.logaddexp(0, logits) - y * logits).sum())
    assert relatives._best_fixed_loss(X, y) == pytest.approx(expected, rel=1e-6)
    assert relatives._best_fixed_loss(X[:0], y[:0]) == 0.0


def test_the_method_and_its_baselines_get_grids_of_the_same_size():
    assert {len(grid(arm)) for arm in ("gln", "mlp", "linear", "dropout", "replay", "ewc")} == {8}
    assert {len(g) for arm, g in relatives._REGRESSION_GRIDS.items() if arm != "bayesian_ridge"} == {12}
