"""Compiled iterations give the draws of uncompiled ones, and a density that cannot be compiled is sampled without."""

import gc
import warnings
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mlcollage.infer import LogDensity, Unhealthy, compiled, hmc
from mlcollage.infer.adaptation import one_step
from mlcollage.infer.metric import Metric

START = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SETTINGS = {"draws": 8, "warmup": 0, "step_size": 0.3, "steps": (1, 7), "mass": torch.tensor([1.0, 4.0, 0.5])}


def by_autograd(x):
    """A correlated density with a curved ridge."""
    return -0.5 * x.square().sum(1) - 0.5 * (x[:, 1] - x[:, 0].square()).square() + torch.sin(x[:, 2] * x[:, 1])


def traced_only(function, *example):
    """What is compiled, without the compiler: Python's state is frozen all the same."""
    return make_fx(function)(*(x.clone() for x in example))


def same(a, b):
    torch.testing.assert_close(a.draws, b.draws, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.energy, b.energy, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.accept, b.accept, rtol=0, atol=1e-6)
    assert torch.equal(a.steps, b.steps)
    assert torch.equal(a.diverging, b.diverging)


def test_compiled_draws_are_the_uncompiled_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", Unhealthy)  # of few draws
        quick = hmc.sample(by_autograd, START, compile=True, **SETTINGS)
    same(quick, hmc.sample(by_autograd, START, **SETTINGS))


@pytest.mark.parametrize(
    "settings",
    [
        {"mass": None},
        {"mass": torch.eye(3) + 0.5},
        {"step_size": torch.linspace(0.1, 0.6, 6), "jitter": 0.2},
        {"step_size": 1.9, "temperature": 2.0},
        # short: a step size that follows acceptances doubles a difference of rounding every iteration or so
        {"warmup": 20, "draws": 2, "step_size": None, "mass": "auto", "steps": None},
        {"warmup": 20, "draws": 2, "step_size": None, "mass": "dense", "pooled": False},
        {"warmup": 3, "step_size": 0.5, "metropolis_burn_in": False},
        {"thin": 2, "store": lambda x: x.view(-1, 3).square()},
    ],
    ids=["unit", "dense", "each", "large", "adapted", "each-dense", "burn-in", "stored"],
)
@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
def test_every_setting_gives_the_uncompiled_draws(settings, monkeypatch):
    monkeypatch.setattr(compiled, "_kernel", traced_only)
    monkeypatch.setattr(compiled, "_made", WeakKeyDictionary())
    given = {**SETTINGS, **settings}
    same(hmc.sample(by_autograd, START, compile=True, **given), hmc.sample(by_autograd, START, **given))


def branches(x):
    return by_autograd(x) if float(x.detach().sum()) < 1e9 else by_autograd(2 * x)


def leaves_torch(x):
    return -0.5 * x.square().sum(1), torch.from_numpy(-x.detach().numpy())


class Stateful:
    """A density that changes with every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return by_autograd(x) * (1 + self.calls)


class ByHand:
    """A density with a method for its gradient."""

    def __call__(self, x):
        return -0.5 * x.square().sum(1), -x

    def gradient(self, x):
        return -x


@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
@pytest.mark.parametrize(
    ("log_prob", "why"),
    [
        (branches, r"cannot be compiled \(.*\)"),
        (leaves_torch, "cannot be compiled"),
        (ByHand(), "a method for its gradient"),
    ],
)
def test_what_cannot_be_compiled_is_said_and_sampled_without(log_prob, why):
    with pytest.warns(UserWarning, match=why) as said:  # of few draws it warns too
        slow = hmc.sample(log_prob, START, compile=True, **SETTINGS)
    assert len([w for w in said if "compile=True has no effect" in str(w.message)]) == 1
    assert said[0].filename == __file__
    assert torch.equal(slow.draws, hmc.sample(log_prob, START, **SETTINGS).draws)


def test_a_density_with_a_state_of_its_own_is_found_out(monkeypatch):
    monkeypatch.setattr(compiled, "_kernel", traced_only)
    with pytest.warns(UserWarning, match="it gives other values"):
        hmc.sample(Stateful(), START, compile=True, **SETTINGS)


@pytest.mark.filterwarnings("ignore::mlcollage.infer.Unhealthy")
def test_a_second_run_takes_the_kernels_of_the_first_unless_the_data_changed(monkeypatch):
    calls, scale = [], [1.0]

    def counted(function, *example):
        calls.append(function)
        return traced_only(function, *example)

    def log_prob(x):
        return by_autograd(x) * scale[0]

    monkeypatch.setattr(compiled, "_kernel", counted)
    runs = [hmc.sample(log_prob, START, compile=True, **SETTINGS) for _ in range(2)]
    assert torch.equal(runs[0].draws, runs[1].draws)
    made = len(calls)
    assert made == len({f.func.__name__ + str(f.args) if hasattr(f, "func") else f.__name__ for f in calls})
    scale[0] = 2.0
    same(hmc.sample(log_prob, START, compile=True, **SETTINGS), hmc.sample(log_prob, START, **SETTINGS))
    assert len(calls) == 2 * made


def test_kernels_do_not_keep_a_density_and_its_data_in_memory(monkeypatch):
    monkeypatch.setattr(compiled, "_kernel", traced_only)
    made = WeakKeyDictionary()
    monkeypatch.setattr(compiled, "_made", made)

    def log_prob(x):
        return by_autograd(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unhealthy)
        hmc.sample(log_prob, START, compile=True, **SETTINGS)
    assert len(made) == 1
    del log_prob
    gc.collect()
    assert len(made) == 0


@pytest.mark.parametrize("steps", range(1, 11))
def test_any_number_of_steps_gives_the_uncompiled_trajectories(steps, monkeypatch):
    monkeypatch.setattr(compiled, "_kernel", traced_only)
    monkeypatch.setattr(compiled, "_made", WeakKeyDictionary())
    density = LogDensity(by_autograd)
    metric = Metric(torch.eye(3, dtype=torch.float64)[None] + 0.5)
    iteration, state = compiled.CompiledIteration(density), density.state(START)
    noise, step = torch.Generator().manual_seed(3), torch.full((6,), 0.25, dtype=torch.float64)
    found, info, turned = iteration(state, step, steps, metric, True, noise)
    assert found.position.shape == START.shape
    noise = torch.Generator().manual_seed(3)
    p0, expected = metric.draw(START, noise), torch.zeros(6, dtype=torch.bool)
    end, p = hmc._integrate(state, p0, density, step, steps, metric, expected)
    rise = 0.5 * ((p @ metric.inverse[0]) * p - (p0 @ metric.inverse[0]) * p0).sum(1) + state.log_prob - end.log_prob
    torch.testing.assert_close(info.error, rise)
    assert torch.equal(turned, expected)
    accepted = torch.rand(6, dtype=torch.float64, generator=noise) < (-rise).exp()
    torch.testing.assert_close(found.position, torch.where(accepted[:, None], end.position, START))


@pytest.mark.parametrize("mass", [None, torch.tensor([1.0, 4.0, 0.5]), torch.eye(3) + 0.5])
def test_the_trial_step_of_warm_up_is_the_uncompiled_one(mass, monkeypatch):
    monkeypatch.setattr(compiled, "_kernel", traced_only)
    monkeypatch.setattr(compiled, "_made", WeakKeyDictionary())
    density, metric = LogDensity(by_autograd), Metric.of(mass, START)
    state, step = density.state(START), torch.logspace(-2, 1, 6, dtype=torch.float64)
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    found = compiled.CompiledIteration(density, dense=True).one_step(state, metric, one)(step)
    torch.testing.assert_close(found, one_step(density, state, metric, other)(step))
    assert torch.equal(one.get_state(), other.get_state())
