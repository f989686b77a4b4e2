"""The study of gated linear networks: every run runs, every claim can be computed, the baselines are what they say."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.study import Study, run_study
from mlcollage.papers.gated_linear_networks import baselines, experiments, study
from mlcollage.papers.gated_linear_networks.baselines import EpsilonGreedy, LinUCB, OnlineMLP

SLUG = "gated_linear_networks"


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return Study(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


# --- the study ------------------------------------------------------------------------------------------------------


def test_every_run_finishes_with_finite_numbers(evidence):
    assert evidence.failures == []
    assert evidence.missing == 0
    assert {r.settings["experiment"] for r in evidence.runs} == set(experiments.EXPERIMENTS)
    assert np.isfinite(evidence.table["value"]).all()


def test_every_claim_due_at_quick_is_computed(evidence):
    verdicts = Study(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    assert list(verdicts) == [c.id for c in study.CLAIMS]
    for verdict in verdicts.values():
        assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        assert verdict.seeds == 2
    assert verdicts["C5"].status == "supported", "the read-out is an identity, at any size"


def test_claims_are_well_formed():
    assert len({c.id for c in study.CLAIMS}) == len(study.CLAIMS)
    for claim in study.CLAIMS:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert 0 < len(claim.title) <= 28
        assert claim.sentence[0].isupper()
        assert claim.sentence.endswith(".")
        assert claim.source
        assert claim.estimand.describe().strip()
        assert set(claim.estimand.arms) <= {arm for arms in study._ARMS.values() for arm in arms}


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_are_many_seeds_of_one_plan(scale):
    runs = Study(SLUG, scale).runs()
    assert len({r.id for r in runs}) == len(runs)
    seeds = {a: sorted(r.seed for r in runs if r.arm == a) for a in {r.arm for r in runs}}
    assert all(s[0] == 0 and len(s) >= 1 for s in seeds.values())
    if scale.rank >= Scale.QUICK.rank:
        judged = {arm for c in study.CLAIMS for arm in c.estimand.arms}
        assert all(len(set(seeds[arm])) >= 5 for arm in judged)


def test_a_run_gives_the_same_numbers_again(evidence):
    for arm, experiment in (("gln", "stream"), ("mlp", "stream"), ("glcb", "bandit"), ("gln_m2", "forget")):
        (run,) = evidence.find_runs(arm=arm, seed=1, experiment=experiment)
        again = study.measure(run, None).table
        kept = evidence.table[evidence.table["run"] == run.id]
        steady = again["metric"] != "samples_per_second"
        np.testing.assert_array_equal(again["value"][steady], kept["value"].to_numpy()[steady])


def test_the_slide_draws(evidence, tmp_path):
    study_ = Study(SLUG, Scale.SMOKE)
    slide, files = draw_slide(study_, evidence, study_.judge(evidence), tmp_path)
    assert 3 <= len(slide.collage.panels) <= 6
    assert {c.id for c in slide.chips} == {c.id for c in study.CLAIMS}
    assert all(panel.alt.strip() for panel in (slide.collage.idea, *slide.collage.panels))
    assert all(file.stat().st_size > 10_000 for file in files.values())


@pytest.mark.parametrize("kind", ["function", "npz", "csv"])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind):
    """A model of the user's is not used here: the study compares online learners of its own on the user's data."""
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.settings["experiment"] for r in evidence.runs} == {"stream", "forget"}
    assert evidence.workload != "default"
    verdicts = Study(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    outside = {k for k, v in verdicts.items() if v.reason == "not part of this workload"}
    assert outside == {"C4", "C7", "C8", "C9", "C10", "C11"}
    assert all(verdicts[k].estimate is not None for k in ("C1", "C1b", "C2", "C3", "C3b", "C6"))
    assert verdicts["C5"].status == "supported"
    own = Study(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


def test_the_read_out_is_linear_for_two_classes_too():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(300, 4)).astype(np.float32))
    data = torch.utils.data.TensorDataset(X, (X[:, 0] > 0).long())
    workload = Labeled(data, data, 2)
    run = next(r for r in study.runs(Scale.SMOKE, workload) if r.arm == "gln")
    table = study.measure(run, workload).table.set_index("metric")["value"]
    assert table["linearity_residual"] < 1e-10
    assert table["linearity_share"] > 0.5


def test_data_of_a_run_is_seeded_cut_and_in_natural_units():
    run = Run(SLUG, "gln", 3, {"data": "digits", "train": 100, "test": 40})
    X, y, X_test, y_test = experiments.classification_data(run, None)
    again = experiments.classification_data(run, None)
    for a, b in zip((X, y, X_test, y_test), again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert X.shape == (100, 64)
    assert X_test.shape == (40, 64)
    assert X.max() > 1
    other = experiments.classification_data(dataclasses.replace(run, seed=4), None)
    assert not np.array_equal(other[0], X)


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


def test_the_online_mlp_refuses_other_optimizers():
    with pytest.raises(InvalidInput, match="'sgd' or 'adam'"):
        OnlineMLP(2, 2, optimizer="lbfgs")


def test_linucb_is_ridge_regression_in_closed_form():
    rng = np.random.default_rng(3)
    policy = LinUCB(3, 4, alpha=0.7, seed=0)
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
    policy = EpsilonGreedy(4, 2, epsilon=0.4, seed=1)
    z = np.array([1.0, 0.5])
    for _ in range(50):
        policy.update(z, 2, 1.0)
    played = np.array([policy.select(z) for _ in range(4000)])
    assert abs((played == 2).mean() - (0.6 + 0.4 / 4)) < 0.03
    greedy = EpsilonGreedy(4, 2, epsilon=0.0, seed=1)
    assert len({greedy.select(z) for _ in range(100)}) == 4, "ties are broken at random"


def test_the_best_fixed_weights_are_those_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 3))
    y = (rng.uniform(size=300) < 1 / (1 + np.exp(-X @ [1.0, -2.0, 0.5]))).astype(float)
    peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(X, y)
    logits = X @ peer.coef_[0]
    expected = float((np.logaddexp(0, logits) - y * logits).sum())
    assert experiments._best_fixed_loss(X, y) == pytest.approx(expected, rel=1e-6)
    assert experiments._best_fixed_loss(X[:0], y[:0]) == 0.0


def test_the_method_and_its_baselines_get_grids_of_the_same_size():
    assert {len(baselines.grid(arm)) for arm in ("gln", "mlp", "linear")} == {8}
