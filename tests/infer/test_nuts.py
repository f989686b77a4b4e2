"""NUTS: exact where the answer is known, trajectories as long as they should be."""

import numpy as np
import pytest
import torch
from scipy import stats as sps

from mlcollage.errors import InvalidInput
from mlcollage.infer import hmc, nuts
from mlcollage.infer.diagnostics import bfmi, ess, rhat
from mlcollage.infer.nuts import _checkpoints


def normal(x):
    return -0.5 * x.square().sum(dim=1)


def spread(chains, dim, seed=1, scale=1.0):
    return scale * torch.randn(chains, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("posterior", ["regression", "eight_schools"])
def test_a_known_posterior_is_met_in_mean_and_variance(posterior, request):
    known = request.getfixturevalue(posterior)
    chains = nuts.sample(known.log_prob, spread(16, known.dim, scale=0.5), draws=300, warmup=200, generator=2)
    x = known.quantities(chains.draws)
    off = (x.mean((0, 1)).numpy() - known.mean) / (known.sd / np.sqrt(ess(x, "mean")))
    assert np.abs(off).max() < 3.5
    assert x.std((0, 1)).numpy() == pytest.approx(known.sd, rel=0.15)
    assert rhat(x).max() < 1.02
    assert bfmi(chains.energy).min() > 0.3
    assert chains.divergences < 0.01 * 16 * 300


@pytest.mark.parametrize("step_size", [0.3, 1.1])
def test_the_target_is_invariant_under_an_update(step_size):
    """Chains that begin as exact draws stay exact draws: only a right choice within the trajectory does that."""
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)

    def log_prob(x):
        return normal(x / scale)

    state = hmc.init(spread(10_000, 2) * scale, log_prob)
    for _ in range(3):
        state, info = nuts.update(state, log_prob, step_size=step_size, max_depth=5, generator=generator)
    assert info.steps.unique().numel() > 2
    for i in range(2):
        assert sps.kstest((state.position[:, i] / scale[i]).numpy(), "norm").pvalue > 0.01


def test_checkpoints_close_every_balanced_stretch_once():
    """Against brute force: the stretches that end at a leaf are those of lengths 2, 4, 8, ... that are aligned."""
    stored = {}
    for leaf in range(64):
        least, most = _checkpoints(leaf)
        if leaf % 2 == 0:
            stored[most] = leaf
            continue
        begins = [stored[level] for level in range(least, most + 1)]
        expected = [leaf + 1 - n for n in (64, 32, 16, 8, 4, 2) if (leaf + 1) % n == 0]
        assert begins == expected


def test_trajectories_end_after_about_half_a_turn():
    """On N(0, I) of many dimensions momenta turn round after a time of pi: doublings overshoot it at most once."""
    state = hmc.init(spread(200, 100), normal)
    _, info = nuts.update(state, normal, step_size=0.1, generator=torch.Generator().manual_seed(0))
    time = 0.1 * (info.steps.double() + 1)
    assert time.min() > 1.5
    assert time.max() < 2 * 2 * np.pi


def test_the_depth_is_bounded():
    state = hmc.init(spread(50, 2), normal)
    _, info = nuts.update(state, normal, step_size=1e-3, max_depth=3, generator=torch.Generator().manual_seed(0))
    assert info.steps.tolist() == [7] * 50


def test_divergences_are_flagged_and_the_old_state_stays():
    def cliff(x):
        return torch.where(x[:, 0].abs() < 1, normal(x), float("nan"))

    state = hmc.init(spread(300, 1).clamp(-0.9, 0.9), cliff)
    new, info = nuts.update(state, cliff, step_size=3.0, generator=torch.Generator().manual_seed(0))
    assert bool(info.diverging.any())
    assert bool((new.position.abs() < 1).all())
    assert bool(new.log_prob.isfinite().all())
    stayed = ~info.accepted
    assert torch.equal(new.position[stayed], state.position[stayed])


def test_state_and_energy_belong_together():
    state = hmc.init(spread(100, 3), normal)
    new, info = nuts.update(state, normal, step_size=0.7, generator=torch.Generator().manual_seed(0))
    fresh = hmc.init(new.position, normal)
    assert torch.allclose(new.log_prob, fresh.log_prob)
    assert torch.allclose(new.gradient, fresh.gradient)
    assert bool((info.energy >= -new.log_prob).all())
    assert bool(((info.accept > 0) & (info.accept <= 1)).all())


def test_same_seed_same_numbers():
    a, b, c = (nuts.sample(normal, spread(3, 2), draws=10, warmup=20, generator=s).draws for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_temperature_and_unpooled_chains():
    scale = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)[:, None]
    chains = nuts.sample(
        lambda x: normal(x / scale), spread(3, 2) * scale, draws=400, warmup=200, temperature=0.25, pooled=False
    )
    assert (chains.draws.std((1, 2)) / scale[:, 0]).tolist() == pytest.approx([0.5] * 3, rel=0.2)


@pytest.mark.parametrize("depth", [0, 21, 2.0, True])
def test_a_depth_that_cannot_be_gets_one_sentence(depth):
    with pytest.raises(InvalidInput, match="max_depth"):
        nuts.sample(normal, spread(2, 2), max_depth=depth)


def test_starts_are_checked_as_in_hmc():
    with pytest.raises(InvalidInput, match="not finite at the start of chain 0"):
        nuts.sample(lambda x: x.log().sum(1), -torch.ones(1, 2))


def steps_by_brute_force(p, mass, max_depth):
    """Steps of a trajectory that always doubles forward, given all its momenta; every stretch summed from scratch."""

    def bad(a, b, rho):
        return a @ (rho / mass) <= 0 or b @ (rho / mass) <= 0

    def turned(i, j):  # points i..j, an even number of them
        m = (i + j + 1) // 2
        return (
            bad(p[i], p[j], p[i : j + 1].sum(0))
            or bad(p[i], p[m], p[i : m + 1].sum(0))
            or bad(p[m - 1], p[j], p[m - 1 : j + 1].sum(0))
        )

    for depth in range(max_depth):
        n = 2**depth
        for leaf in range(n):
            lengths = [length for length in (2, 4, 8, 16, 32) if length <= n and (leaf + 1) % length == 0]
            if any(turned(n + leaf + 1 - length, n + leaf) for length in lengths):
                return n + leaf
        if turned(0, 2 * n - 1):
            break
    return 2 * n - 1


@pytest.mark.parametrize("step_size", [0.05, 0.3, 0.5])
def test_trajectories_end_where_brute_force_says(step_size, monkeypatch):
    """All stretches of a trajectory, each checked anew from the list of momenta, against the checkpoints."""
    monkeypatch.setattr(nuts._Trajectory, "chance", lambda self: torch.zeros_like(self.zero))
    scale, mass = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64), torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)

    def log_prob(x):
        return normal(x / scale) - 0.01 * x.pow(4).sum(1)

    state, generator = hmc.init(spread(60, 3) * scale, log_prob), torch.Generator()
    _, info = nuts.update(
        state, log_prob, step_size=step_size, mass=mass[None], max_depth=6, generator=generator.manual_seed(5)
    )
    p = torch.randn(60, 3, dtype=torch.float64, generator=generator.manual_seed(5)) * mass.sqrt()
    path, here = [p], state
    for _ in range(63):
        here, p = hmc.leapfrog(here, p, log_prob, step_size=step_size, steps=1, mass=mass)
        path.append(p)
    momenta = torch.stack(path, dim=1).numpy()
    expected = [steps_by_brute_force(momenta[c], mass.numpy(), 6) for c in range(60)]
    assert not bool(info.diverging.any())
    assert info.steps.tolist() == expected
    assert len(set(expected)) >= 3
