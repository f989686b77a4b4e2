"""Diagnostics of stored draws are ArviZ's; streamed ones agree with them without keeping the draws."""

import sys
import types
import warnings

import arviz as az
import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.infer import hmc
from mlcollage.infer.adaptation import DualAveraging, RunningVariance, first_inverse_mass, mass_windows
from mlcollage.infer.diagnostics import Streaming, bfmi, ess, rhat
from mlcollage.infer.export import to_arviz


def autoregressive(rho, chains, draws, seed=0):
    """Stationary draws with autocorrelation rho^lag: an effective size of n (1 - rho) / (1 + rho)."""
    rng = np.random.default_rng(seed)
    x = np.empty((chains, draws))
    x[:, 0] = rng.normal(size=chains)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + (1 - rho**2) ** 0.5 * rng.normal(size=chains)
    return x


def streamed(x, batches=16):
    stream = Streaming(batches)
    for t in range(x.shape[1]):
        stream.update(x[:, t])
    return stream


def test_stored_draws_give_what_arviz_gives():
    x = autoregressive(0.6, 4, 300)
    assert rhat(x) == pytest.approx(float(az.rhat(x)))
    assert ess(x) == pytest.approx(float(az.ess(x)))
    assert ess(x, "tail") == pytest.approx(float(az.ess(x, method="tail", prob=(0.05, 0.95))))
    both = np.stack([x, x + np.arange(4)[:, None]], axis=-1)
    assert rhat(torch.from_numpy(both)).shape == (2,)
    assert rhat(both)[1] > 1.3


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_missing_information_of_autoregressive_energies(rho):
    """Steps of such a chain have variance 2 (1 - rho) times its own."""
    assert bfmi(autoregressive(rho, 3, 20_000)) == pytest.approx([2 * (1 - rho)] * 3, rel=0.1)


@pytest.mark.parametrize("draws", [4, 10, 16, 256, 1024, 4096])
def test_streamed_rhat_is_arviz_split_rhat(draws):
    x = autoregressive(0.5, 5, draws) + np.linspace(0, 1, 5)[:, None]
    assert float(streamed(x).rhat()) == pytest.approx(float(az.rhat(x, method="split")), rel=1e-10)


def test_streamed_rhat_with_draws_left_over_is_close():
    x = autoregressive(0.5, 5, 1003) + np.linspace(0, 1, 5)[:, None]
    assert float(streamed(x).rhat()) == pytest.approx(float(az.rhat(x, method="split")), rel=0.02)


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_streamed_effective_size_meets_the_closed_form(rho):
    x = autoregressive(rho, 40, 4000)
    stream, exact = streamed(x), 40 * 4000 * (1 - rho) / (1 + rho)
    assert float(stream.ess()) == pytest.approx(exact, rel=0.15)
    assert float(stream.mcse()) == pytest.approx(exact**-0.5, rel=0.1)


def test_streamed_moments_are_those_of_the_draws():
    x = 1e6 + np.random.default_rng(0).normal(size=(3, 333, 2))
    stream = streamed(x)
    assert stream.mean().numpy() == pytest.approx(x.mean((0, 1)), rel=1e-12)
    assert stream.variance().numpy() == pytest.approx(x.var((0, 1), ddof=1), rel=1e-6)
    assert len(stream._whole) < 16


def test_chains_that_disagree_have_no_more_effective_draws_than_batches():
    x = autoregressive(0.0, 4, 512) + 10 * np.arange(4)[:, None]
    assert float(streamed(x).ess()) < 4 * 16


@pytest.mark.parametrize("draws", [40, 47])
def test_merging_is_as_if_all_chains_had_run_together(draws):
    x = np.random.default_rng(1).normal(size=(6, draws, 3))
    merged, whole = streamed(x[:2]).merge(streamed(x[2:])), streamed(x)
    for function in ("mean", "variance", "rhat", "ess", "mcse"):
        assert torch.allclose(getattr(merged, function)(), getattr(whole, function)())
    merged.update(x[:, 0])
    assert merged.count == draws + 1


def test_streaming_refuses_what_it_cannot_use():
    with pytest.raises(InvalidInput, match="batches must be a whole number of at least 8"):
        Streaming(batches=7)
    stream = Streaming()
    with pytest.raises(InvalidInput, match="no draw"):
        stream.mean()
    stream.update(torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match=r"shape \(2, 4\); \(2, 3\)"):
        stream.update(torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="too few"):
        stream.rhat()
    with pytest.raises(InvalidInput, match="equal length"):
        stream.merge(Streaming())


def test_draws_that_cannot_be_diagnosed():
    with pytest.raises(InvalidInput, match="at least 4 draws"):
        rhat(np.zeros((2, 3)))
    with pytest.raises(InvalidInput, match="not all finite"):
        ess(np.full((2, 10), np.nan))
    with pytest.raises(InvalidInput, match=r"\(chains, draws\)"):
        bfmi(np.zeros((2, 10, 3)))


def test_one_chain_is_compared_with_itself_and_told_so():
    x = autoregressive(0.3, 1, 400)
    with pytest.warns(UserWarning, match="only its halves"):
        assert rhat(x) < 1.05
    with pytest.warns(UserWarning, match="only its halves"):
        assert rhat(x + np.linspace(0, 5, 400)) > 1.5


def normal(x):
    return -0.5 * x.square().sum(dim=1)


def test_chains_become_arviz_data_of_the_installed_release():
    chains = hmc.sample(normal, torch.zeros(4, 3, dtype=torch.float64), draws=60, warmup=40)
    data = chains.to_arviz(["a", "b", "c"])
    assert list(az.summary(data).index) == ["a", "b", "c"]
    assert data.posterior["b"].to_numpy() == pytest.approx(chains.draws[..., 1].numpy())
    assert data.sample_stats["lp"].to_numpy() == pytest.approx(chains.log_prob.numpy())
    assert data.sample_stats["energy"].shape == (4, 60)
    parts = chains.to_arviz({"first": 0, "rest": slice(1, 3), "pair": [0, 2], "scale": lambda x: x[..., 0].exp()})
    assert parts.posterior["rest"].shape == (4, 60, 2)
    assert parts.posterior["scale"].to_numpy() == pytest.approx(chains.draws[..., 0].exp().numpy())
    assert chains.to_arviz().posterior["x"].shape == (4, 60, 3)
    with pytest.raises(InvalidInput, match="2 names for draws"):
        chains.to_arviz(["a", "b"])


def test_many_short_chains_are_exported_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = to_arviz({"posterior": {"x": np.zeros((50, 10))}})
    assert data.posterior["x"].shape == (50, 10)


def test_the_export_speaks_the_interface_of_arviz_1(monkeypatch):
    """From 1.0, from_dict takes one mapping and InferenceData is only a signpost; R-hat and ESS work on arrays."""
    fake, stats = types.ModuleType("arviz"), types.ModuleType("arviz_stats.base")
    fake.from_dict = lambda data, **kwargs: data
    fake.__getattr__ = lambda name: dict
    calls = []

    class Arrays:
        def rhat(self, ary, chain_axis=-2, draw_axis=-1, method="rank"):
            calls.append((ary.shape, chain_axis, draw_axis, method))
            return np.ones(ary.shape[2:])

    stats.array_stats = Arrays()
    monkeypatch.setitem(sys.modules, "arviz", fake)
    monkeypatch.setitem(sys.modules, "arviz_stats.base", stats)
    data = to_arviz({"posterior": {"x": np.zeros((2, 5, 3))}, "observed_data": {"y": np.zeros(7)}})
    assert data["posterior"]["x"].shape == (2, 5, 3)
    assert rhat(np.zeros((2, 5, 3))).shape == (3,)
    assert calls == [((2, 5, 3), 0, 1, "rank")]


def test_arrays_of_one_group_begin_alike():
    with pytest.raises(InvalidInput, match="arrays of posterior"):
        to_arviz({"posterior": {"a": np.zeros((2, 5)), "b": np.zeros((2, 6))}})
    with pytest.raises(InvalidInput, match="arrays of posterior"):
        to_arviz({"posterior": {"a": np.zeros(5)}})


def test_running_variance_is_the_variance():
    x = 1e6 + torch.randn(30, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    running, dense = RunningVariance(), RunningVariance(dense=True)
    for row in x:
        running.update(row)
        dense.update(row)
    some = torch.tensor([True, False, True, True])
    assert torch.allclose(running.variance(), x.reshape(-1, 3).var(0, keepdim=True))
    assert torch.allclose(running.variance(chains=some), x[:, some].reshape(-1, 3).var(0, keepdim=True))
    assert torch.allclose(running.variance(pooled=False), x.var(0))
    assert torch.allclose(running.inverse_mass(pooled=False), 30 / 35 * x.var(0) + 5 / 35 * 1e-3)
    assert torch.allclose(dense.variance()[0], torch.cov(x.reshape(-1, 3).T))
    assert torch.allclose(dense.variance(pooled=False)[2], torch.cov(x[:, 2].T))
    assert torch.allclose(dense.inverse_mass()[0], (120 * torch.cov(x.reshape(-1, 3).T) + 5e-3 * torch.eye(3)) / 125)
    with pytest.raises(InvalidInput, match="at least two draws"):
        RunningVariance().variance()


@pytest.mark.parametrize("dense", [False, True])
def test_running_variance_takes_draws_in_blocks_and_resumes_within_one(dense):
    x = 3 + torch.randn(150, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, part, buffer = RunningVariance(dense), RunningVariance(dense), torch.empty(5, 2, dtype=torch.float64)
    for row in x:
        buffer.copy_(row)  # what is taken in may change afterwards
        whole.update(buffer)
    for row in x[:100]:
        part.update(row)
    again = RunningVariance(dense)
    again.load_state_dict(part.state_dict())
    for row in x[100:]:
        again.update(row)
    assert again.count == whole.count == 150
    assert torch.equal(again.variance(pooled=False), whole.variance(pooled=False))
    expected = torch.stack([torch.cov(chain.T) for chain in x.transpose(0, 1)])
    assert torch.allclose(whole.variance(pooled=False), expected if dense else expected.diagonal(dim1=1, dim2=2))
    assert torch.allclose(whole.diagonal().variance(), x.reshape(-1, 2).var(dim=0))


def test_the_first_mass_is_exact_for_a_gaussian_of_which_little_was_seen():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator) * torch.logspace(-1, 2, 6, dtype=torch.float64)
    covariance = root.T @ root
    x = torch.randn(20, 6, dtype=torch.float64, generator=generator)  # of unit scale, whatever the posterior's
    g = -torch.linalg.solve(covariance, x.T).T
    found = first_inverse_mass((x.T @ x)[None], (g.T @ g)[None], torch.ones(1, 6))[0]
    sd = covariance.diagonal().sqrt()
    assert torch.allclose(found / sd / sd[:, None], covariance / sd / sd[:, None], atol=1e-3)


def test_the_windows_of_a_thousand_iterations_are_those_that_stan_publishes():
    """Stan Reference Manual, HMC algorithm parameters: 75, then 25 to 500 doubling, then 50."""
    windows = mass_windows(1000)
    assert [(w.start, w.stop) for w in windows] == [(75, 100), (100, 150), (150, 250), (250, 450), (450, 950)]


def test_dual_averaging_follows_the_papers_recursion():
    """The published recursion written out with scalars."""
    rule, accepts = DualAveraging(torch.tensor([0.5], dtype=torch.float64), target=0.8), [0.3, 0.9, 1.0, 0.7, 0.2]
    mean_error, log_averaged = 0.0, 0.0
    for m, a in enumerate(accepts, 1):
        rule.update(torch.tensor([a], dtype=torch.float64))
        mean_error = (1 - 1 / (m + 10)) * mean_error + (0.8 - a) / (m + 10)
        log_step = np.log(10 * 0.5) - np.sqrt(m) / 0.05 * mean_error
        log_averaged = m**-0.75 * log_step + (1 - m**-0.75) * log_averaged
    assert float(rule.step_size) == pytest.approx(np.exp(log_step))
    assert float(rule.averaged) == pytest.approx(np.exp(log_averaged))


@pytest.mark.parametrize("warmup", [20, 21, 50, 300, 1000, 5000])
def test_windows_of_warm_up_follow_each_other(warmup):
    windows = mass_windows(warmup)
    assert all(len(w) >= 5 for w in windows)
    assert [w.stop for w in windows[:-1]] == [w.start for w in windows[1:]]
    assert windows[0].start >= 5
    assert warmup - windows[-1].stop >= 5


@pytest.mark.parametrize("draws", [0, 1, 5, 16, 37])
def test_a_stream_comes_back_from_its_tensors(draws):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 3, 2, dtype=torch.float64, generator=generator)
    stream = Streaming()
    for value in values[:draws]:
        stream.update(value)
    again = Streaming.from_tensors(stream.tensors())
    for value in values[draws:]:
        stream.update(value)
        again.update(value)
    assert again.count == stream.count == 60
    for quantity in ("mean", "variance", "rhat", "ess", "mcse", "mean_of_chains"):
        assert torch.equal(getattr(again, quantity)(), getattr(stream, quantity)())
    torch.testing.assert_close(stream.mean_of_chains(), values.mean(0))
