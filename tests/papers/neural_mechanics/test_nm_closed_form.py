"""The closed forms against independent solvers, across damping regimes, and at lengths where naive sums overflow."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.closed_form import Oscillator, _march, oscillator, predict, propagator


def critical_decay(lr, momentum, kind):
    """λ at which γ² = ω²."""
    mass = lr * (1 + momentum) / 2
    return (1 - momentum) ** 2 / (4 * mass * (1 if kind == "translation" else 2))


def by_solver(Q0, lr, decay, momentum, dampening, forcing, kind):
    """m Q'' + c Q' + wλ Q = 2m V/(1-d)², by a general-purpose solver restarted at each step."""
    h, w = lr * (1 - dampening), 1 if kind == "translation" else 2
    m, c = h * (1 + momentum) / 2, 1 - momentum
    state, out = np.array([Q0, 0.0]), [Q0]
    for V in forcing:

        def slope(t, y, V=V):
            return [y[1], (2 * m * V / (1 - dampening) ** 2 - c * y[1] - w * decay * y[0]) / m]

        state = solve_ivp(slope, (0, h), state, rtol=1e-11, atol=1e-13, method="DOP853").y[:, -1]
        out.append(state[0])
    return np.array(out)


@pytest.mark.parametrize("kind", ["translation", "scale"])
@pytest.mark.parametrize("times_critical", [0.0, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_the_oscillator_follows_its_differential_equation_in_every_regime(kind, times_critical, momentum):
    lr, dampening = 0.1, 0.3
    decay = times_critical * critical_decay(lr * (1 - dampening), momentum, kind)
    rng = np.random.default_rng(0)
    forcing = np.zeros(40) if kind == "translation" else rng.random(40)
    expected = by_solver(1.5, lr, decay, momentum, dampening, forcing, kind)
    found = predict(1.5, lr, decay, momentum, dampening, 40, None if kind == "translation" else forcing, kind=kind)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    regime = oscillator(lr, decay, momentum, dampening, kind=kind).regime
    assert regime == {0.0: "over", 0.01: "over", 1.0: "critical", 30.0: "under"}[times_critical]


@pytest.mark.parametrize("times_critical", [0.0, 0.2, 1.0, 5.0])
def test_the_free_recursion_is_the_closed_form(times_critical):
    lr, momentum = 0.05, 0.9
    decay = times_critical * critical_decay(lr, momentum, "translation")
    free = oscillator(lr, decay, momentum)
    np.testing.assert_allclose(
        predict(1.0, lr, decay, momentum, steps=3000, kind="translation"),
        free.factor(lr * np.arange(3001)),
        atol=1e-11,
    )


@given(st.floats(-12, -2), st.booleans())
@settings(max_examples=30, deadline=None)
def test_nothing_jumps_at_critical_damping(log_distance, above):
    lr, momentum = 0.1, 0.9
    critical = critical_decay(lr, momentum, "translation")
    near = critical * (1 + (1 if above else -1) * 10**log_distance)
    paths = [predict(1.0, lr, decay, momentum, steps=300, kind="translation") for decay in (critical, near)]
    assert np.abs(paths[0] - paths[1]).max() < 2 * 10**log_distance + 1e-12
    factors = [oscillator(lr, decay, momentum).factor(lr * np.arange(301)) for decay in (critical, near)]
    assert np.abs(factors[0] - factors[1]).max() < 2 * 10**log_distance + 1e-12


def test_the_free_oscillator_is_exact_in_textbook_cases():
    t = np.linspace(0, 5, 50)
    np.testing.assert_allclose(Oscillator(0.0, 4.0).factor(t), np.cos(2 * t), atol=1e-14)
    np.testing.assert_allclose(Oscillator(1.0, 0.0).factor(t), 1.0, atol=1e-14)
    s = math.sqrt(3.0)
    over = ((-2 + s) * np.exp((-2 - s) * t) - (-2 - s) * np.exp((-2 + s) * t)) / (2 * s)
    np.testing.assert_allclose(Oscillator(2.0, 1.0).factor(t), over, rtol=1e-12)


def test_slow_decay_keeps_its_digits():
    """ω² far below γ²: the slow rate is a difference of nearly equal numbers if computed naively."""
    free = Oscillator(1.0, 1e-14)
    assert free.factor(1e14) == pytest.approx(math.exp(-0.5), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("decay", [0.0, 1e-4, 1e3])
def test_a_million_steps_do_not_overflow(momentum, decay):
    rng = np.random.default_rng(1)
    path = predict(np.ones(2), 0.1, decay, momentum, steps=1_000_000, forcing=rng.random((1_000_000, 2)))
    assert np.isfinite(path).all()
    if decay:
        # It settles where 2λQ = 2m‖θ'‖² (η‖g‖² without momentum), and the start is forgotten.
        balance = 0.1 * (1 + momentum) * 0.5 / (2 * decay)
        assert path[-100_000:].mean() == pytest.approx(balance, rel=0.1)


def test_without_momentum_it_is_the_papers_integral():
    """Equation 19 with a forcing constant over each step, summed naively in the short."""
    lr, decay, steps = 0.1, 0.3, 60
    rng = np.random.default_rng(2)
    G = rng.random((steps, 3))
    found = predict(np.ones(3), lr, decay, steps=steps, forcing=G, kind="rescale")
    expected = np.exp(-2 * decay * lr * steps) * np.ones(3)
    for k in range(steps):
        # ∫ over the step of e^{-2λ(t-τ)} dτ
        early, late = (np.exp(-2 * decay * lr * (steps - j)) for j in (k, k + 1))
        expected = expected + lr * G[k] * (late - early) / (2 * decay)
    np.testing.assert_allclose(found[-1], expected, rtol=1e-12)


@pytest.mark.parametrize(("momentum", "order"), [(0.0, 1), (0.9, 1), (0.0, 2), (0.9, 2)])
def test_a_constant_schedule_is_the_constant(momentum, order):
    rng = np.random.default_rng(3)
    forcing = rng.random((50, 2))
    constant = predict([1.0, -2.0], 0.1, 0.01, momentum, 0.2, 50, forcing, order=order)
    each = [propagator(0.1, 0.01, momentum, 0.2, order=order)] * 50
    marched = _march(each, np.full(50, 0.1), np.array([1.0, -2.0]), forcing)
    np.testing.assert_allclose(constant, marched, rtol=1e-10)


def test_a_schedule_joins_its_pieces():
    rates = np.repeat([0.1, 0.05], 30)
    whole = predict(1.0, rates, 0.2, steps=60, kind="translation")
    first = predict(1.0, 0.1, 0.2, steps=30, kind="translation")
    second = predict(first[-1], 0.05, 0.2, steps=30, kind="translation")
    np.testing.assert_allclose(whole, np.concatenate([first, second[1:]]), rtol=1e-12)


def test_dampening_without_momentum_does_nothing_as_in_torch():
    assert (propagator(0.1, 0.2, 0.0, 0.9).transition == propagator(0.1, 0.2).transition).all()


def test_the_oscillator_conserves_without_decay_and_forcing():
    assert predict([3.0], 0.1, 0.0, 0.9, steps=20, kind="scale") == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, not 0.0"),
        ({"lr": [0.1, -1.0, 0.1]}, "lr must be a finite number above 0, not -1.0"),
        ({"lr": math.inf}, "finite"),
        ({"weight_decay": -1e-3}, "weight_decay must be a finite number of at least 0"),
        ({"weight_decay": math.nan}, "finite"),
        ({"momentum": 1.0}, "momentum must be .* below 1"),
        ({"momentum": -0.1}, "of at least 0"),
        ({"dampening": 1.0}, "dampening must be .* below 1"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "whole number"),
        ({"lr": [0.1, 0.2]}, "one per step"),
        ({"forcing": np.ones((2, 1))}, "forcing has shape"),
        ({"kind": "translation", "forcing": np.ones(3)}, "has no forcing"),
        ({"kind": "rotation"}, "must be one of"),
        ({"order": 3}, "order must be a whole number of at least 1 and at most 2"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changed, words):
    arguments = {"Q0": 1.0, "lr": 0.1, "weight_decay": 0.0, "steps": 3} | changed
    with pytest.raises(InvalidInput, match=words):
        predict(**arguments)
