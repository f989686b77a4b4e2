"""Every method finds the posterior that is known: Bayesian linear regression in closed form."""

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer import hmc as infer_hmc
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import (
    HMC,
    MAP,
    MFVI,
    NUTS,
    SGHMC,
    SGLD,
    SWAG,
    BayesianNetwork,
    CyclicalSGHMC,
    Ensemble,
    GaussianLikelihood,
    GaussianPrior,
    Method,
    Posterior,
)

NOISE, VARIANCE = 0.5, 0.7
G = torch.Generator().manual_seed(0)
X = (
    torch.randn(30, 3, dtype=torch.float64, generator=G)
    @ torch.tensor([[1.0, 0.6, 0], [0, 1, 0], [0, 0, 0.5]]).double()
)
Y = X @ torch.tensor([1.0, -0.5, 0.3]).double() + 0.2 + NOISE * torch.randn(30, dtype=torch.float64, generator=G)
ONES = torch.cat([X, torch.ones(30, 1, dtype=torch.float64)], dim=1)


def exact(temperature=1.0):
    """Mean, covariance and precision of the weights and the bias."""
    precision = (ONES.T @ ONES / NOISE**2 + torch.eye(4, dtype=torch.float64) / VARIANCE) / temperature
    covariance = torch.linalg.inv(precision)
    return covariance @ (ONES.T @ Y) / NOISE**2 / temperature, covariance, precision


def linear(dtype=torch.float64):
    return BayesianNetwork(
        build(lambda: nn.Linear(3, 1).to(dtype), 0), GaussianLikelihood(NOISE), GaussianPrior(VARIANCE)
    )


def check(posterior, temperature=1.0, sd=0.1, mean=0.12):
    mu, covariance, _ = exact(temperature)
    draws = posterior.params.flatten(0, 1).double()
    spread = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mu) / spread).abs().max()) < mean
    torch.testing.assert_close(
        torch.cov(draws.T) / spread.outer(spread), covariance / spread.outer(spread), rtol=0, atol=2 * sd
    )
    torch.testing.assert_close(draws.std(0) / spread, torch.ones(4, dtype=torch.float64), rtol=0, atol=sd)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_hmc_finds_the_closed_form_at_any_temperature(temperature):
    posterior = linear().fit(X, Y, HMC(chains=16, draws=150, temperature=temperature), generator=1)
    check(posterior, temperature)
    assert 0.6 < posterior.accept_rate < 0.98
    assert posterior.info["backend"] == "mlp"
    assert posterior.info["trajectory_length"] == pytest.approx(math.pi / 2 * math.sqrt(VARIANCE * temperature))


def test_hmc_in_float32_with_a_step_size_given():
    method = HMC(chains=16, draws=150, step_size=0.06, jitter=0.3, warmup=10)
    check(linear(torch.float32).fit(X, Y, method, generator=2))


def test_nuts_finds_the_closed_form():
    check(linear().fit(X, Y, NUTS(chains=8, draws=200, warmup=150), generator=1))


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_stochastic_gradients_of_all_data_find_it_up_to_their_steps_bias(kind, temperature):
    h = 0.02 / float(torch.linalg.eigvalsh(exact()[2]).max()) * (10 if kind is SGLD else 1)
    method = kind(chains=64, draws=40, thin=25, burn_in=400, lr=h, temperature=temperature)
    check(linear().fit(X, Y, method, generator=3), temperature)


def test_temperature_does_not_depend_on_the_minibatch():
    """With batches the noise of gradients adds a little; a sum or mean mistaken for the other would be factors of 6."""
    h = 0.02 / float(torch.linalg.eigvalsh(exact()[2]).max())
    for size in (5, 10):
        method = SGLD(chains=64, draws=40, thin=50, burn_in=1000, lr=h, batch_size=size)
        check(linear().fit(X, Y, method), sd=0.2)


def test_cyclical_sampling_keeps_one_draw_per_cycle():
    posterior = linear().fit(X, Y, CyclicalSGHMC(chains=8, draws=5, cycle_length=60, lr=2e-4))
    assert posterior.params.shape == (8, 5, 4)
    mu, covariance, _ = exact()
    assert float(((posterior.params.mean((0, 1)) - mu) / covariance.diagonal().sqrt()).abs().max()) < 1


def test_mean_field_has_the_exact_mean_and_the_conditional_spread():
    posterior = linear().fit(X, Y, MFVI(draws=4000, steps=1500, lr=0.02, map_steps=300))
    mu, _, precision = exact()
    mean, sd = posterior.kept[0]
    torch.testing.assert_close(mean, mu, rtol=0, atol=0.02)
    torch.testing.assert_close(sd, precision.diagonal().rsqrt(), rtol=0.05, atol=0)
    torch.testing.assert_close(posterior.params[0].std(0), sd, rtol=0.06, atol=0)


def test_the_optimum_is_the_posterior_mean_and_members_agree_where_there_is_one_mode():
    for optimizer, lr in (("adam", 0.05), ("sgd", 1e-3)):
        posterior = linear().fit(X, Y, Ensemble(members=3, steps=600, lr=lr, optimizer=optimizer))
        assert posterior.params.shape == (3, 1, 4)
        torch.testing.assert_close(posterior.params[:, 0], exact()[0].expand(3, -1), rtol=0, atol=1e-3)
    assert linear().fit(X, Y, MAP(steps=5)).params.shape == (1, 1, 4)


def test_swag_lies_around_the_optimum():
    posterior = linear().fit(X, Y, SWAG(members=2, draws=20, batch_size=10, steps=300, collect=30, every=5))
    assert posterior.params.shape == (2, 20, 4)
    mu, covariance, _ = exact()
    assert float(((posterior.params.mean((0, 1)) - mu) / covariance.diagonal().sqrt()).abs().max()) < 1


NET = build(lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)), 0)
XC = torch.randn(40, 2, generator=torch.Generator().manual_seed(5))
YC = (XC.prod(1) > 0).long()


def classifier(variance=1.0):
    return BayesianNetwork(NET, prior=GaussianPrior(variance))


def test_the_same_seed_gives_the_same_numbers_and_the_global_state_is_left_alone():
    state = torch.get_rng_state()
    for method in (
        HMC(draws=4, warmup=10, burn_in=3),
        SGHMC(draws=3, burn_in=5, batch_size=10),
        Ensemble(members=2, steps=10, batch_size=7),
        MFVI(draws=2, steps=10, map_steps=5),
        SWAG(draws=2, steps=5, collect=3, every=2),
    ):
        a, b, c = (classifier().fit(XC, YC, method, generator=seed).params for seed in (7, 7, 8))
        assert torch.equal(a, b), method
        assert not torch.equal(a, c), method
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rejected_step_repeats_the_old_state_in_the_average():
    posterior = classifier().fit(XC, YC, HMC(draws=60, burn_in=20, warmup=0, step_size=0.15))
    same = (posterior.params[:, 1:] == posterior.params[:, :-1]).all(-1)
    share = float(same.double().mean())
    assert 0.1 < share < 0.95
    assert share == pytest.approx(1 - posterior.accept_rate, abs=0.12)
    # and a repeated state has the same density, energy aside
    lp = posterior.sample_stats["lp"]
    assert torch.equal(lp[:, 1:][same], lp[:, :-1][same])


def test_burn_in_has_no_metropolis_test():
    """At a step size where nearly all proposals are rejected, the chain leaves its start in burn-in, and only there."""
    step, start = 0.9, classifier().initial(3)
    methods = [HMC(burn_in=n, warmup=0, step_size=step, draws=1, chains=3) for n in (0, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stays, moved = (classifier().fit(XC, YC, method, init=start, generator=1) for method in methods)
    assert float(stays.sample_stats["accept_prob"].max()) < 0.5
    assert not bool((moved.params[:, 0] == start).all(-1).any())


def test_hardly_any_acceptance_warns_with_a_step_size_that_works():
    model = classifier(0.1)
    with pytest.warns(
        UserWarning, match=r"proposal.*at step size 1.5, .*; the curvature here.*give step_size="
    ) as caught:
        model.fit(XC, YC, HMC(draws=10, burn_in=0, warmup=0, step_size=1.5, trajectory_length=15.0, chains=2))
    (advice,) = caught
    suggested = float(str(advice.message).split("step_size=")[1].split(" ")[0])
    assert Path(advice.filename).name == "test_fitting.py"
    assert model.fit(XC, YC, HMC(draws=10, warmup=0, step_size=suggested, chains=2)).accept_rate > 0.5


def test_streamed_predictions_are_those_of_stored_draws():
    method = HMC(draws=25, burn_in=5, warmup=15, chains=3)
    stored = classifier().fit(XC, YC, method, generator=4)
    streamed = classifier().fit(XC, YC, replace(method, store="predictions", at=XC[:9]), generator=4)
    assert streamed.params is None
    torch.testing.assert_close(streamed.predict_proba(), stored.predict_proba(XC[:9]), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(streamed.predict_proba(XC[:9]), streamed.predict_proba())
    assert streamed.function_rhat().shape == streamed.function_ess().shape == (9, 2)
    assert streamed.chains == 3
    with pytest.raises(InvalidInput, match="only the predictions at the inputs given as at="):
        streamed.predict_proba(XC)
    with pytest.raises(InvalidInput, match="were not stored"):
        streamed.predict_draws(XC)
    both = classifier().fit(XC, YC, replace(method, at=XC[:9]), generator=4)
    assert both.params is not None
    torch.testing.assert_close(both.stream.proba, streamed.predict_proba())


def test_streamed_moments_are_those_of_stored_draws():
    method = HMC(draws=12, burn_in=2, warmup=12, chains=3)
    stored, streamed = linear().fit(X, Y, method), linear().fit(X, Y, replace(method, store="predictions", at=X))
    for a, b in zip(stored.predict_moments(X), streamed.predict_moments(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_function_keeps_what_it_returns():
    norms = classifier().fit(XC, YC, HMC(draws=4, burn_in=2, warmup=10, store=lambda q: q.norm(dim=1)))
    assert norms.params is None
    assert norms.kept.shape == (4, 4)
    nothing = classifier().fit(XC, YC, HMC(draws=4, burn_in=2, warmup=10, store=lambda q: None))
    assert nothing.kept is None


def test_progress_counts_every_iteration():
    seen = []
    method = HMC(draws=3, burn_in=2, warmup=10, thin=2)
    classifier().fit(XC, YC, method, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 18) for i in range(1, 19)]


def test_augmentation_is_named_for_what_it_is():
    with pytest.warns(UserWarning, match="no longer a product over the data") as caught:
        classifier().fit(XC, YC, SGLD(draws=2, thin=2, burn_in=2, transform=lambda x: x.flip(0)))
    assert Path(caught[0].filename).name == "test_fitting.py"


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (HMC, {"temperature": 0.0}, "temperature must be a finite number above 0, not 0.0"),
        (HMC, {"temperature": -1.0}, "temperature .* not -1.0"),
        (HMC, {"step_size": -0.1}, "step_size .* not -0.1"),
        (HMC, {"step_size": math.nan}, "step_size .* not nan"),
        (HMC, {"warmup": 3}, "too short to adapt"),
        (HMC, {"draws": 0}, "draws must be a whole number of at least 1, not 0"),
        (HMC, {"draws": 2.5}, "draws .* not 2.5"),
        (HMC, {"chains": 0}, "chains .* not 0"),
        (HMC, {"jitter": 1.0}, "jitter .* not 1.0"),
        (HMC, {"target_accept": 1.0}, "target_accept .* not 1.0"),
        (HMC, {"trajectory_length": 0.0}, "trajectory_length .* not 0.0"),
        (HMC, {"trajectory_length": "priro"}, "trajectory_length .* not 'priro'"),
        (SGLD, {"lr": 0.0}, "lr .* not 0.0"),
        (SGLD, {"batch_size": 0}, "batch_size .* not 0"),
        (SGLD, {"rmsprop": 2.0}, "rmsprop .* not 2.0"),
        (SGHMC, {"momentum": 1.0}, "momentum .* not 1.0"),
        (CyclicalSGHMC, {"exploration": 1.0}, "exploration .* not 1.0"),
        (Ensemble, {"members": 0}, "members .* not 0"),
        (MAP, {"steps": 0}, "steps .* not 0"),
        (SWAG, {"collect": 1}, "collect .* at least 2, not 1"),
        (NUTS, {"draws": 0}, "draws .* not 0"),
    ],
)
def test_settings_out_of_range_are_refused_when_a_method_is_made(kind, settings, says):
    with pytest.raises(InvalidInput, match=says):
        kind(**settings)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (HMC(step_size=1e-9, burn_in=1), "takes .* steps of 1e-09"),
        (HMC(step_size=1e-9, burn_in=0), "takes .* steps of 1e-09"),
        (HMC(store="predictions"), "give them as at="),
        (SGLD(lr=1e9, draws=300, thin=1), "ceased to be finite"),
        (Ensemble(lr=1e30, optimizer="sgd"), "training diverged"),
        (MFVI(elbo_draws=3), "draws=3"),
        ("hmc", r"method is 'hmc'; pass an object with its settings, such as HMC\(chains=4, draws=100\)\.$"),
        (NUTS, r"method is the class NUTS; pass an object with its settings, such as NUTS\(\)\.$"),
        (nn.Linear, "method is the class Linear; pass an object .* such as HMC"),
    ],
)
def test_what_cannot_work_is_refused(method, says):
    with pytest.raises(InvalidInput, match=says):
        classifier().fit(XC, YC, method)


def test_starts_that_are_not_finite_are_refused():
    with pytest.raises(InvalidInput, match="init is not finite"):
        classifier().fit(XC, YC, HMC(), init=torch.full((4, 32), torch.inf))


def test_unknown_words_are_refused():
    for kind, settings in ((HMC, {"store": "weights"}), (MAP, {"optimizer": "lbfgs"}), (NUTS, {"mass": "full"})):
        with pytest.raises(UnknownName, match="must be one of"):
            kind(**settings)


def test_settings_are_kept_in_the_type_that_is_wanted_and_recorded():
    method = HMC(chains=np.int64(2), draws=3, warmup=10, burn_in=2, step_size=np.float32(0.0625))
    assert type(method.chains) is int
    info = classifier().fit(XC, YC, method, generator=5).info
    assert (info["chains"], info["draws"], info["step_size"], info["generator"]) == (2, 3, 0.0625, 5)
    with pytest.raises(AttributeError):
        method.draws = 4


def test_a_method_of_ones_own():
    @dataclass(frozen=True)
    class Start(Method):
        name = "start"
        draws: int = 1

        def run(self, target):
            return target.posterior(self, target.starts(self.draws)[None], {"seen": target.density.num_data})

    posterior = classifier().fit(XC, YC, Start(3), init="module")
    assert isinstance(posterior, Posterior)
    assert posterior.params.shape == (1, 3, 32)
    assert posterior.info["seen"] == 40
    assert posterior.predict_proba(XC).shape == (40, 2)


def test_the_density_serves_the_samplers_of_infer_as_it_is():
    model = linear()
    chains = infer_hmc.sample(model.log_density(X, Y), model.initial(32), draws=150, warmup=100, generator=0)
    mu, covariance, _ = exact()
    draws = chains.draws.flatten(0, 1)
    torch.testing.assert_close(draws.mean(0), mu, rtol=0, atol=0.02)
    torch.testing.assert_close(draws.std(0), covariance.diagonal().sqrt(), rtol=0.1, atol=0)
