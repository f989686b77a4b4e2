"""Whether a posterior of a sampler says, by itself, that its draws cannot be trusted."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from mlcollage.infer import Unhealthy, rhat
from mlcollage.papers.bnn_posteriors import HMC, NUTS, SGHMC, SGLD, BayesianNetwork

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()
FAR = [
    HMC(chains=3, draws=8, burn_in=0, warmup=0, step_size=1e-3, trajectory_length=2e-3),
    NUTS(chains=3, draws=8, warmup=0, step_size=1e-3, max_depth=1),
    SGLD(chains=3, draws=8, burn_in=0, thin=1, lr=1e-7),
    SGHMC(chains=3, draws=8, burn_in=0, thin=1, lr=1e-7),
]


def network():
    return BayesianNetwork(nn.Sequential(nn.Linear(2, 2)).double())


@pytest.mark.parametrize("method", FAR, ids=[m.name for m in FAR])
@pytest.mark.parametrize("kept", [{}, {"store": "predictions", "at": X[:5]}], ids=["draws", "predictions"])
def test_chains_that_stay_apart_are_told_of_once(method, kept):
    apart = 3 * torch.eye(3, 6, dtype=torch.float64)
    method = type(method)(**{**method.__dict__, **kept})
    with pytest.warns(Unhealthy) as said:
        posterior = network().fit(X, Y, method, init=apart)
    assert len(said) == 1
    assert Path(said[0].filename).name == "test_health.py"
    count = 10 if kept else 2 * 20
    assert f"in {count} of {count} predictions" in str(said[0].message)
    assert posterior.health().sentences() == [str(said[0].message)]
    with pytest.warns(Unhealthy) as more:
        posterior.extend(2)
    assert Path(more[0].filename).name == "test_health.py"


def test_the_numbers_are_those_of_arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unhealthy)
        posterior = network().fit(X, Y, HMC(chains=3, draws=16, warmup=20))
    health = posterior.health(X[:7])
    predicted = posterior.predict_draws(X[:7])
    assert health.rhat["prediction"].tolist() == pytest.approx(rhat(predicted, "split").reshape(-1).tolist())
    lp = posterior.sample_stats["lp"]
    folded = (lp - lp.mean()).abs()
    expected = max(float(rhat(lp, "split")), float(rhat(folded, "split")))
    assert float(health.rhat["log-density"]) == pytest.approx(expected)
    assert health.accept.tolist() == posterior.sample_stats["accept_prob"].mean(1).tolist()
    assert health.divergences.tolist() == [0, 0, 0]


def test_a_chain_that_is_stuck_and_diverges_is_named():
    start = torch.zeros(3, 6, dtype=torch.float64)
    start[2] = 30.0
    with pytest.warns(Unhealthy, match=r"accepted, at step size .*, in chains 0, 1, 2 \(3 of 3\).*diverged") as said:
        posterior = network().fit(
            1e3 * X, Y, HMC(chains=3, draws=6, burn_in=0, warmup=0, step_size=0.5, trajectory_length=5.0), init=start
        )
    assert "makes steps beyond" in str(said[0].message)
    assert posterior.health().divergences.tolist() == [6, 6, 6]


def test_a_run_that_converged_is_silent(recwarn):
    network().fit(X, Y, HMC(chains=4, draws=600, warmup=100, jitter=0.3, trajectory_length=1.5), generator=1)
    assert not recwarn.list
