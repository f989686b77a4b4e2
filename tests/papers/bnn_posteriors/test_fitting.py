"""Every method finds the posterior that is known: Bayesian linear regression in closed form."""

import math
import warnings

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer import hmc as infer_hmc
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import BayesianModule, GaussianLikelihood, GaussianPrior
from mlcollage.papers.bnn_posteriors.training import sgmcmc

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
    return BayesianModule(
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
    posterior = linear().fit(X, Y, chains=16, samples=150, temperature=temperature, seed=1).posterior
    check(posterior, temperature)
    assert 0.6 < posterior.accept_rate < 0.98
    assert posterior.info["path"] == "mlp"
    assert posterior.info["trajectory_length"] == pytest.approx(math.pi / 2 * math.sqrt(VARIANCE * temperature))


def test_hmc_in_float32_with_a_step_size_given():
    check(
        linear(torch.float32).fit(X, Y, chains=16, samples=150, step_size=0.06, jitter=0.3, warmup=10, seed=2).posterior
    )


def test_nuts_finds_the_closed_form():
    check(linear().fit(X, Y, "nuts", chains=8, samples=200, warmup=150, seed=1).posterior)


@pytest.mark.parametrize("kind", ["sgld", "sghmc"])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_stochastic_gradients_of_all_data_find_it_up_to_their_steps_bias(kind, temperature):
    h = 0.02 / float(torch.linalg.eigvalsh(exact()[2]).max()) * (10 if kind == "sgld" else 1)
    settings = {"chains": 64, "samples": 40, "thin": 25, "burn_in": 400, "lr": h, "temperature": temperature, "seed": 3}
    check(linear().fit(X, Y, kind, **settings).posterior, temperature)


def test_temperature_does_not_depend_on_the_minibatch():
    """With batches the noise of gradients adds a little; a sum or mean mistaken for the other would be factors of 6."""
    h = 0.02 / float(torch.linalg.eigvalsh(exact()[2]).max())
    for size in (5, 10):
        posterior = (
            linear().fit(X, Y, "sgld", chains=64, samples=40, thin=50, burn_in=1000, lr=h, batch_size=size).posterior
        )
        check(posterior, sd=0.2)


def test_cyclical_sampling_keeps_one_draw_a_cycle():
    posterior = linear().fit(X, Y, "csghmc", chains=8, samples=5, cycle_length=60, lr=2e-4).posterior
    assert posterior.params.shape == (8, 5, 4)
    mu, covariance, _ = exact()
    assert float(((posterior.params.mean((0, 1)) - mu) / covariance.diagonal().sqrt()).abs().max()) < 1


def test_mean_field_has_the_exact_mean_and_the_conditional_spread():
    posterior = linear().fit(X, Y, "mfvi", samples=4000, steps=1500, lr=0.02, map_steps=300, seed=0).posterior
    mu, _, precision = exact()
    mean, sd = posterior.kept[0]
    torch.testing.assert_close(mean, mu, rtol=0, atol=0.02)
    torch.testing.assert_close(sd, precision.diagonal().rsqrt(), rtol=0.05, atol=0)
    torch.testing.assert_close(posterior.params[0].std(0), sd, rtol=0.06, atol=0)


def test_the_optimum_is_the_posterior_mean_and_members_agree_where_there_is_one_mode():
    for optimizer, lr in (("adam", 0.05), ("sgd", 1e-3)):
        posterior = linear().fit(X, Y, "ensemble", members=3, steps=600, lr=lr, optimizer=optimizer).posterior
        assert posterior.params.shape == (3, 1, 4)
        torch.testing.assert_close(posterior.params[:, 0], exact()[0].expand(3, -1), rtol=0, atol=1e-3)
    assert linear().fit(X, Y, "map", steps=5).posterior.params.shape == (1, 1, 4)


def test_swag_lies_around_the_optimum():
    posterior = (
        linear().fit(X, Y, "swag", members=2, samples=20, batch_size=10, steps=300, collect=30, every=5).posterior
    )
    assert posterior.params.shape == (2, 20, 4)
    mu, covariance, _ = exact()
    assert float(((posterior.params.mean((0, 1)) - mu) / covariance.diagonal().sqrt()).abs().max()) < 1


NET = build(lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)), 0)
XC = torch.randn(40, 2, generator=torch.Generator().manual_seed(5))
YC = (XC.prod(1) > 0).long()


def classifier(variance=1.0):
    return BayesianModule(NET, prior=GaussianPrior(variance))


def test_the_same_seed_gives_the_same_numbers_and_the_global_state_is_left_alone():
    state = torch.get_rng_state()
    for method, settings in (
        ("hmc", {"samples": 4, "warmup": 10, "burn_in": 3}),
        ("sghmc", {"samples": 3, "burn_in": 5, "batch_size": 10}),
        ("ensemble", {"members": 2, "steps": 10, "batch_size": 7}),
        ("mfvi", {"samples": 2, "steps": 10, "map_steps": 5}),
        ("swag", {"samples": 2, "steps": 5, "collect": 3, "every": 2}),
    ):
        a, b, c = (classifier().fit(XC, YC, method, seed=s, **settings).posterior.params for s in (7, 7, 8))
        assert torch.equal(a, b), method
        assert not torch.equal(a, c), method
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rejected_step_repeats_the_old_state_in_the_average():
    posterior = classifier().fit(XC, YC, samples=60, burn_in=20, warmup=0, step_size=0.15, chains=4, seed=0).posterior
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
    kept = {"warmup": 0, "step_size": step, "samples": 1, "chains": 3, "init": start, "store": "params"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stays = classifier().fit(XC, YC, burn_in=0, seed=1, **kept).posterior
        moved = classifier().fit(XC, YC, burn_in=4, seed=1, **kept).posterior
    assert float(stays.sample_stats["accept_prob"].max()) < 0.5
    assert not bool((moved.params[:, 0] == start).all(-1).any())


def test_hardly_any_acceptance_warns_with_a_step_size_that_works():
    model = classifier(0.1)
    with pytest.warns(UserWarning, match=r"proposal.*at step size 1.5; the curvature here.*give step_size=") as caught:
        model.fit(XC, YC, samples=10, burn_in=0, warmup=0, step_size=1.5, trajectory_length=15.0, chains=2)
    suggested = float(str(caught[0].message).split("step_size=")[1].split(" ")[0])
    assert (
        model.fit(XC, YC, samples=10, burn_in=10, warmup=0, step_size=suggested, chains=2).posterior.accept_rate > 0.5
    )


def test_streamed_predictions_are_those_of_stored_draws():
    settings = {"samples": 25, "burn_in": 5, "warmup": 15, "chains": 3, "seed": 4}
    stored = classifier().fit(XC, YC, **settings)
    streamed = classifier().fit(XC, YC, store="predictions", at=XC[:9], **settings)
    assert streamed.posterior.params is None
    torch.testing.assert_close(streamed.predict_proba(), stored.predict_proba(XC[:9]), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(streamed.predict_proba(XC[:9]), streamed.predict_proba())
    assert streamed.function_rhat().shape == streamed.function_ess().shape == (9, 2)
    assert streamed.posterior.chains == 3
    with pytest.raises(InvalidInput, match="only the predictions at the inputs given as at="):
        streamed.predict_proba(XC)
    with pytest.raises(InvalidInput, match="were not stored"):
        streamed.predict_samples(XC)
    both = classifier().fit(XC, YC, at=XC[:9], **settings).posterior
    assert both.params is not None
    torch.testing.assert_close(both.stream.proba, streamed.predict_proba())


def test_streamed_moments_are_those_of_stored_draws():
    settings = {"samples": 12, "burn_in": 2, "warmup": 12, "chains": 3}
    stored, streamed = linear().fit(X, Y, **settings), linear().fit(X, Y, store="predictions", at=X, **settings)
    for a, b in zip(stored.predict_moments(X), streamed.predict_moments(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_function_keeps_what_it_returns():
    norms = classifier().fit(XC, YC, samples=4, burn_in=2, warmup=10, store=lambda q: q.norm(dim=1)).posterior
    assert norms.params is None
    assert norms.kept.shape == (4, 4)
    nothing = classifier().fit(XC, YC, samples=4, burn_in=2, warmup=10, store=lambda q: None).posterior
    assert nothing.kept is None


def test_progress_counts_every_iteration():
    seen = []
    classifier().fit(
        XC, YC, samples=3, burn_in=2, warmup=10, thin=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 18) for i in range(1, 19)]


def test_augmentation_is_named_for_what_it_is():
    with pytest.warns(UserWarning, match="no longer a product over the data"):
        classifier().fit(XC, YC, "sgld", samples=2, thin=2, burn_in=2, transform=lambda x: x.flip(0))


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("hmc", {"temperature": 0.0}, "temperature=0.0"),
        ("hmc", {"temperature": -1.0}, "temperature=-1.0"),
        ("hmc", {"step_size": -0.1}, "step_size=-0.1"),
        ("hmc", {"step_size": math.nan}, "step_size=nan"),
        ("hmc", {"warmup": 3}, "too short to adapt"),
        ("hmc", {"samples": 0}, "samples=0"),
        ("hmc", {"chains": 0}, "chains=0"),
        ("hmc", {"trajectory_length": 0.0}, "trajectory_length=0.0"),
        ("hmc", {"step_size": 1e-9, "burn_in": 1}, "takes .* steps of 1e-09"),
        ("hmc", {"step_size": 1e-9, "burn_in": 0}, "takes .* steps of 1e-09"),
        ("hmc", {"store": "predictions"}, "give them as at="),
        ("hmc", {"init": torch.full((4, 32), torch.inf)}, "init is not finite"),
        ("sgld", {"lr": 0.0}, "lr=0.0"),
        ("sgld", {"lr": 1e9, "samples": 300, "thin": 1}, "ceased to be finite"),
        ("sgld", {"batch_size": 0}, "batch_size=0"),
        ("sghmc", {"momentum": 1.0}, "momentum=1.0"),
        ("ensemble", {"members": 0}, "members=0"),
        ("ensemble", {"lr": 1e30, "optimizer": "sgd"}, "training diverged"),
        ("map", {"steps": 0}, "steps=0"),
        ("swag", {"collect": 1}, "collect=1"),
        ("mfvi", {"draws": 3}, "draws=3"),
        ("nuts", {"samples": 0}, "samples=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(method, settings, says):
    with pytest.raises(InvalidInput, match=says):
        classifier().fit(XC, YC, method, **settings)


def test_unknown_names_are_refused():
    for method, settings in (("hmc", {"store": "weights"}), ("map", {"optimizer": "lbfgs"})):
        with pytest.raises(UnknownName, match="is not known"):
            classifier().fit(XC, YC, method, **settings)
    with pytest.raises(UnknownName, match="kind='sgnht'"):
        sgmcmc(classifier(), XC, YC, kind="sgnht")


def test_the_density_serves_the_samplers_of_infer_as_it_is():
    model = linear()
    chains = infer_hmc.sample(model.log_density(X, Y), model.initial(32), draws=150, warmup=100, generator=0)
    mu, covariance, _ = exact()
    draws = chains.draws.flatten(0, 1)
    torch.testing.assert_close(draws.mean(0), mu, rtol=0, atol=0.02)
    torch.testing.assert_close(draws.std(0), covariance.diagonal().sqrt(), rtol=0.1, atol=0)
