"""Ensembles: mixtures of probabilities, exact in the tails, of members that stay as they were."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.infer.ensemble import Ensemble, RunningMixture, mix_gaussians, mix_logits
from mlcollage.infer.sgld import SGLD
from mlcollage.infer.swag import SWAG


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@settings(deadline=None)
@given(members=st.integers(1, 6), scale=st.floats(0.1, 500), seed=st.integers(0, 1000))
def test_the_mixture_is_scipy_s_even_in_the_tails(members, scale, seed):
    logits = scale * torch.randn(members, 5, 3, dtype=torch.float64, generator=rng(seed))
    z = logits.numpy()
    expected = logsumexp(z - logsumexp(z, axis=-1, keepdims=True), axis=0) - math.log(members)
    assert np.allclose(mix_logits(logits).numpy(), expected, rtol=1e-12, atol=1e-12)
    running = RunningMixture()
    for member in logits:
        running.update(member)
    assert running.count == members
    assert np.allclose(running.proba.sum(-1).numpy(), 1)
    assert np.allclose(running.log_proba.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_gaussians_mix_to_the_moments_of_their_draws():
    mean, variance = (
        torch.tensor([[0.0, 1.0], [3.0, 1.0], [-1.0, 1.0]]),
        torch.tensor([[1.0, 0.5], [2.0, 0.0], [0.5, 1]]),
    )
    found, spread = mix_gaussians(mean, variance)
    noise = torch.randn(100_000, 3, 2, generator=rng(1))
    draws = (mean + variance.sqrt() * noise).reshape(-1, 2)
    assert torch.allclose(found, draws.mean(0), atol=0.02)
    assert torch.allclose(spread, draws.var(0), rtol=0.02)


def test_members_predict_in_evaluation_mode_and_stay_as_they_were():
    models = [network(seed) for seed in range(3)]
    x = torch.randn(10, 4, generator=rng(2))
    for model in models:
        model.train()(x)  # running statistics of its own
    template = network(9)
    ensemble = Ensemble(template, models[:2])
    ensemble.add(models[2].state_dict())
    before = torch.random.get_rng_state()
    proba = ensemble.predict_proba(x)
    assert torch.equal(before, torch.random.get_rng_state())  # no dropout
    with torch.no_grad():
        expected = torch.stack([model.eval()(x).double().softmax(1) for model in models]).mean(0)
    assert torch.allclose(proba, expected, rtol=1e-6)
    assert torch.allclose(ensemble.predict_proba(x, batch_size=3), proba, rtol=1e-5)
    assert ensemble.outputs(x, batch_size=4).shape == (3, 10, 3)
    with torch.no_grad():
        models[0][0].weight.zero_()  # members are copies
    assert torch.equal(ensemble.predict_proba(x), proba)
    assert template.training
    assert torch.equal(template[0].weight, network(9)[0].weight)


def test_an_ensemble_is_never_worse_than_its_average_member():
    """Jensen: the log-loss of the mixture is at most the mean log-loss."""
    ensemble = Ensemble(network(0), [network(seed) for seed in range(4)])
    x, y = torch.randn(50, 4, generator=rng(3)), torch.randint(3, (50,), generator=rng(4))
    single = ensemble.outputs(x).double().log_softmax(-1)[:, torch.arange(50), y]
    mixed = ensemble.predict_log_proba(x)[torch.arange(50), y]
    assert bool((mixed >= single.mean(0)).all())


def test_draws_of_samplers_and_of_swag_are_members():
    """Logistic regression in two dimensions: the average over an SGLD chain is the average over its weights."""
    x = torch.randn(60, 2, generator=rng(5))
    y = (x[:, 0] > 0).long()
    model = nn.Linear(2, 2)
    sampler, swag, ensemble = (
        SGLD(model.parameters(), 1e-3, num_data=60, weight_decay=1.0),
        SWAG(model, 5),
        Ensemble(model),
    )
    for step in range(60):
        sampler.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        sampler.step()
        if step % 10 == 9:
            ensemble.add(model)
            swag.update(model)
    assert len(ensemble) == 6
    by_hand = torch.stack([(x @ s["weight"].T + s["bias"]).double().softmax(1) for s in ensemble._states]).mean(0)
    assert torch.allclose(ensemble.predict_proba(x), by_hand, rtol=1e-5)
    generator = rng(6)
    drawn = Ensemble(model, [swag.sample(generator) for _ in range(4)]).predict_proba(x)
    assert torch.allclose(drawn.sum(1), torch.ones(60, dtype=torch.float64))


def test_what_cannot_work_is_named():
    ensemble = Ensemble(nn.Linear(2, 3))
    with pytest.raises(InvalidInput, match="no members yet"):
        ensemble.predict_proba(torch.zeros(1, 2))
    with pytest.raises(InvalidInput, match=r"another architecture: it differs in weight"):
        ensemble.add(nn.Linear(4, 3))
    with pytest.raises(InvalidInput, match=r"it differs in bias \(1 in all\)"):
        ensemble.add(nn.Linear(2, 3, bias=False))
    with pytest.raises(InvalidInput, match="a member is int"):
        ensemble.add(3)
    ensemble.add(nn.Linear(2, 3))
    with pytest.raises(InvalidInput, match="at least one input"):
        ensemble.predict_proba(torch.zeros(0, 2))
    with pytest.raises(InvalidInput, match="batch_size must be a whole number of at least 1"):
        ensemble.outputs(torch.zeros(1, 2), batch_size=0)
    with pytest.raises(InvalidInput, match=r"\(members, \.\.\., classes\)"):
        mix_logits(torch.zeros(3))
    with pytest.raises(InvalidInput, match="at least two classes"):
        mix_logits(torch.zeros(3, 5, 1))
    with pytest.raises(InvalidInput, match=r"torch.int64 of shape \(5, 2\)"):
        RunningMixture().update(torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="member 1 are not finite"):
        mix_logits(torch.tensor([[[0.0, 1.0]], [[math.nan, 1.0]]]))
    with pytest.raises(InvalidInput, match="no member was counted"):
        RunningMixture().log_proba  # noqa: B018
    running = RunningMixture()
    running.update(torch.zeros(5, 2))
    with pytest.raises(InvalidInput, match="the same inputs"):
        running.update(torch.zeros(4, 2))
    with pytest.raises(InvalidInput, match=r"both must be \(members, \.\.\.\)"):
        mix_gaussians(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="variance is negative"):
        mix_gaussians(torch.zeros(2, 3), -torch.ones(2, 3))


@pytest.mark.parametrize("members", [0, 1, 3])
def test_a_mixture_comes_back_from_its_tensors(members):
    logits = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    running = RunningMixture()
    for member in logits[:members]:
        running.update(member)
    again = RunningMixture.from_tensors(running.tensors())
    for member in logits[members:]:
        running.update(member)
        again.update(member)
    assert again.count == 5
    assert torch.equal(again.proba, running.proba)


def test_the_same_module_twice_is_refused():
    net = torch.nn.Linear(4, 3)
    with pytest.raises(InvalidInput, match="hold the same module more than once"):
        Ensemble(net, [net, torch.nn.Linear(4, 3), net])
    assert len(Ensemble(net, [net.state_dict()] * 2)) == 2


def test_a_member_with_another_activation_is_refused():
    def made(act):
        return nn.Sequential(nn.Linear(2, 2), act())

    with pytest.raises(InvalidInput, match=r"layer 1 is ReLU\(\) there and Tanh\(\) here"):
        Ensemble(made(nn.Tanh), [made(nn.ReLU)])
