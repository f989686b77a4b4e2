"""HMC: exact where the answer is known, honest about rejections, one computation for all chains."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.infer import adaptation, hmc, nuts
from mlcollage.infer.density import LogDensity
from mlcollage.infer.diagnostics import Streaming, ess, rhat
from mlcollage.infer.health import split_rhat
from mlcollage.stats.horseshoe import HorseshoePrior


def normal(x):
    return -0.5 * x.square().sum(dim=1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(chains, dim, seed=1, scale=1.0):
    return scale * torch.randn(chains, dim, dtype=torch.float64, generator=rng(seed))


def distance_in_mcse(draws, known):
    """How many Monte-Carlo standard errors means and standard deviations are off."""
    x = known.quantities(draws)
    mean = (x.mean((0, 1)).numpy() - known.mean) / (known.sd / np.sqrt(ess(x, "mean")))
    # the squared deviation has its own standard error
    square = (x - torch.from_numpy(known.mean)).square()
    error = square.std((0, 1)).numpy() / np.sqrt(ess(square, "mean"))
    return np.abs(mean), np.abs((square.mean((0, 1)).numpy() - known.sd**2) / error)


def test_a_conjugate_posterior_is_met_in_mean_and_variance(regression):
    chains = hmc.sample(regression.log_prob, spread(32, 3), draws=400, warmup=200, generator=3)
    mean, variance = distance_in_mcse(chains.draws, regression)
    assert mean.max() < 3.5
    assert variance.max() < 3.5
    assert rhat(chains.draws).max() < 1.01
    learned = torch.linalg.inv(chains.mass[0]).diagonal().numpy()  # dense, as there are draws enough for it
    assert np.allclose(learned, regression.sd**2, rtol=0.3)


def test_eight_schools_agrees_with_quadrature(eight_schools):
    chains = hmc.sample(eight_schools.log_prob, spread(64, 10, scale=0.5), draws=500, warmup=300, generator=5)
    mean, variance = distance_in_mcse(chains.draws, eight_schools)
    assert mean.max() < 3.5
    assert variance[0] < 3.5
    assert variance[2:].max() < 3.5  # tau's fourth moment is not finite
    assert rhat(eight_schools.quantities(chains.draws)).max() < 1.01
    assert ess(chains.draws).min() > 5000


def test_a_horseshoe_keeps_large_effects_and_shrinks_the_rest():
    x = spread(60, 8, seed=3)
    beta = torch.tensor([3.0, -2.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    y = x @ beta + torch.randn(60, dtype=torch.float64, generator=rng(4))
    prior = HorseshoePrior(dim=8, scale=0.1, slab=5.0)

    def log_prob(theta):
        return prior.log_prob(theta) - 0.5 * (y - prior.coefficients(theta) @ x.T).square().sum(1)

    start = prior.sample(32, generator=rng(5)).clamp(-2, 2).double()
    chains = hmc.sample(log_prob, start, draws=200, warmup=300, steps=(5, 15), target_accept=0.9)
    coefficients = prior.coefficients(chains.draws.reshape(-1, 17)).reshape(32, 200, 8)
    assert rhat(coefficients).max() < 1.1  # heavy tails: slow, but mixing
    mean, least_squares = coefficients.mean((0, 1)), torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    assert torch.allclose(mean[:2], beta[:2], atol=0.4)
    assert bool((mean[2:].abs() < 0.6 * least_squares[2:].abs() + 0.02).all())


def test_leapfrog_is_reversible(eight_schools):
    density = LogDensity(eight_schools.log_prob)
    begin = hmc.init(spread(16, 10), density)
    p0 = spread(16, 10, seed=2)
    end, p = hmc.leapfrog(begin, p0, density, step_size=0.1, steps=20)
    back, p = hmc.leapfrog(end, -p, density, step_size=0.1, steps=20)
    assert not torch.allclose(end.position, begin.position, atol=0.1)
    assert torch.allclose(back.position, begin.position, atol=1e-9)
    assert torch.allclose(-p, p0, atol=1e-9)


def test_leapfrog_preserves_volume():
    def quartic(x):
        return -0.25 * x.pow(4).sum(1) - 0.5 * (x[:, 0] * x[:, 1]).square(), torch.stack(
            [-(x[:, 0] ** 3) - x[:, 0] * x[:, 1] ** 2, -(x[:, 1] ** 3) - x[:, 1] * x[:, 0] ** 2], 1
        )

    def flow(z):
        end, p = hmc.leapfrog(hmc.init(z[None, :2], quartic), z[None, 2:], quartic, step_size=0.3, steps=4)
        return torch.cat([end.position[0], p[0]])

    z, h = torch.tensor([0.7, -0.4, 0.5, 1.1], dtype=torch.float64), 1e-5
    jacobian = torch.stack([(flow(z + h * e) - flow(z - h * e)) / (2 * h) for e in torch.eye(4).double()], dim=1)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-7)
    assert not torch.allclose(jacobian, torch.eye(4).double(), atol=0.1)


def test_energy_error_is_of_second_order(eight_schools):
    density = LogDensity(eight_schools.log_prob)
    begin, p0 = hmc.init(spread(64, 10, scale=0.5), density), spread(64, 10, seed=2)

    def error(eps):
        end, p = hmc.leapfrog(begin, p0, density, step_size=eps, steps=round(0.8 / eps))
        return (0.5 * (p**2 - p0**2).sum(1) - end.log_prob + begin.log_prob).abs().mean()

    ratios = [float(error(eps) / error(eps / 2)) for eps in (0.1, 0.05, 0.025)]
    assert ratios == pytest.approx([4, 4, 4], rel=0.1)
    assert ratios[2] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("metropolis", [True, False])
def test_leapfrog_without_metropolis_has_the_bias_that_theory_says(metropolis):
    """On N(0, 1) leapfrog conserves q^2 (1 - eps^2/4) + p^2, so unadjusted draws have variance 1 / (1 - eps^2/4)."""
    kernel = hmc.build(normal, step_size=1.0, steps=2, metropolis=metropolis)
    state, generator = kernel.init(spread(20_000, 1)), rng(5)
    total = 0.0
    for i in range(60):
        state, info = kernel.update(state, generator)
        total += float(state.position.var()) if i >= 20 else 0.0
    assert total / 40 == pytest.approx(1.0 if metropolis else 4 / 3, abs=0.02)
    assert bool(info.accepted.all()) != metropolis


def test_the_target_is_invariant_under_an_update():
    """Chains that begin as exact draws stay exact draws, at a step size with many rejections."""
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    kernel = hmc.build(lambda x: -0.5 * (x / scale).square().sum(1), step_size=0.9, steps=3)
    state, generator = kernel.init(spread(20_000, 2) * scale), rng(6)
    for _ in range(3):
        state, info = kernel.update(state, generator)
    assert 0.5 < info.accept.mean() < 0.95
    for i in range(2):
        assert sps.kstest((state.position[:, i] / scale[i]).numpy(), "norm").pvalue > 0.01


def test_a_rejected_step_repeats_the_old_state():
    kernel = hmc.build(normal, step_size=1.2, steps=3)
    state, generator = kernel.init(spread(500, 20)), rng()
    new, info = kernel.update(state, generator)
    stay = ~info.accepted
    assert 0 < stay.sum() < 500
    assert torch.equal(new.position[stay], state.position[stay])
    assert torch.equal(new.log_prob[stay], state.log_prob[stay])
    assert torch.equal(new.gradient[stay], state.gradient[stay])
    assert (new.position[info.accepted] != state.position[info.accepted]).all()
    fresh = kernel.init(new.position)
    assert torch.allclose(fresh.log_prob, new.log_prob)
    assert torch.allclose(fresh.gradient, new.gradient)


def test_rejected_draws_are_kept_as_draws():
    chains = hmc.sample(normal, spread(50, 20), draws=40, warmup=0, step_size=1.2, steps=3, mass=None)
    repeated = (chains.draws[:, 1:] == chains.draws[:, :-1]).all(dim=2)
    assert chains.draws.shape == (50, 40, 20)
    assert 0.05 < repeated.double().mean() < 0.95
    assert torch.equal(chains.log_prob, normal(chains.draws.reshape(-1, 20)).reshape(50, 40))


def test_a_step_into_no_density_is_rejected_even_without_metropolis():
    def half_line(x):
        return torch.where(x[:, 0] > 0, -x[:, 0], torch.full_like(x[:, 0], float("nan")))

    kernel = hmc.build(half_line, step_size=1.0, steps=3, metropolis=False)
    state, generator = kernel.init(spread(200, 1).abs()), rng()
    new, info = kernel.update(state, generator)
    assert bool((new.position > 0).all())
    assert bool(info.diverging.any())
    assert torch.equal(info.diverging, ~info.accepted)
    assert bool((info.accept[info.diverging] == 0).all())


def test_by_hand_and_by_autograd_give_the_same_chains(eight_schools):
    def by_autograd(x):
        return eight_schools.log_prob(x)[0]

    settings = {"draws": 20, "warmup": 0, "step_size": 0.3, "mass": None, "generator": 7}
    a = hmc.sample(eight_schools.log_prob, spread(8, 10), **settings)
    b = hmc.sample(by_autograd, spread(8, 10), **settings)
    assert torch.allclose(a.draws, b.draws, atol=1e-9)
    assert torch.equal(a.steps, b.steps)


def test_chains_are_one_batch_and_do_not_see_each_other():
    calls = []

    def counted(x):
        calls.append(x.shape)
        return normal(x)

    kernel = hmc.build(counted, step_size=0.3, steps=5)
    state = kernel.init(spread(100, 2))
    calls.clear()
    kernel.update(state, rng())
    assert calls == [(100, 2)] * 5  # a gradient a step, whatever the number of chains


def test_temperature_widens_by_its_root():
    for temperature in (0.1, 4.0):
        chains = hmc.sample(normal, spread(64, 2), draws=300, warmup=100, temperature=temperature, generator=1)
        assert float(chains.draws.var()) == pytest.approx(temperature, rel=0.05)
        assert float(chains.log_prob.mean()) == pytest.approx(-temperature, rel=0.05)  # untempered


def test_a_quarter_of_the_priors_period_forgets_the_start():
    scale = 0.3
    length = hmc.prior_period(scale)
    chains = hmc.sample(
        lambda x: normal(x / scale),
        spread(64, 5, scale=scale),
        draws=200,
        warmup=0,
        trajectory=length,
        step_size=0.02,
        mass=None,
    )
    assert int(chains.steps[0, 0]) == math.ceil(length / 0.02)
    x = chains.draws - chains.draws.mean((0, 1))
    assert abs(float((x[:, 1:] * x[:, :-1]).mean() / x.square().mean())) < 0.03
    tempered = hmc.prior_period(scale, 0.25)
    assert tempered == pytest.approx(length / 2)


@pytest.mark.parametrize("target", [0.65, 0.8, 0.95])
def test_adaptation_meets_the_acceptance_asked_for(target, eight_schools):
    chains = hmc.sample(
        eight_schools.log_prob, spread(32, 10, scale=0.5), draws=150, warmup=300, target_accept=target, generator=2
    )
    # the last interval is 50 iterations, as in Stan; near the limit of stability their average errs to the safe side
    assert target - 0.1 < float(chains.accept.mean()) < target + 0.2
    assert chains.step_size.shape == (1,)


def test_unpooled_chains_learn_each_for_their_own_density():
    scale = torch.logspace(-3, 3, 60, dtype=torch.float64)[:, None]
    settings = {"draws": 300, "warmup": 300, "pooled": False, "generator": 3}
    plain = hmc.sample(lambda x: normal(x / scale), spread(60, 4) * scale, mass=None, **settings)
    relative = plain.step_size / scale[:, 0]
    assert relative.max() / relative.min() < 2.5
    assert torch.allclose(plain.draws.std((1, 2)) / scale[:, 0], torch.ones(60).double(), atol=0.2)
    learned = hmc.sample(lambda x: normal(x / scale[30:]), spread(30, 4) * scale[30:], **settings)
    # variances of one chain's 150 correlated draws each: their logarithms have a standard deviation of 0.25
    assert (learned.mass * scale[30:].square()).log().abs().max() < 1.25
    assert torch.allclose(learned.draws.std((1, 2)) / scale[30:, 0], torch.ones(30).double(), atol=0.2)


def test_burn_in_without_metropolis_moves_where_metropolis_would_stay():
    """At this step size most proposals are refused, but none of them runs away: the leapfrog is stable up to 2."""
    settings = {"draws": 1, "warmup": 1, "step_size": 1.8, "steps": 2, "mass": None}
    start = spread(200, 20)
    with pytest.warns(UserWarning, match="hardly moved"):
        adjusted = hmc.sample(normal, start, **settings)
    free = hmc.sample(normal, start, metropolis_burn_in=False, **settings)
    assert (adjusted.draws[:, 0] == start).all(1).double().mean() > 0.5
    assert not bool((free.draws[:, 0] == start).all(1).any())


def test_same_seed_same_numbers_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = (hmc.sample(normal, spread(4, 2), draws=10, warmup=20, jitter=0.3, generator=s) for s in (1, 1, 2))
    assert torch.equal(a.draws, b.draws)
    assert not torch.equal(a.draws, c.draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_energies_keep_their_digits_in_float32():
    """Positions in float32, a log-density of size 1e8 in float64: the error is that of the small part."""

    def large(x):
        return 1e8 + normal(x).double()

    kernel = hmc.build(large, step_size=0.05, steps=10)
    _, info = kernel.update(kernel.init(spread(200, 50).float()), rng())
    assert info.error.abs().max() < 0.05
    assert info.accept.min() > 0.9


def test_thinning_store_and_progress():
    seen = []
    chains = hmc.sample(
        normal,
        spread(6, 3),
        draws=5,
        warmup=20,
        thin=4,
        steps=2,
        store=lambda x: x.square().sum(1),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert chains.draws.shape == (6, 5)
    assert torch.equal(chains.steps, torch.full((6, 5), 8))
    assert torch.allclose(chains.draws, -2 * chains.log_prob)
    assert seen == [(i, 40) for i in range(1, 41)]
    assert chains.accept_rate.shape == (6,)


def test_draws_can_be_streamed_instead_of_stored():
    stream, settings = Streaming(), {"draws": 64, "warmup": 50, "generator": 3}
    chains = hmc.sample(normal, spread(6, 3), store=stream.update, **settings)
    stored = hmc.sample(normal, spread(6, 3), **settings)
    assert chains.draws.shape == (6, 0)
    assert torch.equal(chains.log_prob, stored.log_prob)
    assert torch.allclose(stream.mean(), stored.draws.mean((0, 1)))
    assert stream.rhat().numpy() == pytest.approx(rhat(stored.draws, "split"))


def test_a_run_continues_where_it_ended():
    first = hmc.sample(normal, spread(4, 2), draws=5, warmup=50)
    more = hmc.sample(
        normal, first.state.position, draws=5, warmup=0, step_size=first.step_size, mass=first.mass, generator=1
    )
    assert torch.equal(more.step_size, first.step_size.double())
    torch.testing.assert_close(more.mass, first.mass)


def test_steps_are_jittered_within_their_range():
    chains = hmc.sample(normal, spread(3, 2), draws=200, warmup=0, step_size=0.1, steps=(2, 5), mass=None)
    assert set(chains.steps.flatten().tolist()) == {2, 3, 4, 5}
    assert (chains.steps == chains.steps[:1]).all()


def test_divergences_are_counted():
    with pytest.warns(UserWarning, match=r"only 0.0% of the proposals were accepted, at step size 1"):
        chains = hmc.sample(
            lambda x: -1e4 * x.square().sum(1), spread(5, 1), draws=10, warmup=0, step_size=1.0, steps=5, mass=None
        )
    assert chains.divergences == 50
    assert bool((chains.accept == 0).all())


def nan_at_two(x):
    return torch.where(x[:, 0] > 1.5, float("nan"), normal(x))


START = torch.zeros(3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("log_prob", "init", "settings", "says"),
    [
        (normal, torch.zeros(3), {}, r"init has shape \(3,\); \(chains, dim\)"),
        (normal, torch.zeros(0, 2), {}, "at least one"),
        (normal, torch.zeros(3, 2, dtype=torch.int64), {}, "float64 or float32"),
        (normal, torch.zeros(3, 2, dtype=torch.float16), {}, "lose their digits"),
        (normal, torch.tensor([[0.0], [float("inf")]]), {}, "init is not finite in chain 1 "),
        (nan_at_two, torch.tensor([[0.0], [2.0], [3.0]]), {}, r"log_prob is not finite at the start of chains 1, 2"),
        (lambda x: x.log().sum(1), START - 1, {}, "transform constrained"),
        (lambda x: normal(x).sum(), START, {}, r"returned shape \(\) for positions \(3, 2\)"),
        (lambda x: -x.square(), START, {}, r"returned shape \(3, 2\)"),
        (lambda x: 1.0, START, {}, "returned float"),
        (lambda x: torch.zeros(3), START, {}, "does not depend on the position"),
        (lambda x: (normal(x), x[:, 0]), START, {}, r"gradient of shape \(3,\)"),
        (lambda x: 0 * x.sum(1), START, {}, "flat or improper"),
        (5, START, {}, "log_prob is int"),
        (normal, START, {"temperature": 0.0}, "temperature must be a finite number above 0"),
        (normal, START, {"draws": 0}, "draws must be a whole number of at least 1"),
        (normal, START, {"warmup": -1}, "warmup must be a whole number of at least 0"),
        (normal, START, {"warmup": 5}, "too short to adapt"),
        (normal, START, {"thin": 1.5}, "thin must be a whole number of at least 1"),
        (normal, START, {"target_accept": 1.0}, "target_accept"),
        (normal, START, {"steps": 0}, r"steps must be a whole number of at least 1 and at most 1e\+06"),
        (normal, START, {"steps": (5, 3)}, r"the most steps must be a whole number of at least 5 and at most 1e\+06"),
        (normal, START, {"steps": 2.5}, r"steps must be a whole number of at least 1 and at most 1e\+06"),
        (normal, START, {"steps": 3, "trajectory": 1.0}, "either steps or trajectory"),
        (normal, START, {"trajectory": -1.0}, "trajectory must be a finite number above 0"),
        (normal, START, {"trajectory": 1.0, "pooled": False}, "give steps"),
        (normal, START, {"trajectory": 1.0, "step_size": 1e-9}, "shorten it"),
        (normal, START, {"jitter": 1.0}, "jitter"),
        (normal, START, {"step_size": -0.1}, "step_size=-0.1"),
        (normal, START, {"step_size": torch.ones(2)}, "one per chain"),
        (normal, START, {"mass": "full"}, "mass must be one of 'auto', 'diagonal'"),
        (normal, START, {"mass": torch.ones(3)}, r"mass has shape \(3,\)"),
        (normal, START, {"mass": -torch.ones(2)}, "positive and finite"),
        (normal, START, {"generator": "0"}, "generator is str"),
    ],
)
def test_bad_input_gets_one_sentence(log_prob, init, settings, says):
    with pytest.raises(InvalidInput, match=says):
        hmc.sample(log_prob, init, **{"draws": 2, "warmup": 20, **settings})


def test_build_and_prior_period_refuse_what_cannot_be():
    with pytest.raises(InvalidInput, match="one number of steps"):
        hmc.build(normal, step_size=0.1, steps=(2, 3))
    with pytest.raises(InvalidInput, match="scale must be a finite number above 0"):
        hmc.prior_period(-1.0)


@pytest.mark.parametrize("sampler", [hmc, nuts])
@pytest.mark.parametrize(
    ("init", "dtype"),
    [(torch.zeros(6, 2), torch.float32), (np.zeros((6, 2)), torch.float64), ([[0.0, 1.0]] * 6, torch.float64)],
    ids=["float32", "array", "list"],
)
def test_starts_of_any_kind_keep_or_get_a_precision(sampler, init, dtype):
    chains = sampler.sample(normal, init, draws=150, warmup=80)
    assert chains.draws.dtype == chains.state.position.dtype == dtype
    assert chains.accept.dtype == chains.energy.dtype == torch.float64
    assert float(chains.draws.std()) == pytest.approx(1, abs=0.12)


def test_a_density_that_brings_its_gradient_is_asked_for_values_only_where_trajectories_end():
    class Gaussian:
        """Minus half the square; its gradient comes in a buffer that the next call overwrites."""

        def __init__(self):
            self.values, self.gradients, self.buffer = 0, 0, None

        def __call__(self, x):
            self.values += 1
            return -0.5 * x.square().sum(1), -x

        def gradient(self, x):
            self.gradients += 1
            self.buffer = x.new_empty(x.shape) if self.buffer is None else self.buffer
            return torch.neg(x, out=self.buffer)

    ours, plain = Gaussian(), lambda x: (-0.5 * x.square().sum(1), -x)
    settings = {"draws": 5, "warmup": 0, "steps": 7, "step_size": 0.3, "mass": None, "temperature": 0.5, "generator": 1}
    start = torch.zeros(3, 2, dtype=torch.float64)
    mine, theirs = hmc.sample(ours, start, **settings), hmc.sample(plain, start, **settings)
    assert torch.equal(mine.draws, theirs.draws)
    assert (ours.values, ours.gradients) == (2 + 5, 5 * 6)  # a look at what it returns, the start, and five ends


def test_an_adapted_step_size_leaves_float32_chains_what_they_are():
    seen = set()

    def log_prob(x):
        seen.add(x.dtype)
        return -0.5 * x.square().sum(dim=1)

    assert hmc.sample(log_prob, torch.zeros(2, 3), draws=2, warmup=20).draws.dtype == torch.float32
    assert seen == {torch.float32}


UNSCALED = torch.Generator().manual_seed(0)
X = 100 + 15 * torch.randn(60, generator=UNSCALED, dtype=torch.float64)
Y = 26 + 0.6 * X + 18 * torch.randn(60, generator=UNSCALED, dtype=torch.float64)


def unscaled(q):
    """Intercept, slope and log sd of a regression on x far from zero, with a half-Cauchy prior of the sd."""
    sd = q[:, 2].exp()
    off = Y - q[:, :1] - q[:, 1:2] * X
    return -0.5 * off.square().sum(1) / sd**2 - 60 * q[:, 2] + q[:, 2] - torch.log1p((sd / 2.5) ** 2)


def least_squares():
    """Coefficients, which are the posterior means since the prior of each is flat."""
    return torch.linalg.lstsq(torch.stack([torch.ones_like(X), X], 1), Y[:, None]).solution[:, 0]


@pytest.mark.parametrize(("sampler", "seed"), [(hmc, 0), (hmc, 1), (nuts, 0)])
def test_no_chain_freezes_on_an_unscaled_regression(sampler, seed):
    start = 4 * torch.rand(16, 3, dtype=torch.float64, generator=rng(seed)) - 2  # Stan's
    chains = sampler.sample(unscaled, start, draws=300, warmup=300, generator=seed)
    assert rhat(chains.draws).max() < 1.02
    assert chains.accept_rate.min() > 0.5
    off = (chains.draws[..., :2].mean((0, 1)) - least_squares()).abs() / chains.draws[..., :2].std((0, 1))
    assert off.max() < 0.1


@pytest.mark.parametrize("slope_scale", [1e-5, 1e5])
def test_scales_far_from_one_are_found(slope_scale):
    scale = torch.tensor([1.0, slope_scale], dtype=torch.float64)
    start = 4 * torch.rand(16, 2, dtype=torch.float64, generator=rng(3)) - 2
    chains = hmc.sample(lambda q: normal((q - 3 * scale) / scale), start, draws=300, warmup=300)
    assert rhat(chains.draws).max() < 1.02
    assert (chains.draws.std((0, 1)) / scale).tolist() == pytest.approx([1, 1], rel=0.1)
    assert (chains.draws.mean((0, 1)) / scale).tolist() == pytest.approx([3, 3], abs=0.1)


def test_a_straggler_keeps_a_step_size_of_its_own_and_does_not_hold_up_the_others():
    """Two far modes, the second a thousand times narrower: no step size fits both."""
    scale = torch.tensor([[1.0], [1e-3]], dtype=torch.float64)
    place = torch.tensor([[0.0], [50.0]], dtype=torch.float64)

    def two_modes(q):  # (chains, 2, dim) distances from both modes
        off = (q[:, None, :] - place) / scale
        return torch.logsumexp(-0.5 * off.square().sum(2) - q.shape[1] * scale[:, 0].log(), dim=1)

    start = spread(8, 2)
    start[7] = 50 + 1e-3 * start[7]
    with pytest.warns(UserWarning, match="look for several modes"):
        chains = hmc.sample(two_modes, start, draws=100, warmup=300)
    assert chains.accept_rate.min() > 0.5  # none is frozen
    assert chains.draws[7].std(0).tolist() == pytest.approx([1e-3] * 2, rel=0.5)
    assert len(chains.step_size) == 8
    assert bool((chains.step_size[:7] == chains.step_size[0]).all())


@pytest.mark.parametrize("sampler", [hmc, nuts])
@pytest.mark.parametrize("stop", [7, 40, 77, 118, 125])
def test_a_run_goes_on_from_any_iteration_to_the_same_numbers(sampler, stop, eight_schools):
    """In the fast interval, in a window, in the last interval, and among the draws; and it may be extended."""
    settings = {"warmup": 120, "thin": 2, "generator": 3}
    saved = {}

    def save(state):
        saved[int(state["adapted.at"]) + int(state["drawn"])] = {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()
        }

    start = spread(3, 10)
    whole = sampler.sample(eight_schools.log_prob, start, draws=9, save=save, save_every=1, **settings)
    assert all(isinstance(v, torch.Tensor | int | float) for v in saved[stop].values())
    settings["generator"] = 99  # the generator is that of the state
    again = sampler.sample(eight_schools.log_prob, torch.zeros_like(start), draws=9, resume=saved[stop], **settings)
    for name in ("draws", "log_prob", "accept", "energy", "diverging", "steps", "step_size", "mass"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    longer = sampler.sample(eight_schools.log_prob, start, draws=11, resume=saved[129], **settings)
    assert torch.equal(longer.draws[:, :9], whole.draws)
    assert longer.draws.shape == (3, 11, 10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"warmup": 60}, "is of warmup=50, not 60"),
        ({"draws": 1}, "has 2 draws; ask for draws of at least that"),
        ({"resume": {}}, "has no 'position'"),
        ({"init": torch.zeros(2, 2)}, r"has positions \(3, 2\) of torch.float64; init has \(2, 2\)"),
        ({"save_every": 0}, "save_every"),
    ],
)
def test_a_state_of_another_run_is_refused(change, says):
    states = []
    settings = {"init": spread(3, 2), "draws": 2, "warmup": 50}
    hmc.sample(normal, **settings, save=states.append)
    with pytest.raises(InvalidInput, match=says):
        hmc.sample(normal, **{**settings, "resume": states[-1], **change})


def test_every_chain_that_fails_is_named():
    """A chain in a narrow well at a step size for the others, and one that sees no density at the next step."""
    width = torch.tensor([[1.0], [1.0], [1e-4]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"only 0.0% of the proposals were accepted.* in chain 2 \(1 of 3\)") as said:
        chains = hmc.sample(
            lambda q: normal(q / width), spread(3, 1) * width, draws=20, warmup=0, step_size=0.3, mass=None
        )
    health = chains.health()
    assert health.divergences.tolist() == [0, 0, 20]
    assert "20 of 60 draws diverged, in chain 2 (1 of 3)" in str(said[0].message)
    assert len(said) == 1


def bounded(beyond):
    """A normal density, and something else where any coordinate is above 1."""
    return lambda q: torch.where((q > 1).any(dim=1), beyond - 0.0 * q.sum(dim=1), normal(q))


@pytest.mark.parametrize("beyond", [-math.inf, math.nan])
def test_a_cut_off_density_is_said_with_what_it_costs(beyond):
    """Warm-up makes steps small for a wall that the gradient does not see, and trajectories long."""
    with pytest.warns(UserWarning, match="was not finite") as said:
        chains = hmc.sample(bounded(beyond), torch.zeros(4, 2, dtype=torch.float64), draws=10, warmup=60)
    text = str(said[-1].message).lower()
    count, mean = int(chains.diverging.sum()), float(chains.steps.double().mean())
    assert count > 0
    assert f"in {count} of these log_prob or its gradient was not finite" in text
    assert mean > 256
    assert f"an iteration took {mean:.0f} leapfrog steps" in text
    assert chains.draws.max() <= 1


@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
def test_steps_that_were_given_are_not_warned_of():
    start = spread(4, 2) - 5
    chains = hmc.sample(bounded(-math.inf), start, draws=5, warmup=0, step_size=1e-3, mass=None, steps=300, thin=2)
    assert chains.mean_steps is None
    assert not any("leapfrog" in sentence for sentence in chains.health().sentences())
    chosen = hmc.sample(normal, start, draws=5, warmup=20, thin=2)
    assert chosen.mean_steps == pytest.approx(float(chosen.steps.double().mean()) / 2)


@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
def test_a_state_without_the_newest_column_goes_on():
    states = []
    hmc.sample(normal, spread(3, 2), draws=2, warmup=10, save=states.append)
    del states[-1]["columns.error"]
    chains = hmc.sample(normal, spread(3, 2), draws=4, warmup=10, resume=states[-1])
    assert chains.nonfinite.tolist() == [[False] * 4] * 3


@pytest.mark.parametrize("sampler", [hmc, nuts])
def test_no_proposal_without_density_is_accepted_and_its_error_is_infinite(sampler):
    """Also where burn-in takes whatever has a finite energy."""
    begin, g = torch.full((64, 1), 0.99, dtype=torch.float64), torch.Generator().manual_seed(0)
    state = hmc.init(begin, bounded(-math.inf))
    options = {"steps": 1, "metropolis": False} if sampler is hmc else {"max_depth": 1}
    new, info = sampler.update(state, bounded(-math.inf), step_size=0.5, generator=g, **options)
    assert bool(info.diverging.any())
    assert bool(info.error[info.diverging].isposinf().all())
    assert bool(new.log_prob.isfinite().all())


def test_healthy_runs_are_not_warned_of(recwarn):
    hmc.sample(normal, spread(8, 3), draws=500, warmup=200)
    nuts.sample(normal, spread(8, 3), draws=400, warmup=100)
    assert not recwarn.list


def test_split_rhat_is_that_of_arviz():
    x = spread(6, 200) + torch.tensor([0, 0, 0, 0, 0, 0.3])[:, None]
    assert float(split_rhat(x)) == pytest.approx(float(rhat(x, "split")))
    x[3] *= 3  # the same mean, another spread: only distances tell
    assert float(split_rhat(x)) > 1.05
    still = torch.ones(4, 50)
    assert float(split_rhat(still)) == 1.0
    still[0] = 2.0
    assert float(split_rhat(still)) == math.inf


@pytest.mark.parametrize("sampler", [hmc, nuts])
def test_a_dense_mass_samples_what_a_diagonal_one_does(sampler):
    """Invariance: exact draws stay exact under a mass that has nothing to do with the covariance."""
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    precision = torch.linalg.inv(root @ root.T)
    mass = torch.tensor([[[3.0, -1.0], [-1.0, 0.7]]], dtype=torch.float64)

    def log_prob(q):
        return -0.5 * ((q @ precision) * q).sum(1)

    state, generator = hmc.init(spread(10_000, 2) @ root.T, log_prob), rng(4)
    own = {"steps": 4} if sampler is hmc else {}
    for _ in range(3):
        state, info = sampler.update(state, log_prob, step_size=0.4, mass=mass, generator=generator, **own)
    assert 0.5 < info.accept.mean() < 0.98
    for direction in torch.linalg.inv(root):
        assert sps.kstest((state.position @ direction).numpy(), "norm").pvalue > 0.01


def test_a_mass_that_cannot_be_gets_one_sentence():
    with pytest.raises(InvalidInput, match=r"may be a diagonal for each or one matrix; give the matrix as \(1, 2, 2\)"):
        hmc.sample(normal, spread(2, 2), draws=2, warmup=0, step_size=0.1, mass=torch.eye(2))
    with pytest.raises(InvalidInput, match="symmetric positive definite"):
        hmc.sample(normal, spread(3, 2), draws=2, warmup=0, step_size=0.1, mass=-torch.eye(2))


def test_chains_fall_from_any_height_before_they_warm_up():
    """A log-density of -1e100 at some starts, where no step conserves the energy."""

    def log_prob(q):
        return -q.pow(20).sum(1) - 0.5 * q.square().sum(1)

    starts = torch.linspace(-1e5, 1e5, 12, dtype=torch.float64)[:, None].expand(-1, 2)
    chains = hmc.sample(log_prob, starts, draws=150, warmup=150)
    grid = np.linspace(-1.6, 1.6, 20_001)
    density = np.exp(-(grid**20) - 0.5 * grid**2)
    variance = (grid**2 * density).sum() / density.sum()
    assert chains.draws.square().mean((0, 1)).numpy() == pytest.approx(variance, rel=0.1)


def test_chains_near_the_bulk_stay_where_they_start():
    state, calls = hmc.init(3 * spread(8, 5), normal), []
    density = LogDensity(lambda q: calls.append(1) or normal(q))
    assert adaptation.approach(density, state).position.equal(state.position)
    assert len(calls) < 20


def modes(x, weights, at, widths):
    """A mixture of isotropic Gaussians (modes,) on the diagonal."""
    off = ((x[:, None] - torch.tensor(at)[:, None]) / torch.tensor(widths)[:, None]).square().sum(2)
    return torch.logsumexp(torch.tensor(weights).double() - x.shape[1] * torch.tensor(widths).log() - 0.5 * off, 1)


@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
@pytest.mark.parametrize("sampler", [hmc, nuts])
def test_a_chain_lost_in_a_mode_without_mass_goes_on_elsewhere(sampler):
    start = spread(8, 3)
    start[2] += 100
    kept = []
    chains = sampler.sample(
        lambda x: modes(x, [0.0, -60.0], [0.0, 100.0], [1.0, 1.0]), start, draws=50, warmup=100, save=kept.append
    )
    assert bool((chains.draws.mean((1, 2)).abs() < 2).all())
    assert chains.moved.tolist() == [False, False, True, False, False, False, False, False]
    assert len({tuple(row) for row in chains.draws[:, 0].tolist()}) == 8
    # a run that goes on from the middle of warm-up gives the same
    first = next(s for s in kept if s["drawn"] == 0)
    again = sampler.sample(
        lambda x: modes(x, [0.0, -60.0], [0.0, 100.0], [1.0, 1.0]), start, draws=50, warmup=100, resume=first
    )
    assert torch.equal(again.draws, chains.draws)
    assert torch.equal(again.moved, chains.moved)


@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
def test_modes_with_mass_keep_their_chains_however_low_they_are():
    start = spread(8, 3)
    start[2] += 500
    # as much mass as the other has, thirty times as wide, so that its density is lower by a factor of 3e4
    chains = hmc.sample(lambda x: modes(x, [0.0, 0.0], [0.0, 500.0], [1.0, 30.0]), start, draws=50, warmup=100)
    assert not bool(chains.moved.any())
    assert float(chains.draws[2].mean()) > 300


def test_warnings_point_at_the_users_line():
    with pytest.warns(UserWarning, match="hardly moved") as said:
        hmc.sample(lambda x: -1e4 * x.square().sum(1), spread(5, 1), draws=10, warmup=0, step_size=1.0, mass=None)
    assert said[0].filename == __file__
